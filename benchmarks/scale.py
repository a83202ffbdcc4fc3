"""Benchmark of the driver's cost per title: the real graph over 20,000 titles with stand-ins for the stages that compute.

    python -m benchmarks.scale [--titles 20000] [--kill]     a catalog through the job: driver seconds a title, memory over time
    python -m benchmarks.scale --nodes [--titles 150]         one simulated node against two, stage times simulated by sleeping
    python -m benchmarks.scale --actors 24 [--nap 10]         24 detectors that sleep 10 s a title: how many of them one driver feeds

The plan, the graph, the commits and the report are the job's own; only shot detection and the three encoders are replaced, by stages that
give every title one shot with fixed vectors at once (or, with --nodes, after a nap). With --kill the driver is killed by SIGKILL when
half of the titles are committed, and run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.pipeline.rows import AUDIO, FLAGS, FRAMES, SHOTS, Stage, TitleRow, to_json, vectors_cell, vectors_type
from mediafm_ray.spec import SAMPLE_RATE

ROOT = Path(__file__).parents[1]
NAPS = {"detect_shots": 2.0, "encode_video": 0.8, "encode_audio": 0.4, "encode_text": 0.4}  # seconds a title, with --nodes
STEADY = (0.4, 0.9)  # the titles between which the time is taken, with --nodes
NODE_CPUS = 4  # logical, of a simulated node
DETECTORS_PER_NODE = 64  # of a simulated node, with --actors
STARTS_AT_ONCE = 3  # Processes of a simulated node that Ray starts together: by default as many as it has CPUs, which are simulated, too.
STEADY_S = 60.0  # For so long all detectors of --actors have work, without what precedes it.
FILM_BYTES = 64 << 20  # Size of a title that travels alone.
SAMPLE_EVERY_S = 2.0
DIMS = {"video": 1280, "audio": 192, "text": 384}  # of the offline profile, whose plan is used
SHOT = {
    "start_s": 0.0,
    "end_s": 1.0,
    "start_frame": 0,
    "end_frame": 25,
    "boundary_kind": "start",
    "boundary_probability": 1.0,
    "transition_start_frame": 0,
    "transition_end_frame": 0,
    "dropped_boundaries": 0,
    "text": "",
    "language": "",
    "thumbnail": b"",
}


class _StandIn(Stage):
    """A stage that does nothing, immediately or after a sleep."""

    def __init__(self, *arguments: Any):
        self.nap_s = json.loads(os.environ.get("BENCHMARK_NAPS", "{}")).get(self.name, 0.0)

    def process(self, row: TitleRow) -> Mapping[str, Any]:
        time.sleep(self.nap_s)
        return self.result()

    def result(self) -> Mapping[str, Any]:
        """Return the result of every title."""
        raise NotImplementedError


class NoDetection(_StandIn):
    """One shot, no frame, no audio."""

    name = "detect_shots"
    takes = ("title_id", "video", "timed_text")

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {"shots": SHOTS, "frames": FRAMES, "audio": AUDIO, "sample_rate": pa.int32(), "media": pa.string()}

    def result(self) -> Mapping[str, Any]:
        """See _StandIn."""
        facts = {"duration_s": 1.0, "frame_count": 25, "warnings": [], "facts": {}}
        return {"shots": [SHOT], "frames": [[b""]], "audio": [b""], "sample_rate": SAMPLE_RATE, "media": to_json(facts)}


class _NoEncoder(_StandIn):
    """One vector."""

    modality: str

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {f"{self.modality}_embeddings": vectors_type(DIMS[self.modality]), f"has_{self.modality}": FLAGS}

    def result(self) -> Mapping[str, Any]:
        """See _StandIn."""
        return {f"{self.modality}_embeddings": vectors_cell(np.ones((1, DIMS[self.modality]), np.float32)), f"has_{self.modality}": [True]}


class NoVideo(_NoEncoder):
    """A stand-in for EncodeVideo."""

    name, modality = "encode_video", "video"
    takes = drops = ("frames",)


class NoAudio(_NoEncoder):
    """A stand-in for EncodeAudio."""

    name, modality = "encode_audio", "audio"
    takes = drops = ("audio", "sample_rate")


class NoText(_NoEncoder):
    """A stand-in for EncodeText."""

    name, modality = "encode_text", "text"
    takes = ("shots", "synopsis", "tags")

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {**super().adds, "metadata_embedding": pa.list_(pa.float32())}

    def result(self) -> Mapping[str, Any]:
        """See _StandIn."""
        return {**super().result(), "metadata_embedding": None}


def main() -> None:
    """Run the benchmark of the command line, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titles", type=int, default=0, help="20,000, or 150 with --nodes")
    parser.add_argument("--kill", action="store_true", help="kill the driver in the middle, and run again")
    parser.add_argument("--nodes", action="store_true", help="compare one simulated node with two")
    parser.add_argument("--actors", type=int, help="so many detectors, which sleep")
    parser.add_argument("--nap", type=float, default=10.0, help="seconds that a detector of --actors sleeps for a title")
    parser.add_argument("--job", nargs=2, metavar=("CATALOG", "OUTPUT"), help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.job:
        run_job(arguments.job[0], arguments.job[1], overrides)
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.nodes:
            compare_nodes(Path(folder), arguments.titles or 150)
        elif arguments.actors:
            feed_actors(Path(folder), arguments.actors, arguments.nap, overrides)
        else:
            run_catalog(Path(folder), arguments.titles or 20_000, arguments.kill, overrides)


# ---------------------------------------------------------------------------------------------------------- the job


def run_job(catalog: str, output: str, overrides: list[str]) -> None:
    """Run jobs.embed_catalog with stand-ins; print memory and driver time as JSON lines on standard error."""
    from mediafm_ray.pipeline import graph
    from mediafm_ray.pipeline.cluster import connected
    from mediafm_ray.pipeline.stage_list import make_pools, recipe_steps
    from mediafm_ray.runs.catalog_run import log_plan, report
    from mediafm_ray.runs.plan import make_plan, prepare_output
    from mediafm_ray.runs.report import Console, RunResult, follow
    from mediafm_ray.runs.run_log import RunLog
    from mediafm_ray.storage.store import Store

    start, console = time.monotonic(), Console()
    given = [f"catalog.uri={catalog}", f"output.uri={output}", "contextualiser.checkpoint="]  # that stage has no stand-in
    config = read_config(EmbedCatalogConfig, [], [*given, *overrides])
    plan = make_plan(config)
    log_plan(plan, config, console)
    prepare_output(plan, config)
    result = RunResult(plan.pending.num_rows)
    planned_s, begun = time.process_time(), time.monotonic()
    log = RunLog(console, Store(config.output.uri, config.storage))
    with log, connected(config.resources), sampled(result, begun):
        stand_ins = {kind.name: kind for kind in (NoDetection, NoVideo, NoAudio, NoText)}
        steps = [
            replace(step, stage=stand_ins[step.stage.name], model=None, others=()) if step.stage.name in stand_ins else step
            for step in recipe_steps(plan, config)
        ]
        pools = make_pools(steps, config.resources)
        results = graph.embed_titles(plan, pools, config.resources.max_deaths_per_title)
        connected_s = time.process_time()
        follow(timed(graph.blocks(results), begun), result, begun, console)
        say({"driver_s": time.process_time() - connected_s, "wall_s": time.monotonic() - begun, "plan_s": planned_s})
    report(plan, result, time.monotonic() - start, config, console, log)


def timed(blocks: Iterator[pa.Table], begun: float) -> Iterator[pa.Table]:
    """Yield the blocks; report the time of the first title, and at the end those of all."""
    moments: list[float] = []
    for block in blocks:
        moments += [round(time.monotonic() - begun, 2)] * block.num_rows
        if len(moments) == block.num_rows:
            say({"first_s": moments[0]})
        yield block
    say({"moments_s": moments})


@contextmanager
def sampled(result: Any, begun: float) -> Iterator[None]:
    """Report the memory of the driver and of the object store every two seconds."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    ended = threading.Event()

    def sample() -> None:
        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        while not ended.wait(SAMPLE_EVERY_S):
            store = get_memory_info_reply(state).store_stats
            say(
                {
                    "elapsed_s": round(time.monotonic() - begun, 1),
                    "titles": result.finished,
                    "driver_mb": resident_mb(),
                    "driver_s": time.process_time(),
                    "store_mb": store.object_store_bytes_used / 1e6,
                    "spilled_mb": store.spilled_bytes_total / 1e6,
                }
            )

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def resident_mb() -> float:
    """Return the private resident memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(fields["RssAnon"].split()[0])) / 1e3


def say(sample: Mapping[str, Any]) -> None:
    """Print one JSON line for the benchmark itself."""
    print(json.dumps(sample), file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------- a catalog


def make_catalog(folder: Path, titles: int, size: int = 0) -> Path:
    """Write tiny files, which are never opened, or files of a size without content."""
    videos = folder / "videos"
    for number in range(titles):
        path = videos / f"{number % 100:02d}" / f"title{number:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(number).encode())
        if size:
            os.truncate(path, size)
    return videos


def job_command(catalog: Path, output: Path, overrides: list[str]) -> list[str]:
    """Run the job in a process of its own."""
    return [sys.executable, "-m", "benchmarks.scale", "--job", str(catalog), str(output), *overrides]


def committed(output: Path) -> int:
    """Return the number of committed titles."""
    return sum(len(list(os.scandir(shard))) for shard in output.glob("*/shots/*"))


def run_catalog(folder: Path, titles: int, kill: bool, overrides: list[str]) -> None:
    """Run a catalog through the job, killed in the middle or not."""
    catalog, output = make_catalog(folder, titles), folder / "out"
    kept = folder / "samples.jsonl"
    done_before = 0
    if kill:
        with (
            kept.open("w") as stream,
            subprocess.Popen(job_command(catalog, output, overrides), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stream) as process,
        ):
            while committed(output) < titles // 2 and process.poll() is None:
                time.sleep(1)
            process.send_signal(signal.SIGKILL)
        time.sleep(5)  # tasks that were writing end with their Ray
        done_before = committed(output)
        print(f"killed when {done_before} of {titles} titles were committed (exit code {process.returncode})")
        table(kept)
    with kept.open("w") as stream:
        done = subprocess.run(job_command(catalog, output, overrides), cwd=ROOT, stdout=subprocess.PIPE, stderr=stream, text=True)
    lines = done.stdout.splitlines()
    print(*lines[:1], *lines[-14:], sep="\n")
    if done.returncode:
        raise SystemExit(f"the job ended with {done.returncode}:\n{kept.read_text()[-2000:]}")
    summary = json.loads((output / "run-summary.json").read_text())
    facts = table(kept)
    computed = summary["titles"]["ok"]
    print(f"driver time a title      {facts['driver_s'] / computed * 1e3:8.1f} ms   (processor time, after start-up)")
    print(f"wall time a title        {facts['wall_s'] / computed * 1e3:8.1f} ms   (with start-up)")
    print(f"first title committed    {facts['first_s']:8.1f} s    after Ray began to start")
    print(f"computed in this run     {computed:8d}      of {titles}; {done_before} were there before it")
    print(f"there afterwards         {committed(output):8d}")


def table(kept: Path) -> dict[str, float]:
    """Print ten samples of a run, and its single reports."""
    samples, facts = [], {}
    for line in kept.read_text().splitlines():
        if line.startswith("{"):
            said = json.loads(line)
            if "elapsed_s" in said:
                samples.append(said)
            else:
                facts.update(said)
    print(f"{'seconds':>10}{'titles':>10}{'driver ms a title':>20}{'driver MB':>12}{'store MB':>12}{'spilled MB':>12}")
    shown = samples[:: max(1, len(samples) // 10)]
    for before, one in zip([None, *shown], shown, strict=False):
        titles = one["titles"] - before["titles"] if before else 0
        spent = f"{(one['driver_s'] - before['driver_s']) / titles * 1e3:.1f}" if before and titles else ""
        print(
            f"{one['elapsed_s']:>10.0f}{one['titles']:>10}{spent:>20}"
            f"{one['driver_mb']:>12.0f}{one['store_mb']:>12.1f}{one['spilled_mb']:>12.1f}"
        )
    return facts


# ------------------------------------------------------------------------------------------------------ two nodes


def compare_nodes(folder: Path, titles: int) -> None:
    """Run the same catalog on clusters of one and of two simulated nodes, alternately.

    What counts is the time between two titles in the middle: the processes of all nodes start on the cores of this machine, and what
    that takes is no matter of nodes.
    """
    os.environ["BENCHMARK_NAPS"] = json.dumps(NAPS)  # the nodes' processes have this environment, not the driver's
    catalog = make_catalog(folder, titles)
    first, last = (int(titles * share) for share in STEADY)
    seconds = {}
    for nodes in (1, 2):
        moments_s = run_on_nodes(catalog, folder / f"out{nodes}", nodes)
        seconds[nodes] = moments_s[last] - moments_s[first]
        whole = f"first title after {moments_s[0]:.0f} s, last after {moments_s[-1]:.0f} s"
        print(f"{nodes} node(s) of {NODE_CPUS} logical CPUs: {seconds[nodes]:6.1f} s from title {first} to {last} of {titles} ({whole})")
    print(f"two nodes / one node     {seconds[2] / seconds[1]:8.2f}")


def run_on_nodes(catalog: Path, output: Path, nodes: int) -> list[float]:
    """Return the times in seconds at which titles ended on a cluster of a number of nodes and a head without work."""
    # a node takes two detectors and one of each encoder
    pool = {"detect_shots": 2, "encode_video": 1, "encode_audio": 1, "encode_text": 1}
    overrides = [f"resources.{stage}.{bound}_actors={count * nodes}" for stage, count in pool.items() for bound in ("max", "min")]
    overrides += [f"resources.{stage}.num_cpus=0.7" for stage in pool]
    samples = run_on_cluster(catalog, output, [NODE_CPUS] * nodes, overrides)
    return next(one["moments_s"] for one in samples if "moments_s" in one)


def run_on_cluster(catalog: Path, output: Path, cpus: list[int], overrides: list[str]) -> list[dict[str, Any]]:
    """Run the job on a cluster of nodes with these numbers of CPUs and a head without work; return what it reports of itself."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 << 20})
    try:
        for count in cpus:
            cluster.add_node(num_cpus=count, object_store_memory=200 << 20)
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        command = job_command(catalog, output, overrides)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    finally:
        cluster.shutdown()
    if done.returncode:
        raise SystemExit(f"the job ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


def feed_actors(folder: Path, actors: int, nap_s: float, overrides: list[str]) -> None:
    """Run films through detectors that sleep; print the titles a second, the share of their time that detectors have work, the driver's."""
    os.environ["BENCHMARK_NAPS"] = json.dumps({"detect_shots": nap_s})
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(STARTS_AT_ONCE))
    titles = round(actors * (STEADY_S / nap_s + 4))  # The first and the last nap of a detector, and starts of different length.
    catalog = make_catalog(folder, titles, FILM_BYTES)
    whole = [f"resources.detect_shots.{bound}_actors={actors}" for bound in ("min", "max")]
    whole += [f"resources.{stage}.num_cpus=0.01" for stage in ("encode_video", "encode_audio", "encode_text")]
    nodes = -(-actors // DETECTORS_PER_NODE)
    samples = run_on_cluster(
        catalog, folder / "out", [DETECTORS_PER_NODE + 2] * nodes, ["resources.detect_shots.num_cpus=1", *whole, *overrides]
    )
    moments_s = next(one["moments_s"] for one in samples if "moments_s" in one)
    first, last = (int(titles * share) for share in STEADY)
    rate = (last - first) / (moments_s[last] - moments_s[first])
    timed = [one for one in samples if "elapsed_s" in one and moments_s[first] <= one["elapsed_s"] <= moments_s[last]]
    spent_s, elapsed_s = (timed[-1][key] - timed[0][key] for key in ("driver_s", "elapsed_s"))
    print(
        f"{actors} detectors on {nodes} simulated node(s), {nap_s:g} s a title: {rate:.2f} titles/s of {actors / nap_s:.2f} possible "
        f"({rate * nap_s / actors:.0%}); driver {spent_s / elapsed_s:.0%} of a core, {spent_s / elapsed_s / rate * 1e3:.1f} ms a title, "
        f"{max(one['driver_mb'] for one in samples if 'driver_mb' in one):.0f} MB; first title after {moments_s[0]:.0f} s; "
        f"load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
