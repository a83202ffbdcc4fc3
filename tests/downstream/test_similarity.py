"""Nearest shots and the map of all pairs, against plain loops."""

import numpy as np
import pytest

from mediafm_ray.downstream.similarity import nearest_shots, similarity_map


def cosine(one, other):
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.fixture
def vectors():
    """Vectors of which the third and the last have no direction."""
    vectors_SD = np.random.default_rng(0).normal(size=(23, 7)).astype(np.float32)
    vectors_SD[[2, 22]] = 0
    return vectors_SD


def test_the_nearest_are_those_of_an_exhaustive_search(vectors):
    found = nearest_shots(vectors, 5)
    for shot in range(len(vectors)):
        if shot in (2, 22):
            assert found.index_SK[shot].tolist() == [-1] * 5
            assert np.isnan(found.cosine_SK[shot]).all()
            continue
        others = [other for other in range(len(vectors)) if other not in (shot, 2, 22)]
        expected = sorted(others, key=lambda other: -cosine(vectors[shot], vectors[other]))[:5]
        assert found.index_SK[shot].tolist() == expected
        np.testing.assert_allclose(found.cosine_SK[shot], [cosine(vectors[shot], vectors[other]) for other in expected], atol=1e-5)


def test_scale_changes_nothing_and_equals_come_in_the_order_of_time(vectors):
    scaled = vectors * np.random.default_rng(1).uniform(0.01, 100, (len(vectors), 1)).astype(np.float32)
    np.testing.assert_array_equal(nearest_shots(vectors, 4).index_SK, nearest_shots(scaled, 4).index_SK)
    assert nearest_shots(np.ones((4, 3), np.float32), 2).index_SK.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


@pytest.mark.parametrize("shots", [0, 1, 2])
def test_short_titles_have_fewer_neighbours(shots):
    found = nearest_shots(np.eye(3, dtype=np.float32)[:shots], 8)
    assert found.index_SK.shape == (shots, max(shots - 1, 0))
    assert len(similarity_map(np.eye(3, dtype=np.float32)[:shots], 8).code_NN) == shots


def decoded(map_):
    return map_.low + (map_.code_NN.astype(float) - 1) / 254 * (map_.high - map_.low)


def test_a_map_of_single_shots_holds_their_cosines(vectors):
    map_ = similarity_map(vectors, 100)
    assert map_.first_N.tolist() == list(range(23))
    for row in range(23):
        for column in range(23):
            if row in (2, 22) or column in (2, 22):
                assert map_.code_NN[row, column] == 0
            else:
                expected = np.clip(cosine(vectors[row], vectors[column]), map_.low, map_.high)
                assert abs(decoded(map_)[row, column] - expected) <= (map_.high - map_.low) / 254


def test_a_cell_of_a_long_title_is_the_mean_of_its_pairs(vectors):
    map_ = similarity_map(vectors, 4)
    bounds = [*map_.first_N.tolist(), 23]
    assert max(np.diff(bounds)) - min(np.diff(bounds)) <= 1
    runs = [[shot for shot in range(*bounds[cell : cell + 2]) if shot not in (2, 22)] for cell in range(4)]
    for row in range(4):
        for column in range(4):
            mean = np.mean([cosine(vectors[one], vectors[other]) for one in runs[row] for other in runs[column]])
            assert abs(decoded(map_)[row, column] - np.clip(mean, map_.low, map_.high)) <= (map_.high - map_.low) / 254
