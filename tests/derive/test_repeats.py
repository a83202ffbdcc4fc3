"""Repeats: runs of shots that titles share, in made vectors whose truth is known."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.stored_titles import commit_title, make_model
from jobs import build_index, find_repeats
from mediafm_ray.config.jobs import BuildIndexConfig, FindRepeatsConfig
from mediafm_ray.derive import repeats
from mediafm_ray.downstream.repeats import maximal_segments
from mediafm_ray.runs.command import EXIT_BAD_INPUT, run_job
from mediafm_ray.storage.schemas import repeats_schema

MODEL = make_model("0123456789ab", video=32, audio=8, text=8)
COPY = 0.02  # noise of a copy, where a vector's norm is 1


class World:
    """Titles of random shots, which can be made to share some."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.vectors, self.seconds = {}, {}

    def title(self, title_id, shots=30):
        self.vectors[title_id] = self.random.normal(size=(shots, 32))
        self.seconds[title_id] = self.random.uniform(1, 6, shots)

    def share(self, a, first, b, at, shots, noise=0.0):
        """Let ``b`` show at ``at`` what ``a`` shows from ``first`` on."""
        copied = self.vectors[a][first : first + shots]
        lengths = np.linalg.norm(copied, axis=1, keepdims=True) / np.sqrt(32)
        self.vectors[b][at : at + shots] = copied + noise * lengths * self.random.normal(size=copied.shape)
        self.seconds[b][at : at + shots] = self.seconds[a][first : first + shots]

    def start(self, title_id, shot):
        return self.seconds[title_id][:shot].sum()

    def write(self, folder, order=sorted):
        for title_id in order(self.vectors):
            fused = np.concatenate([self.vectors[title_id], np.ones((len(self.vectors[title_id]), 16))], axis=1).astype(np.float32)
            fused /= np.linalg.norm(fused, axis=1, keepdims=True)
            commit_title(str(folder / "out"), MODEL, title_id, fused, self.seconds[title_id])
        options = [f"output.uri={folder / 'out'}", f"index.uri={folder / 'index'}", "vectors.kind=fused"]
        assert run_job("", BuildIndexConfig, build_index.main, options) == 0

    def find(self, folder, *overrides):
        if not (folder / "index").exists():
            self.write(folder)
        assert job(folder, *overrides) == 0
        return pq.read_table(folder / "repeats.parquet").to_pylist()


def job(folder, *overrides):
    options = [f"output.uri={folder / 'out'}", f"index.uri={folder / 'index'}", f"repeats.uri={folder / 'repeats.parquet'}"]
    return run_job("", FindRepeatsConfig, find_repeats.main, [*options, *overrides])


def places(rows):
    return [
        tuple(row[name] for name in ("title_a", "first_shot_a", "last_shot_a", "title_b", "first_shot_b", "last_shot_b")) for row in rows
    ]


@pytest.fixture
def world():
    world = World()
    for number in range(8):
        world.title(f"film-{number}")
    return world


def test_runs_are_found_with_their_places_times_and_kinds(world, tmp_path):
    world.share("film-1", 5, "film-4", 17, 4)
    world.share("film-1", 12, "film-0", 2, 6, noise=0.1)
    rows = world.find(tmp_path)
    assert places(rows) == [("film-0", 2, 7, "film-1", 12, 17), ("film-1", 5, 8, "film-4", 17, 20)]
    near, exact = rows
    assert (near["kind"], exact["kind"]) == ("near", "exact")
    assert near["shots"] == 6
    assert 0.9 < near["min_cosine"] <= near["mean_cosine"] < 1
    assert exact["mean_cosine"] == pytest.approx(1)
    for row in rows:
        for k in "ab":
            assert row[f"start_{k}_s"] == pytest.approx(world.start(row[f"title_{k}"], row[f"first_shot_{k}"]), abs=0.02)
            assert row[f"end_{k}_s"] == pytest.approx(world.start(row[f"title_{k}"], row[f"last_shot_{k}"] + 1), abs=0.02)
        assert row["offset_s"] == pytest.approx(row["start_b_s"] - row["start_a_s"])
    assert pq.read_schema(tmp_path / "repeats.parquet").equals(repeats_schema())


def test_a_run_may_have_a_cut_in_one_title_only_and_begin_within_a_shot(world, tmp_path):
    world.share("film-2", 10, "film-5", 3, 5, noise=COPY)
    vectors, seconds = world.vectors["film-5"], world.seconds["film-5"]
    seconds[3] -= 0.7  # its first shot was cut
    world.vectors["film-5"] = np.insert(vectors, 6, vectors[5] + 0.1 * world.random.normal(size=32), axis=0)
    half = seconds[5] * 0.4
    world.seconds["film-5"] = np.insert(seconds, 6, seconds[5] - half)
    world.seconds["film-5"][5] = half
    (row,) = world.find(tmp_path)
    assert places([row]) == [("film-2", 10, 14, "film-5", 3, 8)]
    assert row["start_a_s"] == pytest.approx(world.start("film-2", 10) + 0.7, abs=0.02)
    assert row["shots"] == 5


def test_shots_that_all_titles_have_are_no_repeats(world, tmp_path):
    black, logo = world.random.normal(size=(2, 32))
    for title_id in world.vectors:
        for shot, picture in ((0, black), (9, logo), (20, black)):
            world.vectors[title_id][shot] = picture + COPY * world.random.normal(size=32)
            world.seconds[title_id][shot] = 3.0
    assert world.find(tmp_path) == []


def test_an_opening_that_all_titles_have_is_one(world, tmp_path):
    for number in range(1, 8):
        world.share("film-0", 0, f"film-{number}", number, 5, noise=COPY)
    rows = world.find(tmp_path)
    assert len(rows) == 8 * 7 / 2
    assert all(row["shots"] == 5 for row in rows)


def test_the_shots_of_a_studio_are_no_repeats(tmp_path):
    world = World(3)
    cameras = world.random.normal(size=(3, 32))
    for number in range(6):
        world.title(f"news-{number}", 60)
        for shot in range(0, 60, 2):  # every other shot is one of the same three cameras
            world.vectors[f"news-{number}"][shot] = cameras[world.random.integers(3)] + 0.1 * world.random.normal(size=32)
    assert world.find(tmp_path) == []


def test_one_shot_is_a_repeat_if_it_is_rare_nearly_equal_whole_and_long_enough(world, tmp_path):
    for a, b, shot, noise in (
        ("film-0", "film-1", 4, COPY),
        ("film-2", "film-3", 9, 0.8),
        ("film-4", "film-5", 14, COPY),
        ("film-6", "film-7", 3, COPY),
    ):
        world.seconds[a][shot] = 4.0
        world.share(a, shot, b, shot + 7, 1, noise)
    world.seconds["film-5"][21] = 2.9  # cut
    for title_id, shot in (("film-6", 3), ("film-7", 10)):
        world.seconds[title_id][shot] = 1.5
    assert places(world.find(tmp_path)) == [("film-0", 4, 4, "film-1", 11, 11)]
    assert len(world.find(tmp_path, "repeats.min_seconds=1")) == 2


def test_the_same_shots_at_other_offsets_are_no_run(world, tmp_path):
    for step, shot in enumerate((3, 4, 5)):
        world.share("film-0", shot, "film-1", shot * 4, 1, COPY)
        world.seconds["film-1"][shot * 4] += 0.5 + step
    assert world.find(tmp_path) == []


def test_a_title_is_not_compared_with_itself(world, tmp_path):
    world.share("film-3", 2, "film-3", 20, 5)
    assert world.find(tmp_path) == []


def test_titles_of_one_shot_and_a_catalog_of_one_title(tmp_path):
    world = World()
    world.title("alone", 1)
    assert world.find(tmp_path / "one") == []
    for number in range(5):
        world.title(f"short-{number}", 1)
    world.share("alone", 0, "short-2", 0, 1)
    for number in range(5):
        world.title(f"film-{number}")
    world.seconds["alone"][:] = world.seconds["short-2"][:] = 3.0
    assert places(world.find(tmp_path / "some")) == [("alone", 0, 0, "short-2", 0, 0)]


def test_the_bytes_are_the_same_in_any_order_and_in_any_number_of_parts(world, tmp_path, monkeypatch):
    world.share("film-1", 5, "film-4", 17, 4, COPY)
    world.share("film-7", 5, "film-2", 17, 8, COPY)
    world.write(tmp_path / "first")
    world.write(tmp_path / "second", order=lambda titles: sorted(titles, reverse=True))
    found = world.find(tmp_path / "first")
    assert places(found) == [("film-1", 5, 8, "film-4", 17, 20), ("film-2", 17, 24, "film-7", 5, 12)]
    kept = (tmp_path / "first" / "repeats.parquet").read_bytes()
    assert job(tmp_path / "first") == job(tmp_path / "second") == 0
    assert (tmp_path / "first" / "repeats.parquet").read_bytes() == kept
    assert (tmp_path / "second" / "repeats.parquet").read_bytes() == kept
    monkeypatch.setattr(repeats, "SHOTS_A_PART", 40)
    monkeypatch.setattr(repeats, "BLOCK", 16)
    assert places(world.find(tmp_path / "first")) == places(found)


def test_changed_titles_are_named(world, tmp_path, capsys):
    world.write(tmp_path)
    world.title("new")
    commit_title(str(tmp_path / "out"), MODEL, "new", np.ones((3, 48), np.float32) / np.sqrt(48, dtype=np.float32))
    world.find(tmp_path)
    assert (
        f"1 titles are new, changed or gone since the index was built: run mediafm index output.uri={tmp_path}" in capsys.readouterr().out
    )


def test_what_is_missing_is_said_with_the_command_to_run(world, tmp_path, capsys):
    def said(*overrides):
        assert job(tmp_path, *overrides) == EXIT_BAD_INPUT
        return capsys.readouterr().err

    assert "has no dataset version" in said()
    commit_title(str(tmp_path / "out"), MODEL, "film", np.eye(48, dtype=np.float32)[:4])
    assert "has no index of shots; there is nothing: run mediafm index output.uri=" in said()
    assert "index.uri is required" in said("index.uri=")
    assert "give a .parquet object" in said("repeats.uri=")
    options = [f"output.uri={tmp_path / 'out'}", f"index.uri={tmp_path / 'index'}", "vectors.kind=fused", "index.parts=[text]"]
    assert run_job("", BuildIndexConfig, build_index.main, options) == 0
    assert "has no video vectors: run mediafm index" in said()
    other = make_model("ba9876543210", video=32, audio=8, text=8)
    commit_title(str(tmp_path / "other"), other, "film", np.eye(48, dtype=np.float32)[:4])
    assert "is of dataset version 0123456789ab, not ba9876543210: run mediafm index" in said(f"output.uri={tmp_path / 'other'}")
    assert not (tmp_path / "repeats.parquet").exists()


@pytest.mark.parametrize(
    ("gains", "segments"),
    [
        ([4, -5, 3, -3, 1, 2, -2, 2, -2, 1, 5], [(0, 0), (2, 2), (4, 10)]),  # the example of Ruzzo and Tompa
        ([], []),
        ([-1, 0, -1], []),
        ([1, -0.5, 1], [(0, 2)]),
        ([1, -3, 1], [(0, 0), (2, 2)]),
    ],
)
def test_maximal_segments(gains, segments):
    assert maximal_segments(gains) == segments
