"""Benchmark of mediafm explore: start, first page, latency of searches among many shots, twenty users at once, memory.

    python -m benchmarks.explore FOLDER [--shots 1000000] [--users 20] [--seconds 60] [--think 1.0] [--keep]

An index of random clusters (benchmarks.search) with vectors of 768 dimensions, and of 384 dimensions for texts, is written and indexed
as mediafm index does, and a few titles with pictures beside it. The job is started as a command. One user searches by shots and by words,
one search after another; then many users at once search, look at pages of titles and thumbnails, each with a pause of --think seconds on
average. Latency is that of a whole answer at an HTTP client on the same machine; memory is the largest resident set of the server.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.pages import commit_title
from benchmarks.search import SHOTS_A_TITLE, World, rows_of
from mediafm_ray.config.sections import IndexConfig
from mediafm_ray.derive.indexing import index_vectors
from mediafm_ray.explore.queries import link
from mediafm_ray.models.encoder import weights_digest
from mediafm_ray.models.options import TextEncoderConfig
from mediafm_ray.runs.plan import encoder_recipe
from mediafm_ray.runs.report import Console
from mediafm_ray.storage.index import EMBEDDING, IndexFacts, part_column
from mediafm_ray.storage.index_writer import IndexWriter
from mediafm_ray.storage.store import StorageConfig

DIMS = {EMBEDDING: 768, part_column("text"): 384}
STORED_TITLES, STORED_SHOTS = 10, 200  # titles with pictures
WORDS = ("a boat", "the red car", "people at night", "where were you", "good evening", "snow on the road", "the phone rings", "music")
SEARCHES = 200


def main() -> None:
    """Make the catalog, start the server, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="receives explore-benchmark/, of about 3 KB a shot")
    parser.add_argument("--shots", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--think", type=float, default=1.0)
    parser.add_argument("--keep", action="store_true", help="leave the catalog there; a second run only measures")
    arguments = parser.parse_args()
    folder = arguments.folder / "explore-benchmark"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        build(folder, arguments.shots)
    command = [sys.executable, "-m", "jobs.explore_catalog", f"output.uri={folder}/out", f"index.uri={folder}/index", "explore.port=0"]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = next(int(found[1]) for line in server.stdout or () if (found := re.search(r"open http://127.0.0.1:(\d+)/", line)))
            loaded = time.monotonic()
            fetch(http.client.HTTPConnection("127.0.0.1", port), "/")
            print(f"loaded in {loaded - begun:.1f} s, the first page {time.monotonic() - loaded:.2f} s later")
            measure(port, server.pid, arguments)
            peak_kb = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[0]
            print(f"peak memory {int(peak_kb) * 1024 / 1e9:.2f} GB")
        finally:
            server.terminate()
    if not arguments.keep:
        shutil.rmtree(folder)


def build(folder: Path, shots: int) -> None:
    """Write the titles and the index."""
    for title in range(STORED_TITLES):
        commit_title(str(folder / "out"), f"title-{title}", STORED_SHOTS, title)
    text = TextEncoderConfig()
    facts = IndexFacts("0123456789ab", "shots", DIMS, {"text": encoder_recipe(text, weights_digest(text))})
    writer = IndexWriter(str(folder / "index"), StorageConfig())
    writer.create(facts)
    worlds = {column: World(shots, dim, 100, 1.0, 0) for column, dim in DIMS.items()}
    begun = time.monotonic()
    writer.add(rows(worlds, facts, shots))
    index_vectors(writer, IndexConfig(least_shots=256), Console(sys.stdout), changed=True)
    writer.publish()
    print(f"{shots} shots written and indexed in {time.monotonic() - begun:.0f} s: {writer.size() / 1e9:.2f} GB", flush=True)
    (folder / "done").touch()


def rows(worlds: dict[str, World], facts: IndexFacts, shots: int) -> Iterator[pa.Table]:
    """Yield the rows of every title."""
    centres = {column: world.centres() for column, world in worlds.items()}
    for title in range(-(-shots // SHOTS_A_TITLE)):
        yield rows_of(title, {column: world.title(centres[column], title) for column, world in worlds.items()}, facts)


def measure(port: int, pid: int, arguments: argparse.Namespace) -> None:
    """Print the latency for one user and for many."""
    titles = max(arguments.shots // SHOTS_A_TITLE, 1)
    drawn = random.Random(0)
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def by_shot(drawn: random.Random) -> str:
        return link("/", like=f"title-{drawn.randrange(titles)}", shot=drawn.randrange(SHOTS_A_TITLE))

    def by_words(drawn: random.Random) -> str:
        return link("/", q=f"{drawn.choice(WORDS)} {drawn.randrange(10**6)}")

    def filtered(drawn: random.Random) -> str:
        return by_shot(drawn) + "&after=600&length=2&others=1"

    def page(drawn: random.Random) -> str:
        return link("/title", id=f"title-{drawn.randrange(STORED_TITLES)}")

    def picture(drawn: random.Random) -> str:
        return link("/thumbnail", id=f"title-{drawn.randrange(STORED_TITLES)}", shot=drawn.randrange(STORED_SHOTS))

    kinds: dict[str, Callable[[random.Random], str]] = {"by a shot": by_shot, "by words": by_words, "by a shot, filtered": filtered}
    for name, make in kinds.items():
        for lap in ("first", "again"):
            before = processor_s(pid)
            found = [fetch(connection, make(drawn)) for _ in range(SEARCHES)]
            used_ms = 1000 * (processor_s(pid) - before) / SEARCHES
            print(f"one user, {name}, {lap}: {described(found)}; {used_ms:.0f} ms of processor time each", flush=True)
    seconds, errors = collections.defaultdict(list), []
    over = time.monotonic() + arguments.seconds

    def user(number: int) -> None:
        drawn, connection = random.Random(number), http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while time.monotonic() < over:
            name, make = drawn.choice([*kinds.items(), ("page of a title", page), *[("thumbnail", picture)] * 3])
            try:
                seconds[name].append(fetch(connection, make(drawn)))
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                errors.append(repr(error))
                connection.close()
            time.sleep(drawn.expovariate(1 / arguments.think) if arguments.think else 0)

    threads = [threading.Thread(target=user, args=(number,)) for number in range(arguments.users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(
        f"{arguments.users} users for {arguments.seconds:g} s: {sum(map(len, seconds.values()))} answers, {len(errors)} errors {errors[:3]}"
    )
    for name, found in sorted(seconds.items()):
        print(f"  {name}: {described(found)}")


def fetch(connection: http.client.HTTPConnection, address: str) -> float:
    """Return the seconds of a whole answer. Raises RuntimeError for an answer that is an error."""
    begun = time.perf_counter()
    connection.request("GET", address)
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{address}: {answer.status}")
    return time.perf_counter() - begun


def processor_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def described(seconds: list[float]) -> str:
    """Return percentiles in words."""
    p50, p95, p99 = 1000 * np.percentile(seconds, [50, 95, 99])
    return f"{len(seconds)} answers, p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms"


if __name__ == "__main__":
    main()
