"""Cosines between the shots of one title: the nearest shots of each shot, and a map of all pairs. numpy only.

Shapes
    S  shots of the title
    D  dimension of a vector
    K  neighbours of a shot
    N  cells along a side of the map, at most S
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROWS_AT_ONCE = 1024  # Shots whose cosines to all others are in memory together.
MIN_NORM = 1e-12  # A shorter vector has no direction: the modality is absent.
UNDEFINED = 0  # Code of a cell without a pair of shots that have vectors.
LEVELS = 255  # Other cells have codes from 1 to 255.
CLIPPED_PERCENT = 1.0  # Cells clipped at either end of the scale, so that one black frame does not flatten all differences.


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest other shots of each shot, nearest first; of equally near shots, the earlier first."""

    index_SK: np.ndarray  # int32; -1 if there are fewer
    cosine_SK: np.ndarray  # float32; NaN if there are fewer


@dataclass(frozen=True, eq=False)
class SimilarityMap:
    """Mean cosines between runs of shots as codes: 0 is undefined, 1 to 255 are linear from ``low`` to ``high``."""

    code_NN: np.ndarray  # uint8
    first_N: np.ndarray  # int32, first shot of each cell's run; the last run ends with the title
    low: float
    high: float


def unit_vectors(vectors_SD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (S, D) float32 vectors scaled to norm 1, and (S,) bool, True for those with a direction; the others are zero."""
    norm_S = np.linalg.norm(vectors_SD, axis=1)
    present_S = norm_S > MIN_NORM
    return np.divide(vectors_SD, norm_S[:, None], out=np.zeros_like(vectors_SD, np.float32), where=present_S[:, None]), present_S


def nearest_shots(vectors_SD: np.ndarray, count: int) -> Neighbours:
    """Return the ``count`` nearest other shots of each by cosine; shots without a vector have no neighbours and are none."""
    unit_SD, present_S = unit_vectors(vectors_SD)
    shots = len(unit_SD)
    kept = max(min(count, shots - 1), 0)
    index_SK, cosine_SK = nearest_rows(unit_SD, np.arange(shots), kept, ROWS_AT_ONCE, present_S)
    found_SK = np.isfinite(cosine_SK)
    return Neighbours(np.where(found_SK, index_SK, -1).astype(np.int32), np.where(found_SK, cosine_SK, np.float32(np.nan)))


def nearest_rows(
    unit_SD: np.ndarray, rows_Q: np.ndarray, count: int, rows_at_once: int, present_S: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the (Q, K) int64 rows nearest to each of the given rows, except itself, and their float32 cosines.

    Of equally near rows, the earlier comes first. All cosines with a row that is not present are minus infinity.
    """
    index_QK = np.empty((len(rows_Q), count), np.int64)
    cosine_QK = np.empty((len(rows_Q), count), np.float32)
    for begin in range(0, len(rows_Q) if count else 0, rows_at_once):
        rows_B = rows_Q[begin : begin + rows_at_once]
        cosine_BS = unit_SD[rows_B] @ unit_SD.T
        if present_S is not None:
            cosine_BS[:, ~present_S] = -np.inf
            cosine_BS[~present_S[rows_B]] = -np.inf
        cosine_BS[np.arange(len(rows_B)), rows_B] = -np.inf  # A row is not its own neighbour.
        order_BK = np.argsort(-cosine_BS, axis=1, kind="stable")[:, :count]
        index_QK[begin : begin + len(rows_B)] = order_BK
        cosine_QK[begin : begin + len(rows_B)] = np.take_along_axis(cosine_BS, order_BK, axis=1)
    return index_QK, cosine_QK


def similarity_map(vectors_SD: np.ndarray, most_cells: int) -> SimilarityMap:
    """Return the map of all pairs of shots. A title of more than ``most_cells`` shots is divided into runs of nearly equal length.

    The mean cosine of two runs is the product of their mean unit vectors; shots without a vector are excluded from the means.
    """
    unit_SD, present_S = unit_vectors(vectors_SD)
    cells = min(len(unit_SD), most_cells)
    first_N = (np.arange(cells) * len(unit_SD) // max(cells, 1)).astype(np.int32)
    if cells == 0:
        return SimilarityMap(np.zeros((0, 0), np.uint8), first_N, 0.0, 1.0)
    count_N = np.add.reduceat(present_S.astype(np.float32), first_N)
    mean_ND = np.add.reduceat(unit_SD, first_N, axis=0) / np.maximum(count_N, 1)[:, None]
    cosine_NN = mean_ND @ mean_ND.T
    defined_NN = (count_N[:, None] > 0) & (count_N[None] > 0)
    apart = cosine_NN[defined_NN & ~np.eye(cells, dtype=bool)]
    low, high = (float(bound) for bound in np.percentile(apart, [CLIPPED_PERCENT, 100 - CLIPPED_PERCENT])) if len(apart) else (0.0, 1.0)
    share_NN = np.clip((cosine_NN - low) / max(high - low, MIN_NORM), 0, 1)
    code_NN = np.where(defined_NN, 1 + np.rint(share_NN * (LEVELS - 1)), UNDEFINED).astype(np.uint8)
    return SimilarityMap(code_NN, first_N, low, high)
