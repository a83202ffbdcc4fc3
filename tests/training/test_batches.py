"""Windows, batches and reading ahead."""

import threading
import time

import numpy as np
import pytest
import torch

from mediafm_ray.training.batches import TitleVectors, UnusableTitle, WindowSource, collate, read_ahead
from tests.training.titles import FUSED_DIM, METADATA_DIM, MadeTitles, make_title, unit


def source_of(titles: MadeTitles, windows: int = 4, longest: int = 16, said: list[str] | None = None) -> WindowSource:
    return WindowSource(titles, 0, windows, longest, 0.2, (said if said is not None else []).append)


def test_workers_share_the_windows_of_a_step():
    titles = MadeTitles([5, 40, 12, 9, 30, 22], held_out=[5])
    whole = source_of(titles, windows=5).of_step(3, 0, 1)
    assert len(whole) == 5
    shared = [source_of(titles, windows=5).of_step(3, rank, 2) for rank in range(2)]
    for window, again in zip(whole, [shared[0][0], shared[1][0], shared[0][1], shared[1][1], shared[0][2]], strict=True):
        assert (window.title.title_id, window.start) == (again.title.title_id, again.start)
        np.testing.assert_array_equal(window.masked_S, again.masked_S)
    assert all(len(window.masked_S) <= 16 for window in whole)
    assert "title-5" not in {window.title.title_id for step in range(50) for window in source_of(titles).of_step(step, 0, 1)}


def test_a_batch_holds_the_windows_and_says_where_it_is_padded():
    titles = MadeTitles([3, 10, 7, 40])
    titles.titles[1] = make_title(1, 10, metadata=False)
    windows = source_of(titles).of_step(0, 0, 1)
    batch = collate(windows, METADATA_DIM)
    assert batch.shots_BS is not None
    longest = max(len(window.masked_S) for window in windows)
    assert batch.fused_BSD.shape == (4, longest, FUSED_DIM)
    flat = batch.fused_BSD.flatten(0, 1).numpy()
    place = 0
    for row, window in enumerate(windows):
        count = len(window.masked_S)
        np.testing.assert_array_equal(batch.shots_BS[row], np.arange(longest) < count)
        np.testing.assert_array_equal(batch.fused_BSD[row, :count], window.title.fused_SD[window.start : window.start + count])
        np.testing.assert_array_equal(batch.times_BS2[row, :count], window.title.times_S2[window.start : window.start + count])
        assert not batch.fused_BSD[row, count:].any()
        assert bool(batch.has_metadata_B[row]) == (window.title.metadata_M is not None)
        for shot in np.flatnonzero(window.masked_S):
            np.testing.assert_array_equal(flat[batch.masked_K[place]], window.title.fused_SD[window.start + shot])
            place += 1
    assert place == len(batch.masked_K) == int(batch.masked_BS.sum())
    assert collate(windows[:1], METADATA_DIM).shots_BS is None
    moved = batch.to(torch.device("meta"))
    assert moved.given_BSD is moved.fused_BSD  # without cut-aways they are one: copied once


def test_the_held_out_windows_never_change():
    titles = MadeTitles([30, 40, 50], held_out=[0, 2])
    first, again = source_of(titles), source_of(titles, windows=7)
    for slot in (1, 0):
        one, two = first.of_evaluation(slot), again.of_evaluation(slot)
        assert one.title.title_id == f"title-{titles.held_out[slot]}"
        assert one.start == two.start
        np.testing.assert_array_equal(one.masked_S, two.masked_S)


def test_a_title_that_cannot_be_used_is_named_once_and_the_next_taken():
    said: list[str] = []
    titles = MadeTitles([8] * 5, broken=[1, 3])
    source = source_of(titles, said=said)
    taken = [window.title.title_id for step in range(30) for window in source.of_step(step, 0, 1)]
    assert set(taken) == {"title-0", "title-2", "title-4"}
    assert sorted(said) == ["title title-1 is broken", "title title-3 is broken"]
    assert titles.reads.count(1) == 1
    with pytest.raises(UnusableTitle, match="none of the 2"):
        source_of(MadeTitles([8, 8], broken=[0, 1])).of_step(0, 0, 1)


def test_numbers_that_are_none_are_named_with_title_and_shot():
    good = make_title(0, 6)
    broken = good.fused_SD.copy()
    broken[4, 2] = np.nan
    with pytest.raises(UnusableTitle, match=r"title night.*shot 4 is not finite"):
        TitleVectors("night", broken, good.times_S2, None)
    with pytest.raises(UnusableTitle, match="metadata embedding is not finite"):
        TitleVectors("night", good.fused_SD, good.times_S2, np.array([np.inf], np.float32))
    with pytest.raises(UnusableTitle, match="no shots"):
        TitleVectors("night", good.fused_SD[:0], good.times_S2[:0], None)
    with pytest.raises(UnusableTitle, match="no shot has an embedding"):
        TitleVectors("night", np.zeros((3, FUSED_DIM), np.float32), good.times_S2[:3], None)


def test_a_stretch_without_embeddings_is_never_the_whole_window():
    """Forty silent, black shots with one other among them: whatever the window, there is something to predict."""
    titles = MadeTitles([41])
    fused = np.zeros((41, FUSED_DIM), np.float32)
    fused[35] = unit(np.ones(FUSED_DIM))
    titles.titles[0] = TitleVectors("dark", fused, titles.titles[0].times_S2, None)
    for step in range(30):
        for window in source_of(titles, longest=8).of_step(step, 0, 1):
            assert window.start + np.flatnonzero(window.masked_S) == [35]


def test_reading_ahead_keeps_order_and_bounds():
    under_way, most, lock = 0, 0, threading.Lock()

    def make(item: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.002 * (item % 3))
        with lock:
            under_way -= 1
        return item * item

    made: list[int] = []
    items = iter(range(1000))
    stream = read_ahead(make, items, threads=3, ahead=5)
    for _ in range(20):
        made.append(next(stream))
    stream.close()
    assert made == [item * item for item in range(20)]
    assert 1 < most <= 3
    assert next(items) == 25  # 20 given, 5 ahead: no more were begun


def test_what_a_reader_raises_is_raised_in_its_turn():
    def make(item: int) -> int:
        return 6 // (item - 2)

    stream = read_ahead(make, range(5), threads=2, ahead=4)
    assert [next(stream), next(stream)] == [-3, -6]
    with pytest.raises(ZeroDivisionError):
        next(stream)
