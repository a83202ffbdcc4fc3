"""Log-mel statistics: an audio encoder without weights. Numpy only.

A shot's samples become the power in 64 mel bands every 10 ms (25 ms Hann windows), in decibels below full scale; the embedding
is, for each band, the mean, the standard deviation and the mean absolute change from one window to the next: the loudness and
colour of the sound, how much they vary, and how quickly. Such statistics are the classical baseline for acoustic scenes.

Scale. A level of -80 dB or less counts as -1, -40 dB as 0, 0 dB (a full-scale sine inside the band) as +1, so silence and loud
noise point in opposite directions rather than in nearly the same one. The whole is divided by 8 = sqrt(64), which makes the mean
a root-mean-square over bands: the norm of an embedding is of the order of 1, like that of a normalised sentence embedding,
so that no modality dominates the others when they are concatenated.

Shapes
    N  samples
    T  windows
    B  frequency bins, 257
    M  mel bands, 64
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mediafm_ray.models.encoder import LOG_MEL_DIM, Encoded
from mediafm_ray.models.options import AudioEncoderConfig
from mediafm_ray.spec import SAMPLE_RATE

WINDOW = SAMPLE_RATE * 25 // 1000  # samples
HOP = SAMPLE_RATE * 10 // 1000  # samples
FFT_SIZE = 512
LOWEST_HZ = 50.0
HIGHEST_HZ = SAMPLE_RATE / 2
FLOOR_DB = -80.0  # Quieter levels are raised to this: they are noise of 16-bit samples and of codecs.
MIDDLE_DB = -40.0  # This level becomes 0.
STATISTICS = ("mean", "standard deviation", "mean absolute change")
MEL_BANDS = LOG_MEL_DIM // len(STATISTICS)
WINDOWS_PER_CALL = 2048  # About 20 s: this bounds the memory of a long shot.


def mel_filters() -> np.ndarray:
    """Return triangular filters, (257, 64) float64, equally spaced on the mel scale ``2595 log10(1 + f / 700)``, each of peak 1."""
    lowest, highest = (2595 * np.log10(1 + hz / 700) for hz in (LOWEST_HZ, HIGHEST_HZ))
    corners_hz = 700 * (10 ** (np.linspace(lowest, highest, MEL_BANDS + 2) / 2595) - 1)
    bins_hz = np.arange(FFT_SIZE // 2 + 1) * (SAMPLE_RATE / FFT_SIZE)
    left, centre, right = corners_hz[:-2], corners_hz[1:-1], corners_hz[2:]
    rising_BM = (bins_hz[:, None] - left) / (centre - left)
    falling_BM = (right - bins_hz[:, None]) / (right - centre)
    return np.maximum(0, np.minimum(rising_BM, falling_BM))


class LogMelEncoder:
    """The audio encoder of the offline profile; see the module. Every shot is computed alone, in float64."""

    dim = LOG_MEL_DIM

    def __init__(self, config: AudioEncoderConfig) -> None:
        """Take the configuration for uniformity; none of it applies: there are no weights, and numpy uses one CPU core."""
        self._filters_BM = mel_filters()
        self._window = np.hanning(WINDOW + 1)[:-1]  # periodic Hann

    def encode(self, shots: Sequence[bytes]) -> Encoded:
        """See AudioEncoder. Raises ValueError for an odd number of bytes.

        Audio shorter than one window (25 ms) is centred between zeros; a last part of less than 10 ms is left out. All-zero audio is
        present, at the floor in every band (-1/8), with no variation.
        """
        embeddings_SD = np.zeros((len(shots), self.dim), np.float32)
        present_S = np.array([len(samples) > 0 for samples in shots], bool)
        for index, samples in enumerate(shots):
            if len(samples) % 2:
                raise ValueError(f"the audio of shot {index} has {len(samples)} bytes: int16 samples take an even number")
            if samples:
                embeddings_SD[index] = self._statistics(np.frombuffer(samples, "<i2"))
        return Encoded(embeddings_SD, present_S)

    def _statistics(self, samples_N: np.ndarray) -> np.ndarray:
        levels_TM = (np.maximum(self.levels(samples_N), FLOOR_DB) - MIDDLE_DB) / abs(MIDDLE_DB)
        change_TM = np.abs(np.diff(levels_TM, axis=0))
        mean_change_M = change_TM.mean(axis=0) if len(change_TM) else np.zeros(MEL_BANDS)
        return np.concatenate([levels_TM.mean(axis=0), levels_TM.std(axis=0), mean_change_M]) / np.sqrt(MEL_BANDS)

    def levels(self, samples_N: np.ndarray) -> np.ndarray:
        """Return (T, 64) float64 decibels below full scale of (N,) int16 samples; finite, but without the floor."""
        if len(samples_N) < WINDOW:
            before = (WINDOW - len(samples_N)) // 2
            samples_N = np.pad(samples_N, (before, WINDOW - len(samples_N) - before))
        windows_TN = np.lib.stride_tricks.sliding_window_view(samples_N, WINDOW)[::HOP]
        full_scale = 32768 * self._window.sum() / 2  # The magnitude of the bin of a full-scale sine.
        parts = []
        for start in range(0, len(windows_TN), WINDOWS_PER_CALL):
            spectrum_TB = np.fft.rfft(windows_TN[start : start + WINDOWS_PER_CALL] * self._window, FFT_SIZE)
            power_TM = (np.abs(spectrum_TB) / full_scale) ** 2 @ self._filters_BM
            parts.append(10 * np.log10(np.maximum(power_TM, 1e-20)))
        return np.concatenate(parts)
