"""Scenes and titles as datasets: from committed objects to objects, as a user runs the jobs."""

import base64
import io
import json
import os

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.stored_titles import commit_title, make_model
from jobs import describe_titles, segment_scenes
from mediafm_ray.config.jobs import ContextualiseCatalogConfig, DescribeTitlesConfig, SegmentScenesConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.derive.reader import read_vectors
from mediafm_ray.downstream.clips import pool_clip
from mediafm_ray.downstream.scenes import find_scenes
from mediafm_ray.downstream.titles import is_speech, nearest_titles, share_of
from mediafm_ray.errors import TitleError
from mediafm_ray.models.tiny import make_contextualiser
from mediafm_ray.pipeline.contextualise_stored import ContextualiseStored
from mediafm_ray.runs.command import run_job
from mediafm_ray.runs.stored import make_stored_plan
from mediafm_ray.storage.dataset import EmbeddingDataset, Output
from mediafm_ray.storage.names import SHOTS, contextual, matching_object
from mediafm_ray.storage.schemas import (
    METADATA_KEY,
    embedding_array,
    embedding_values,
    encode_parquet,
    read_facts,
    scenes_schema,
    titles_schema,
)

MODEL = make_model("0123456789ab", video=20, audio=12, text=16)
METADATA = np.linspace(-1, 1, 16, dtype=np.float32)
TITLES = {"drama": (8, 12, 10), "news/1": (15, 15), "short": (1,), "ete ☃": (9, 9, 9, 9)}  # lengths of their scenes, in shots


def vectors_of(lengths, seed):
    random = np.random.default_rng(seed)
    vectors = np.concatenate([2 * random.normal(size=48) + random.normal(size=(length, 48)) for length in lengths])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def seconds_of(vectors):
    return np.random.default_rng(len(vectors)).uniform(0.5, 6.0, len(vectors))


@pytest.fixture
def folder(tmp_path):
    output = tmp_path / "out"
    for seed, (title_id, lengths) in enumerate(TITLES.items()):
        vectors = vectors_of(lengths, seed)
        commit_title(str(output), MODEL, title_id, vectors, seconds_of(vectors), METADATA)
    return output


def contextualise(output, checkpoint, seed=0):
    make_contextualiser(checkpoint, fused_dim=48, metadata_dim=16, initializer_range=0.2 + 0.01 * seed)
    config = read_config(ContextualiseCatalogConfig, [], [f"output.uri={output}", f"contextualiser.checkpoint={checkpoint}"])
    plan = make_stored_plan(config)
    stage = ContextualiseStored(config.contextualiser, str(output), plan.model, plan.checkpoint, config.storage)
    assert [table["error"][0].as_py() for table in stage(plan.pending)] == [None] * plan.pending.num_rows
    return plan.checkpoint


def segment(folder, *overrides):
    return run_job("", SegmentScenesConfig, segment_scenes.main, [f"output.uri={folder}", *overrides])


def describe(folder, *overrides):
    return run_job("", DescribeTitlesConfig, describe_titles.main, [f"output.uri={folder}", *overrides])


def only(folder, kind):
    (name,) = [name for name in EmbeddingDataset(str(folder)).names() if name.startswith(kind)]
    return name


def objects(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def test_scenes_are_committed_title_by_title_and_read_back(folder, capsys):
    assert segment(folder, "vectors.kind=fused") == 0
    printed = capsys.readouterr().out
    assert "4 titles, 0 committed before, 4 to do" in printed
    assert "drama: 3 scenes of 30 shots" in printed
    dataset = EmbeddingDataset(str(folder))
    name = only(folder, "scenes-fused-")
    everything = dataset.dataset(name).to_table()
    assert everything.schema.remove_metadata().equals(scenes_schema().append(pa.field("shard", pa.string())))
    for seed, (title_id, lengths) in enumerate(TITLES.items()):
        vectors = vectors_of(lengths, seed)
        end = np.cumsum(seconds_of(vectors))
        table = dataset.title(title_id, name)
        first = np.cumsum([0, *lengths[:-1]])
        assert table["first_shot"].to_pylist() == first.tolist()
        assert table["last_shot"].to_pylist() == (np.cumsum(lengths) - 1).tolist()
        np.testing.assert_allclose(table["end_s"], end[np.cumsum(lengths) - 1])
        np.testing.assert_allclose(table["start_s"], np.concatenate([[0], end])[first])
        assert table["scene_index"].to_pylist() == list(range(len(lengths)))
        assert table["score"].to_numpy().tolist() == find_scenes(vectors).score_K.tolist()
        assert read_facts(table.schema)["vectors"] == SHOTS
        assert everything.filter(pa.compute.equal(everything["title_id"], title_id)).num_rows == len(lengths)
    files = f"{folder}/*/{name}/*/*.parquet"
    assert duckdb.sql(f"SELECT count(*) FROM read_parquet('{files}', hive_partitioning = true)").fetchall() == [(10,)]


def test_a_second_run_does_nothing_and_only_what_is_missing_or_changed_is_made(folder, capsys):
    assert segment(folder, "vectors.kind=fused", "run.max_titles=3") == 0
    assert "1 left for later" in capsys.readouterr().out
    assert segment(folder, "vectors.kind=fused") == 0
    assert "3 committed before, 1 to do" in capsys.readouterr().out
    before = objects(folder)
    times = {path: os.stat(folder / path).st_mtime_ns for path in before}
    assert segment(folder, "vectors.kind=fused") == 0
    assert "4 committed before, 0 to do" in capsys.readouterr().out
    assert {path: os.stat(folder / path).st_mtime_ns for path in objects(folder)} == times
    commit_title(str(folder), MODEL, "drama", vectors_of((5, 5), 9), None, METADATA, source="f" * 16)  # embedded anew
    name = only(folder, "scenes-")
    assert segment(folder, "vectors.kind=fused") == 0
    assert "3 committed before, 1 to do" in capsys.readouterr().out
    assert EmbeddingDataset(str(folder)).title("drama", name)["first_shot"].to_pylist() == [0, 5]
    assert sum("drama@" in path and "scenes-" in path for path in objects(folder)) == 1  # the older one is gone
    assert {path: content for path, content in objects(folder).items() if "drama" not in path} == {
        path: content for path, content in before.items() if "drama" not in path
    }


def test_other_options_or_vectors_are_another_dataset(folder, tmp_path, capsys):
    checkpoint = contextualise(folder, tmp_path / "checkpoint")
    for overrides in (["vectors.kind=fused"], ["vectors.kind=fused", "scenes.penalty=3"], ["vectors.kind=fused", "run.threads=1"], []):
        assert segment(folder, *overrides) == 0
    names = [name for name in EmbeddingDataset(str(folder)).names() if name.startswith("scenes-")]
    assert [name.rsplit("-", 1)[0] for name in names] == ["scenes-contextual", "scenes-fused", "scenes-fused"]
    dataset = EmbeddingDataset(str(folder))
    stored = dataset.title("drama", contextual(checkpoint))
    expected = find_scenes(embedding_values(stored["contextual_embedding"]))
    assert dataset.title("drama", names[0])["first_shot"].to_pylist() == expected.first_K.tolist()
    other = contextualise(folder, tmp_path / "other", seed=1)
    capsys.readouterr()
    assert segment(folder) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in ("2 checkpoints", checkpoint, other))
    assert segment(folder, f"vectors.checkpoint={other}") == 0


def test_what_is_not_there_is_said_with_what_is(folder, tmp_path, capsys):
    for overrides, reason in (
        ([], "no contextual embeddings; there are: shots"),
        (["vectors.checkpoint=ffffffffffff"], "no contextual-ffffffffffff; there are: shots"),
        (["vectors.kind=smell"], "vectors.kind must be one of contextual, fused"),
        (["dataset.version=ffffffffffff"], "there are: 0123456789ab"),
        (["scenes.penalty=0"], "scenes.penalty"),
    ):
        for job in (segment, describe):
            assert job(folder, *overrides) == 2
            error = capsys.readouterr().err
            assert reason in error
            assert error.count("\n") == 1
    assert segment(tmp_path / "nowhere") == 2
    assert "there is none" in capsys.readouterr().err
    assert run_job("", SegmentScenesConfig, segment_scenes.main, []) == 2
    assert "output.uri is required" in capsys.readouterr().err
    assert describe(folder, "vectors.kind=fused", f"table.uri={tmp_path}/t.xlsx") == 2
    assert ".parquet or .jsonl" in capsys.readouterr().err


def test_a_damaged_title_is_that_titles_failure(folder, tmp_path, capsys):
    checkpoint = contextualise(folder, tmp_path / "checkpoint")
    dataset = EmbeddingDataset(str(folder))
    path = dataset.output.store.path(matching_object(dataset.title_object("drama"), contextual(checkpoint)))
    with open(path, "r+b") as stream:
        stream.truncate(500)
    dataset.output.store.delete(matching_object(dataset.title_object("short"), contextual(checkpoint)))
    assert segment(folder) == 1
    printed = capsys.readouterr().out
    assert "2 titles done with 6 scenes, 2 failed" in printed or "2 failed" in printed
    assert "drama: contextual-" in printed
    assert "cannot be read" in printed
    assert "short: it has no contextual embeddings" in printed
    assert segment(folder, "run.max_failed_fraction=1") == 0
    contextualise(folder, tmp_path / "checkpoint")  # the missing one comes back, the damaged one is still listed
    assert segment(folder) == 1
    assert "2 committed before, 2 to do" in capsys.readouterr().out


def flipped(content):
    place = content.index(b"PAR1", 4) // 4
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def rewritten(content, change=lambda table: table, facts=None):
    table = change(pq.read_table(pa.BufferReader(content)))
    sink = io.BytesIO()
    pq.write_table(table if facts is None else table.replace_schema_metadata({METADATA_KEY: facts}), sink)
    return sink.getvalue()


def doubled(table):
    place = table.column_names.index("contextual_embedding")
    vectors_SD = embedding_values(table["contextual_embedding"])
    return table.set_column(place, "contextual_embedding", embedding_array(np.concatenate([vectors_SD, vectors_SD], axis=1)))


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda content: rewritten(content, facts=b"null"),
        lambda content: rewritten(content, facts=b"[" * 100_000),
        lambda content: rewritten(content, facts=b'{"title_id": "drama", "cls_embedding": 7}'),
        lambda content: rewritten(content, lambda table: table.set_column(2, "start_s", pa.array(["x"] * len(table)))),
        lambda content: rewritten(content, doubled),
    ],
    ids=["a byte is flipped", "facts are null", "facts nest", "[CLS] is a number", "times are text", "other dimensions"],
)
def test_damaged_contextual_embeddings_are_no_vectors(folder, tmp_path, damage):
    checkpoint = contextual(contextualise(folder, tmp_path / "checkpoint"))
    dataset = EmbeddingDataset(str(folder))
    shots = dataset.title_object("drama")
    assert read_vectors(dataset, shots, checkpoint).title_id == "drama"
    name = matching_object(shots, checkpoint)
    dataset.output.store.write(name, damage(dataset.output.store.read(name)))
    with pytest.raises(TitleError, match=r"cannot be read .* delete it and run mediafm contextualise"):
        read_vectors(dataset, shots, checkpoint)


def test_titles_say_what_their_shots_say(folder, tmp_path, capsys):
    dataset = EmbeddingDataset(str(folder))
    name = dataset.title_object("news/1")
    shots = dataset.read(name)
    texts = ["Good evening.", "[applause]", "(MAN) ♪ la la ♪", "", *["7 dead."] * 26]
    heard = [index % 3 == 0 for index in range(30)]
    shots = shots.set_column(shots.column_names.index("text"), "text", pa.array(texts))
    shots = shots.set_column(shots.column_names.index("has_text"), "has_text", pa.array([bool(text) for text in texts]))
    shots = shots.set_column(shots.column_names.index("has_audio"), "has_audio", pa.array(heard))
    Output(str(folder), MODEL.dataset_version).store.write(name, encode_parquet(shots, read_facts(shots.schema)))
    checkpoint = contextualise(folder, tmp_path / "checkpoint")
    table_uri = tmp_path / "titles.parquet"
    assert describe(folder, f"table.uri={table_uri}", "table.nearest=2") == 0
    assert describe(folder, f"table.uri={tmp_path}/titles.jsonl", "table.nearest=9") == 0
    printed = capsys.readouterr().out
    assert "4 committed before, 0 to do" in printed
    assert "nearest titles (cosine)" in printed
    row = dataset.title("news/1", only(folder, "titles-contextual-"))
    assert row.schema.remove_metadata().equals(titles_schema(48))
    start, end = shots["start_s"].to_numpy(), shots["end_s"].to_numpy()
    seconds, stored = end - start, dataset.title("news/1", contextual(checkpoint))
    values = row.to_pylist()[0]
    assert values["shots"] == 30
    assert values["duration_s"] == pytest.approx(end[-1])
    assert values["shots_per_minute"] == pytest.approx(30 / (end[-1] / 60))
    assert values["audio_share"] == pytest.approx(seconds[np.array(heard)].sum() / seconds.sum())
    assert values["text_share"] == pytest.approx(1 - seconds[3] / seconds.sum())
    assert values["speech_share"] == pytest.approx((seconds[0] + seconds[4:].sum()) / seconds.sum())
    vectors = embedding_values(stored["contextual_embedding"])
    assert values["scenes"] == len(find_scenes(vectors))
    pooled = embedding_values(row["pooled_embedding"])[0]
    np.testing.assert_array_equal(pooled, pool_clip(start, end, vectors, 0.0, float(end[-1])))
    cls = np.frombuffer(base64.b64decode(read_facts(stored.schema)["cls_embedding"]), "<f4")
    assert embedding_values(row["cls_embedding"])[0].tobytes() == cls.tobytes()
    table = pq.read_table(table_uri)
    assert table["title_id"].to_pylist() == sorted(TITLES)
    assert all(len(names) == 2 for names in table["nearest_title_id"].to_pylist())
    lines = [json.loads(line) for line in (tmp_path / "titles.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [len(line["nearest_title_id"]) for line in lines] == [3] * 4  # all there are
    assert lines[0]["nearest_title_id"][:2] == table["nearest_title_id"][0].as_py()
    assert describe(folder, "vectors.kind=fused") == 0
    assert dataset.title("drama", only(folder, "titles-fused-"))["cls_embedding"].null_count == 1


def test_nearest_titles_are_those_of_the_definition():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(3000, 6)).astype(np.float32)  # more than a block
    vectors[3] = 0
    rows, cosines = nearest_titles(vectors, 4)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    for query in (0, 3, 700, 1499):
        cosine = unit @ unit[query]
        cosine[query] = -2
        expected = np.argsort(-cosine, kind="stable")[:4]
        np.testing.assert_allclose(cosines[query], cosine[expected], atol=1e-6)
        assert query not in rows[query]
        if query != 3:
            assert rows[query].tolist() == expected.tolist()
    np.testing.assert_array_equal(nearest_titles(vectors, 4, [700])[0][0], rows[700])
    assert nearest_titles(vectors[:1], 4)[0].shape == (1, 0)
    assert nearest_titles(vectors[:0], 4)[0].shape == (0, 0)


@pytest.mark.parametrize(
    ("text", "speech"),
    [
        ("Hello.", True),
        ("[birds singing]", False),
        ("(SIGHS)", False),
        ("[door] Who is there?", True),
        ("♪ la la la ♪", False),
        ("♪ la la la", False),
        ("♪ la ♪ Stop it!", True),
        ("...", False),
        ("", False),
        ("你好", True),
        ("٣", True),
    ],
)
def test_what_counts_as_speech(text, speech):
    assert is_speech(text) is speech


def test_shares_of_nothing_are_nothing():
    assert share_of(np.array([1.0, 3.0]), np.array([False, True])) == 0.75
    assert share_of(np.zeros(0), np.zeros(0, bool)) == 0.0


def test_a_bucket_serves_as_a_folder_does(folder, moto, s3_keys, tmp_path):
    assert segment(folder, "vectors.kind=fused") == 0
    assert describe(folder, "vectors.kind=fused", f"table.uri={tmp_path}/titles.jsonl") == 0
    bucket, client = moto.bucket(), moto.client()
    for path in folder.rglob("*"):
        if path.is_file() and "scenes-" not in str(path) and "titles-" not in str(path):
            client.put_object(Bucket=bucket, Key=f"out/{path.relative_to(folder)}", Body=path.read_bytes())
    there = ("vectors.kind=fused", f"storage.endpoint_url={moto.url}")
    assert segment(f"s3://{bucket}/out", *there) == 0
    assert describe(f"s3://{bucket}/out", *there, f"table.uri=s3://{bucket}/titles.jsonl") == 0
    stored = moto.objects(bucket, "out/")
    assert {name: stored[name] for name in stored if name.endswith(".parquet")} == objects(folder)
    assert moto.objects(bucket)["titles.jsonl"] == (tmp_path / "titles.jsonl").read_bytes()
