"""Loudness curve of a shot for people, small enough to be stored beside the vectors. numpy only."""

from __future__ import annotations

import numpy as np

from mediafm_ray.spec import SAMPLE_RATE

LEVELS_PER_SECOND = 10
FULL_SCALE = 32_768  # an int16 sample of 0 dBFS
LOWEST_LEVEL = -96  # dBFS: the value of digital silence, below the rounding of 16 bits
BLOCK_LEVELS = 600  # levels computed at once: a minute of samples as int64 is 8 MB at 16 kHz


def audio_levels(samples_N: np.ndarray, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return the root mean square of each 0.1 s of (N,) int16 samples in whole dBFS: (ceil(10 N / rate),) int8 of -96 to 0.

    The last piece is shorter; a rate is divisible by 10.
    0 dBFS is a constant signal at full scale, so a sine that just does not clip has -3. Sums are of integers: exact on every machine.
    """
    size = sample_rate // LEVELS_PER_SECOND
    starts = range(0, len(samples_N), size * BLOCK_LEVELS)
    parts = [_levels_of_block(samples_N[start : start + size * BLOCK_LEVELS], size) for start in starts]
    return np.concatenate([np.zeros(0, np.int8), *parts])


def _levels_of_block(samples_N: np.ndarray, size: int) -> np.ndarray:
    starts = np.arange(0, len(samples_N), size)
    energies = np.add.reduceat(np.square(samples_N, dtype=np.int64), starts)
    counts = np.diff([*starts, len(samples_N)])
    floor = FULL_SCALE**2 * 10 ** (LOWEST_LEVEL / 10)
    return np.rint(10 * np.log10(np.maximum(energies / counts, floor) / FULL_SCALE**2)).astype(np.int8)
