"""The recipe's own profile, conf/mediafm.yaml, with an embeddings API on loopback and tiny weights in the place of the Hub's."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.pipeline import loop
from mediafm_ray.runs.plan import make_plan, prepare_output
from mediafm_ray.storage.dataset import EmbeddingDataset, Output, read_failures
from tests.embeddings_server import DIM, KEY, fails, load_minilm, padded_minilm, serving
from tests.end_to_end.clips import ROOT, embed, make_clip, objects

PROFILE = ["--config", str(ROOT / "conf" / "mediafm.yaml")]
WRONG_KEY = "sk-wrong-9876543210fedcba"
MUSIC, LINE = "[music]", "The rabbit wakes up."
CUES = f"1\n00:00:00,100 --> 00:00:01,200\n{MUSIC}\n\n2\n00:00:02,000 --> 00:00:02,500\n{LINE}\n"
SYNOPSIS, TAG = "A rabbit meets three bullies.", "comedy"


@pytest.fixture(scope="module")
def embeddings():
    return padded_minilm(load_minilm())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    subprocess.run([sys.executable, "-m", "mediafm_ray.models.tiny", str(folder)], cwd=ROOT, check=True, capture_output=True)
    return [f"{modality}.weights={folder}/{modality}" for modality in ("video", "audio")]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two titles that share a line of text, one with metadata."""
    folder = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(("first", "second")):
        make_clip(folder / f"{name}.mp4", [40, 35], seed)
        (folder / f"{name}.en.srt").write_text(CUES if name == "first" else CUES.split("\n\n")[0] + "\n", encoding="utf-8")
    (folder / "first.json").write_text(json.dumps({"synopsis": SYNOPSIS, "tags": [TAG]}), encoding="utf-8")
    return folder


@pytest.mark.integration
def test_the_recipe_runs_with_its_profile_and_a_key(videos, weights, embeddings, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    output = tmp_path / "out"
    with serving(embeddings) as server:
        options = [*weights, f"text.base_url={server.url}"]
        dry = embed(videos, output, *options, "run.dry_run=true", profile=PROFILE)
        assert dry.returncode == 0, dry.stdout + dry.stderr
        assert "4 texts" in dry.stdout  # each title's line of music, one more, and the metadata
        assert not server.requests
        server.plan = [fails(429, headers={"Retry-After": "0.1"}), fails(500)]
        done = embed(videos, output, *options, profile=PROFILE)
        assert done.returncode == 0, done.stdout + done.stderr
        # every distinct text is paid for once, though the first requests failed and two titles share one
        assert sorted(server.answered) == sorted([MUSIC, LINE, f"{SYNOPSIS}\n{TAG}"])
        assert all(request["model"] == "text-embedding-3-large" and request["dimensions"] == DIM for request in server.requests)
        seen = len(server.requests)
        assert embed(videos, output, *options, profile=PROFILE).returncode == 0
        assert len(server.requests) == seen  # all is committed: nothing is sent again
    dataset = EmbeddingDataset(str(output))
    assert dataset.model.dims == {"video": 768, "audio": 768, "text": 768, "fused": 2304}
    first, second = dataset.title("first"), dataset.title("second")
    assert first["text"].to_pylist() == [MUSIC, LINE]
    assert second["has_text"].to_pylist() == [True, False]
    for shots, index, text in ((first, 0, MUSIC), (first, 1, LINE), (second, 0, MUSIC)):
        np.testing.assert_allclose(dataset.embeddings(shots, "text")[index], embeddings([text])[0], atol=1e-6)
    assert not dataset.embeddings(second, "text")[1].any()
    everything = b"".join(objects(output).values()) + (output / "run-summary.json").read_bytes() + (output / "run.log").read_bytes()
    assert KEY.encode() not in everything
    assert KEY not in done.stdout + done.stderr


@pytest.mark.integration
def test_a_wrong_key_is_each_titles_error_and_says_what_to_do(videos, weights, embeddings, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", WRONG_KEY)
    with serving(embeddings) as server:
        overrides = [f"catalog.uri={videos}", f"output.uri={tmp_path}/out", *weights, f"text.base_url={server.url}"]
        config = read_config(EmbedCatalogConfig, PROFILE[1:], overrides)
        plan = make_plan(config)
        prepare_output(plan, config)
        errors = [title["error"][0].as_py() for title in loop.run(plan.pending, loop.build_stages(plan, config))]
    assert len(errors) == 2
    assert not server.answered
    for error in errors:
        assert error["stage"] == "encode_text"
        assert "OPENAI_API_KEY" in error["message"]
    records = list(read_failures(Output(str(tmp_path / "out"), plan.model.dataset_version)))
    assert {record["title_id"] for record in records} == {"first", "second"}
    assert WRONG_KEY not in json.dumps(records) + json.dumps(errors)


def test_without_a_key_nothing_starts(videos, weights, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    done = embed(videos, tmp_path / "out", *weights, profile=PROFILE)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "OPENAI_API_KEY" in done.stderr
    assert not list((tmp_path / "out").rglob("*.parquet"))
