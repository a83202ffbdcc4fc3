"""Titles, windows and masks of a step: pure functions of seed and step, so that a resumed training gives the same numbers.

    titles -- shuffled in every epoch --> stream -- sorted by size in pools of steps --> steps of windows of similar length

No step depends on the number of workers: worker r of n takes every n-th window from the r-th on. numpy only.

Shapes
    N  titles to train on
    B  windows of a step
    S  shots of a title, or of a window of it
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

MAX_POOL_STEPS = 16  # Windows of this many steps are sorted by size together: more give less padding, but mix titles less.
ORDER, POOL, WINDOW, HELD_OUT, DROPOUT, CUT_AWAYS = range(6)  # Streams of random numbers.


def random_of(seed: int, stream: int, *place: int) -> np.random.Generator:
    """Return the random generator of one decision, which depends only on seed, stream and place."""
    return np.random.default_rng([seed, stream, *place])


def split_titles(keys: Sequence[str], fraction: float, most_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices (int64, ascending) of the titles to train on and to evaluate on, by a hash of each title's key (its id).

    About ``fraction`` of the titles are held out; those ``most_held_out`` with the lowest hashes are evaluated on, the others are not
    used. A title keeps its side while the catalog grows. With two titles or more, at least one is held out and at least one is trained
    on; a single title is trained on. ``fraction`` 0 holds out none.
    """
    hashes = np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[8:16], "big") / 2**64 for key in keys])
    held_out = hashes < fraction
    if fraction > 0 and len(hashes) > 1:
        held_out[hashes.argmin()], held_out[hashes.argmax()] = True, False
    elif len(hashes) == 1:
        held_out[:] = False
    lowest = np.flatnonzero(held_out)[np.argsort(hashes[held_out], kind="stable")][:most_held_out]
    return np.flatnonzero(~held_out), np.sort(lowest)


class TitleOrder:
    """The titles of every step. Results depend only on the arguments, never on earlier calls."""

    def __init__(self, seed: int, sizes_N: np.ndarray, windows: int):
        """Take ``sizes_N``, any quantity that grows with the shots of a title (such as bytes of its object), and ``windows`` per step.

        Only the order of the sizes matters, and only for the amount of padding.
        """
        if len(sizes_N) == 0:
            raise ValueError("there is no title to train on")
        self.seed, self.sizes_N, self.windows = seed, np.asarray(sizes_N), windows
        # A pool is at most a quarter of an epoch: otherwise the same titles would share steps again and again.
        self.pool_steps = max(1, min(MAX_POOL_STEPS, len(sizes_N) // (4 * windows)))
        self._epoch = lru_cache(maxsize=4)(self._order_of_epoch)
        self._pool = lru_cache(maxsize=2)(self._steps_of_pool)

    def titles(self, step: int) -> np.ndarray:
        """Return (B,) int64, the titles of a step in ascending size, one window of each. Every title is taken once per epoch."""
        pool, within = divmod(step, self.pool_steps)
        return self._pool(pool)[within]

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return random_of(self.seed, ORDER, epoch).permutation(len(self.sizes_N))

    def _steps_of_pool(self, pool: int) -> np.ndarray:
        """Return (steps of the pool, B) int64, the titles of a pool's steps."""
        count = self.pool_steps * self.windows
        epochs, within = np.divmod(np.arange(pool * count, (pool + 1) * count), len(self.sizes_N))
        chosen = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            chosen[epochs == epoch] = self._epoch(int(epoch))[within[epochs == epoch]]
        by_size = chosen[np.argsort(self.sizes_N[chosen], kind="stable")].reshape(self.pool_steps, self.windows)
        return by_size[random_of(self.seed, POOL, pool).permutation(self.pool_steps)]


def window_start(random: np.random.Generator, shots: int, longest: int) -> int:
    """Draw the start of a window of at most ``longest`` shots in a title, uniformly."""
    return int(random.integers(0, shots - longest + 1)) if shots > longest else 0


def masked_shots(random: np.random.Generator, usable_S: np.ndarray, fraction: float) -> np.ndarray:
    """Draw the shots to hide, (S,) bool: ``fraction`` of a window's shots, rounded, at least one, among the usable ones.

    ``usable_S`` is False for a shot without embedding (no modality was present), which cannot be predicted.
    """
    candidates = np.flatnonzero(usable_S)
    count = min(len(candidates), max(1, round(fraction * len(usable_S))))
    masked_S = np.zeros(len(usable_S), bool)
    masked_S[random.choice(candidates, count, replace=False)] = True
    return masked_S
