"""Fusion: constructed answers, invariants and the round trip."""

from __future__ import annotations

import numpy as np
import pytest

from mediafm_ray.models.fusion import fuse, fusion_recipe, spans, split
from mediafm_ray.models.options import FusionConfig

RECIPE = FusionConfig(modality_norm="none")
EQUAL = FusionConfig(modality_norm="l2", weights={"video": 1.0, "audio": 1.0, "text": 1.0})
WEIGHTED = FusionConfig()


def random_parts(shots: int = 7) -> dict[str, np.ndarray]:
    """Norms of about 16, 0.5 and 1, as those of the offline encoders; some shots lack a modality."""
    generator = np.random.default_rng(3)
    parts = {
        "video": generator.gamma(0.5, 1, (shots, 40)).astype(np.float32) * 3,
        "audio": generator.normal(size=(shots, 10)).astype(np.float32) * 0.2,
        "text": generator.normal(size=(shots, 6)).astype(np.float32) * 0.4,
    }
    parts["audio"][2] = 0
    parts["text"][[1, 4]] = 0
    return parts


def test_a_worked_example() -> None:
    parts = {"text": np.array([[12.0]], np.float32), "video": np.array([[3.0, 0.0]], np.float32), "audio": np.array([[4.0]], np.float32)}
    fused, norm = fuse(parts, RECIPE)
    assert norm.tolist() == [13.0]
    np.testing.assert_allclose(fused, [[3 / 13, 0, 4 / 13, 12 / 13]], rtol=1e-7)  # video, audio, text, whatever the mapping's order
    fused, norm = fuse(parts, EQUAL)
    np.testing.assert_allclose(norm, [np.sqrt(3)], rtol=1e-7)
    np.testing.assert_allclose(fused, np.array([[1, 0, 1, 1]]) / np.sqrt(3), rtol=1e-6)


def test_spans_are_half_open_and_in_the_order_of_the_modalities() -> None:
    assert spans({"text": 384, "audio": 192, "video": 1280}) == {"video": (0, 1280), "audio": (1280, 1472), "text": (1472, 1856)}
    assert spans({"text": 5, "video": 3}) == {"video": (0, 3), "text": (3, 8)}


@pytest.mark.parametrize("config", [RECIPE, EQUAL, WEIGHTED])
def test_fused_vectors_have_unit_norm_and_types(config: FusionConfig) -> None:
    fused, norm = fuse(random_parts(), config)
    assert fused.dtype == norm.dtype == np.float32
    assert fused.shape == (7, 56)
    assert norm.shape == (7,)
    np.testing.assert_allclose(np.linalg.norm(fused.astype(np.float64), axis=1), 1, atol=1e-6)


def test_the_parts_come_back() -> None:
    parts = random_parts()
    back = split(*fuse(parts, RECIPE), spans({name: part.shape[1] for name, part in parts.items()}))
    assert list(back) == ["video", "audio", "text"]
    for name, part in parts.items():
        assert back[name].dtype == np.float32
        np.testing.assert_allclose(back[name], part, rtol=3e-7, atol=0)  # two roundings of 2 ** -24, zeros exactly
    assert not back["audio"][2].any()


def test_with_l2_every_present_modality_counts_alike() -> None:
    parts = random_parts()
    back = split(*fuse(parts, EQUAL), spans({name: part.shape[1] for name, part in parts.items()}))
    for name, part in parts.items():
        present = part.any(axis=1)
        np.testing.assert_allclose(np.linalg.norm(back[name], axis=1), present, atol=1e-6)
        cosine = (back[name] * part).sum(axis=1)[present] / np.linalg.norm(part[present], axis=1)
        np.testing.assert_allclose(cosine, 1, atol=1e-6)


def test_a_caption_more_or_less_moves_a_shot_less_where_text_weighs_less() -> None:
    part = np.ones((2, 4), np.float32)
    parts = {"video": part, "audio": part, "text": part * [[1], [0]]}
    cosine = {}
    for weight in (1.0, 0.5):
        fused, _ = fuse(parts, FusionConfig(weights={"video": 1.0, "audio": 1.0, "text": weight}))
        cosine[weight] = float(fused[0] @ fused[1])
        assert cosine[weight] == pytest.approx(np.sqrt(2 / (2 + weight**2)))
    back = split(*fuse(random_parts(), WEIGHTED), {"video": (0, 40), "audio": (40, 50), "text": (50, 56)})
    for name, norm in (("video", 1.0), ("audio", 0.5), ("text", 0.5)):
        np.testing.assert_allclose(np.linalg.norm(back[name], axis=1), norm * random_parts()[name].any(axis=1), atol=1e-6)


def test_weights_are_no_part_of_the_recipe_where_they_do_not_count() -> None:
    assert fusion_recipe(RECIPE) == {"modality_norm": "none"}
    assert fusion_recipe(EQUAL) != fusion_recipe(WEIGHTED)


@pytest.mark.parametrize("config", [RECIPE, EQUAL, WEIGHTED])
def test_a_shot_with_nothing_stays_zero_and_finite(config: FusionConfig) -> None:
    parts = {name: np.zeros_like(part) for name, part in random_parts().items()}
    fused, norm = fuse(parts, config)
    assert not fused.any()
    assert not norm.any()


def test_neighbours_leave_no_trace() -> None:
    parts = random_parts()
    fused, norm = fuse(parts, RECIPE)
    for shot in range(7):
        alone, alone_norm = fuse({name: part[shot : shot + 1] for name, part in parts.items()}, RECIPE)
        assert alone.tobytes() == fused[shot].tobytes()
        assert alone_norm.tobytes() == norm[shot].tobytes()


def test_very_large_and_small_embeddings_survive() -> None:
    for scale in (1e-30, 1e30):
        parts = {name: (part * np.float32(scale)).astype(np.float32) for name, part in random_parts().items()}
        fused, norm = fuse(parts, RECIPE)
        assert np.isfinite(norm).all()
        np.testing.assert_allclose(np.linalg.norm(fused, axis=1), 1, atol=1e-6)


def test_no_shots() -> None:
    fused, norm = fuse({name: part[:0] for name, part in random_parts().items()}, RECIPE)
    assert fused.shape == (0, 56)
    assert norm.shape == (0,)


def test_mistakes_are_named() -> None:
    parts = random_parts()
    with pytest.raises(ValueError, match="modality_norm must be one of none, l2, is 'L2'"):
        FusionConfig(modality_norm="L2")
    for weights in (
        {},
        {"video": 1.0, "audio": 1.0},
        {"video": 1.0, "audio": 0.0, "text": 1.0},
        {"video": 1.0, "audio": float("nan"), "text": 1.0},
    ):
        with pytest.raises(ValueError, match=r"weights must (be above 0|have the keys video, audio, text)"):
            FusionConfig(weights=weights)
    with pytest.raises(ValueError, match="'audio': 6"):
        fuse({**parts, "audio": parts["audio"][:6]}, RECIPE)
    with pytest.raises(ValueError, match=r"unknown modalities \['smell'\]"):
        fuse({**parts, "smell": parts["audio"]}, RECIPE)
    parts["text"][3, 2] = np.inf
    with pytest.raises(ValueError, match="text embedding of shot 3 is not finite"):
        fuse(parts, RECIPE)
