"""Step 6 alone, over shots that are committed: what is pending, and the stage that reads, contextualises and writes. No ray here.

A title's vectors never leave the process that reads them: while one group of titles is computed, threads read the next and write the
one before. Memory holds three groups, whatever the size of the dataset.

Shapes
    S  shots of the title
    D  dimension of a fused embedding
    M  dimension of a metadata embedding
"""

from __future__ import annotations

import logging
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.config.jobs import ContextualiseCatalogConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.models.options import BUILTIN_NEIGHBOURS, ContextualiserConfig
from mediafm_ray.pipeline.rows import ERROR, MEASURES, SECONDS, error_value
from mediafm_ray.pipeline.stages import FACTS, contextual_file, remove_superseded
from mediafm_ray.runs.plan import WITH_SHOTS, Plan, checkpoint_name
from mediafm_ray.spec import TitleError
from mediafm_ray.storage.dataset import (
    FAILURES,
    SHOTS,
    DatasetError,
    EmbeddingDataset,
    Model,
    Output,
    contextual,
    dataset_versions,
    encode_title,
    newest_objects,
    object_key,
    record_failure,
    sibling,
)
from mediafm_ray.storage.schemas import embedding_type, embedding_values, read_facts, shots_schema, vector_fact
from mediafm_ray.storage.store import StorageConfig

log = logging.getLogger(__name__)
MB = 10**6
READING_THREADS = 8  # of an actor: a GET from object storage waits most of its time
WRITING_THREADS = 4
COLUMNS = ("shot_index", "start_s", "end_s", "fused_embedding")  # of shots, that the contextualiser needs

STORED_SCHEMA = pa.schema(
    [
        ("title_id", pa.string()),  # as the object's name gives it: a long one ends in a digest
        ("source", pa.string()),
        ("shots", pa.string()),  # name of the committed object
        ("bytes", pa.int64()),  # of that object
        ("superseded", pa.list_(pa.string())),  # objects to remove once this title is committed
        ("error", ERROR),  # what failed before the stage began: see deaths
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        ("title_id", pa.string()),
        ("source", pa.string()),
        ("seconds", SECONDS),
        ("measures", MEASURES),
        ("shot_count", pa.int64()),
        ("duration_s", pa.float64()),
        ("warnings", pa.list_(pa.string())),
        ("bytes_written", pa.int64()),
        ("error", ERROR),
    ]
)


# ------------------------------------------------------------------------------------------------------------- plan


def make_stored_plan(config: ContextualiseCatalogConfig) -> Plan:
    """List the committed shots and what the checkpoint has written already; pending is the difference. Writes nothing.

    Raises ConfigError, WeightsError, StorageError, and DatasetError where nothing is committed.
    """
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    if not config.contextualiser.checkpoint:
        raise ConfigError(f"contextualiser.checkpoint is required: {BUILTIN_NEIGHBOURS}, or the folder that a training wrote")
    checkpoint = checkpoint_name(config, dataset.model)
    committed = newest_objects(dataset.output.list(SHOTS))
    if not committed:
        raise DatasetError(f"{dataset.output.store.uri} has no committed shots: run python -m jobs.embed_catalog first")
    written = dataset.output.list(contextual(checkpoint))
    failures = dataset.output.list(FAILURES)
    written_of_title: dict[str, list[Any]] = {}
    for (title, _), infos in written.items():
        written_of_title.setdefault(title, []).extend(infos)
    rows, leftovers = [], []
    done = failed_before = 0
    for shots in committed:
        title, source = key = object_key(shots.name)
        # only what is older: a job that embeds a newer source writes its contextual object before its shots
        older = [info for info in written_of_title.get(title, ()) if object_key(info.name) != key and info.modified <= shots.modified]
        if key in written:
            done += 1
            leftovers += older
        elif key in failures and not config.run.retry_failed:
            failed_before += 1
        else:
            failed = [sibling(shots.name, FAILURES)] if key in failures else []
            row = {"title_id": urllib.parse.unquote(title), "source": source, "shots": shots.name, "bytes": shots.size}
            rows.append({**row, "superseded": [*(info.name for info in older), *failed]})
    taken = rows[: config.run.max_titles] if config.run.max_titles else rows
    return Plan(
        model=dataset.model,
        checkpoint=checkpoint,
        pending=pa.Table.from_pylist(taken, schema=STORED_SCHEMA),
        titles=len(committed),
        done=done,
        failed_before=failed_before,
        left=len(rows) - len(taken),
        only_contextual=len(taken),
        leftovers=tuple(leftovers),
        titles_are=WITH_SHOTS,
    )


def open_dataset(uri: str, version: str, storage: StorageConfig) -> EmbeddingDataset:
    """The dataset version of an output; ``version`` may be empty where there is one only. Raises ConfigError, DatasetError."""
    if not uri:
        raise ConfigError("output.uri is required: the output of jobs.embed_catalog")
    versions = [] if version else dataset_versions(uri, storage)
    if len(versions) > 1:
        raise ConfigError(f"{uri} has {len(versions)} dataset versions: set dataset.version to one of {', '.join(versions)}")
    return EmbeddingDataset(uri, version or None, storage)


def prepare_stored_output(plan: Plan, config: ContextualiseCatalogConfig) -> None:
    """See that the output can be written, and finish removals that an earlier run did not get to. Raises StorageError."""
    output = Output(config.output.uri, plan.model.dataset_version, config.storage)
    output.store.check_writable()
    for leftover in plan.leftovers:
        output.store.delete_unless_newer(leftover.name, leftover.modified)


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class StoredShots:
    """What a committed object of ``shots`` holds for the contextualiser."""

    fused_SD: np.ndarray  # float32
    start_S: np.ndarray  # float64, seconds
    end_S: np.ndarray  # float64, seconds
    metadata_M: np.ndarray | None  # float32; None where the title has neither synopsis nor tags
    facts: Mapping[str, Any]


def read_shots(output: Output, name: str, model: Model) -> StoredShots:
    """Read a committed object of ``shots``. Raises TitleError where it is gone, damaged or not what its name says."""
    try:
        content = output.store.read(name)
    except FileNotFoundError as error:
        raise TitleError(f"{name} is gone: another job replaced it meanwhile; run this one again") from error
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        missing = [column for column in COLUMNS if column not in file.schema_arrow.names]
        table = file.read(columns=[column for column in COLUMNS if column not in missing], use_threads=False)
        facts = read_facts(table.schema)
    except (pa.ArrowException, OSError, ValueError) as error:  # what Arrow raises depends on which byte is wrong
        raise _damaged(name, f"it is no readable Parquet file ({type(error).__name__}: {error})") from error
    if missing or not {*FACTS, "media"} <= facts.keys():
        raise _damaged(name, f"it has no {', '.join(missing) or 'facts of its title'}")
    if table.num_rows == 0:
        raise _damaged(name, "it has no shots")
    vectors, written = table.schema.field("fused_embedding").type, shots_schema(model.dims["fused"])
    wrong = any(table.schema.field(column).type != written.field(column).type for column in COLUMNS if column != "fused_embedding")
    if wrong or not _is_embedding(vectors) or any(column.null_count for column in table.columns):
        raise _damaged(name, "its columns are not of the types that were written")
    media = facts["media"]
    try:
        key = encode_title(facts["title_id"]), facts["source"]
        metadata_M = vector_fact(facts, "metadata_embedding")
        float(media["duration_s"])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise _damaged(name, f"its facts are not those that were written ({type(error).__name__}: {error})") from error
    if key != object_key(name) or facts["dataset_version"] != model.dataset_version:
        raise _damaged(
            name, f"it holds the title {facts['title_id']!r} ({facts['source']}) of the dataset version {facts['dataset_version']}"
        )
    if vectors != embedding_type(model.dims["fused"]):
        raise _damaged(name, f"its vectors are {vectors}, not of {model.dims['fused']} dimensions")
    start_S, end_S = table["start_s"].to_numpy(), table["end_s"].to_numpy()
    if not np.array_equal(table["shot_index"].to_numpy(), np.arange(len(table))):
        raise _damaged(name, "its shots are not in order")
    if not (np.isfinite(start_S).all() and np.isfinite(end_S).all() and (end_S > start_S).all() and (np.diff(start_S) > 0).all()):
        raise _damaged(name, "the times of its shots do not rise")
    return StoredShots(embedding_values(table["fused_embedding"]), start_S, end_S, metadata_M, facts)


def _is_embedding(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()


def _damaged(name: str, what: str) -> TitleError:
    return TitleError(f"{name}: {what}; delete the object and run jobs.embed_catalog (jobs.verify_dataset finds all that are damaged)")


# ------------------------------------------------------------------------------------------------------------ stage


@dataclass
class _Title:
    """A title at hand."""

    row: Mapping[str, Any]  # STORED_SCHEMA
    shots: StoredShots | None = None
    contextual_SD: np.ndarray | None = None
    cls_D: np.ndarray | None = None
    warnings: list[str] = field(default_factory=list)
    bytes_written: int = 0
    seconds: list[dict[str, Any]] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)
    error: dict[str, str] | None = None

    def attempt(self, stage: str, work: Callable[[], None]) -> None:
        """One step, unless an earlier one failed; whatever it raises is this title's error."""
        if self.error is not None:
            return
        start = time.perf_counter()
        try:
            work()
        except Exception as failure:  # any: a title's failure is a value, the job goes on
            if not isinstance(failure, TitleError):
                log.exception("title %s: %s failed", self.row["title_id"], stage)
            self.error = error_value(stage, failure)
        self.seconds.append({"stage": stage, "seconds": time.perf_counter() - start})

    def result(self) -> pa.Table:
        """How it ended, as a table of one row."""
        ended: dict[str, Any] = {
            "title_id": self.row["title_id"],
            "source": self.row["source"],
            "seconds": self.seconds,
            "measures": [{"name": name, "value": value} for name, value in self.measures.items()],
            "error": self.error,
        }
        if self.error is None:
            assert self.shots is not None
            ended |= {"title_id": self.shots.facts["title_id"], "shot_count": len(self.shots.start_S), "warnings": self.warnings}
            ended |= {"duration_s": self.shots.facts["media"]["duration_s"], "bytes_written": self.bytes_written}
        return pa.Table.from_pylist([ended], schema=RESULT_SCHEMA)


class ContextualiseStored:
    """Committed shots in, committed contextual embeddings out: ``stage(table) -> one table a title`` that says how it ended."""

    name = "contextualise_stored"

    def __init__(self, config: ContextualiserConfig, output_uri: str, model: Model, checkpoint: str, storage: StorageConfig):
        from mediafm_ray.models.contextualiser import TitleContextualiser

        self.contextualiser = TitleContextualiser(config)
        self.output = Output(output_uri, model.dataset_version, storage)
        self.model, self.checkpoint = model, checkpoint
        self.group_bytes = config.read_mb * MB
        self.measured: dict[str, float] = {}

    def measure(self, name: str, value: float) -> None:
        """Count something of the title that is given next, alone."""
        self.measured[name] = value

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """``table``: rows of STORED_SCHEMA."""
        groups = list(_groups(table.to_pylist(), self.group_bytes))
        with ThreadPoolExecutor(READING_THREADS) as readers, ThreadPoolExecutor(WRITING_THREADS) as writers:
            reading = [readers.submit(self._read, row) for row in groups[0]] if groups else []
            writing: list[Future[pa.Table]] = []
            for index in range(len(groups)):
                titles = [future.result() for future in reading]
                reading = [readers.submit(self._read, row) for row in groups[index + 1]] if index + 1 < len(groups) else []
                self._contextualise(titles)
                for written in writing:
                    yield written.result()
                writing = [writers.submit(self._write, title) for title in titles]
            for written in writing:
                yield written.result()

    def _read(self, row: Mapping[str, Any]) -> _Title:
        title = _Title(row, measures=self.measured, error=row["error"])
        self.measured = {}

        def read() -> None:
            title.shots = read_shots(self.output, row["shots"], self.model)

        title.attempt("read_shots", read)
        return title

    def _contextualise(self, titles: Sequence[_Title]) -> None:
        """Compute the titles of a group at once or, where that fails, each alone: then it shows whose fault it is."""
        well = [title for title in titles if title.error is None]
        start = time.perf_counter()
        try:
            self._compute(well)
        except Exception as failure:
            log.warning("contextualising %d titles at once failed (%s); trying each alone", len(well), failure)
            for title in well:
                title.attempt("contextualise", lambda title=title: self._compute([title]))  # type: ignore[misc]
            return
        for title in well:
            title.seconds.append({"stage": "contextualise", "seconds": (time.perf_counter() - start) / len(well)})

    def _compute(self, titles: Sequence[_Title]) -> None:
        computed = self.contextualiser.contextualise_together([told(title.shots) for title in titles if title.shots is not None])
        for title, (contextual_SD, cls_D) in zip(titles, computed, strict=True):
            title.contextual_SD, title.cls_D = contextual_SD, cls_D

    def _write(self, title: _Title) -> pa.Table:
        def write() -> None:
            shots = title.shots
            assert shots is not None
            assert title.contextual_SD is not None
            assert title.cls_D is not None
            content = contextual_file(shots.facts, self.checkpoint, (shots.start_S, shots.end_S), title.contextual_SD, title.cls_D)
            own = sibling(title.row["shots"], contextual(self.checkpoint))
            self.output.store.write(own, content)
            title.bytes_written = len(content)
            title.warnings = remove_superseded(self.output, own, title.row["superseded"])

        title.attempt("write", write)
        if title.error is not None:
            self._record_failure(title)
        return title.result()

    def _record_failure(self, title: _Title) -> None:
        assert title.error is not None
        facts = title.shots.facts if title.shots is not None else {}
        record = {
            "title_id": facts.get("title_id", title.row["title_id"]),
            "source": title.row["source"],
            "video": facts.get("video", ""),
            "shots": title.row["shots"],
            "checkpoint": self.checkpoint,
        }
        try:
            record_failure(self.output, sibling(title.row["shots"], FAILURES), record, title.error)
        except Exception as failure:  # the store is gone too: the driver still hears of both
            unrecorded = error_value("write", failure)["message"]
            title.error["message"] += f" (and its failure record could not be written: {unrecorded})"


def told(shots: StoredShots) -> Any:
    """The shots as the model takes them (contextualiser.TitleShots)."""
    from mediafm_ray.models.contextualiser import TitleShots, shot_times

    return TitleShots(shots.fused_SD, shots.metadata_M, shot_times(shots.start_S, shots.end_S))


def _groups(rows: Sequence[Mapping[str, Any]], limit: int) -> Iterator[list[Mapping[str, Any]]]:
    """Rows in order, in groups of at most ``limit`` bytes of objects; a larger title is a group alone."""
    group: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        if group and size + row["bytes"] > limit:
            yield group
            group, size = [], 0
        group.append(row)
        size += row["bytes"]
    if group:
        yield group
