"""The text towers of CLIP, SigLIP and CLAP, against transformers' whole models on the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, CLIPVisionModelWithProjection, PreTrainedTokenizerFast

from mediafm_ray.models import tiny
from mediafm_ray.models.loading import quiet_transformers
from mediafm_ray.models.options import AudioEncoderConfig, VideoEncoderConfig
from mediafm_ray.models.text_tower import TextTower
from mediafm_ray.models.weights import WeightsError

TEXTS = ["a red car", "   ", "People ride their bikes through the town, and wait for the cars to pass. " * 5, "", "what?"]
PRESENT = [0, 2, 4]
NAMES = ["clip", "siglip", "clap"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    tiny.make_clip(root / "clip")
    tiny.make_siglip(root / "siglip")
    tiny.make_clap(root / "clap")
    letters = {piece: number for number, piece in enumerate(["<pad>", "</s>", "<unk>", *tiny.LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))  # texts of letters, with </s> at their end, as SigLIP has them
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>", model_max_length=64)
    fast.save_pretrained(root / "siglip")
    return {name: root / name for name in NAMES}


def build(folder: Path) -> TextTower:
    config = AudioEncoderConfig if folder.name == "clap" else VideoEncoderConfig
    return TextTower(config(weights=str(folder)))


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_where_the_whole_model_puts_them(folders: dict[str, Path], name: str) -> None:
    encoder = build(folders[name])
    encoded = encoder.encode(TEXTS)
    assert encoder.dim == encoded.embeddings_SD.shape[1] == 768
    assert np.flatnonzero(encoded.present_S).tolist() == PRESENT
    assert not encoded.embeddings_SD[[1, 3]].any()
    with quiet_transformers():
        model = AutoModel.from_pretrained(folders[name]).eval()
        tokenizer = AutoTokenizer.from_pretrained(folders[name])
    longest = 64 if name == "clap" else model.config.text_config.max_position_embeddings
    for index in PRESENT:
        padding = "max_length" if name == "siglip" else False
        tokens = tokenizer(TEXTS[index], padding=padding, truncation=True, max_length=longest, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = model.get_text_features(input_ids=tokens)
        expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
        scale = np.linalg.norm(encoded.embeddings_SD[index]) if name == "clap" else 1  # The whole model gives CLAP's unit norm.
        np.testing.assert_allclose(encoded.embeddings_SD[index] / scale, expected[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_the_same_whoever_its_neighbours_are_and_differs_from_others(folders: dict[str, Path], name: str) -> None:
    encoder = build(folders[name])
    together = encoder.encode(TEXTS).embeddings_SD
    for index, text in enumerate(TEXTS):
        np.testing.assert_array_equal(encoder.encode([text]).embeddings_SD[0], together[index])
    assert np.abs(together[0] - together[4]).max() > 1e-3


def test_weights_without_words_say_so(folders: dict[str, Path], tmp_path: Path) -> None:
    with quiet_transformers():
        CLIPVisionModelWithProjection.from_pretrained(folders["clip"]).save_pretrained(tmp_path / "image")
        AutoModel.from_pretrained(folders["clip"]).save_pretrained(tmp_path / "mute")
    with pytest.raises(WeightsError, match="'clip_vision_model' checkpoint, which has no text tower"):
        build(tmp_path / "image")
    with pytest.raises(WeightsError, match=r"no tokenizer in .*mute: it needs one of tokenizer\.json"):
        build(tmp_path / "mute")
