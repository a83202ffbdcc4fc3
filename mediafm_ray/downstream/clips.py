"""A clip's vector from the vectors of its title's shots. numpy only.

Shapes
    S  shots
    D  dimension of an embedding
"""

from __future__ import annotations

import numpy as np

SLACK_S = 1.0  # seconds that a clip may reach beyond its title: people round
MEAN_REACH = 2  # shots before and after in the mean of neighbours
NO_DIRECTION = 1e-6  # norm of a mean of unit vectors below which it is rounding, not a direction


def mean_of_neighbours(vectors_SD: np.ndarray) -> np.ndarray:
    """(S, D) float32 mean of each shot and those up to MEAN_REACH before and after it: the context that costs nothing."""
    place_S, shots = np.arange(len(vectors_SD)), len(vectors_SD)
    first_S, end_S = np.maximum(place_S - MEAN_REACH, 0), np.minimum(place_S + MEAN_REACH + 1, shots)
    sums_SD = np.concatenate([np.zeros((1, vectors_SD.shape[1])), np.cumsum(vectors_SD, axis=0, dtype=np.float64)])
    return ((sums_SD[end_S] - sums_SD[first_S]) / (end_S - first_S)[:, None]).astype(np.float32)


def clip_overlaps(start_S: np.ndarray, end_S: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    """(S,) float64 seconds of each shot that lie in the clip ``[start_s, end_s)``.

    ``start_S`` and ``end_S``: the shots of the whole title, in order. Raises ValueError for a clip that is empty or not inside the title.
    """
    if not start_s < end_s:  # NaN too
        raise ValueError(f"the clip [{start_s:g}, {end_s:g}) s is empty: its end must come after its start")
    if len(start_S) == 0:
        raise ValueError("the title has no shots")
    first_s, last_s = float(start_S[0]), float(end_S[-1])
    overlaps_S = np.maximum(0.0, np.minimum(end_S, end_s) - np.maximum(start_S, start_s))
    if start_s < first_s - SLACK_S or end_s > last_s + SLACK_S or not overlaps_S.any():
        raise ValueError(f"the clip [{start_s:g}, {end_s:g}) s lies outside the title, which is [{first_s:g}, {last_s:g}) s")
    return overlaps_S


def pool_clip(start_S: np.ndarray, end_S: np.ndarray, vectors_SD: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    """(D,) float32 unit vector of the clip ``[start_s, end_s)``: the directions of its shots, each weighted by the seconds it has in it.

    Raises ValueError for a clip that is empty or not inside the title, and where the vectors have no common direction.
    """
    return pool_overlaps(clip_overlaps(start_S, end_S, start_s, end_s), vectors_SD)


def pool_overlaps(overlaps_S: np.ndarray, vectors_SD: np.ndarray) -> np.ndarray:
    """(D,) float32 unit vector: the mean direction of vectors, weighted. A zero vector has no direction and no say.

    Raises ValueError where nothing is left: the directions cancel out, or there is none.
    """
    if vectors_SD.shape[:1] != overlaps_S.shape:
        raise ValueError(f"{len(vectors_SD)} vectors for {len(overlaps_S)} shots")
    inside_S = overlaps_S > 0
    vectors_KD = vectors_SD[inside_S].astype(np.float64)
    norms_K = np.linalg.norm(vectors_KD, axis=1)
    weights_K = overlaps_S[inside_S] / overlaps_S.sum()
    pooled_D = np.divide(weights_K, norms_K, out=np.zeros_like(norms_K), where=norms_K > 0) @ vectors_KD
    norm = float(np.linalg.norm(pooled_D))
    if not norm > NO_DIRECTION:
        raise ValueError("the shots of the clip have no common direction: their vectors are zero, not finite, or cancel out")
    return (pooled_D / norm).astype(np.float32)
