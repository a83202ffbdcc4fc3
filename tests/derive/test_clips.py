"""Clips in context and alone, over committed titles."""

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.stored_titles import commit_title, make_model
from mediafm_ray.config.jobs import ContextualiseCatalogConfig
from mediafm_ray.config.loader import ConfigError, read_config
from mediafm_ray.derive.clips import ClipEmbedder
from mediafm_ray.downstream.clips import pool_clip
from mediafm_ray.models.contextualiser import TitleContextualiser, shot_times
from mediafm_ray.models.options import ContextualiserConfig
from mediafm_ray.models.tiny import make_contextualiser
from mediafm_ray.pipeline.contextualise_stored import ContextualiseStored
from mediafm_ray.runs.stored import make_stored_plan
from mediafm_ray.storage.dataset import DatasetError

MODEL = make_model("0123456789ab", video=20, audio=12, text=16)
SECONDS = np.array([2.0, 4.0, 1.0, 3.0, 5.0, 2.0, 3.0])
METADATA = np.linspace(-1, 1, 16, dtype=np.float32)


def rows(seed):
    vectors = np.random.default_rng(seed).normal(size=(len(SECONDS), MODEL.dims["fused"])).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An output with two titles, and a checkpoint whose context shows."""
    output, checkpoint = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("checkpoint")
    for seed, title_id in enumerate(("a", "b")):
        commit_title(str(output), MODEL, title_id, rows(seed), SECONDS, METADATA)
    make_contextualiser(checkpoint, fused_dim=48, metadata_dim=16, time_features=True, initializer_range=0.2)
    return output, checkpoint


def contextualise(output, checkpoint):
    config = read_config(ContextualiseCatalogConfig, [], [f"output.uri={output}", f"contextualiser.checkpoint={checkpoint}"])
    plan = make_stored_plan(config)
    stage = ContextualiseStored(config.contextualiser, str(output), plan.model, plan.checkpoint, config.storage)
    assert [table["error"][0].as_py() for table in stage(plan.pending)] == [None] * plan.pending.num_rows


def test_in_context_and_alone_are_what_they_say(folders):
    output, checkpoint = folders
    embedder = ClipEmbedder(str(output), str(checkpoint))
    end = np.cumsum(SECONDS)
    start = end - SECONDS
    model = TitleContextualiser(ContextualiserConfig(checkpoint=str(checkpoint)))
    whole, _ = model.contextualise(rows(0), METADATA, shot_times(start, end))
    inside = slice(1, 4)  # the clip [3, 8): 3 s of shot 1, all of shot 2, 1 s of shot 3
    alone, _ = model.contextualise(rows(0)[inside], METADATA, shot_times(start[inside], end[inside]))
    in_context, by_itself = embedder.clip_embedding("a", 3.0, 8.0), embedder.clip_embedding("a", 3.0, 8.0, context=False)
    assert in_context.tobytes() == pool_clip(start, end, whole, 3.0, 8.0).tobytes()
    assert by_itself.tobytes() == pool_clip(start[inside], end[inside], alone, 3.0, 8.0).tobytes()
    assert abs(np.linalg.norm(in_context) - 1) < 1e-6
    assert in_context @ by_itself < 0.999  # this model reads context
    whole_title = embedder.clip_embedding("a", 0.0, 20.0), embedder.clip_embedding("a", 0.0, 20.0, context=False)
    assert whole_title[0].tobytes() == whole_title[1].tobytes()  # all of a title is its own context


def test_stored_embeddings_are_used_without_loading_the_model_and_give_the_same_bytes(folders):
    output, checkpoint = folders
    before = ClipEmbedder(str(output), str(checkpoint))
    computed = before.clip_embedding("b", 1.0, 9.5)
    assert before.loaded is not None
    contextualise(output, checkpoint)
    after = ClipEmbedder(str(output), str(checkpoint))
    assert after.clip_embedding("b", 1.0, 9.5).tobytes() == computed.tobytes()
    assert after.loaded is None
    commit_title(str(output), MODEL, "b", rows(5), SECONDS, METADATA, source="f" * 16)  # embedded anew: what is stored is of the old one
    assert after.clip_embedding("b", 1.0, 9.5).tobytes() != computed.tobytes()


def test_a_table_of_clips_is_read_title_by_title_and_answered_in_order(folders, monkeypatch):
    output, checkpoint = folders
    embedder = ClipEmbedder(str(output), str(checkpoint))
    clips = pa.table({"title_id": ["b", "a", "b", "a"], "start_s": [0.0, 3.0, 5.0, 0.5], "end_s": [2.0, 8.0, 20.0, 1.0]})
    for context in (True, False):
        expected = [embedder.clip_embedding(clip["title_id"], clip["start_s"], clip["end_s"], context) for clip in clips.to_pylist()]
        read = []
        whole = embedder.dataset.output.store.read
        monkeypatch.setattr(embedder.dataset.output.store, "read", lambda name, read=read, whole=whole: read.append(name) or whole(name))
        assert embedder.clip_embeddings(clips, context).tobytes() == np.stack(expected).tobytes()
        assert len(read) == 2
        monkeypatch.undo()
    assert embedder.clip_embeddings(clips.slice(0, 0)).shape == (0, 48)


def test_what_cannot_be_embedded_is_named(folders):
    output, checkpoint = folders
    embedder = ClipEmbedder(str(output), str(checkpoint))
    with pytest.raises(DatasetError, match="no title 'c'"):
        embedder.clip_embedding("c", 0.0, 1.0)
    for context in (True, False):
        with pytest.raises(ValueError, match=r"title 'a': the clip \[50, 60\) s is outside the title"):
            embedder.clip_embedding("a", 50.0, 60.0, context)
    with pytest.raises(DatasetError):
        ClipEmbedder(str(output / "nowhere"), str(checkpoint))
    make_contextualiser(output / "other", fused_dim=4, metadata_dim=16)
    with pytest.raises(ConfigError, match="fused_dim"):
        ClipEmbedder(str(output), str(output / "other"))
