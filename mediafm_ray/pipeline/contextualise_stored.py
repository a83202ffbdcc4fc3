"""Step 6 alone, over committed shots: a stage that reads, contextualises and writes. No ray here.

The vectors of a title never leave the process that reads them: while one group of titles is computed, threads read the next and write
the previous one. Memory holds three groups, whatever the size of the dataset.

Shapes
    S  shots of the title
    D  dimension of a fused embedding
    M  dimension of a metadata embedding
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mediafm_ray.derive.reader import to_model_input
from mediafm_ray.errors import TitleError
from mediafm_ray.models.options import ContextualiserConfig
from mediafm_ray.pipeline.rows import ERROR, FAILED, MEASURES, OK, SECONDS, error_value
from mediafm_ray.pipeline.write_title import contextual_file, remove_superseded
from mediafm_ray.storage.dataset import Model, Output, record_failure
from mediafm_ray.storage.names import FAILURES, contextual, matching_object
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.storage.stored_shots import StoredShots, read_shots

log = logging.getLogger(__name__)
MB = 10**6
READING_THREADS = 8  # Threads of an actor: a GET from object storage waits most of its time.
WRITING_THREADS = 4

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
        ("outcome", pa.string()),
        ("error", ERROR),
    ]
)


@dataclass
class _Title:
    """A title that is being processed."""

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
        """Do one step, unless an earlier one failed; whatever it raises is this title's error."""
        if self.error is not None:
            return
        start = time.perf_counter()
        try:
            work()
        except Exception as failure:  # Any failure of a title is a value, and the job goes on.
            if not isinstance(failure, TitleError):
                log.exception("title %s: %s failed", self.row["title_id"], stage)
            self.error = error_value(stage, failure)
        self.seconds.append({"stage": stage, "seconds": time.perf_counter() - start})

    def result(self) -> pa.Table:
        """Return how the title ended, as a table of one row."""
        ended: dict[str, Any] = {
            "title_id": self.row["title_id"],
            "source": self.row["source"],
            "seconds": self.seconds,
            "measures": [{"name": name, "value": value} for name, value in self.measures.items()],
            "outcome": OK if self.error is None else FAILED,
            "error": self.error,
        }
        if self.error is None:
            assert self.shots is not None
            ended |= {"title_id": self.shots.facts["title_id"], "shot_count": len(self.shots.start_S), "warnings": self.warnings}
            ended |= {"duration_s": self.shots.facts["media"]["duration_s"], "bytes_written": self.bytes_written}
        return pa.Table.from_pylist([ended], schema=RESULT_SCHEMA)


class ContextualiseStored:
    """Stage that contextualises committed shots and commits the result; it yields a table for each title that says how it ended."""

    name = "contextualise_stored"

    def __init__(self, config: ContextualiserConfig, output_uri: str, model: Model, checkpoint: str, storage: StorageConfig):
        from mediafm_ray.models.contextualiser import TitleContextualiser

        self.contextualiser = TitleContextualiser(config)
        self.output = Output(output_uri, model.dataset_version, storage)
        self.model, self.checkpoint = model, checkpoint
        self.group_bytes = config.read_mb * MB
        self.measured: dict[str, float] = {}

    def measure(self, name: str, value: float) -> None:
        """Set a measure of the next title, which is given alone."""
        self.measured[name] = value

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Process the titles of a table of STORED_SCHEMA."""
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
        """Compute the titles of a group at once or, where that fails, each alone, which shows which one is at fault."""
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
        computed = self.contextualiser.contextualise_together([to_model_input(title.shots) for title in titles if title.shots is not None])
        for title, (contextual_SD, cls_D) in zip(titles, computed, strict=True):
            title.contextual_SD, title.cls_D = contextual_SD, cls_D

    def _write(self, title: _Title) -> pa.Table:
        def write() -> None:
            shots = title.shots
            assert shots is not None
            assert title.contextual_SD is not None
            assert title.cls_D is not None
            content = contextual_file(shots.facts, self.checkpoint, (shots.start_S, shots.end_S), title.contextual_SD, title.cls_D)
            own = matching_object(title.row["shots"], contextual(self.checkpoint))
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
            record_failure(self.output, matching_object(title.row["shots"], FAILURES), record, title.error)
        except Exception as failure:  # The store fails as well: the driver reports both.
            unrecorded = error_value("write", failure)["message"]
            title.error["message"] += f" (and its failure record could not be written: {unrecorded})"


def _groups(rows: Sequence[Mapping[str, Any]], limit: int) -> Iterator[list[Mapping[str, Any]]]:
    """Yield the rows in order, in groups of at most ``limit`` bytes of objects; a larger title is a group of its own."""
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
