"""Read committed objects of ``shots`` and check them.

Shapes
    S  shots of the title
    D  dimension of a fused embedding
    M  dimension of a metadata embedding
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.errors import TitleError
from mediafm_ray.storage.dataset import Model, Output
from mediafm_ray.storage.names import encode_title, object_key
from mediafm_ray.storage.schemas import embedding_type, embedding_values, read_facts, shots_schema, vector_fact

FACTS = ("title_id", "source", "video", "dataset_version", "dims", "spans")  # keys that all objects of a title have
COLUMNS = ("shot_index", "start_s", "end_s", "fused_embedding")  # the columns that the contextualiser needs


@dataclass(frozen=True, eq=False)
class StoredShots:
    """The part of a committed object of ``shots`` that the contextualiser needs."""

    fused_SD: np.ndarray  # float32
    start_S: np.ndarray  # float64, seconds
    end_S: np.ndarray  # float64, seconds
    metadata_M: np.ndarray | None  # float32; None where the title has neither synopsis nor tags
    facts: Mapping[str, Any]


def read_shots(output: Output, name: str, model: Model) -> StoredShots:
    """Read a committed object of ``shots``. Raises TitleError where it is gone, damaged or does not match its name."""
    try:
        content = output.read(name)
    except FileNotFoundError as error:
        raise TitleError(f"{name} is gone: another job has replaced it; run this one again") from error
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        missing = [column for column in COLUMNS if column not in file.schema_arrow.names]
        table = file.read(columns=[column for column in COLUMNS if column not in missing], use_threads=False)
        facts = read_facts(table.schema)
    except (pa.ArrowException, OSError, ValueError) as error:  # Arrow's error depends on the damaged byte.
        raise _damaged(name, f"it is not a readable Parquet file ({type(error).__name__}: {error})") from error
    if missing or not {*FACTS, "media"} <= facts.keys():
        raise _damaged(name, f"it has no {', '.join(missing) or 'facts of its title'}")
    if table.num_rows == 0:
        raise _damaged(name, "it has no shots")
    vectors, written = table.schema.field("fused_embedding").type, shots_schema(model.dims["fused"])
    wrong = any(table.schema.field(column).type != written.field(column).type for column in COLUMNS if column != "fused_embedding")
    if wrong or not _is_embedding(vectors) or any(column.null_count for column in table.columns):
        raise _damaged(name, "its columns have other types than the written ones")
    media = facts["media"]
    try:
        key = encode_title(facts["title_id"]), facts["source"]
        metadata_M = vector_fact(facts, "metadata_embedding")
        float(media["duration_s"])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise _damaged(name, f"its facts are damaged ({type(error).__name__}: {error})") from error
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
    return TitleError(f"{name}: {what}; delete the object and run mediafm embed (mediafm verify finds all damaged objects)")
