"""Reading made videos whose right answers are known: times, frames, sound."""

from __future__ import annotations

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest

from mediafm_ray.media import reader as reading
from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.spec import SAMPLE_RATE, ShotSpan, Title
from tests.videos import KnownCuts, flat, make_video, number_in, onsets_in, picture_of

TICK = Fraction(1, 90_000)


def expected_numbers(made, first: int, end: int, count: int = 8) -> list[int]:
    """Frames on screen at the centres of equal parts of a shot's time, by exact arithmetic."""
    start_s = made.times[first]
    end_s = made.times[end] if end < made.frame_count else made.end
    parts = min(count, end - first)
    centres = [start_s + (end_s - start_s) * Fraction(2 * part + 1, 2 * parts) for part in range(parts)]
    return sorted({max(number for number in range(first, end) if made.times[number] <= centre) for centre in centres})


def check(made, media, time_tolerance_s: float = 0.0015) -> None:
    """Shots tile the title at the right times and keep the right frames."""
    bounds = [0, *made.cuts, made.frame_count]
    assert media.frame_count == made.frame_count
    assert [(shot.span.start_frame, shot.span.end_frame) for shot in media.shots] == list(itertools.pairwise(bounds))
    for shot, first, end in zip(media.shots, bounds, bounds[1:], strict=False):
        assert shot.start_s == pytest.approx(float(made.times[first]), abs=time_tolerance_s)
        assert shot.end_s == pytest.approx(float(made.times[end] if end < made.frame_count else made.end), abs=time_tolerance_s)
        assert [number_in(picture_of(frame)) for frame in shot.frames] == expected_numbers(made, first, end)
    assert all(one.end_s == two.start_s for one, two in zip(media.shots, media.shots[1:], strict=False))
    assert media.shots[0].start_s == 0.0
    assert media.duration_s == media.shots[-1].end_s


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.mov", "a.avi", "a.flv"])
def test_containers(tmp_path, read, name):
    made = make_video(tmp_path / name, [31, 7, 90, 1, 40])
    media = read(made.path, made.cuts)
    check(made, media)
    assert media.warnings == []
    assert media.facts["damage"] == 0


@pytest.mark.parametrize(
    ("codec", "name", "options"),
    [
        ("libvpx", "a.webm", {"deadline": "realtime"}),
        ("libvpx-vp9", "a.webm", {"deadline": "realtime"}),
        ("libx265", "a.mp4", {"preset": "ultrafast", "x265-params": "log-level=none"}),
        ("mpeg2video", "a.mpg", {}),
        ("mpeg4", "a.avi", {}),
        ("mjpeg", "a.mov", {}),
    ],
)
def test_codecs(tmp_path, read, codec, name, options):
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    made = make_video(
        tmp_path / name,
        [25, 40],
        codec=codec,
        options=options,
        pixel_format=pixel_format,
        b_frames=0 if codec in ("libvpx", "mpeg4", "mjpeg") else 2,
    )
    check(made, read(made.path, made.cuts))


def test_variable_frame_rate_follows_time_stamps(tmp_path, read):
    durations = [3000] * 20 + [12_000] * 25 + [1500] * 30 + [45_000, 3600] * 6
    made = make_video(tmp_path / "vfr.mp4", [30, 25, 32], durations=durations, time_base=TICK, clicks=[1.0, 4.0])
    media = read(made.path, made.cuts)
    check(made, media)
    assert media.warnings == []


def test_thousand_frames_a_second(tmp_path, read):
    made = make_video(tmp_path / "fast.mp4", [100, 200], rate=Fraction(1000), time_base=Fraction(1, 1000))
    check(made, read(made.path, made.cuts), time_tolerance_s=1e-4)


@pytest.mark.parametrize("start", [Fraction(0), Fraction(7, 5), Fraction(36_000)])
def test_time_starts_at_the_first_picture(tmp_path, read, start):
    made = make_video(tmp_path / "late.ts", [30, 45], start=start, time_base=TICK, clicks=[0.4, 2.0])
    media = read(made.path, made.cuts)
    check(made, media)
    assert onsets_in(b"".join(shot.audio for shot in media.shots)) == pytest.approx([0.4, 2.0], abs=0.02)


def test_edit_list_hides_the_first_frames(tmp_path, read):
    """A stream copy that starts between key frames: the hidden frames must not appear, times count from the first shown."""
    made = make_video(tmp_path / "whole.mp4", [60, 60], gop=50, b_frames=0)
    with av.open(str(made.path)) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        source = whole.streams.video[0]
        target = cut.add_stream_from_template(source)
        hidden = 20
        for packet in whole.demux(source):
            if packet.size:
                packet.pts -= round(Fraction(hidden, 25) / packet.time_base)
                packet.dts -= round(Fraction(hidden, 25) / packet.time_base)
                packet.stream = target
                cut.mux(packet)
    media = read(tmp_path / "cut.mp4", [40])
    assert media.frame_count == 100
    assert media.duration_s == pytest.approx(4.0, abs=0.002)
    assert media.shots[1].start_s == pytest.approx(1.6, abs=0.002)
    assert number_in(picture_of(media.shots[0].frames[0])) == hidden + 2  # centre of the first of 8 parts of 40 frames


@pytest.mark.parametrize(
    ("layout", "rate", "codec", "name"),
    [
        ("mono", 44_100, "aac", "a.mp4"),
        ("stereo", 48_000, "aac", "a.mkv"),
        ("5.1", 48_000, "aac", "a.mp4"),
        ("7.1", 48_000, "aac", "a.mp4"),
        ("stereo", 48_000, "libopus", "a.webm"),
        ("mono", 16_000, "aac", "a.mp4"),
        ("stereo", 32_000, "mp2", "a.ts"),
        ("5.1", 48_000, "ac3", "a.ts"),
    ],
)
def test_sound_is_where_the_time_stamps_put_it(tmp_path, read, layout, rate, codec, name):
    clicks = [0.5, 1.25, 3.5]
    video = {"codec": "libvpx", "b_frames": 0, "options": {"deadline": "realtime"}} if name.endswith("webm") else {}
    made = make_video(tmp_path / name, [30, 30, 40], clicks=clicks, sound_codec=codec, sound_rate=rate, sound_layout=layout, **video)
    media = read(made.path, made.cuts)
    lengths = [len(shot.audio) // 2 for shot in media.shots]
    assert lengths == [round(shot.end_s * SAMPLE_RATE) - round(shot.start_s * SAMPLE_RATE) for shot in media.shots]
    assert onsets_in(b"".join(shot.audio for shot in media.shots)) == pytest.approx(clicks, abs=0.02)


def test_sound_that_starts_late_and_ends_early(tmp_path, read):
    """Clicks count from the start of the sound, which is 1.5 s after the picture's; silence fills both ends."""
    made = make_video(tmp_path / "late.mkv", [50, 75], clicks=[0.25, 1.0], sound_s=1.5, sound_start_s=1.5)
    media = read(made.path, made.cuts)
    samples = b"".join(shot.audio for shot in media.shots)
    assert len(samples) == 2 * 5 * SAMPLE_RATE
    assert onsets_in(samples) == pytest.approx([1.75, 2.5], abs=0.02)


def test_hole_in_the_sound_becomes_silence(tmp_path, read):
    made = make_video(tmp_path / "whole.mkv", [50, 50], clicks=[0.5, 3.5])
    with av.open(str(made.path)) as whole, av.open(str(tmp_path / "hole.mkv"), "w") as hole:
        targets = {stream.index: hole.add_stream_from_template(stream) for stream in whole.streams}
        for packet in whole.demux():
            if packet.size and not (packet.stream.type == "audio" and 1 < packet.pts * packet.time_base < 3):
                packet.stream = targets[packet.stream_index]
                hole.mux(packet)
    media = read(tmp_path / "hole.mkv", made.cuts)
    assert onsets_in(b"".join(shot.audio for shot in media.shots)) == pytest.approx([0.5, 3.5], abs=0.02)
    assert media.facts["sound_gaps"] == 1


def test_sound_long_before_the_first_picture_is_part_of_the_title(tmp_path, read):
    made = make_video(tmp_path / "radio.mkv", [30, 30], start=Fraction(2), clicks=[1.0, 3.0], sound_s=4.4, sound_start_s=-2.0)
    media = read(made.path, made.cuts)
    assert media.shots[0].start_s == 0.0
    assert media.shots[1].start_s == pytest.approx(2 + 1.2, abs=0.002)
    assert onsets_in(b"".join(shot.audio for shot in media.shots)) == pytest.approx([1.0, 3.0], abs=0.02)


def test_sound_at_another_rate_is_on_the_same_time_line(tmp_path, reader, read, monkeypatch):
    """With silence before the sound, a hole in it and an end before the picture's; the rest of the title is what it is at 16 kHz."""
    small = {"size": (96, 64), "options": {"preset": "ultrafast"}}
    made = make_video(tmp_path / "whole.mkv", [30, 70], clicks=[0.25, 2.5], sound_s=3.0, sound_start_s=0.5, **small)
    with av.open(str(made.path)) as whole, av.open(str(tmp_path / "hole.mkv"), "w") as hole:
        targets = {stream.index: hole.add_stream_from_template(stream) for stream in whole.streams}
        for packet in whole.demux():
            if packet.size and not (packet.stream.type == "audio" and 1.5 < packet.pts * packet.time_base < 2.5):
                packet.stream = targets[packet.stream_index]
                hole.mux(packet)
    found = {}
    for rate in (SAMPLE_RATE, 44_100, 48_000):
        monkeypatch.setattr(reader, "sample_rate", rate)
        media = found[rate] = read(tmp_path / "hole.mkv", made.cuts)
        lengths = [len(shot.audio) // 2 for shot in media.shots]
        assert lengths == [round(shot.end_s * rate) - round(shot.start_s * rate) for shot in media.shots]
        assert onsets_in(b"".join(shot.audio for shot in media.shots), rate) == pytest.approx([0.75, 3.0], abs=0.02)
        assert media.facts == found[SAMPLE_RATE].facts
        assert media.facts["sound_gaps"] == 1
        assert media.warnings == found[SAMPLE_RATE].warnings
        assert media.frames == found[SAMPLE_RATE].frames


def test_title_without_sound_has_none(tmp_path, read):
    made = make_video(tmp_path / "silent.mp4", [20])
    assert [bytes(shot.audio) for shot in read(made.path).shots] == [b""]


@pytest.mark.parametrize(("rotation", "mirrored"), [(90, False), (180, False), (270, False), (0, True), (90, True)])
def test_pictures_are_turned_as_players_do(tmp_path, read, rotation, mirrored):
    """Against FFmpeg's own rotation of the same frames (the filters that its player inserts)."""
    made = make_video(tmp_path / "turned.mp4", [20], rotation=rotation, mirrored=mirrored)
    media = read(made.path)
    ours = picture_of(media.shots[0].frames[3])
    straight = make_video(tmp_path / "straight.mp4", [20])
    plain = picture_of(read(straight.path).shots[0].frames[3])
    turned = np.rot90(plain, rotation // 90)
    wanted = turned[:, ::-1] if mirrored else turned
    assert ours.shape == wanted.shape
    assert np.abs(ours.astype(int) - wanted).mean() < 6
    thumbnail = picture_of(media.shots[0].thumbnail)
    assert (thumbnail.shape[0] > thumbnail.shape[1]) == (rotation % 180 == 90)


def test_pixels_become_square(tmp_path, read):
    made = make_video(tmp_path / "dv.mp4", [20], size=(352, 288), pixel_aspect=Fraction(16, 11))
    height, width = picture_of(read(made.path).shots[0].frames[0]).shape[:2]
    assert (width, height) == (456, 256)  # 512 x 288 shown, reduced to 256 rows


@pytest.mark.parametrize("size", [(2, 2), (2000, 4), (4, 1000), (322, 182)])
def test_odd_sizes(tmp_path, read, size):
    made = make_video(tmp_path / "odd.mp4", [12], size=size)
    media = read(made.path)
    assert media.frame_count == 12
    assert all(min(picture_of(frame).shape[:2]) >= 2 for frame in media.shots[0].frames)


def test_size_changes_in_mid_stream(tmp_path, read):
    """Two transport streams joined: the size of the picture changes, and the time stamps jump back."""
    one = make_video(tmp_path / "one.ts", [50], size=(320, 180), time_base=TICK)
    two = make_video(tmp_path / "two.ts", [50], size=(480, 270), time_base=TICK)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(one.path.read_bytes() + two.path.read_bytes())
    media = read(joined, [50])
    assert media.frame_count == 100
    assert media.duration_s == pytest.approx(4.0, abs=0.1)
    assert [picture_of(shot.frames[0]).shape[:2] for shot in media.shots] == [(180, 320), (256, 456)]
    assert any("size of the picture changes" in warning for warning in media.warnings)


def test_long_shot_keeps_frames_spread_evenly(tmp_path, read):
    """2000 frames in one shot: far more than wait as candidates."""
    made = make_video(tmp_path / "long.mp4", [2000, 30], size=(96, 64), options={"preset": "ultrafast"})
    media = read(made.path, made.cuts)
    numbers = [number_in(picture_of(frame)) for frame in media.shots[0].frames]
    ideal = [2000 * (2 * part + 1) / 16 for part in range(8)]
    assert np.abs(np.array(numbers) - ideal).max() <= 2000 / 64
    assert [number_in(picture_of(frame)) for frame in media.shots[1].frames] == expected_numbers(made, 2000, 2030)


def test_detector_pictures_are_ffmpegs_bicubic(tmp_path):
    """Against FFmpeg's own scale filter with its default, bicubic; the short way round may differ by rounding only."""
    made = make_video(tmp_path / "large.mp4", [10, 10], size=(1280, 720))
    detector = KnownCuts(made.cuts)
    reader = IsolatedReader(FramesConfig(), TimedTextConfig(), MediaConfig())
    try:
        reader.read(Title("large", str(made.path)), detector)
    finally:
        reader.close()
    with av.open(str(made.path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        graph.link_nodes(
            graph.add_buffer(template=stream),
            graph.add("scale", "48:27:flags=bicubic"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        ).configure()
        wanted = []
        for frame in container.decode(stream):
            graph.push(frame)
            wanted.append(graph.pull().to_ndarray())
    difference = np.abs(np.stack(detector.pictures).astype(int) - np.stack(wanted))
    assert difference.mean() < 0.5
    assert difference.max() <= 8


def test_same_bytes_whatever_the_threads_and_the_detectors_pace(tmp_path):
    """Byte for byte: decoder threads, and a detector that is slow, must not change anything."""
    import time

    made = make_video(tmp_path / "a.mp4", [100, 200, 30], clicks=[1.0, 2.0])

    class Slow(KnownCuts):
        def push(self, frames_THWC):
            time.sleep(0.15)
            return super().push(frames_THWC)

    results = []
    for threads, detector in ((1, KnownCuts(made.cuts)), (4, KnownCuts(made.cuts)), (2, Slow(made.cuts))):
        reader = IsolatedReader(FramesConfig(), TimedTextConfig(), MediaConfig(threads=threads))
        try:
            results.append(reader.read(Title("a", str(made.path)), detector))
        finally:
            reader.close()
    assert flat(results[0]) == flat(results[1]) == flat(results[2])


def test_reading_needs_neither_sidecar_nor_isolation(tmp_path):
    """The pass itself runs in any process; the isolated reader adds nothing to its results but the detour."""
    made = make_video(tmp_path / "a.mp4", [40, 40])

    class Collect:
        def __init__(self):
            self.detector, self.answers, self.shots = KnownCuts(made.cuts), [], []

        def pictures(self, frames_THWC):
            self.answers.append(self.detector.push(frames_THWC))

        def no_more_pictures(self):
            self.answers.append(self.detector.finish())

        def settled(self):
            return self.answers.pop(0)

        def alive(self):
            pass

        def sound(self, samples_N):
            raise AssertionError("there is no sound")

        def shot(self, span, start_s, end_s, frames, thumbnail):
            self.shots.append((span, start_s, end_s, frames))

    collect = Collect()
    end = reading.read_title(Title("a", str(made.path)), FramesConfig(), TimedTextConfig(), MediaConfig(), collect)
    assert end["frame_count"] == 80
    assert [shot[0].end_frame for shot in collect.shots] == [40, 80]
    assert end["has_sound"] is False


def test_decoding_runs_ahead_of_detection_by_a_fixed_number_of_blocks(tmp_path):
    """The answer to a block is awaited when READ_AHEAD_BLOCKS more have been handed over; all others are awaited at the end."""
    made = make_video(tmp_path / "a.mp4", [700], size=(96, 64), options={"preset": "ultrafast"})
    events = []

    class Recorder:
        def pictures(self, frames_THWC):
            events.append(len(frames_THWC))

        def no_more_pictures(self):
            events.append("no more")

        def settled(self):
            events.append("settled")
            return [ShotSpan(0, 700)] if events.count("settled") == 12 else []

        def alive(self):
            pass

        def shot(self, span, start_s, end_s, frames, thumbnail):
            events.append(len(frames))

    reading.read_title(Title("a", str(made.path)), FramesConfig(), TimedTextConfig(), MediaConfig(), Recorder())
    ahead = reading.READ_AHEAD_BLOCKS
    assert events == [64] * ahead + [64, "settled"] * (10 - ahead) + [60, "settled", "no more"] + ["settled"] * (ahead + 1) + [8]
