"""Log-mel statistics of sounds with known statistics."""

from __future__ import annotations

import numpy as np
import pytest

from mediafm_ray.models import log_mel
from mediafm_ray.models.encoder import LOG_MEL_DIM
from mediafm_ray.models.log_mel import MEL_BANDS, LogMelEncoder, mel_filters
from mediafm_ray.models.options import AudioEncoderConfig
from mediafm_ray.spec import SAMPLE_RATE

SCALE = np.sqrt(MEL_BANDS)


@pytest.fixture(scope="module")
def encoder() -> LogMelEncoder:
    return LogMelEncoder(AudioEncoderConfig())


def sine(hz: float, seconds: float, amplitude: float = 1.0) -> np.ndarray:
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return np.round(32767 * amplitude * np.sin(2 * np.pi * hz * times)).astype("<i2")


def parts(encoder: LogMelEncoder, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and mean absolute change a band, on the scale where 1 is 40 dB."""
    embedding = encoder.encode([samples.astype("<i2").tobytes()]).embeddings_SD[0] * SCALE
    mean, deviation, change = embedding.reshape(3, MEL_BANDS)
    return mean, deviation, change


def band_of(hz: float) -> int:
    filters_BM = mel_filters()
    return int(filters_BM[round(hz * log_mel.FFT_SIZE / SAMPLE_RATE)].argmax())


def test_filters_cover_the_spectrum_without_gaps() -> None:
    filters_BM = mel_filters()
    assert filters_BM.shape == (257, 64)
    assert (filters_BM >= 0).all()
    assert (filters_BM.max(axis=0) > 0.3).all()  # every band hears something
    inside = filters_BM[3:-12].sum(axis=1)  # neighbours add up to 1: no frequency counts twice or not at all
    np.testing.assert_allclose(inside, 1, atol=1e-9)


@pytest.mark.parametrize("hz", [250, 1000, 3000, 7000])
def test_a_full_scale_sine_is_about_0_db_in_its_band_and_nowhere_else(encoder: LogMelEncoder, hz: int) -> None:
    levels_TM = encoder.levels(sine(hz, 1))
    band = band_of(hz)
    assert abs(levels_TM[:, band].mean()) < 3
    far = [other for other in range(MEL_BANDS) if abs(other - band) > 6]
    assert levels_TM[:, far].max() < -50


def test_ten_times_the_amplitude_is_20_db(encoder: LogMelEncoder) -> None:
    quiet, loud = encoder.levels(sine(1000, 1, 0.05)), encoder.levels(sine(1000, 1, 0.5))
    band = band_of(1000)
    np.testing.assert_allclose(loud[:, band] - quiet[:, band], 20, atol=0.05)


def test_a_steady_sound_has_no_variation_and_a_pulsed_one_has(encoder: LogMelEncoder) -> None:
    rate = 100  # one hop holds 10 ms: a sine of 1000 Hz has whole periods in it, so every window is alike
    mean, deviation, change = parts(encoder, sine(1000, 1))
    band = band_of(1000)
    assert mean[band] == pytest.approx(1, abs=0.08)
    assert deviation[band] < 0.001
    assert change[band] < 0.001
    gate = (np.arange(SAMPLE_RATE) // (SAMPLE_RATE // 4)) % 2  # off, on, off, on: 250 ms each
    mean, deviation, change = parts(encoder, sine(1000, 1) * gate)
    assert deviation[band] > 0.9  # half the windows at about 0 dB, half at the floor of -80 dB
    assert 3 * 2 / rate * 0.8 < change[band] < 3 * 2 / rate * 1.3  # three edges of 80 dB = 2 over about 97 steps


def test_silence_is_present_finite_and_at_the_floor(encoder: LogMelEncoder) -> None:
    encoded = encoder.encode([bytes(2 * SAMPLE_RATE)])
    assert encoded.present_S.tolist() == [True]
    np.testing.assert_array_equal(encoded.embeddings_SD[0], np.r_[np.full(64, -1 / 8), np.zeros(128)].astype(np.float32))


def test_silence_and_noise_point_apart(encoder: LogMelEncoder) -> None:
    noise = (np.random.default_rng(0).normal(size=SAMPLE_RATE) * 10_000).clip(-32768, 32767)
    silent, loud = encoder.encode([bytes(2 * SAMPLE_RATE), noise.astype("<i2").tobytes()]).embeddings_SD
    assert silent @ loud < 0


@pytest.mark.parametrize("samples", [1, 2, 159, 399, 400, 401, 559, 560])
def test_very_short_sounds_are_finite_and_not_silent(encoder: LogMelEncoder, samples: int) -> None:
    encoded = encoder.encode([np.linspace(15_000, 20_000, samples).astype("<i2").tobytes()])
    assert np.isfinite(encoded.embeddings_SD).all()
    assert encoded.embeddings_SD[0, 0] > -0.12
    assert (encoded.embeddings_SD[0, MEL_BANDS:] == 0).all() == (samples < 560)  # one window has no variation, two have


def test_embeddings_have_the_norm_of_a_normalised_sentence_within_an_order(encoder: LogMelEncoder) -> None:
    generator = np.random.default_rng(1)
    for amplitude in (10, 100, 1000, 10_000):
        pink = np.cumsum(generator.normal(size=SAMPLE_RATE)) * 0.1
        sound = ((pink - pink.mean()) / pink.std() * amplitude).clip(-32768, 32767).astype("<i2")
        assert 0.1 < np.linalg.norm(encoder.encode([sound.tobytes()]).embeddings_SD[0]) < 3


def test_long_sounds_are_computed_in_pieces_without_a_seam(encoder: LogMelEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = (np.random.default_rng(2).normal(size=5 * SAMPLE_RATE) * 1000).astype("<i2")
    whole = encoder.levels(samples)
    monkeypatch.setattr(log_mel, "WINDOWS_PER_CALL", 7)
    np.testing.assert_allclose(encoder.levels(samples), whole, rtol=0, atol=1e-9)
    assert whole.shape == (1 + (5 * SAMPLE_RATE - 400) // 160, MEL_BANDS)


def test_half_a_sample_is_refused(encoder: LogMelEncoder) -> None:
    with pytest.raises(ValueError, match="shot 1 has 3 bytes"):
        encoder.encode([b"ab", b"abc"])


def test_dimension() -> None:
    assert LOG_MEL_DIM == 192
