"""Read the committed vectors of a title, fused or contextual, and convert shots to the contextualiser's input.

Shapes
    S  shots of the title
    D  dimension of an embedding
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.config.sections import VectorsConfig
from mediafm_ray.errors import TitleError
from mediafm_ray.runs.plan import BUILTIN_DATASET
from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset
from mediafm_ray.storage.names import SHOTS, contextual, encode_title, matching_object, object_key
from mediafm_ray.storage.schemas import contextual_schema, embedding_values, read_facts, vector_fact
from mediafm_ray.storage.stored_shots import StoredShots, read_shots

TITLES_SUGGESTED = 3


@dataclass(frozen=True, eq=False)
class StoredVectors:
    """The vectors of a title's shots, with the title's id, source and shot times."""

    title_id: str
    source: str
    start_S: np.ndarray  # float64, seconds
    end_S: np.ndarray  # float64, seconds
    vectors_SD: np.ndarray  # float32
    cls_D: np.ndarray | None = None  # float32, the contextualiser's [CLS] embedding; None for fused vectors


def vectors_dataset(dataset: EmbeddingDataset, config: VectorsConfig) -> str:
    """Return the dataset of the configured vectors: ``shots`` for fused ones, else a ``contextual-<checkpoint>``. Raises DatasetError."""
    if config.kind == "fused":
        return SHOTS
    return contextual_dataset(dataset, "vectors.checkpoint", config.checkpoint, "or set vectors.kind=fused")


def contextual_dataset(dataset: EmbeddingDataset, key: str, digits: str, otherwise: str) -> str:
    """Return the dataset of a checkpoint's contextual embeddings, given by the ``digits`` in the option ``key``.

    Without digits it is the only trained one, or that of ``builtin:neighbours`` where there is no trained one.

    Raises DatasetError where there is none or several. The message says what exists and, with ``otherwise``, what else to do.
    """
    there = dataset.names()
    found = [name for name in there if name.startswith(contextual(""))]
    where = dataset.output.store.uri
    if digits and contextual(digits) in found:
        return contextual(digits)
    if digits or not found:
        missing = contextual(digits) if digits else "contextual embeddings"
        raise DatasetError(f"{where} has no {missing}; there are: {', '.join(there) or 'none'}; run mediafm contextualise, {otherwise}")
    if len(found) > 1:
        found = [name for name in found if name != BUILTIN_DATASET]
    if len(found) > 1:
        choices = ", ".join(name.removeprefix(contextual("")) for name in found)
        raise DatasetError(f"{where} has contextual embeddings of {len(found)} checkpoints: set {key} to one of {choices}")
    return found[0]


def read_vectors(dataset: EmbeddingDataset, shots: str, vectors: str) -> StoredVectors:
    """Read the vectors of the object ``shots`` in the dataset ``vectors``. Raises TitleError where an object is gone or damaged."""
    if vectors == SHOTS:
        stored = read_shots(dataset.output, shots, dataset.model)
        return StoredVectors(stored.facts["title_id"], stored.facts["source"], stored.start_S, stored.end_S, stored.fused_SD)
    name = matching_object(shots, vectors)
    try:
        content = pa.BufferReader(dataset.output.read(name))
        table = pq.read_table(content, use_threads=False, page_checksum_verification=True)
        facts = read_facts(table.schema)
        title_id, cls_D = facts["title_id"], vector_fact(facts, "cls_embedding")
        dim = dataset.model.dims["fused"]
        written = [table.schema.field(field.name).type == field.type for field in contextual_schema(dim)]
        if not all(written) or any(table[field.name].null_count for field in contextual_schema(dim)):
            raise ValueError("its columns have other types than the written ones")
        if not isinstance(title_id, str) or (encode_title(title_id), facts["source"]) != object_key(name):
            raise ValueError(f"it holds the title {title_id!r} ({facts['source']})")
        if cls_D is None or len(cls_D) != dim:
            raise ValueError(f"its cls_embedding does not have {dim} numbers")
        return StoredVectors(
            title_id,
            facts["source"],
            table["start_s"].to_numpy(),
            table["end_s"].to_numpy(),
            embedding_values(table["contextual_embedding"]),
            cls_D,
        )
    except FileNotFoundError as error:
        raise TitleError(f"it has no contextual embeddings in {vectors}: run mediafm contextualise with that checkpoint") from error
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # Arrow's error depends on the damaged byte.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise TitleError(f"{name} cannot be read ({reason}): delete it and run mediafm contextualise") from error


def suggest_titles(title_id: str, titles: Sequence[str]) -> str:
    """Return the end of a message about an unknown title: similar ids or, without any, the number of titles."""
    close = difflib.get_close_matches(title_id, titles, TITLES_SUGGESTED)
    return f"; similar: {', '.join(close)}" if close else f"; there are {len(titles)} others"


def to_model_input(shots: StoredShots) -> Any:
    """Convert shots to the contextualiser's input (contextualiser.TitleShots)."""
    from mediafm_ray.models.contextualiser import TitleShots, shot_times

    return TitleShots(shots.fused_SD, shots.metadata_M, shot_times(shots.start_S, shots.end_S))
