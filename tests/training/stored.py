"""A generated dataset of shots in storage, as embed_catalog writes it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mediafm_ray.storage.dataset import Model, Output
from mediafm_ray.storage.names import SHOTS
from mediafm_ray.storage.schemas import embedding_array, encode_parquet, shots_schema
from tests.training.titles import FUSED_DIM, METADATA_DIM, make_title

VERSION = "0123456789ab"
DIMS = {"video": 12, "audio": FUSED_DIM - METADATA_DIM - 12, "text": METADATA_DIM}


def write_dataset(folder: Path, shots: Sequence[int], version: str = VERSION, metadata: bool = True, nan_in: Sequence[int] = ()) -> Path:
    """Titles ``title-<index>`` with so many shots each; returns the output that they stand in."""
    output = Output(str(folder), version)
    ends = np.cumsum(list(DIMS.values()))
    spans = {name: (int(end) - DIMS[name], int(end)) for name, end in zip(DIMS, ends, strict=True)}
    output.write_model(Model(version, {}, {**DIMS, "fused": FUSED_DIM}, spans))
    for index, count in enumerate(shots):
        title = make_title(index, count, metadata=metadata)
        fused_SD = title.fused_SD.copy()
        if index in nan_in:
            fused_SD[count // 2, 3] = np.nan
        starts = np.cumsum(title.times_S2[:, 1].astype(np.float64))
        columns = {
            "title_id": [title.title_id] * count,
            "shot_index": range(count),
            "start_s": starts,
            "end_s": starts + title.times_S2[:, 0],
            "fused_embedding": embedding_array(fused_SD),
            "fused_norm": np.ones(count, np.float32),
        }
        encoded = None if title.metadata_M is None else base64.b64encode(title.metadata_M.astype("<f4").tobytes()).decode()
        facts = {
            "title_id": title.title_id,
            "source": "00aa",
            "video": "",
            "dataset_version": version,
            "dims": {},
            "spans": {},
            "media": {"duration_s": float(title.times_S2[:, 0].sum())},
        }
        output.write(SHOTS, title.title_id, "00aa", encode_parquet(_table(columns, count), {**facts, "metadata_embedding": encoded}))
    return folder


def _table(columns: dict, count: int) -> pa.Table:
    """The other columns of the schema filled with their type's nothing."""
    schema = shots_schema(FUSED_DIM)
    values = {pa.string(): "", pa.bool_(): True, pa.binary(): b""}

    def filled(field: pa.Field) -> pa.Array:
        nothing = [] if pa.types.is_list(field.type) else values.get(field.type, 0)
        value = columns.get(field.name, [nothing] * count)
        return value if isinstance(value, pa.Array) else pa.array(value, field.type)

    return pa.Table.from_arrays([filled(field) for field in schema], schema=schema)
