"""Guesses of masked shots without learning: the baselines that a contextualiser must beat. numpy only.

Shapes
    S  shots of a window
    K  masked shots of it, in order
    D  dimension of a fused embedding
"""

from __future__ import annotations

import numpy as np

BASELINES = ("title_mean", "nearest_shot", "interpolation")


def guess(name: str, fused_SD: np.ndarray, masked_S: np.ndarray) -> np.ndarray:
    """Return (K, D) float32 guesses of the masked shots from the others; zero if there are no others.

    ``title_mean``: the mean of the window's other shots. ``nearest_shot``: the nearest of them, the earlier of two equally near.
    ``interpolation``: linear in shots between the nearest before and after; at an end of the window, the nearest.
    """
    masked, seen = np.flatnonzero(masked_S), np.flatnonzero(~masked_S)
    if not len(seen):
        return np.zeros((len(masked), fused_SD.shape[1]), np.float32)
    if name == "title_mean":
        return np.repeat(fused_SD[seen].mean(axis=0, keepdims=True), len(masked), axis=0).astype(np.float32)
    after = np.searchsorted(seen, masked)
    right = seen[np.minimum(after, len(seen) - 1)]
    left = np.where(after > 0, seen[after - 1], right)
    right = np.where(right > masked, right, left)
    if name == "nearest_shot":
        return fused_SD[np.where(np.abs(masked - left) <= np.abs(right - masked), left, right)]
    if name == "interpolation":
        share = np.where(right == left, 0.0, (masked - left) / np.maximum(right - left, 1))[:, None]
        return ((1 - share) * fused_SD[left] + share * fused_SD[right]).astype(np.float32)
    raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, is {name!r}")


def cosines(guesses_KD: np.ndarray, truth_KD: np.ndarray) -> np.ndarray:
    """Return (K,) float64 cosines between rows; 0 if one of them is zero."""
    norms_K = np.linalg.norm(guesses_KD.astype(np.float64), axis=1) * np.linalg.norm(truth_KD.astype(np.float64), axis=1)
    products_K = np.einsum("kd,kd->k", guesses_KD.astype(np.float64), truth_KD.astype(np.float64))
    return np.divide(products_K, norms_K, out=np.zeros_like(products_K), where=norms_K > 0)
