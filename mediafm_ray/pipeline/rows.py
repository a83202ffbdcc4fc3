"""A title as a row of Arrow columns, and the base class of stages. No ray here: a stage is a plain callable.

One title is one row from the catalog to the commit. A stage declares the columns that it takes, adds and
drops; they are checked at run time. The column ``outcome`` is OK; FAILED, with the reason in the column ``error``; or
SKIPPED, where the run takes no more titles. Stages pass rows through that are not OK.

Shapes
    S  shots of the title
    D  dimension of an embedding
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from mediafm_ray.errors import OutageError, TitleError, is_outage
from mediafm_ray.spec import Packed, TimedTextSource, Title
from mediafm_ray.text import public_line, public_lines

log = logging.getLogger(__name__)
MAX_TRACEBACK_PARTS = 6  # The last frames and the error itself.

OK, FAILED, SKIPPED = "ok", "failed", "skipped"  # Values of the column ``outcome``.
ERROR = pa.struct(
    [("stage", pa.string()), ("type", pa.string()), ("message", pa.string()), ("traceback", pa.string()), ("outage", pa.bool_())]
)
SECONDS = pa.list_(pa.struct([("stage", pa.string()), ("seconds", pa.float64())]))
MEASURES = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))
TIMED_TEXT = pa.list_(pa.struct([("uri", pa.string()), ("language", pa.string()), ("kind", pa.string())]))
SHOTS = pa.list_(
    pa.struct(
        [
            ("start_s", pa.float64()),
            ("end_s", pa.float64()),
            ("start_frame", pa.int64()),
            ("end_frame", pa.int64()),
            ("boundary_kind", pa.string()),
            ("boundary_probability", pa.float32()),
            ("transition_start_frame", pa.int64()),
            ("transition_end_frame", pa.int64()),
            ("dropped_boundaries", pa.int32()),
            ("text", pa.string()),
            ("language", pa.string()),
            ("thumbnail", pa.binary()),
            ("audio_levels", pa.list_(pa.int8())),
        ]
    )
)
FRAMES = pa.list_(pa.list_(pa.large_binary()))  # JPEG files of each shot.
AUDIO = pa.list_(pa.large_binary())  # Mono int16 little-endian samples of each shot; their rate is the column ``sample_rate``.
FLAGS = pa.list_(pa.bool_())
NORMS = pa.list_(pa.float32())

PLAN_SCHEMA = pa.schema(
    [
        ("title_id", pa.string()),
        ("source", pa.string()),
        ("video", pa.string()),
        ("timed_text", TIMED_TEXT),
        ("synopsis", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("superseded", pa.list_(pa.string())),  # Objects of older sources, removed once this one is committed.
        ("outcome", pa.string()),
        ("error", ERROR),
        ("seconds", SECONDS),
        ("measures", MEASURES),  # What stages counted: frames, bytes, tokens, ...
        ("expected_bytes", pa.int64()),  # Bytes of the video; 0 where they are unknown.
        ("expected_s", pa.float64()),  # Seconds of video, if the catalog has them.
    ]
)


def vectors_type(dim: int) -> pa.DataType:
    """Return the type of a column that holds the vectors of a title's shots."""
    return pa.list_(pa.list_(pa.float32(), dim))


def vectors_cell(vectors_SD: np.ndarray) -> pa.Array:
    """Return (S, D) float32 vectors as the single value of a column of ``vectors_type(D)``."""
    values = pa.array(np.ascontiguousarray(vectors_SD, dtype=np.float32).reshape(-1))
    return list_cell(pa.FixedSizeListArray.from_arrays(values, vectors_SD.shape[1]))


def list_cell(values: pa.Array) -> pa.Array:
    """Return an array of N values as the single value of a column of lists."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def nested_cell(values: pa.Array, lengths: Sequence[int]) -> pa.Array:
    """Return an array of values, ``lengths`` of them for each shot, as the single value of a column of lists of lists."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return list_cell(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values))


def packed_array(packed: Packed) -> pa.LargeBinaryArray:
    """Return packed byte strings as an Arrow array, without a copy."""
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(packed), [None, pa.py_buffer(packed.offsets), pa.py_buffer(packed.data)])


class InPlace(Sequence[Any]):
    """Sequence of the values of an Arrow array of binaries, or of lists of them, without a copy."""

    def __init__(self, values: pa.Array):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        value = self.values[index]
        return InPlace(value.values) if isinstance(value, pa.ListScalar) else memoryview(value.as_buffer())


class TitleRow:
    """One title's row in a table, read-only."""

    def __init__(self, table: pa.Table, index: int = 0):
        self.table, self.index = table, index

    @property
    def title_id(self) -> str:
        """The title's id."""
        return self["title_id"]

    def __getitem__(self, column: str) -> Any:
        return self.table.column(column)[self.index].as_py()

    def values(self, column: str) -> pa.Array:
        """Return the elements of a column of lists, without a copy."""
        return self.table.column(column)[self.index].values

    def vectors(self, column: str) -> np.ndarray:
        """Return the (S, D) float32 vectors of a column of ``vectors_type(D)``."""
        vectors = self.values(column)
        return vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), vectors.type.list_size)

    def byte_strings(self, column: str) -> Sequence[Any]:
        """Return the byte strings of a column of type AUDIO, without a copy."""
        return InPlace(self.values(column))

    def frames(self, column: str) -> Sequence[Sequence[Any]]:
        """Return the byte strings of each shot, of a column of type FRAMES, without a copy."""
        return InPlace(self.values(column))

    def title(self) -> Title:
        """Return the title as it is in the catalog."""
        texts = tuple(TimedTextSource(text["uri"], text["language"], text["kind"]) for text in self["timed_text"])
        return Title(self.title_id, self["video"], texts, self["synopsis"], tuple(self["tags"]))


class Stage(ABC):
    """Step of the pipeline over the titles of a block: ``stage(table) -> table``.

    Build it in the process where it runs: its constructor loads the models.
    """

    name: ClassVar[str]
    takes: ClassVar[tuple[str, ...]]  # Columns that must be there.
    drops: ClassVar[tuple[str, ...]] = ()  # Columns of ``takes`` that no later stage needs.
    supports_batching: ClassVar[bool] = False  # Whether one ``process_together`` costs less than several ``process``.

    @property
    @abstractmethod
    def adds(self) -> Mapping[str, pa.DataType]:
        """The columns that this stage adds, and their types."""

    @abstractmethod
    def process(self, row: TitleRow) -> Mapping[str, Any] | None:
        """Return the added columns of one title, Python values or Arrow arrays of length one, or None to skip the title.

        Whatever it raises is that title's error.
        """

    def __call__(self, table: pa.Table) -> pa.Table:
        """Process every title of the table whose outcome is OK so far."""
        if table.num_columns == 0:  # Ray may pass an empty block without columns.
            return table
        missing = [column for column in (*self.takes, "outcome", "error", "seconds", "measures") if column not in table.column_names]
        if missing:
            raise TypeError(f"stage {self.name}: the columns {', '.join(missing)} are missing; there are: {', '.join(table.column_names)}")
        adds, outcomes = self.adds, table["outcome"].to_pylist()
        rows = [TitleRow(table, index) for index in range(table.num_rows)]
        well = [row for row, outcome in zip(rows, outcomes, strict=True) if outcome == OK]
        together = self._together(well) if self.supports_batching and len(well) > 1 else {}
        ends = []
        for row, outcome in zip(rows, outcomes, strict=True):
            ends.append(self._one(row, adds, together.get(id(row))) if outcome == OK else _End(measured=self._take_measured()))
        for name, type_ in adds.items():
            cells = [end.cells[name] if end.cells else pa.nulls(1, type_) for end in ends]
            table = table.append_column(name, pa.chunked_array(cells, type_))
        for name, values in (
            ("outcome", [end.outcome or outcome for end, outcome in zip(ends, outcomes, strict=True)]),
            ("error", [end.error or error for end, error in zip(ends, table["error"].to_pylist(), strict=True)]),
            ("seconds", [[*before, *end.seconds] for end, before in zip(ends, table["seconds"].to_pylist(), strict=True)]),
            ("measures", [[*before, *end.measured] for end, before in zip(ends, table["measures"].to_pylist(), strict=True)]),
        ):
            table = _replaced(table, name, pa.array(values, table.schema.field(name).type))
        return table.drop_columns(list(self.drops))

    def measure(self, name: str, value: float) -> None:
        """Add to a measure of the title that is being processed. It stays with the title's row, also when the title fails."""
        measured = self.__dict__.setdefault("_measured", {})
        measured[name] = measured.get(name, 0.0) + value

    def process_together(self, rows: Sequence[TitleRow]) -> Sequence[Mapping[str, Any] | Exception | None]:
        """Return what ``process`` gives for each of several titles, in order; override it where one call for all of them costs less.

        An exception among them is that title's error. One that is raised makes every title be processed alone.
        """
        return [self.process(row) for row in rows]

    def _together(self, rows: Sequence[TitleRow]) -> dict[int, tuple[Mapping[str, Any] | Exception | None, float]]:
        """Return the results of one call by the identity of the rows, with equal shares of its seconds; empty where the call failed."""
        start = time.perf_counter()
        try:
            added = self.process_together(rows)
        except Exception:  # Processing each title alone shows which one is at fault.
            log.exception("stage %s failed on %d titles at once; trying each alone", self.name, len(rows))
            return {}
        share_s = (time.perf_counter() - start) / len(rows)
        return {id(row): (one, share_s) for row, one in zip(rows, added, strict=True)}

    def _one(self, row: TitleRow, adds: Mapping[str, pa.DataType], done: tuple[Mapping[str, Any] | Exception | None, float] | None) -> _End:
        start, seconds, end = time.perf_counter(), 0.0, _End()
        try:
            added, seconds = done or (self.process(row), 0.0)
            if isinstance(added, Exception):
                raise added
            if added is None:
                end.outcome = SKIPPED
            elif set(added) != set(adds):
                raise TypeError(f"stage {self.name} declares {sorted(adds)} and gave {sorted(added)}")
            else:
                end.cells = {name: _cell(value, adds[name]) for name, value in added.items()}
        except Exception as failure:  # Any failure of a title is a value, and the job goes on.
            if not isinstance(failure, (TitleError, OutageError)):
                log.exception("title %s: stage %s failed", row.title_id, self.name)
            end.outcome, end.error = FAILED, error_value(self.name, failure)
        end.measured = self._take_measured()
        end.seconds = [{"stage": self.name, "seconds": seconds + time.perf_counter() - start}]
        return end

    def _take_measured(self) -> list[dict[str, Any]]:
        """Return the measures of the title that was processed, as values of the column ``measures``, and begin with those of the next."""
        return [{"name": name, "value": value} for name, value in self.__dict__.pop("_measured", {}).items()]


@dataclass
class _End:
    """The end of a title at a stage."""

    cells: Mapping[str, pa.Array] = field(default_factory=dict)  # Of the columns that the stage adds; empty where it gave none.
    outcome: str = ""  # Empty where it stays as it was.
    error: Mapping[str, Any] | None = None
    seconds: Sequence[Mapping[str, Any]] = ()
    measured: Sequence[Mapping[str, Any]] = ()


def error_value(stage: str, failure: BaseException) -> dict[str, Any]:
    """Return a failure as the value of the column ``error``; ``outage`` says that the title itself is not at fault."""
    message, frames = str(failure) or repr(failure), ""
    if not isinstance(failure, (TitleError, OutageError)):  # A defect, or trouble outside the title, needs its place.
        message = f"{type(failure).__name__}: {message}"
        frames = "".join(traceback.format_exception(failure)[-MAX_TRACEBACK_PARTS:])
    return {
        "stage": stage,
        "type": type(failure).__name__,
        "message": public_line(message),
        "traceback": public_lines(frames),
        "outage": is_outage(failure),
    }


def failed(title: pa.Table, stage: str, failure: BaseException) -> pa.Table:
    """Return the row of a title (a table of one row) with this failure."""
    title = _replaced(title, "error", pa.array([error_value(stage, failure)], ERROR))
    return _replaced(title, "outcome", pa.array([FAILED]))


def plan_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return rows of the plan as a table of PLAN_SCHEMA, with the columns that stages fill."""
    return pa.Table.from_pylist(
        [{"expected_bytes": 0, **row, "outcome": OK, "error": None, "seconds": [], "measures": []} for row in rows], schema=PLAN_SCHEMA
    )


def to_json(value: Any) -> str:
    """Return a value as JSON text for a string column; equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _cell(value: Any, type_: pa.DataType) -> pa.Array:
    if isinstance(value, pa.Array):
        return value.cast(type_) if value.type != type_ else value
    return pa.array([value], type_)


def _replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)
