"""Scenes of a title: the segmentation of its shots that minimises the scatter within scenes plus a penalty for every boundary. numpy only.

The method is kernel change-point detection (Harchaoui and Cappe 2007; Arlot, Celisse and Harchaoui, "A Kernel Multiple Change-point
Algorithm via Model Selection", JMLR 20(162), 2019), with the linear kernel on the directions of the shots' vectors. For a segmentation m

    objective(m) = sum over scenes of sum over shots ||x - mean of the scene||^2  +  price * (scenes - 1)

is minimised exactly by dynamic programming in O(S^2) (Jackson et al. 2005, "An algorithm for optimal partitioning"). It is the grouping of
Rotman, Porat and Ashour (2017, "Optimal sequential grouping") with distances within a scene divided by the scene's length, which removes
that method's preference for scenes of equal length. The shots of a dialogue, A B A B, scatter widely about their mean, but equally
throughout the scene, so no boundary pays there; a mean that all shots of a title share does not affect the scatter.

The price determines the number of scenes. If the title is one scene, a boundary at a given place reduces the scatter by a multiple of a
chi-squared variable with as many degrees of freedom as the noise has dimensions; the price is hardly exceeded by the best of the S - 1
places (the form of Birge and Massart 2001, "Gaussian model selection", J. Eur. Math. Soc. 3, and of Arlot et al., Theorem 2):

    price = v * (1 + sqrt(2 log(S) / d))^2

    v  variance of a shot about its scene, from the differences between shots one and two places apart (von Neumann 1941), which do not
       depend on the scene's mean; both lags together are right for shots in any order and for the strict alternation of a dialogue
    d  effective dimension of that noise, trace(C)^2 / trace(C^2) (Box 1954) of its covariance C

so no constant is tuned to a corpus. ``penalty`` multiplies the price: above 1 gives fewer scenes, below 1 more.

This price assumes that the shots of a scene are independent about its mean. Contextual vectors are not: attention is a low-pass filter,
and a slowly varying scatter looks like scenes. The lag-1 correlation r of an AR(1) process is estimated from the differences between shots
one and two places apart (their ratio is 1 + r), within the scenes of a first segmentation, because boundaries between scenes look like
correlation; then the price is multiplied and the title segmented again. For a mean over infinitely many shots, the variance grows by
(1 + r) / (1 - r) (Bartlett 1946), and the differences show 1 - (r + r^2) / 2 of it. Scenes are short, and the whole factor removes true
boundaries, so the price is multiplied by its square root, half way between none and all (benchmarks/films.py). Negative correlation, as
in a dialogue, changes nothing.

Shapes
    S  shots
    D  dimension of an embedding
    K  scenes
    B  rows of a block
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mediafm_ray.downstream.options import ScenesConfig

LAGS = (1, 2)  # The noise is estimated from differences between shots this far apart.
MAX_DIFFERENCES = 512  # Differences of each lag, evenly spread, that give the effective dimension.
BLOCK_ROWS = 512  # Rows of the Gram matrix in memory at once, so that a title of any length fits.
MIN_DIFFERENCES = 4  # Fewer differences of a lag within scenes give no estimate of the correlation.
MAX_CORRELATION = 0.8  # A mean over five shots has this correlation; more would not be noise.
ROUNDING = 1e-9  # float32 unit vectors with a smaller squared distance are equal.


@dataclass(frozen=True, eq=False)
class Scenes:
    """The scenes of a title, in order; they tile its shots.

    The score of a scene belongs to the boundary at its start: the growth of the scatter without that boundary, divided by the price. It
    is at least 1, larger for clearer boundaries, and 0 for the first scene, which starts with the title.
    """

    first_K: np.ndarray  # int32, first shot of each scene
    last_K: np.ndarray  # int32, last shot of each scene, inclusive
    score_K: np.ndarray  # float32

    def __len__(self) -> int:
        return len(self.first_K)


def find_scenes(vectors_SD: np.ndarray, config: ScenesConfig | None = None) -> Scenes:
    """Find the scenes of a title from the (S, D) vectors of its shots, fused or contextual.

    Only directions matter: a vector may have any norm; a zero vector is a shot without information. Takes O(S^2) time, and O(S) memory
    besides the vectors. Raises ValueError for no shots or values that are not finite.
    """
    config = config or ScenesConfig()
    centred_SD = centred_directions(vectors_SD)
    price = max(config.penalty * boundary_price(centred_SD), ROUNDING)
    first_K, merged_K = optimal_segmentation(centred_SD, price)
    factor = correlation_factor(centred_SD, first_K)
    if factor > 1:
        price *= factor
        first_K, merged_K = optimal_segmentation(centred_SD, price)
    last_K = np.append(first_K[1:], len(centred_SD)) - 1
    return Scenes(first_K.astype(np.int32), last_K.astype(np.int32), (merged_K / price).astype(np.float32))


def centred_directions(vectors_SD: np.ndarray) -> np.ndarray:
    """Return float64 unit vectors minus their mean: the mean does not change the scatter, and sums are more exact without it."""
    if vectors_SD.ndim != 2 or not len(vectors_SD):
        raise ValueError(f"scenes need the (S, D) vectors of at least one shot, not an array of shape {vectors_SD.shape}")
    vectors_SD = vectors_SD.astype(np.float64)
    if not np.isfinite(vectors_SD).all():
        raise ValueError(f"the vector of shot {int(np.argmin(np.isfinite(vectors_SD).all(axis=1)))} is not finite")
    norm_S = np.linalg.norm(vectors_SD, axis=1, keepdims=True)
    directions_SD = np.divide(vectors_SD, norm_S, out=np.zeros_like(vectors_SD), where=norm_S > 0)
    return directions_SD - directions_SD.mean(axis=0)


def boundary_price(vectors_SD: np.ndarray) -> float:
    """Return the reduction of the scatter that makes a boundary more than noise (see the module); 0 for one shot or equal shots."""
    shots = len(vectors_SD)
    variances, squares = [], []
    for lag in LAGS:
        if lag < shots:
            differences_ND = (vectors_SD[lag:] - vectors_SD[:-lag]) / np.sqrt(2)
            variances.append(float(np.einsum("nd,nd->", differences_ND, differences_ND)) / len(differences_ND))
            squares += _squared_covariance(differences_ND, lag)
    if not variances:
        return 0.0
    variance = float(np.mean(variances))
    square = float(np.mean(squares)) if squares else variance**2  # With too few shots, assume one dimension, which gives the highest price.
    dimension = max(1.0, variance**2 / square) if square > 0 else 1.0
    return variance * (1 + np.sqrt(2 * np.log(shots) / dimension)) ** 2


def correlation_factor(vectors_SD: np.ndarray, first_K: np.ndarray) -> float:
    """Return the factor on the price for noise that is correlated from shot to shot (see the module); 1 if it is not."""
    scene_S = np.searchsorted(first_K, np.arange(len(vectors_SD)), side="right")
    variances = []
    for lag in LAGS:
        inside = scene_S[lag:] == scene_S[:-lag]
        if np.count_nonzero(inside) < MIN_DIFFERENCES:
            return 1.0
        variances.append(float(np.mean(np.sum((vectors_SD[lag:] - vectors_SD[:-lag])[inside] ** 2, axis=1))))
    if not variances[0] > ROUNDING:
        return 1.0
    correlation = min(max(variances[1] / variances[0] - 1, 0.0), MAX_CORRELATION)
    return float(np.sqrt((1 + correlation) / (1 - correlation) / (1 - (correlation + correlation**2) / 2)))


def _squared_covariance(differences_ND: np.ndarray, lag: int) -> list[float]:
    """Estimate trace(C^2) without bias: the mean squared product of differences that share no shot; empty if all share one."""
    places = np.unique(np.linspace(0, len(differences_ND) - 1, min(len(differences_ND), MAX_DIFFERENCES)).round().astype(np.int64))
    products = differences_ND[places] @ differences_ND[places].T
    apart = np.abs(places[:, None] - places[None])
    independent = (apart != 0) & (apart != lag)
    return [float(np.mean(products[independent] ** 2))] if independent.any() else []


def optimal_segmentation(vectors_SD: np.ndarray, price: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the (K,) int64 first shots of the segments that minimise scatter + price * (segments - 1), and the gain of each boundary.

    The gain (K,) float64 of the boundary at a segment's start is the growth of the scatter if it is merged with the previous segment; 0 for
    the first. Of segmentations with equal objective, the one with the longest last segments is returned.

    With g the Gram matrix, the scatter of shots [a, b) is sum g[i, i] - sum g[i, j] / (b - a): both sums are differences of running sums,
    whose row b is computed from row b - 1 and row b - 1 of g. Row by row, best[b] = min over a of best[a] + scatter(a, b) + price.
    """
    shots = len(vectors_SD)
    square = np.zeros(shots + 1)  # [b]: sum of the squared norms of the first b shots
    square[1:] = np.cumsum(np.einsum("sd,sd->s", vectors_SD, vectors_SD))
    corner = np.zeros(shots + 1)  # [b]: sum of g[:b, :b]
    beside = np.zeros(shots + 1)  # [a]: sum of g[:b, :a] for the current row b
    best = np.zeros(shots + 1)
    best[0] = -price  # The first segment has no boundary.
    came_from = np.zeros(shots + 1, np.int64)
    for block in range(0, shots, BLOCK_ROWS):
        gram_BS = vectors_SD[block : block + BLOCK_ROWS] @ vectors_SD[: block + BLOCK_ROWS].T
        for end, gram_S in enumerate(gram_BS, start=block + 1):
            row = np.cumsum(gram_S[:end])
            beside[1:end] += row[:-1]
            beside[end] = corner[end] = corner[end - 1] + 2 * row[-1] - gram_S[end - 1]
            inside = corner[end] - 2 * beside[:end] + corner[:end]
            value = best[:end] + square[end] - square[:end] - inside / np.arange(end, 0, -1)
            start = int(np.argmin(value))
            best[end], came_from[end] = value[start] + price, start
    starts = [int(came_from[shots])]
    while starts[-1]:
        starts.append(int(came_from[starts[-1]]))
    first_K = np.array(starts[::-1], np.int64)
    return first_K, _gains(vectors_SD, first_K)


def _gains(vectors_SD: np.ndarray, first_K: np.ndarray) -> np.ndarray:
    """Return the growth of the scatter if a segment joins the previous one: |A||B| / (|A| + |B|) * ||mean A - mean B||^2 (Ward 1963)."""
    length_K = np.diff(np.append(first_K, len(vectors_SD)))
    mean_KD = np.add.reduceat(vectors_SD, first_K) / length_K[:, None]
    gain_K = np.zeros(len(first_K))
    weight = length_K[1:] * length_K[:-1] / (length_K[1:] + length_K[:-1])
    gain_K[1:] = weight * np.sum((mean_KD[1:] - mean_KD[:-1]) ** 2, axis=1)
    return gain_K
