"""Words against what is said in shots and against their pictures: with the encoders that made the vectors, and refused with others."""

import json

import numpy as np
import pytest

from benchmarks.stored_titles import commit_title
from mediafm_ray.models import tiny
from mediafm_ray.models.clip_text import ClipTextEncoder
from mediafm_ray.models.encoder import build_text_encoder, weights_digest
from mediafm_ray.models.fusion import spans
from mediafm_ray.models.options import TextEncoderConfig, VideoEncoderConfig
from mediafm_ray.runs.plan import encoder_recipe
from mediafm_ray.spec import digest_of
from mediafm_ray.storage.dataset import Model
from tests.searchable import build, found, search

SAID = ["good evening", "the weather is bad", "who are you?", "run!", "it was 1984", "yes", "no", "a long way from home"]
SHOWN = ["a red car", "two dogs", "the sea", "a forest at night", "a man on the phone", "rain", "a crowd", "an empty street"]
DIM = 768


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Encoders, an output of two titles of eight shots that say and show different things, and its index."""
    root = tmp_path_factory.mktemp("words")
    for name, make in (("clip", tiny.make_clip), ("siglip", tiny.make_siglip), ("text", tiny.make_bert)):
        make(root / name)
    text, video = TextEncoderConfig(weights=str(root / "text")), VideoEncoderConfig(encoder="clip", weights=str(root / "clip"))
    recipe = {"text": encoder_recipe(text, weights_digest(text)), "video": encoder_recipe(video, weights_digest(video))}
    dims = {"video": DIM, "audio": 4, "text": DIM}
    model = Model(digest_of(recipe)[:12], recipe, {**dims, "fused": sum(dims.values())}, spans(dims))
    said = build_text_encoder(text).encode(SAID).embeddings_SD
    shown = ClipTextEncoder(video).encode(SHOWN).embeddings_SD  # pictures that are just where their words are
    for number, order in enumerate((np.arange(8), np.arange(8)[::-1])):
        random = np.random.default_rng(number)
        parts = [shown[order] * 15, random.normal(size=(8, 4)), said * (1 - 0.01 * number)]
        noisy = [part + 0.01 * random.normal(size=part.shape) * np.abs(part).mean() for part in parts]
        fused = np.concatenate(noisy, axis=1).astype(np.float32)
        commit_title(str(root / "out"), model, f"title-{number}", fused / np.linalg.norm(fused, axis=1, keepdims=True))
    assert build(root / "out", root / "index") == 0
    return root


def encoders(root):
    return [f"text.weights={root}/text", "video.encoder=clip", f"video.weights={root}/clip"]


def test_words_find_the_shots_in_which_they_are_said(made, capsys):
    for shot, words in enumerate(SAID):
        places, cosines = found(capsys, made / "index", f"query={words}", "count=2", *encoders(made))
        assert set(places) == {("title-0", shot), ("title-1", shot)}
        assert min(cosines) > 0.99
    assert search(made / "index", "query=run!", "format=json", *encoders(made)) == 0
    assert json.loads(capsys.readouterr().out)["query"] == {"query": "run!", "by": "text"}


def test_words_find_the_pictures_that_show_it(made, capsys):
    for shot, words in enumerate(SHOWN):
        places, cosines = found(capsys, made / "index", f"query={words}", "by=video", "count=2", *encoders(made))
        assert set(places) == {("title-0", shot), ("title-1", 7 - shot)}
        assert min(cosines) > 0.99
    assert found(capsys, made / "index", f"query={SHOWN[0]}", "by=video", "count=1", "filter.titles=[title-1]", *encoders(made))[0] == [
        ("title-1", 7)
    ]


def test_words_in_any_punctuation_are_taken_as_they_are(made, capsys):
    for words in ('"to be" or not', "what: ever", "[music]", "don't", "{a", "- no", "# 1", "100%", "a=b"):
        assert search(made / "index", f"query={words}", "format=json", *encoders(made)) == 0, words
        assert json.loads(capsys.readouterr().out)["query"]["query"] == words


def test_an_encoder_that_did_not_make_the_vectors_is_refused(made, capsys):
    index = made / "index"
    for overrides, reason in (
        (["query=run!"], "configured encoder is not that of the index: text.weights_sha256 is"),  # the default profile
        (["query=run!", "text.encoder=openai"], "are from text.encoder=sentence_transformer, configured is openai: give the profile"),
        (["query=run!", "by=video"], "are from video.encoder=clip, configured is efficientnet_lite0: give the profile"),
        (["query=run!", "by=video", "video.encoder=clip", f"video.weights={made}/siglip"], "video.weights_sha256 is"),
        (["query=run!", "by=audio"], "words are compared with the text of shots (by=text)"),
        (["query=run!", "by=all"], "words are compared with the text of shots (by=text)"),
        (["query=   ", *encoders(made)], "query= has no words"),
        (["query=run!", f"text.weights={made}/nowhere"], "no weights at"),
        (["query=run!", "filter.other_titles=true", *encoders(made)], "filter.other_titles needs a shot or a clip"),
    ):
        assert search(index, *overrides) == 2, overrides
        error = capsys.readouterr().err
        assert reason in error, error
        assert error.count("\n") == 1
