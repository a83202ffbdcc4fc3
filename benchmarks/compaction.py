"""Compaction of many short titles: objects and speed before and after, and kills beside a writer and a reader.

    python -m benchmarks.compaction [--titles 20000] [--shots 3] [--dim 384]
    python -m benchmarks.compaction --commits 1000
    python -m benchmarks.compaction --kills 50 [--seed 0]

The first form makes titles in a temporary folder, compacts them in a process of its own, whose CPU time and peak memory it prints, and runs
the same DuckDB queries over the titles' objects and over the merged files. Of more than 50,000 titles, the queries read those of some
shards, before and after. 1,000,000 titles need 18 GB and as many inodes. The second form commits titles one by one, as objects and as
appends to a Lance table. The third form kills a process that compacts without end, at seeded moments, while one thread commits, replaces
and deletes titles and another reads all the while: by the listing and by a scan. A title that nobody changes meanwhile must be seen once,
from its present source. The lease of a killed compaction is deleted, as its message tells an operator to do.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import multiprocessing
import os
import platform
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.planning import peak_mb
from benchmarks.stored_titles import SOURCE, make_model
from mediafm_ray.config.sections import CompactConfig
from mediafm_ray.derive.runner import ordered_map
from mediafm_ray.spec import SHARDS
from mediafm_ray.storage.compaction import Compaction, compact_shard, present_shards
from mediafm_ray.storage.dataset import EmbeddingDataset, Model, Output
from mediafm_ray.storage.lease import held
from mediafm_ray.storage.names import SHOTS, compaction_lease_folder, encode_title, object_name, shard_name
from mediafm_ray.storage.schemas import embedding_array, encode_parquet, shots_schema
from mediafm_ray.storage.store import Store

VERSION = "0123456789ab"
LEASE_S = 600
SHOT_S = 3.0
GAP_S = (0.05, 0.8)  # between the start of a compaction and its kill
KILLED_TITLES, KILLED_SHARDS = 24, 3
MADE_AT_ONCE = 1000  # titles
MAX_QUERIED_TITLES = 50_000  # DuckDB needs some milliseconds for each object, several times.
QUERIES = {
    "rows and seconds": "SELECT count(*), sum(end_s - start_s) FROM read_parquet({files})",
    "shots a title": "SELECT title_id, count(*) FROM read_parquet({files}) GROUP BY title_id",
}


def made_object(model: Model, title_id: str, source: str, shots: int) -> bytes:
    """Return an object of ``shots`` whose content its title and source decide."""
    dim = model.dims["fused"]
    seed = int.from_bytes(hashlib.sha256(f"{title_id}@{source}".encode()).digest()[:8])
    vectors_SD = np.random.default_rng(seed).standard_normal((shots, dim), np.float32)
    norm_S = np.linalg.norm(vectors_SD, axis=1)
    own: dict[str, Any] = {
        "title_id": pa.array([title_id] * shots),
        "text": pa.array([f"a few words of {title_id}"] * shots),
        "thumbnail": pa.array([bytes(vectors_SD[shot].data)[:1500] for shot in range(shots)]),
        "fused_embedding": embedding_array(vectors_SD / norm_S[:, None]),
        "fused_norm": pa.array(norm_S),
    }
    schema = shots_schema(dim)
    shared = shared_columns(shots)
    facts = {
        **{"title_id": title_id, "source": source, "video": f"{title_id}.mp4", "dataset_version": model.dataset_version},
        **{"dims": dict(model.dims), "spans": {name: list(span) for name, span in model.spans.items()}},
        **{"media": {"duration_s": SHOT_S * shots, "frame_count": 75 * shots, "warnings": []}, "metadata_embedding": None},
    }
    return encode_parquet(pa.table([own.get(name, shared.get(name)) for name in schema.names], schema=schema), facts)


@functools.cache
def shared_columns(shots: int) -> dict[str, pa.Array]:
    """Return the columns that are the same for every made title of so many shots."""
    columns: dict[str, Any] = {
        "shot_index": range(shots),
        "start_s": [SHOT_S * shot for shot in range(shots)],
        "end_s": [SHOT_S * (shot + 1) for shot in range(shots)],
        "start_frame": [round(25 * SHOT_S) * shot for shot in range(shots)],
        "end_frame": [round(25 * SHOT_S) * (shot + 1) for shot in range(shots)],
        "boundary_kind": ["start", *["cut"] * (shots - 1)],
        "boundary_probability": [1.0] * shots,
        "transition_start_frame": [0] * shots,
        "transition_end_frame": [0] * shots,
        "dropped_boundaries": [0] * shots,
        "language": ["en"] * shots,
        "has_video": [True] * shots,
        "has_audio": [True] * shots,
        "has_text": [True] * shots,
        "audio_levels": [[-20] * 30] * shots,
    }
    schema = shots_schema(1)
    return {name: pa.array(list(values), schema.field(name).type) for name, values in columns.items()}


# ---------------------------------------------------------------------------------------------------------------- figures


def measure(titles: int, shots: int, dim: int) -> None:
    """Make titles, query, compact, query; print the figures."""
    import duckdb

    with tempfile.TemporaryDirectory() as uri:
        model = make_model(VERSION, dim // 2, dim // 4, dim - dim // 2 - dim // 4)
        output = Output(uri, VERSION)
        output.write_model(model)
        root, shards = output.store.root, [shard_name(number) for number in range(SHARDS)]
        for shard in shards:
            Path(root, SHOTS, shard).mkdir(parents=True)
        sample = shards[: max(1, SHARDS * MAX_QUERIED_TITLES // max(titles, MAX_QUERIED_TITLES))]
        processes = multiprocessing.get_context("spawn")
        print(
            f"{platform.machine()}, {os.cpu_count()} cores; {titles} titles of {shots} shots, {dim} dimensions; DuckDB {duckdb.__version__}"
        )
        with ProcessPoolExecutor(os.cpu_count(), processes) as pool:
            parts = [range(first, min(first + MADE_AT_ONCE, titles)) for first in range(0, titles, MADE_AT_ONCE)]
            making_s = timed(lambda: list(pool.map(functools.partial(make_titles, root, model, shots), parts)))
        print(f"making        {making_s:.1f} s", flush=True)
        before = timed_queries(duckdb.connect(), f"{root}/{SHOTS}", sample)
        listing_s = timed(lambda: output.list(SHOTS))
        objects, size = count(output)
        with ProcessPoolExecutor(1, processes) as pool:
            seconds, cpu_s, most_mb, read_mb = pool.submit(compact_measured, uri).result()
        merged_objects, merged_size = count(output)
        print(f"objects       {objects} of {size / 1e6:.1f} MB before, {merged_objects} of {merged_size / 1e6:.1f} MB after")
        print(f"compaction    {seconds:.1f} s, {read_mb / seconds:.1f} MB/s; peak memory {most_mb:.0f} MB")
        print(f"CPU           {cpu_s:.1f} core-seconds, {1000 * cpu_s / titles:.2f} ms a title")
        print(f"listing       {listing_s:.2f} s before, {timed(lambda: Output(uri, VERSION).list(SHOTS)):.2f} s after")
        after = timed_queries(duckdb.connect(), f"{root}/compacted/{SHOTS}", sample)
        whole = timed_queries(duckdb.connect(), f"{root}/compacted/{SHOTS}", shards)
        print(f"DuckDB over {len(sample)} of {SHARDS} shards, in brackets over the merged files of all")
        for name in QUERIES:
            print(
                f"{name:<16}  {before[name]:.3f} s over objects, {after[name]:.3f} s over merged files: {before[name] / after[name]:.1f} x"
                f" ({whole[name]:.3f} s)"
            )


def make_titles(root: str, model: Model, shots: int, numbers: Iterable[int]) -> None:
    """Make titles, without the flush to the disk of Store.write, which is not measured here."""
    for number in numbers:
        title_id = f"clip-{number:08d}"
        Path(root, object_name(SHOTS, title_id, SOURCE)).write_bytes(made_object(model, title_id, SOURCE, shots))


def compact_measured(uri: str) -> tuple[float, float, float, float]:
    """Compact all shards as the job does; return its seconds, the core-seconds and peak MB of this process, and the MB it has merged."""
    dataset, result = EmbeddingDataset(uri), Compaction()
    begun, cpu_begun = time.monotonic(), time.process_time()
    with held(Store(uri), compaction_lease_folder(VERSION), "benchmarks.compaction", LEASE_S) as lease:
        shards = present_shards(dataset, SHOTS)
        for done in ordered_map(lambda shard: compact_shard(dataset, SHOTS, shard, lease), shards, CompactConfig().threads):
            result.add(done)
    seconds, cpu_s = time.monotonic() - begun, time.process_time() - cpu_begun
    return seconds, cpu_s, peak_mb(), result.read_bytes / 1e6


def timed_queries(connection: Any, folder: str, shards: Iterable[str]) -> dict[str, float]:
    """Return the seconds of each query over the files of some shards, the shorter of two runs."""
    files = [f"{folder}/{shard}/*.parquet" for shard in shards if any(Path(folder, shard).glob("*.parquet"))]
    runs = {
        name: functools.partial(lambda query: connection.sql(query).fetchall(), text.format(files=files)) for name, text in QUERIES.items()
    }
    return {name: min(timed(run), timed(run)) for name, run in runs.items()}


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    begun = time.monotonic()
    run()
    return time.monotonic() - begun


def count(output: Output) -> tuple[int, int]:
    """Return the number of Parquet files of an output and their bytes."""
    sizes = [info.size for info in output.store.list() if info.name.endswith(".parquet")]
    return len(sizes), sum(sizes)


def measure_commits(titles: int, shots: int, dim: int) -> None:
    """Commit titles one by one, as objects and as appends to a Lance table; print the milliseconds of each."""
    import lance
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as uri:
        model = make_model(VERSION, dim // 2, dim // 4, dim - dim // 2 - dim // 4)
        output = Output(uri, VERSION)
        contents = [made_object(model, f"clip-{number:08d}", SOURCE, shots) for number in range(titles)]
        tables = [pq.read_table(pa.BufferReader(content)).replace_schema_metadata(None) for content in contents]
        objects = [timed(functools.partial(output.write, SHOTS, f"clip-{n:08d}", SOURCE, c)) for n, c in enumerate(contents)]
        lance.write_dataset(tables[0], f"{uri}/table")
        appends = [timed(functools.partial(lance.write_dataset, table, f"{uri}/table", mode="append")) for table in tables]
        tenth = max(1, titles // 10)
        for name, seconds in (("objects", objects), ("Lance appends", appends)):
            first, last = (1000 * sorted(part)[len(part) // 2] for part in (seconds[:tenth], seconds[-tenth:]))
            print(f"{name:<14} median of the first {tenth} {first:.1f} ms, of the last {tenth} {last:.1f} ms")


# ------------------------------------------------------------------------------------------------------------------ kills


@dataclass
class KillResult:
    """What was seen while compactions were killed."""

    kills: int = 0
    polls: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)  # titles that were not seen, or from another source
    doubled: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)  # titles whose bytes are not those that were committed
    scans_again: int = 0  # scans that met an object that was removed since it was listed
    merged: int = 0  # titles in merged files at the end
    left: list[str] = field(default_factory=list)  # objects and marks that the last compaction left
    errors: list[str] = field(default_factory=list)


class Changes:
    """The committed titles, which one thread changes while another compares them with what it reads."""

    def __init__(self, uri: str, model: Model, seed: int, result: KillResult):
        self.output, self.model, self.result = Output(uri, model.dataset_version), model, result
        self.dice = random.Random(seed)
        ids = (f"clip-{number}" for number in range(1_000_000))
        shards = [f"{shard:02x}" for shard in range(KILLED_SHARDS)]
        self.titles = [title for title, _ in zip((t for t in ids if _shard(t) in shards), range(KILLED_TITLES), strict=False)]
        self.sources: dict[str, str] = {}  # of the committed titles
        self.stamps = dict.fromkeys(self.titles, 0)  # odd while a title is being changed
        self.lock = threading.Lock()
        for title in self.titles:
            self._change(title, "add")

    def change(self) -> None:
        """Commit, replace or delete a title, as jobs do."""
        title = self.dice.choice(self.titles)
        kind = "add" if title not in self.sources else self.dice.choice(("replace", "replace", "delete"))
        with self.lock:
            self.stamps[title] += 1
        self._change(title, kind)
        with self.lock:
            self.stamps[title] += 1
        self.result.changes[kind] += 1

    def _change(self, title: str, kind: str) -> None:
        old = self.sources.get(title)
        if kind == "delete":
            assert old is not None
            self.output.remove(object_name(SHOTS, title, old))
            del self.sources[title]
            return
        source = f"{self.dice.getrandbits(64):016x}" if kind == "replace" else SOURCE
        content = made_object(self.model, title, source, 1 + len(title) % 3)
        name = self.output.write(SHOTS, title, source, content)
        if old is not None:
            info = self.output.store.info(name)
            self.output.remove(object_name(SHOTS, title, old), time.time() if info is None else info.modified)
        self.sources[title] = source

    def quiet(self) -> tuple[dict[str, int], dict[str, str]]:
        """Return the stamps and sources of the moment."""
        with self.lock:
            return dict(self.stamps), dict(self.sources)

    def poll(self) -> None:
        """Read everything once, and compare the titles that nobody changed meanwhile."""
        stamps, sources = self.quiet()
        fresh = Output(self.output.store.uri.rpartition("/")[0], self.model.dataset_version)
        listed = [(title, source) for title, source in fresh.list(SHOTS)]
        try:
            table = EmbeddingDataset(self.output.store.uri.rpartition("/")[0]).dataset().to_table(columns=["title_id", "shot_index"])
        except FileNotFoundError:  # A job or the compaction has removed an object since the scan began.
            self.result.scans_again += 1
            table = None
        after, _ = self.quiet()
        still = [title for title in self.titles if stamps[title] == after[title] and not stamps[title] % 2]
        self.result.polls += 1
        of_title: dict[str, list[str]] = {}
        for title, source in listed:
            of_title.setdefault(title, []).append(source)
        for title in still:
            found = of_title.get(encode_title(title), [])
            expected = [sources[title]] if title in sources else []
            if len(found) > 1:
                self.result.doubled.append(f"{title}: {found}")
            elif found != expected:
                self.result.lost.append(f"{title}: {found}, expected {expected}")
        if table is not None:
            shots = Counter(zip(table["title_id"].to_pylist(), table["shot_index"].to_pylist(), strict=True))
            titles = Counter(title for title, _ in shots)
            for title in still:
                expected_shots = 1 + len(title) % 3 if title in sources else 0
                if titles[title] != expected_shots:
                    self.result.lost.append(f"{title}: {titles[title]} shots in a scan, expected {expected_shots}")
                self.result.doubled += [
                    f"{title}: shot {shot} in a scan" for (of, shot), number in shots.items() if of == title and number > 1
                ]

    def check_content(self) -> None:
        """Compare the bytes of all titles."""
        fresh = Output(self.output.store.uri.rpartition("/")[0], self.model.dataset_version)
        for title, source in self.sources.items():
            if fresh.read(object_name(SHOTS, title, source)) != made_object(self.model, title, source, 1 + len(title) % 3):
                self.result.different.append(title)


def _shard(title: str) -> str:
    return object_name(SHOTS, title, "").split("/")[1].removeprefix("shard=")


def compact_all(uri: str, begun: Any = None, endless: bool = False) -> None:
    """Compact all shards once, or again and again, as the job does."""
    dataset = EmbeddingDataset(uri)
    with held(Store(uri), compaction_lease_folder(dataset.version), "benchmarks.compaction", LEASE_S) as lease:
        if begun:
            begun.set()
        while True:
            for shard in present_shards(dataset, SHOTS):
                compact_shard(dataset, SHOTS, shard, lease)
            if not endless:
                return


def kill_compactions(kills: int, seed: int, uri: str) -> KillResult:
    """Kill compactions beside a writer and a reader; return what was seen."""
    result, dice = KillResult(), random.Random(seed)
    model = make_model(VERSION, 5, 3, 4)
    Output(uri, VERSION).write_model(model)
    changes = Changes(uri, model, seed, result)
    over = threading.Event()

    def forever(work: Callable[[], None], pause_s: float) -> None:
        try:
            while not over.wait(pause_s):
                work()
        except Exception as error:  # The result names it.
            result.errors.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=forever, args=pair) for pair in ((changes.change, 0.02), (changes.poll, 0.0))]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["mediafm_ray.storage.compaction", "benchmarks.stored_titles"])
    compact_all(uri)
    for worker in workers:
        worker.start()
    try:
        while result.kills < kills and not result.errors:
            begun = processes.Event()
            process = processes.Process(target=compact_all, args=(uri, begun, True))
            process.start()
            begun.wait(120)
            time.sleep(dice.uniform(*GAP_S))
            if process.is_alive():
                process.kill()
                result.kills += 1
            else:
                result.errors.append(f"a compaction ended with {process.exitcode}")
            process.join()
            shutil.rmtree(f"{uri}/leases")
    finally:
        over.set()
        for worker in workers:
            worker.join()
    changes.poll()
    compact_all(uri)
    changes.poll()
    changes.check_content()
    output = Output(uri, VERSION)
    result.merged = len(output.list(SHOTS))
    result.left = [info.name for infos in output.list_objects(SHOTS).values() for info in infos]
    result.left += [info.name for infos in output.list_compacted(SHOTS).marks.values() for info in infos]
    return result


def main() -> None:
    """Measure, or kill, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titles", type=int, default=20_000)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--commits", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.commits:
        measure_commits(arguments.commits, arguments.shots, arguments.dim)
        return
    if not arguments.kills:
        measure(arguments.titles, arguments.shots, arguments.dim)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = kill_compactions(arguments.kills, arguments.seed, f"{folder}/out")
    changes = ", ".join(f"{number} {kind}" for kind, number in sorted(result.changes.items()))
    print(f"{platform.machine()}, {os.cpu_count()} cores, seed {arguments.seed}")
    print(f"kills      {result.kills}, beside {result.changes.total()} changes ({changes}) and {result.polls} polls")
    print(f"lost       {len(result.lost)} {result.lost[:3] or ''}")
    print(f"doubled    {len(result.doubled)} {result.doubled[:3] or ''}")
    print(f"different  {len(result.different)} {result.different[:3] or ''}")
    print(f"left       {len(result.left)} {result.left[:3] or ''}; {result.merged} titles merged at the end")
    print(f"scans that were begun again {result.scans_again}; errors {result.errors or 'none'}")
    if result.lost or result.doubled or result.different or result.left or result.errors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
