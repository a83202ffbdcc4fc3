"""Which titles, windows and masks a step sees: pure functions of the seed and the step, so that a resumed training goes on as before.

    titles -- shuffled anew every epoch --> stream -- sorted by size in pools of steps --> steps of windows of like length

No step depends on how many workers share it: they take every so many-th window of it. numpy only.

Shapes
    N  titles that are trained on
    B  windows of a step
    S  shots of a title, or of a window of it
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

MAX_POOL_STEPS = 16  # steps whose windows are sorted by size together: more waste less on padding, and mix less
ORDER, POOL, WINDOW, HELD_OUT, DROPOUT, CUT_AWAYS = range(6)  # streams of random numbers


def random_of(seed: int, stream: int, *place: int) -> np.random.Generator:
    """The generator of one decision: the same numbers for the same seed, stream and place, independent of every other."""
    return np.random.default_rng([seed, stream, *place])


def split_titles(keys: Sequence[str], fraction: float, most_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (int64, rising) of the titles to train on and of those to evaluate on, by a hash of each title's key (its id).

    About ``fraction`` of the titles are held out; of them the ``most_held_out`` with the lowest hashes are evaluated on, and the others
    are not used at all. A title keeps its side while the catalog grows. Of two titles or more one at least is held out and one at
    least is trained on; a single title is trained on. ``fraction`` 0 holds out none.
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
    """Which titles a step takes. What it answers depends on its arguments only, never on what it was asked before."""

    def __init__(self, seed: int, sizes_N: np.ndarray, windows: int):
        """``sizes_N``: anything that grows with a title's shots, such as the bytes of its object; only its order matters, and only for
        how little is padded. ``windows``: of a step.
        """
        if len(sizes_N) == 0:
            raise ValueError("there is no title to train on")
        self.seed, self.sizes_N, self.windows = seed, np.asarray(sizes_N), windows
        # a part of an epoch at most: else the same titles would meet again and again, or a step be of one title
        self.pool_steps = max(1, min(MAX_POOL_STEPS, len(sizes_N) // (4 * windows)))
        self._epoch = lru_cache(maxsize=4)(self._order_of_epoch)
        self._pool = lru_cache(maxsize=2)(self._steps_of_pool)

    def titles(self, step: int) -> np.ndarray:
        """(B,) int64: indices of the titles of a step, one window of each, by rising size. Every title is taken once an epoch."""
        pool, within = divmod(step, self.pool_steps)
        return self._pool(pool)[within]

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return random_of(self.seed, ORDER, epoch).permutation(len(self.sizes_N))

    def _steps_of_pool(self, pool: int) -> np.ndarray:
        """(steps of the pool, B) int64: the titles of a pool's steps."""
        count = self.pool_steps * self.windows
        epochs, within = np.divmod(np.arange(pool * count, (pool + 1) * count), len(self.sizes_N))
        chosen = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            chosen[epochs == epoch] = self._epoch(int(epoch))[within[epochs == epoch]]
        by_size = chosen[np.argsort(self.sizes_N[chosen], kind="stable")].reshape(self.pool_steps, self.windows)
        return by_size[random_of(self.seed, POOL, pool).permutation(self.pool_steps)]


def window_start(random: np.random.Generator, shots: int, longest: int) -> int:
    """Where a window of at most ``longest`` shots begins in a title: anywhere, all places alike."""
    return int(random.integers(0, shots - longest + 1)) if shots > longest else 0


def masked_shots(random: np.random.Generator, usable_S: np.ndarray, fraction: float) -> np.ndarray:
    """(S,) bool: the shots to hide: ``fraction`` of a window's, rounded, at least one, at random among those that can be predicted.

    ``usable_S``: False where a shot has no embedding (no modality was present), which nobody can predict.
    """
    candidates = np.flatnonzero(usable_S)
    count = min(len(candidates), max(1, round(fraction * len(usable_S))))
    masked_S = np.zeros(len(usable_S), bool)
    masked_S[random.choice(candidates, count, replace=False)] = True
    return masked_S
