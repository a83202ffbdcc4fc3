"""Sizes, tone mapping and the choice of frames, apart from any video."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from mediafm_ray.media import sampling, tone
from mediafm_ray.media.picture import kept_size
from mediafm_ray.media.sampling import CandidateBuffer


@pytest.mark.parametrize(
    ("stored", "pixel_aspect", "kept"),
    [
        ((1920, 1080), Fraction(1), (456, 256)),
        ((1080, 1920), Fraction(1), (256, 456)),
        ((320, 180), Fraction(1), (320, 180)),  # not enlarged
        ((720, 576), Fraction(64, 45), (456, 256)),  # 16:9 PAL
        ((720, 480), Fraction(8, 9), (342, 256)),  # 4:3 NTSC
        ((8000, 100), Fraction(1), (1024, 12)),  # the longer side has its limit
        ((2, 2), Fraction(1), (2, 2)),
    ],
)
def test_kept_frames_have_square_pixels_and_even_sides(stored, pixel_aspect, kept):
    assert kept_size(*stored, pixel_aspect, 256) == kept


@pytest.mark.parametrize(
    ("transfer", "code", "light"),
    [(16, 0.508078, 100), (16, 0.580689, 203), (16, 0.751827, 1000), (18, 0.75, 203), (18, 1.0, 1000)],
)
def test_hdr_curves_at_published_points(transfer, code, light):
    """SMPTE ST 2084 and ITU-R BT.2408, table 1: cd/m2 of a signal, on a display of 1000 cd/m2 for HLG."""
    position = code * 255
    curve = tone._light(transfer) * tone.REFERENCE_WHITE
    assert np.interp(position, np.arange(256), curve) == pytest.approx(light, rel=0.03)


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_greys_stay_grey_and_in_order_and_white_is_white(transfer):
    ramp_HWC = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    shown = tone.to_ordinary_range(ramp_HWC, transfer).astype(int)
    assert shown.dtype.kind == "i"
    assert (np.diff(shown[0, :, 0]) >= 0).all()
    assert (np.ptp(shown, axis=-1) <= 1).all()
    assert shown[0, 0, 0] == 0
    assert shown[0, -1, 0] == 255


def test_ordinary_pictures_are_left_alone():
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    for transfer in (1, 2, 6, 13):
        assert tone.to_ordinary_range(picture, transfer) is picture


def test_candidates_are_bounded_and_every_one_is_let_go_once():
    discarded: list[int] = []
    buffer: CandidateBuffer[int] = CandidateBuffer(discarded.append)
    for index in range(20_000):
        buffer.add(sampling.Candidate(index, 10 * index, index))
        assert len(buffer.sparse) + len(buffer.dense) <= sampling.DENSE_FRAMES + sampling.SPARSE_FRAMES
    chosen = [one.index for one in buffer.choose(19_990, 199_900, 8)]
    ideal = [19_990 * (2 * part + 1) / 16 for part in range(8)]
    assert np.abs(np.array(chosen) - ideal).max() <= 20_000 / sampling.SPARSE_FRAMES * 2
    buffer.drop_before(19_990)
    assert sorted(discarded) == list(range(19_990))
    assert [one.index for one in buffer.choose(20_000, 200_000, 8)] == [19_990 + number for number in (0, 1, 3, 4, 5, 6, 8, 9)]


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 100, 600])
@pytest.mark.parametrize("start", [0, 3, 700])
def test_choice_is_the_frame_on_screen_at_each_centre(length, start):
    """Against a search through all frames, with irregular times."""
    ticks = np.cumsum(np.random.default_rng(length + start).integers(1, 50, start + length + 1)).tolist()
    buffer: CandidateBuffer[None] = CandidateBuffer()
    for index in range(start + length):
        buffer.add(sampling.Candidate(index, ticks[index], None))
        if index + 1 == start:
            buffer.drop_before(start)
    end = ticks[start + length]
    parts = min(8, length)
    wanted = []
    for part in range(parts):
        centre = Fraction(ticks[start]) + Fraction((2 * part + 1) * (end - ticks[start]), 2 * parts)
        wanted.append(max(index for index in range(start, start + length) if ticks[index] <= centre))
    chosen = [one.index for one in buffer.choose(start + length, end, 8)]
    if length <= sampling.DENSE_FRAMES:
        assert chosen == sorted(set(wanted))
    else:
        assert np.abs(np.array(chosen) - wanted).max() <= 2
