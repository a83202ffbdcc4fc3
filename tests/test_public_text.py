"""Texts for people: secrets of addresses never come out, nothing drives a terminal or forges a line, and neither takes long."""

import json
import re
import string
import time
import urllib.parse

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mediafm_ray.errors import TitleError
from mediafm_ray.media.source import file_name
from mediafm_ray.models.weights import WeightsError, with_endpoint
from mediafm_ray.storage.base import StorageConfig
from mediafm_ray.storage.catalog import CatalogError
from mediafm_ray.storage.errors import StorageError, explain
from mediafm_ray.storage.store import absolute, join
from mediafm_ray.text import PublicError, escape_controls, escape_controls_in_json, public_line, public_lines, public_text, public_uri

HARMFUL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ADDRESS_CHARACTERS = string.ascii_letters + string.digits + "-._~!$&'()*+,;=:"
WEB = st.sampled_from(["http", "https", "HTTPS"])
STORES = st.sampled_from(["s3", "gs", "abfs", "az", "hdfs", "ftp", "redis"])
TEXT = st.text(st.characters(), max_size=60)
JUNK = st.text(ADDRESS_CHARACTERS, max_size=8)
# long enough not to stand in the rest by chance, and marked, so that no part of it does
SECRETS = st.text(string.ascii_letters + string.digits, min_size=12, max_size=40).map(lambda text: f"Zq7{text}7qZ")
HOSTS = st.sampled_from(["host", "host:9000", "127.0.0.1:80", "[::1]:8080", "bucket.s3.amazonaws.com", "\u043f\u0440\u0438.example"])


@st.composite
def secretive(draw):
    """A text with an address in it that holds a secret, and the secret."""
    secret, web = draw(SECRETS), draw(st.booleans())
    scheme, host, before, after = draw(WEB if web else STORES), draw(HOSTS), draw(JUNK), draw(JUNK)
    path = "/" + draw(st.text(ADDRESS_CHARACTERS + "/@", max_size=20))
    kind = draw(st.sampled_from(["password", "user", "raw password", "query", "signature", "several"]))
    user, query = "", ""
    if kind == "password" or (kind == "user" and not web):
        user = f"{before}:{secret}{after}@"
    elif kind == "user":
        user = f"{before}{secret}{after}@"
    elif kind == "raw password":  # as people paste them: not encoded, and with the characters that end a host
        user = f"user{draw(st.text(string.ascii_letters, max_size=5))}:p{before}{draw(st.sampled_from('/?#@'))}{secret}{after}@"
    elif kind == "query" and web:
        query = f"?{before}{secret}{after}"
    else:
        query = f"?{draw(st.text(string.ascii_letters, max_size=5))}X-Amz-Signature={before}{secret}{after}"
    plain = uri = f"{scheme}://{user}{host}{path}{query}"
    if kind == "several":
        uri = f"https://host/a,{uri}"
    for _ in range(draw(st.integers(0, 3))):
        uri = urllib.parse.quote(uri, safe="")
    if draw(st.booleans()):
        uri = uri.replace("/", "\\/")
    around = draw(st.sampled_from([("", ""), ("'", "'"), ('"', '"'), ("(", ")"), ("<", ">"), ("url=", ","), ("URL('", "')"), ("[", "].")]))
    return draw(TEXT) + draw(st.sampled_from([" ", "\n", "\t"])) + around[0] + uri + around[1] + " " + draw(TEXT), secret, plain


@settings(max_examples=400, deadline=None)
@given(secretive())
def test_no_secret_of_an_address_comes_out(case):
    text, secret, uri = case
    assert secret in text
    for shown in (public_text(text), public_line(text), public_lines(text), public_uri(uri), str(TitleError(text))):
        assert secret not in shown
    assert secret not in file_name(uri)
    assert secret not in str(StorageError(explain(OSError(5, text), uri)))


@settings(max_examples=400, deadline=None)
@given(TEXT, TEXT)
@example("https://[::1/a?b#c", "")
@example("%3A%2F%2F%40%3F=", "//")
def test_any_text_is_taken_and_comes_out_printable_and_whole_where_it_holds_no_address(text, other):
    assert not HARMFUL.search(public_line(text))
    assert not HARMFUL.search(public_lines(text).replace("\n", ""))
    assert public_lines(text).count("\n") == text.count("\n")
    assert public_line(public_line(text)) == public_line(text)
    assert not HARMFUL.search(str(TitleError(text)))
    valid = text.encode(errors="replace").decode()  # of others a catalog says that they are no URI
    for uri in (text, valid, f"https://{text}", f"s3://{text}", f"file://{valid}"):
        public_uri(uri), file_name(uri), join(uri, other), with_endpoint(uri, f"https://{other}")
    if not any(mark in text for mark in "@?%"):
        assert public_text(text) == text
    if "://" not in text:
        assert public_uri(text) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="\0~:"), max_size=60))
def test_any_local_path_becomes_absolute(text):
    path = absolute(text)
    assert not text or path.startswith("/")
    assert absolute(path) == path


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=10))
def test_json_holds_the_same_when_its_control_characters_are_escaped(content):
    for indent in (None, 2):
        text = escape_controls_in_json(json.dumps(content, ensure_ascii=False, indent=indent))
        assert json.loads(text) == content
        assert not HARMFUL.search(text.replace("\n", ""))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("503, url='http://h:1/a.mp4?X-Amz-Signature=S'", "503, url='http://h:1/a.mp4'"),
        ("see (https://user:pass@h/a?x), and http://h:80/b#c.", "see (https://h/a), and http://h:80/b#c."),
        ("https://user:pa/ss@host/path ok", "https://host/path ok"),
        ("s3://b/k#endpoint_url=http://u:p@h:1&sha256=ab", "s3://b/k#endpoint_url=http://h:1&sha256=ab"),
        ("abfs://container@account.dfs.core.windows.net/a?sig=x", "abfs://container@account.dfs.core.windows.net/a"),
        ("https%253A%252F%252Fu%253Ap%2540host%252Fa%253Fsig%253DS", "https%253A%252F%252Fhost%252Fa"),
        (r'{"url":"https:\/\/u:p@h\/a?sig=1"}', r'{"url":"https:\/\/h\/a"}'),
        ("exceeded with url: /b?list-type=2&k=1 (Caused by X)", "exceeded with url: /b (Caused by X)"),
        # what holds no secret stays
        ("https://[::1]:80/a@b and hub:owner/name@abc", "https://[::1]:80/a@b and hub:owner/name@abc"),
        ("s3://b/shots/shard=00/t@s.parquet: what? a=b", "s3://b/shots/shard=00/t@s.parquet: what? a=b"),
        ("https://h/what%3F.mp4, s3://b/what?.mp4", "https://h/what%3F.mp4, s3://b/what?.mp4"),
    ],
)
def test_what_is_left_of_addresses(text, shown):
    assert public_text(text) == shown


def test_uris_as_they_are_stored():
    assert public_uri("https://user:pass@host/a b.mp4?sig=1 2#x") == "https://host/a b.mp4"
    assert public_uri("https://[::1/a?x#y") == "https://[::1/a"
    assert public_uri("gs://bucket/a#12") == "gs://bucket/a#12"
    for local in ("/data/what?a=b.mp4", "a@b.mp4", "file:///data/what?a=b.mp4"):
        assert public_uri(local) == local


@pytest.mark.parametrize(
    "hostile",
    [
        *("http://x:a" * 100_000, "http:" + "/" * 1_000_000, "a:/" * 300_000, "http://" + "a@" * 500_000, "x://a" * 200_000 + "@"),
        *("%25" * 300_000, "%2525" * 200_000 + "%3a", "http%3A%2F%2F" * 100_000 + "%3A", "http%3a%2f%2f" + "%" * 1_000_000),
        *("?" * 1_000_000, "=?" * 500_000, "\\" * 1_000_000 + "/", ":" + "\\/" * 500_000),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_megabyte_takes_less_than_two_seconds(hostile):
    start = time.process_time()
    public_line(hostile)
    assert time.process_time() - start < 2


def test_errors_for_people_hold_neither_secrets_nor_control_characters():
    said = "at s3://u:SECRET@b/k?sig=SECRET: \x1b[2J\x85\u202efdp.exe\nFORGED"
    for kind in (PublicError, TitleError, StorageError, WeightsError):
        assert str(kind(said)) == r"at s3://b/k: \x1b[2J\x85\u202efdp.exe\nFORGED"
    problems = ["line 1: https://u:SECRET@h/a", "line 2\nFORGED"]
    assert str(CatalogError("https://h/c.csv?sig=SECRET", problems)).splitlines() == [
        "catalog https://h/c.csv: 2 problems; nothing was started",
        "  line 1: https://h/a",
        r"  line 2\nFORGED",
    ]
    with pytest.raises(ValueError, match=r"is host:9000$"):
        StorageConfig(endpoint_url="user:SECRET@host:9000")


def test_control_characters_are_written_as_python_does():
    assert escape_controls("a\tb\r\n\0\x7f\x9b\u2066\ud800\u00e9\u200d") == "a\\tb\\r\\n\\x00\\x7f\\x9b\\u2066\\ud800\u00e9\u200d"
