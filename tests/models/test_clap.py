"""CLAP: against transformers on whole sounds, the rules for short and long ones, and checkpoints that are refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor, ClapModel

from mediafm_ray.models import tiny
from mediafm_ray.models.clap import ClapEncoder
from mediafm_ray.models.encoder import encoder_dim, encoder_sample_rate
from mediafm_ray.models.loading import MicroBatches, quiet_transformers
from mediafm_ray.models.options import AudioEncoderConfig
from mediafm_ray.models.weights import WeightsError
from mediafm_ray.spec import SAMPLE_RATE

RATE = 48_000
LONGEST = 2 * RATE  # of the tiny checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "clap"
    tiny.make_clap(path)
    return path


@pytest.fixture(scope="module")
def built(folder: Path) -> ClapEncoder:
    return build(folder)


def configured(folder: Path, **options: str) -> AudioEncoderConfig:
    return AudioEncoderConfig(encoder="clap", weights=str(folder), threads=2, **options)


def build(folder: Path, **options: str) -> ClapEncoder:
    return ClapEncoder(configured(folder, **options))


def sound(seed: int, samples: int) -> np.ndarray:
    """A chord in noise, of the seed's own pitch, that becomes louder."""
    random, times = np.random.default_rng(seed), np.arange(samples) / RATE
    chord = sum(np.sin(2 * np.pi * hz * times) for hz in random.uniform(100, 10_000, 3))
    return ((chord + random.normal(size=samples) / 3) * np.linspace(500, 6000, samples)).clip(-32768, 32767).astype("<i2")


def reference(folder: Path, samples: np.ndarray) -> np.ndarray:
    """The plain transformers way, for one sound."""
    with quiet_transformers():
        model, extractor = ClapModel.from_pretrained(folder).eval(), ClapFeatureExtractor.from_pretrained(folder)
    inputs = extractor(samples / 32768, sampling_rate=RATE, return_tensors="pt")
    with torch.inference_mode():
        return model.get_audio_features(**inputs).pooler_output[0].numpy()


@pytest.mark.parametrize("samples", [1, 400, RATE // 2, RATE + 7, LONGEST - 1, LONGEST])
def test_agrees_with_transformers(folder: Path, built: ClapEncoder, samples: int) -> None:
    ours = built.encode([sound(samples, samples).tobytes()]).embeddings_SD[0]
    np.testing.assert_allclose(ours, reference(folder, sound(samples, samples)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(ours), 1, atol=1e-6)


def test_a_long_shot_is_the_mean_of_its_pieces_by_length_and_nothing_is_random(folder: Path, built: ClapEncoder) -> None:
    samples = sound(3, 2 * LONGEST + RATE // 3)
    pieces = [samples[:LONGEST], samples[LONGEST : 2 * LONGEST], samples[2 * LONGEST :]]
    expected = sum(len(piece) / len(samples) * reference(folder, piece) for piece in pieces)
    state = np.random.get_state()[1].tolist()
    first = built.encode([samples.tobytes()]).embeddings_SD
    np.testing.assert_allclose(first[0], expected, atol=1e-5)
    assert built.encode([samples.tobytes()]).embeddings_SD.tobytes() == first.tobytes()
    assert np.random.get_state()[1].tolist() == state


def test_sounds_that_share_a_batch_have_the_numbers_they_have_alone(folder: Path) -> None:
    """The way of a GPU."""
    built = build(folder)
    shots = [sound(seed, samples).tobytes() for seed, samples in enumerate((RATE, 0, 5, LONGEST + 1, 3 * LONGEST, RATE // 3))]
    alone = built.encode(shots)
    built.alone = False
    for size in (16, 3):
        built.micro_batches = MicroBatches(built.device, size)
        together = built.encode(shots)
        assert together.present_S.tolist() == alone.present_S.tolist() == [True, False, True, True, True, True]
        np.testing.assert_allclose(together.embeddings_SD, alone.embeddings_SD, atol=1e-5)


def test_lower_precision_is_near(folder: Path, built: ClapEncoder) -> None:
    shots = [sound(seed, RATE).tobytes() for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = build(folder, precision="bfloat16").encode(shots).embeddings_SD
    cosines = (near * built.encode(shots).embeddings_SD).sum(axis=1)
    assert (cosines > 0.999).all()
    assert (cosines < 1).all()


def test_the_audio_tower_alone_is_enough(folder: Path, built: ClapEncoder, tmp_path: Path) -> None:
    with quiet_transformers():
        ClapAudioModelWithProjection.from_pretrained(folder).save_pretrained(tmp_path)
        ClapFeatureExtractor.from_pretrained(folder).save_pretrained(tmp_path)
    alone, shots = build(tmp_path), [sound(1, RATE).tobytes()]
    assert encoder_dim(configured(tmp_path)) == alone.dim == 768
    np.testing.assert_allclose(alone.encode(shots).embeddings_SD, built.encode(shots).embeddings_SD, atol=1e-6)


def test_the_rate_is_that_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    assert encoder_sample_rate(configured(folder)) == RATE
    assert encoder_sample_rate(AudioEncoderConfig()) == SAMPLE_RATE
    assert encoder_sample_rate(AudioEncoderConfig(encoder="wav2vec2", weights="nowhere")) == SAMPLE_RATE
    for rate in (32_000, 44_100):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": rate}))
        assert encoder_sample_rate(configured(tmp_path)) == rate
    for rate in (0, 7_990, 11_025, 192_010, "48000", 48e3, None):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": rate}))
        with pytest.raises(WeightsError, match=r"sampling_rate .*: it must be a whole number of Hz from 8000 to 192000"):
            encoder_sample_rate(configured(tmp_path))


def test_wrong_weights_are_named(folder: Path, tmp_path: Path) -> None:
    tiny.make_bert(tmp_path / "bert")
    with pytest.raises(WeightsError, match="'bert' checkpoint; the clap encoder takes clap, clap_audio_model"):
        build(tmp_path / "bert")
    tiny.make_clap(tmp_path / "fused", enable_fusion=True, fusion_type="aff_2d")
    with pytest.raises(WeightsError, match="fused is a checkpoint with fusion, which sees random parts of long sounds"):
        build(tmp_path / "fused")
    tiny.make_clap(tmp_path / "clap")
    preprocessor = tmp_path / "clap" / "preprocessor_config.json"
    for content, reason in (
        (json.dumps({**tiny.CLAP_SAMPLES, "truncation": "fusion"}), "is a checkpoint with fusion"),
        (json.dumps({**tiny.CLAP_SAMPLES, "feature_size": "many"}), r"the preprocessor_config\.json in .*clap cannot be followed"),
        ("[]", "it is not a JSON object"),
        ("{", "is not JSON"),
    ):
        preprocessor.write_text(content)
        with pytest.raises(WeightsError, match=reason):
            build(tmp_path / "clap")
    preprocessor.unlink()
    for use in (build, lambda folder: encoder_sample_rate(configured(folder))):
        with pytest.raises(WeightsError, match=r"no preprocessor_config\.json in .*clap: the checkpoint must describe"):
            use(tmp_path / "clap")
    with pytest.raises(ValueError, match="shot 1 has 3 bytes"):
        build(folder).encode([b"ab", b"abc"])
