"""Videos by ranges: the bytes are those of the file, wherever it lies."""

import os
import re

import pytest

from mediafm_ray.explore.queries import link
from mediafm_ray.explore.video import RangeError, parse_range, playable_type
from mediafm_ray.storage.store import StorageConfig
from tests.explore.made import FILM, H264, MPEG2, client_of, config_of, media_facts, rewrite
from tests.searchable import build, commit

MEDIA = link("/media", id=FILM)


@pytest.fixture(scope="module")
def content(root):
    (video,) = (root / "videos").glob("*.mp4")
    return video.read_bytes()


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-", (0, 1000)),
        ("bytes=0-0", (0, 1)),
        ("bytes=999-", (999, 1000)),
        ("bytes=10-19", (10, 20)),
        ("bytes=990-5000", (990, 1000)),
        ("bytes=-1", (999, 1000)),
        ("bytes=-5000", (0, 1000)),
        (" bytes = 1 - 2 ", (1, 3)),
        *((header, None) for header in ("", "bytes=", "bytes=-", "lines=0-1", "bytes=5-3", "bytes=0-1,5-6")),
        *((header, None) for header in ("bytes=a-b", "bytes=0x1-2", "bytes=\u0661-")),
    ],
)
def test_the_part_that_a_header_asks_for(header, part):
    assert parse_range(header, 1000) == part


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=1000-1001", "bytes=-0", "bytes=999999999999999999-"])
def test_a_part_that_does_not_exist_is_refused(header):
    with pytest.raises(RangeError):
        parse_range(header, 1000)


def test_an_empty_file_has_no_part():
    with pytest.raises(RangeError):
        parse_range("bytes=0-", 0)


def test_the_bytes_are_those_of_the_file(client, content):
    whole = client.get(MEDIA)
    assert (whole.status_code, whole.content) == (200, content)
    assert (whole.headers["accept-ranges"], whole.headers["content-length"]) == ("bytes", str(len(content)))
    assert whole.headers["content-type"] == "video/mp4"
    size = len(content)
    for header, start, end in (
        ("bytes=0-", 0, size),
        ("bytes=100-199", 100, 200),
        (f"bytes={size - 1}-", size - 1, size),
        ("bytes=-300000", max(size - 300000, 0), size),
        ("bytes=5-99999999", 5, size),
    ):
        answer = client.get(MEDIA, headers={"range": header})
        assert (answer.status_code, answer.content) == (206, content[start:end]), header
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert answer.headers["content-length"] == str(end - start)
    refused = client.get(MEDIA, headers={"range": f"bytes={size}-"})
    assert (refused.status_code, refused.headers["content-range"], refused.content) == (416, f"bytes */{size}", b"")
    assert client.get(MEDIA, headers={"range": "bytes=0-1,4-5"}).content == content


def test_the_head_has_no_body(client, content):
    answer = client.head(MEDIA, headers={"range": "bytes=0-9"})
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (206, b"", "10")
    assert client.head(MEDIA).headers["content-length"] == str(len(content))


def test_a_part_of_another_version_of_the_file_is_not_continued(client, content):
    tag = client.head(MEDIA).headers["etag"]
    assert client.get(MEDIA, headers={"range": "bytes=5-9", "if-range": tag}).content == content[5:10]
    assert client.get(MEDIA, headers={"range": "bytes=5-9", "if-range": '"other"'}).content == content


def test_files_are_closed(client):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        client.get(MEDIA, headers={"range": "bytes=0-9"})
        client.get(link("/title", id=FILM))
        client.get(MEDIA, headers={"range": "bytes=99999999999-"})
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def with_video(root, path, facts=H264):
    commit(root / "out", FILM, 3)
    rewrite(root / "out", FILM, {"video": str(path), "media": media_facts(3, {**facts, "bytes": 5})}, {})
    return client_of(config_of(root, "index.uri="))


def test_pipes_folders_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path / "pipe", "pipe is not a file"), (tmp_path, "is not a file"), ("/dev/zero", "zero is not a file")):
        client = with_video(tmp_path, path)
        answer = client.get(MEDIA)
        assert answer.status_code == 404
        assert said in answer.text
        assert said in client.get(link("/title", id=FILM)).text


def test_a_replaced_video_is_played_with_a_warning(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"longer than it was")
    page = with_video(tmp_path, tmp_path / "a.mp4").get(link("/title", id=FILM)).text
    assert "has changed since this title was embedded" in page
    assert 'id="video"' in page


def test_a_video_in_object_storage_is_read_by_ranges(tmp_path, moto, monkeypatch):
    for name, value in moto.environment().items():
        monkeypatch.setenv(name, value)
    bucket, content = moto.bucket(), os.urandom(3 << 20)
    key = "films/what? \u00e9#.mp4"
    moto.client().put_object(Bucket=bucket, Key=key, Body=content)
    commit(tmp_path / "out", FILM, 3)
    rewrite(tmp_path / "out", FILM, {"video": f"s3://{bucket}/{key}", "media": media_facts(3, {**H264, "bytes": len(content)})}, {})
    client = client_of(config_of(tmp_path, "index.uri=", f"storage.endpoint_url={moto.url}"))
    for start, end in ((0, 10), (1_048_570, 1_048_590), (len(content) - 5, len(content))):
        answer = client.get(MEDIA, headers={"range": f"bytes={start}-{end - 1}"})
        assert (answer.status_code, answer.content) == (206, content[start:end])
    assert client.get(MEDIA).content == content
    assert "has changed since" not in client.get(link("/title", id=FILM)).text
    moto.client().delete_object(Bucket=bucket, Key=key)
    assert client.get(MEDIA).status_code == 404
    assert StorageConfig().endpoint_url == ""


def test_a_catalog_in_object_storage_is_browsed(moto, monkeypatch):
    for name, value in {**moto.environment(), "AWS_ENDPOINT_URL": moto.url, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://{moto.bucket()}"
    commit(f"{uri}/out", FILM, 5)
    rewrite(f"{uri}/out", FILM, {}, {"thumbnail": [b"%d" % shot for shot in range(5)]})
    assert build(f"{uri}/out", f"{uri}/index") == 0
    client = client_of(config_of(uri))
    assert client.get(link("/", like=FILM, shot=2)).text.count('class="card result"') == 4
    assert client.get(link("/thumbnail", id=FILM, shot=3)).content == b"3"


@pytest.mark.parametrize(
    ("facts", "type_", "reason"),
    [
        (H264, 'video/mp4; codecs="avc1.42E01E"', ""),
        ({**H264, "video_codec": "hevc"}, 'video/mp4; codecs="hvc1.1.6.L93.B0"', ""),  # the browser is asked
        ({"container": "matroska,webm", "video_codec": "vp9"}, 'video/webm; codecs="vp09.00.10.08"', ""),
        ({"container": "matroska,webm", "video_codec": "libdav1d"}, 'video/webm; codecs="av01.0.05M.08"', ""),
        (MPEG2, "", "container"),
        ({**H264, "video_codec": "mpeg2video"}, "", "codec (mpeg2video)"),
        ({**H264, "video_codec": "prores"}, "", "codec (prores)"),
        ({"container": "avi", "video_codec": "mpeg4"}, "", "container (avi)"),
        ({}, "video/mp4", ""),
    ],
)
def test_what_browsers_play_follows_from_the_facts(facts, type_, reason):
    found, said = playable_type(facts)
    assert found == type_
    assert bool(said) == bool(reason)
    assert re.search(re.escape(reason), said)
