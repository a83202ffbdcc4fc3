"""Vectors of clips from the vectors of their title's shots. numpy only.

Shapes
    S  shots
    D  dimension of an embedding
"""

from __future__ import annotations

import numpy as np

MAX_OVERHANG_S = 1.0  # A clip may exceed its title by this much, because people round times.
MEAN_REACH = 2  # Shots before and after that are in the mean of neighbours.
MIN_MEAN_NORM = 1e-6  # A mean of unit vectors with a smaller norm is rounding, not a direction.


def mean_of_neighbours(vectors_SD: np.ndarray) -> np.ndarray:
    """Return the (S, D) float32 mean of each shot and up to MEAN_REACH shots before and after it, a context without training."""
    place_S, shots = np.arange(len(vectors_SD)), len(vectors_SD)
    first_S, end_S = np.maximum(place_S - MEAN_REACH, 0), np.minimum(place_S + MEAN_REACH + 1, shots)
    sums_SD = np.concatenate([np.zeros((1, vectors_SD.shape[1])), np.cumsum(vectors_SD, axis=0, dtype=np.float64)])
    return ((sums_SD[end_S] - sums_SD[first_S]) / (end_S - first_S)[:, None]).astype(np.float32)


def clip_overlaps(start_S: np.ndarray, end_S: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    """Return the (S,) float64 seconds of each shot that are inside the clip ``[start_s, end_s)``.

    ``start_S`` and ``end_S`` are of all shots of the title, in order. Raises ValueError for a clip that is empty or outside the title.
    """
    if not start_s < end_s:  # This is also true for NaN.
        raise ValueError(f"the clip [{start_s:g}, {end_s:g}) s is empty: its end must be after its start")
    if len(start_S) == 0:
        raise ValueError("the title has no shots")
    first_s, last_s = float(start_S[0]), float(end_S[-1])
    overlaps_S = np.maximum(0.0, np.minimum(end_S, end_s) - np.maximum(start_S, start_s))
    if start_s < first_s - MAX_OVERHANG_S or end_s > last_s + MAX_OVERHANG_S or not overlaps_S.any():
        raise ValueError(f"the clip [{start_s:g}, {end_s:g}) s is outside the title, which is [{first_s:g}, {last_s:g}) s")
    return overlaps_S


def pool_clip(start_S: np.ndarray, end_S: np.ndarray, vectors_SD: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    """Return the (D,) float32 unit vector of the clip ``[start_s, end_s)``: the mean direction of its shots, weighted by their overlap.

    Raises ValueError for a clip that is empty or outside the title, or if the vectors have no common direction.
    """
    return pool_overlaps(clip_overlaps(start_S, end_S, start_s, end_s), vectors_SD)


def pool_overlaps(overlaps_S: np.ndarray, vectors_SD: np.ndarray) -> np.ndarray:
    """Return the (D,) float32 unit vector of the weighted mean direction; zero vectors have no direction and no weight.

    Raises ValueError if the directions cancel out or there are none.
    """
    if vectors_SD.shape[:1] != overlaps_S.shape:
        raise ValueError(f"{len(vectors_SD)} vectors for {len(overlaps_S)} shots")
    inside_S = overlaps_S > 0
    vectors_KD = vectors_SD[inside_S].astype(np.float64)
    norms_K = np.linalg.norm(vectors_KD, axis=1)
    weights_K = overlaps_S[inside_S] / overlaps_S.sum()
    pooled_D = np.divide(weights_K, norms_K, out=np.zeros_like(norms_K), where=norms_K > 0) @ vectors_KD
    norm = float(np.linalg.norm(pooled_D))
    if not norm > MIN_MEAN_NORM:
        raise ValueError("the shots of the clip have no common direction: their vectors are zero, not finite, or cancel out")
    return (pooled_D / norm).astype(np.float32)
