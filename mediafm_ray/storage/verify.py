"""Checks of what is stored: every object of a dataset version, read whole, against what the design promises of it.

Shapes
    S  shots of the title
    D  dimension of an embedding
"""

from __future__ import annotations

import base64
import itertools
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.spec import MODALITIES, digest_of
from mediafm_ray.storage.dataset import FAILURES, MODEL, OBJECT_PATTERN, SHOTS, Model, Output, object_name
from mediafm_ray.storage.schemas import contextual_schema, embedding_values, read_facts, shots_schema
from mediafm_ray.storage.store import ObjectInfo, StorageError

NORM_TOLERANCE = 1e-3  # of a unit vector's norm
IN_FLIGHT_PER_THREAD = 2  # titles read or waiting
UNREADABLE = "could not be read"
MAX_UNREADABLE = 20  # then it is the store that is in trouble, not the objects
TIMES = ("shot_index", "start_s", "end_s")  # what the contextual rows of a title have in common with its shots


class BrokenObject(Exception):
    """What is wrong with one object, in one line for a person."""


@dataclass(frozen=True)
class Finding:
    """One object that is not as it must be."""

    name: str  # below the dataset version
    reason: str
    removable: bool = True  # the next run computes it anew; False: not this program's, or it could not be read at all


@dataclass(frozen=True)
class Checked:
    """One title from one source, with all its objects."""

    objects: int
    size: int  # bytes
    findings: Sequence[Finding]


def check_model(output: Output) -> tuple[Model | None, list[Finding]]:
    """model.json as it can be read, and what is wrong with it: the digest, the dimensions and the spans have to agree."""
    try:
        model = Model.from_json(output.store.read(MODEL))
    except FileNotFoundError:
        return None, [Finding(MODEL, "is not there: any job on this dataset version puts it", removable=False)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return None, [
            Finding(MODEL, f"cannot be read ({type(error).__name__}: {error}): any job on this dataset version puts it anew", False)
        ]
    wrong = []
    if model.dataset_version != output.dataset_version:
        wrong.append(f"is of dataset version {model.dataset_version}")
    if digest_of(model.recipe)[: len(output.dataset_version)] != output.dataset_version:
        wrong.append("its recipe is not what the dataset version is the digest of")
    ends = [0, *np.cumsum([model.dims.get(name, 0) for name in MODALITIES]).tolist()]
    if model.spans != dict(zip(MODALITIES, itertools.pairwise(ends), strict=True)) or model.dims.get("fused") != ends[-1]:
        wrong.append(f"dimensions {dict(model.dims)} and spans {dict(model.spans)} do not agree")
    return model, [Finding(MODEL, one, removable=False) for one in wrong]


def check_titles(output: Output, model: Model | None, threads: int) -> tuple[int, Iterator[Checked]]:
    """How many objects there are, and the checks of them title by title, as they are done; a few titles are in memory at a time.

    ``model``: None where model.json is unreadable; objects are then compared with themselves only. Raises StorageError when
    objects cannot be read because the store fails; whatever is wrong with an object itself is a finding.
    """
    titles: dict[tuple[str, str], list[tuple[str, ObjectInfo]]] = {}
    strangers = []
    count = 0
    for dataset in output.datasets():
        for info in output.store.list(f"{dataset}/"):
            match = OBJECT_PATTERN.fullmatch(info.name.removeprefix(f"{dataset}/"))
            count += 1
            if match and info.name.endswith(".json" if dataset == FAILURES else ".parquet"):
                titles.setdefault((match["title"], match["source"]), []).append((dataset, info))
            else:
                strangers.append(
                    Finding(info.name, "is no object of this program, and readers of the folder may trip over it", removable=False)
                )
    first = [Checked(len(strangers), 0, strangers)] if strangers else []
    return count, _checked(output, model, first, titles, threads)


def _checked(
    output: Output,
    model: Model | None,
    first: Sequence[Checked],
    titles: Mapping[tuple[str, str], list[tuple[str, ObjectInfo]]],
    threads: int,
) -> Iterator[Checked]:
    yield from first
    unreadable = 0
    waiting: deque[Future[Checked]] = deque()
    todo = iter(sorted(titles))
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                while len(waiting) < threads * IN_FLIGHT_PER_THREAD and (key := next(todo, None)):
                    waiting.append(pool.submit(check_title, output, model, titles[key]))
                if not waiting:
                    return
                checked = waiting.popleft().result()
                unreadable += sum(finding.reason.startswith(UNREADABLE) for finding in checked.findings)
                if unreadable > MAX_UNREADABLE:
                    raise StorageError(
                        f"{output.store.uri}: more than {MAX_UNREADABLE} objects could not be read: {checked.findings[-1].reason}"
                    )
                yield checked
        finally:
            for future in waiting:
                future.cancel()


def check_title(output: Output, model: Model | None, objects: Sequence[tuple[str, ObjectInfo]]) -> Checked:
    """All objects of one title from one source."""
    findings = []
    shots: pa.Table | None = None
    for dataset, info in sorted(objects, key=lambda pair: pair[0] != SHOTS):  # the shots first: the others are compared with them
        try:
            content = output.store.read(info.name)
        except FileNotFoundError:  # superseded meanwhile
            continue
        except Exception as error:  # fsspec implementations raise many kinds; none says that the object is broken
            findings.append(Finding(info.name, f"{UNREADABLE} ({type(error).__name__}: {error})", removable=False))
            if dataset == SHOTS:  # nothing to judge the others by
                break
            continue
        try:
            if dataset == FAILURES:
                check_failure(content, info.name, output.dataset_version)
            elif dataset == SHOTS:
                shots = check_shots(content, info.name, output.dataset_version, model)
            else:
                check_contextual(content, info.name, output.dataset_version, dataset, model, shots)
        except BrokenObject as error:
            findings.append(Finding(info.name, str(error)))
    return Checked(len(objects), sum(info.size for _, info in objects), findings)


# ------------------------------------------------------------------------------------------------------------- objects


def check_shots(content: bytes, name: str, version: str, model: Model | None) -> pa.Table:
    """The shots of one title, as an object of the dataset ``shots``; returns them. Raises BrokenObject."""
    table, facts = _read(content, name, SHOTS, version, model)
    dims, spans = facts["dims"], facts["spans"]
    _check_schema(table, shots_schema(_dim(dims, "fused")))
    _check_rows(table, facts)
    _check_tiling(table, "start_frame", "end_frame")
    media = _fact(facts, "media", dict)
    for column, whole in (("end_s", "duration_s"), ("end_frame", "frame_count")):
        end = table[column][-1].as_py()
        if end != _number(media, whole):
            raise BrokenObject(f"the last shot ends at {column} {end}, and the title's {whole} is {media[whole]}")
    fused_SD = embedding_values(table["fused_embedding"])
    norm_S = table["fused_norm"].to_numpy()
    if not np.isfinite(norm_S).all() or (norm_S < 0).any():
        raise BrokenObject("fused_norm has values that are no norm")
    _check_vectors(fused_SD, norm_S > 0, "fused_embedding")
    for modality in MODALITIES:
        start, end = spans[modality]
        absent_S = ~table[f"has_{modality}"].to_numpy(zero_copy_only=False)
        wrong_S = fused_SD[:, start:end].any(axis=1) & absent_S
        if wrong_S.any():
            raise BrokenObject(f"shot {_first(wrong_S)} has no {modality}, and its {modality} embedding is not zero")
    _check_base64(facts, "metadata_embedding", _dim(dims, "text"), optional=True)
    return table


def check_contextual(content: bytes, name: str, version: str, dataset: str, model: Model | None, shots: pa.Table | None) -> None:
    """The contextual embeddings of one title; ``shots``: what they belong to, None where it is not there or broken. Raises BrokenObject."""
    table, facts = _read(content, name, dataset, version, model)
    dim = _dim(facts["dims"], "fused")
    _check_schema(table, contextual_schema(dim))
    if f"contextual-{facts.get('checkpoint')}" != dataset:
        raise BrokenObject(f"it was made by the checkpoint {facts.get('checkpoint')}")
    _check_rows(table, facts)
    _check_vectors(embedding_values(table["contextual_embedding"]), None, "contextual_embedding")
    _check_base64(facts, "cls_embedding", dim, optional=False)
    if shots is None:
        raise BrokenObject("the shots that it belongs to are not there, or broken")
    if len(table) != len(shots):
        raise BrokenObject(f"it has {len(table)} rows, the title has {len(shots)} shots")
    for column in TIMES:
        if not table[column].equals(shots[column]):
            raise BrokenObject(f"its {column} is not that of the title's shots")


def check_failure(content: bytes, name: str, version: str) -> None:
    """A failure record. Raises BrokenObject."""
    try:
        record = json.loads(content)
        named = object_name(FAILURES, record["title_id"], record["source"])
        complete = record["attempts"] >= 1 and record["message"] and record["stage"]
        written_by = record["dataset_version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenObject(f"no failure record: {type(error).__name__}: {error}") from error
    if named != name:
        raise BrokenObject(f"it is the record of title {record['title_id']!r} from source {record['source']}")
    if not complete:
        raise BrokenObject("the record lacks its stage, message or attempts")
    if written_by != version:
        raise BrokenObject(f"it is of dataset version {written_by}")


def _read(content: bytes, name: str, dataset: str, version: str, model: Model | None) -> tuple[pa.Table, Mapping[str, Any]]:
    """A title's file whole, and its facts, which agree with its name and with model.json."""
    try:
        table = pq.read_table(pa.BufferReader(content))
        table.validate(full=True)
        facts = read_facts(table.schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BrokenObject(f"no readable Parquet file: {' '.join(str(error).split())}") from error
    title_id, source = _fact(facts, "title_id", str), _fact(facts, "source", str)
    if object_name(dataset, title_id, source) != name:
        raise BrokenObject(
            f"it holds title {title_id!r} from source {source}, whose name would be {object_name(dataset, title_id, source)}"
        )
    if _fact(facts, "dataset_version", str) != version:
        raise BrokenObject(f"it is of dataset version {facts['dataset_version']}")
    dims, spans = _fact(facts, "dims", dict), _fact(facts, "spans", dict)
    if set(spans) != set(MODALITIES):
        raise BrokenObject(f"its facts have spans of {sorted(spans)}")
    if model is not None and (dims != dict(model.dims) or spans != {key: list(span) for key, span in model.spans.items()}):
        raise BrokenObject("its dimensions or spans are not those of model.json")
    return table, facts


def _check_schema(table: pa.Table, schema: pa.Schema) -> None:
    """The promised columns with their types; there may be more."""
    for field in schema:
        if field.name not in table.column_names:
            raise BrokenObject(f"the column {field.name} is missing")
        found = table.schema.field(field.name)
        if found.type != field.type:
            raise BrokenObject(f"the column {field.name} is {found.type}, must be {field.type}")
        if table[field.name].null_count:
            raise BrokenObject(f"the column {field.name} has nulls")


def _check_rows(table: pa.Table, facts: Mapping[str, Any]) -> None:
    """At least one shot, all of one title, in order, tiling its time from 0."""
    if not len(table):
        raise BrokenObject("it has no rows")
    if set(table["title_id"].to_pylist()) != {facts["title_id"]}:
        raise BrokenObject("its rows are of another title")
    if not np.array_equal(table["shot_index"].to_numpy(), np.arange(len(table))):
        raise BrokenObject("shot_index does not count from 0 in steps of 1")
    _check_tiling(table, "start_s", "end_s")


def _check_tiling(table: pa.Table, start: str, end: str) -> None:
    """Every shot starts where the one before it ends, the first at 0, and none is empty."""
    starts_S, ends_S = table[start].to_numpy(), table[end].to_numpy()
    wrong_S = ~(ends_S > starts_S) | ~np.isfinite(ends_S) | (starts_S != np.concatenate([[0], ends_S[:-1]]))
    if wrong_S.any():
        shot = _first(wrong_S)
        raise BrokenObject(f"shots do not tile the title: {start} and {end} of shot {shot} are {starts_S[shot]} and {ends_S[shot]}")


def _check_vectors(vectors_SD: np.ndarray, unit_S: np.ndarray | None, column: str) -> None:
    """Finite; of unit norm where ``unit_S``, zero elsewhere; without it, finite and not zero."""
    finite_S = np.isfinite(vectors_SD).all(axis=1)
    if not finite_S.all():
        raise BrokenObject(f"{column} of shot {_first(~finite_S)} is not finite")
    norm_S = np.sqrt(np.einsum("sd,sd->s", vectors_SD, vectors_SD))
    wrong_S = norm_S == 0 if unit_S is None else np.abs(norm_S - unit_S) > NORM_TOLERANCE
    if wrong_S.any():
        raise BrokenObject(f"{column} of shot {_first(wrong_S)} has norm {norm_S[_first(wrong_S)]:.4f}")


def _check_base64(facts: Mapping[str, Any], name: str, dim: int, optional: bool) -> None:
    """A vector among the facts: float32, little-endian, base64."""
    if name not in facts or (facts[name] is None and not optional):
        raise BrokenObject(f"its facts lack {name}")
    if facts[name] is None:
        return
    try:
        vector = np.frombuffer(base64.b64decode(facts[name], validate=True), "<f4")
    except (ValueError, TypeError) as error:
        raise BrokenObject(f"the {name} of its facts is no vector: {error}") from error
    if vector.shape != (dim,) or not np.isfinite(vector).all():
        raise BrokenObject(f"the {name} of its facts is not {dim} finite numbers")


def _fact(facts: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(facts, dict) or not isinstance(facts.get(name), kind):
        raise BrokenObject(f"its facts lack {name}")
    return facts[name]


def _number(facts: Mapping[str, Any], name: str) -> float:
    if not isinstance(facts.get(name), (int, float)):
        raise BrokenObject(f"its facts lack media.{name}")
    return facts[name]


def _dim(dims: Mapping[str, Any], name: str) -> int:
    if not isinstance(dims.get(name), int) or dims[name] < 1:
        raise BrokenObject(f"its facts lack dims.{name}")
    return dims[name]


def _first(wrong_S: np.ndarray) -> int:
    return int(np.argmax(wrong_S))
