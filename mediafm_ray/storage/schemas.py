"""The columns of the datasets, and the Parquet file of one title. pyarrow and numpy only.

The files are plain Parquet: zstd, byte-stream-split for floats, which have no dictionary. The facts of the title and of the
model are JSON in the file's key-value metadata under ``mediafm_ray``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.spec import parse_json

METADATA_KEY = b"mediafm_ray"
COMPRESSION = "zstd"
COMPRESSION_LEVEL = 3
ROW_GROUP_ROWS = 1024  # shots
INCOMPARABLE = ("thumbnail", "facts")  # columns without a dictionary and statistics; only merged files have facts


def shots_schema(fused_dim: int) -> pa.Schema:
    """Columns of the dataset ``shots``: one row for each shot. ``fused_dim``: dimension of a fused embedding."""
    return pa.schema(
        [
            pa.field("title_id", pa.string(), nullable=False),
            pa.field("shot_index", pa.int32(), nullable=False),
            pa.field("start_s", pa.float64(), nullable=False),
            pa.field("end_s", pa.float64(), nullable=False),
            pa.field("start_frame", pa.int64(), nullable=False),
            pa.field("end_frame", pa.int64(), nullable=False),
            pa.field("boundary_kind", pa.string(), nullable=False),
            pa.field("boundary_probability", pa.float32(), nullable=False),
            pa.field("transition_start_frame", pa.int64(), nullable=False),
            pa.field("transition_end_frame", pa.int64(), nullable=False),
            pa.field("dropped_boundaries", pa.int32(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("language", pa.string(), nullable=False),
            pa.field("has_video", pa.bool_(), nullable=False),
            pa.field("has_audio", pa.bool_(), nullable=False),
            pa.field("has_text", pa.bool_(), nullable=False),
            pa.field("thumbnail", pa.binary(), nullable=False),
            pa.field("audio_levels", pa.list_(pa.field("element", pa.int8(), nullable=False))),  # null in older files
            pa.field("fused_embedding", embedding_type(fused_dim), nullable=False),
            pa.field("fused_norm", pa.float32(), nullable=False),
        ]
    )


def contextual_schema(contextual_dim: int) -> pa.Schema:
    """Columns of a dataset ``contextual-<checkpoint>``: one row for each shot."""
    return pa.schema(
        [
            pa.field("title_id", pa.string(), nullable=False),
            pa.field("shot_index", pa.int32(), nullable=False),
            pa.field("start_s", pa.float64(), nullable=False),
            pa.field("end_s", pa.float64(), nullable=False),
            pa.field("contextual_embedding", embedding_type(contextual_dim), nullable=False),
        ]
    )


def scenes_schema() -> pa.Schema:
    """Columns of a dataset ``scenes-...``: one row for each scene. The scenes of a title tile its shots, in order."""
    return pa.schema(
        [
            pa.field("title_id", pa.string(), nullable=False),
            pa.field("scene_index", pa.int32(), nullable=False),
            pa.field("first_shot", pa.int32(), nullable=False),  # shot_index
            pa.field("last_shot", pa.int32(), nullable=False),  # shot_index, inclusive
            pa.field("start_s", pa.float64(), nullable=False),
            pa.field("end_s", pa.float64(), nullable=False),
            pa.field("score", pa.float32(), nullable=False),  # score of the boundary at its start: see downstream/scenes.py
        ]
    )


def titles_schema(dim: int) -> pa.Schema:
    """Columns of a dataset ``titles-...``: one row for each title. ``dim``: dimension of a shot's embedding."""
    return pa.schema(
        [
            pa.field("title_id", pa.string(), nullable=False),
            pa.field("duration_s", pa.float64(), nullable=False),
            pa.field("shots", pa.int32(), nullable=False),
            pa.field("scenes", pa.int32(), nullable=False),
            pa.field("shots_per_minute", pa.float64(), nullable=False),
            pa.field("audio_share", pa.float64(), nullable=False),  # share of the duration in shots that have audio
            pa.field("text_share", pa.float64(), nullable=False),  # share of the duration in shots that have timed text
            pa.field("speech_share", pa.float64(), nullable=False),  # ... whose text has spoken words
            pa.field("pooled_embedding", embedding_type(dim), nullable=False),  # unit norm, shots weighted by duration
            pa.field("cls_embedding", embedding_type(dim), nullable=True),  # the contextualiser's; null for fused vectors
        ]
    )


def repeats_schema() -> pa.Schema:
    """Columns of the table of repeats: one row for each run of shots that two titles share, ``title_a`` before ``title_b``."""
    columns = [("title_a", pa.string()), ("title_b", pa.string())]
    columns += [(name, pa.float64()) for name in ("start_a_s", "end_a_s", "start_b_s", "end_b_s")]
    columns += [(name, pa.int32()) for name in ("first_shot_a", "last_shot_a", "first_shot_b", "last_shot_b")]  # inclusive
    columns += [("offset_s", pa.float64())]  # start_b_s - start_a_s
    columns += [("shots", pa.int32())]  # of the title that has fewer there
    columns += [("mean_cosine", pa.float32()), ("min_cosine", pa.float32())]
    columns += [("kind", pa.string())]  # exact: equal vectors; near
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in columns])


def embedding_type(dim: int) -> pa.DataType:
    """Type of a column of vectors, whose elements are not null."""
    return pa.list_(pa.field("element", pa.float32(), nullable=False), dim)


def embedding_array(vectors_SD: np.ndarray) -> pa.FixedSizeListArray:
    """Convert (S, D) float32 vectors to an Arrow array of S fixed-size lists."""
    values = pa.array(np.ascontiguousarray(vectors_SD, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, type=embedding_type(vectors_SD.shape[1]))


def embedding_values(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Convert a column of fixed-size lists to (S, D) float32 vectors: a view of Arrow's memory where the column is one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def encode_parquet(table: pa.Table, facts: Mapping[str, Any]) -> bytes:
    """Encode the Parquet file of one title: the same bytes for the same rows and facts."""
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()})
    sink = pa.BufferOutputStream()  # Unlike one of Python's, it takes the many small writes without the interpreter's lock.
    pq.write_table(table, sink, row_group_size=ROW_GROUP_ROWS, **parquet_options(table.schema))
    return sink.getvalue().to_pybytes()


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Return pyarrow's options for a Parquet file of these columns."""
    paths = {field.name: f"{field.name}.list.element" if _is_list(field.type) else field.name for field in schema}
    floats = [paths[field.name] for field in schema if _is_float(field.type)]
    others = [path for name, path in paths.items() if path not in floats and name not in INCOMPARABLE]
    return {
        "compression": COMPRESSION,
        "compression_level": COMPRESSION_LEVEL,
        "use_dictionary": others,
        "use_byte_stream_split": floats,
        "write_page_checksum": True,  # zstd stores incompressible data as it is, where a flipped bit would go unnoticed.
        "write_statistics": others,
    }


def read_facts(schema: pa.Schema) -> dict[str, Any]:
    """Read the facts of the title and the model from a file's metadata; empty where there are none.

    Raises ValueError for anything else there.
    """
    facts = parse_json((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    if not isinstance(facts, dict):
        raise ValueError("its facts are not a JSON object")
    return facts


def vector_fact(facts: Mapping[str, Any], name: str) -> np.ndarray | None:
    """Decode a vector of the facts (float32, little-endian, base64); None where it is absent. Raises ValueError for anything else."""
    encoded = facts.get(name)
    if encoded is None:
        return None
    if not isinstance(encoded, str):
        raise ValueError(f"its {name} is not a vector")
    return np.frombuffer(base64.b64decode(encoded, validate=True), "<f4")


def _is_float(type_: pa.DataType) -> bool:
    return pa.types.is_floating(type_.value_type if _is_list(type_) else type_)


def _is_list(type_: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(type_) or pa.types.is_list(type_)
