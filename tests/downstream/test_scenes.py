"""Scenes: known joins are found, the optimum is exact, and irrelevant changes have no effect."""

import itertools
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from mediafm_ray.downstream.options import ScenesConfig
from mediafm_ray.downstream.scenes import boundary_price, find_scenes, optimal_segmentation

DIM = 64
# a scene's structure -> what the shots of a scene are, from its mean: noise in every dimension, unlike in size, as encoders have it
SPREAD = np.arange(1, DIM + 1) ** -0.5
SPREAD /= np.linalg.norm(SPREAD)


def iid(random, shots):
    return random.normal(size=(shots, DIM)) * SPREAD


def dialogue(random, shots):
    """A B A B ...: two set-ups farther from each other than scenes are, and little noise."""
    return 1.5 * iid(random, 2)[np.arange(shots) % 2] + 0.3 * iid(random, shots)


def three_cameras(random, shots):
    """Three set-ups in an order of chance."""
    return iid(random, 3)[random.integers(0, 3, shots)] + 0.3 * iid(random, shots)


STRUCTURES = {"iid": iid, "dialogue": dialogue, "three cameras": three_cameras}


def title_of(structure, lengths, seed, difference=2.0, common=10.0):
    """(S, D) vectors of scenes of these lengths, about means that differ, and a large vector that all shots share; the first shots."""
    random = np.random.default_rng(seed)
    scenes = [difference * iid(random, 1) + STRUCTURES[structure](random, length) for length in lengths]
    shared = random.normal(size=DIM) / np.sqrt(DIM) * common
    return np.concatenate(scenes) + shared, np.cumsum([0, *lengths[:-1]])


def f1(found, true):
    """Of boundaries, exactly at their place."""
    found, true = set(found[1:].tolist()), set(true[1:].tolist())
    return 1.0 if not found and not true else 2 * len(found & true) / (len(found) + len(true))


def scatter(vectors):
    return float(((vectors - vectors.mean(axis=0)) ** 2).sum())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_known_joins_are_found_whatever_the_scenes_are_like(structure):
    scores = []
    for seed in range(12):
        lengths = np.random.default_rng(seed).integers(6, 25, size=1 + seed)
        vectors, true = title_of(structure, lengths.tolist(), seed)
        scores.append(f1(find_scenes(vectors).first_K, true))
    assert np.mean(scores) > 0.9, scores
    assert min(scores) > 0.6, scores


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_scene_is_one_scene(structure):
    found = [len(find_scenes(title_of(structure, [shots], seed)[0])) for seed, shots in enumerate((3, 5, 8, 13, 21, 34, 55, 89, 144, 233))]
    assert sum(found) <= 1.1 * len(found), found


@pytest.mark.parametrize("seed", range(25))
def test_the_dynamic_programme_finds_what_trying_everything_finds(seed):
    random = np.random.default_rng(seed)
    shots = int(random.integers(1, 10))
    vectors = random.normal(size=(shots, 3)) + 2 * (np.arange(shots) >= shots // 2)[:, None]
    price = float(random.uniform(0.1, 6))

    def objective(firsts):
        return sum(scatter(vectors[a:b]) for a, b in itertools.pairwise([*firsts, shots])) + price * (len(firsts) - 1)

    choices = [(0, *rest) for count in range(shots) for rest in itertools.combinations(range(1, shots), count)]
    best = min(choices, key=objective)
    first_K, worth_K = optimal_segmentation(vectors, price)
    assert tuple(first_K) == best
    ends = [*first_K[1:], shots]
    for scene in range(1, len(first_K)):
        before, here, end = first_K[scene - 1], first_K[scene], ends[scene]
        joined = scatter(vectors[before:end]) - scatter(vectors[before:here]) - scatter(vectors[here:end])
        np.testing.assert_allclose(worth_K[scene], joined, rtol=1e-9)
        assert worth_K[scene] >= price * (1 - 1e-9)  # else the boundary would not pay


def test_blocks_of_rows_do_not_show():
    random = np.random.default_rng(3)
    vectors = random.normal(size=(1100, 4)) + 3 * random.normal(size=(22, 4)).repeat(50, axis=0)
    price = boundary_price(vectors)
    first_K, _ = optimal_segmentation(vectors, price)
    best = [-price]
    came_from = []
    for end in range(1, len(vectors) + 1):  # the definition, with the scatter of each pair of ends taken afresh
        sums = np.cumsum(vectors[:end][::-1], axis=0)[::-1]
        squares = np.cumsum((vectors[:end] ** 2).sum(axis=1)[::-1])[::-1]
        values = best + squares - (sums**2).sum(axis=1) / np.arange(end, 0, -1)
        came_from.append(int(np.argmin(values)))
        best.append(values.min() + price)
    expected = [len(vectors)]
    while expected[-1]:
        expected.append(came_from[expected[-1] - 1])
    assert first_K.tolist() == expected[:0:-1]
    assert len(first_K) > 10


def test_what_must_not_matter_does_not():
    vectors, _ = title_of("three cameras", [12, 9, 20, 7, 15], seed=4)
    random = np.random.default_rng(5)
    rotation, _ = np.linalg.qr(random.normal(size=(DIM, DIM)))
    expected = find_scenes(vectors)
    assert len(expected) == 5
    for changed in (
        vectors * 1e-4,
        vectors * random.uniform(0.1, 10, (len(vectors), 1)),  # norms say nothing
        vectors @ rotation,
        vectors.astype(np.float32),
        np.concatenate([vectors, np.zeros_like(vectors)], axis=1),
    ):
        found = find_scenes(changed)
        assert found.first_K.tolist() == expected.first_K.tolist()
        np.testing.assert_allclose(found.score_K, expected.score_K, rtol=1e-3)
    backwards = find_scenes(vectors[::-1])
    assert (len(vectors) - 1 - backwards.last_K[::-1]).tolist() == expected.first_K.tolist()
    np.testing.assert_allclose(backwards.score_K[:0:-1], expected.score_K[1:], rtol=1e-6)


@pytest.mark.parametrize("shots", [1, 2, 3, 1000])
def test_shots_that_are_all_alike_are_one_scene(shots):
    for vectors in (np.tile(np.random.default_rng(6).normal(size=DIM).astype(np.float32), (shots, 1)), np.zeros((shots, DIM), np.float32)):
        scenes = find_scenes(vectors)
        assert (scenes.first_K.tolist(), scenes.last_K.tolist(), scenes.score_K.tolist()) == ([0], [shots - 1], [0.0])


def test_scenes_tile_the_shots_and_the_penalty_decides_how_many_there_are():
    vectors, _ = title_of("iid", [10] * 12, seed=7, difference=1.5)
    counts = []
    for penalty in (0.2, 0.5, 1.0, 2.0, 5.0, 100.0):
        scenes = find_scenes(vectors, ScenesConfig(penalty=penalty))
        assert scenes.first_K[0] == 0
        assert scenes.last_K[-1] == len(vectors) - 1
        assert (scenes.first_K[1:] == scenes.last_K[:-1] + 1).all()
        assert (scenes.score_K[1:] >= 1 - 1e-6).all()
        assert (scenes.first_K.dtype, scenes.score_K.dtype) == (np.int32, np.float32)
        counts.append(len(scenes))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 12 > counts[-1] == 1


def test_a_title_of_two_thousand_shots_takes_less_than_two_seconds():
    vectors = np.random.default_rng(8).normal(size=(2000, 2304)).astype(np.float32)
    vectors[:, :20] += 2 * np.eye(20, dtype=np.float32).repeat(100, axis=0)
    with threadpool_limits(limits=1):
        start = time.thread_time()  # of one core: other processes share the machine
        find_scenes(vectors)
        assert time.thread_time() - start < 2.0


def test_input_without_sense_is_refused():
    with pytest.raises(ValueError, match="at least one shot"):
        find_scenes(np.zeros((0, 4), np.float32))
    broken = np.ones((5, 4), np.float32)
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="shot 3 is not finite"):
        find_scenes(broken)
    for penalty in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="penalty must be above 0 and finite"):
            ScenesConfig(penalty=penalty)
