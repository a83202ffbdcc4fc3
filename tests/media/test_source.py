"""Opening local and remote objects."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from mediafm_ray.errors import TitleError
from mediafm_ray.media import source
from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.spec import TimedTextSource, Title
from tests.servers.web import QuietHandler, serving
from tests.videos import KnownCuts, flat, make_video


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[str, Path, list[tuple[int, int]]]]:
    """A server on this machine that gives ranges of the files of a folder: address, folder, ranges asked for."""
    ranges: list[tuple[int, int]] = []
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(QuietHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool):
            file = folder / urllib.parse.unquote(Path(self.path).name)
            if not file.exists():
                self.send_error(404)
                return
            content = file.read_bytes()
            first, last = 0, len(content) - 1
            asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                first, last = int(asked[1]), min(int(asked[2] or last), last)
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last - first + 1))
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            if body:
                ranges.append((first, last))
                self.wfile.write(content[first : last + 1])

    with serving(Handler) as address:
        yield address, folder, ranges


def test_remote_file_is_read_by_ranges_and_gives_the_same(served):
    address, folder, ranges = served
    made = make_video(folder / "a film.mkv", [40, 80], codec="rawvideo", b_frames=0, clicks=[1.0])
    (folder / "a film.srt").write_text("1\n00:00:00,100 --> 00:00:01,000\nHello\n")
    size = made.path.stat().st_size
    assert size > 3 << 20
    reader = IsolatedReader(FramesConfig(), TimedTextConfig(), MediaConfig(read_ahead_mb=1))
    try:
        local = reader.read(Title("a", str(made.path), (TimedTextSource(str(folder / "a film.srt")),)), KnownCuts(made.cuts))
        remote = reader.read(Title("a", f"{address}/a%20film.mkv", (TimedTextSource(f"{address}/a%20film.srt"),)), KnownCuts(made.cuts))
        with pytest.raises(TitleError, match=r"gone\.mp4 does not exist"):
            reader.read(Title("a", f"{address}/gone.mp4"), KnownCuts([]))
    finally:
        reader.close()
    assert flat(local) == flat(remote)
    pieces = [last - first + 1 for first, last in ranges]
    assert max(pieces) <= 2 << 20
    assert sum(pieces) < 1.5 * size + (2 << 20)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/data/a film.mp4", "a film.mp4"),
        ("file:///data/a%20film.mp4", "a film.mp4"),
        ("s3://bucket/key/a%20film#1.mp4", "a%20film#1.mp4"),  # a key is what it is
        ("https://host/a.mp4?token=secret", "a.mp4"),
        ("a.mp4", "a.mp4"),
        ("/data/a%20film#1.mp4", "a%20film#1.mp4"),
        ("https://[::1/a.mp4", "a.mp4"),
    ],
)
def test_names_for_messages_have_neither_folders_nor_secrets(uri, name):
    assert source.file_name(uri) == name


def test_file_uris(tmp_path):
    (tmp_path / "a file.txt").write_bytes(b"content")
    for uri in (str(tmp_path / "a file.txt"), f"file://{tmp_path}/a%20file.txt"):
        with source.open_bytes(uri, MediaConfig()) as stream:
            assert stream.read() == b"content"


def test_unknown_protocol_is_a_reason():
    with pytest.raises(TitleError, match=r"a\.mp4 cannot be opened"):
        source.open_bytes("nonsense://somewhere/a.mp4", MediaConfig())


def test_small_objects_have_a_limit(tmp_path):
    (tmp_path / "a.srt").write_bytes(b"x" * 3_000_000)
    with pytest.raises(TitleError, match=r"a\.srt is larger than 2 MB"):
        source.read_whole(str(tmp_path / "a.srt"), MediaConfig(), 2 << 20)


@pytest.mark.parametrize(
    ("ending", "content", "cut"),
    [
        *[("mkv", slice(None), False), ("mkv", slice(0, 20_000), True)],
        *[("avi", slice(None), False), ("avi", slice(0, -2), True), ("avi", slice(0, 20_000), True)],
        ("mp4", slice(None), None),
    ],
)
def test_whether_a_file_is_cut_off(tmp_path, ending, content, cut):
    made = make_video(tmp_path / f"a.{ending}", [100])
    made.path.write_bytes(made.path.read_bytes()[content])
    with source.open_bytes(str(made.path), MediaConfig()) as stream:
        assert source.is_cut_off(stream) is cut
        assert stream.tell() == 0


def test_a_uri_with_half_a_surrogate_pair_is_a_file_that_does_not_exist():
    with pytest.raises(TitleError, match="cannot be opened"):
        source.open_bytes("file:///videos/\ud800.mp4", MediaConfig())
