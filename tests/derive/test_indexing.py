"""Building an index of shots night after night: what changes, what is killed, what else is there."""

import subprocess
import sys
import time
from pathlib import Path

import lance
import pytest

from mediafm_ray.derive import indexing
from mediafm_ray.storage import lease
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.index import EMBEDDING, NoIndex, SearchParams, open_index
from mediafm_ray.storage.index_writer import IndexWriter
from mediafm_ray.storage.store import StorageConfig
from tests.searchable import MODEL, TITLES, build, commit, contents, expected, found, search, vectors_of

ROOT = Path(__file__).parents[2]
MANY = {f"title-{number}": 60 for number in range(12)}  # enough shots for vector indexes
LARGE = ["index.least_shots=256", "index.queries=50"]


@pytest.fixture
def output(tmp_path):
    for title_id, count in TITLES.items():
        commit(tmp_path / "out", title_id, count)
    return tmp_path / "out"


@pytest.fixture
def large_output(tmp_path):
    for title_id, count in MANY.items():
        commit(tmp_path / "out", title_id, count)
    return tmp_path / "out"


def remove(output, title_id):
    dataset = EmbeddingDataset(str(output))
    dataset.output.store.delete(dataset.title_object(title_id))


def version(index):
    return lance.dataset(str(index)).version


def test_only_what_changed_is_done_and_the_end_is_that_of_a_fresh_build(output, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(output, index) == 0
    printed = capsys.readouterr().out
    assert "4 titles, 0 in the index, 4 to add, 0 to remove" in printed
    assert "4 titles added with 34 shots, 0 removed, 0 failed" in printed
    assert "embedding: 34 vectors, searched exactly" in printed
    built = version(index)
    assert build(output, index) == 0
    printed = capsys.readouterr().out
    assert "4 titles, 4 in the index, 0 to add, 0 to remove" in printed
    assert "recall" not in printed
    assert version(index) == built
    commit(output, "new", 6)
    commit(output, "film", 7, seed=1)  # edited
    remove(output, "series/s01e01")
    assert build(output, index) == 0
    printed = capsys.readouterr().out
    assert "4 titles, 2 in the index, 2 to add, 1 of them changed, 1 to remove" in printed
    assert "2 titles added with 13 shots, 2 removed, 0 failed" in printed
    fresh = tmp_path / "fresh"
    assert build(output, fresh) == 0
    assert contents(index) == contents(fresh)
    assert {row["title_id"] for row in contents(index)} == {"film", "series/s01e02", "it's: ☃", "new"}
    for query in ("shot=film:6", "shot=new:0", "clip=series/s01e02:1-9"):
        assert found(capsys, index, query, "count=50") == found(capsys, fresh, query, "count=50")
    assert search(index, "shot=film:11") == 2  # the edited film has 7


def test_a_vector_index_keeps_its_recall_through_changes(large_output, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(large_output, index, *LARGE) == 0
    printed = capsys.readouterr().out
    for column in (EMBEDDING, "video_embedding", "audio_embedding", "text_embedding"):
        assert f"{column}: vector index trained on {540 if column == 'text_embedding' else 720} vectors" in printed
        assert f"{column}: recall@10 " in printed
    settings = open_index(str(index), StorageConfig()).settings
    assert all(setting.recall >= 0.97 and setting.queries == 50 for setting in settings.values())
    query = vectors_of("title-3", 60)[7]
    places, _ = expected(query, titles=MANY, without=[("title-3", 7)])
    assert len(set(found(capsys, index, "shot=title-3:7")[0]) & set(places[:10])) >= 9
    assert found(capsys, index, "shot=title-3:7", "index.exact=true")[0] == places[:10]
    built = version(index)
    assert build(large_output, index, *LARGE) == 0
    assert version(index) == built
    commit(large_output, "new", 60)
    remove(large_output, "title-0")
    capsys.readouterr()
    assert build(large_output, index, *LARGE) == 0
    printed = capsys.readouterr().out
    assert "trained" not in printed  # as it was trained it is good enough
    assert "embedding: recall@10 " in printed
    there = open_index(str(index), StorageConfig())
    assert there.dataset.stats.index_stats(EMBEDDING)["num_unindexed_rows"] == 0
    now = {**{title_id: count for title_id, count in MANY.items() if title_id != "title-0"}, "new": 60}
    places, _ = expected(query, titles=now, without=[("title-3", 7)])
    assert len(set(found(capsys, index, "shot=title-3:7")[0]) & set(places[:10])) >= 9
    assert found(capsys, index, "shot=new:0", "filter.titles=[new]", "count=100")[0] == [
        place for place in expected(vectors_of("new", 60)[0], titles=now)[0] if place[0] == "new" and place[1]
    ]


@pytest.mark.parametrize(("best", "chosen"), [(1.0, (16, 8)), (0.9, (128, 32))], ids=["reached", "out of reach"])
def test_partitions_and_candidates_are_no_more_than_the_recall_needs(large_output, tmp_path, capsys, monkeypatch, best, chosen):
    """Recall here is what the partitions allow, less where candidates lack."""

    def recall(index, column, queries_QD, true_cosine_QK, setting):
        partitions = min(setting.nprobes / 16, 1) if best == 1.0 else setting.nprobes / 128
        return best * partitions * (1.0 if setting.refine >= chosen[1] else 0.9)

    monkeypatch.setattr(indexing, "measured_recall", recall)
    monkeypatch.setattr(IndexWriter, "train", lambda writer, column: SearchParams(720, 1000))
    assert build(large_output, tmp_path / "index", *LARGE, "index.parts=[]") == 0
    setting = open_index(str(tmp_path / "index"), StorageConfig()).settings[EMBEDDING]
    assert (setting.nprobes, setting.refine, setting.recall) == (*chosen, best)
    assert f"{chosen[0]} of 1000 partitions searched, {19 * chosen[1]} candidates compared exactly" in capsys.readouterr().out


def test_a_catalog_that_outgrows_its_vector_index_or_shrinks_gets_another_or_none(large_output, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(large_output, index, *LARGE, "index.parts=[]") == 0
    for number in range(20):
        commit(large_output, f"more-{number}", 45)
    capsys.readouterr()
    assert build(large_output, index, *LARGE, "index.parts=[]") == 0
    assert "embedding: vector index trained on 1620 vectors" in capsys.readouterr().out
    assert build(large_output, index, "index.parts=[]") == 0  # the default: so few are searched exactly
    assert "embedding: 1620 vectors, searched exactly" in capsys.readouterr().out
    there = open_index(str(index), StorageConfig())
    assert there.settings == {}
    assert EMBEDDING not in [description.name for description in there.dataset.describe_indices()]


class Killed(BaseException):
    """As a signal ends the process: nothing catches it."""


STEPS = ("_append", "remove", "index_new_rows", "train", "index_titles", "merge_files", "record", "publish", "prune_versions")


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_a_build_that_ends_at_any_step_leaves_the_last_version_and_is_finished(large_output, tmp_path, capsys, monkeypatch, when):
    index = tmp_path / "index"
    options = [*LARGE, "index.parts=[]", "index.queries=5"]
    assert build(large_output, index, *options) == 0
    for number, step in enumerate(STEPS):
        before = contents(index)
        commit(large_output, f"new-{number}", 20)
        commit(large_output, "title-1", 50 + number, seed=number + 1)
        commit(large_output, f"growth-{number}", 400) if step == "train" else None
        if step == "index_titles":  # so that there is something to index
            IndexWriter(str(index), StorageConfig()).drop("title_id")
        original = getattr(IndexWriter, step)

        def ended(self, *arguments, original=original):
            if when == "after":
                original(self, *arguments)
            raise Killed

        with monkeypatch.context() as patch:
            if step in ("train", "record"):
                patch.setattr(indexing, "GROWTH", 1.0)  # so that there is something to train, and settings to record
            patch.setattr(IndexWriter, step, ended)
            with pytest.raises(Killed):
                build(large_output, index, *options)
        done = step == "prune_versions" or (step == "publish" and when == "after")
        assert (contents(index) == before) == (not done), step
        assert search(index, "shot=title-3:7") == 0
        assert build(large_output, index, *options) == 0
        after = contents(index)
        assert len(after) == len({(row["title_id"], row["shot_index"]) for row in after}), step
        assert sum(row["title_id"] == "title-1" for row in after) == 50 + number
    fresh = tmp_path / "fresh"
    assert build(large_output, fresh, *options) == 0
    assert contents(index) == contents(fresh)


KILL = """
import os, signal, sys
from mediafm_ray.storage.index_writer import IndexWriter
from mediafm_ray.runs.command import run_job
from mediafm_ray.config.jobs import BuildIndexConfig
from jobs import build_index

def killed(self, *arguments):
    os.kill(os.getpid(), signal.SIGKILL)

IndexWriter.remove = killed
run_job("", BuildIndexConfig, build_index.main, sys.argv[1:])
"""


def test_a_process_that_is_killed_holds_the_next_build_up_for_as_long_as_its_lease(output, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(output, index) == 0
    commit(output, "new", 6)
    before = contents(index)
    options = [f"output.uri={output}", f"index.uri={index}", "vectors.kind=fused", "index.lease_minutes=0.05"]
    done = subprocess.run([sys.executable, "-c", KILL, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert contents(index) == before
    capsys.readouterr()
    assert build(output, index) == 2
    assert "mediafm index (process" in capsys.readouterr().err
    deadline = time.monotonic() + 30
    while build(output, index) != 0:
        assert time.monotonic() < deadline
        time.sleep(1)
    printed = capsys.readouterr().out
    assert "5 titles, 5 in the index, 0 to add" in printed  # the killed build had added it
    assert {row["title_id"] for row in contents(index)} == {*TITLES, "new"}


def test_a_title_that_cannot_be_read_is_that_titles_failure_and_keeps_its_older_rows(output, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(output, index) == 0
    commit(output, "film", 7, seed=1)
    commit(output, "new", 6)
    dataset = EmbeddingDataset(str(output))
    store = dataset.output.store
    name = dataset.title_object("film")
    store.write(name, store.read(name)[:300])
    capsys.readouterr()
    assert build(output, index) == 1
    printed = capsys.readouterr().out
    assert "FAILED film: shots/" in printed
    assert "1 title added with 6 shots, 0 removed, 1 failed" in printed
    assert "failures:\n  film: shots/" in printed
    assert sum(row["title_id"] == "film" for row in contents(index)) == 12
    assert build(output, index, "run.max_failed_fraction=1") == 0
    assert build(output, tmp_path / "other", "run.max_failed_fraction=1") == 0
    assert {row["title_id"] for row in contents(tmp_path / "other")} == {*TITLES, "new"} - {"film"}


def test_an_index_of_other_things_is_refused_unless_it_is_to_be_replaced(output, tmp_path, capsys, monkeypatch):
    index = tmp_path / "index"
    assert build(output, index, "index.parts=[text]") == 0
    before = contents(index)
    assert build(output, index) == 2
    error = capsys.readouterr().err
    assert "it holds fused vectors of dataset version 0123456789ab, parts: text" in error
    assert "not fused vectors of dataset version 0123456789ab, parts: video, audio, text" in error
    assert contents(index) == before
    with monkeypatch.context() as patch:  # the old one is there until the new one is whole

        def publish(self):
            raise Killed

        patch.setattr(IndexWriter, "publish", publish)
        with pytest.raises(Killed):
            build(output, index, "index.replace=true")
    assert contents(index) == before
    assert build(output, index, "index.replace=true") == 0
    assert "video_embedding" in contents(index)[0]
    assert len(contents(index)) == 34


def test_what_cannot_be_indexed_is_said_before_anything_is_written(output, tmp_path, capsys):
    for overrides, reason in (
        (["index.uri="], "index.uri is required"),
        (["vectors.kind=contextual"], "no contextual embeddings; there are: shots"),
        (["index.parts=[smell]"], "index.parts must be one of video, audio, text"),
        (["index.least_shots=10"], "index.least_shots must be at least 256"),
        (["index.recall=2"], "index.recall must be above 0"),
        ([f"index.uri={output}"], f"it is not empty; there is: {MODEL.dataset_version}"),
        ([f"output.uri={tmp_path}/nowhere"], "has no dataset version"),
        (["dataset.version=ffffffffffff"], "there are: 0123456789ab"),
    ):
        assert build(output, tmp_path / "index", *overrides) == 2, overrides
        error = capsys.readouterr().err
        assert reason in error, error
        assert error.count("\n") == 1
    assert not (tmp_path / "index").exists()
    with pytest.raises(NoIndex):
        open_index(str(tmp_path / "index"), StorageConfig())


@pytest.mark.slow
@pytest.mark.parametrize("server", ["moto", "swift"])
def test_an_index_in_a_bucket(request, output, tmp_path, capsys, monkeypatch, s3_keys, server):
    server = request.getfixturevalue(server)
    options = [f"storage.endpoint_url={server.url}", *LARGE, "index.parts=[text]"]
    uri = f"s3://{server.bucket()}/some/index"
    for title_id, count in MANY.items():
        commit(output, title_id, count)
    assert build(output, uri, *options) == 0
    titles = {**TITLES, **MANY}
    query = vectors_of("film", 12)[4]
    places, _ = expected(query, titles=titles, without=[("film", 4)])
    endpoint = options[0]
    assert len(set(found(capsys, uri, "shot=film:4", endpoint)[0]) & set(places[:10])) >= 9
    assert found(capsys, uri, "shot=film:4", endpoint, "index.exact=true")[0] == places[:10]
    commit(output, "film", 7, seed=1)
    assert build(output, uri, *options) == 0
    assert "1 title added with 7 shots, 1 removed, 0 failed" in capsys.readouterr().out
    assert search(uri, "shot=film:11", endpoint) == 2
    assert "'film' has no shot 11: it has 7" in capsys.readouterr().err
    assert search(f"{uri}/nowhere", "shot=film:4", endpoint) == 2
    assert "has no index of shots; there is nothing" in capsys.readouterr().err
    assert build(output, "s3://no-such-bucket-there/index", *options) == 2
    assert "there is no bucket no-such-bucket-there" in capsys.readouterr().err


def test_a_build_that_lost_its_lease_publishes_nothing(output, tmp_path, capsys, monkeypatch):
    index = tmp_path / "index"
    assert build(output, index) == 0
    commit(output, "new", 6)
    before = contents(index)
    original = IndexWriter.remove

    def slow(self, keys):
        original(self, keys)
        for path in (index / "leases").rglob("*.json"):
            path.unlink()
        time.sleep(0.5)  # longer than the lease

    with monkeypatch.context() as patch:
        patch.setattr(lease, "_keep", lambda *arguments: None)  # and nobody renews it
        patch.setattr(IndexWriter, "remove", slow)
        assert build(output, index, "index.lease_minutes=0.005") == 3
    assert "another build may have begun; nothing is published" in capsys.readouterr().err
    assert contents(index) == before
    assert build(output, index) == 0
    assert {row["title_id"] for row in contents(index)} == {*TITLES, "new"}
