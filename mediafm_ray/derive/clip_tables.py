"""Vectors for a table of clips, of every kind that a dataset holds; what is wrong with the table is said at once. No ray here.

Shapes
    N  clips
    S  shots of a title
    D  dimension of an embedding
"""

from __future__ import annotations

import difflib
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.clips import ClipEmbedder
from mediafm_ray.derive.reader import contextual_dataset, read_vectors
from mediafm_ray.derive.runner import in_order
from mediafm_ray.downstream.clips import clip_overlaps, mean_of_neighbours, pool_overlaps
from mediafm_ray.errors import TitleError
from mediafm_ray.models.options import ContextualiserConfig
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage.dataset import SHOTS, EmbeddingDataset, encode_title, newest_objects, object_key
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.storage.tables import TableError, read_table

CLIP_COLUMNS = {"title_id": pa.string(), "start_s": pa.float64(), "end_s": pa.float64()}
FUSED, NEIGHBOURS, CONTEXTUAL, CONTEXTUAL_ALONE = "fused", "neighbours", "contextual", "contextual_alone"
KINDS = (*MODALITIES, FUSED, NEIGHBOURS, CONTEXTUAL_ALONE, CONTEXTUAL)  # of clip vectors, each with one more step of the recipe behind it
TITLES_SUGGESTED = 3


@dataclass(frozen=True)
class ClipSource:
    """Where the vectors of clips come from."""

    output_uri: str
    dataset: EmbeddingDataset
    stored: tuple[str, str]  # the key of the option that says whose stored contextual embeddings to take, and its value
    contextualiser: ContextualiserConfig  # its checkpoint may be empty
    storage: StorageConfig
    threads: int  # titles read at once

    def contextual_dataset(self) -> str:
        """The dataset of the stored contextual embeddings. Raises DatasetError."""
        return contextual_dataset(self.dataset, *self.stored, "or set contextualiser.checkpoint, or take other kinds of vectors")


def read_clips(uri: str, storage: StorageConfig) -> pa.Table:
    """A table of clips: ``title_id``, ``start_s``, ``end_s`` and whatever else it has. Raises TableError, StorageError."""
    return read_table(uri, CLIP_COLUMNS, storage)


def check_kinds(source: ClipSource, kinds: Sequence[str]) -> None:
    """See, before anything is read, that these kinds of vectors can be had. Raises ConfigError, DatasetError saying what can."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigError(f"no kind of clip vectors {', '.join(unknown) or '(none given)'}: there are {', '.join(KINDS)}")
    if CONTEXTUAL_ALONE in kinds and not source.contextualiser.checkpoint:
        raise ConfigError(f"{CONTEXTUAL_ALONE} reads the shots of a clip by themselves and needs the model: set contextualiser.checkpoint")
    if CONTEXTUAL in kinds and not source.contextualiser.checkpoint:
        source.contextual_dataset()


def clip_vectors(source: ClipSource, clips: pa.Table, uri: str, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """For each kind the (N, D) float32 unit vectors of the clips, in the order of the table at ``uri``.

    A clip of which a modality is absent has a zero vector there. In context, contextual embeddings are those committed, or computed from
    the committed shots where a checkpoint is given and has written none. Raises TableError with every unknown title, empty span, span
    outside of its title and title that cannot be read.
    """
    check_kinds(source, kinds)
    given = bool(source.contextualiser.checkpoint)
    stored = [kind for kind in kinds if kind in (*MODALITIES, FUSED, NEIGHBOURS) or (kind == CONTEXTUAL and not given)]
    found = _pooled(source, clips, uri, stored)  # also checks every clip
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
    """The kinds that are pooled from what is stored; every title is read once."""
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
        """Fill the rows of one title; what is wrong, by row."""
        rows = rows_of[title_id]
        where = f"row {rows[0] + 1}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "") + f" ({title_id})"
        name = names.get(encode_title(title_id))
        if name is None:
            return [(rows[0], f"{where}: no such title is committed{suggestion(title_id, [urllib.parse.unquote(name) for name in names])}")]
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

    problems = [problem for problems in in_order(pool, rows_of, source.threads) for problem in problems]
    if problems:
        raise TableError(uri, [line for _, line in sorted(problems)])
    return found


def suggestion(title_id: str, titles: Sequence[str]) -> str:
    """The end of a message on a title that is not there: the titles whose ids are close to it or, where none is, how many there are."""
    close = difflib.get_close_matches(title_id, titles, TITLES_SUGGESTED)
    return f"; close to it: {', '.join(close)}" if close else f" ({len(titles)} are)"
