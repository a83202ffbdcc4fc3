"""Catalogs: folders and tables, and all of their problems at once."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mediafm_ray.storage.catalog import CatalogError, read_catalog


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_folder(tmp_path):
    touch(tmp_path / "film.mp4")
    touch(tmp_path / "film.en.srt")
    touch(tmp_path / "film.de.captions.vtt")
    touch(tmp_path / "film.srt")
    touch(tmp_path / "film.other.unrelated.name.srt")
    touch(tmp_path / "film.json", json.dumps({"synopsis": "S", "tags": ["a", "b"], "other": 1}).encode())
    touch(tmp_path / "series" / "s01" / "e01.MKV")
    touch(tmp_path / "series" / "s01" / "e01.pt-BR.forced.vtt")
    touch(tmp_path / "series" / "poster.jpg")
    touch(tmp_path / ".hidden" / "x.mp4")
    entries = read_catalog(str(tmp_path))
    assert [entry.title.title_id for entry in entries] == ["film", "series/s01/e01"]
    film, episode = (entry.title for entry in entries)
    assert film.video == str(tmp_path / "film.mp4")
    texts = {(text.uri.rsplit("/", 1)[1], text.language, text.kind) for text in film.timed_text}
    assert texts == {("film.de.captions.vtt", "de", "captions"), ("film.en.srt", "en", ""), ("film.srt", "", "")}
    assert (film.synopsis, film.tags) == ("S", ("a", "b"))
    assert [(text.language, text.kind) for text in episode.timed_text] == [("pt-BR", "forced")]
    assert (episode.synopsis, episode.tags) == ("", ())


def test_a_sidecar_belongs_to_the_longest_title(tmp_path):
    for name in ("film.mp4", "film.en.mp4", "film.en.srt", "film.en.captions.srt", "film.fr.srt"):
        touch(tmp_path / name)
    found = {entry.title.title_id: [text.uri.rsplit("/", 1)[1] for text in entry.title.timed_text] for entry in read_catalog(str(tmp_path))}
    assert found == {"film": ["film.fr.srt"], "film.en": ["film.en.captions.srt", "film.en.srt"]}


def test_problems_of_a_folder_are_reported_at_once(tmp_path):
    touch(tmp_path / "a.mp4")
    touch(tmp_path / "a.mkv")
    touch(tmp_path / "b.mp4")
    touch(tmp_path / "b.json", b"{not json")
    touch(tmp_path / "c.mp4")
    touch(tmp_path / "c.json", b'{"tags": "x", "synopsis": 3}')
    with pytest.raises(CatalogError) as caught:
        read_catalog(str(tmp_path))
    assert len(caught.value.problems) == 4
    text = str(caught.value)
    for part in ("a.mkv", "b.json: not valid JSON", "c.json: tags must be a list", "c.json: synopsis must be a string"):
        assert part in text


ROWS = [
    {"title_id": "one", "video": "one.mp4", "timed_text": ["sub/one.en.srt"], "synopsis": "S", "tags": ["t"]},
    {"title_id": "two", "video": "s3://bucket/two.mp4", "timed_text": [], "synopsis": None, "tags": None},
]


def write_table(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = ["title_id,video,timed_text,synopsis,tags"]
        for row in rows:
            lists = [";".join(row["timed_text"]), row["synopsis"] or "", ";".join(row["tags"] or [])]
            lines.append(",".join([row["title_id"], row["video"], *lists]))
        path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_a_table(tmp_path, ending):
    rows = [ROWS[0], {**ROWS[1], "video": "/somewhere/two.mp4"}]
    write_table(tmp_path / f"catalog.{ending}", rows)
    one, two = (entry.title for entry in read_catalog(str(tmp_path / f"catalog.{ending}")))
    assert one.video == str(tmp_path / "one.mp4")
    assert [(text.uri, text.language) for text in one.timed_text] == [(str(tmp_path / "sub/one.en.srt"), "en")]
    assert (one.synopsis, one.tags) == ("S", ("t",))
    assert (two.video, two.timed_text, two.synopsis, two.tags) == ("/somewhere/two.mp4", (), "", ())


def test_problems_of_a_table_are_reported_at_once_with_their_rows(tmp_path):
    rows = [
        {"title_id": "one", "video": "one.mp4"},
        {"title_id": "one", "video": "again.mp4"},
        {"title_id": "", "video": "x.mp4"},
        {"title_id": "no video"},
        {"title_id": 5, "video": "x.mp4"},
        {"title_id": "text", "video": "x.mp4", "timed_text": "not-a-list.srt"},
        {"title_id": "tags", "video": "x.mp4", "tags": [1]},
        {"title_id": "scheme", "video": "ftp://host/x.mp4"},
        {"title_id": "empty", "video": ""},
    ]
    path = tmp_path / "catalog.jsonl"
    write_table(path, rows)
    with path.open("a") as stream:
        stream.write("not json\n[1]\n")
    with pytest.raises(CatalogError) as caught:
        read_catalog(str(path))
    lines = caught.value.problems
    assert len(lines) == 10
    for number, part in [
        (2, "already that of line 1"),
        (3, "title_id is empty"),
        (4, "video is missing"),
        (5, "must be a string"),
        (6, "timed_text"),
        (7, "tags"),
        (8, "ftp"),
        (9, "video is empty"),
        (10, "not valid JSON"),
        (11, "must be a JSON object"),
    ]:
        assert any(line.startswith(f"line {number}") and part in line for line in lines), (number, part, lines)


def test_a_missing_column_is_named_once(tmp_path):
    pq.write_table(pa.table({"id": ["a"] * 100, "video": ["x"] * 100}), tmp_path / "c.parquet")
    with pytest.raises(CatalogError, match="column title_id is missing") as caught:
        read_catalog(str(tmp_path / "c.parquet"))
    assert len(caught.value.problems) == 1
    (tmp_path / "c.csv").write_text("title_id,file\na,b\n")
    with pytest.raises(CatalogError, match="column video is missing"):
        read_catalog(str(tmp_path / "c.csv"))
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(CatalogError, match="Parquet"):
        read_catalog(str(tmp_path / "broken.parquet"))


@pytest.mark.parametrize("tags", ["5", "true", '"x"', "[1]", '["\\ud83d"]'])
def test_tags_that_are_none(tmp_path, tags):
    touch(tmp_path / "a.mp4")
    touch(tmp_path / "a.json", f'{{"tags": {tags}}}'.encode())
    with pytest.raises(CatalogError, match=r"a\.json: .*tags"):
        read_catalog(str(tmp_path))


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"title_id": "a", "video": "a\x00.mp4"}, "not a URI"),
        ({"title_id": "a", "video": " "}, "video is empty"),
        ({"title_id": "\ud83d", "video": "a.mp4"}, "not valid Unicode"),
        ({"title_id": "a", "video": "a.mp4", "synopsis": "x \ud83d"}, "not valid Unicode"),
    ],
)
def test_text_that_is_none(tmp_path, row, part):
    table = tmp_path / "c.jsonl"
    table.write_text(json.dumps(row))
    with pytest.raises(CatalogError, match=part):
        read_catalog(str(table))


def test_an_object_that_cannot_be_looked_at_fails_later_not_now(tmp_path, monkeypatch):
    monkeypatch.setattr("mediafm_ray.storage.errors.FIRST_PAUSE_S", 0.01)  # between attempts
    table = tmp_path / "c.jsonl"
    rows = [{"title_id": "long", "video": "a" * 300 + ".mp4"}, {"title_id": "nobody", "video": "http://127.0.0.1:9/a.mp4"}]
    write_table(table, [*rows, {"title_id": "two", "video": "http://127.0.0.1:9/b.mp4"}])
    assert [entry.title.title_id for entry in read_catalog(str(table))] == ["long", "nobody", "two"]


def test_a_duplicate_beside_another_problem_is_reported_too(tmp_path):
    table = tmp_path / "c.jsonl"
    write_table(table, [{"title_id": "a", "video": "a.mp4"}, {"title_id": "a", "video": 3}])
    with pytest.raises(CatalogError) as caught:
        read_catalog(str(table))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("name", ["absent", "absent.csv", "film.mp4", "empty.csv", "folder"])
def test_a_catalog_that_is_none(tmp_path, name):
    touch(tmp_path / "film.mp4")
    (tmp_path / "empty.csv").write_text("title_id,video\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CatalogError, match=name):
        read_catalog(str(tmp_path / name))


def test_the_source_digest_follows_the_objects(tmp_path):
    video, text = touch(tmp_path / "a.mp4"), touch(tmp_path / "a.srt")

    def digest():
        return read_catalog(str(tmp_path))[0].source

    first = digest()
    assert first == digest()
    os.utime(video, ns=(1, 1))
    second = digest()
    assert second != first
    text.write_bytes(b"longer")
    third = digest()
    assert third not in (first, second)
    touch(tmp_path / "a.json", b'{"synopsis": "metadata is no source object"}')
    assert digest() == third
    table = tmp_path / "c.jsonl"
    table.write_text(json.dumps({"title_id": "other id", "video": "a.mp4", "timed_text": ["a.srt"]}))
    assert read_catalog(str(table))[0].source == third


def test_times_that_python_has_no_value_for_are_a_problem_of_the_table(tmp_path):
    durations = pa.array([2**62], pa.duration("s"))
    pq.write_table(pa.table({"title_id": ["a"], "video": ["a.mp4"], "duration_s": durations}), tmp_path / "c.parquet")
    with pytest.raises(CatalogError, match="not a readable Parquet file"):
        read_catalog(str(tmp_path / "c.parquet"))
