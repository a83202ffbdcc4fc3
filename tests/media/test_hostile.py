"""Damaged and hostile files: each ends as a clear error or a clean result, within its limits, and costs no worker.

Where the shared corpus is there its files are read, too; the generators here need nothing.
"""

from __future__ import annotations

import json
import random
import re
import struct
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mediafm_ray.errors import TitleError
from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.spec import Title, TitleMedia
from tests.servers.web import QuietHandler, serving
from tests.videos import KnownCuts, make_video

CORPUS = Path(__file__).parents[3] / "shared" / "corpus" / "hostile"
TIME_LIMIT_S = 60.0  # of one small file, on a busy machine
LIMITS = MediaConfig(memory_limit_gb=2.0, no_progress_timeout_s=30.0, threads=2)


@pytest.fixture(scope="module")
def reader() -> Iterator[IsolatedReader]:
    reader = IsolatedReader(FramesConfig(per_shot=2), TimedTextConfig(), LIMITS)
    yield reader
    reader.close()


def outcome(reader: IsolatedReader, path: Path) -> TitleMedia | str:
    """The media of a file or the reason why not; checks what must hold for every file."""
    started = time.monotonic()
    try:
        media = reader.read(Title("a", str(path)), KnownCuts([10, 50, 51]))
    except TitleError as error:
        reason = str(error)
        assert path.name in reason, reason
        assert str(path.parent) not in reason, reason
        assert "Traceback" not in reason
        assert "the reader failed" not in reason, reason
        return reason
    finally:
        assert time.monotonic() - started < TIME_LIMIT_S
    assert media.frame_count > 0
    assert media.shots[0].span.start_frame == 0
    assert media.shots[-1].span.end_frame == media.frame_count
    assert media.shots[0].start_s == 0
    assert media.shots[-1].end_s == media.duration_s
    for one, two in zip(media.shots, media.shots[1:], strict=False):
        assert one.span.end_frame == two.span.start_frame
        assert one.end_s == two.start_s
    assert all(shot.start_s < shot.end_s and shot.frames for shot in media.shots)
    json.dumps(dict(media.facts))
    assert not any(str(path.parent) in text for text in [*media.warnings, json.dumps(dict(media.facts))])
    return media


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, bytes]:
    """Healthy files of 100 frames, by ending."""
    folder = tmp_path_factory.mktemp("base")
    files = {}
    for ending, options in (("mp4", {}), ("fast.mp4", {"movflags": "faststart"}), ("mkv", {}), ("ts", {}), ("avi", {}), ("flv", {})):
        made = make_video(folder / f"base.{ending}", [50, 50], clicks=[0.5], container_options=options)
        files[ending] = made.path.read_bytes()
    return files


# ------------------------------------------------------------------------------------------------------- clear errors


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"This is no video at all.\n" * 50, "not a video"),
        ("noise.mkv", random.Random(1).randbytes(50_000), "not a video"),
        ("zeros.ts", bytes(100_000), "not a video"),
        ("page.mp4", b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 30, "not a video"),
        ("ftyp.mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "moov"),
        ("picture.mp4", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0", "none of the containers|not a video"),
        ("script.mp4", b"ffconcat version 1.0\nfile 'secret.mp4'\n", "none of the containers|not a video"),
        ("edl.mp4", b"# mpv EDL v0\nsecret.mp4\n", "none of the containers|not a video"),
        (
            "sdp.mp4",
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
            "none of the containers|not a video",
        ),
        ("dash.mp4", b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>', "none of the containers|not a video"),
        (
            "imf.mp4",
            b'<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2013"/>',
            "not a video|none of",
        ),
    ],
)
def test_what_is_no_video(tmp_path, reader, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert re.search(reason, str(outcome(reader, tmp_path / name)))


def test_missing_file_and_folder(tmp_path, reader):
    assert outcome(reader, tmp_path / "gone.mp4") == "gone.mp4 does not exist"
    (tmp_path / "folder.mp4").mkdir()
    assert "folder" in str(outcome(reader, tmp_path / "folder.mp4"))


def test_audio_only(tmp_path, reader):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 4800), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    assert "only audio" in str(outcome(reader, tmp_path / "song.mp4"))


@pytest.mark.parametrize("what", ["avc1", "hvc1"])
def test_codec_that_nobody_knows(tmp_path, reader, base, what):
    content = base["mp4"].replace(what.encode(), b"zzzz").replace(b"avcC", b"zzzC")
    (tmp_path / "odd.mp4").write_bytes(content)
    if what == "avc1":
        assert "codec" in str(outcome(reader, tmp_path / "odd.mp4"))
    else:  # also when only a part of the description is gone
        outcome(reader, tmp_path / "odd.mp4")


# --------------------------------------------------------------------------------------------- nothing else is opened


@pytest.fixture
def loopback() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine that notes who asks for what."""
    asked: list[str] = []

    class Handler(QuietHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with serving(Handler) as address:
        yield address, asked


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.mkv"])
def test_playlists_are_not_followed(tmp_path, reader, base, loopback, name):
    address, asked = loopback
    (tmp_path / "other.ts").write_bytes(base["ts"])
    for target in (f"{address}/segment.ts", str(tmp_path / "other.ts"), "other.ts", f"concat:{tmp_path}/other.ts|{tmp_path}/other.ts"):
        playlist = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXTINF:4.0,\n{target}\n#EXT-X-ENDLIST\n"
        (tmp_path / name).write_text(playlist)
        assert isinstance(outcome(reader, tmp_path / name), str)
        (tmp_path / name).write_text(f"ffconcat version 1.0\nfile '{target}'\n")
        assert isinstance(outcome(reader, tmp_path / name), str)
    assert asked == []


def test_mp4_that_refers_to_another_file_is_not_followed(tmp_path, reader, base, loopback):
    """A data reference ("dref") may name a URL or a file instead of the file itself."""
    address, asked = loopback
    for location in (f"{address}/x.mp4".encode(), b"other.mp4", b"file:///etc/hostname"):
        content = bytearray(base["fast.mp4"])
        position = content.find(b"dref")
        entry = struct.pack(">I", 12 + len(location) + 1) + b"url " + bytes(4) + location + b"\0"
        old = content[position + 12 : position + 24]
        assert old[4:8] == b"url "
        content[position + 12 : position + 24] = entry
        for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):  # the boxes around it have grown
            start = content.rfind(box, 0, position + 4) - 4
            (size,) = struct.unpack_from(">I", content, start)
            struct.pack_into(">I", content, start, size + len(entry) - 12)
        (tmp_path / "a.mp4").write_bytes(content)
        outcome(reader, tmp_path / "a.mp4")
    assert asked == []


# -------------------------------------------------------------------------------------------- loss is never silent


@pytest.mark.parametrize("ending", ["fast.mp4", "mkv", "avi", "flv"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_file_that_was_cut_off(tmp_path, reader, base, ending, share):
    content = base[ending]
    (tmp_path / f"cut.{ending}").write_bytes(content[: int(share * len(content))])
    result = outcome(reader, tmp_path / f"cut.{ending}")
    if isinstance(result, TitleMedia):
        assert result.frame_count > 85 or result.facts["damage"] > 0
        assert result.frame_count == 100 or result.warnings
    else:
        assert share < 0.95 or "damaged" in result


@pytest.mark.parametrize("ending", ["mp4", "fast.mp4", "mkv", "ts", "avi", "flv"])
def test_noise_over_the_middle(tmp_path, reader, base, ending):
    content = bytearray(base[ending])
    start, end = int(0.4 * len(content)), int(0.6 * len(content))
    content[start:end] = random.Random(2).randbytes(end - start)
    (tmp_path / f"noise.{ending}").write_bytes(content)
    result = outcome(reader, tmp_path / f"noise.{ending}")
    assert isinstance(result, str) or (result.warnings and result.facts["damage"] > 0)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_healthy_file_is_not_suspected(tmp_path, reader, base, ending):
    (tmp_path / f"good.{ending}").write_bytes(base[ending])
    media = outcome(reader, tmp_path / f"good.{ending}")
    assert isinstance(media, TitleMedia)
    assert media.warnings == []
    assert media.facts["damage"] == 0


def test_more_damage_than_is_allowed_fails_and_less_does_not(tmp_path, base):
    content = base["fast.mp4"]
    (tmp_path / "cut.mp4").write_bytes(content[: int(0.7 * len(content))])
    results = {}
    for allowed in (0.02, 0.99):
        reader = IsolatedReader(FramesConfig(per_shot=1), TimedTextConfig(), MediaConfig(max_damage=allowed))
        try:
            results[allowed] = outcome(reader, tmp_path / "cut.mp4")
        finally:
            reader.close()
    assert "max_damage allows 2%" in str(results[0.02])
    assert isinstance(results[0.99], TitleMedia)
    assert 0.02 < results[0.99].facts["damage"] < 0.99


# ------------------------------------------------------------------------------------------------------ absurd claims


def _patch(content: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite bytes after every occurrence of a box's name."""
    changed = bytearray(content)
    position = changed.find(box)
    assert position > 0
    while position > 0:
        changed[position + 4 + offset : position + 4 + offset + len(value)] = value
        position = changed.find(box, position + 4)
    return bytes(changed)


@pytest.mark.parametrize(
    ("box", "offset", "value"),
    [
        (b"mvhd", 16, b"\xff\xff\xff\xfe"),  # duration
        (b"mdhd", 16, b"\x7f\xff\xff\xff"),
        (b"mdhd", 12, b"\0\0\0\1"),  # time scale of one tick a second
        (b"mdhd", 12, b"\xff\xff\xff\xff"),
        (b"mdhd", 12, b"\0\0\0\0"),
        (b"stsz", 8, b"\x0f\xff\xff\xff"),  # number of samples
        (b"stsz", 4, b"\x7f\xff\xff\xff"),  # size of every sample
        (b"stts", 4, b"\xff\xff\xff\xff"),  # number of entries
        (b"stts", 12, b"\x7f\xff\xff\xff"),  # ticks of a sample
        (b"ctts", 4, b"\x0f\xff\xff\xff"),
        (b"stsc", 4, b"\x0f\xff\xff\xff"),
        (b"stco", 4, b"\x0f\xff\xff\xff"),
        (b"stco", 8, b"\xff\xff\xff\xff"),  # where the first chunk is
        (b"tkhd", 76, b"\xff\xff\0\0\xff\xff\0\0"),  # width and height
        (b"avc1", 24, b"\xff\xff\xff\xff"),  # the same in the description
        (b"avcC", 5, b"\xff\xff\xff"),
        (b"elst", 8, b"\x7f\xff\xff\xff\x7f\xff\xff\xff"),  # an edit that starts late
        (b"esds", 4, b"\xff\xff\xff\xff\xff"),
        (b"moov", -8, b"\xff\xff\xff\xff"),  # size of the box
        (b"mdat", -8, b"\0\0\0\1"),  # its size follows in 64 bits
    ],
)
def test_absurd_numbers_in_an_mp4(tmp_path, reader, base, box, offset, value):
    (tmp_path / "absurd.mp4").write_bytes(_patch(base["fast.mp4"], box, offset, value))
    outcome(reader, tmp_path / "absurd.mp4")


def test_pictures_beyond_the_limit(tmp_path, reader):
    """Half a megabyte of PNG that unpacks to hundreds of megapixels a frame."""
    from PIL import Image

    Image.new("L", (16_384, 16_384)).save(tmp_path / "bomb.png", compress_level=9)
    with av.open(str(tmp_path / "bomb.mov"), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "gray"
        container.start_encoding()
        for number in range(3):
            packet = av.Packet((tmp_path / "bomb.png").read_bytes())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number * 40, number * 40, stream.time_base
            container.mux(packet)
    assert isinstance(outcome(reader, tmp_path / "bomb.mov"), str)


def test_title_longer_than_the_limit(tmp_path):
    made = make_video(tmp_path / "long.mkv", [20], durations=[40] * 10 + [4_000_000] + [40] * 9, time_base=Fraction(1, 1000))
    reader = IsolatedReader(FramesConfig(per_shot=1), TimedTextConfig(), MediaConfig(max_hours=1e-4))
    try:
        assert "max_hours" in str(outcome(reader, made.path))
    finally:
        reader.close()


# ------------------------------------------------------------------------------------------------------------- corpus


def _corpus_files() -> list[str]:
    return sorted(file.name for file in CORPUS.glob("*.*") if file.name != "observed.json") if CORPUS.is_dir() else []


@pytest.mark.parametrize("name", _corpus_files() or ["none"])
def test_corpus(reader, name):
    if name == "none":
        pytest.skip(f"no shared corpus at {CORPUS.name}: its hostile files are not read")
    outcome(reader, CORPUS / name)


# --------------------------------------------------------------------------------------------------------------- fuzz


def _mutated(content: bytes, seed: int) -> bytes:
    """A file with seeded damage: flipped bits, overwritten, removed, repeated or inserted pieces, a cut-off end."""
    chance = random.Random(seed)
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        # headers decide more than their length says
        position = chance.randrange(min(len(changed), 4096)) if chance.random() < 0.5 else chance.randrange(len(changed))
        length = chance.choice([1, 4, 16, 500, 5000])
        deed = chance.randrange(6)
        if deed == 0:
            changed[position] ^= 1 << chance.randrange(8)
        elif deed == 1:
            changed[position : position + length] = chance.randbytes(min(length, len(changed) - position))
        elif deed == 2 and len(changed) > 10_000:
            del changed[position : position + length]
        elif deed == 3:
            changed[position:position] = changed[position : position + length]
        elif deed == 4:
            changed[position : position + 4] = chance.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
        elif chance.random() < 0.2:
            del changed[max(position, 1000) :]
    return bytes(changed)


def _fuzz(reader: IsolatedReader, base: dict[str, bytes], folder: Path, seeds: range) -> None:
    endings = sorted(base)
    counts = {"read": 0, "refused": 0}
    for seed in seeds:
        ending = endings[seed % len(endings)]
        path = folder / f"fuzz{seed}.{ending}"
        path.write_bytes(_mutated(base[ending], seed))
        counts["refused" if isinstance(outcome(reader, path), str) else "read"] += 1
        path.unlink()
    assert sum(counts.values()) == len(seeds)
    assert counts["read"], "nothing survived: the mutations are too strong to test anything"
    good = folder / "good.mp4"
    good.write_bytes(base["mp4"])
    assert isinstance(outcome(reader, good), TitleMedia)


def test_fuzz_short(tmp_path, reader, base):
    _fuzz(reader, base, tmp_path, range(60))


@pytest.mark.slow
def test_fuzz_500(tmp_path, reader, base):
    _fuzz(reader, base, tmp_path, range(1000, 1500))
