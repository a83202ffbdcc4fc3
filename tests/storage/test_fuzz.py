"""Any bytes as catalogs, URIs, failure records, model.json and Parquet objects: a value or the documented error, in time that grows
with the size.

The default run takes some twenty seconds; ``FUZZ_EXAMPLES=100000 pytest -m slow tests/storage/test_fuzz.py`` as long as it is told to.
What a run has found stands in a test with a name, here or beside the code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mediafm_ray.derive.reader import read_vectors
from mediafm_ray.errors import OutageError, TitleError
from mediafm_ray.media.options import MediaConfig
from mediafm_ray.media.source import file_name, open_bytes
from mediafm_ray.pipeline.rows import plan_table
from mediafm_ray.storage import catalog
from mediafm_ray.storage.catalog import CatalogError, read_catalog
from mediafm_ray.storage.catalog_rows import COLUMNS
from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset, parse_failure, read_failures, record_failure
from mediafm_ray.storage.names import FAILURES, SHOTS, contextual, object_name
from mediafm_ray.storage.names import MODEL as MODEL_JSON
from mediafm_ray.storage.schemas import METADATA_KEY
from mediafm_ray.storage.store import ALLOWED_SCHEMES, StorageError, Store, join, scheme_of
from mediafm_ray.storage.stored_shots import read_shots
from mediafm_ray.storage.verify import check_model, check_title, list_titles
from mediafm_ray.text import local_path, public_line
from tests.datasets import CHECKPOINT, MODEL, SOURCE, write_dataset
from tests.media.test_fuzz import DEFAULT, LONG, MAX_S_PER_MB, edits, json_values, mutated

TABLES = {
    "jsonl": b'{"title_id": "a", "video": "a.mp4", "timed_text": ["a.en.srt"], "synopsis": "A film.", "tags": ["x"], "duration_s": 3.5}\n'
    b'{"title_id": "b", "video": "file:///b%20c.mp4"}\n',
    "csv": b'title_id,video,timed_text,synopsis,tags,duration_s\na,a.mp4,a.en.srt;a.de.srt,"A film, ""the"" film.",x;y,3.5\nb,b.mp4,,,,\n',
}
TOKENS = [
    *[
        b'{"title_id": ',
        b'"video": ',
        b'"',
        b"{",
        b"}",
        b"[",
        b"[[[[",
        b"null",
        b"1e400",
        b"NaN",
        b"\\ud800",
        b"\\u0000",
        b"-1",
        b"9" * 400,
    ],
    *[b"\n", b"\r", b"\r\n", b",", b";", b'""', b"\0", b"\xef\xbb\xbf", b"title_id,video\n", b"\xff", b"../", b"file://", b"%", b"~"],
    *[b'"attempts": ', b'"spans": ', b'"dims": ', b'"fused": ', b"0", b"true", b"1.5", b"99999999999999999999"],
]
QUICK = settings(DEFAULT, max_examples=40)
SCHEMES = st.sampled_from(["", "", "", "file://", "FILE://", "memory://", "data:", "x://", "://", "~", "~root/", "file://localhost/", "//"])
REMOTE = ("http", "https", "s3", "gs", "abfs", "az")  # nothing here may ask a network
uris = st.builds(lambda scheme, rest: scheme + rest, SCHEMES, st.text(st.characters(), max_size=60) | st.just("a" * 5000))
names = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), max_size=20) | st.binary(max_size=20).map(
    lambda raw: os.fsdecode(raw.replace(b"/", b"").replace(b"\0", b""))
)
endings = st.sampled_from([".mp4", ".MKV", ".srt", ".en.srt", ".en.sdh.vtt", ".json", "", ".", ".."])


class Timed:
    """Work on so many bytes that does not take too long."""

    def __init__(self, size: int):
        self.limit_s = MAX_S_PER_MB * max(1.0, size / (1 << 20))

    def __enter__(self) -> None:
        self.started = time.process_time()

    def __exit__(self, *_: object) -> None:
        assert time.process_time() - self.started < self.limit_s


@pytest.fixture(scope="module", autouse=True)
def _no_network():
    """Nothing but local files is looked up."""
    real = catalog._look_up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "_look_up", lambda uris, *others: real([uri for uri in uris if scheme_of(uri) not in REMOTE], *others))
        patch.setattr(catalog, "_s3_key", lambda uri: "")
        yield


@pytest.fixture(scope="module")
def folder():
    path = Path(tempfile.mkdtemp(prefix="fuzz-"))
    yield path
    shutil.rmtree(path)


# -------------------------------------------------------------------------------------------------------------- catalogs


def check_catalog(uri: str, size: int) -> None:
    """Titles that can be planned, recorded and named, or every problem in text that can be written."""
    with Timed(size):
        for skipped in (None, []):
            try:
                entries = read_catalog(uri, skipped=skipped)
            except CatalogError as error:
                public_line(str(error)).encode()
                continue
            except StorageError as error:
                public_line(str(error)).encode()
                continue
            ids = [entry.title.title_id for entry in entries]
            assert len(set(ids)) == len(ids)
            for entry in entries:
                title = entry.title
                object_name(SHOTS, title.title_id, entry.source).encode()
                texts = [{"uri": text.uri, "language": text.language, "kind": text.kind} for text in title.timed_text]
                row = {"title_id": title.title_id, "source": entry.source, "video": title.video, "timed_text": texts}
                plan_table([{**row, "synopsis": title.synopsis, "tags": list(title.tags), "superseded": []}])
                assert entry.duration_s is None or 0 <= entry.duration_s < float("inf")
            for bad in skipped or []:
                object_name(FAILURES, bad.name, "0" * 16).encode()
                public_line(str(bad)).encode()


def check_table(folder: Path, content: bytes, ending: str) -> None:
    path = folder / f"catalog.{ending}"
    path.write_bytes(content)
    check_catalog(str(path), len(content))


def check_mutated_table(folder: Path, ending: str, changes: Any) -> None:
    check_table(folder, mutated(TABLES[ending], changes, TOKENS), ending)


def parquet_of(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


CATALOG_PARQUET = parquet_of(
    pa.table({"title_id": ["a", "b"], "video": ["a.mp4", "b.mp4"], "timed_text": [["a.srt"], None], "tags": [["x"], []]})
)


@pytest.mark.parametrize("ending", list(TABLES))
def test_mutated_table(folder, ending):
    DEFAULT(given(edits)(lambda changes: check_mutated_table(folder, ending, changes)))()


@pytest.mark.slow
@pytest.mark.parametrize("ending", list(TABLES))
def test_mutated_table_for_long(folder, ending):
    LONG(given(edits)(lambda changes: check_mutated_table(folder, ending, changes)))()


def test_any_bytes_as_a_table(folder):
    DEFAULT(
        given(st.binary(max_size=300), st.sampled_from(["jsonl", "csv", "parquet"]))(lambda data, end: check_table(folder, data, end))
    )()


def test_any_values_in_json_lines(folder):
    fields = st.sampled_from([*COLUMNS, *COLUMNS, "other"])
    rows = st.lists(st.dictionaries(fields, json_values | st.sampled_from(["a.mp4", "a", "file://%00", "s3://b"])), max_size=3)
    DEFAULT(given(rows)(lambda rows: check_table(folder, "\n".join(map(json.dumps, rows)).encode(), "jsonl")))()


def test_mutated_parquet_table(folder):
    DEFAULT(given(edits)(lambda changes: check_table(folder, mutated(CATALOG_PARQUET, changes, []), "parquet")))()


def test_any_types_in_a_parquet_table(folder):
    columns = {
        "string": pa.array(["a", None]),
        "large": pa.array(["a", "b"], pa.large_string()),
        "binary": pa.array([b"\xff", b"a"]),
        "number": pa.array([1, 2]),
        "float": pa.array([float("nan"), 1e308]),
        "list": pa.array([["a"], [None]]),
        "struct": pa.array([{"a": 1}, None]),
        "null": pa.nulls(2),
        "time": pa.array([2**62, -(2**62)], pa.timestamp("s")),
        "duration": pa.array([2**62, 1], pa.duration("s")),
        "dictionary": pa.array(["a", "b"]).dictionary_encode(),
        "decimal": pa.array([1, 2], pa.decimal128(20, 2)),
    }

    def check(kinds: dict[str, str]) -> None:
        table = pa.table({name: columns[kind] for name, kind in kinds.items()})
        try:
            content = parquet_of(table)
        except (pa.ArrowException, ValueError):
            return
        check_table(folder, content, "parquet")

    DEFAULT(given(st.fixed_dictionaries({name: st.sampled_from(list(columns)) for name in COLUMNS}))(check))()


def check_folder(folder: Path, files: dict[tuple[str, str], bytes]) -> None:
    place = Path(tempfile.mkdtemp(dir=folder))
    for (name, ending), content in files.items():
        try:
            (place / f"{name}{ending}").write_bytes(content)
        except OSError:  # no name of a file here
            continue
    check_catalog(str(place), sum(map(len, files.values())))
    shutil.rmtree(place)


def test_any_names_in_a_folder(folder):
    files = st.dictionaries(st.tuples(names, endings), st.binary(max_size=30), max_size=6)
    DEFAULT(given(files)(lambda files: check_folder(folder, files)))()


# ------------------------------------------------------------------------------------------------------------------ URIs


def check_uri(uri: str, other: str) -> None:
    """Locations mean something or are refused in a line."""
    with Timed(len(uri)):
        for operation in (local_path, scheme_of, file_name, lambda uri: join(other, uri), lambda uri: join(uri, other)):
            assert operation(uri) is None or isinstance(operation(uri), str)
        file_name(uri).encode()
        try:
            store = Store(uri)
            if scheme_of(uri) not in REMOTE:
                store.info("x")
                store.info(other)
                store.check_readable("x")
                store.read("x")
        except (StorageError, FileNotFoundError) as error:
            public_line(str(error)).encode()
        if scheme_of(uri) in ALLOWED_SCHEMES and scheme_of(uri) not in REMOTE and not (local_path(uri) or "").startswith("/dev"):
            try:
                open_bytes(uri, MediaConfig()).close()
            except (TitleError, OutageError) as error:
                public_line(str(error)).encode()


@DEFAULT
@given(uris, uris)
@example("file:///\udced\ud800%e9", "")
@example("~a\0b", "")
def test_any_uri(uri, other):
    check_uri(uri, other)


@pytest.mark.slow
@LONG
@given(uris, uris)
def test_any_uri_for_long(uri, other):
    check_uri(uri, other)


# --------------------------------------------------------------------------------------- failure records and model.json


@pytest.fixture(scope="module")
def output(folder):
    """One title with shots and context, and one that failed."""
    return write_dataset(str(folder / "out"), {"a": [10, 20, 30]}, failed=["b"])


def check_record(output, content: bytes) -> None:
    """A record is understood or replaced, and does not stop those who read them all."""
    name = object_name(FAILURES, "b", SOURCE)
    with Timed(len(content)):
        with contextlib.suppress(ValueError):
            assert parse_failure(content)["attempts"] >= 0
        output.store.write(name, content)
        for record in read_failures(output):
            assert isinstance(record, dict)
        assert len(check_title(output, MODEL, [(FAILURES, output.store.info(name))]).findings) <= 1
        record_failure(output, name, {"title_id": "b"}, {"stage": "x", "message": "y"})
        assert parse_failure(output.store.read(name))["attempts"] >= 1


def check_model_json(output, content: bytes) -> None:
    """A model that readers can work with, or the documented error; verify says what is wrong."""
    store = output.store
    store.write(MODEL_JSON, content)
    with Timed(len(content)):
        model, findings = check_model(output)
        assert model is not None or findings
        try:
            dataset = EmbeddingDataset(store.uri.rpartition("/")[0], output.dataset_version)
        except DatasetError as error:
            public_line(str(error)).encode()
            return
        finally:
            store.write(MODEL_JSON, MODEL.to_json())
        assert dataset.dataset(SHOTS).schema.field("fused_embedding")
        list(dataset.model.spans.items())
        assert dataset.embeddings(dataset.title("a")).shape == (3, 12)
        for objects in list_titles(output)[0]:
            check_title(output, dataset.model, objects)
        for vectors in (SHOTS, contextual(CHECKPOINT)):
            check_vectors(dataset, object_name(SHOTS, "a", SOURCE), vectors)


def check_json(output, check: Callable[[Any, bytes], None], seed: bytes) -> None:
    fields = list(json.loads(seed))
    QUICK(given(edits)(lambda changes: check(output, mutated(seed, changes, TOKENS))))()
    QUICK(given(json_values)(lambda value: check(output, json.dumps(value).encode())))()
    QUICK(
        given(st.sampled_from(fields), json_values)(
            lambda name, value: check(output, json.dumps({**json.loads(seed), name: value}).encode())
        )
    )()


def test_any_failure_record(output):
    record = {"title_id": "b", "source": SOURCE, "video": "", "stage": "x", "message": "y", "attempts": 1}
    check_json(output, check_record, json.dumps({**record, "dataset_version": MODEL.dataset_version}).encode())


def test_any_model_json(output):
    check_json(output, check_model_json, MODEL.to_json())


# -------------------------------------------------------------------------------------------------------------- Parquet


def check_vectors(dataset: EmbeddingDataset, name: str, vectors: str) -> None:
    try:
        found = read_vectors(dataset, name, vectors)
    except TitleError as error:
        public_line(str(error)).encode()
        return
    assert len(found.vectors_SD) == len(found.start_S) == len(found.end_S)
    assert found.vectors_SD.dtype == np.float32
    assert isinstance(found.title_id, str)
    assert isinstance(found.source, str)


def check_object(output, name: str, content: bytes) -> None:
    """What is read is whole, or the title's error; verify has a finding wherever a reader refuses."""
    dataset = EmbeddingDataset(output.store.uri.rpartition("/")[0])
    kept = output.store.read(name)
    output.store.write(name, content)
    shots = object_name(SHOTS, "a", SOURCE)
    try:
        with Timed(len(content)):
            try:
                read_shots(output, shots, dataset.model)
            except TitleError as error:
                public_line(str(error)).encode()
            for vectors in (SHOTS, contextual(CHECKPOINT)):
                check_vectors(dataset, shots, vectors)
            for objects in list_titles(output)[0]:
                for finding in check_title(output, dataset.model, objects).findings:
                    public_line(finding.reason).encode()
    finally:
        output.store.write(name, kept)


PARTS = [SHOTS, contextual(CHECKPOINT)]


@pytest.mark.parametrize("part", PARTS)
def test_mutated_object(output, part):
    name = object_name(part, "a", SOURCE)
    content = output.store.read(name)
    QUICK(given(edits)(lambda changes: check_object(output, name, mutated(content, changes, TOKENS))))()
    for cut in range(0, len(content), max(1, len(content) // 40)):
        check_object(output, name, content[:cut])


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_mutated_object_for_long(output, part):
    name = object_name(part, "a", SOURCE)
    content = output.store.read(name)
    LONG(given(edits)(lambda changes: check_object(output, name, mutated(content, changes, TOKENS))))()


@pytest.mark.parametrize("part", PARTS)
def test_any_facts_of_an_object(output, part):
    name = object_name(part, "a", SOURCE)
    table = pq.read_table(pa.BufferReader(output.store.read(name)))
    facts = json.loads(table.schema.metadata[METADATA_KEY])

    def with_facts(raw: bytes) -> None:
        check_object(output, name, parquet_of(table.replace_schema_metadata({METADATA_KEY: raw})))

    QUICK(given(st.binary(max_size=50))(with_facts))()
    QUICK(given(json_values)(lambda value: with_facts(json.dumps(value).encode())))()
    QUICK(given(st.sampled_from(list(facts)), json_values)(lambda key, value: with_facts(json.dumps({**facts, key: value}).encode())))()


@pytest.mark.parametrize("part", PARTS)
def test_any_columns_of_an_object(output, part):
    name = object_name(part, "a", SOURCE)
    table = pq.read_table(pa.BufferReader(output.store.read(name)))
    others = {
        "string": pa.array(["a"] * 3),
        "null": pa.nulls(3),
        "number": pa.array([0, 1, 2]),
        "float": pa.array([float("nan"), float("inf"), -1.0]),
        "list": pa.array([[1.0], [], None]),
        "doubles": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float64(), 2)),
        "floats": pa.array([[1.0] * 12] * 3, pa.list_(pa.float32(), 12)),
        "none of them": pa.array([None] * 3, pa.list_(pa.float32(), 12)),
        "nulls in them": pa.array([[None] * 12] * 3, pa.list_(pa.float32(), 12)),
        "empty": pa.array([[]] * 3, pa.list_(pa.float32(), 0)),
        "struct": pa.array([{"a": 1}] * 3),
    }

    def check(column: str, kind: str, rows: int) -> None:
        changed = table.drop_columns([column])
        changed = changed if kind == "missing" else changed.append_column(column, others[kind])
        check_object(output, name, parquet_of(changed.slice(0, rows)))

    QUICK(given(st.sampled_from(table.column_names), st.sampled_from(["missing", *others]), st.integers(0, 3))(check))()
