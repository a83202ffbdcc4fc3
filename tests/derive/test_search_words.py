"""Words against what is said in shots, their pictures and their sound: with the encoders that made the vectors, refused with others."""

import json

import numpy as np
import pytest

from benchmarks.stored_titles import commit_title
from mediafm_ray.models import tiny
from mediafm_ray.models.clap import ClapEncoder
from mediafm_ray.models.encoder import build_text_encoder, weights_digest
from mediafm_ray.models.fusion import spans
from mediafm_ray.models.options import AudioEncoderConfig, TextEncoderConfig, VideoEncoderConfig
from mediafm_ray.models.text_tower import TextTower
from mediafm_ray.runs.plan import encoder_recipe
from mediafm_ray.spec import digest_of
from mediafm_ray.storage.dataset import Model
from tests.searchable import build, found, search

SAID = ["good evening", "the weather is bad", "who are you?", "run!", "it was 1984", "yes", "no", "a long way from home"]
SHOWN = ["a red car", "two dogs", "the sea", "a forest at night", "a man on the phone", "rain", "a crowd", "an empty street"]
HEARD = ["a dog barks", "rain on a roof", "footsteps", "a violin"]
DIM = 768


def model_of(audio_dim, **configs):
    recipe = {modality: encoder_recipe(config, weights_digest(config)) for modality, config in configs.items()}
    dims = {"video": DIM, "audio": audio_dim, "text": DIM}
    return Model(digest_of(recipe)[:12], recipe, {**dims, "fused": sum(dims.values())}, spans(dims))


def sound(seed):
    """A second of a tone of its own at 48 kHz."""
    return (8000 * np.sin(2 * np.pi * (100 + 700 * seed) * np.arange(48_000) / 48_000)).astype("<i2").tobytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Encoders, an output of two titles of eight shots that say and show different things, and its index."""
    root = tmp_path_factory.mktemp("words")
    for name, make in (("clip", tiny.make_clip), ("siglip", tiny.make_siglip), ("clap", tiny.make_clap), ("text", tiny.make_bert)):
        make(root / name)
    text, video = TextEncoderConfig(weights=str(root / "text")), VideoEncoderConfig(encoder="clip", weights=str(root / "clip"))
    audio = AudioEncoderConfig(encoder="clap", weights=str(root / "clap"))
    model = model_of(DIM, text=text, video=video, audio=audio)
    said = build_text_encoder(text).encode(SAID).embeddings_SD
    shown = TextTower(video).encode(SHOWN).embeddings_SD  # pictures that are just where their words are
    heard = ClapEncoder(audio).encode([sound(seed) for seed in range(8)]).embeddings_SD
    for number, order in enumerate((np.arange(8), np.arange(8)[::-1])):
        random = np.random.default_rng(number)
        parts = [shown[order] * 15, heard[order], said * (1 - 0.01 * number)]
        noisy = [part + 0.01 * random.normal(size=part.shape) * np.abs(part).mean() for part in parts]
        np.save(root / f"heard-{number}.npy", noisy[1])
        fused = np.concatenate(noisy, axis=1).astype(np.float32)
        commit_title(str(root / "out"), model, f"title-{number}", fused / np.linalg.norm(fused, axis=1, keepdims=True))
    assert build(root / "out", root / "index") == 0
    return root


def encoders(root):
    video, audio = ["video.encoder=clip", f"video.weights={root}/clip"], ["audio.encoder=clap", f"audio.weights={root}/clap"]
    return [f"text.weights={root}/text", *video, *audio]


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


def test_words_find_the_sounds_that_are_nearest_to_them(made, capsys):
    """Random weights know nothing of sounds: the same comparison by hand is the truth."""
    heard = np.concatenate([np.load(made / f"heard-{number}.npy") for number in range(2)])
    heard /= np.linalg.norm(heard, axis=1, keepdims=True)
    tower = TextTower(AudioEncoderConfig(encoder="clap", weights=str(made / "clap")))
    for words in HEARD:
        (query,) = tower.encode([words]).embeddings_SD
        expected = dict(zip([(f"title-{row // 8}", row % 8) for row in range(16)], heard @ query / np.linalg.norm(query), strict=True))
        places, cosines = found(capsys, made / "index", f"query={words}", "by=audio", "count=16", *encoders(made))
        assert set(places) == set(expected)
        np.testing.assert_allclose(cosines, [expected[place] for place in places], atol=3e-4)  # The index has half precision.
        assert cosines[0] > cosines[-1] + 5e-3  # The order means something.


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
        (["query=run!", "by=audio"], "are from audio.encoder=clap, configured is log_mel: give the profile"),
        (["query=run!", "by=audio", "audio.encoder=clap", f"audio.weights={made}/clip"], "audio.weights_sha256 is"),
        (["query=run!", "by=all"], "words are compared with the text of shots (by=text)"),
        (["query=   ", *encoders(made)], "query= has no words"),
        (["query=run!", f"text.weights={made}/nowhere"], "no weights at"),
        (["query=run!", "filter.other_titles=true", *encoders(made)], "filter.other_titles needs a shot or a clip"),
    ):
        assert search(index, *overrides) == 2, overrides
        error = capsys.readouterr().err
        assert reason in error, error
        assert error.count("\n") == 1


def test_encoders_without_a_text_tower_are_named(made, tmp_path, capsys):
    model = model_of(4, video=VideoEncoderConfig(), audio=AudioEncoderConfig())
    commit_title(str(tmp_path / "out"), model, "title", np.random.default_rng(0).normal(size=(3, 2 * DIM + 4)).astype(np.float32))
    assert build(tmp_path / "out", tmp_path / "index") == 0
    for by, reason in (
        ("video", "by=video: the index's pictures were encoded by efficientnet_lite0, which has no text encoder: use by=text"),
        ("audio", "by=audio: the index's sound was encoded by log_mel, which has no text encoder: use by=text"),
        ("text", "by=text: the index does not record the encoder of its text vectors; build it again"),
    ):
        assert search(tmp_path / "index", "query=run!", f"by={by}") == 2
        assert reason in capsys.readouterr().err
