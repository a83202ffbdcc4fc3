"""What counts as lost of a title, and what does not: damage that is known, in files that are otherwise healthy."""

from __future__ import annotations

import random
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mediafm_ray.media.damage import Damage
from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.media.sound import SoundTrack
from mediafm_ray.spec import Title
from tests.videos import KnownCuts, Made, make_video


def slides(path: Path, **options) -> Made:
    """Twenty times ten pictures at 25 a second and one that stays for one to three seconds: 75 % of the time is no picture due."""
    durations = [tick for stay in range(20) for tick in [40] * 10 + [1000 + stay % 5 * 500]]
    return make_video(path, [len(durations)], durations=durations, time_base=Fraction(1, 1000), clicks=[1.0], **options)


def spoil_packet(path: Path, kind: str, number: int, content: bytes | None = None) -> None:
    """Overwrite one packet of a file that stores packets in one piece; noise where no content is given."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [bytes(packet) for packet in container.demux(**{kind: 0}) if packet.size][number]
    position = data.find(packet)
    assert position > 0
    data[position : position + len(packet)] = random.Random(1).randbytes(len(packet)) if content is None else content * len(packet)
    path.write_bytes(data)


def spoil_transport_packets(path: Path, kind: str, first: int, count: int) -> None:
    """Mark some packets of a transport stream as broken on the way, and fill them with noise."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        (program_id,) = (stream.id for stream in container.streams if stream.type == kind)
    inside = [start for start in range(0, len(data), 188) if (data[start + 1] & 0x5F) << 8 | data[start + 2] == program_id]
    for start in inside[first : first + count]:  # packets that do not begin a frame
        data[start + 1] |= 0x80  # transport_error_indicator
        data[start + 20 : start + 188] = random.Random(start).randbytes(168)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["slides.mkv", "slides.mp4"])
def test_bad_sound_is_no_loss_of_pictures(tmp_path, read, name):
    """The sound's decoder says "Header missing": nothing of it concerns the picture."""
    made = slides(tmp_path / name, sound_codec="libmp3lame")
    spoil_packet(made.path, "audio", 50, b"\0")
    media = read(made.path)
    assert media.facts["sound_gaps"] == 1
    assert media.facts["damage"] == 0


def test_bad_sound_in_a_transport_stream_is_no_loss_of_pictures(tmp_path, read):
    """The demuxer says which stream it complains of."""
    made = make_video(
        tmp_path / "slides.ts",
        [120],
        durations=[3600] * 59 + [90_000] + [3600, 7200] * 30,
        time_base=Fraction(1, 90_000),
        clicks=[1.0],
    )
    before = read(made.path).facts["damage"]
    spoil_transport_packets(made.path, "audio", 2, 3)
    media = read(made.path)
    assert any("corrupt audio packets" in warning for warning in media.warnings)
    assert media.facts["damage"] == before


def test_sound_that_cannot_be_converted_becomes_silence():
    """Damage makes up layouts that nothing can mix."""
    track, pieces = SoundTrack(Fraction(0), 1.0), []
    for number, layout in enumerate(["stereo", "stereo", "30 channels", "stereo", "stereo"]):
        frame = av.AudioFrame(format="s16", layout=layout, samples=1600)
        for plane in frame.planes:
            plane.update(np.full(plane.buffer_size // 2, 1000, np.int16).tobytes())
        frame.sample_rate, frame.pts, frame.time_base = 16_000, number * 1600, Fraction(1, 16_000)
        pieces += track.add(frame)
    samples = np.concatenate(pieces + track.finish())
    assert track.unusable == 1
    assert len(samples) == 5 * 1600
    assert not samples[3200:4800].any()
    assert samples[:3200].all()
    assert samples[4800:].all()


@pytest.mark.parametrize("name", ["slides.mkv", "slides.mp4"])
@pytest.mark.parametrize(("number", "share"), [(50, 0.01), (54, 0.1)])  # amid pictures, beside one that stays
def test_bad_picture_makes_a_loss_only_of_the_holes_beside_it(tmp_path, read, name, number, share):
    made = slides(tmp_path / name)
    spoil_packet(made.path, "video", number)
    assert 0 < read(made.path).facts["damage"] < share


def test_share_is_one_of_time():
    """Half of the time is one hole that is lost, a quarter one that is none."""
    damage = Damage(reach_ticks=10)
    damage.hole(100, 300)
    damage.hole(1000, 1400)
    damage.now_ticks = 1200
    damage.trouble()
    assert damage.share(200, 0, 800, False, []) == pytest.approx(0.5)


# -------------------------------------------------------------------------------------------------------- null frames


def with_null_frames(path: Path, numbers: set[int]) -> None:
    """Make the pictures of these numbers empty chunks, as programs that capture do for pictures that they drop."""
    data = path.read_bytes()
    start = data.find(b"movi")
    (size,) = struct.unpack_from("<I", data, start - 4)
    position, chunks, index, number = start + 4, b"", b"", 0
    while position < start + size:
        name, (length,) = data[position : position + 4], struct.unpack_from("<I", data, position + 4)
        content = data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
        if name == b"00dc":
            content = b"" if number in numbers else content
            number += 1
        index += name + struct.pack("<III", 0x10, len(chunks) + 4, len(content))
        chunks += name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    head = data[: start - 8] + b"LIST" + struct.pack("<I", len(chunks) + 4) + b"movi" + chunks
    whole = head + b"idx1" + struct.pack("<I", len(index)) + index
    path.write_bytes(whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:])


@pytest.fixture(params=["mpeg4", "mjpeg", "libx264"])
def capture(request, tmp_path) -> Path:
    """Two hundred pictures in an AVI file."""
    pixel_format = "yuvj420p" if request.param == "mjpeg" else "yuv420p"
    return make_video(tmp_path / "capture.avi", [200], codec=request.param, pixel_format=pixel_format, b_frames=0, gop=1).path


def test_null_frames_are_no_loss(capture, read):
    with_null_frames(capture, set(range(5, 195, 10)) | set(range(60, 70)))
    media = read(capture)
    assert media.frame_count == 172
    assert media.duration_s == pytest.approx(8.0)
    assert media.facts["damage"] == 0
    assert media.warnings == []


def test_null_frames_at_the_end_are_remarked(capture, read):
    with_null_frames(capture, set(range(170, 200)))
    media = read(capture)
    assert media.facts["damage"] == 0
    assert media.warnings == ["the last 30 of the 200 declared pictures are null frames"]


def test_cut_off_capture_with_null_frames_has_lost_its_end_once(capture, tmp_path):
    with_null_frames(capture, set(range(5, 195, 10)))
    capture.write_bytes(capture.read_bytes()[: int(0.7 * capture.stat().st_size)])
    reader = IsolatedReader(FramesConfig(per_shot=1), TimedTextConfig(), MediaConfig(max_damage=1.0))
    try:
        media = reader.read(Title("a", str(capture)), KnownCuts([]))
    finally:
        reader.close()
    shown_s = media.duration_s
    assert 4.5 < shown_s < 6.5
    assert media.facts["damage"] == pytest.approx(1 - shown_s / 8, abs=0.02)
