"""A title as one row: its vector, how long and how quickly cut it is, how much is said in it; and the titles nearest to it. numpy only.

Shapes
    S  shots of a title
    T  titles
    N  nearest titles asked for
    D  dimension of an embedding
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mediafm_ray.downstream.clips import pool_overlaps
from mediafm_ray.downstream.similarity import nearest_rows

BLOCK_VALUES = 4_000_000  # cosines held at once
UNSUPPORTED = re.compile(r"\[[^\]]*\]|\([^)]*\)|[♪♫][^♪♫]*[♪♫]?|[♪♫]")  # how captions write sounds, manner and song


def pool_title(start_S: np.ndarray, end_S: np.ndarray, vectors_SD: np.ndarray) -> np.ndarray:
    """(D,) float32 unit vector of a title: the mean direction of its shots, each weighted by its seconds.

    ``start_S``, ``end_S``: float64 seconds. Raises ValueError where nothing is left: zero vectors, or directions that cancel out.
    """
    return pool_overlaps(end_S - start_S, vectors_SD)


def share_of(seconds_S: np.ndarray, present_S: np.ndarray) -> float:
    """The share of a title's duration that lies in the shots where something is present (bool); 0 for a title without duration."""
    total = float(seconds_S.sum())
    return float(seconds_S[present_S].sum()) / total if total > 0 else 0.0


def is_speech(text: str) -> bool:
    """Whether timed text has words that are spoken: letters or digits outside of [sounds], (manner) and songs between notes."""
    return any(character.isalnum() for character in UNSUPPORTED.sub(" ", text))


def nearest_titles(vectors_TD: np.ndarray, count: int, queries: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The rows (Q, N) int64 of the titles nearest to each of Q, and their cosines (Q, N) float32; nearest first, of two alike the earlier.

    ``vectors_TD`` need not have unit norm; a zero vector has cosine 0 with all. ``queries``: row numbers, all by default; no title is near
    itself. N is ``count``, or what there is. Exact: O(Q T D), in blocks of queries.
    """
    vectors_TD = np.asarray(vectors_TD, np.float32)
    norm_T = np.linalg.norm(vectors_TD, axis=1, keepdims=True)
    unit_TD = np.divide(vectors_TD, norm_T, out=np.zeros_like(vectors_TD), where=norm_T > 0)
    rows_Q = np.arange(len(unit_TD)) if queries is None else np.asarray(queries, np.int64)
    count = max(0, min(count, len(unit_TD) - 1))
    return nearest_rows(unit_TD, rows_Q, count, max(1, BLOCK_VALUES // max(1, len(unit_TD))))
