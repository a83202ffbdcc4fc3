"""Compute vectors of every kind for a table of clips, and report all errors of the table at once. No ray here.

Shapes
    N  clips
    S  shots of a title
    D  dimension of an embedding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.clips import ClipEmbedder
from mediafm_ray.derive.reader import contextual_dataset, read_vectors, suggest_titles
from mediafm_ray.derive.runner import ordered_map
from mediafm_ray.downstream.clips import clip_overlaps, mean_of_neighbours, pool_overlaps
from mediafm_ray.errors import TitleError
from mediafm_ray.models.options import BUILTIN_NEIGHBOURS, ContextualiserConfig
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage.dataset import EmbeddingDataset, newest_objects
from mediafm_ray.storage.names import SHOTS, decode_title, encode_title, object_key
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.storage.tables import TableError, read_table

CLIP_COLUMNS = {"title_id": pa.string(), "start_s": pa.float64(), "end_s": pa.float64()}
FUSED, NEIGHBOURS, CONTEXTUAL, CONTEXTUAL_ALONE = "fused", "neighbours", "contextual", "contextual_alone"
KINDS = (*MODALITIES, FUSED, NEIGHBOURS, CONTEXTUAL_ALONE, CONTEXTUAL)  # kinds of clip vectors, in the order of the recipe's steps


@dataclass(frozen=True)
class ClipSource:
    """The source of clip vectors."""

    output_uri: str
    dataset: EmbeddingDataset
    stored: tuple[str, str]  # key and value of the option that selects stored contextual embeddings
    contextualiser: ContextualiserConfig  # The checkpoint may be empty.
    storage: StorageConfig
    threads: int  # threads that read titles

    def contextual_dataset(self) -> str:
        """Return the dataset of the stored contextual embeddings. Raises DatasetError."""
        return contextual_dataset(self.dataset, *self.stored, "or set contextualiser.checkpoint, or take other kinds of vectors")


def read_clips(uri: str, storage: StorageConfig) -> pa.Table:
    """Read a table of clips: ``title_id``, ``start_s``, ``end_s`` and any other columns. Raises TableError, StorageError."""
    return read_table(uri, CLIP_COLUMNS, storage)


def check_kinds(source: ClipSource, kinds: Sequence[str]) -> None:
    """Check that these kinds of vectors are available before any are read. Raises ConfigError and DatasetError with those that are."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigError(f"unknown kind of clip vectors: {', '.join(unknown) or '(none given)'}; there are {', '.join(KINDS)}")
    if CONTEXTUAL_ALONE in kinds and not source.contextualiser.checkpoint:
        raise ConfigError(
            f"{CONTEXTUAL_ALONE} reads a clip without the rest of its title and needs the model: "
            f"set contextualiser.checkpoint, such as {BUILTIN_NEIGHBOURS}"
        )
    if CONTEXTUAL in kinds and not source.contextualiser.checkpoint:
        source.contextual_dataset()


def clip_vectors(source: ClipSource, clips: pa.Table, uri: str, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the (N, D) float32 unit vectors of the clips for each kind, in the order of the table at ``uri``.

    A clip without a modality has a zero vector there. Contextual embeddings in context are the committed ones; with a checkpoint that has
    written none, they are computed from the committed shots. Raises TableError with every unknown title, empty span, span outside its
    title and title that cannot be read.
    """
    check_kinds(source, kinds)
    given = bool(source.contextualiser.checkpoint)
    stored = [kind for kind in kinds if kind in (*MODALITIES, FUSED, NEIGHBOURS) or (kind == CONTEXTUAL and not given)]
    found = _pooled(source, clips, uri, stored)  # It also checks every clip.
    computed = [kind for kind in kinds if kind not in stored]
    if computed:
        embedder = ClipEmbedder(source.output_uri, source.contextualiser, source.dataset.version, source.storage)
        for kind in computed:
            try:
                found[kind] = embedder.clip_embeddings(clips, context=kind == CONTEXTUAL)
            except (TitleError, ValueError) as error:
                raise TableError(uri, [str(error)]) from error
    return {kind: found[kind] for kind in kinds}


def _pooled(source: ClipSource, clips: pa.Table, uri: str, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Compute the kinds that are pooled from stored vectors. Every title is read once."""
    dataset = source.dataset
    contextual = source.contextual_dataset() if CONTEXTUAL in kinds else ""
    names = {object_key(info.name)[0]: info.name for info in newest_objects(dataset.output.list(SHOTS))}
    spans = {**dataset.model.spans, FUSED: (0, dataset.model.dims["fused"])}
    found = {kind: np.zeros((len(clips), np.diff(spans.get(kind, spans[FUSED]))[0]), np.float32) for kind in kinds}
    rows_of: dict[str, list[int]] = {}
    for row, title_id in enumerate(clips["title_id"].to_pylist()):
        rows_of.setdefault(title_id, []).append(row)
    start_N, end_N = clips["start_s"].to_numpy(), clips["end_s"].to_numpy()

    def pool(title_id: str) -> list[tuple[int, str]]:
        """Fill the rows of one title; return the problems with their rows."""
        rows = rows_of[title_id]
        where = f"row {rows[0] + 1}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "") + f" ({title_id})"
        name = names.get(encode_title(title_id))
        if name is None:
            return [(rows[0], f"{where}: no such title is committed{suggest_titles(title_id, [decode_title(name) for name in names])}")]
        try:
            shots = read_vectors(dataset, name, SHOTS)
            vectors = {kind: shots.vectors_SD[:, slice(*spans[kind])] for kind in kinds if kind in spans}
            if NEIGHBOURS in kinds:
                vectors[NEIGHBOURS] = mean_of_neighbours(shots.vectors_SD)
            if contextual:
                vectors[CONTEXTUAL] = read_vectors(dataset, name, contextual).vectors_SD
        except TitleError as error:
            return [(rows[0], f"{where}: {error}")]
        problems = []
        for row in rows:
            try:
                overlaps_S = clip_overlaps(shots.start_S, shots.end_S, start_N[row], end_N[row])
                for kind, vectors_SD in vectors.items():
                    if kind not in MODALITIES or vectors_SD[overlaps_S > 0].any():
                        found[kind][row] = pool_overlaps(overlaps_S, vectors_SD)
            except ValueError as error:
                problems.append((row, f"row {row + 1} ({title_id}): {error}"))
        return problems

    problems = [problem for problems in ordered_map(pool, rows_of, source.threads) for problem in problems]
    if problems:
        raise TableError(uri, [line for _, line in sorted(problems)])
    return found
