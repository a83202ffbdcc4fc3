"""Benchmark of robustness: outcomes of the isolated reader on seeded mutations of real videos.

    python -m benchmarks.mutations FOLDER [FOLDER ...] [--mutations 500] [--seed 1] [--max-mb 3]

The videos below the folders take turns by their container. A mutation flips bytes, cuts the file off or pieces out of it, inserts,
doubles or zeroes ranges, half of the time in the first 4 kB. Nothing but a result or a TitleError may come, in time; ends with 1
otherwise.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import random
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

from mediafm_ray.errors import TitleError
from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.spec import ShotSpan, Title

ENDINGS = (".mp4", ".mkv", ".webm", ".ts", ".mpg", ".avi", ".mov", ".flv", ".ogv", ".mxf")
MAX_S = 120.0  # of a file of a few MB
MUTATIONS = ("flipped", "cut off", "cut out", "inserted", "doubled", "zeroed")


class OneShot:
    """A detector that finds no cut, because only reading is tested."""

    def __init__(self) -> None:
        self.frames = 0

    def push(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        self.frames += len(frames_THWC)
        return []

    def finish(self) -> list[ShotSpan]:
        return [ShotSpan(0, self.frames)]


def mutated(content: bytes, kind: str, chance: random.Random) -> bytes:
    """Return content with one to eight places mutated in one way, or truncated."""
    data = bytearray(content)
    for _ in range(1 if kind == "cut off" else chance.choice((1, 1, 2, 4, 8))):
        position = chance.randrange(min(len(data), 4096) if chance.random() < 0.5 else len(data))
        length = chance.choice((1, 16, 500, 20_000, 200_000))
        if kind == "flipped":
            for place in range(position, min(position + min(length, 100), len(data))):
                data[place] ^= 1 << chance.randrange(8)
        elif kind == "cut off":
            del data[chance.randrange(len(data)) :]
        elif kind == "cut out":
            del data[position : position + length]
        elif kind == "inserted":
            data[position:position] = chance.randbytes(length)
        elif kind == "doubled":
            data[position:position] = data[position : position + length]
        else:
            end = min(position + length, len(data))
            data[position:end] = bytes(end - position)
        if not data:
            break
    return bytes(data)


def reason_of(error: str, name: str) -> str:
    """Return a reason without the parts that differ between files."""
    words = re.sub(r"\(.*", "", error.replace(name, "the file"))
    return re.sub(r"\d[\d.,x]*", "N", words).strip()[:100]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-mb", type=float, default=3.0, help="larger videos are left out")
    options = parser.parse_args()
    by_container: dict[str, list[Path]] = collections.defaultdict(list)
    for path in sorted(path for folder in options.folders for path in folder.rglob("*")):
        if path.suffix in ENDINGS and 0 < path.stat().st_size < options.max_mb * (1 << 20):
            by_container[path.suffix].append(path)
    if not by_container:
        sys.exit(f"there is no video below {', '.join(map(str, options.folders))}")
    turns = [itertools.cycle(paths) for paths in by_container.values()]

    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    by_kind: collections.Counter[tuple[str, str]] = collections.Counter()
    wrong: list[str] = []
    slowest, slowest_what = 0.0, ""
    reader = IsolatedReader(FramesConfig(per_shot=1), TimedTextConfig(), MediaConfig(memory_limit_gb=2.0, no_progress_timeout_s=60.0))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.mutations):
            source, kind = next(turns[number % len(turns)]), MUTATIONS[number // len(turns) % len(MUTATIONS)]
            path = Path(folder) / f"mutated{source.suffix}"
            path.write_bytes(mutated(source.read_bytes(), kind, random.Random(options.seed * 1_000_003 + number)))
            what, started = f"{source.name}, {kind}, mutation {number}", time.monotonic()
            try:
                media = reader.read(Title("a", str(path)), OneShot())
                result, reason = "ok", "with warnings" if media.warnings else "without a warning"
            except TitleError as error:
                result, reason = "failed", reason_of(str(error), path.name)
                if "the reader failed" in str(error):
                    wrong.append(f"{what}: {error}")
            except Exception:
                result, reason = "WRONG", "another exception than TitleError"
                wrong.append(f"{what}: {traceback.format_exc(limit=-3)}")
            took_s = time.monotonic() - started
            if took_s > MAX_S:
                wrong.append(f"{what}: took {took_s:.0f} s")
            slowest, slowest_what = max((slowest, slowest_what), (took_s, what))
            outcomes[result, reason] += 1
            by_kind[f"{source.suffix[1:]} {kind}", result] += 1
    reader.close()
    print(f"{options.mutations} mutations of {sum(map(len, by_container.values()))} videos: {', '.join(sorted(by_container))}\n")
    for (result, reason), count in sorted(outcomes.items(), key=lambda one: (one[0][0] != "ok", -one[1])):
        print(f"{count:5}  {result:7} {reason}")
    print("\ncontainer and mutation        ok  failed")
    for name in sorted({name for name, _ in by_kind}):
        print(f"{name:26} {by_kind[name, 'ok']:5} {by_kind[name, 'failed']:7}")
    print(f"\nslowest: {slowest:.1f} s ({slowest_what}); nothing but TitleError: {'yes' if not wrong else 'NO'}")
    for one in wrong:
        print(one)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
