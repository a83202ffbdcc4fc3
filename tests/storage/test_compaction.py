"""Compaction: every title is there once, with the same bytes, whatever happens before, between and after its steps."""

import dataclasses
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import duckdb
import polars
import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from benchmarks.compaction import kill_compactions
from jobs import compact_dataset, describe_titles, segment_scenes, verify_dataset
from mediafm_ray.config.jobs import (
    BackfillCatalogConfig,
    CompactDatasetConfig,
    DescribeTitlesConfig,
    SegmentScenesConfig,
    VerifyDatasetConfig,
)
from mediafm_ray.config.loader import ConfigError, read_config
from mediafm_ray.derive.indexing import facts_of, title_rows
from mediafm_ray.derive.pages import catalog_content, titles_to_write
from mediafm_ray.derive.reader import read_vectors
from mediafm_ray.runs.backfill import Missing, delete_missing, plan_backfill
from mediafm_ray.storage import merged
from mediafm_ray.storage.compaction import compact_shard, present_shards
from mediafm_ray.storage.dataset import EmbeddingDataset, Output
from mediafm_ray.storage.errors import ReplacedMeanwhile
from mediafm_ray.storage.lease import LeaseHeld, held
from mediafm_ray.storage.merged import MergedFileError
from mediafm_ray.storage.names import FAILURES, SHOTS, compaction_lease_folder, contextual, encode_title, object_key, object_name
from mediafm_ray.storage.schemas import encode_parquet, read_facts
from mediafm_ray.storage.store import StorageConfig, StorageError, Store
from tests.datasets import CHECKPOINT, MODEL, SOURCE, write_dataset

TITLES = {"one": [10, 20, 30], "a/b": [40], "été ☃": [25, 25], "x" * 300: [5, 6, 7], ".hidden": [9], "two": [8, 8]}
NEWER = "ffeeddccbbaa9988"  # another source
SHARD = object_name(SHOTS, "one", SOURCE).split("/")[1].removeprefix("shard=")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    uri = tmp_path_factory.mktemp("written") / "out"
    write_dataset(str(uri), TITLES, ["lost"])
    for job, kind in ((segment_scenes, SegmentScenesConfig), (describe_titles, DescribeTitlesConfig)):
        assert job.main(read_config(kind, [], [f"output.uri={uri}"])) == 0
    return uri


@pytest.fixture
def uri(written, tmp_path):
    shutil.copytree(written, tmp_path / "out")
    return str(tmp_path / "out")


@pytest.fixture
def output(uri):
    return Output(uri, MODEL.dataset_version)


def compact(uri, *overrides):
    """Run the job, without a threshold and without a delay unless told otherwise."""
    given = [f"output.uri={uri}", "compact.min_titles=1", "compact.keep_hours=0", *overrides]
    return compact_dataset.main(read_config(CompactDatasetConfig, [], given))


@contextmanager
def lease_of(uri, config=None):
    with held(Store(uri, config), compaction_lease_folder(MODEL.dataset_version), "a test", 600) as lease:
        yield lease


def verify(uri, *overrides):
    return verify_dataset.main(read_config(VerifyDatasetConfig, [], [f"output.uri={uri}", *overrides]))


def contents(output):
    """Every committed title of every dataset, by the name of its object: the bytes."""
    found = {}
    for dataset in output.datasets():
        for infos in output.list(dataset).values():
            found |= {info.name: output.read(info.name) for info in infos}
    return found


def own_objects(output):
    """The names of the objects that titles have of their own."""
    return sorted(info.name for dataset in output.datasets() for infos in output.list_objects(dataset).values() for info in infos)


def merged_of(output, title_id, dataset=SHOTS):
    """The path of the merged file of a title's shard."""
    shard = object_name(dataset, title_id, SOURCE).split("/")[1].removeprefix("shard=")
    return Path(output.store.root, merged.file_name(dataset, shard))


def rows_of(uri, dataset=SHOTS):
    """What a scan of the whole dataset sees, in order."""
    table = EmbeddingDataset(uri).dataset(dataset).to_table()
    return table.sort_by([("title_id", "ascending"), (table.column_names[1], "ascending")]).drop_columns(
        [name for name in (merged.ENCODED_TITLE,) if name in table.column_names]
    )


def replace_title(output, title_id, dataset=SHOTS, source=NEWER):
    """Commit a title from a newer source, as a job does, and remove what that supersedes."""
    (old,) = (name for name in contents(output) if name.startswith(f"{dataset}/") and object_key(name)[0] == encode_title(title_id))
    table = EmbeddingDataset(output.store.uri.rpartition("/")[0]).read(old).slice(0, 1)
    facts = {**read_facts(table.schema), "source": source}
    name = output.write(dataset, title_id, source, encode_parquet(table, facts))
    output.remove(old, output.store.info(name).modified)
    return name


def titles_seen(output):
    """The titles by each of the ways to read them: the listing, a scan, and one by one. They must agree."""
    uri = output.store.uri.rpartition("/")[0]
    listed = [title for title, _ in output.list(SHOTS)]
    scanned = EmbeddingDataset(uri).dataset().to_table(columns=["title_id", "shot_index"])
    shots = list(zip(*scanned.to_pydict().values(), strict=True))
    assert len(shots) == len(set(shots)), "rows are doubled"
    assert sorted(listed) == sorted(map(encode_title, {title for title, _ in shots}))
    assert len(listed) == len(set(listed)), "titles are doubled"
    for title_id in TITLES:
        if encode_title(title_id) in listed:
            assert EmbeddingDataset(uri).title(title_id).num_rows == sum(title == title_id for title, _ in shots)
    return set(listed)


# ----------------------------------------------------------------------------------------------------------- round trip


def test_every_object_is_the_same_before_and_after(uri, output, capsys):
    before, scans = contents(output), {name: rows_of(uri, name) for name in EmbeddingDataset(uri).names()}
    facts = {name: output.facts(name) for name in before if not name.startswith(FAILURES)}
    objects = own_objects(output)
    assert len(scans) == 4  # shots, contextual, scenes, titles
    assert compact(uri) == 0
    said = capsys.readouterr().out
    assert f"shots: {len(TITLES)} titles in merged files; {len(TITLES)} merged now" in said
    assert [name for name in own_objects(output) if not name.startswith(FAILURES)] == []
    fresh = Output(uri, MODEL.dataset_version)
    assert contents(fresh) == before
    assert {name: fresh.facts(name) for name in facts} == facts
    assert all(fresh.has(name) for name in before)
    for name, rows in scans.items():
        assert rows_of(uri, name).equals(rows), name
    files = [str(merged_of(output, title_id)) for title_id in TITLES]
    counted = duckdb.sql(f"SELECT title_id, count(*) FROM read_parquet({files!r}) GROUP BY title_id").fetchall()
    assert dict(counted) == {title_id: len(shots) for title_id, shots in TITLES.items()}
    scan = EmbeddingDataset(uri).dataset()
    assert duckdb.from_arrow(scan).count("*").fetchall() == [(sum(map(len, TITLES.values())),)]
    assert compact(uri) == 0
    assert "0 merged now into 0 files" in capsys.readouterr().out
    assert set(objects) == set(before)


def test_a_scan_hides_a_title_that_was_deleted_while_a_compaction_had_read_it(uri, output):
    name = object_name(SHOTS, "one", SOURCE)
    assert compact(uri) == 0
    file = merged_of(output, "one")
    with_title = file.read_bytes()
    assert output.remove(name)
    assert compact(uri) == 0
    assert file.read_bytes() != with_title
    assert output.mark_deleted(name)  # As a job does that deletes the title's object after a compaction has read it.
    scan = EmbeddingDataset(uri).dataset()
    file.write_bytes(with_title)  # Only now the compaction puts its file in place.
    assert set(scan.to_table(columns=["title_id"])["title_id"].to_pylist()) == set(TITLES) - {"one"}
    assert set(EmbeddingDataset(uri).dataset().to_table(columns=["title_id"])["title_id"].to_pylist()) == set(TITLES) - {"one"}


def test_jobs_over_merged_titles_find_and_compute_the_same(uri, output, capsys):
    dataset = EmbeddingDataset(uri)
    vectors = {info.name: read_vectors(dataset, info.name, contextual(CHECKPOINT)) for (info,) in output.list(SHOTS).values()}
    page = catalog_content(dataset, uri, Store(f"{uri}/pages"))
    titles = titles_to_write(dataset, Store(f"{uri}/pages"))
    scenes = {name: content for name, content in contents(output).items() if name.startswith("scenes-")}
    facts = facts_of(dataset, contextual(CHECKPOINT), ["audio"])
    indexed = {name: title_rows(dataset, facts, name) for name in vectors}
    assert compact(uri) == 0
    dataset = EmbeddingDataset(uri)
    assert all(title_rows(dataset, facts, name).equals(rows) for name, rows in indexed.items())
    for name, before in vectors.items():
        assert (read_vectors(dataset, name, contextual(CHECKPOINT)).vectors_SD == before.vectors_SD).all()
    assert dataclasses.asdict(catalog_content(dataset, uri, Store(f"{uri}/pages"))) == dataclasses.asdict(page)
    assert titles_to_write(dataset, Store(f"{uri}/pages")) == titles == sorted(TITLES)
    capsys.readouterr()
    assert segment_scenes.main(read_config(SegmentScenesConfig, [], [f"output.uri={uri}"])) == 0
    assert f"{len(TITLES)} committed before, 0 to do" in capsys.readouterr().out
    shutil.rmtree(Path(output.store.root, "compacted", next(iter(scenes)).split("/")[0]))
    assert segment_scenes.main(read_config(SegmentScenesConfig, [], [f"output.uri={uri}"])) == 0
    assert {name: content for name, content in contents(output).items() if name.startswith("scenes-")} == scenes
    assert verify(uri) == 0


def test_the_planner_takes_merged_titles_for_done(tmp_path):
    videos, uri = tmp_path / "videos", str(tmp_path / "out")
    videos.mkdir()
    for title_id in ("one", "two"):
        (videos / f"{title_id}.mp4").write_bytes(b"video")
    options = ["backfill.delete_missing=true", "backfill.max_delete_fraction=1"]
    config = read_config(BackfillCatalogConfig, [], [f"catalog.uri={videos}", f"output.uri={uri}", *options])
    output = write_dataset(uri, {"one": [10], "two": [20]})
    for row in plan_backfill(config, MODEL).plan.pending.to_pylist():
        table = EmbeddingDataset(uri).title(row["title_id"])
        output.write(SHOTS, row["title_id"], row["source"], encode_parquet(table, {**read_facts(table.schema), "source": row["source"]}))
        for name in row["superseded"]:
            output.remove(name)
    assert compact(uri) == 0
    planned = plan_backfill(config, MODEL)
    assert (planned.plan.done, planned.plan.pending.num_rows, planned.plan.leftovers, planned.missing.titles) == (2, 0, (), [])
    (videos / "two.mp4").unlink()
    planned = plan_backfill(config, MODEL)
    assert planned.missing.titles == ["two"]
    delete_missing(planned.missing, output)
    for _ in range(2):
        planned = plan_backfill(config, MODEL)
        assert (planned.plan.done, planned.missing.titles) == (1, [])
        assert compact(uri) == 0
    (videos / "two.mp4").write_bytes(b"video")
    assert [row["title_id"] for row in plan_backfill(config, MODEL).plan.pending.to_pylist()] == ["two"]


def test_few_titles_wait_and_objects_stay_for_a_time(uri, output, capsys):
    before = contents(output)
    assert compact(uri, "compact.min_titles=2") == 0
    assert not list(Path(output.store.root).glob("compacted/shots/*/*"))
    reader = EmbeddingDataset(uri).dataset()
    assert compact(uri, "compact.keep_hours=1") == 0
    assert own_objects(output) == sorted(before)
    later = EmbeddingDataset(uri).dataset()
    assert merged.ENCODED_TITLE in later.schema.names
    for scan in (reader, later):  # one of them was opened before there were merged files
        assert scan.to_table(columns=["title_id"]).num_rows == sum(map(len, TITLES.values()))
    assert compact(uri, "compact.keep_hours=1") == 0
    assert own_objects(output) == sorted(before)
    assert compact(uri, "compact.keep_hours=0.000001") == 0
    assert [name for name in own_objects(output) if not name.startswith(FAILURES)] == []
    assert contents(output) == before


def test_long_shards_have_row_groups_that_hold_whole_titles(tmp_path, monkeypatch):
    monkeypatch.setattr(merged, "MIN_GROUP_ROWS", 4)
    monkeypatch.setattr("mediafm_ray.storage.names.hashlib.sha256", OneShard)
    uri = str(tmp_path / "out")
    output = write_dataset(uri, {f"t{number:02d}": [5] * (number % 4 + 1) for number in range(11)})
    before = contents(output)
    assert compact(uri) == 0
    file = merged.open_merged(output.store, merged.file_name(SHOTS, "00"))
    assert file.file.metadata.num_row_groups > 3
    for title in file.titles.values():
        assert file.rows(title)["title_id"].to_pylist() == [title.title] * title.rows
    assert contents(Output(uri, MODEL.dataset_version)) == before


class OneShard:
    """A digest that puts every title into the same shard."""

    def __init__(self, data):
        self.data = data

    def digest(self):
        return b"\0" + self.data

    def hexdigest(self):
        return self.data.hex()


# --------------------------------------------------------------------------------------------- changes after compaction


def test_a_title_replaced_afterwards_is_seen_once(uri, output):
    assert compact(uri) == 0
    name = replace_title(output, "one")
    marks = list(Path(output.store.root).glob("compacted/shots/*/_deleted/*"))
    for step in (lambda: None, lambda: compact(uri, "compact.min_titles=2"), lambda: compact(uri)):
        assert list(Path(output.store.root).glob("compacted/shots/*/_deleted/*")) == marks
        step()
        assert titles_seen(output) == set(map(encode_title, TITLES))
        assert [info.name for (title, _), infos in output.list(SHOTS).items() for info in infos if title == "one"] == [name]
        assert EmbeddingDataset(uri).title("one").num_rows == 1
    assert not [name for name in own_objects(output) if name.startswith(SHOTS)]
    assert not list(Path(output.store.root).glob("compacted/shots/*/_deleted/*"))
    with pytest.raises(FileNotFoundError):
        Output(uri, MODEL.dataset_version).read(object_name(SHOTS, "one", SOURCE))
    assert name in contents(output)


def test_the_documented_queries_see_every_title_once(uri, output):
    assert compact(uri) == 0
    page = (Path(__file__).parents[2] / "docs" / "schema.md").read_text()
    queries = re.findall(r"^```sql\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    merged_only, with_objects = (query.replace("VERSION", output.store.root) for query in queries)
    shots = {title_id: len(frames) for title_id, frames in TITLES.items()}
    pattern = f"{output.store.root}/compacted/shots/*/*.parquet"
    replace_title(output, "one")
    assert dict(duckdb.sql(merged_only).fetchall()) == shots
    table = polars.scan_parquet(pattern).select("title_id").collect()
    assert dict(table.group_by("title_id").len().iter_rows()) == shots
    folder = pads.dataset(f"{output.store.root}/compacted/shots", partitioning="hive").to_table(columns=["title_id", "shard"])
    assert folder.num_rows == sum(shots.values())
    found = duckdb.sql(f"SELECT title_id, count(*) FROM ({with_objects}) GROUP BY title_id").fetchall()
    assert dict(found) == {**shots, "one": 1}


def test_a_title_that_is_being_replaced_waits(uri, output):
    table = EmbeddingDataset(uri).title("one")
    newer = output.write(SHOTS, "one", NEWER, encode_parquet(table, {**read_facts(table.schema), "source": NEWER}))
    assert compact(uri) == 0
    assert {name for name in own_objects(output) if name.startswith(SHOTS)} == {newer, object_name(SHOTS, "one", SOURCE)}
    output.store.delete(object_name(SHOTS, "one", SOURCE))
    assert compact(uri) == 0
    assert titles_seen(output) == set(map(encode_title, TITLES))
    assert newer in contents(output)


@pytest.mark.parametrize("title_id", ["one", "x" * 300])
def test_a_title_deleted_afterwards_is_gone_and_may_come_back(uri, output, title_id):
    before, encoded = contents(output), encode_title(title_id)
    assert compact(uri) == 0
    gone = [
        info for dataset in output.datasets() for (title, _), infos in output.list(dataset).items() for info in infos if title == encoded
    ]
    assert len(gone) == 4
    assert delete_missing(Missing([encoded], gone, len(TITLES)), output) == len(gone)
    left = {name for name in before if object_key(name)[0] != encoded}
    others = set(map(encode_title, TITLES)) - {encoded}
    for step in (lambda: None, lambda: compact(uri)):
        step()
        assert titles_seen(output) == others
        assert set(contents(Output(uri, MODEL.dataset_version))) == left
    assert not list(Path(output.store.root).glob("compacted/*/*/_deleted/*"))
    assert delete_missing(Missing([encoded], gone, len(TITLES)), output) == len(gone)  # again: the marks are of no use
    for name in (info.name for info in gone):
        output.store.write(name, before[name])
    for step in (lambda: None, lambda: compact(uri), lambda: compact(uri)):
        step()
        assert titles_seen(output) == others | {encoded}
        assert contents(Output(uri, MODEL.dataset_version)) == before
    assert not own_objects(output)[1:]  # the failure record
    assert not list(Path(output.store.root).glob("compacted/*/*/_deleted/*"))


@pytest.mark.parametrize("moment", ["before it is written", "after it is written"])
@pytest.mark.parametrize("again", [False, True])
def test_a_title_deleted_while_it_is_merged_does_not_come_back(uri, output, monkeypatch, moment, again):
    """The first compaction of a shard, or one that follows others, has read the object of a title that a job removes."""
    name = object_name(SHOTS, "one", SOURCE)
    if again:
        content = output.read(name)
        assert compact(uri) == 0
        output.remove(name)
        output.store.write(name, content)
    real = Store.replace

    def replace(store, where, path, expected):
        if moment == "before it is written":
            Output(uri, MODEL.dataset_version).remove(name)
        real(store, where, path, expected)
        if moment == "after it is written":
            Output(uri, MODEL.dataset_version).remove(name)

    monkeypatch.setattr(Store, "replace", replace)
    with lease_of(uri) as lease:
        compact_shard(EmbeddingDataset(uri), SHOTS, SHARD, lease)
    assert titles_seen(output) == set(map(encode_title, TITLES)) - {"one"}
    monkeypatch.undo()
    assert compact(uri) == 0
    assert titles_seen(output) == set(map(encode_title, TITLES)) - {"one"}


# ------------------------------------------------------------------------------------------------------- steps and kills


class Killed(BaseException):
    """The process is gone."""


CHANGES = ("list", "read", "write", "replace", "delete", "delete_unless_newer")


@pytest.mark.parametrize("state", ["new", "replaced", "deleted", "back again"])
def test_a_kill_before_or_after_any_step_changes_nothing(tmp_path, monkeypatch, state):
    """Stop the compaction of a shard before and after each of its calls of the store; every reader sees the same, and so at the end."""
    uri, name = str(tmp_path / "out"), object_name(SHOTS, "one", SOURCE)
    output = write_dataset(uri, {"one": [10, 20, 30], "two": [8, 8]}, checkpoint="")
    there, content = {"one", "two"}, output.read(name)
    if state != "new":
        assert compact(uri) == 0
        output.remove(name)
    if state == "replaced":
        rows = EmbeddingDataset(uri).title("two").slice(0, 1)
        facts = {**read_facts(rows.schema), "title_id": "one", "source": NEWER}
        output.write(SHOTS, "one", NEWER, encode_parquet(rows.set_column(0, rows.schema.field(0), pa.array(["one"])), facts))
    elif state == "deleted":
        there.discard("one")
    elif state == "back again":
        output.store.write(name, content)
    expected = contents(output)
    shutil.copytree(uri, tmp_path / "start", copy_function=shutil.copy2)
    with lease_of(str(tmp_path / "leases")) as lease:
        for stop in range(1000):
            shutil.rmtree(uri)
            shutil.copytree(tmp_path / "start", uri, copy_function=shutil.copy2)
            with monkeypatch.context() as patch:
                calls = iter(range(10_000))
                for method in CHANGES:
                    patch.setattr(Store, method, dying(getattr(Store, method), calls, stop))
                try:
                    compact_shard(EmbeddingDataset(uri), SHOTS, SHARD, lease)
                    ended = True
                except Killed:
                    ended = False
            assert titles_seen(output) == there
            assert contents(Output(uri, MODEL.dataset_version)) == expected
            if ended:
                break
            compact_shard(EmbeddingDataset(uri), SHOTS, SHARD, lease)
            assert contents(Output(uri, MODEL.dataset_version)) == expected
            assert own_objects(output) == [object_name(SHOTS, "two", SOURCE)] * (state == "new")
            assert not list(Path(output.store.root).glob("compacted/*/*/_deleted/*"))
    assert stop > 10


def dying(real, calls, stop):
    """A method of the store that ends the process before (even) or after (odd) its call with a certain number."""

    def method(*arguments):
        number = next(calls)
        if number == stop // 2 and not stop % 2:
            raise Killed
        result = real(*arguments)
        if number == stop // 2:
            raise Killed
        return result

    return method


def test_two_compactions_do_not_run_at_once(uri):
    with lease_of(uri), pytest.raises(LeaseHeld, match=r"a test holds the lease .*-compaction, since"):
        compact(uri)
    assert compact(uri) == 0


def test_a_compaction_that_was_stopped_for_long_replaces_nothing(uri, output, monkeypatch):
    """It has read a merged file that another compaction has replaced since, with titles whose objects are gone."""
    before, real = contents(output), Store.replace

    def replace(store, name, path, expected):
        monkeypatch.setattr(Store, "replace", real)
        with lease_of(uri + "-other") as other:
            compact_shard(EmbeddingDataset(uri), SHOTS, SHARD, other)
        real(store, name, path, expected)

    monkeypatch.setattr(Store, "replace", replace)
    with lease_of(uri) as lease, pytest.raises(ReplacedMeanwhile, match="was replaced by another process"):
        compact_shard(EmbeddingDataset(uri), SHOTS, SHARD, lease)
    assert contents(output) == before


@pytest.mark.slow
def test_kills_beside_a_writer_and_a_reader(tmp_path):
    """50 compactions killed at seeded moments, while titles are committed, replaced and deleted, and read all the while."""
    result = kill_compactions(50, 7, str(tmp_path / "out"))
    assert result.kills == 50
    assert result.changes.total() > 50
    assert result.polls > 50
    assert (result.lost, result.doubled, result.different, result.left, result.errors) == ([], [], [], [], [])


# ---------------------------------------------------------------------------------------------------------------- damage


def test_a_file_cut_short_is_an_error_that_names_it_and_repaired(uri, output, capsys):
    before = contents(output)
    assert compact(uri) == 0
    path = merged_of(output, "one")
    path.write_bytes(path.read_bytes()[:-100])
    fresh = Output(uri, MODEL.dataset_version)
    with pytest.raises(MergedFileError, match=rf"{path} cannot be read .* not counted as missing"):
        fresh.list(SHOTS)
    with pytest.raises(StorageError, match=str(path)):
        compact(uri)
    capsys.readouterr()
    assert verify(uri) == 1
    assert f"BROKEN {MODEL.dataset_version}/{merged.file_name(SHOTS, SHARD)}: " in (said := capsys.readouterr().out)
    assert "the next run computes its titles again" in said
    assert verify(uri, "verify.repair=true") == 1
    lost = object_name(SHOTS, "one", SOURCE)
    assert lost not in (left := contents(Output(uri, MODEL.dataset_version)))
    assert set(before) - set(left) == {name for name in before if object_key(name)[0] == "one"}
    output.store.write(lost, before[lost])
    assert compact(uri) == 0
    assert contents(Output(uri, MODEL.dataset_version))[lost] == before[lost]


def test_a_file_of_a_later_version_is_refused_and_kept(uri, output, capsys, monkeypatch):
    monkeypatch.setattr(merged, "FORMAT", 2)
    assert compact(uri) == 0
    monkeypatch.undo()
    path = merged_of(output, "one")
    for call in (lambda: output.list(SHOTS), lambda: compact(uri), lambda: EmbeddingDataset(uri).title("one")):
        with pytest.raises(MergedFileError, match=r"was written by a later version of mediafm_ray .format 2, this one reads 1"):
            call()
    assert verify(uri, "verify.repair=true") == 1
    assert path.exists()


def test_damaged_rows_are_found_by_verify_and_computed_again(uri, output, capsys):
    before = contents(output)
    assert compact(uri) == 0
    path = merged_of(output, "one")
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 16  # a page of the rows
    path.write_bytes(content)
    capsys.readouterr()
    assert verify(uri, "verify.repair=true") == 1
    assert (
        f"BROKEN {MODEL.dataset_version}/{object_name(SHOTS, 'one', SOURCE)}: its rows in {path} cannot be read" in capsys.readouterr().out
    )
    fresh = Output(uri, MODEL.dataset_version)
    lost = {name for name in before if object_key(name)[0] == "one"}
    assert set(before) - set(contents(fresh)) == lost
    for name in lost:
        output.store.write(name, before[name])
    assert compact(uri) == 0
    assert contents(Output(uri, MODEL.dataset_version)) == before
    assert verify(uri) == 0


def test_damaged_objects_stay_as_they_are(uri, output, capsys):
    path = Path(output.store.path(object_name(SHOTS, "one", SOURCE)))
    path.write_bytes(path.read_bytes()[:-10])
    assert compact(uri) == 1
    said = capsys.readouterr().out
    assert f"NOT MERGED {object_name(SHOTS, 'one', SOURCE)}: it is damaged" in said
    assert path.exists()
    assert len(output.list(SHOTS)) == len(TITLES)


# --------------------------------------------------------------------------------------------------------- object storage


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moto", "swift"])
def test_on_object_storage(request, kind, written, s3_keys, monkeypatch):
    server = request.getfixturevalue(kind)
    config = StorageConfig(endpoint_url=server.url, part_mb=5)
    uri = f"s3://{server.bucket()}/out"
    store = Store(uri, config)
    for path in Path(written).rglob("*"):
        if path.is_file() and path.suffix in (".parquet", ".json") and "runs" not in path.parts:
            store.write(str(path.relative_to(written)), path.read_bytes())
    output = Output(uri, MODEL.dataset_version, config)
    before = contents(output)
    with pytest.raises(ConfigError, match="at least 1 on object storage"):
        compact(uri, f"storage.endpoint_url={server.url}")
    assert compact(uri, f"storage.endpoint_url={server.url}", "compact.keep_hours=1") == 0
    assert own_objects(output) == sorted(before)
    time.sleep(1.1)  # Times of objects are whole seconds.
    with lease_of(uri, config) as lease:
        for name in output.datasets():
            if name != FAILURES:
                for shard in present_shards(EmbeddingDataset(uri, config=config), name):
                    compact_shard(EmbeddingDataset(uri, config=config), name, shard, lease)
    assert [name for name in own_objects(output) if not name.startswith(FAILURES)] == []
    assert contents(Output(uri, MODEL.dataset_version, config)) == before
    scan = EmbeddingDataset(uri, config=config).dataset().to_table(columns=["title_id"])
    assert scan.num_rows == sum(map(len, TITLES.values()))
    output.remove(object_name(SHOTS, "one", SOURCE))
    assert object_name(SHOTS, "one", SOURCE) not in contents(output)
    if kind == "moto":  # It has conditional writes, Swift has not.
        name = merged.file_name(SHOTS, SHARD)
        stale = store_info(output, name)
        with pytest.raises(ReplacedMeanwhile):
            output.store.replace(name, __file__, stale._replace(version="0" * 32))
        with pytest.raises(ReplacedMeanwhile):
            output.store.replace(name, __file__, None)
        output.store.replace(name, __file__, stale)
        assert output.store.read(name) == Path(__file__).read_bytes()


def store_info(output, name):
    info = output.store.info(name)
    assert info is not None
    return info
