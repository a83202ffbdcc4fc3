"""The layout of an output and reading it back: round trips, other readers, odd title ids."""

import json
import os

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset, Model, Output, read_failures, record_failure
from mediafm_ray.storage.names import FAILURES, OBJECT_PATTERN, SHOTS, encode_title, object_name
from mediafm_ray.storage.schemas import embedding_array, embedding_values, encode_parquet, read_facts, shots_schema
from tests.datasets import write_dataset

DIMS = {"video": 5, "audio": 3, "text": 4}
SPANS = {"video": (0, 5), "audio": (5, 8), "text": (8, 12)}
MODEL = Model("0123456789ab", {"detector": {"threshold": 0.5}}, {**DIMS, "fused": 12}, SPANS)
ODD_IDS = ["plain", "a/b", "../../etc/passwd", ".hidden", "_private", "été ☃ 影片", "a@b", "a~b", "x" * 900, "影" * 300]
ODD_IDS += ["shard=00", "%2F", "'\"<b>"]


def shots_of(title_id, count=3, seed=0):
    """A table of shots, and the modalities' own vectors that its fused ones come from."""
    random = np.random.default_rng(seed)
    raw_SD = random.normal(size=(count, 12)).astype(np.float32)
    norm_S = np.linalg.norm(raw_SD, axis=1)
    columns = {
        "title_id": [title_id] * count,
        "shot_index": list(range(count)),
        "start_s": [float(index) for index in range(count)],
        "end_s": [float(index + 1) for index in range(count)],
        "start_frame": [25 * index for index in range(count)],
        "end_frame": [25 * index + 25 for index in range(count)],
        "boundary_kind": ["start", *["cut"] * (count - 1)],
        "boundary_probability": [1.0] * count,
        "transition_start_frame": [0] * count,
        "transition_end_frame": [0] * count,
        "dropped_boundaries": [0] * count,
        "text": ["hello"] * count,
        "language": ["en"] * count,
        "has_video": [True] * count,
        "has_audio": [True] * count,
        "has_text": [True] * count,
        "thumbnail": [b"\xff\xd8"] * count,
        "audio_levels": [[-20 - index] * index for index in range(count)],
        "fused_embedding": embedding_array(raw_SD / norm_S[:, None]),
        "fused_norm": norm_S,
    }
    schema = shots_schema(12)
    arrays = [value if isinstance(value := columns[field.name], pa.Array) else pa.array(value, field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema), raw_SD


@pytest.fixture
def output(tmp_path):
    output = Output(str(tmp_path / "out"), MODEL.dataset_version)
    output.write_model(MODEL)
    return output


def write(output, title_id, source="00aa", **options):
    table, raw_SD = shots_of(title_id, **options)
    output.write(SHOTS, title_id, source, encode_parquet(table, {"title_id": title_id}))
    return raw_SD


def opened(output):
    return EmbeddingDataset(os.path.dirname(output.store.root))


def test_names_are_safe_distinct_and_recognised():
    names = [object_name(SHOTS, title_id, "00aa") for title_id in ODD_IDS]
    assert len(set(names)) == len(ODD_IDS)
    for name in names:
        parts = name.split("/")
        assert len(parts) == 3
        assert all(len(part.encode()) < 255 and part not in ("", ".", "..") and part[0] not in "._" for part in parts)
        assert OBJECT_PATTERN.fullmatch(name.removeprefix("shots/"))
    assert object_name(FAILURES, "a/b", "00aa") == "failures/shard=c1/a%2Fb@00aa.json"


def test_odd_titles_round_trip_through_our_reader_and_others(output):
    raw = {title_id: write(output, title_id, seed=number) for number, title_id in enumerate(ODD_IDS)}
    assert set(output.list(SHOTS)) == {(encode_title(title_id), "00aa") for title_id in ODD_IDS}
    dataset = opened(output)
    table = dataset.dataset().to_table()
    assert sorted(set(table["title_id"].to_pylist())) == sorted(ODD_IDS)
    assert table.num_rows == 3 * len(ODD_IDS)
    assert set(table["shard"].to_pylist()) == {object_name(SHOTS, title_id, "").split("=")[1][:2] for title_id in ODD_IDS}
    for title_id in ODD_IDS:
        assert dataset.title(title_id)["title_id"].to_pylist() == [title_id] * 3
    folder = output.store.path(SHOTS)
    plain = pads.dataset(folder, format="parquet", partitioning="hive").to_table()
    assert sorted(set(plain["title_id"].to_pylist())) == sorted(ODD_IDS)
    files = f"{folder}/*/*.parquet"
    found = duckdb.sql(
        f"SELECT count(*), count(DISTINCT title_id), min(len(fused_embedding)) FROM read_parquet('{files}', hive_partitioning = true)"
    )
    assert found.fetchall() == [(3 * len(ODD_IDS), len(ODD_IDS), 12)]
    frame = polars.read_parquet(files, hive_partitioning=True)
    assert frame.schema["fused_embedding"] == polars.Array(polars.Float32, 12)
    for title_id in ODD_IDS:
        ours = dataset.embeddings(table.filter(pa.compute.equal(table["title_id"], title_id)))
        theirs = frame.filter(polars.col("title_id") == title_id).sort("shot_index")["fused_embedding"].to_numpy()
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(ours * np.linalg.norm(raw[title_id], axis=1)[:, None], raw[title_id], rtol=1e-5, atol=1e-6)


def test_parts_of_a_fused_embedding_are_the_modalities_own_vectors(output):
    raw_SD = write(output, "one")
    dataset = opened(output)
    table = dataset.title("one")
    for modality, (start, end) in SPANS.items():
        np.testing.assert_allclose(dataset.embeddings(table, modality), raw_SD[:, start:end], rtol=1e-5, atol=1e-6)
    with pytest.raises(DatasetError, match="fused, video, audio, text"):
        dataset.embeddings(table, "smell")


def test_embeddings_of_one_chunk_are_a_view():
    table, _ = shots_of("one")
    column = table["fused_embedding"]
    values = embedding_values(column)
    assert values.base is not None
    assert values.__array_interface__["data"][0] == column.chunk(0).flatten().to_numpy().__array_interface__["data"][0]
    sliced = embedding_values(column.slice(1, 1))
    np.testing.assert_array_equal(sliced, values[1:2])


def test_readers_see_the_newest_object_of_a_title(output):
    write(output, "one", source="old", seed=1)
    newest = write(output, "one", source="new", seed=2, count=5)
    path = output.store.path(object_name(SHOTS, "one", "old"))
    os.utime(path, (1, 1))
    dataset = opened(output)
    for table in (dataset.dataset().to_table(), dataset.title("one")):
        assert table.num_rows == 5
        np.testing.assert_allclose(dataset.embeddings(table) * table["fused_norm"].to_numpy()[:, None], newest, rtol=1e-5, atol=1e-6)
    os.utime(path, (2**33, 2**33))
    assert dataset.title("one").num_rows == 3


def test_what_is_not_there_is_said_with_what_is(output, tmp_path):
    with pytest.raises(DatasetError, match="none"):
        opened(output).dataset()
    write(output, "one")
    dataset = opened(output)
    with pytest.raises(DatasetError, match="there are: shots"):
        dataset.dataset("contextual-x")
    with pytest.raises(DatasetError, match="'two'"):
        dataset.title("two")
    root = str(tmp_path / "out")
    with pytest.raises(DatasetError, match=MODEL.dataset_version):
        EmbeddingDataset(root, "ffffffffffff")
    with pytest.raises(DatasetError, match="there is none"):
        EmbeddingDataset(str(tmp_path / "nowhere"))
    Output(root, "ba9876543210").write_model(MODEL)
    with pytest.raises(DatasetError, match="2 dataset versions"):
        EmbeddingDataset(root)
    assert EmbeddingDataset(root, MODEL.dataset_version).title("one").num_rows == 3


def test_the_parquet_file_is_what_the_design_says(output):
    table, _ = shots_of("one", count=2)
    content = encode_parquet(table, {"b": 1, "a": [2]})
    assert content == encode_parquet(table, {"a": [2], "b": 1})
    file = pq.ParquetFile(pa.BufferReader(content))
    assert file.schema_arrow.equals(table.schema)
    assert read_facts(file.schema_arrow) == {"a": [2], "b": 1}
    group = file.metadata.row_group(0)
    columns = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    for path in ("fused_embedding.list.element", "fused_norm", "start_s", "boundary_probability"):
        assert "BYTE_STREAM_SPLIT" in columns[path].encodings, path
        assert not any("DICTIONARY" in encoding for encoding in columns[path].encodings), path
    assert {column.compression for column in columns.values()} == {"ZSTD"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dims", None),
        ("dims", {"fused": 12}),
        ("dims", {"video": 5, "audio": 3, "text": 4, "fused": 2**40}),
        ("dims", {"video": 5, "audio": 3, "text": 4, "fused": "12"}),
        ("spans", {"video": [0, 5]}),
        ("spans", {"video": [0], "audio": [5, 8], "text": [8, 12]}),
        ("recipe", None),
        ("dataset_version", 7),
    ],
)
def test_a_model_that_is_not_what_was_written_is_said_before_anything_is_read(output, name, value):
    output.store.write("model.json", json.dumps({**json.loads(MODEL.to_json()), name: value}).encode())
    with pytest.raises(DatasetError, match=rf"model\.json cannot be read .*{name}"):
        EmbeddingDataset(output.store.uri.rpartition("/")[0])


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"[" * 100_000, b'{"title_id": 7}', b"\xff"])
def test_what_is_no_failure_record_hides_no_other(output, content):
    title = {"title_id": "bad", "source": "s1"}
    record_failure(output, object_name(FAILURES, "bad", "s1"), title, {"stage": "x", "message": "y"})
    output.store.write(object_name(FAILURES, "worse", "s1"), content)
    assert [record["title_id"] for record in read_failures(output)] == ["bad"]


def test_a_changed_byte_in_the_vectors_of_a_title_is_no_vector(tmp_path):
    """It is noticed by everybody who reads, not by jobs.verify_dataset only."""
    output = write_dataset(str(tmp_path / "out"), {"a": [10] * 100})
    dataset = EmbeddingDataset(str(tmp_path / "out"))
    name = dataset.title_object("a")
    content = bytearray(output.store.read(name))
    place = pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(0).column(18)
    content[place.data_page_offset + place.total_compressed_size // 2] ^= 1
    output.store.write(name, bytes(content))
    with pytest.raises(OSError, match="CRC"):
        dataset.title("a")
    with pytest.raises(OSError, match="CRC"):
        dataset.dataset().to_table()


def test_model_round_trip_and_failures(output):
    assert Model.from_json(MODEL.to_json()) == MODEL
    for title_id in ("b", "a"):
        output.write(FAILURES, title_id, "00aa", json.dumps({"title_id": title_id, "attempts": 1}).encode())
    assert {record["title_id"] for record in read_failures(output)} == {"a", "b"}
