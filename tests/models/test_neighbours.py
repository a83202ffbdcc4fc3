"""Context from neighbours: the formula against a plain loop over its definition, and invariants of any title."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mediafm_ray.models.contextualiser import TitleContextualiser, TitleShots
from mediafm_ray.models.neighbours import NeighbourAttention, NeighbourAttentionConfig, builtin_model, neighbour_context
from mediafm_ray.models.options import ContextualiserConfig

SPANS = {"video": [0, 24], "audio": [24, 32], "text": [32, 48]}
DIM = 48


def unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def scene_shots(shots: int, seed: int = 0, noise: float = 0.1) -> np.ndarray:
    """Shots of one place, float32 of unit norm."""
    random = np.random.default_rng(seed)
    return unit(unit(random.normal(size=DIM)) + noise * random.normal(size=(shots, DIM))).astype(np.float32)


def served(fused_SD: np.ndarray, model=None) -> np.ndarray:
    with torch.no_grad():
        return (model or builtin_model())(torch.from_numpy(fused_SD)[None]).contextual_BSD[0].numpy()


def trained_model(seed: int = 0) -> NeighbourAttention:
    """A model whose corrections are not zero."""
    torch.manual_seed(seed)
    model = NeighbourAttention(NeighbourAttentionConfig(fused_dim=DIM, metadata_dim=6, spans=SPANS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def by_definition(x: np.ndarray) -> np.ndarray:
    """The formula of the module's docstring, shot by shot, in float64."""
    x = unit(x.astype(np.float64))
    shots = range(len(x))

    def softmax(logits):
        weights = {other: math.exp(value) for other, value in logits.items()}
        return {other: weight / sum(weights.values()) for other, weight in weights.items()}

    support = []
    for i in shots:
        best = sorted((x[i] @ x[j] for j in shots if 0 < abs(i - j) <= 6), reverse=True)[:2]
        support.append(min(1.0, max(0.0, float(np.mean(best)))))
    found = []
    for i in shots:
        others = [j for j in shots if j != i]
        around = softmax({j: -abs(i - j) / 4 for j in others})
        keep = min(1.0, (support[i] + 0.1) / (sum(weight * support[j] for j, weight in around.items()) + 0.1))
        alike = softmax({j: -abs(i - j) / 4 + (x[i] @ x[j] - 1) / 0.2 for j in others})
        near = softmax({j: -abs(i - j) / 2 for j in others})
        context = sum((alike[j] + (1.5 - keep) * near[j]) * x[j] for j in others)
        found.append(keep * x[i] + (1 - 1 / len(x)) * context)
    return unit(np.array(found))


@pytest.mark.parametrize("shots", [3, 9, 40])
def test_the_formula_is_its_definition(shots):
    fused_SD = np.concatenate([scene_shots(shots // 2, 1, 0.2), scene_shots(shots - shots // 2, 2, 0.2)])
    np.testing.assert_allclose(served(fused_SD), by_definition(fused_SD), atol=2e-6)


def test_an_untrained_model_is_the_formula():
    model = NeighbourAttention(NeighbourAttentionConfig(fused_dim=DIM, spans=SPANS)).eval()
    fused_SD = np.concatenate([scene_shots(7, 1), scene_shots(5, 2)])
    np.testing.assert_allclose(served(fused_SD, model), served(fused_SD), atol=1e-6)


def test_a_cut_away_takes_the_vector_of_its_scene_and_a_montage_keeps_its_own():
    fused_SD = scene_shots(15)
    fused_SD[7] = scene_shots(1, seed=9)[0]
    place_D = unit(np.delete(fused_SD, 7, 0).mean(0))
    contextual_SD = served(fused_SD)
    assert contextual_SD[7] @ place_D > contextual_SD[7] @ fused_SD[7]  # its surroundings are the larger part of it
    assert contextual_SD[7] @ fused_SD[7] > 0.15  # and something of itself is left
    assert (contextual_SD @ place_D > 0.9)[np.arange(15) != 7].all()
    montage_SD = unit(np.random.default_rng(3).normal(size=(15, 400))).astype(np.float32)
    assert (np.sum(served(montage_SD) * montage_SD, axis=1) > 0.7).all()


def test_a_title_of_few_shots_is_never_drowned_by_its_context():
    """One shot has no context; of two or three that differ, each is still nearest to itself."""
    random = np.random.default_rng(4)
    for shots in (1, 2, 3):
        fused_SD = unit(random.normal(size=(shots, 300))).astype(np.float32)
        cosine_SS = served(fused_SD) @ fused_SD.T
        assert (np.argmax(cosine_SS, axis=1) == np.arange(shots)).all()
        if shots == 1:
            np.testing.assert_allclose(cosine_SS, 1, atol=1e-6)


@pytest.mark.parametrize("model", [builtin_model(), trained_model()], ids=["builtin", "trained"])
@pytest.mark.parametrize("case", ["alike", "zeros", "no sound", "no text", "one known", "opposite", "thousand"])
def test_any_title_gives_finite_vectors_of_unit_norm(model, case):
    fused_SD = scene_shots(1000 if case == "thousand" else 12)
    if case == "alike":
        fused_SD[:] = fused_SD[0]
    elif case in ("zeros", "one known"):
        fused_SD[1 if case == "one known" else 0 :] = 0
    elif case in ("no sound", "no text"):
        first, end = SPANS["audio" if case == "no sound" else "text"]
        fused_SD[:, first:end] = 0
    elif case == "opposite":
        fused_SD[::2] *= -1
    contextual_SD = served(fused_SD[:512], model)
    assert np.isfinite(contextual_SD).all()
    norm_S = np.linalg.norm(contextual_SD, axis=1)
    expected = 0.0 if case == "zeros" else 1.0
    np.testing.assert_allclose(norm_S, expected, atol=1e-5)
    if case == "alike":
        np.testing.assert_allclose(contextual_SD, fused_SD, atol=1e-6)


@pytest.mark.parametrize("model", [builtin_model(), trained_model()], ids=["builtin", "trained"])
def test_hidden_shots_are_not_seen_and_padding_changes_nothing(model):
    fused_BSD = torch.from_numpy(scene_shots(10))[None]
    masked_BS = torch.zeros(1, 10, dtype=torch.bool)
    masked_BS[0, [2, 6]] = True
    other_BSD = torch.where(masked_BS[..., None], 5.0, fused_BSD)
    with torch.no_grad():
        before = model(fused_BSD, masked_BS=masked_BS).contextual_BSD
        assert torch.equal(model(other_BSD, masked_BS=masked_BS).contextual_BSD, before)
        padded_BSD = torch.cat([fused_BSD, torch.full((1, 4, DIM), 3.0)], 1)
        shots_BS = torch.arange(14)[None] < 10
        padded = model(padded_BSD, shots_BS=shots_BS)
        alone = model(fused_BSD)
    torch.testing.assert_close(padded.contextual_BSD[:, :10], alone.contextual_BSD, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.cls_BD, alone.cls_BD, atol=1e-5, rtol=0)


def test_the_order_of_time_does_not_matter():
    """Distance counts, direction does not: a film read backwards has the same vectors."""
    fused_SD = np.concatenate([scene_shots(6, 1), scene_shots(7, 2), scene_shots(3, 3)])
    for model in (builtin_model(), trained_model()):
        np.testing.assert_allclose(served(fused_SD[::-1].copy(), model)[::-1], served(fused_SD, model), atol=1e-5)


def test_a_checkpoint_comes_back_and_serves_titles_longer_than_a_window(tmp_path):
    model = trained_model()
    model.config.max_shots = 64
    model.save_pretrained(tmp_path)
    fused_SD = np.concatenate([scene_shots(50, seed) for seed in range(4)])
    contextualiser = TitleContextualiser(ContextualiserConfig(checkpoint=str(tmp_path), threads=1))
    contextual_SD, cls_D = contextualiser.contextualise(fused_SD, np.ones(6, np.float32))
    assert contextual_SD.shape == fused_SD.shape
    assert np.isfinite(contextual_SD).all()
    np.testing.assert_allclose(contextual_SD[:20], served(fused_SD[:64], model)[:20], atol=1e-4)
    assert cls_D.shape == (DIM,)
    with pytest.raises(ValueError, match="trained on fused embeddings of 48 dimensions"):
        contextualiser.contextualise(fused_SD[:, :40], None)


def test_the_builtin_serves_vectors_of_any_dimension_with_any_metadata():
    contextualiser = TitleContextualiser(ContextualiserConfig(threads=1))
    for dim in (5, 48):
        fused_SD = unit(np.random.default_rng(dim).normal(size=(7, dim))).astype(np.float32)
        contextual_SD, cls_D = contextualiser.contextualise_together([TitleShots(fused_SD, np.ones(3, np.float32))])[0]
        expected_BSD = neighbour_context(torch.from_numpy(fused_SD)[None], torch.ones(1, 7, dtype=torch.bool))
        np.testing.assert_allclose(contextual_SD, expected_BSD[0].numpy(), atol=1e-6)
        np.testing.assert_allclose(cls_D, unit(contextual_SD.mean(0)), atol=1e-6)
