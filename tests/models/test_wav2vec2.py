"""wav2vec2: against transformers on whole sounds, batches against single sounds, and the rules for short, long and silent ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel, HubertConfig, HubertModel, Wav2Vec2Config, Wav2Vec2ForPreTraining

from mediafm_ray.models import encoder, tiny, weights
from mediafm_ray.models.loading import MicroBatches
from mediafm_ray.models.options import AudioEncoderConfig
from mediafm_ray.models.wav2vec2 import MIN_SAMPLES, ConvolutionByProducts, Wav2Vec2Encoder, _positions_by_products
from mediafm_ray.spec import SAMPLE_RATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Group norm, as facebook/wav2vec2-base."""
    path = tmp_path_factory.mktemp("checkpoints") / "base"
    tiny.make_wav2vec2(path)
    return path


@pytest.fixture(scope="module")
def layer_norm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer norm in the convolutions and before the layers, as facebook/wav2vec2-large-lv60."""
    path = tmp_path_factory.mktemp("checkpoints") / "large"
    tiny.make_wav2vec2(path, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, hidden_size=48)
    return path


def build(folder: Path, **options: float) -> Wav2Vec2Encoder:
    return Wav2Vec2Encoder(AudioEncoderConfig(encoder="wav2vec2", weights=str(folder), threads=2, **options))


def sound(seed: int, samples: int) -> np.ndarray:
    """Noise whose loudness and offset drift, so that a norm over time sees a difference between its parts."""
    generator = np.random.default_rng(seed)
    drift = np.linspace(0.2, 1, samples) * 6000
    return (generator.normal(size=samples) * drift + 500).clip(-32768, 32767).astype("<i2")


def reference(folder: Path, samples: np.ndarray, layer: int = -1) -> np.ndarray:
    """The plain transformers way, for one sound."""
    inputs = AutoFeatureExtractor.from_pretrained(folder)(samples / 32768, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_values"]
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        output = model(inputs.float(), output_hidden_states=True)
    return (output.last_hidden_state if layer == -1 else output.hidden_states[layer])[0].mean(dim=0).numpy()


@pytest.mark.parametrize(("samples", "layer"), [(MIN_SAMPLES, -1), (8001, 0), (8001, 1), (8001, 2), (40_000, -1)])
def test_agrees_with_transformers(folder: Path, samples: int, layer: int) -> None:
    ours = build(folder, layer=layer).encode([sound(1, samples).tobytes()]).embeddings_SD[0]
    np.testing.assert_allclose(ours, reference(folder, sound(1, samples), layer), rtol=1e-3, atol=1e-4)


def test_padding_changes_transformers_own_output(folder: Path) -> None:
    """Why the norm is replaced: the same sound with zeros after it, masked, is another embedding to the published model."""
    samples = torch.tensor(sound(1, 20_000) / 32768, dtype=torch.float32)[None]
    model = AutoModel.from_pretrained(folder).eval()
    mask = torch.zeros(1, 40_000, dtype=torch.bool)
    mask[:, :20_000] = True
    steps = int(model._get_feat_extract_output_lengths(20_000))
    with torch.inference_mode():
        alone = model(samples).last_hidden_state[0]
        padded = model(torch.nn.functional.pad(samples, (0, 20_000)), attention_mask=mask).last_hidden_state[0, :steps]
    assert (alone - padded).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["folder", "layer_norm_folder"])
def test_sounds_that_share_a_batch_have_the_numbers_they_have_alone(kind: str, request: pytest.FixtureRequest) -> None:
    """The way of a GPU: sounds of different lengths padded to one."""
    built = build(request.getfixturevalue(kind))
    shots = [sound(seed, samples).tobytes() for seed, samples in enumerate((16_000, 16_000, 3_200, 70_000, 0, 5, 33_333, 16_001))]
    alone = built.encode(shots)
    built.alone = False
    _positions_by_products(built.model)
    for size in (8, 3):
        built.micro_batches = MicroBatches(built.device, size)
        together = built.encode(shots)
        assert together.present_S.tolist() == alone.present_S.tolist()
        np.testing.assert_allclose(together.embeddings_SD, alone.embeddings_SD, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("kernel", "groups", "steps"), [(128, 4, 249), (128, 2, 9), (128, 1, 1), (7, 4, 40), (16, 2, 33), (1, 2, 16)])
def test_a_convolution_by_products_is_the_convolution(kernel: int, groups: int, steps: int) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv1d(8, 16, kernel, padding=kernel // 2, groups=groups)
    values = torch.randn(3, 8, steps)
    with torch.inference_mode():
        torch.testing.assert_close(ConvolutionByProducts(convolution)(values), convolution(values), rtol=1e-5, atol=1e-5)


def test_the_lengths_of_a_batch_are_forgotten_after_it(folder: Path) -> None:
    """The model, called by itself afterwards, is the published one again."""
    built = build(folder)
    samples = torch.tensor(sound(1, 20_000) / 32768, dtype=torch.float32)[None]
    with torch.inference_mode():
        before = built.model(samples).last_hidden_state
        built.alone = False
        built.encode([sound(2, 9_000).tobytes(), sound(3, 16_000).tobytes()])
        assert torch.equal(built.model(samples).last_hidden_state, before)


def test_long_shots_are_equal_pieces_averaged_by_length(folder: Path) -> None:
    built = build(folder, chunk_seconds=1.0)
    samples = sound(3, 40_001)  # three pieces: 13333, 13334, 13334
    normalised = samples / 32768
    normalised = (normalised - normalised.mean()) / np.sqrt(normalised.var() + 1e-7)
    model = AutoModel.from_pretrained(folder).eval()
    expected = np.zeros(768)
    for start, end in ((0, 13_333), (13_333, 26_667), (26_667, 40_001)):
        with torch.inference_mode():
            hidden = model(torch.tensor(normalised[None, start:end], dtype=torch.float32)).last_hidden_state[0]
        expected += hidden.mean(dim=0).numpy() * (end - start) / 40_001
    np.testing.assert_allclose(built.encode([samples.tobytes()]).embeddings_SD[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("samples", [1, 2, 399, 400, MIN_SAMPLES - 1])
def test_short_shots_are_finite_and_tell_sounds_apart(folder: Path, samples: int) -> None:
    built = build(folder)
    one, other = built.encode([sound(1, samples).tobytes(), sound(2, samples).tobytes()]).embeddings_SD
    assert np.isfinite(one).all()
    if samples > 1:  # a single sample has no variation: it counts as silence
        assert np.abs(one - other).max() > 1e-4


def test_silence_is_present_finite_and_always_the_same(folder: Path) -> None:
    zeros, constant = build(folder).encode([bytes(20_000), np.full(10_000, 700, "<i2").tobytes()]).embeddings_SD
    assert np.isfinite(zeros).all()
    assert np.linalg.norm(zeros) > 0
    np.testing.assert_allclose(zeros, constant, atol=1e-5)


def test_a_pretraining_checkpoint_in_torch_format_loads(tmp_path: Path) -> None:
    """As facebook/wav2vec2-base is published: a model for pretraining, in pytorch_model.bin, with keys of older versions of torch."""
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16, "conv_dim": (16,) * 7}
    pretraining = Wav2Vec2ForPreTraining(
        Wav2Vec2Config(**shape, num_codevectors_per_group=4, codevector_dim=8, proj_codevector_dim=8)
    ).eval()
    pretraining.config.save_pretrained(tmp_path)
    tiny.make_wav2vec2(tmp_path / "other")
    (tmp_path / "preprocessor_config.json").write_bytes((tmp_path / "other" / "preprocessor_config.json").read_bytes())
    state = {
        name.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): tensor
        for name, tensor in pretraining.state_dict().items()
    }
    assert any(name.endswith("weight_g") for name in state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    built = build(tmp_path)
    inputs = AutoFeatureExtractor.from_pretrained(tmp_path)(sound(5, 9000) / 32768, sampling_rate=SAMPLE_RATE, return_tensors="pt")[
        "input_values"
    ].float()
    with torch.inference_mode():
        expected = pretraining.wav2vec2(inputs).last_hidden_state[0].mean(dim=0).numpy()
    np.testing.assert_allclose(built.encode([sound(5, 9000).tobytes()]).embeddings_SD[0], expected, rtol=1e-3, atol=1e-4)


def test_hubert_is_read_too(tmp_path: Path) -> None:
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16, "conv_dim": (16,) * 7}
    HubertModel(HubertConfig(**shape)).save_pretrained(tmp_path)
    tiny.make_wav2vec2(tmp_path / "other")
    (tmp_path / "preprocessor_config.json").write_bytes((tmp_path / "other" / "preprocessor_config.json").read_bytes())
    config = AudioEncoderConfig(encoder="wav2vec2", weights=str(tmp_path))
    assert encoder.encoder_dim(config) == build(tmp_path).dim == 48
    ours = build(tmp_path).encode([sound(1, 8000).tobytes()]).embeddings_SD[0]
    np.testing.assert_allclose(ours, reference(tmp_path, sound(1, 8000)), rtol=1e-3, atol=1e-4)


def test_wrong_weights_and_options_are_named(folder: Path, tmp_path: Path) -> None:
    tiny.make_bert(tmp_path)
    with pytest.raises(weights.WeightsError, match="'bert' checkpoint; the wav2vec2 encoder takes wav2vec2, hubert, wavlm"):
        build(tmp_path)
    with pytest.raises(ValueError, match=r"audio\.layer must be -1 \(the last\) or 0 to 2"):
        build(folder, layer=3)
    with pytest.raises(ValueError, match=r"audio\.chunk_seconds must be at least 0\.2"):
        build(folder, chunk_seconds=0.1)
    with pytest.raises(ValueError, match="shot 0 has 3 bytes"):
        build(folder).encode([b"abc"])
