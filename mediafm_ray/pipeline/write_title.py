"""The last stage, which writes the objects of a finished title, or the record of a failure. No ray here."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa

from mediafm_ray.pipeline.rows import FAILED, SHOTS, Stage, TitleRow, error_value
from mediafm_ray.storage.dataset import Model, Output, record_failure
from mediafm_ray.storage.names import FAILURES, contextual, matching_object, object_name
from mediafm_ray.storage.names import SHOTS as SHOTS_DATASET
from mediafm_ray.storage.schemas import contextual_schema, embedding_array, encode_parquet, shots_schema
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.storage.stored_shots import FACTS
from mediafm_ray.text import public_line, public_uri

THREADS = 8  # titles of a group that are written at once

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Encoded:
    """A title before it is written."""

    files: Mapping[str, bytes]  # by dataset, in the order in which they are written
    shot_count: int
    duration_s: float
    warnings: list[str]


class WriteTitle(Stage):
    """Step 7: write one object in each dataset for a finished title, a failure record for a failed one; only their results remain.

    The shots are written last, and superseded objects are removed afterwards, so that a title that has a committed object is never
    without one.
    """

    name = "write"
    supports_batching = True  # Writing mostly waits: for the disk, or for the three requests that a title takes on object storage.
    takes = ("title_id", "source", "video", "superseded", "shots", "media", "has_video", "has_audio", "has_text", "fused_embeddings")
    adds: ClassVar[Mapping[str, pa.DataType]] = {
        "shot_count": pa.int64(),
        "duration_s": pa.float64(),
        "warnings": pa.list_(pa.string()),
        "bytes_written": pa.int64(),
    }

    def __init__(self, output_uri: str, model: Model, checkpoint: str, storage: StorageConfig):
        self.output = Output(output_uri, model.dataset_version, storage)
        self.model, self.checkpoint = model, checkpoint

    def process(self, row: TitleRow) -> Mapping[str, Any]:
        return self._commit(row, self._encode(row))

    def process_together(self, rows: Sequence[TitleRow]) -> Sequence[Mapping[str, Any] | Exception]:
        """Encode one title after the other, and write several at once meanwhile: threads that compute would only hinder one another."""

        def attempt(step: Callable[..., Result], *arguments: Any) -> Result | Exception:
            try:
                return step(*arguments)
            except Exception as error:  # The others are written.
                return error

        def commit(row: TitleRow, encoded: _Encoded | Exception) -> Mapping[str, Any] | Exception:
            return encoded if isinstance(encoded, Exception) else attempt(self._commit, row, encoded)

        with ThreadPoolExecutor(THREADS) as pool:  # Its map takes from the iterator here, not in the threads.
            return list(pool.map(commit, rows, (attempt(self._encode, row) for row in rows)))

    def _encode(self, row: TitleRow) -> _Encoded:
        media, shots = json.loads(row["media"]), row.values("shots")
        files = {contextual(self.checkpoint): self._contextual_file(row, shots)} if self.checkpoint else {}
        files[SHOTS_DATASET] = self._shots_file(row, shots, media)
        return _Encoded(files, len(shots), media["duration_s"], media["warnings"])

    def _commit(self, row: TitleRow, encoded: _Encoded) -> Mapping[str, Any]:
        for dataset, content in encoded.files.items():
            own = self.output.write(dataset, row.title_id, row["source"], content)
        return {
            "shot_count": encoded.shot_count,
            "duration_s": encoded.duration_s,
            "warnings": encoded.warnings + remove_superseded(self.output, own, [*row["superseded"], matching_object(own, FAILURES)]),
            "bytes_written": sum(map(len, encoded.files.values())),
        }

    def __call__(self, table: pa.Table) -> pa.Table:
        """Commit every finished title and record every failed one; return rows that say how each ended."""
        table = super().__call__(table)
        if table.num_columns == 0:
            return table
        outcomes, errors = table["outcome"].to_pylist(), table["error"].to_pylist()
        for index, (outcome, error) in enumerate(zip(outcomes, errors, strict=True)):
            if outcome == FAILED:
                try:
                    self._record_failure(TitleRow(table, index), error)
                except Exception as failure:  # The store fails as well: the driver reports both.
                    unrecorded = error_value(self.name, failure)["message"]
                    errors[index] = {**error, "message": f"{error['message']} (and its failure record could not be written: {unrecorded})"}
        kept = ["title_id", "source", "seconds", "measures", *self.adds, "outcome"]
        return table.select(kept).append_column("error", pa.array(errors, table.schema.field("error").type))

    def _record_failure(self, row: TitleRow, error: Mapping[str, str]) -> None:
        title = {"title_id": row.title_id, "source": row["source"], "video": public_uri(row["video"])}
        record_failure(self.output, object_name(FAILURES, row.title_id, row["source"]), title, error)
        for older in row["superseded"]:
            if older.startswith(f"{FAILURES}/"):
                self.output.store.delete(older)

    def _shots_file(self, row: TitleRow, shots: pa.StructArray, media: Mapping[str, Any]) -> bytes:
        metadata = row["metadata_embedding"]
        facts = {
            **self._facts(row),
            "media": media,
            "metadata_embedding": None if metadata is None else _base64(metadata),
        }
        columns: dict[str, Any] = {name: shots.field(name) for name in SHOTS.value_type.names}
        columns |= {
            "title_id": [row.title_id] * len(shots),
            "shot_index": range(len(shots)),
            "has_video": row.values("has_video"),
            "has_audio": row.values("has_audio"),
            "has_text": row.values("has_text"),
            "fused_embedding": embedding_array(row.vectors("fused_embeddings")),
            "fused_norm": row.values("fused_norms"),
        }
        return encode_parquet(_table(columns, shots_schema(self.model.dims["fused"])), facts)

    def _contextual_file(self, row: TitleRow, shots: pa.StructArray) -> bytes:
        cls_D = np.asarray(row["cls_embedding"], np.float32)
        return contextual_file(
            self._facts(row), self.checkpoint, (shots.field("start_s"), shots.field("end_s")), row.vectors("contextual_embeddings"), cls_D
        )

    def _facts(self, row: TitleRow) -> dict[str, Any]:
        return {
            "title_id": row.title_id,
            "source": row["source"],
            "video": public_uri(row["video"]),
            "dataset_version": self.model.dataset_version,
            "dims": dict(self.model.dims),
            "spans": {name: list(span) for name, span in self.model.spans.items()},
        }


def contextual_file(
    facts: Mapping[str, Any], checkpoint: str, times: tuple[Iterable[float], Iterable[float]], contextual_SD: np.ndarray, cls_D: np.ndarray
) -> bytes:
    """Return the object of a title in the dataset of a checkpoint.

    ``facts``: the facts of title and model in its object in ``shots``; ``times``: the starts and the ends of its shots in seconds.
    """
    vectors = embedding_array(contextual_SD)
    columns = {
        "title_id": [facts["title_id"]] * len(vectors),
        "shot_index": range(len(vectors)),
        "start_s": times[0],
        "end_s": times[1],
        "contextual_embedding": vectors,
    }
    facts = {**{name: facts[name] for name in FACTS}, "checkpoint": checkpoint, "cls_embedding": _base64(cls_D)}
    return encode_parquet(_table(columns, contextual_schema(vectors.type.list_size)), facts)


def remove_superseded(output: Output, own: str, names: Sequence[str]) -> list[str]:
    """Remove the objects that a committed title supersedes; return a warning for each that cannot be removed.

    ``own``: the title's object. Where it is gone, or another one is newer, another job has meanwhile taken the title from that source.
    """
    warnings = []
    for name in names:
        try:
            if name == matching_object(own, FAILURES):
                output.store.delete(name)
            elif (committed := output.store.info(own)) is not None:
                output.remove(name, committed.modified)
        except Exception as error:  # Implementations of fsspec raise many types.
            warnings.append(f"{name} is superseded and could not be removed ({public_line(str(error))}); the next run will try again")
    return warnings


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Return the columns in the order and with the types of a schema."""
    return pa.Table.from_arrays([_column(columns[field.name], field.type) for field in schema], schema=schema)


def _column(values: Any, type_: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values if values.type == type_ else values.cast(type_)
    return pa.array(values, type_)


def _base64(vector: Sequence[float] | np.ndarray) -> str:
    """Return a vector as base64 of its float32 little-endian bytes: exact, and small in the metadata of a file."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
