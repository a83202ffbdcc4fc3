"""What a listing does not tell: folders that cannot be read, servers that fail, names that URIs write in another way."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mediafm_ray.errors import OutageError, TitleError
from mediafm_ray.media import source
from mediafm_ray.media.options import MediaConfig
from mediafm_ray.storage.catalog import CatalogError, read_catalog
from mediafm_ray.storage.catalog_rows import BadRow
from mediafm_ray.storage.store import StorageError, Store
from mediafm_ray.text import local_path
from tests.servers.web import QuietHandler, serving

NOBODY = 65534


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Run as a user who may read what all may; root may read everything."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into; pytest's own may be read by its owner only."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def put(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_folder_that_may_not_be_read_is_an_error_and_not_empty(open_folder):
    put(open_folder / "a.mp4")
    put(open_folder / "closed" / "b.mp4")
    (open_folder / "closed").chmod(0o700 if os.geteuid() == 0 else 0)
    try:
        with as_nobody(), pytest.raises(StorageError, match=r"permission denied.*closed"):
            read_catalog(str(open_folder))
    finally:
        (open_folder / "closed").chmod(0o755)
    assert len(read_catalog(str(open_folder))) == 2


def test_links_are_followed_and_may_lead_back(tmp_path):
    put(tmp_path / "elsewhere" / "b.mp4")
    put(tmp_path / "videos" / "a.mp4")
    (tmp_path / "videos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "videos")
    (tmp_path / "videos" / "self").symlink_to("self")
    found = [entry.title.title_id for entry in read_catalog(str(tmp_path / "videos"))]
    assert found == ["a", "linked/b"]


def test_a_video_whose_link_leads_nowhere_is_a_title_that_cannot_be_read(tmp_path):
    put(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to("/an/archive/that/is/not/mounted/b.mp4")
    entries = {entry.title.title_id: entry for entry in read_catalog(str(tmp_path))}
    assert set(entries) == {"a", "b"}
    with pytest.raises(TitleError, match=r"b\.mp4 does not exist"):
        source.open_bytes(entries["b"].title.video, MediaConfig())


@pytest.mark.parametrize("name", ["a film.mp4", "a%20film.mp4", "a#1.mp4", "a?b.mp4", "größe.mp4", "a::b.mp4"])
def test_every_uri_of_a_file_means_one_file(tmp_path, name):
    """The planner and the reader must look at the same file, whichever way its URI is written."""
    path = put(tmp_path / name, b"first")
    table = tmp_path / "c.jsonl"
    for uri in (str(path), path.as_uri(), name, path.as_uri().replace("file:///", "file://localhost/")):
        put(path, b"first")
        table.write_text(json.dumps({"title_id": "t", "video": uri}) + "\n")
        (before,) = read_catalog(str(table))
        with source.open_bytes(before.title.video, MediaConfig()) as stream:
            assert stream.read() == b"first", uri
        put(path, b"replaced")
        (after,) = read_catalog(str(table))
        assert before.source != after.source, uri
        assert before.size == 5, uri


def test_a_file_uri_may_hold_bytes_that_are_no_text():
    assert os.fsencode(local_path("file:///caf%E9.mp4") or "") == b"/caf\xe9.mp4"
    assert local_path("s3://bucket/key") is None
    assert local_path("/a%20b") == "/a%20b"


# ---------------------------------------------------------------------------------------------------------- web servers


@dataclass
class Web:
    """A web server on this machine, and what it answers."""

    url: str = ""
    answers: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)  # status and headers, by path
    lists: dict[str, list[str]] = field(default_factory=dict)  # names that stand in a folder's page, by path


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()

    class Handler(QuietHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            if path in web.lists:
                body = "".join(f'<a href="{name}">{name}</a>' for name in web.lists[path]).encode()
                status, headers = 200, {"Content-Type": "text/html"}
            else:
                status, headers = web.answers.get(path, (404, {}))
                body = b"12345" if status == 200 else b""
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with serving(Handler) as web.url:
        yield web


def catalog_of(tmp_path: Path, videos: list[str]) -> str:
    table = tmp_path / "c.jsonl"
    table.write_text("".join(json.dumps({"title_id": f"t{number:02}", "video": video}) + "\n" for number, video in enumerate(videos)))
    return str(table)


def test_a_server_without_etags_says_when_a_video_was_modified(web, tmp_path):
    uri = catalog_of(tmp_path, [f"{web.url}/a.mp4?X-Amz-Credential=key/2026/eu"])
    web.answers["/a.mp4"] = (200, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"})
    (before,) = read_catalog(uri)
    web.answers["/a.mp4"] = (200, {"Last-Modified": "Thu, 22 Oct 2015 07:28:00 GMT"})
    (after,) = read_catalog(uri)
    assert before.source != after.source
    assert before.modified == 1445412480.0
    assert (before.size, before.unknown) == (5, "")


def test_a_listing_of_a_server_tells_replacements_too(web):
    web.lists["/"] = ["a.mp4", "more/"]
    web.lists["/more/"] = ["b.mp4"]
    web.answers |= {"/a.mp4": (200, {"ETag": '"1"'}), "/more/b.mp4": (200, {"ETag": '"2"'})}
    before = read_catalog(f"{web.url}/")
    assert [entry.title.title_id for entry in before] == ["a", "more/b"]
    web.answers["/more/b.mp4"] = (200, {"ETag": '"3"'})
    assert [one.source == two.source for one, two in zip(before, read_catalog(f"{web.url}/"), strict=True)] == [True, False]


@pytest.fixture
def short_pauses(monkeypatch) -> None:
    """All attempts are made, with less time between them."""
    monkeypatch.setattr("mediafm_ray.storage.errors.FIRST_PAUSE_S", 0.01)


def test_a_folder_of_a_server_that_fails_is_no_empty_folder(web, short_pauses):
    web.lists["/"] = ["a.mp4", "more/"]
    web.answers |= {"/a.mp4": (200, {"ETag": '"1"'}), "/more/": (503, {})}
    with pytest.raises(StorageError, match="more"):
        read_catalog(f"{web.url}/")


def test_a_look_up_that_fails_is_neither_a_change_nor_an_absence(web, short_pauses, tmp_path):
    uri = catalog_of(tmp_path, [f"{web.url}/{name}.mp4" for name in ("there", "failing", "forbidden", "absent")])
    web.answers |= {"/there.mp4": (200, {"ETag": '"1"'}), "/failing.mp4": (503, {}), "/forbidden.mp4": (403, {})}
    there, failing, forbidden, absent = read_catalog(uri)
    assert (there.unknown, absent.unknown) == ("", "")
    assert (bool(failing.unknown), failing.is_outage) == (True, True)
    assert (bool(forbidden.unknown), forbidden.is_outage) == (True, False)
    with pytest.raises(TitleError, match="does not exist"):
        source.open_bytes(absent.title.video, MediaConfig())
    with pytest.raises(OutageError, match="503"):
        source.open_bytes(failing.title.video, MediaConfig())


def test_a_server_that_answers_nothing_ends_the_run(web, short_pauses, tmp_path):
    names = [f"{number}.mp4" for number in range(40)]
    web.answers |= {f"/{name}": (503, {}) for name in names}
    with pytest.raises(StorageError, match="503"):
        read_catalog(catalog_of(tmp_path, [f"{web.url}/{name}" for name in names]))


def test_a_location_that_fails_is_not_taken_for_an_empty_one(web, short_pauses):
    web.answers["/out"] = (503, {})
    with pytest.raises(StorageError, match="503"):
        Store(f"{web.url}/out").check_readable()


# -------------------------------------------------------------------------------------------------------------- bad rows


def test_bad_rows_are_skipped_by_choice_and_named(tmp_path):
    put(tmp_path / "a.mp4")
    table = tmp_path / "c.jsonl"
    rows = [
        '{"title_id": "a", "video": "a.mp4"}',
        '{"title_id": "b", "video": 3}',
        "{not json",
        '{"title_id": "a", "video": "again.mp4"}',
        '{"title_id": "c", "video": "c.mp4", "tags": "x"}',
        '{"title_id": "d", "video": "d.mp4"}',
    ]
    table.write_text("\n".join(rows))
    with pytest.raises(CatalogError, match="4 problems"):
        read_catalog(str(table))
    skipped: list[BadRow] = []
    assert [entry.title.title_id for entry in read_catalog(str(table), skipped=skipped)] == ["a", "d"]
    assert sorted(row.name for row in skipped) == ["(line 3)", "(line 4)", "b", "c"]
    table.write_text('{"title_id": "a"')
    assert read_catalog(str(table), skipped=[]) == []
    csv = put(tmp_path / "c.csv", b"title,video\na,a.mp4\n")
    with pytest.raises(CatalogError, match="column title_id is missing"):
        read_catalog(str(csv), skipped=[])


def test_bad_titles_of_a_folder_are_skipped_by_choice(tmp_path):
    for name in ("a.mp4", "a.mkv", "b.mp4", "c.mp4"):
        put(tmp_path / name)
    put(tmp_path / "b.json", b"{not json")
    skipped: list[BadRow] = []
    assert [entry.title.title_id for entry in read_catalog(str(tmp_path), skipped=skipped)] == ["a", "c"]
    assert {row.name for row in skipped} == {"(a.mp4)", "b"}
