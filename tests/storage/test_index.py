"""The index itself, without a catalog: rows in, rows found, against searches and conditions written out by hand."""

import json

import lance
import numpy as np
import pyarrow as pa
import pytest

from mediafm_ray.downstream.retrieval import ExactSearch, recall
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage import index as storage_index
from mediafm_ray.storage import index_writer
from mediafm_ray.storage.index import EMBEDDING, IndexFacts, NoIndex, SearchParams, ShotFilter, half_vectors, open_index
from mediafm_ray.storage.index_writer import IndexWriter
from mediafm_ray.storage.store import StorageConfig, StorageError

CONFIG = StorageConfig()
FACTS = IndexFacts("0123456789ab", "shots", {EMBEDDING: 24, "text_embedding": 10}, {"text": {"encoder": "none"}})
LANGUAGES = ("en", "EN-us", "eng", "de", "")
TITLES = {"plain": 40, "it's; DROP TABLE shots --": 30, "ete ☃/épisode 1": 50, 'say "no"': 20}


def rows_of(title_id, count, source="s1", seed=0, facts=FACTS):
    """Rows of a title of shots of 2 s; every third has no text, the fourth no vector at all."""
    random = np.random.default_rng([seed, *title_id.encode()])
    whole, text = random.normal(size=(count, 24)).astype(np.float32), random.normal(size=(count, 10)).astype(np.float32)
    has_text = np.arange(count) % 3 != 2
    columns = {
        "title_id": pa.array([title_id] * count),
        "source": pa.array([source] * count),
        "shot_index": pa.array(range(count), pa.int32()),
        "start_s": pa.array(np.arange(count) * 2.0),
        "end_s": pa.array(np.arange(count) * 2.0 + 2.0),
        "language": pa.array([LANGUAGES[shot % 5] for shot in range(count)]),
        "text": pa.array([f"shot {shot}" for shot in range(count)]),
        **{f"has_{modality}": pa.array([True] * count) for modality in MODALITIES},
        EMBEDDING: half_vectors(unit(whole), np.arange(count) != 3),
        "text_embedding": half_vectors(unit(text), has_text),
    }
    schema = facts.schema().remove_metadata()
    return pa.table([columns[field.name] for field in schema], schema=schema)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(uri, titles=TITLES):
    writer = IndexWriter(str(uri), CONFIG)
    writer.create(FACTS)
    writer.add(rows_of(title_id, count) for title_id, count in titles.items())
    writer.publish()
    return writer


def all_rows(titles=TITLES):
    return pa.concat_tables([rows_of(title_id, count) for title_id, count in titles.items()])


def places(table):
    return list(zip(table["title_id"].to_pylist(), table["shot_index"].to_pylist(), strict=True))


def by_hand(rows, column, query):
    """Places and cosines of the rows that have a vector, nearest first."""
    found = []
    for row in rows.to_pylist():
        if row[column] is not None:
            vector = np.array(row[column], np.float64)
            found.append(((row["title_id"], row["shot_index"]), vector @ query / np.linalg.norm(vector) / np.linalg.norm(query)))
    return sorted(found, key=lambda one: -one[1])


@pytest.mark.parametrize("column", [EMBEDDING, "text_embedding"])
def test_the_nearest_are_those_of_a_search_written_out(tmp_path, column):
    build(tmp_path)
    index = open_index(str(tmp_path), CONFIG)
    assert index.facts == FACTS
    assert index.shots() == 140
    query = np.random.default_rng(7).normal(size=FACTS.dims[column]).astype(np.float32)
    expected = by_hand(all_rows(), column, query)
    assert index.shots(column) == len(expected) < 140
    found = index.nearest(column, query, 200)
    assert places(found) == [place for place, _ in expected]
    np.testing.assert_allclose(found["cosine"], [cosine for _, cosine in expected], atol=1e-5)
    assert places(index.nearest(column, query, 5)) == [place for place, _ in expected[:5]]
    row = found.slice(0, 1).to_pylist()[0]
    (stored,) = [one for one in all_rows().to_pylist() if (one["title_id"], one["shot_index"]) == expected[0][0]]
    assert {name: row[name] for name in storage_index.ROW_COLUMNS} == {name: stored[name] for name in storage_index.ROW_COLUMNS}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (ShotFilter(), lambda row: True),
        (
            ShotFilter(titles=["it's; DROP TABLE shots --", 'say "no"']),
            lambda row: row["title_id"][0] in "is" and "ete" not in row["title_id"],
        ),
        (ShotFilter(without_titles=["ete ☃/épisode 1"]), lambda row: "☃" not in row["title_id"]),
        (ShotFilter(start_s=20.0), lambda row: row["end_s"] > 20),
        (ShotFilter(start_s=19.5, end_s=22.0), lambda row: row["shot_index"] in (9, 10)),
        (ShotFilter(end_s=1e-5), lambda row: row["shot_index"] == 0),
        (ShotFilter(languages=["en"]), lambda row: row["language"] in ("en", "EN-us")),
        (ShotFilter(languages=["EN-US", "de"]), lambda row: row["language"] in ("EN-us", "de")),
        (ShotFilter(languages=["e%"]), lambda row: False),
        (
            ShotFilter(titles=["plain"], end_s=30, languages=["de"]),
            lambda row: row["title_id"] == "plain" and row["shot_index"] in (3, 8, 13),
        ),
    ],
)
def test_conditions_keep_what_they_say(tmp_path, condition, holds):
    build(tmp_path)
    index = open_index(str(tmp_path), CONFIG)
    query = np.ones(24, np.float32)
    rows = all_rows()
    kept = rows.filter(pa.array([holds(row) for row in rows.to_pylist()], pa.bool_()))
    assert places(index.nearest(EMBEDDING, query, 200, condition.sql())) == [place for place, _ in by_hand(kept, EMBEDDING, query)]


def test_titles_are_read_back_in_order_whatever_their_ids(tmp_path):
    writer = build(tmp_path)
    assert writer.index.titles() == {(title_id, "s1"): count for title_id, count in TITLES.items()}
    for title_id, count in TITLES.items():
        table = writer.index.title(title_id, [EMBEDDING])
        assert table["shot_index"].to_pylist() == list(range(count))
        assert table[EMBEDDING].to_pylist() == rows_of(title_id, count)[EMBEDDING].to_pylist()
    assert len(writer.index.title("nobody", [])) == 0


def test_only_what_is_published_is_seen_and_older_versions_stay_readable(tmp_path):
    writer = build(tmp_path, {"a": 10})
    reader = open_index(str(tmp_path), CONFIG)
    writer.add([rows_of("b", 5)])
    writer.remove([("a", "s1")])
    assert not writer.published()
    assert set(open_index(str(tmp_path), CONFIG).titles()) == {("a", "s1")}
    writer.publish()
    assert writer.published()
    assert set(open_index(str(tmp_path), CONFIG).titles()) == {("b", "s1")}
    assert set(reader.titles()) == {("a", "s1")}  # who opened it before still reads what there was
    writer.prune_versions(older_than_hours=0)
    assert set(open_index(str(tmp_path), CONFIG).titles()) == {("b", "s1")}
    assert len(lance.dataset(str(tmp_path)).versions()) == 1


def test_removal_takes_the_named_source_only(tmp_path):
    writer = build(tmp_path, {"a": 10, "it's": 7})
    writer.add([rows_of("it's", 4, source="s2")])
    writer.remove([("it's", "s1"), ("nobody", "s1")])
    assert writer.index.titles() == {("a", "s1"): 10, ("it's", "s2"): 4}
    writer.remove([("a", f"s{number}") for number in range(500)])
    assert writer.index.titles() == {("it's", "s2"): 4}


def test_rows_come_in_groups_and_small_files_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(index_writer, "GROUP_BYTES", 2000)
    many = {f"title-{number}": 10 for number in range(60)}
    writer = build(tmp_path, many)
    files = len(writer.lance.get_fragments())
    assert 20 < files <= 60
    monkeypatch.setattr(index_writer, "GROUP_BYTES", 256 << 20)
    assert writer.merge_files()
    assert len(writer.lance.get_fragments()) < files / 4
    assert writer.index.titles() == {(title_id, "s1"): 10 for title_id in many}
    query = np.ones(24, np.float32)
    assert places(writer.index.nearest(EMBEDDING, query, 50)) == [place for place, _ in by_hand(all_rows(many), EMBEDDING, query)[:50]]
    assert not writer.merge_files()


def test_a_vector_index_finds_what_exact_search_finds_also_after_changes(tmp_path):
    titles = {f"title-{number}": 100 for number in range(10)}
    writer = build(tmp_path, titles)
    settings = {column: writer.train(column) for column in FACTS.dims}
    writer.index_titles()
    assert set(writer.indexed()) == {EMBEDDING, "text_embedding", "title_id"}
    assert settings["text_embedding"].trained_shots == all_rows(titles)["text_embedding"].is_valid().to_pylist().count(True)
    everything = {
        column: SearchParams(setting.trained_shots, setting.partitions, setting.partitions, 100) for column, setting in settings.items()
    }
    writer.record(everything)
    writer.publish()
    changed = all_rows({title_id: count for title_id, count in titles.items() if title_id != "title-4"})
    changed = pa.concat_tables([changed, rows_of("title-4", 80, source="s2", seed=1), rows_of("new", 30)])
    for step in ("as built", "changed"):
        if step == "changed":
            writer.add([rows_of("title-4", 80, source="s2", seed=1), rows_of("new", 30)])
            writer.remove([("title-4", "s1")])
            writer.index_new_rows()
            writer.publish()
        index = open_index(str(tmp_path), CONFIG)
        assert index.settings == everything
        rows = all_rows(titles) if step == "as built" else changed
        for column, dim in FACTS.dims.items():
            for seed in range(5):
                query = np.random.default_rng(seed).normal(size=dim).astype(np.float32)
                expected = by_hand(rows, column, query)
                found = index.nearest(column, query, 10)
                assert places(found) == [place for place, _ in expected[:10]]
                np.testing.assert_allclose(found["cosine"], [cosine for _, cosine in expected[:10]], atol=1e-3)
                few = index.nearest(column, query, 10, ShotFilter(titles=["title-7"], start_s=50).sql())
                assert places(few) == [place for place, _ in expected if place[0] == "title-7" and place[1] >= 25][:10]
        counts = index.dataset.stats.index_stats(EMBEDDING)
        assert counts["num_unindexed_rows"] == 0


def test_little_effort_finds_less_and_recall_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(index_writer, "SHOTS_PER_PARTITION", 50)
    writer = build(tmp_path, {f"title-{number}": 100 for number in range(10)})
    setting = writer.train(EMBEDDING)
    assert setting.partitions == 19  # of 990 shots that have a vector
    index = writer.index
    queries = np.random.default_rng(1).normal(size=(40, 24)).astype(np.float32)
    truth = ExactSearch(queries, 10)
    for rows, vectors in index.blocks(EMBEDDING):
        truth.add(rows, vectors)
    reached = []
    for nprobes, refine in ((1, 1), (4, 4), (19, 60)):
        tried = SearchParams(setting.trained_shots, setting.partitions, nprobes, refine)
        tables = [index.nearest(EMBEDDING, query, 10, setting=tried) for query in queries]
        reached.append(
            recall(np.stack([table["_rowid"] for table in tables]), np.stack([table["cosine"] for table in tables]), truth.cosine_QK)
        )
    assert reached[0] < 0.6
    assert reached[0] < reached[1] < reached[2]
    assert reached[2] == 1.0
    assert [len(index.nearest(EMBEDDING, query, 10, exact=True)) for query in queries] == [10] * 40


def test_what_is_there_instead_of_an_index_is_said(tmp_path):
    with pytest.raises(NoIndex, match="there is nothing"):
        open_index(str(tmp_path / "nowhere"), CONFIG)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"")
    (tmp_path / "photos" / "more").mkdir()
    with pytest.raises(NoIndex, match=r"there is: more, one\.jpg"):
        open_index(str(tmp_path / "photos"), CONFIG)
    with pytest.raises(NoIndex, match=r"not empty; there is: more, one\.jpg: choose another index\.uri"):
        IndexWriter(str(tmp_path / "photos"), CONFIG)
    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "other"))
    with pytest.raises(NoIndex, match="it is another Lance dataset"):
        _ = IndexWriter(str(tmp_path / "other"), CONFIG).index
    newer = FACTS.schema().with_metadata({"mediafm_ray": json.dumps({**json.loads(FACTS.to_json()), "format": 2})})
    lance.write_dataset(newer.empty_table(), str(tmp_path / "newer"))
    with pytest.raises(NoIndex, match="its format is 2, this release reads 1"):
        _ = IndexWriter(str(tmp_path / "newer"), CONFIG).index
    IndexWriter(str(tmp_path / "begun"), CONFIG).create(FACTS)
    with pytest.raises(NoIndex, match=r"first build of the index is not finished: run mediafm index again"):
        open_index(str(tmp_path / "begun"), CONFIG)


def test_a_damaged_index_is_an_error_of_one_line(tmp_path):
    build(tmp_path)
    for path in (tmp_path / "data").iterdir():
        path.write_bytes(b"x" * 100)
    with pytest.raises(StorageError) as caught:
        open_index(str(tmp_path), CONFIG).nearest(EMBEDDING, np.ones(24, np.float32), 3)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ".rs:" not in str(caught.value)
