"""Exact search in blocks against a search of everything at once; recall in known cases."""

import numpy as np
import pytest

from mediafm_ray.downstream.retrieval import NOTHING, ExactSearch, recall


def searched(queries, vectors, count, block):
    search = ExactSearch(queries, count)
    for begin in range(0, len(vectors), block):
        search.add(np.arange(begin, min(begin + block, len(vectors))), vectors[begin : begin + block])
    return search


@pytest.mark.parametrize("block", [1, 3, 7, 64, 1000])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_blocks_of_any_size_find_what_a_sort_of_all_cosines_finds(block, kind):
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(201, 6)) * random.uniform(0.1, 10, (201, 1))).astype(kind)
    vectors[[5, 77]] = 0
    queries = random.normal(size=(9, 6)).astype(np.float32)
    found = searched(queries, vectors, 7, block)
    for query in range(9):
        wide = vectors.astype(np.float64)
        cosine = wide @ queries[query] / np.maximum(np.linalg.norm(wide, axis=1), 1e-30) / np.linalg.norm(queries[query])
        cosine[[5, 77]] = -np.inf
        expected = np.argsort(-cosine)[:7]
        assert found.rows_QK[query].tolist() == expected.tolist()
        np.testing.assert_allclose(found.cosine_QK[query], cosine[expected], atol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 5])
def test_scale_does_not_matter_and_what_is_not_there_is_nothing(block):
    vectors = np.array([[1, 0], [2, 0], [0, 1], [3, 0], [0, 0]], np.float32)
    found = searched(np.array([[1, 0], [0, 0]], np.float32), vectors, 6, block)
    assert found.rows_QK.tolist() == [[0, 1, 3, 2, NOTHING, NOTHING], [NOTHING] * 6]


def test_recall_is_the_share_of_the_nearest_that_were_found():
    true_cosine = np.array([[0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.4, 0.3]], np.float32)
    rows = np.array([[1, 2, 9, 8], [4, 7, 5, 6]])
    cosine = np.array([[0.9, 0.8, 0.2, 0.1], [0.5, 0.3, 0.3, 0.3]], np.float32)
    assert recall(rows, cosine, true_cosine) == (2 / 4 + 4 / 4) / 2  # of equals any will do
    cosine[1] = [0.5, 0.299, 0.299, 0.299]
    assert recall(rows, cosine, true_cosine) == (2 / 4 + 1 / 4) / 2
    assert recall(rows[:, ::-1], cosine[:, ::-1], true_cosine) == (2 / 4 + 1 / 4) / 2


def test_recall_counts_no_result_twice_and_asks_for_no_more_than_there_is():
    true_cosine = np.array([[0.9, 0.8, -np.inf]], np.float32)
    assert recall(np.array([[1, 1, 1]]), np.array([[0.9, 0.9, 0.9]]), true_cosine) == 0.5
    assert recall(np.array([[1, 2, NOTHING]]), np.array([[0.9, 0.8, -np.inf]]), true_cosine) == 1.0
    nobody = np.full((1, 3), -np.inf, np.float32)
    assert recall(np.full((1, 3), NOTHING), nobody, nobody).__repr__() == "nan"
    both = np.concatenate([true_cosine, nobody])
    assert recall(np.array([[1, 2, 3], [1, 2, 3]]), np.concatenate([true_cosine, nobody]), both) == 1.0
