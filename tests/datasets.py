"""Small datasets as the jobs write them, without a video or an encoder: the real writer over made shots."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mediafm_ray.errors import TitleError
from mediafm_ray.models.options import FusionConfig
from mediafm_ray.pipeline import rows
from mediafm_ray.pipeline.rows import FLAGS, SHOTS, plan_table, vectors_cell, vectors_type
from mediafm_ray.pipeline.stages import Fuse
from mediafm_ray.pipeline.write_title import WriteTitle
from mediafm_ray.spec import MODALITIES, digest_of
from mediafm_ray.storage.dataset import Model, Output
from mediafm_ray.storage.store import StorageConfig, Store

RATE = 25  # frames a second
DIMS = {"video": 5, "audio": 3, "text": 4}
SPANS = {"video": (0, 5), "audio": (5, 8), "text": (8, 12)}
RECIPE = {"arithmetic": 1, "made": "by hand"}
MODEL = Model(digest_of(RECIPE)[:12], RECIPE, {**DIMS, "fused": 12}, SPANS)
CHECKPOINT = "0123456789ab"
SOURCE = "00112233aabbccdd"


def finished_row(row: pa.Table, model: Model, shot_frames: list[int], checkpoint: str = "") -> pa.Table:
    """A row of the plan as it comes out of the encoders, with vectors that the title's id decides; the second shot has no text."""
    random = np.random.default_rng(sum(row["title_id"][0].as_py().encode()))
    ends = np.cumsum(shot_frames).tolist()
    count = len(ends)
    shots = [
        {
            "start_frame": start,
            "end_frame": end,
            "start_s": start / RATE,
            "end_s": end / RATE,
            "boundary_kind": "cut" if start else "start",
            "boundary_probability": 1.0,
            "transition_start_frame": max(start - 1, 0),
            "transition_end_frame": start,
            "dropped_boundaries": 0,
            "text": "" if number == 1 else "hello",
            "language": "",
            "thumbnail": b"\xff\xd8",
            "audio_levels": [-20] * 10,
        }
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]
    media = {"duration_s": ends[-1] / RATE, "frame_count": ends[-1], "warnings": [], "facts": {}}
    row = row.append_column("shots", pa.array([shots], SHOTS)).append_column("media", pa.array([json.dumps(media)]))
    for modality in MODALITIES:
        present_S = [modality != "text" or bool(shot["text"]) for shot in shots]
        vectors_SD = random.normal(size=(count, model.dims[modality])).astype(np.float32) * np.array(present_S)[:, None]
        row = row.append_column(f"{modality}_embeddings", vectors_cell(vectors_SD).cast(vectors_type(model.dims[modality])))
        row = row.append_column(f"has_{modality}", pa.array([present_S], FLAGS))
    metadata = random.normal(size=model.dims["text"]).astype(np.float32)
    row = row.append_column("metadata_embedding", pa.array([metadata.tolist()], pa.list_(pa.float32())))
    if checkpoint:
        vectors_SD = random.normal(size=(count, model.dims["fused"])).astype(np.float32)
        row = row.append_column("contextual_embeddings", vectors_cell(vectors_SD))
        row = row.append_column("cls_embedding", pa.array([vectors_SD[0].tolist()], pa.list_(pa.float32())))
    return row


def kill_after_one_removal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the process be interrupted before it removes a second object; the name of the first, once it is removed."""
    real: Any = Store.delete
    removed: list[str] = []

    def killed(store: Store, name: str) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(name)
        real(store, name)

    monkeypatch.setattr(Store, "delete", killed)
    return removed


def write_dataset(
    uri: str, titles: dict[str, list[int]], failed: Sequence[str] = (), model: Model = MODEL, checkpoint: str = CHECKPOINT
) -> Output:
    """An output with the given titles (frames of their shots), shots and contextual embeddings, and failure records of others."""
    output = Output(uri, model.dataset_version)
    output.write_model(model)
    steps = [Fuse(model.dims["fused"], FusionConfig()), WriteTitle(uri, model, checkpoint, StorageConfig())]
    for title_id in [*titles, *failed]:
        planned = {"title_id": title_id, "source": SOURCE, "video": f"/videos/{title_id}.mp4", "timed_text": [], "synopsis": "", "tags": []}
        row = finished_row(plan_table([{**planned, "superseded": []}]), model, titles.get(title_id, [10]), checkpoint)
        row = rows.failed(row, "detect_shots", TitleError("it is bad")) if title_id in failed else row
        for step in steps:
            row = step(row)
        assert (row["error"][0].as_py() is None) == (title_id not in failed), row["error"]
    return output
