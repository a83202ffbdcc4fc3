"""Words and pictures as queries, with tiny encoders of the kinds that the profiles use."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks.stored_titles import commit_title
from mediafm_ray.explore.app import as_jpeg
from mediafm_ray.explore.queries import link
from mediafm_ray.models import tiny
from mediafm_ray.models.clip import ClipEncoder
from mediafm_ray.models.encoder import build_text_encoder, weights_digest
from mediafm_ray.models.fusion import spans
from mediafm_ray.models.options import AudioEncoderConfig, TextEncoderConfig, VideoEncoderConfig
from mediafm_ray.models.text_tower import TextTower
from mediafm_ray.runs.plan import encoder_recipe
from mediafm_ray.spec import digest_of
from mediafm_ray.storage.dataset import Model
from tests.explore.made import client_of, config_of
from tests.searchable import build

SAID = ["good evening", "the weather is bad", "who are you?", "run!"]
HEARD = ["a dog barks", "rain", "footsteps", "a violin"]
DIM = 768


def png(shot):
    random = np.random.default_rng(shot)
    sink = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A client of a catalog whose encoders are BERT, CLIP and CLAP; its sounds are just where their words are."""
    root = tmp_path_factory.mktemp("words")
    tiny.make_clip(root / "clip")
    tiny.make_clap(root / "clap")
    tiny.make_bert(root / "text")
    text, video = TextEncoderConfig(weights=str(root / "text")), VideoEncoderConfig(encoder="clip", weights=str(root / "clip"))
    audio = AudioEncoderConfig(encoder="clap", weights=str(root / "clap"))
    configs = {"text": text, "video": video, "audio": audio}
    recipe = {modality: encoder_recipe(config, weights_digest(config)) for modality, config in configs.items()}
    dims = {"video": DIM, "audio": DIM, "text": DIM}
    model = Model(digest_of(recipe)[:12], recipe, {**dims, "fused": sum(dims.values())}, spans(dims))
    shown = ClipEncoder(video).encode([[as_jpeg(png(shot))] for shot in range(4)]).embeddings_SD
    heard = TextTower(audio).encode(HEARD).embeddings_SD
    said = build_text_encoder(text).encode(SAID).embeddings_SD
    fused = np.concatenate([shown, heard, said], axis=1).astype(np.float32)
    commit_title(str(root / "out"), model, "film", fused / np.linalg.norm(fused, axis=1, keepdims=True))
    assert build(root / "out", root / "index") == 0
    encoders = ["video.encoder=clip", f"video.weights={root}/clip", "audio.encoder=clap", f"audio.weights={root}/clap"]
    return client_of(config_of(root, f"text.weights={root}/text", *encoders))


def first(answer):
    assert answer.status_code == 200, answer.text
    shot, cosine = re.search(r'data-shot="(\d+)"', answer.text), re.search(r"<b>(-?[\d.]+)</b>", answer.text)
    return int(shot[1]), float(cosine[1])


def test_words_find_the_shots_in_which_they_are_said(worded):
    for shot, words in enumerate(SAID):
        found, cosine = first(worded.get(link("/", q=words)))
        assert (found, cosine > 0.99) == (shot, True)
    assert "shots by text" in worded.get(link("/", q="run!", by="fused", like="film", shot=1)).text  # words win over the shot before
    assert "shots by video" in worded.get(link("/", q="run!", by="video")).text


def test_words_find_the_shots_that_sound_like_it(worded):
    assert "their pictures (video: 4 of 4 shots) or their sound (audio: 4 of 4 shots)" in worded.get("/").text
    for shot, words in enumerate(HEARD):
        found, cosine = first(worded.get(link("/", q=words, by="audio")))
        assert (found, cosine > 0.99) == (shot, True)


def test_a_picture_finds_the_shot_that_shows_it(worded):
    assert 'type="file"' in worded.get("/").text
    for shot in range(4):
        answer = worded.post("/picture", content=png(shot))
        found, cosine = first(worded.get(link("/", **answer.json())))
        assert (found, cosine > 0.99) == (shot, True)
    assert "the picture is not kept any more" in worded.get(link("/", picture="0" * 32)).text


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 400, "this is no picture"),
        (b"<svg onload=x>", 400, "this is no picture"),
        (png(0)[:300], 400, "this is no picture"),
        (b"GIF89a" + bytes(100), 400, "this is no picture"),
        (bytes(17 << 20), 413, "at most 16 MB"),
    ],
)
def test_what_is_no_picture_is_said(worded, content, status, said):
    answer = worded.post("/picture", content=content)
    assert (answer.status_code, said in answer.text) == (status, True)


def test_a_bomb_is_not_unpacked():
    sink = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(sink, "PNG")
    with pytest.raises(Exception, match="more than 50 million pixels"):
        as_jpeg(sink.getvalue())


def test_a_catalog_with_other_encoders_says_why_there_is_no_control(client):
    page = client.get("/").text
    assert 'type="file"' not in page
    assert "A picture cannot be searched with." in page
    assert "Words and sound: by=audio: the index does not record the encoder of its audio vectors" in page
    assert client.post("/picture", content=png(0)).status_code == 400
