"""Exact search, and the recall of another search. numpy only.

Shapes
    Q  queries
    N  vectors of a block
    K  results of a query
    D  dimension of a vector
"""

from __future__ import annotations

import numpy as np

from mediafm_ray.downstream.similarity import unit_vectors

COSINE_TOLERANCE = 1e-5  # float32 cosines differ by this if they are summed in another order.
NOTHING = -1  # Row of a missing result, if there are fewer vectors than results.


class ExactSearch:
    """A search for the vectors nearest to each query by cosine, over blocks of vectors that need not fit in memory together.

    It needs memory for a block, its cosines and Q x K results. Of equally near vectors, any may be among the K.
    """

    def __init__(self, queries_QD: np.ndarray, count: int):
        """Start a search. ``queries_QD`` need not have unit norm; a query without direction finds nothing."""
        self.queries_QD, self.present_Q = unit_vectors(np.asarray(queries_QD, np.float32))
        self.rows_QK = np.full((len(self.queries_QD), count), NOTHING, np.int64)
        self.cosine_QK = np.full((len(self.queries_QD), count), -np.inf, np.float32)

    def add(self, rows_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        """Search a block: vectors of any floating type and norm, and the int64 rows that identify them.

        A zero vector has no direction and is never found.
        """
        unit_ND, present_N = unit_vectors(np.asarray(vectors_ND, np.float32))
        cosine_QN = self.queries_QD @ unit_ND.T
        cosine_QN[:, ~present_N] = -np.inf
        cosine_QN[~self.present_Q] = -np.inf
        count = self.rows_QK.shape[1]
        if len(unit_ND) > count:  # Only the best of the block can be among the best of all.
            best_QK = np.sort(np.argpartition(-cosine_QN, count - 1, axis=1)[:, :count], axis=1)
            cosine_QN = np.take_along_axis(cosine_QN, best_QK, axis=1)
            rows_QN = np.asarray(rows_N, np.int64)[best_QK]
        else:
            rows_QN = np.broadcast_to(np.asarray(rows_N, np.int64), cosine_QN.shape)
        cosine_QN = np.concatenate([self.cosine_QK, cosine_QN], axis=1)
        rows_QN = np.concatenate([self.rows_QK, rows_QN], axis=1)
        order_QK = np.argsort(-cosine_QN, axis=1, kind="stable")[:, :count]
        self.cosine_QK = np.take_along_axis(cosine_QN, order_QK, axis=1)
        self.rows_QK = np.where(np.isfinite(self.cosine_QK), np.take_along_axis(rows_QN, order_QK, axis=1), NOTHING)


def recall(found_rows_QK: np.ndarray, found_cosine_QK: np.ndarray, true_cosine_QK: np.ndarray) -> float:
    """Return the share of the true K nearest that a search found, averaged over the queries; NaN if no query has a neighbour.

    A result counts if its cosine reaches that of the K-th true one, so that any of several equal vectors counts (the definition of
    ANN-Benchmarks: Aumueller, Bernhardsson and Faithfull 2018, arXiv:1807.05614). A repeated row counts once; if a query has fewer than K
    neighbours, their number replaces K. ``found_cosine_QK`` are the exact cosines of the results; NOTHING in the rows does not count.
    """
    shares = []
    for rows_K, cosine_K, true_K in zip(found_rows_QK, found_cosine_QK, true_cosine_QK, strict=True):
        wanted = int(np.isfinite(true_K).sum())
        if wanted:
            near_K = (rows_K != NOTHING) & (cosine_K >= true_K[wanted - 1] - COSINE_TOLERANCE)
            shares.append(min(len(np.unique(rows_K[near_K])), wanted) / wanted)
    return float(np.mean(shares)) if shares else float("nan")
