"""Pages of listings in the dialects of several servers, against botocore's own parser."""

import botocore.parsers
import botocore.session
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mediafm_ray.storage.s3 import _parse_contents

SHAPE = botocore.session.Session().get_service_model("s3").operation_model("ListObjectsV2").output_shape
KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"), min_size=1).filter(
    lambda key: key == key.strip()
)
ORDERS = [("Key", "LastModified", "ETag", "Size"), ("ETag", "Key", "LastModified", "Size"), ("Size", "LastModified", "Key", "ETag")]
TIMES = ["2026-01-02T03:04:05.678Z", "2026-01-02T03:04:05+00:00", "Fri, 02 Jan 2026 03:04:05 GMT"]
REFERENCES = {
    "S3": {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"},
    "Go": {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;"},
    "few": {"&": "&amp;", "<": "&lt;"},
    "numbers": {"&": "&#38;", "<": "&#x3c;"},
}


def page(keys, dialect, order, time, more=""):
    def text(value):
        return "".join(REFERENCES[dialect].get(letter, letter) for letter in value)

    def entry(number, key):
        values = {"Key": text(key), "LastModified": time, "ETag": text('"0123abcd-2"'), "Size": str(number)}
        return "".join(f"<{name}>{values[name]}</{name}>" for name in order)

    found = "".join(f"<Contents>{entry(number, key)}{more}</Contents>\n" for number, key in enumerate(keys))
    head = '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    tail = "<CommonPrefixes><Prefix>a/b</Prefix></CommonPrefixes><NextContinuationToken>t&amp;1</NextContinuationToken>"
    return f"{head}<Name>bucket</Name>{found}<IsTruncated>true</IsTruncated>{tail}</ListBucketResult>".encode()


def parsed(body):
    return botocore.parsers.create_parser("rest-xml").parse({"body": body, "headers": {}, "status_code": 200, "context": {}}, SHAPE)


def chosen(entries):
    return [[entry[name] for name in ("Key", "LastModified", "ETag", "Size")] for entry in entries]


def assert_as_botocore(body, is_parsed_here):
    response, found = {"body": body}, {}
    _parse_contents(response, found)
    assert ("Contents" in found) == is_parsed_here
    expected, rest = parsed(body), parsed(response["body"])
    assert chosen(found.get("Contents", rest.get("Contents", []))) == chosen(expected.pop("Contents", []))
    rest.pop("Contents", None)
    assert rest == expected


@settings(max_examples=60)
@given(st.lists(KEYS, min_size=1, max_size=4), st.sampled_from(["S3", "Go", "few"]), st.sampled_from(ORDERS), st.sampled_from(TIMES))
def test_pages_are_parsed_as_botocore_does(keys, dialect, order, time):
    assert_as_botocore(page(keys, dialect, order, time), is_parsed_here="\ufffd" not in "".join(keys))


def test_an_owner_is_no_field_of_the_object():
    owner = "<Owner><ID>0</ID><DisplayName>me</DisplayName></Owner><StorageClass>STANDARD</StorageClass>"
    assert_as_botocore(page(["a", "b"], "S3", ORDERS[0], TIMES[0], owner), is_parsed_here=True)


@pytest.mark.parametrize(
    "body",
    [
        page([], "S3", ORDERS[0], TIMES[0]),
        page(["a&b"], "numbers", ORDERS[0], TIMES[0]),
        page(["a"], "S3", ORDERS[0], TIMES[0], "<!-- <Key>b</Key> -->"),
        page(["a"], "S3", ORDERS[0], TIMES[0]).replace(b"<Key>a<", b"<Key><![CDATA[<a>]]><"),
        page(["a", "b"], "S3", ORDERS[0], TIMES[0]).partition(b"<Size>1")[0],
        page(["a", "b"], "S3", ORDERS[0], TIMES[0]).replace(b"<Size>1</Size>", b"").replace(b"ETag", b"Tag"),
        b"<Error><Code>AccessDenied</Code><Message>No</Message></Error>",
    ],
)
def test_other_answers_are_left_to_botocore(body):
    response, found = {"body": body}, {}
    _parse_contents(response, found)
    assert (response["body"], found) == (body, {})
