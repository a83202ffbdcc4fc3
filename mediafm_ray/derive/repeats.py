"""Find the runs of shots that titles share, by the index: near shots of other titles, offsets, runs. No ray here.

All shots are compared with those of other titles that lie in the same part of the space (of the two nearest of so many centres), part by
part: a search for every shot would take a hundred times as long, and all pairs much longer.

Shapes
    N  shots of the index, in the order of a scan
    P  parts of the space
    M  shots of a part
    E  pairs of near shots
    V  votes of pairs for offsets
    D  dimension of a vector
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mediafm_ray.config.jobs import FindRepeatsConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.runner import PROGRESS_S
from mediafm_ray.downstream.repeats import (
    MAX_CROWD,
    MIN_EVIDENCE,
    TOLERANCE_S,
    Levels,
    Run,
    TitleShots,
    find_runs,
    levels_of,
    unrelated_level,
)
from mediafm_ray.downstream.similarity import unit_vectors
from mediafm_ray.runs.report import Console
from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset, newest_objects
from mediafm_ray.storage.index import NoIndex, ShotIndex, open_index, part_column
from mediafm_ray.storage.names import SHOTS, encode_title, object_key
from mediafm_ray.storage.schemas import METADATA_KEY, read_facts, repeats_schema
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.storage.tables import read_object
from mediafm_ray.text import public_line

COLUMN = part_column("video")
RUN_COLUMNS = tuple(name for name in repeats_schema().names if name not in ("title_a", "title_b", "kind"))
MAX_SHOWN = 20  # repeats in the printed list
SHOTS_A_PART = 1024
PROBES = 2  # parts in which a shot is compared
SAMPLE_A_PART = 32  # shots from which the centres are computed
ROUNDS = 6  # of k-means
BLOCK = 4096  # shots in memory beside those of a part
SAMPLED = 2048  # shots whose cosines show what unrelated shots have
NEIGHBOURS = 8  # pairs of a shot in a part, at most
CROWD = 0.02  # cosine by which shots may be less near than the nearest and still be of its crowd
MAX_OFFSETS = 32  # of two titles that are looked at, those with the most votes
SEED = 0
TITLES_IN_MEMORY = 256


@dataclass(frozen=True, eq=False)
class Catalog:
    """The shots of an index."""

    titles: Sequence[str]  # sorted
    title_N: np.ndarray  # int32
    shot_N: np.ndarray  # int32
    start_N: np.ndarray  # float64
    end_N: np.ndarray

    def rows_of(self, title: int) -> np.ndarray:
        """Return the rows of a title's shots in order."""
        begin, end = self._bounds[title : title + 2]
        return self._order_N[begin:end]

    @functools.cached_property
    def _order_N(self) -> np.ndarray:
        return np.lexsort((self.shot_N, self.title_N))

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        return np.searchsorted(self.title_N[self._order_N], np.arange(len(self.titles) + 1))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of near shots of different titles: rows, the first of the smaller title, and cosines."""

    a_E: np.ndarray  # int64
    b_E: np.ndarray  # int64
    cosine_E: np.ndarray  # float32

    def where(self, chosen_E: np.ndarray) -> Pairs:
        """Return some of the pairs."""
        return Pairs(self.a_E[chosen_E], self.b_E[chosen_E], self.cosine_E[chosen_E])


def read_catalog(index: ShotIndex) -> Catalog:
    """Read the places of all shots of an index."""
    table = index.places()
    encoded = table["title_id"].combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), np.int32)
    rank[order] = np.arange(len(names), dtype=np.int32)
    title_N = rank[encoded.indices.to_numpy()]
    columns = (table[name].to_numpy() for name in ("shot_index", "start_s", "end_s"))
    return Catalog([names[k] for k in order], title_N, *columns)


def measure_unrelated(index: ShotIndex, catalog: Catalog) -> float:
    """Return the cosine that pairs of shots of different titles, drawn at random, hardly reach."""
    rows_M = np.sort(np.random.default_rng(SEED).permutation(len(catalog.title_N))[:SAMPLED])
    unit_MD, present_M = unit_vectors(index.vectors(COLUMN, rows_M))
    unit_MD, title_M = unit_MD[present_M], catalog.title_N[rows_M[present_M]]
    return unrelated_level((unit_MD @ unit_MD.T)[title_M[:, None] != title_M])


# -------------------------------------------------------------------------------------------------------------- near pairs


def near_pairs(index: ShotIndex, catalog: Catalog, unrelated: float, console: Console) -> Pairs:
    """Return the pairs of shots of different titles that are nearer than unrelated ones: of each shot the nearest in its parts."""
    part_NP = _parts(index, len(catalog.title_N))
    count = int(part_NP.max(initial=0)) + 1
    found, said = [], time.monotonic()
    for part in range(count):
        found.append(_pairs_of_part(index, catalog, part_NP, part, unrelated))
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            console.say(f"compared: {part + 1} of {count} parts")
    pairs = np.concatenate([pair for pair, _ in found])
    cosine_E = np.concatenate([cosine for _, cosine in found])
    _, where = np.unique(pairs[:, 0] * len(catalog.title_N) + pairs[:, 1], return_index=True)  # Each can be found from both ends.
    return Pairs(pairs[where, 0], pairs[where, 1], cosine_E[where])


def _parts(index: ShotIndex, shots: int) -> np.ndarray:
    """Return the parts that each shot is compared in, (N, PROBES) int32, the nearest first."""
    count = -(-shots // SHOTS_A_PART)
    if count == 1:
        return np.zeros((shots, 1), np.int32)
    random = np.random.default_rng(SEED)
    sample_MD = unit_vectors(index.vectors(COLUMN, np.sort(random.permutation(shots)[: SAMPLE_A_PART * count])))[0]
    centres_PD = sample_MD[random.permutation(len(sample_MD))[:count]]
    for _ in range(ROUNDS):
        nearest_M = np.argmax(sample_MD @ centres_PD.T, axis=1)
        sums_PD = np.zeros_like(centres_PD)
        np.add.at(sums_PD, nearest_M, sample_MD)
        centres_PD = np.where(np.bincount(nearest_M, minlength=count)[:, None] > 0, unit_vectors(sums_PD)[0], centres_PD)
    part_NP = np.empty((shots, PROBES), np.int32)
    for begin in range(0, shots, BLOCK):
        rows_M = np.arange(begin, min(begin + BLOCK, shots))
        cosine_MP = unit_vectors(index.vectors(COLUMN, rows_M))[0] @ centres_PD.T
        for probe in range(PROBES):
            part_NP[rows_M, probe] = nearest_M = np.argmax(cosine_MP, axis=1)
            cosine_MP[np.arange(len(rows_M)), nearest_M] = -2
    return part_NP


def _pairs_of_part(index: ShotIndex, catalog: Catalog, part_NP: np.ndarray, part: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the near pairs of the shots of a part, and of those that are only compared in it with them."""
    inside_M = part_NP[:, 0] == part
    rows_M = np.concatenate([np.flatnonzero(inside_M), np.flatnonzero((part_NP[:, 1:] == part).any(axis=1))])
    members = int(inside_M.sum())
    order = np.argsort(rows_M)
    unit_MD = np.empty((len(rows_M), index.facts.dims[COLUMN]), np.float32)
    unit_MD[order] = unit_vectors(index.vectors(COLUMN, rows_M[order]))[0]
    title_M = catalog.title_N[rows_M]
    pairs, cosines = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)]
    for begin in range(0, len(rows_M), BLOCK // 4):
        block = slice(begin, begin + BLOCK // 4)
        cosine_BM = unit_MD[block] @ unit_MD[:members].T
        cosine_BM[title_M[block, None] == title_M[None, :members]] = -1
        if members > NEIGHBOURS:
            crowded_B = (cosine_BM >= least).sum(axis=1) > NEIGHBOURS
            bound_B = np.partition(cosine_BM[crowded_B], -NEIGHBOURS, axis=1)[:, -NEIGHBOURS]
            cosine_BM[crowded_B] = np.where(cosine_BM[crowded_B] >= bound_B[:, None], cosine_BM[crowded_B], -1)
        query_E, other_E = np.nonzero(cosine_BM >= least)
        ends_E2 = np.stack([rows_M[begin + query_E], rows_M[other_E]], axis=1)
        swapped_E = catalog.title_N[ends_E2[:, 0]] > catalog.title_N[ends_E2[:, 1]]
        ends_E2[swapped_E] = ends_E2[swapped_E, ::-1]
        pairs.append(ends_E2)
        cosines.append(cosine_BM[query_E, other_E])
    return np.concatenate(pairs), np.concatenate(cosines)


# ------------------------------------------------------------------------------------------------------------------- runs


def measure_levels(catalog: Catalog, pairs: Pairs, unrelated: float) -> Levels:
    """Return the levels of the catalog from what the shots have in other titles."""
    best_N = np.full(len(catalog.title_N), unrelated)
    for rows_E in (pairs.a_E, pairs.b_E):
        np.maximum.at(best_N, rows_E, pairs.cosine_E)
    return levels_of(unrelated, best_N)


def offsets_of_titles(catalog: Catalog, pairs: Pairs, alone_E: np.ndarray, levels: Levels) -> Iterator[tuple[int, int, list[float]]]:
    """Yield the pairs of titles, as numbers, with the offsets at which shots agree: several of them, or one of ``alone_E``.

    A pair of shots votes for the difference of their starts and for that of their ends: a run may begin or end within a shot. The vote of a
    shot that is near many shots of the other title is divided among them.
    """
    titles_E = catalog.title_N[pairs.a_E].astype(np.int64) * len(catalog.titles) + catalog.title_N[pairs.b_E]
    weight_E = (pairs.cosine_E - levels.alike) / (1 - levels.alike)
    for rows_E, others_E in ((pairs.a_E, pairs.b_E), (pairs.b_E, pairs.a_E)):
        keys_E = rows_E * len(catalog.titles) + catalog.title_N[others_E]
        _, which_E, count = np.unique(keys_E, return_inverse=True, return_counts=True)
        weight_E = weight_E / np.sqrt(count[which_E])
    starts_E = catalog.start_N[pairs.b_E] - catalog.start_N[pairs.a_E]
    ends_E = catalog.end_N[pairs.b_E] - catalog.end_N[pairs.a_E]
    # Every vote is in two windows, of which each begins in the middle of another: votes that agree are together in one of them.
    offset_V = np.concatenate([starts_E, ends_E] * 2)
    window_V = np.floor(offset_V / TOLERANCE_S).astype(np.int64) - np.repeat([0, 1], len(offset_V) // 2)
    columns = (np.tile(of_pair, 4) for of_pair in (pairs.a_E, pairs.b_E, alone_E, titles_E, weight_E))
    a_V, b_V, alone_V, titles_V, weight_V = columns
    order = np.lexsort((offset_V, window_V, titles_V))
    if not len(order):
        return
    a_V, b_V, alone_V, titles_V, weight_V, offset_V, window_V = (
        column[order] for column in (a_V, b_V, alone_V, titles_V, weight_V, offset_V, window_V)
    )
    begins = np.flatnonzero(np.concatenate([[True], (np.diff(titles_V) > 0) | (np.diff(window_V) > 0)]))
    several = np.add.reduceat(weight_V, begins) >= MIN_EVIDENCE
    for rows_V in (a_V, b_V):
        several &= np.minimum.reduceat(rows_V, begins) < np.maximum.reduceat(rows_V, begins)
    chosen = np.flatnonzero(several | np.logical_or.reduceat(alone_V, begins))
    weights, middles = np.add.reduceat(weight_V, begins)[chosen], (begins + np.append(begins[1:], len(order)))[chosen] // 2
    titles = titles_V[middles]
    order = np.lexsort((-weights, titles))
    found = zip(titles[order].tolist(), offset_V[middles[order]].tolist(), strict=True)
    for pair, of_pair in itertools.groupby(found, key=lambda one: one[0]):
        first, second = divmod(pair, len(catalog.titles))
        yield first, second, [offset for _, offset in itertools.islice(of_pair, MAX_OFFSETS)]


def crowds(catalog: Catalog, pairs: Pairs, levels: Levels) -> np.ndarray:
    """Count the other titles that have nearly the same shot, (N,) int64: black frames, logos, the shots of a studio have many.

    Only those count that are about as near as the nearest.
    """
    rows_E = np.concatenate([pairs.a_E, pairs.b_E])
    titles_E = catalog.title_N[np.concatenate([pairs.b_E, pairs.a_E])]
    cosine_E = np.tile(pairs.cosine_E, 2)
    bound_N = np.full(len(catalog.title_N), levels.single)
    np.maximum.at(bound_N, rows_E, cosine_E - CROWD)
    same_E = cosine_E >= bound_N[rows_E]
    distinct = np.unique(rows_E[same_E] * len(catalog.titles) + titles_E[same_E])
    return np.bincount(distinct // len(catalog.titles), minlength=len(catalog.title_N))


def find_repeats(index: ShotIndex, catalog: Catalog, min_seconds: float, console: Console) -> tuple[Levels, Iterator[tuple[str, str, Run]]]:
    """Return the levels, and the runs that titles share, in the order of titles and time."""
    unrelated = measure_unrelated(index, catalog)
    pairs = near_pairs(index, catalog, unrelated, console)
    levels = measure_levels(catalog, pairs, unrelated)
    pairs = pairs.where(pairs.cosine_E >= levels.alike)
    crowd_N = crowds(catalog, pairs, levels)
    rare_E = np.maximum(crowd_N[pairs.a_E], crowd_N[pairs.b_E]) <= MAX_CROWD
    console.say(f"{levels.describe()}; {len(pairs.a_E)} pairs of shots are nearer than those that look alike")

    @functools.lru_cache(TITLES_IN_MEMORY)
    def read(title: int) -> TitleShots:
        rows_S = catalog.rows_of(title)
        unit_SD = unit_vectors(index.vectors(COLUMN, rows_S))[0]
        return TitleShots(catalog.start_N[rows_S], catalog.end_N[rows_S], unit_SD, crowd_N[rows_S])

    def runs() -> Iterator[tuple[str, str, Run]]:
        alone_E = rare_E & (pairs.cosine_E >= levels.single)
        for first, second, offsets in offsets_of_titles(catalog, pairs, alone_E, levels):
            for run in find_runs(read(first), read(second), offsets, levels, min_seconds):
                yield catalog.titles[first], catalog.titles[second], run

    return levels, runs()


# ------------------------------------------------------------------------------------------------------------------ job


def open_repeated(dataset: EmbeddingDataset, config: FindRepeatsConfig, console: Console) -> ShotIndex:
    """Open the index of a dataset. Says which titles it lacks. Raises ConfigError, DatasetError with the command to run."""
    uri, command = config.index.uri, f"mediafm index output.uri={config.output.uri} index.uri={config.index.uri or '...'}"
    if not uri:
        raise ConfigError(f"index.uri is required: the location of an index of this dataset; {command} writes one")
    committed = {object_key(info.name) for info in newest_objects(dataset.output.list(SHOTS))}
    if not committed:
        raise DatasetError(f"{dataset.output.store.uri} has no committed shots: run mediafm embed first")
    index = open_index(uri, config.storage)
    if index.facts.dataset_version != dataset.version:
        raise NoIndex(f"{uri} is of dataset version {index.facts.dataset_version}, not {dataset.version}: run {command} index.replace=true")
    if COLUMN not in index.facts.dims:
        raise NoIndex(f"{uri} has no video vectors: run {command} index.replace=true, with video among index.parts")
    there = {(encode_title(title_id), source) for title_id, source in index.titles()}
    if missing := len(committed ^ there):
        console.say(f"warning: {missing} titles are new, changed or gone since the index was built: run {command} for them")
    return index


def repeats_table(index: ShotIndex, levels: Levels, found: Iterable[tuple[str, str, Run]]) -> pa.Table:
    """Make the table of the repeats, with the version of their dataset and the levels as facts."""
    schema = repeats_schema()
    rows = []
    for title_a, title_b, run in found:
        kind = "exact" if run.exact else "near"
        rows.append({"title_a": title_a, "title_b": title_b, "kind": kind, **{name: getattr(run, name) for name in RUN_COLUMNS}})
    facts = {"dataset_version": index.facts.dataset_version, **dataclasses.asdict(levels)}
    return pa.Table.from_pylist(rows, schema.with_metadata({METADATA_KEY: json.dumps(facts, sort_keys=True).encode()}))


def read_repeats(uri: str, dataset: EmbeddingDataset, config: StorageConfig) -> pa.Table:
    """Read a table of repeats. Raises DatasetError where there is none of this dataset version."""
    again = f"run mediafm repeats repeats.uri={uri}, with the output.uri and index.uri of dataset version {dataset.version}"
    try:
        table = pq.read_table(pa.BufferReader(read_object(uri, config)))
        version = read_facts(table.schema).get("dataset_version", "none")
    except (FileNotFoundError, pa.ArrowException, ValueError) as error:
        raise DatasetError(f"repeats.uri={uri} is no table of repeats ({type(error).__name__}): {again}") from error
    if not table.schema.equals(repeats_schema()) or version != dataset.version:
        raise DatasetError(f"repeats.uri={uri} is no table of repeats of this dataset, its dataset version is {version}: {again}")
    return table


def repeats_of(table: pa.Table, title_id: str, count: int) -> list[dict[str, Any]]:
    """Return the longest repeats of a title in the order of its time, with the columns of the other title as ``other_...``."""
    found = []
    for own, other in (("a", "b"), ("b", "a")):
        names = {f"title_{other}": "other"}
        for name in ("first_shot_{}", "start_{}_s", "end_{}_s"):
            plain = name.replace("_{}", "")
            names |= {name.format(own): plain, name.format(other): f"other_{plain}"}
        rows = table.filter(pc.equal(table[f"title_{own}"], title_id))
        found += rows.select([*names, "shots", "kind", "mean_cosine"]).rename_columns(names).to_pylist()
    longest = sorted(found, key=lambda row: row["start_s"] - row["end_s"])[:count]
    return sorted(longest, key=lambda row: (row["start_s"], row["other"]))


def describe_repeats(table: pa.Table) -> str:
    """Describe the table in a few lines: its size and the longest repeats."""
    rows = table.to_pylist()
    titles = {row[name] for row in rows for name in ("title_a", "title_b")}
    exact = sum(row["kind"] == "exact" for row in rows)
    lines = [f"{len(rows)} repeats in {len(titles)} titles, {exact} of them exact"]
    for row in sorted(rows, key=lambda row: row["start_a_s"] - row["end_a_s"])[:MAX_SHOWN]:
        a, b = (f"{row[f'title_{k}']} {row[f'start_{k}_s']:.2f}-{row[f'end_{k}_s']:.2f} s" for k in "ab")
        lines.append(public_line(f"  {a} = {b}: {row['shots']} shots, {row['kind']}, cosine {row['mean_cosine']:.3f}"))
    return "\n".join([*lines, *([f"  ... and {len(rows) - MAX_SHOWN} shorter ones"] if len(rows) > MAX_SHOWN else [])])
