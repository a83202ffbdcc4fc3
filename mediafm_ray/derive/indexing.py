"""Build an index of shots: compare it with the committed titles, add and remove titles, and tune the search. No ray here.

Shapes
    S  shots of a title
    Q  queries
    K  results of a query
    D  dimension of a vector
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.config.jobs import BuildIndexConfig
from mediafm_ray.config.sections import IndexConfig
from mediafm_ray.derive.reader import read_vectors
from mediafm_ray.derive.runner import TitleCounts, each_title, log_failures
from mediafm_ray.downstream.retrieval import NOTHING, ExactSearch, recall
from mediafm_ray.downstream.similarity import unit_vectors
from mediafm_ray.errors import TitleError
from mediafm_ray.runs.command import EXIT_FAILED_TITLES, EXIT_OK
from mediafm_ray.runs.report import Console
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset, newest_objects
from mediafm_ray.storage.index import (
    EMBEDDING,
    ROW_COLUMNS,
    SPARE_RESULTS,
    IndexFacts,
    NoIndex,
    SearchParams,
    ShotIndex,
    half_vectors,
    modality_of,
    part_column,
)
from mediafm_ray.storage.index_writer import IndexWriter
from mediafm_ray.storage.names import SHOTS, decode_title, encode_title, object_key
from mediafm_ray.text import counted

MB = 10**6
SHOT_COLUMNS = tuple(name for name in ROW_COLUMNS if name != "title_id")  # columns of ``shots``
RESULTS = 10  # Recall is measured for so many results.
ITSELF = 1 - 1e-5  # A result with at least this cosine is the query's own shot.
TITLE_ID = "title_id"
SEED = 0  # seed of the drawn queries
EFFORTS = (4, 8, 16, 32, 64, 128)  # partitions to search, and candidates with exact cosines for each result, that are tried
GROWTH = 2  # A vector index is trained again when there are so many times the shots that it was trained on.


# --------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class IndexPlan:
    """The titles that a build adds to an index and removes from it."""

    facts: IndexFacts
    begins: bool  # Start with an empty index: there is none yet, or one of other vectors is replaced.
    add: tuple[str, ...]  # names of the objects of ``shots`` whose titles are not in the index
    remove: tuple[tuple[str, str], ...]  # titles and sources in the index that are no longer committed
    superseded: tuple[tuple[str, str], ...]  # ... with a newer source in ``add``: they are removed once that is added
    titles: int  # number of committed titles

    def describe(self) -> str:
        """Describe the plan in one line."""
        there = self.titles - len(self.add)
        changed = f", {len(self.superseded)} of them changed" if self.superseded else ""
        todo = f"{len(self.add)} to add{changed}, {len(self.remove)} to remove"
        return f"{self.facts.describe()}: {counted(self.titles, 'title')}, {there} in the index, {todo}"


def facts_of(dataset: EmbeddingDataset, vectors: str, parts: Sequence[str]) -> IndexFacts:
    """Return the facts of an index of these vectors. ``vectors``: SHOTS or a contextual dataset."""
    dims = {EMBEDDING: dataset.model.dims["fused"]}
    dims |= {part_column(part): dataset.model.dims[part] for part in MODALITIES if part in parts and dataset.model.dims[part]}
    return IndexFacts(dataset.version, vectors, dims, dict(dataset.model.recipe))


def open_target(dataset: EmbeddingDataset, vectors: str, writer: IndexWriter, config: IndexConfig) -> tuple[IndexFacts, ShotIndex | None]:
    """Return the wanted facts and the latest version of their index; None where a new one is needed. Raises NoIndex for another index."""
    facts = facts_of(dataset, vectors, config.parts)
    index = writer.index
    if index is None or dataclasses.replace(index.facts, recipe={}) == dataclasses.replace(facts, recipe={}):
        return facts, index
    if config.replace:
        return facts, None
    raise NoIndex(
        f"{writer.uri} is another index: it holds {index.facts.describe()}, not {facts.describe()}: "
        "choose another index.uri, or set index.replace=true to replace it"
    )


def make_index_plan(dataset: EmbeddingDataset, vectors: str, writer: IndexWriter, config: IndexConfig) -> IndexPlan:
    """Compare the committed titles with those in the latest version of the index. Writes nothing.

    Raises DatasetError where nothing is committed, NoIndex for an index of something else.
    """
    facts, index = open_target(dataset, vectors, writer, config)
    shots = newest_objects(dataset.output.list(SHOTS))
    if not shots:
        raise DatasetError(f"{dataset.output.store.uri} has no committed shots: run mediafm embed first")
    committed = {object_key(info.name): info.name for info in shots}
    there = {(encode_title(title_id), source): (title_id, source) for title_id, source in (index.titles() if index else ())}
    pending = {title for title, source in committed if (title, source) not in there}
    gone = [key for key in there if key not in committed]
    return IndexPlan(
        facts,
        index is None,
        tuple(name for key, name in committed.items() if key not in there),
        tuple(there[key] for key in gone if key[0] not in pending),
        tuple(there[key] for key in gone if key[0] in pending),
        len(committed),
    )


# ---------------------------------------------------------------------------------------------------------------- add


def add_titles(dataset: EmbeddingDataset, plan: IndexPlan, writer: IndexWriter, config: BuildIndexConfig, console: Console) -> TitleCounts:
    """Read the titles with threads and add them to the index. Any error of a title is a failure of that title."""
    added = TitleCounts(len(plan.add))
    pending = {decode_title(object_key(name)[0]): name for name in plan.add}
    titles = each_title(lambda name: title_rows(dataset, plan.facts, name), pending, config.run.threads, added, console)
    added.rows = writer.add(rows for _, rows in titles)
    return added


def title_rows(dataset: EmbeddingDataset, facts: IndexFacts, name: str) -> pa.Table:
    """Return the index rows of the title of an object of ``shots``. Raises TitleError for missing, damaged or infinite vectors."""
    fused = read_vectors(dataset, name, SHOTS)
    vectors = fused if facts.vectors == SHOTS else read_vectors(dataset, name, facts.vectors)
    if len(vectors.vectors_SD) != len(fused.vectors_SD):
        raise TitleError(
            f"{facts.vectors} has {len(vectors.vectors_SD)} shots of it, not {len(fused.vectors_SD)}: run mediafm contextualise again"
        )
    content = pa.BufferReader(dataset.output.read(name))
    shots = pq.read_table(content, columns=list(SHOT_COLUMNS), use_threads=False, page_checksum_verification=True)
    count = len(shots)
    columns = {"title_id": pa.array([fused.title_id] * count), "source": pa.array([fused.source] * count)}
    columns |= {column: shots[column].combine_chunks() for column in SHOT_COLUMNS}
    for column in facts.dims:
        span = None if column == EMBEDDING else slice(*dataset.model.spans[modality_of(column)])
        part_SD = vectors.vectors_SD if span is None else fused.vectors_SD[:, span]
        if not np.isfinite(part_SD).all():
            raise TitleError(f"its vectors ({column}) are not finite: delete {name} and run mediafm embed")
        columns[column] = half_vectors(*unit_vectors(part_SD))
    schema = facts.schema().remove_metadata()
    return pa.table([columns[column.name].cast(column.type) for column in schema], schema=schema)


def remove_titles(plan: IndexPlan, added: TitleCounts, writer: IndexWriter) -> int:
    """Remove titles that are gone, and older sources of titles whose newer one was added; return how many."""
    failed = {title for title, _ in added.failures}
    leaving = [*plan.remove, *(key for key in plan.superseded if decode_title(encode_title(key[0])) not in failed)]
    writer.remove(leaving)
    return len(leaving)


# ---------------------------------------------------------------------------------------------------- vector indexes


def index_vectors(writer: IndexWriter, config: IndexConfig, console: Console, changed: bool) -> None:
    """Give every column of many vectors an index with enough recall, and record its search parameters. Log the measurements.

    ``changed``: whether rows were added or removed since the last version.
    """
    index = writer.latest()
    shots = {column: index.shots(column) for column in index.facts.dims}
    large = [column for column in shots if shots[column] >= config.least_shots]
    settings = {column: setting for column, setting in index.settings.items() if column in large}
    if changed and writer.indexed():
        writer.index_new_rows()
    for column in [column for column in writer.indexed() if column in shots and column not in large]:
        writer.drop(column)
    due = [column for column in large if column not in settings or shots[column] > GROWTH * settings[column].trained_shots]
    for column in due:
        settings[column] = _train(writer, column, shots[column], console)
    if large and TITLE_ID not in writer.indexed():
        writer.index_titles()
    merged = writer.merge_files()
    for column in large if changed or merged else due:
        settings[column] = _tune(writer, column, settings[column], config, console)
        if settings[column].recall < config.recall and settings[column].trained_shots < shots[column]:
            settings[column] = _tune(writer, column, _train(writer, column, shots[column], console), config, console)
    if settings != index.settings:
        writer.record(settings)
    for column in shots:
        if column not in large and (changed or column in index.settings):
            console.say(f"{column}: {shots[column]} vectors, searched exactly")


def _train(writer: IndexWriter, column: str, shots: int, console: Console) -> SearchParams:
    begun = time.monotonic()
    setting = writer.train(column)
    console.say(f"{column}: vector index trained on {shots} vectors, {setting.partitions} partitions, in {time.monotonic() - begun:.0f} s")
    return setting


def _tune(writer: IndexWriter, column: str, setting: SearchParams, config: IndexConfig, console: Console) -> SearchParams:
    """Find the least effort that reaches the wanted recall@10 for shots drawn at random, or that of the greatest effort where none does.

    First the partitions to search, with many candidates, because a shot in another partition cannot be found; then the candidates.
    """
    index = writer.latest()
    queries_QD = index.sample(column, config.queries, SEED)
    truth = exact_search(index, column, queries_QD, RESULTS + 1)

    def measured(nprobes: int, refine: int) -> tuple[SearchParams, float]:
        tried = dataclasses.replace(setting, nprobes=min(nprobes, setting.partitions), refine=refine, queries=len(queries_QD))
        begun = time.monotonic()
        reached = measured_recall(index, column, queries_QD, truth.cosine_QK, tried)
        return dataclasses.replace(tried, recall=reached), (time.monotonic() - begun) / len(queries_QD)

    for nprobes in EFFORTS:
        found, seconds = measured(nprobes, EFFORTS[-1])
        if found.recall >= config.recall:
            break
    for refine in EFFORTS[:-1]:
        cheaper, cheaper_seconds = measured(found.nprobes, refine)
        if cheaper.recall >= min(found.recall, config.recall):
            found, seconds = cheaper, cheaper_seconds
            break
    shortfall = "" if found.recall >= config.recall else f", below index.recall={config.recall}"
    candidates = (RESULTS + 1 + SPARE_RESULTS) * found.refine
    effort = f"{found.nprobes} of {found.partitions} partitions searched, {candidates} candidates compared exactly"
    console.say(
        f"{column}: recall@{RESULTS} {found.recall:.3f}{shortfall}, against exact search for {len(queries_QD)} shots "
        f"({effort}, {1000 * seconds:.0f} ms a search)"
    )
    return dataclasses.replace(found, recall=round(found.recall, 4))


def exact_search(index: ShotIndex, column: str, queries_QD: np.ndarray, count: int) -> ExactSearch:
    """Find the true nearest shots of each query by a full scan."""
    search = ExactSearch(queries_QD, count)
    for rows_N, vectors_ND in index.blocks(column):
        search.add(rows_N, vectors_ND)
    return search


def measured_recall(index: ShotIndex, column: str, queries_QD: np.ndarray, true_cosine_QK: np.ndarray, setting: SearchParams) -> float:
    """Measure recall@10 of a vector index for queries that are its own shots, which do not count as found.

    ``true_cosine_QK``: cosines of the exact search, each query's own shot first.
    """
    rows_QK = np.full((len(queries_QD), RESULTS), NOTHING, np.int64)
    cosine_QK = np.full((len(queries_QD), RESULTS), -np.inf, np.float32)
    for query, vector_D in enumerate(queries_QD):
        found = index.nearest(column, vector_D, RESULTS + 1, setting=setting)
        cosine_K = found["cosine"].to_numpy()
        others = slice(1, None) if len(cosine_K) and cosine_K[0] > ITSELF else slice(0, RESULTS)
        rows_K = found["_rowid"].to_numpy()[others]
        rows_QK[query, : len(rows_K)], cosine_QK[query, : len(rows_K)] = rows_K, cosine_K[others]
    return recall(rows_QK, cosine_QK, true_cosine_QK[:, 1:])


# ---------------------------------------------------------------------------------------------------------------- end


def finish_build(writer: IndexWriter, added: TitleCounts, removed: int, config: BuildIndexConfig, console: Console) -> int:
    """Publish the index unless it is empty, log the summary and return the exit code."""
    index = writer.latest()
    shots = index.shots()
    if shots and not writer.published():
        writer.publish()
        writer.prune_versions(config.index.keep_hours)
    console.say()
    console.say(f"  {counted(added.ok, 'title')} added with {counted(added.rows, 'shot')}, {removed} removed, {len(added.failures)} failed")
    console.say(
        f"  index    {writer.uri}, version {index.version}: {counted(shots, 'shot')}, {writer.size() / MB:.1f} MB with older versions"
    )
    if not shots:
        console.say("  nothing is published: the index has no shots")
    log_failures(added.failures, console)
    return EXIT_FAILED_TITLES if not shots or len(added.failures) > config.run.max_failed_fraction * added.planned else EXIT_OK
