"""Benchmark of contextualising stored titles, compared with only reading them. On a GPU: --device cuda.

    python -m benchmarks.contextualise [--titles 60] [--shots 700] [--rounds 2] [--full-titles 6] [--device cpu] [--folder FOLDER]

Titles of random unit vectors (2304 numbers per shot) are committed as the job does. Then these are timed in turn, from the page cache:
reading all titles as the job reads them (the same threads, nothing computed); writing as many objects; the job's stage in this process,
without Ray, with a small model (2 layers x 64); the whole job with that model, less the wall time of a run over one title, which is its
start and stop. Finally, fewer titles with the full model (12 layers x 768).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.stored_titles import commit_title, make_model
from mediafm_ray.config.jobs import ContextualiseCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.models.tiny import make_contextualiser
from mediafm_ray.pipeline.contextualise_stored import READING_THREADS, WRITING_THREADS, ContextualiseStored
from mediafm_ray.pipeline.stage_list import stored_pool
from mediafm_ray.pipeline.write_title import contextual_file
from mediafm_ray.runs.plan import Plan
from mediafm_ray.runs.stored import make_stored_plan
from mediafm_ray.storage.dataset import Output
from mediafm_ray.storage.names import contextual, matching_object
from mediafm_ray.storage.stored_shots import read_shots

ROOT = Path(__file__).parents[1]
MODEL = make_model("0123456789ab", video=768, audio=768, text=768)
FULL = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
MB = 1e6


def main() -> None:
    """Make the titles, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titles", type=int, default=60, help="the figure in docs/benchmarks.md is for 1000 where it says so")
    parser.add_argument("--shots", type=int, default=700)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--full-titles", type=int, default=6, help="titles for the full model; 0 = leave it out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="", help="of the model; by default bfloat16 on a GPU, else float32")
    parser.add_argument("--folder", help="where the titles are made, on the kind of disk to measure; by default a temporary folder")
    arguments, overrides = parser.parse_known_args()
    precision = arguments.precision or ("float32" if arguments.device == "cpu" else "bfloat16")
    overrides += [f"contextualiser.device={arguments.device}", f"contextualiser.precision={precision}"]
    overrides += [] if arguments.device == "cpu" else ["resources.contextualise.num_gpus=1"]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        output, small, full = (Path(folder) / name for name in ("out", "small", "full"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda number: commit_random(output, number, arguments.shots), range(arguments.titles)))
        make_contextualiser(small)
        make_contextualiser(full, **FULL)
        size_mb = arguments.titles * arguments.shots * MODEL.dims["fused"] * 4 / MB
        device = torch.cuda.get_device_name() if arguments.device != "cpu" else f"CPU, {os.cpu_count()} cores"
        print(f"{time.strftime('%Y-%m-%d')}  {platform.machine()}, {device}")
        print(f"{arguments.titles} titles of {arguments.shots} shots, {size_mb:.0f} MB")
        compare(output, small, arguments.titles, arguments.rounds, overrides)
        if arguments.full_titles:
            print(f"\n12 layers x 768, {precision}, {arguments.full_titles} titles")
            overrides += [f"run.max_titles={arguments.full_titles}"]
            one_full_round(output, full, overrides)


def commit_random(output: Path, number: int, shots: int) -> None:
    vectors_SD = np.random.default_rng(number).standard_normal((shots, MODEL.dims["fused"]), np.float32)
    vectors_SD /= np.linalg.norm(vectors_SD, axis=1, keepdims=True)
    commit_title(str(output), MODEL, f"title {number}", vectors_SD)


def compare(output: Path, checkpoint: Path, titles: int, rounds: int, overrides: list[str]) -> None:
    """Time all titles with a small model: reading, writing, the stage and the job, in turn."""
    taken: dict[str, list[float]] = defaultdict(list)
    by_stage: dict[str, float] = {}
    plan, stage = build(output, checkpoint, overrides)
    list(stage(plan.pending.slice(0, 1)))  # Warm up: the first call of a model selects its kernels.
    for _ in range(rounds):
        taken["reading alone"].append(seconds_of(lambda: read_all(plan, output)))
        taken["writing alone"].append(seconds_of(lambda: write_all(plan, output)))
        forget(output)
        taken["stage: reading, small model, writing"].append(seconds_of(lambda: list(stage(plan.pending))))
        forget(output)
        start_and_stop_s, _ = run_job(output, checkpoint, [*overrides, "run.max_titles=1"])
        forget(output)
        wall_s, by_stage = run_job(output, checkpoint, overrides)
        taken["job, less a run over one title"].append((wall_s - start_and_stop_s) * titles / (titles - 1))
        taken["start and stop of the job"].append(start_and_stop_s)
    reading_s = statistics.median(taken["reading alone"])
    for name, seconds in taken.items():
        median_s = statistics.median(seconds)
        rounds_s = ", ".join(f"{one:.2f}" for one in seconds)
        print(f"{name:<40}{median_s:8.2f} s  {reading_s / median_s:6.0%} of the speed of reading   ({rounds_s})")
    print("seconds of each stage in the last job, summed over its threads: ", {name: round(spent, 1) for name, spent in by_stage.items()})


def one_full_round(output: Path, checkpoint: Path, overrides: list[str]) -> None:
    plan, stage = build(output, checkpoint, overrides)
    list(stage(plan.pending.slice(0, 1)))
    forget(output)
    reading_s = seconds_of(lambda: read_all(plan, output))
    stage_s = seconds_of(lambda: list(stage(plan.pending)))
    title_s = stage_s / plan.pending.num_rows
    print(f"{'reading alone':<40}{reading_s:8.2f} s")
    print(f"{'stage':<40}{stage_s:8.2f} s  {reading_s / stage_s:6.0%} of the speed of reading, {title_s:.2f} s a title")


def build(output: Path, checkpoint: Path, overrides: list[str]) -> tuple[Plan, ContextualiseStored]:
    """Return the pending titles, and the stage as in an actor of the job."""
    config = read_config(ContextualiseCatalogConfig, [], [f"output.uri={output}", f"contextualiser.checkpoint={checkpoint}", *overrides])
    forget(output)
    plan = make_stored_plan(config)
    (stage,) = stored_pool(plan, config).build()
    return plan, stage


def read_all(plan: Plan, output: Path) -> None:
    """Read every title as the job does, and keep none."""
    store = Output(str(output), plan.model.dataset_version)
    with ThreadPoolExecutor(READING_THREADS) as pool:
        list(pool.map(lambda name: len(read_shots(store, name, plan.model).fused_SD), plan.pending["shots"].to_pylist()))


def write_all(plan: Plan, output: Path) -> None:
    """Write as many objects of the same size as the job, from the vectors of one title."""
    store = Output(str(output), plan.model.dataset_version)
    names = plan.pending["shots"].to_pylist()
    shots = read_shots(store, names[0], plan.model)

    def write(name: str) -> None:
        content = contextual_file(shots.facts, "0" * 12, (shots.start_S, shots.end_S), shots.fused_SD, shots.fused_SD[0])
        store.store.write(matching_object(name, contextual("0" * 12)), content)

    with ThreadPoolExecutor(WRITING_THREADS) as pool:
        list(pool.map(write, names))


def forget(output: Path) -> None:
    for folder in output.glob("*/contextual-*"):
        shutil.rmtree(folder)


def run_job(output: Path, checkpoint: Path, overrides: list[str]) -> tuple[float, dict[str, float]]:
    """Return the wall seconds of the whole job, and the seconds of its stages."""
    command = [
        sys.executable,
        "-m",
        "jobs.contextualise_catalog",
        f"output.uri={output}",
        f"contextualiser.checkpoint={checkpoint}",
        *overrides,
    ]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    wall_s = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"the job failed:\n{done.stdout}{done.stderr}")
    return wall_s, json.loads((output / "contextualise-summary.json").read_text())["seconds_by_stage"]


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
