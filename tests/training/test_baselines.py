"""Baselines against constructed answers."""

import numpy as np
import pytest

from mediafm_ray.training.baselines import BASELINES, cosines, guess

LINE = np.stack([np.arange(6.0), np.ones(6)], axis=1).astype(np.float32)  # shots on a straight line


def masks(*places: int) -> np.ndarray:
    return np.isin(np.arange(6), places)


def test_interpolation_is_exact_on_a_line_and_takes_the_only_neighbour_at_an_end():
    np.testing.assert_allclose(guess("interpolation", LINE, masks(2, 3)), LINE[[2, 3]])
    np.testing.assert_allclose(guess("interpolation", LINE, masks(0, 1, 5)), LINE[[2, 2, 4]])


def test_nearest_shot_is_the_nearest_and_the_earlier_of_two_alike():
    np.testing.assert_array_equal(guess("nearest_shot", LINE, masks(2, 3)), LINE[[1, 4]])
    np.testing.assert_array_equal(guess("nearest_shot", LINE, masks(3)), LINE[[2]])
    np.testing.assert_array_equal(guess("nearest_shot", LINE, masks(0, 5)), LINE[[1, 4]])
    np.testing.assert_array_equal(guess("nearest_shot", LINE, masks(1, 2, 3, 4)), LINE[[0, 0, 5, 5]])


def test_title_mean_is_of_the_others():
    np.testing.assert_allclose(guess("title_mean", LINE, masks(5)), LINE[:5].mean(axis=0)[None])


@pytest.mark.parametrize("name", BASELINES)
def test_with_nothing_to_go_by_the_cosine_is_zero(name):
    alone = LINE[1:2]
    guessed = guess(name, alone, np.array([True]))
    assert guessed.shape == (1, 2)
    assert cosines(guessed, alone).tolist() == [0.0]


def test_cosines_between_rows():
    np.testing.assert_allclose(cosines(np.array([[2.0, 0], [1, 1], [-3, 0]]), np.array([[5.0, 0], [1, 0], [1, 0]])), [1, np.sqrt(0.5), -1])


def test_an_unknown_baseline_is_named():
    with pytest.raises(ValueError, match="'oracle'"):
        guess("oracle", LINE, masks(1))
