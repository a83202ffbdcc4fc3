"""Committed titles with given vectors, written by the job's last stage, as input for benchmarks and tests.

Shapes
    S  shots of the title
    D  dimension of a fused embedding
    M  dimension of a metadata embedding
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mediafm_ray.models.fusion import spans
from mediafm_ray.models.options import FusionConfig
from mediafm_ray.pipeline.rows import FLAGS, NORMS, SHOTS, plan_table, to_json, vectors_cell
from mediafm_ray.pipeline.write_title import WriteTitle
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage.dataset import Model, Output
from mediafm_ray.storage.names import SHOTS as SHOTS_DATASET
from mediafm_ray.storage.names import object_name
from mediafm_ray.storage.store import StorageConfig

FRAME_RATE = 25  # a second
SOURCE = "0123456789abcdef"


def make_model(version: str, video: int, audio: int, text: int) -> Model:
    """Return a dataset version of encoders of these dimensions."""
    dims = {"video": video, "audio": audio, "text": text}
    return Model(version, {"fusion": FusionConfig().modality_norm}, {**dims, "fused": video + audio + text}, spans(dims))


def commit_title(
    output_uri: str,
    model: Model,
    title_id: str,
    fused_SD: np.ndarray,
    seconds_S: np.ndarray | None = None,
    metadata_M: np.ndarray | None = None,
    source: str = SOURCE,
) -> str:
    """Write a title's object into ``shots``, and model.json if it is missing; return the object's name. See ``fused_row``."""
    ended = WriteTitle(output_uri, model, "", StorageConfig())(fused_row(title_id, fused_SD, seconds_S, metadata_M, source))
    if error := ended["error"][0].as_py():
        raise RuntimeError(f"title {title_id} could not be written: {error}")
    output = Output(output_uri, model.dataset_version)
    if output.store.info("model.json") is None:
        output.write_model(model)
    return object_name(SHOTS_DATASET, title_id, source)


def fused_row(
    title_id: str,
    fused_SD: np.ndarray,
    seconds_S: np.ndarray | None = None,
    metadata_M: np.ndarray | None = None,
    source: str = SOURCE,
) -> pa.Table:
    """Return a title's row as the fusing stage returns it.

    ``fused_SD`` float32; ``seconds_S``: durations of the shots, 2 s each by default; ``metadata_M`` float32 for [GLOBAL].
    """
    count = len(fused_SD)
    end_S = np.cumsum(np.full(count, 2.0) if seconds_S is None else seconds_S)
    start_S = np.concatenate([[0.0], end_S[:-1]])
    shots = [
        {
            "start_s": float(start_s),
            "end_s": float(end_s),
            "start_frame": round(start_s * FRAME_RATE),
            "end_frame": round(end_s * FRAME_RATE),
            "boundary_kind": "cut" if index else "start",
            "boundary_probability": 1.0,
            "transition_start_frame": 0,
            "transition_end_frame": 0,
            "dropped_boundaries": 0,
            "text": "",
            "language": "",
            "thumbnail": b"",
        }
        for index, (start_s, end_s) in enumerate(zip(start_S, end_S, strict=True))
    ]
    row = {"title_id": title_id, "source": source, "video": f"{title_id}.mp4", "timed_text": [], "synopsis": "", "tags": []}
    media = {"duration_s": float(end_S[-1]), "frame_count": shots[-1]["end_frame"], "warnings": [], "facts": {}}
    columns = {
        "shots": pa.array([shots], SHOTS),
        "media": pa.array([to_json(media)]),
        "metadata_embedding": pa.array([None if metadata_M is None else metadata_M.tolist()], pa.list_(pa.float32())),
        "fused_embeddings": vectors_cell(fused_SD),
        "fused_norms": pa.array([[1.0] * count], NORMS),
        **{f"has_{modality}": pa.array([[True] * count], FLAGS) for modality in MODALITIES},
    }
    table = plan_table([{**row, "superseded": []}])
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table
