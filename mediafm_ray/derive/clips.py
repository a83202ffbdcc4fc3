"""Compute vectors of clips of committed titles, in the context of the whole title or alone. No ray here.

    embedder = ClipEmbedder("embeddings/", "checkpoint/")
    embedder.clip_embedding("film", 12.0, 30.5)                  # shots in the context of the film
    embedder.clip_embedding("film", 12.0, 30.5, context=False)   # the clip's shots as a title of their own

Shapes
    N  clips
    S  shots of a title
    D  dimension of an embedding
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mediafm_ray.config.jobs import ContextualiseCatalogConfig
from mediafm_ray.config.sections import OutputConfig, StoredDatasetConfig
from mediafm_ray.derive.reader import to_model_input
from mediafm_ray.downstream.clips import clip_overlaps, pool_clip, pool_overlaps
from mediafm_ray.models.options import ContextualiserConfig
from mediafm_ray.runs.plan import checkpoint_name
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.storage.names import contextual, matching_object
from mediafm_ray.storage.schemas import embedding_values
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.storage.stored_shots import StoredShots, read_shots


class ClipEmbedder:
    """Embed clips of the titles of one dataset version with one checkpoint. Nothing is written.

    In context, a clip is pooled from the title's committed contextual embeddings. Where the checkpoint has none for the title's source,
    they are computed from the committed shots; on a CPU, with the same bytes.
    """

    def __init__(
        self,
        output_uri: str,
        checkpoint: str | ContextualiserConfig,
        version: str = "",
        storage: StorageConfig | None = None,
    ):
        """``checkpoint``: its address, or the options of a contextualiser; ``version``: dataset version, if the output has several.

        Raises DatasetError, ConfigError or WeightsError for a dataset or a checkpoint that is missing or does not fit.
        """
        options = ContextualiserConfig(checkpoint=checkpoint) if isinstance(checkpoint, str) else checkpoint
        self.options, self.storage = options, storage or StorageConfig()
        self.dataset = open_dataset(output_uri, version, self.storage)
        config = ContextualiseCatalogConfig(OutputConfig(output_uri), StoredDatasetConfig(version), contextualiser=options)
        self.contextual_name = contextual(checkpoint_name(config, self.dataset.model))
        self.loaded: Any = None

    @property
    def contextualiser(self) -> Any:
        """The model (contextualiser.TitleContextualiser), loaded on first use."""
        if self.loaded is None:
            from mediafm_ray.models.contextualiser import TitleContextualiser

            self.loaded = TitleContextualiser(self.options)
        return self.loaded

    def clip_embedding(self, title_id: str, start_s: float, end_s: float, context: bool = True) -> np.ndarray:
        """Return the (D,) float32 unit vector of the clip ``[start_s, end_s)`` of a title, in seconds.

        With ``context`` the model reads the whole title; without, only the shots that overlap the clip, with the title's synopsis and
        tags. Each shot is weighted by its seconds in the clip.
        Raises DatasetError for a title that is not committed, ValueError for a clip that is empty or outside the title.
        """
        return self._clips_of_title(title_id, [(start_s, end_s)], context)[0]

    def clip_embeddings(self, clips: pa.Table, context: bool = True) -> np.ndarray:
        """Return the (N, D) float32 unit vectors of a table of clips (``title_id``, ``start_s``, ``end_s``), in its order.

        Each title is read once. Raises as ``clip_embedding`` does, with the title in the message.
        """
        vectors_ND = np.zeros((len(clips), self.dataset.model.dims["fused"]), np.float32)
        title_N = np.array(clips["title_id"].to_pylist(), object)
        spans_N2 = np.stack([clips["start_s"].to_numpy(), clips["end_s"].to_numpy()], axis=1)
        for title_id in pc.unique(clips["title_id"]).to_pylist():
            rows = np.flatnonzero(title_N == title_id)
            vectors_ND[rows] = self._clips_of_title(title_id, [tuple(spans_N2[row]) for row in rows], context)
        return vectors_ND

    def _clips_of_title(self, title_id: str, spans: Sequence[tuple[float, float]], context: bool) -> list[np.ndarray]:
        name = self.dataset.title_object(title_id)
        try:
            if context:
                start_S, end_S, contextual_SD = self._contextual(name)
                return [pool_clip(start_S, end_S, contextual_SD, start_s, end_s) for start_s, end_s in spans]
            return self._alone(read_shots(self.dataset.output, name, self.dataset.model), spans)
        except ValueError as error:
            raise ValueError(f"title {title_id!r}: {error}") from error

    def _contextual(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return starts, ends and contextual embeddings of an object's shots: read if they are committed, else computed."""
        stored = matching_object(name, self.contextual_name)
        if self.dataset.output.has(stored):
            table = self.dataset.read(stored)
            return table["start_s"].to_numpy(), table["end_s"].to_numpy(), embedding_values(table["contextual_embedding"])
        shots = read_shots(self.dataset.output, name, self.dataset.model)
        ((contextual_SD, _),) = self.contextualiser.contextualise_together([to_model_input(shots)])
        return shots.start_S, shots.end_S, contextual_SD

    def _alone(self, shots: StoredShots, spans: Sequence[tuple[float, float]]) -> list[np.ndarray]:
        """Embed each clip as a title of its own that consists of the shots that overlap it."""
        overlaps, clips = [], []
        for start_s, end_s in spans:
            overlaps_S = clip_overlaps(shots.start_S, shots.end_S, start_s, end_s)
            touched = np.flatnonzero(overlaps_S)
            part = slice(touched[0], touched[-1] + 1)
            clip = dataclasses.replace(shots, fused_SD=shots.fused_SD[part], start_S=shots.start_S[part], end_S=shots.end_S[part])
            overlaps.append(overlaps_S[part])
            clips.append(to_model_input(clip))
        computed = self.contextualiser.contextualise_together(clips)
        return [pool_overlaps(overlaps_K, contextual_KD) for overlaps_K, (contextual_KD, _) in zip(overlaps, computed, strict=True)]
