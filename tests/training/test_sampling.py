"""Invariants of sampling: every title once per epoch, no hidden state, exact shares."""

import numpy as np
import pytest

from mediafm_ray.training.sampling import TitleOrder, masked_shots, random_of, split_titles, window_start


@pytest.mark.parametrize(("titles", "windows", "steps"), [(64, 8, 8), (64, 2, 32), (60, 5, 12), (5, 9, 5), (3, 9, 1)])
def test_every_title_is_taken_once_an_epoch(titles, windows, steps):
    order = TitleOrder(3, np.random.default_rng(0).integers(1, 500, titles), windows)
    for first in range(0, 4 * steps, steps):
        taken = np.concatenate([order.titles(first + step) for step in range(steps)])
        np.testing.assert_array_equal(np.bincount(taken, minlength=titles), steps * windows // titles)


def test_a_step_mixes_titles_however_few_there_are():
    order = TitleOrder(0, np.arange(12), 6)
    assert min(len(set(order.titles(step).tolist())) for step in range(100)) == 6


def test_a_step_depends_on_seed_and_number_only():
    sizes = np.random.default_rng(1).integers(1, 500, 100)
    asked = TitleOrder(5, sizes, 7)
    forwards = [asked.titles(step) for step in range(60)]
    for step in (59, 0, 31, 17):
        np.testing.assert_array_equal(TitleOrder(5, sizes, 7).titles(step), forwards[step])
        np.testing.assert_array_equal(asked.titles(step), forwards[step])
    assert any((TitleOrder(6, sizes, 7).titles(step) != forwards[step]).any() for step in range(3))
    assert len({tuple(titles) for titles in forwards}) == 60


def test_windows_of_a_step_are_of_like_length():
    sizes = np.random.default_rng(2).integers(10, 512, 2000)
    order = TitleOrder(0, sizes, 16)
    padded = sum(sizes[order.titles(step)].max() * 16 for step in range(100))
    used = sum(sizes[order.titles(step)].sum() for step in range(100))
    assert used / padded > 0.9
    assert sizes.mean() / 512 < 0.6  # what a batch drawn at random would use of its longest window, nearly


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="no title"):
        TitleOrder(0, np.array([], np.int64), 4)


def test_split_by_hash():
    keys = [f"title-{index}" for index in range(4000)]
    train, held_out = split_titles(keys, 0.1, 10_000)
    assert 300 < len(held_out) < 500
    assert sorted([*train, *held_out]) == list(range(4000))
    grown = [*keys, *(f"more-{index}" for index in range(1000))]
    _, later = split_titles(grown, 0.1, 10_000)
    assert {grown[index] for index in later if index < 4000} == {keys[index] for index in held_out}
    few_train, few = split_titles(keys, 0.1, 20)
    assert len(few) == 20
    assert set(few) <= set(held_out)
    np.testing.assert_array_equal(few_train, train)  # the other held-out titles are not trained on either


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_small_catalogs_have_both_sides(fraction):
    assert [len(part) for part in split_titles(["only"], fraction, 10)] == [1, 0]
    for count in (2, 3, 5):
        train, held_out = split_titles([f"title-{index}" for index in range(count)], fraction, 10)
        assert len(train) >= 1
        assert len(held_out) >= 1
    assert [len(part) for part in split_titles(["a", "b", "c"], 0.0, 10)] == [3, 0]


@pytest.mark.parametrize(("shots", "expected"), [(1, 1), (2, 1), (4, 1), (10, 2), (13, 3), (512, 102)])
def test_a_fifth_is_masked_and_at_least_one(shots, expected):
    for seed in range(20):
        assert masked_shots(random_of(seed, 0), np.ones(shots, bool), 0.2).sum() == expected


def test_masks_fall_anywhere_but_on_shots_without_an_embedding():
    usable = np.arange(50) % 3 > 0
    counts = sum(masked_shots(random_of(seed, 0), usable, 0.2).astype(int) for seed in range(600))
    assert not counts[~usable].any()
    expected = 600 * 10 / usable.sum()
    assert (np.abs(counts[usable] - expected) < 6 * np.sqrt(expected)).all()
    assert masked_shots(random_of(0, 0), np.array([False, True]), 0.9).tolist() == [False, True]


def test_windows_begin_anywhere():
    starts = [window_start(random_of(seed, 0), 20, 8) for seed in range(2000)]
    np.testing.assert_array_equal(np.unique(starts), np.arange(13))
    assert np.bincount(starts).min() > 2000 / 13 / 2
    assert {window_start(random_of(seed, 0), 8, 8) for seed in range(5)} == {0}
