"""Levels of sound against what mathematics says of signals whose root mean square is known."""

import numpy as np
import pytest

from mediafm_ray.media.loudness import BLOCK_LEVELS, LEVELS_PER_SECOND, LOWEST_LEVEL, audio_levels
from mediafm_ray.spec import SAMPLE_RATE

LEVEL_SAMPLES = SAMPLE_RATE // LEVELS_PER_SECOND


def sine(amplitude, seconds=0.5, frequency=440):
    return np.rint(amplitude * np.sin(2 * np.pi * frequency * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE)).astype(np.int16)


@pytest.mark.parametrize(("amplitude", "dbfs"), [(32767, -3), (16384, -9), (3277, -23), (328, -43)])
def test_a_sine_has_3_db_less_than_its_peak(amplitude, dbfs):
    assert audio_levels(sine(amplitude)).tolist() == [dbfs] * 5


def test_silence_and_full_scale_are_the_ends_of_the_range():
    assert audio_levels(np.zeros(LEVEL_SAMPLES, np.int16)).tolist() == [LOWEST_LEVEL]
    assert audio_levels(np.full(LEVEL_SAMPLES, -32768, np.int16)).tolist() == [0]
    levels = audio_levels(np.array([1, *[0] * (LEVEL_SAMPLES - 1)], np.int16))  # as little as is not silence
    assert levels.tolist() == [LOWEST_LEVEL]


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_each_level_is_of_its_own_tenth_of_a_second_whatever_the_length(rate):
    loud, soft = np.full(rate // 10, 8192, np.int16), np.full(rate // 10, 1024, np.int16)  # -12 and -30 dBFS
    assert audio_levels(np.concatenate([loud, soft, loud[:7]]), rate).tolist() == [-12, -30, -12]
    assert audio_levels(np.zeros(0, np.int16), rate).tolist() == []
    blocks = np.tile(np.concatenate([loud, soft]), BLOCK_LEVELS)[:-1]
    assert audio_levels(blocks, rate).tolist() == [-12, -30] * BLOCK_LEVELS
    assert audio_levels(blocks, rate).dtype == np.int8
