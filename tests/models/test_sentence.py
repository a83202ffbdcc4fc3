"""The sentence encoder: against sentence-transformers on the same checkpoint, and against damaged checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mediafm_ray.models import encoder, sentence, weights
from mediafm_ray.models.options import TextEncoderConfig
from mediafm_ray.models.sentence import SentenceEncoder

TEXTS = [
    "A man walks into a bar.",
    "Someone enters a pub.",
    "The rocket left the launch pad at dawn.",
    "hello",
    "¿Qué pasa? 映画 🎬 naïve façade",
    "[MASK] [CLS] </s> <b>bold</b>",
    "the quick brown fox jumps over the lazy dog " * 100,
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return weights.resolve(TextEncoderConfig().weights)


@pytest.fixture(scope="module")
def built() -> SentenceEncoder:
    return SentenceEncoder(TextEncoderConfig(threads=2))


def test_agrees_with_sentence_transformers(built: SentenceEncoder, folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, batch_size=3, show_progress_bar=False)
    np.testing.assert_allclose(built.encode(TEXTS).embeddings_SD, reference, rtol=0, atol=1e-5)


def test_meaning_is_near_meaning(built: SentenceEncoder) -> None:
    walks, enters, rocket = built.encode(TEXTS[:3]).embeddings_SD
    assert walks @ enters > 0.4 > 0.2 > walks @ rocket


def test_long_text_is_cut_at_the_checkpoints_own_length(built: SentenceEncoder) -> None:
    assert built.longest == 256
    word = "fox "  # one word piece; two more are [CLS] and [SEP]
    cut, longer, shorter = built.encode([word * 254, word * 5000, word * 253]).embeddings_SD
    assert cut.tobytes() == longer.tobytes()
    assert cut.tobytes() != shorter.tobytes()


def test_texts_that_share_a_batch_have_the_numbers_they_have_alone(built: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU: texts of different lengths padded to one."""
    alone = built.encode(TEXTS).embeddings_SD
    monkeypatch.setitem(sentence.TEXTS_PER_CALL, "cpu", 3)
    np.testing.assert_allclose(built.encode(TEXTS).embeddings_SD, alone, rtol=0, atol=1e-5)


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("data_config.json", "README.md"))
    return to


def test_pooling_and_norm_follow_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    plain = copied(folder, tmp_path / "cls")
    modules = json.loads((plain / "modules.json").read_text())
    (plain / "modules.json").write_text(json.dumps([module for module in modules if not module["type"].endswith("Normalize")]))
    pooling = {
        **json.loads((plain / "1_Pooling" / "config.json").read_text()),
        "pooling_mode_mean_tokens": False,
        "pooling_mode_cls_token": True,
    }
    (plain / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    ours = SentenceEncoder(TextEncoderConfig(weights=str(plain))).encode(TEXTS).embeddings_SD
    reference = SentenceTransformer(str(plain), device="cpu").encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4)
    assert np.linalg.norm(ours[0]) > 1.5  # not normalised


def test_a_checkpoint_that_asks_for_more_is_refused(folder: Path, tmp_path: Path) -> None:
    dense = copied(folder, tmp_path / "dense")
    modules = [*json.loads((dense / "modules.json").read_text()), {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}]
    (dense / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(weights.WeightsError, match="Dense"):
        SentenceEncoder(TextEncoderConfig(weights=str(dense)))


def test_a_truncated_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path / "broken")
    tensors = broken / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:5_000_000])
    with pytest.raises(weights.WeightsError, match="broken cannot be loaded"):
        SentenceEncoder(TextEncoderConfig(weights=str(broken)))


def test_a_partial_checkpoint_is_not_filled_with_random_numbers(folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    partial = copied(folder, tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layer.3.attention.self.query" not in name}
    save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(weights.WeightsError, match=r"incomplete.*layer\.3\.attention\.self\.query"):
        SentenceEncoder(TextEncoderConfig(weights=str(partial)))


def test_missing_checkpoints_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(weights.WeightsError, match="does not exist on this machine"):
        encoder.build_text_encoder(TextEncoderConfig(weights=str(tmp_path / "nowhere")))
    with pytest.raises(weights.WeightsError, match=r"no config\.json in"):
        encoder.build_text_encoder(TextEncoderConfig(weights=str(tmp_path)))
    with pytest.raises(weights.WeightsError, match=r"no config\.json in"):
        encoder.encoder_dim(TextEncoderConfig(weights=str(tmp_path)))
