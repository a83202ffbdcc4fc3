"""A small catalog for the browser: titles with thumbnails, texts, scenes and real videos, hostile ids among them, and its indexes."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from starlette.testclient import TestClient

from mediafm_ray.config.jobs import ExploreCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.explore.app import make_app
from mediafm_ray.explore.catalog import Catalog
from mediafm_ray.storage.dataset import EmbeddingDataset, Output
from mediafm_ray.storage.schemas import encode_parquet, read_facts
from tests.end_to_end.clips import make_clip
from tests.hostile_text import HOSTILE
from tests.searchable import MODEL, SHOT_S, build, commit

RATE = 25
FILM, SEQUEL, GONE, OLD = "film", "film two", "gone", "old mpeg"
ODD_IDS = ["../film", "a%2e%2e/b", "it's: \u2603", "a title:3", *HOSTILE[:4], HOSTILE[9], "x" * 400]
SHOTS = {FILM: 12, SEQUEL: 8, GONE: 5, OLD: 4, **dict.fromkeys(ODD_IDS, 3)}
H264 = {
    "container": "mov,mp4,m4a,3gp,3g2,mj2",
    "video_codec": "h264",
    "audio_codec": "aac",
    "average_rate": "25",
    "width": 160,
    "height": 96,
}
MPEG2 = {**H264, "container": "mpeg", "video_codec": "mpeg2video"}
BASE = "http://127.0.0.1:8642"


def thumbnail(title_id: str, shot: int) -> bytes:
    """A JPEG that differs for every shot."""
    random = np.random.default_rng([shot, *title_id.encode()])
    picture = Image.fromarray(random.integers(0, 256, (6, 10, 3), dtype=np.uint8)).resize((160, 96), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=80)
    return sink.getvalue()


def rewrite(output: Path, title_id: str, facts: dict, columns: dict, source: str = "0" * 16, model=MODEL) -> None:
    """Change facts and columns of a committed title."""
    dataset = EmbeddingDataset(str(output))
    name = dataset.title_object(title_id)
    shots = dataset.read(name)
    for column, values in columns.items():
        shots = shots.set_column(
            shots.column_names.index(column), shots.schema.field(column), pa.array(values, shots.schema.field(column).type)
        )
    Output(str(output), model.dataset_version).store.write(name, encode_parquet(shots, {**read_facts(shots.schema), **facts}))


def media_facts(count: int, facts: dict, warnings=()) -> dict:
    return {"duration_s": count * SHOT_S, "frame_count": int(count * SHOT_S * RATE), "warnings": list(warnings), "facts": facts}


def make_output(root: Path) -> Path:
    """Commit the titles. The video of FILM lies there, that of GONE does not; those of the odd ids are FILM's."""
    video = make_clip(root / "videos" / "film \u00e9 #1.mp4", [int(SHOT_S * RATE)] * SHOTS[FILM])
    for title_id, count in SHOTS.items():
        commit(root / "out", title_id, count)
        path = root / "videos" / "moved.mp4" if title_id == GONE else video
        facts = {**(MPEG2 if title_id == OLD else H264), "bytes": video.stat().st_size}
        warnings = ["the audio ends early", title_id]
        columns = {
            "thumbnail": [thumbnail(title_id, shot) for shot in range(count)],
            "audio_levels": [[-20, -30] * int(SHOT_S * 5)] * count,
        }
        if title_id in ODD_IDS:
            columns["text"] = [title_id] * count
        rewrite(root / "out", title_id, {"video": str(path), "media": media_facts(count, facts, warnings)}, columns)
    return root / "out"


def make_indexes(root: Path) -> None:
    """Index the titles."""
    assert build(root / "out", root / "index") == 0


def config_of(root: Path, *overrides: str) -> ExploreCatalogConfig:
    return read_config(ExploreCatalogConfig, [], [f"output.uri={root}/out", f"index.uri={root}/index", *overrides])


def client_of(config: ExploreCatalogConfig, **guard) -> TestClient:
    """A client of the application, as a browser on this machine has it."""
    return TestClient(make_app(Catalog(config), **guard), base_url=BASE, raise_server_exceptions=False, follow_redirects=False)
