"""The check of a whole output, against objects broken in every way that we could think of, and the repair."""

import importlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import verify_dataset
from mediafm_ray.config.jobs import DescribeTitlesConfig, SegmentScenesConfig, VerifyDatasetConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.storage.dataset import DatasetError
from mediafm_ray.storage.names import FAILURES, SHOTS, contextual, object_name
from mediafm_ray.storage.schemas import METADATA_KEY, embedding_array, embedding_values, encode_parquet, read_facts
from mediafm_ray.storage.store import StorageError, Store
from tests.datasets import CHECKPOINT, MODEL, SOURCE, write_dataset

TITLES = {"one": [10, 20, 30], "a/b": [40], "été": [25, 25]}
FAILED = ["lost"]
SHOTS_OF_ONE = object_name(SHOTS, "one", SOURCE)
CONTEXTUAL_OF_ONE = object_name(contextual(CHECKPOINT), "one", SOURCE)
RECORD = object_name(FAILURES, "lost", SOURCE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    uri = tmp_path_factory.mktemp("whole") / "out"
    write_dataset(str(uri), TITLES, FAILED)
    return uri


@pytest.fixture
def uri(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def verify(uri, *overrides):
    return verify_dataset.main(read_config(VerifyDatasetConfig, [], [f"output.uri={uri}", *overrides]))


def files(uri):
    return {str(path.relative_to(uri)): path.read_bytes() for path in Path(uri).rglob("*") if path.is_file()}


def replaced(table, name, values):
    return table.set_column(table.column_names.index(name), table.schema.field(name), pa.array(values, table.schema.field(name).type))


def vectors(table, change, column="fused_embedding"):
    """The table with its vectors changed in place by a function of (S, D)."""
    vectors_SD = embedding_values(table[column]).copy()
    change(vectors_SD)
    return table.set_column(table.column_names.index(column), table.schema.field(column), embedding_array(vectors_SD))


def put(value, row=1):
    def change(vectors_SD):
        vectors_SD[row] = value

    return change


def fact(**changes):
    return lambda table, facts: (table, {key: value for key, value in {**facts, **changes}.items() if value != "gone"})


def column(name, values):
    return lambda table, facts: (replaced(table, name, values), facts)


def scaled(factor):
    def change(vectors_SD):
        vectors_SD[0] *= factor

    return change


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]


BYTES = {
    "empty": (lambda content: b"", "Parquet"),
    "cut short": (lambda content: content[: len(content) // 2], "Parquet"),
    "last byte gone": (lambda content: content[:-1], "Parquet"),
    "no Parquet": (lambda content: b"<html>503 Slow Down</html>", "Parquet"),
    "zeros in the middle": (lambda content: content[:400] + bytes(200) + content[600:], "Parquet"),
    "one bit of a vector": (lambda content: flipped(content, len(content) // 3), "Parquet"),
}
TABLES = {  # of the shots: (table, facts) -> (table, facts), and what the reason must tell
    "a column is missing": (lambda table, facts: (table.drop_columns(["fused_norm"]), facts), "fused_norm is missing"),
    "a column of another type": (
        lambda table, facts: (table.set_column(1, "shot_index", table["shot_index"].cast(pa.int64())), facts),
        "shot_index is int64",
    ),
    "vectors of another dimension": (
        lambda table, facts: (
            table.set_column(
                table.column_names.index("fused_embedding"),
                "fused_embedding",
                embedding_array(embedding_values(table["fused_embedding"])[:, :11].copy()),
            ),
            facts,
        ),
        "fused_embedding is",
    ),
    "no rows": (lambda table, facts: (table.slice(0, 0), facts), "no rows"),
    "a shot is missing": (lambda table, facts: (pa.concat_tables([table.slice(0, 1), table.slice(2)]), facts), "shot_index"),
    "the last shot is missing": (lambda table, facts: (table.slice(0, 2), facts), "duration_s"),
    "the first shot is missing": (lambda table, facts: (table.slice(1), facts), "shot_index"),
    "shots out of order": (lambda table, facts: (table.take([0, 2, 1]), facts), "shot_index"),
    "a gap in time": (column("start_s", [0.0, 0.5, 1.2]), "start_s and end_s of shot 1"),
    "an empty shot": (
        lambda table, facts: (replaced(replaced(table, "start_s", [0.0, 0.4, 0.4]), "end_s", [0.4, 0.4, 2.4]), facts),
        "of shot 1",
    ),
    "time that is no number": (column("end_s", [0.4, float("nan"), 2.4]), "shot 1"),
    "frames that overlap": (column("start_frame", [0, 9, 30]), "start_frame and end_frame of shot 1"),
    "shorter than the title": (fact(media={"duration_s": 9.0, "frame_count": 60}), "duration_s is 9.0"),
    "fewer frames than the title": (fact(media={"duration_s": 2.4, "frame_count": 61}), "frame_count is 61"),
    "rows of another title": (column("title_id", ["one", "two", "one"]), "another title"),
    "NaN": (lambda table, facts: (vectors(table, put(np.nan)), facts), "shot 1 is not finite"),
    "infinity": (lambda table, facts: (vectors(table, put(np.inf, row=2)), facts), "shot 2 is not finite"),
    "no unit norm": (lambda table, facts: (vectors(table, scaled(1.01)), facts), "shot 0 has norm 1.01"),
    "a zero vector": (lambda table, facts: (vectors(table, put(0.0)), facts), "shot 1 has norm 0"),
    "a norm below zero": (column("fused_norm", [1.0, -1.0, 1.0]), "not norms"),
    "an absent modality": (column("has_video", [True, False, True]), "has no video"),
    "facts of another title": (fact(title_id="two"), "'two'"),
    "facts of another source": (fact(source="ffffffffffffffff"), "ffffffffffffffff"),
    "facts of another version": (fact(dataset_version="ffffffffffff"), "dataset version ffffffffffff"),
    "facts of other dimensions": (fact(dims={**MODEL.dims, "fused": 13}), "model.json"),
    "no facts of the media": (fact(media="gone"), "media"),
    "a title that is no Unicode": (fact(title_id="\ud800"), "not valid Unicode"),
    "a metadata embedding of a number": (fact(metadata_embedding=7), "metadata_embedding"),
    "a metadata embedding cut short": (fact(metadata_embedding="AACAPw=="), "metadata_embedding"),
}
CONTEXTUAL = {
    "a row less": (lambda table, facts: (table.slice(0, 2), facts), "2 rows, the title has 3"),
    "other times": (column("end_s", [0.4, 1.2, 2.5]), "end_s is not that"),
    "not finite": (lambda table, facts: (vectors(table, put(np.nan), "contextual_embedding"), facts), "not finite"),
    "of another checkpoint": (fact(checkpoint="ba9876543210"), "ba9876543210"),
    "without [CLS]": (fact(cls_embedding="gone"), "cls_embedding"),
}


DERIVED = {  # jobs over the stored vectors, and how their objects break
    "segment_scenes": {
        "a scene less": (lambda table, facts: (table.slice(0, 0), facts), "no rows"),
        "shots left out": (column("last_shot", [1]), "do not tile the 3 shots"),
        "another end": (column("end_s", [2.0]), "the last scene ends at 2.0 s"),
        "another recipe": (fact(recipe={"other": 1}), "digest"),
    },
    "describe_titles": {
        "two rows": (lambda table, facts: (pa.concat_tables([table, table]), facts), "one row"),
        "another number of shots": (column("shots", [4]), "4 shots"),
        "no unit norm": (lambda table, facts: (vectors(table, scaled(2.0), "pooled_embedding"), facts), "norm 2"),
        "no vector": (lambda table, facts: (table.drop_columns(["pooled_embedding"]), facts), "pooled_embedding is missing"),
    },
}


def rewrite(path, change):
    table = pq.read_table(path, partitioning=None)
    table, facts = change(table, read_facts(table.schema))
    path.write_bytes(encode_parquet(table.replace_schema_metadata(None), facts))


def found(uri, capsys):
    """What a check prints of broken objects: reason by name."""
    assert verify(uri) == 1
    lines = [line.removeprefix("BROKEN ") for line in capsys.readouterr().out.splitlines() if line.startswith("BROKEN")]
    return {name.split("/", 1)[1]: reason for name, reason in (line.split(": ", 1) for line in lines)}


def test_a_whole_output_passes(whole, capsys):
    before = files(whole)
    assert verify(whole) == 0
    objects = 2 * len(TITLES) + len(FAILED)
    assert f"{objects} objects checked" in capsys.readouterr().out
    assert files(whole) == before


@pytest.mark.parametrize(("change", "reason"), BYTES.values(), ids=BYTES)
def test_bytes_that_are_not_the_object(uri, capsys, change, reason):
    path = uri / MODEL.dataset_version / SHOTS_OF_ONE
    path.write_bytes(change(path.read_bytes()))
    broken = found(uri, capsys)
    assert set(broken) == {SHOTS_OF_ONE, CONTEXTUAL_OF_ONE}
    assert reason in broken[SHOTS_OF_ONE]


@pytest.mark.parametrize(("change", "reason"), TABLES.values(), ids=TABLES)
def test_shots_that_break_a_promise(uri, capsys, change, reason):
    rewrite(uri / MODEL.dataset_version / SHOTS_OF_ONE, change)
    broken = found(uri, capsys)
    assert reason in broken[SHOTS_OF_ONE]
    assert set(broken) <= {SHOTS_OF_ONE, CONTEXTUAL_OF_ONE}


@pytest.mark.parametrize(("change", "reason"), CONTEXTUAL.values(), ids=CONTEXTUAL)
def test_contextual_embeddings_that_do_not_belong_to_their_shots(uri, capsys, change, reason):
    rewrite(uri / MODEL.dataset_version / CONTEXTUAL_OF_ONE, change)
    broken = found(uri, capsys)
    assert set(broken) == {CONTEXTUAL_OF_ONE}
    assert reason in broken[CONTEXTUAL_OF_ONE]


@pytest.mark.parametrize("job", DERIVED)
def test_what_is_derived_from_the_vectors(uri, capsys, job):
    module = importlib.import_module(f"jobs.{job}")
    kind = SegmentScenesConfig if job == "segment_scenes" else DescribeTitlesConfig
    assert module.main(read_config(kind, [], [f"output.uri={uri}", "vectors.kind=fused"])) == 0
    (path,) = (uri / MODEL.dataset_version).glob(f"{'scenes' if job == 'segment_scenes' else 'titles'}-fused-*/*/one@*.parquet")
    assert verify(uri) == 0
    whole = path.read_bytes()
    for change, reason in DERIVED[job].values():
        path.write_bytes(whole)
        rewrite(path, change)
        capsys.readouterr()
        broken = found(uri, capsys)
        assert list(broken) == [str(path.relative_to(uri / MODEL.dataset_version))]
        assert reason in next(iter(broken.values()))


def test_files_from_before_a_column_that_may_be_null_pass(uri):
    rewrite(uri / MODEL.dataset_version / SHOTS_OF_ONE, lambda table, facts: (table.drop_columns(["audio_levels"]), facts))
    assert verify(uri) == 0


def test_more_columns_than_promised_are_no_defect(uri):
    rewrite(uri / MODEL.dataset_version / SHOTS_OF_ONE, lambda table, facts: (table.append_column("more", [[1, 2, 3]]), facts))
    assert verify(uri) == 0


def test_a_shot_without_any_modality_is_zero_and_no_defect(uri):
    def silence(table, facts):
        table = vectors(table, put(0.0))
        norms = table["fused_norm"].to_pylist()
        for name in ("has_video", "has_audio", "has_text"):
            table = replaced(table, name, [True, False, True])
        return replaced(table, "fused_norm", [norms[0], 0.0, norms[2]]), facts

    rewrite(uri / MODEL.dataset_version / SHOTS_OF_ONE, silence)
    assert verify(uri) == 0


def test_an_object_under_another_name_or_in_another_shard(uri, capsys):
    version = uri / MODEL.dataset_version
    os.rename(version / SHOTS_OF_ONE, (version / SHOTS_OF_ONE).with_name(f"two@{SOURCE}.parquet"))
    moved = version / "shots" / "shard=00" / f"a%2Fb@{SOURCE}.parquet"
    moved.parent.mkdir(exist_ok=True)
    os.rename(version / object_name(SHOTS, "a/b", SOURCE), moved)
    broken = found(uri, capsys)
    assert "'one'" in broken[SHOTS_OF_ONE.replace("one@", "two@")]
    assert "'a/b'" in broken[str(moved.relative_to(version))]
    assert "missing" in broken[CONTEXTUAL_OF_ONE]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "JSONDecodeError"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"title_id": "lost", "attempts": 1}', "source"),
        ({"attempts": "2"}, "attempts"),
        ({"attempts": -1}, "attempts"),
        ({"message": ""}, "message"),
        ({"title_id": "found"}, "'found'"),
        ({"dataset_version": "ffffffffffff"}, "ffffffffffff"),
    ],
)
def test_failure_records(uri, capsys, content, reason):
    path = uri / MODEL.dataset_version / RECORD
    path.write_bytes(json.dumps({**json.loads(path.read_bytes()), **content}).encode() if isinstance(content, dict) else content)
    broken = found(uri, capsys)
    assert set(broken) == {RECORD}
    assert reason in broken[RECORD]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: b"{", "cannot be read"),
        (lambda model: None, "is missing"),
        (lambda model: {**model, "dims": None}, "dims"),
        (lambda model: {**model, "spans": {"video": 1}}, "spans"),
        (lambda model: [], "not a JSON object"),
        (lambda model: {**model, "recipe": {"other": 1}}, "digest"),
        (lambda model: {**model, "dims": {**model["dims"], "fused": 13}}, "do not agree"),
        (lambda model: {**model, "dataset_version": "ffffffffffff"}, "ffffffffffff"),
    ],
)
def test_model_json(uri, capsys, change, reason):
    path = uri / MODEL.dataset_version / "model.json"
    changed = change(json.loads(path.read_bytes()))
    path.unlink()
    if changed is not None:
        path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    broken = found(uri, capsys)
    assert reason in broken["model.json"]
    if path.exists():
        kept = path.read_bytes()
        verify(uri, "verify.repair=true")
        assert path.read_bytes() == kept, "the next job puts it anew"


def test_without_a_model_the_facts_of_an_object_are_not_believed(uri, capsys):
    (uri / MODEL.dataset_version / "model.json").unlink()
    spans = dict.fromkeys(MODEL.spans)
    rewrite(uri / MODEL.dataset_version / SHOTS_OF_ONE, fact(spans=spans))
    rewrite(uri / MODEL.dataset_version / CONTEXTUAL_OF_ONE, fact(dims={**MODEL.dims, "fused": 2**40}))
    broken = found(uri, capsys)
    assert "spans" in broken[SHOTS_OF_ONE]
    assert "dims.fused" in broken[CONTEXTUAL_OF_ONE]


def test_a_repair_deletes_what_is_broken_and_nothing_else(uri, capsys):
    version = uri / MODEL.dataset_version
    before = files(uri)
    (version / SHOTS_OF_ONE).write_bytes(b"half")
    rewrite(version / object_name(contextual(CHECKPOINT), "été", SOURCE), CONTEXTUAL["not finite"][0])
    (version / "shots" / "notes.txt").write_text("mine")
    assert verify(uri, "verify.repair=true") == 1
    said = capsys.readouterr().out
    assert "4 broken, 3 deleted" in said
    assert "notes.txt" in said
    gone = {SHOTS_OF_ONE, CONTEXTUAL_OF_ONE, object_name(contextual(CHECKPOINT), "été", SOURCE)}
    (version / "shots" / "notes.txt").unlink()
    assert files(uri) == {name: content for name, content in before.items() if name.split("/", 1)[1] not in gone}
    assert verify(uri) == 0


def test_only_the_versions_asked_for_are_checked_and_one_that_is_not_there_is_an_error(uri):
    (uri / "ffffffffffff").mkdir()
    assert verify(uri) == 1
    assert verify(uri, f"verify.version={MODEL.dataset_version}") == 0
    with pytest.raises(DatasetError, match="eeeeeeeeeeee"):
        verify(uri, "verify.version=eeeeeeeeeeee")
    with pytest.raises(DatasetError, match="none"):
        verify(uri.parent / "nowhere")


def test_what_the_store_refuses_to_give_is_not_taken_for_broken(uri, capsys, monkeypatch):
    """A person without permission, or a store in trouble, must not lead to a deletion."""
    read, before = Store.read, files(uri)

    def refuse(store, name):
        if name == SHOTS_OF_ONE:
            raise PermissionError("403 Forbidden")
        return read(store, name)

    monkeypatch.setattr(Store, "read", refuse)
    assert verify(uri, "verify.repair=true") == 1
    said = capsys.readouterr().out
    assert f"{SHOTS_OF_ONE}: it could not be read (PermissionError: 403 Forbidden)" in said
    assert "1 broken, 0 deleted" in said
    assert files(uri) == before


def test_a_store_that_is_down_ends_the_check(tmp_path, monkeypatch):
    write_dataset(str(tmp_path / "out"), {f"title {number}": [5] for number in range(verify_dataset.MAX_REFUSED + 1)})
    read = Store.read

    def down(store, name):
        if name.endswith(".parquet"):
            raise ConnectionError("connection refused")
        return read(store, name)

    monkeypatch.setattr(Store, "read", down)
    with pytest.raises(StorageError, match="check the store first"):
        verify(tmp_path / "out")


def test_the_metadata_key_is_what_the_files_carry(uri):
    assert METADATA_KEY in pq.read_schema(uri / MODEL.dataset_version / SHOTS_OF_ONE).metadata
