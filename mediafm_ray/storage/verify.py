"""Check the objects of a dataset version, each read whole, against their schemas and invariants.

Shapes
    S  shots of the title
    D  dimension of an embedding
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.spec import MODALITIES, digest_of
from mediafm_ray.storage.dataset import MAX_DIM, Model, Output, is_span, parse_failure
from mediafm_ray.storage.merged import COMPACTED, FILE_PATTERN, MARK_PATTERN, DamagedRows, LaterFormat, MergedFileError
from mediafm_ray.storage.names import FAILURES, MODEL, OBJECT_PATTERN, SCENES, SHOTS, contextual, derived, object_key, object_name
from mediafm_ray.storage.schemas import (
    contextual_schema,
    embedding_values,
    read_facts,
    scenes_schema,
    shots_schema,
    titles_schema,
    vector_fact,
)
from mediafm_ray.storage.store import ObjectInfo

NORM_TOLERANCE = 1e-3
NOT_OURS = "not an object of this program: readers of the folder may fail on it"
TIMES = ("shot_index", "start_s", "end_s")  # columns that contextual rows have in common with shots


class BrokenObject(Exception):
    """A broken object; the message is one line for the user."""


@dataclass(frozen=True)
class Finding:
    """One problem of an object."""

    name: str  # below the dataset version
    reason: str
    removable: bool = True  # The next run computes the object again. False: not written by this program, or not known to be broken.
    refused: bool = False  # The store could not be read.
    is_merged: bool = False  # There is no such object: the rows are in a merged file.


@dataclass(frozen=True)
class Checked:
    """The result for all objects of one title and source."""

    objects: int
    size: int  # bytes
    findings: Sequence[Finding]


def check_model(output: Output) -> tuple[Model | None, list[Finding]]:
    """Read and check model.json: its digest, dimensions and spans must agree."""
    try:
        model = Model.from_json(output.store.read(MODEL))
    except (FileNotFoundError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({type(error).__name__}: {error})"
        return None, [Finding(MODEL, f"{reason}: embedding any title of this dataset version writes it", removable=False)]
    wrong = []
    if model.dataset_version != output.dataset_version:
        wrong.append(f"is of dataset version {model.dataset_version}")
    if digest_of(model.recipe)[: len(output.dataset_version)] != output.dataset_version:
        wrong.append("the dataset version is not the digest of its recipe")
    ends = [0, *np.cumsum([model.dims[name] for name in MODALITIES]).tolist()]
    if model.spans != dict(zip(MODALITIES, itertools.pairwise(ends), strict=True)) or model.dims["fused"] != ends[-1]:
        wrong.append(f"dimensions {dict(model.dims)} and spans {dict(model.spans)} do not agree")
    return model, [Finding(MODEL, one, removable=False) for one in wrong]


def list_titles(output: Output) -> tuple[list[Sequence[tuple[str, ObjectInfo]]], list[Finding]]:
    """List the objects and datasets of each title and source, and findings for all other objects.

    Titles in merged files are among them, in the order of the files. A merged file that cannot be read is a finding.
    """
    titles: dict[tuple[str, str], list[tuple[str, ObjectInfo]]] = {}
    strangers = []
    for dataset in output.datasets():
        for info in output.store.list(f"{dataset}/"):
            match = OBJECT_PATTERN.fullmatch(info.name.removeprefix(f"{dataset}/"))
            if match and info.name.endswith(".json" if dataset == FAILURES else ".parquet"):
                titles.setdefault((match["title"], match["source"]), []).append((dataset, info))
            else:
                strangers.append(Finding(info.name, NOT_OURS, removable=False))
        if dataset != FAILURES:
            found, broken = _list_merged(output, dataset)
            strangers += broken
            for info in found:
                titles.setdefault(object_key(info.name), []).append((dataset, info))
    ordered = sorted(titles, key=lambda key: titles[key][0][1].name.split("/", 1)[1])
    return [titles[key] for key in ordered], strangers


def _list_merged(output: Output, dataset: str) -> tuple[list[ObjectInfo], list[Finding]]:
    """List the titles of a dataset that are only in merged files, and findings for merged files that cannot be read."""
    titles, findings = [], []
    for info in output.store.list(f"{COMPACTED}/{dataset}/"):
        if not (file := FILE_PATTERN.fullmatch(info.name)):
            if not MARK_PATTERN.fullmatch(info.name):
                findings.append(Finding(info.name, NOT_OURS, removable=False))
            continue
        try:
            for infos in output.list(dataset, f"shard={file['shard']}/").values():
                titles += [info for info in infos if info.is_merged]
        except LaterFormat as error:
            findings.append(Finding(info.name, str(error), removable=False))
        except MergedFileError as error:
            reason = str(error).partition(": its titles are")[0]
            findings.append(Finding(info.name, f"{reason}: without it, the next run computes its titles again that have no object"))
    return titles, findings


def check_title(output: Output, model: Model | None, objects: Sequence[tuple[str, ObjectInfo]]) -> Checked:
    """Check all objects of one title and source. Every problem is a finding, also an error of the store."""
    findings = []
    shots: pa.Table | None = None
    for dataset, info in sorted(objects, key=lambda pair: pair[0] != SHOTS):  # The others are compared with the shots.
        try:
            content = output.read(info.name) if info.is_merged else output.store.read(info.name)
        except FileNotFoundError:  # A newer source has superseded it.
            continue
        except DamagedRows as error:
            findings.append(Finding(info.name, str(error).partition(": run mediafm verify")[0], is_merged=True))
            continue
        except Exception as error:  # fsspec's implementations raise many types, which do not show that the object is broken.
            findings.append(Finding(info.name, f"it could not be read ({type(error).__name__}: {error})", removable=False, refused=True))
            if dataset == SHOTS:  # The others cannot be checked without them.
                break
            continue
        try:
            if dataset == FAILURES:
                check_failure(content, info.name, output.dataset_version)
            elif dataset == SHOTS:
                shots = check_shots(content, info.name, output.dataset_version, model)
            elif dataset.startswith(contextual("")):
                check_contextual(content, info.name, output.dataset_version, dataset, model, shots)
            else:
                check_derived(content, info.name, output.dataset_version, dataset, shots)
        except BrokenObject as error:
            findings.append(Finding(info.name, str(error), is_merged=info.is_merged))
    return Checked(len(objects), sum(info.size for _, info in objects), findings)


# ------------------------------------------------------------------------------------------------------------- objects


def check_shots(content: bytes, name: str, version: str, model: Model | None) -> pa.Table:
    """Check an object of the dataset ``shots`` and return its rows. Raises BrokenObject."""
    table, facts = _read(content, name, SHOTS, version)
    dims, spans = _spaces(facts, model)
    _check_schema(table, shots_schema(_dim(dims, "fused")))
    _check_rows(table, facts, "shot_index")
    _check_tiling(table, "start_frame", "end_frame")
    media = _fact(facts, "media", dict)
    for column, whole in (("end_s", "duration_s"), ("end_frame", "frame_count")):
        end = table[column][-1].as_py()
        if end != _number(media, whole):
            raise BrokenObject(f"the last shot ends at {column} {end}, and the title's {whole} is {media[whole]}")
    fused_SD = embedding_values(table["fused_embedding"])
    norm_S = table["fused_norm"].to_numpy()
    if not np.isfinite(norm_S).all() or (norm_S < 0).any():
        raise BrokenObject("fused_norm has values that are not norms")
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
    """Check the contextual embeddings of one title. ``shots``: its shots; None where they are missing or broken. Raises BrokenObject."""
    table, facts = _read(content, name, dataset, version)
    dims, _ = _spaces(facts, model)
    dim = _dim(dims, "fused")
    _check_schema(table, contextual_schema(dim))
    if f"contextual-{facts.get('checkpoint')}" != dataset:
        raise BrokenObject(f"it was made by the checkpoint {facts.get('checkpoint')}")
    _check_rows(table, facts, "shot_index")
    _check_vectors(embedding_values(table["contextual_embedding"]), None, "contextual_embedding")
    _check_base64(facts, "cls_embedding", dim, optional=False)
    shots = _present(shots)
    if len(table) != len(shots):
        raise BrokenObject(f"it has {len(table)} rows, the title has {len(shots)} shots")
    for column in TIMES:
        if not table[column].equals(shots[column]):
            raise BrokenObject(f"its {column} is not that of the title's shots")


def check_derived(content: bytes, name: str, version: str, dataset: str, shots: pa.Table | None) -> None:
    """Check the scenes or the row of one title. ``shots``: the shots that it is made from. Raises BrokenObject."""
    kind = dataset.split("-")[0]
    table, facts = _read(content, name, dataset, version)
    if derived(kind, _fact(facts, "vectors", str), _fact(facts, "recipe", dict)) != dataset:
        raise BrokenObject("the dataset's name is not the digest of its vectors and recipe")
    shots = _present(shots)
    duration_s = shots["end_s"][-1].as_py()
    if kind == SCENES:
        _check_schema(table, scenes_schema())
        _check_rows(table, facts, "scene_index")
        first_K, last_K = table["first_shot"].to_numpy(), table["last_shot"].to_numpy()
        if first_K[0] != 0 or last_K[-1] != len(shots) - 1 or (first_K[1:] != last_K[:-1] + 1).any() or (last_K < first_K).any():
            raise BrokenObject(f"scenes do not tile the {len(shots)} shots of the title")
        if table["end_s"][-1].as_py() != duration_s:
            raise BrokenObject(f"the last scene ends at {table['end_s'][-1]} s, the last shot at {duration_s} s")
        return
    _check_schema(table, titles_schema(table.schema.field("pooled_embedding").type.list_size) if _has_vectors(table) else titles_schema(1))
    if len(table) != 1 or table["title_id"][0].as_py() != facts["title_id"]:
        raise BrokenObject("it is not exactly one row of its title")
    if table["shots"][0].as_py() != len(shots) or table["duration_s"][0].as_py() != duration_s:
        raise BrokenObject(f"it says {table['shots'][0]} shots in {table['duration_s'][0]} s; there are {len(shots)} in {duration_s} s")
    _check_vectors(embedding_values(table["pooled_embedding"]), np.ones(1), "pooled_embedding")


def check_failure(content: bytes, name: str, version: str) -> None:
    """Check a failure record. Raises BrokenObject."""
    try:
        record = parse_failure(content)
        named = object_name(FAILURES, record["title_id"], record["source"])
        complete = record["message"] and record["stage"]
        written_by = record["dataset_version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenObject(f"not a failure record: {type(error).__name__}: {error}") from error
    if named != name:
        raise BrokenObject(f"it is the record of title {record['title_id']!r} from source {record['source']}")
    if not complete:
        raise BrokenObject("the record lacks its stage or message")
    if written_by != version:
        raise BrokenObject(f"it is of dataset version {written_by}")


def _read(content: bytes, name: str, dataset: str, version: str) -> tuple[pa.Table, Mapping[str, Any]]:
    """Read a title's file and its facts, and check that they agree with its name. Raises BrokenObject."""
    try:
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        table.validate(full=True)
        facts = read_facts(table.schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BrokenObject(f"not a readable Parquet file: {' '.join(str(error).split())}") from error
    title_id, source = _fact(facts, "title_id", str), _fact(facts, "source", str)
    try:
        named = object_name(dataset, title_id, source)
    except ValueError as error:  # JSON may hold half a surrogate pair.
        raise BrokenObject(f"it holds title {title_id!r}, which is not valid Unicode") from error
    if named != name:
        raise BrokenObject(f"it holds title {title_id!r} from source {source}, whose name would be {named}")
    if _fact(facts, "dataset_version", str) != version:
        raise BrokenObject(f"it is of dataset version {facts['dataset_version']}")
    return table, facts


def _spaces(facts: Mapping[str, Any], model: Model | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the dimensions and spans of a title's vectors, and check that they are those of model.json."""
    dims, spans = _fact(facts, "dims", dict), _fact(facts, "spans", dict)
    if set(spans) != set(MODALITIES) or not all(map(is_span, spans.values())):
        raise BrokenObject(f"its facts have spans of {sorted(spans)}")
    if model is not None and (dims != dict(model.dims) or spans != {key: list(span) for key, span in model.spans.items()}):
        raise BrokenObject("its dimensions or spans are not those of model.json")
    return dims, spans


def _check_schema(table: pa.Table, schema: pa.Schema) -> None:
    """Check that the columns of a schema are there with their types. Others may exist, and nullable ones may be missing."""
    for field in schema:
        if field.name not in table.column_names:
            if field.nullable:
                continue
            raise BrokenObject(f"the column {field.name} is missing")
        found = table.schema.field(field.name)
        if found.type != field.type:
            raise BrokenObject(f"the column {field.name} is {found.type}, must be {field.type}")
        if table[field.name].null_count and not field.nullable:
            raise BrokenObject(f"the column {field.name} has nulls")


def _check_rows(table: pa.Table, facts: Mapping[str, Any], index: str) -> None:
    """Check for at least one row, all of one title, numbered in order by the column ``index``, that tile its time from 0."""
    if not len(table):
        raise BrokenObject("it has no rows")
    if set(table["title_id"].to_pylist()) != {facts["title_id"]}:
        raise BrokenObject("its rows are of another title")
    if not np.array_equal(table[index].to_numpy(), np.arange(len(table))):
        raise BrokenObject(f"{index} does not count from 0 in steps of 1")
    _check_tiling(table, "start_s", "end_s")


def _check_tiling(table: pa.Table, start: str, end: str) -> None:
    """Check that every shot starts where the previous one ends, the first at 0, and that none is empty."""
    starts_S, ends_S = table[start].to_numpy(), table[end].to_numpy()
    wrong_S = ~(ends_S > starts_S) | ~np.isfinite(ends_S) | (starts_S != np.concatenate([[0], ends_S[:-1]]))
    if wrong_S.any():
        shot = _first(wrong_S)
        raise BrokenObject(f"shots do not tile the title: {start} and {end} of shot {shot} are {starts_S[shot]} and {ends_S[shot]}")


def _has_vectors(table: pa.Table) -> bool:
    found = table.schema.get_field_index("pooled_embedding")
    return found >= 0 and pa.types.is_fixed_size_list(table.schema.field(found).type)


def _present(shots: pa.Table | None) -> pa.Table:
    if shots is None:
        raise BrokenObject("the shots that it belongs to are missing or broken")
    return shots


def _check_vectors(vectors_SD: np.ndarray, unit_S: np.ndarray | None, column: str) -> None:
    """Check that vectors are finite, of unit norm where ``unit_S`` and zero elsewhere; without ``unit_S``, that none is zero."""
    finite_S = np.isfinite(vectors_SD).all(axis=1)
    if not finite_S.all():
        raise BrokenObject(f"{column} of shot {_first(~finite_S)} is not finite")
    norm_S = np.sqrt(np.einsum("sd,sd->s", vectors_SD, vectors_SD))
    wrong_S = norm_S == 0 if unit_S is None else np.abs(norm_S - unit_S) > NORM_TOLERANCE
    if wrong_S.any():
        raise BrokenObject(f"{column} of shot {_first(wrong_S)} has norm {norm_S[_first(wrong_S)]:.4f}")


def _check_base64(facts: Mapping[str, Any], name: str, dim: int, optional: bool) -> None:
    """Check a vector of the facts: float32, little-endian, base64."""
    if name not in facts or (facts[name] is None and not optional):
        raise BrokenObject(f"its facts lack {name}")
    try:
        vector = vector_fact(facts, name)
    except ValueError as error:
        raise BrokenObject(f"the {name} of its facts is not a vector: {error}") from error
    if vector is None:
        return
    if vector.shape != (dim,) or not np.isfinite(vector).all():
        raise BrokenObject(f"the {name} of its facts does not have {dim} finite numbers")


def _fact(facts: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(facts, dict) or not isinstance(facts.get(name), kind):
        raise BrokenObject(f"its facts lack {name}")
    return facts[name]


def _number(facts: Mapping[str, Any], name: str) -> float:
    if not isinstance(facts.get(name), (int, float)):
        raise BrokenObject(f"its facts lack media.{name}")
    return facts[name]


def _dim(dims: Mapping[str, Any], name: str) -> int:
    if type(dims.get(name)) is not int or not 0 < dims[name] < MAX_DIM:
        raise BrokenObject(f"its facts lack dims.{name}")
    return dims[name]


def _first(wrong_S: np.ndarray) -> int:
    return int(np.argmax(wrong_S))
