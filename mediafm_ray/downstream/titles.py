"""Vector, coverage and nearest titles of a title. numpy only.

Shapes
    S  shots of a title
    T  titles
    N  nearest titles to find
    Q  queries
    D  dimension of an embedding
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mediafm_ray.downstream.clips import pool_overlaps
from mediafm_ray.downstream.similarity import nearest_rows, unit_vectors

BLOCK_VALUES = 4_000_000  # cosines that are in memory at once
NOT_SPEECH = re.compile(r"\[[^\]]*\]|\([^)]*\)|[♪♫][^♪♫]*[♪♫]?|[♪♫]")  # Captions write sounds, manner and songs in this way.


def pool_title(start_S: np.ndarray, end_S: np.ndarray, vectors_SD: np.ndarray) -> np.ndarray:
    """Return the (D,) float32 unit vector of a title: the mean direction of its shots, weighted by duration.

    ``start_S`` and ``end_S`` are float64 seconds. Raises ValueError if all vectors are zero or their directions cancel out.
    """
    return pool_overlaps(end_S - start_S, vectors_SD)


def share_of(seconds_S: np.ndarray, present_S: np.ndarray) -> float:
    """Return the share of a title's duration in the shots that are True in ``present_S``; 0 for a title without duration."""
    total = float(seconds_S.sum())
    return float(seconds_S[present_S].sum()) / total if total > 0 else 0.0


def is_speech(text: str) -> bool:
    """Return True if timed text has spoken words: letters or digits outside of [sounds], (manner) and songs between notes."""
    return any(character.isalnum() for character in NOT_SPEECH.sub(" ", text))


def nearest_titles(vectors_TD: np.ndarray, count: int, queries: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the (Q, N) int64 rows of the titles nearest to each query and their (Q, N) float32 cosines, nearest first.

    Of equally near titles, the earlier comes first. ``vectors_TD`` need not have unit norm; a zero vector has cosine 0 with all.
    ``queries`` are rows, all by default; a title is not its own neighbour. N is ``count`` or the number of other titles. The search is
    exact: O(Q T D), in blocks of queries.
    """
    unit_TD, _ = unit_vectors(np.asarray(vectors_TD, np.float32))
    rows_Q = np.arange(len(unit_TD)) if queries is None else np.asarray(queries, np.int64)
    count = max(0, min(count, len(unit_TD) - 1))
    return nearest_rows(unit_TD, rows_Q, count, max(1, BLOCK_VALUES // max(1, len(unit_TD))))
