"""Pooling of a clip: results computed by hand, and errors."""

import numpy as np
import pytest

from mediafm_ray.downstream.clips import MAX_OVERHANG_S, clip_overlaps, pool_clip

START = np.array([0.0, 2.0, 6.0])
END = np.array([2.0, 6.0, 10.0])
AXES = np.eye(3, dtype=np.float32)


def test_a_shot_counts_by_the_seconds_of_it_that_lie_in_the_clip():
    pooled = pool_clip(START, END, AXES, 1.0, 9.0)  # 1, 4 and 3 seconds
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, np.array([1, 4, 3]) / np.sqrt(26), rtol=1e-6)


def test_a_clip_within_one_shot_is_that_shot():
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    np.testing.assert_allclose(pool_clip(START, END, vectors, 2.5, 3.0), vectors[1] / np.linalg.norm(vectors[1]), rtol=1e-6)


def test_intervals_are_half_open():
    assert clip_overlaps(START, END, 2.0, 6.0).tolist() == [0.0, 4.0, 0.0]


def test_the_length_of_a_vector_has_no_say_and_a_zero_vector_none_at_all():
    vectors = AXES * np.array([[1000.0], [0.001], [0.0]], np.float32)
    np.testing.assert_allclose(pool_clip(START, END, vectors, 0.0, 10.0), np.array([2, 4, 0]) / np.sqrt(20), rtol=1e-6)


def test_a_clip_may_be_rounded_beyond_the_ends_of_its_title():
    whole = pool_clip(START, END, AXES, 0.0, 10.0)
    assert pool_clip(START, END, AXES, -MAX_OVERHANG_S, 10.0 + MAX_OVERHANG_S).tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("start_s", "end_s", "said"),
    [
        (3.0, 3.0, "empty"),
        (4.0, 3.0, "empty"),
        (float("nan"), 3.0, "empty"),
        (10.0, 10.5, "outside the title, which is"),
        (12.0, 15.0, "outside"),
        (5.0, 12.0, "outside"),
        (-5.0, 3.0, "outside"),
    ],
)
def test_a_clip_that_is_empty_or_outside_its_title_is_an_error(start_s, end_s, said):
    with pytest.raises(ValueError, match=said):
        pool_clip(START, END, AXES, start_s, end_s)


@pytest.mark.parametrize("vectors", [np.zeros((3, 4)), np.full((3, 4), np.nan), np.array([[1.0], [0.0], [-1.0]])])
def test_no_direction_is_an_error_never_nan(vectors):
    with pytest.raises(ValueError, match="no common direction"):
        pool_clip(np.array([0.0, 2.0, 4.0]), np.array([2.0, 4.0, 6.0]), vectors.astype(np.float32), 0.0, 6.0)


def test_vectors_of_another_title_are_an_error():
    with pytest.raises(ValueError, match="2 vectors for 3 shots"):
        pool_clip(START, END, AXES[:2], 0.0, 10.0)
    with pytest.raises(ValueError, match="no shots"):
        pool_clip(START[:0], END[:0], AXES[:0], 0.0, 10.0)
