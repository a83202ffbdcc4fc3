"""Benchmark of search among many shots: build time, size, latency, recall and memory of an index.

    python -m benchmarks.search FOLDER [--shots 100000] [--dims 2304] [--cluster 100] [--spread 1.0] [--rank 0] [--keep]

Vectors are random clusters: a centre is a random direction, a shot its cluster's centre plus noise whose norm is --spread times the
centre's, scaled to norm 1. The noise is in all directions or, with --rank, in so many that all clusters share: real shots vary in few.
They are written, indexed, tuned and searched by the code of jobs.build_index and jobs.search_shots, in one column of the index. Queries
are further members of the clusters that are not in the index. Truth is an exact search of the float32 vectors as they were made, so
that recall@10 counts what half precision and the vector index lose, together. Memory is the largest resident set of this process.
--index-type compares other kinds of Lance's indexes; --no-index measures a search that looks at every shot.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from mediafm_ray.config.sections import IndexConfig
from mediafm_ray.derive.indexing import RESULTS, index_vectors
from mediafm_ray.downstream.retrieval import NOTHING, ExactSearch, recall
from mediafm_ray.downstream.similarity import unit_vectors
from mediafm_ray.runs.report import Console
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage import index_writer
from mediafm_ray.storage.index import EMBEDDING, IndexFacts, ShotIndex, half_vectors, open_index
from mediafm_ray.storage.index_writer import IndexWriter
from mediafm_ray.storage.store import StorageConfig

SHOTS_A_TITLE = 1000


@dataclasses.dataclass(frozen=True)
class World:
    """Random clusters of vectors, the same in every call."""

    shots: int
    dims: int
    cluster: int
    spread: float
    rank: int

    def centres(self) -> np.ndarray:
        """Return (C, D) float32 unit vectors."""
        count = max(1, self.shots // self.cluster)
        return unit_vectors(np.random.default_rng(0).standard_normal((count, self.dims), np.float32))[0]

    def members(self, centres_CD: np.ndarray, clusters_N: np.ndarray, seed: int) -> np.ndarray:
        """Return (N, D) float32 unit vectors of shots of these clusters."""
        random = np.random.default_rng(seed)
        if self.rank:
            axes_RD = np.random.default_rng(1).standard_normal((self.rank, self.dims), np.float32) / np.float32(np.sqrt(self.rank))
            noise_ND = random.standard_normal((len(clusters_N), self.rank), np.float32) @ axes_RD
        else:
            noise_ND = random.standard_normal((len(clusters_N), self.dims), np.float32)
        noise_ND *= np.float32(self.spread / np.sqrt(self.dims))
        return unit_vectors(centres_CD[clusters_N] + noise_ND)[0]

    def titles(self, centres_CD: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield number and vectors of every title; its shots are of any clusters."""
        for title in range(-(-self.shots // SHOTS_A_TITLE)):
            yield title, self.title(centres_CD, title)

    def title(self, centres_CD: np.ndarray, title: int) -> np.ndarray:
        """Return (S, D) float32 unit vectors of one title."""
        count = min(SHOTS_A_TITLE, self.shots - title * SHOTS_A_TITLE)
        clusters_S = np.random.default_rng([2, title]).integers(len(centres_CD), size=count)
        return self.members(centres_CD, clusters_S, seed=title + 1)


def rows_of(title: int, vectors: Mapping[str, np.ndarray], facts: IndexFacts) -> pa.Table:
    """A title as rows of the index. ``vectors``: (S, D) unit vectors by column."""
    count = len(next(iter(vectors.values())))
    times = np.arange(count, dtype=np.float64) * 3
    columns = {
        "title_id": pa.array([f"title-{title}"] * count),
        "source": pa.array(["0"] * count),
        "shot_index": pa.array(np.arange(count), pa.int32()),
        "start_s": times,
        "end_s": times + 3,
        "language": pa.array(["en"] * count),
        "text": pa.array([f"what is said in shot {shot}" for shot in range(count)]),
        **{f"has_{modality}": pa.array([True] * count) for modality in MODALITIES},
        **{column: half_vectors(vectors_SD, np.ones(count, bool)) for column, vectors_SD in vectors.items()},
    }
    schema = facts.schema().remove_metadata()
    return pa.table([columns[field.name] for field in schema], schema=schema)


def main() -> None:
    """Write the vectors, index and search them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="receives the index, in search-benchmark/; two bytes a number and more are needed")
    parser.add_argument("--shots", type=int, default=100_000)
    parser.add_argument("--dims", type=int, default=2304)
    parser.add_argument("--cluster", type=int, default=100, help="shots of a cluster, on average")
    parser.add_argument("--spread", type=float, default=1.0, help="norm of the noise, where that of a centre is 1")
    parser.add_argument("--rank", type=int, default=0, help="dimensions of the noise; 0 = all")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--recall", type=float, default=IndexConfig.recall)
    parser.add_argument("--index-type", default=index_writer.INDEX_TYPE)
    parser.add_argument("--no-index", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave the index there; a second run only searches it")
    arguments = parser.parse_args()
    index_writer.INDEX_TYPE = arguments.index_type
    world = World(arguments.shots, arguments.dims, arguments.cluster, arguments.spread, arguments.rank)
    uri = arguments.folder / "search-benchmark"
    if not uri.exists():
        build(world, str(uri), arguments)
    index = open_index(str(uri), StorageConfig())
    search(world, index, arguments)
    print(f"peak memory {peak_gb():.2f} GB")
    if not arguments.keep:
        shutil.rmtree(uri)


def build(world: World, uri: str, arguments: argparse.Namespace) -> None:
    """Write the vectors and index them as jobs.build_index does; says how long each took."""
    console = Console(sys.stdout)
    facts = IndexFacts("0123456789ab", "shots", {EMBEDDING: world.dims}, {})
    writer = IndexWriter(uri, StorageConfig())
    writer.create(facts)
    centres_CD = world.centres()
    begun = time.monotonic()
    writer.add(rows_of(title, {EMBEDDING: vectors_SD}, facts) for title, vectors_SD in world.titles(centres_CD))
    written = time.monotonic()
    rows = writer.size()
    console.say(f"{world.shots} vectors of {world.dims} dimensions made and written in {written - begun:.0f} s: {rows / 1e9:.2f} GB")
    if not arguments.no_index:
        config = IndexConfig(recall=arguments.recall, least_shots=256)
        index_vectors(writer, config, console, changed=True)
        took = time.monotonic() - written
        console.say(f"{arguments.index_type} trained, filled and tuned in {took:.0f} s: {(writer.size() - rows) / 1e9:.2f} GB more")
    writer.publish()
    console.say(f"peak memory so far {peak_gb():.2f} GB")


def search(world: World, index: ShotIndex, arguments: argparse.Namespace) -> None:
    """Search for shots that are not in the index; latency and recall@10 against exact search of the vectors as they were made."""
    centres_CD = world.centres()
    clusters_Q = np.random.default_rng(3).integers(len(centres_CD), size=arguments.queries)
    queries_QD = world.members(centres_CD, clusters_Q, seed=0)
    truth = ExactSearch(queries_QD, RESULTS)
    for title, vectors_SD in world.titles(centres_CD):
        truth.add(title * SHOTS_A_TITLE + np.arange(len(vectors_SD)), vectors_SD)
    for lap in ("first", "again"):
        rows_QK = np.full((len(queries_QD), RESULTS), NOTHING, np.int64)
        cosine_QK = np.full((len(queries_QD), RESULTS), -np.inf, np.float32)
        seconds = []
        for query, vector_D in enumerate(queries_QD):
            begun = time.perf_counter()
            found = index.nearest(EMBEDDING, vector_D, RESULTS, exact=arguments.no_index)
            seconds.append(time.perf_counter() - begun)
            rows_QK[query, : len(found)] = rows(found)
        for place in np.unique(rows_QK[rows_QK != NOTHING] // SHOTS_A_TITLE):
            asked, rank = np.nonzero(rows_QK // SHOTS_A_TITLE == place)
            title_SD = world.title(centres_CD, int(place))
            cosine_QK[asked, rank] = np.sum(queries_QD[asked] * title_SD[rows_QK[asked, rank] % SHOTS_A_TITLE], axis=1)
        reached = recall(rows_QK, cosine_QK, truth.cosine_QK)
        p50, p95 = 1000 * np.percentile(seconds, [50, 95])
        print(f"{len(queries_QD)} searches, {lap}: p50 {p50:.1f} ms, p95 {p95:.1f} ms, recall@{RESULTS} {reached:.4f}")


def rows(found: pa.Table) -> np.ndarray:
    """Return the rows of results, in the order of generation."""
    titles = [int(title_id.removeprefix("title-")) for title_id in found["title_id"].to_pylist()]
    return np.array(titles, np.int64) * SHOTS_A_TITLE + found["shot_index"].to_numpy()


def peak_gb() -> float:
    """Return the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
