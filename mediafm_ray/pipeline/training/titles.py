"""Committed shots for training: a list of objects that is fixed when training begins, each read when it is needed."""

from __future__ import annotations

import threading
import urllib.parse
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mediafm_ray.errors import TitleError
from mediafm_ray.models.contextualiser import shot_times
from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset, Model, Output, newest_objects
from mediafm_ray.storage.names import SHOTS, object_key
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.storage.stored_shots import read_shots
from mediafm_ray.training.batches import TitleVectors, UnusableTitle
from mediafm_ray.training.sampling import split_titles


@dataclass(frozen=True)
class TitleList:
    """The objects that a training reads, fixed when it begins, because a backfill may add and replace titles meanwhile."""

    dataset_version: str
    fused_dim: int
    metadata_dim: int
    spans: Mapping[str, tuple[int, int]]  # Ranges of the modalities in a fused vector.
    objects: tuple[str, ...]  # Names below the dataset version, in the order of the encoded titles.
    sizes: tuple[int, ...]  # Bytes of each object.

    def split(self, fraction: float, max_held_out: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the titles to train on and to evaluate on (training.sampling.split_titles)."""
        return split_titles([object_key(name)[0] for name in self.objects], fraction, max_held_out)

    def to_json(self) -> dict[str, Any]:
        """Return the list as a value for JSON."""
        spans = {name: list(span) for name, span in self.spans.items()}
        return {**vars(self), "spans": spans, "objects": list(self.objects), "sizes": list(self.sizes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TitleList:
        """Return the list for a value of ``to_json``."""
        spans = {name: (int(first), int(end)) for name, (first, end) in value.get("spans", {}).items()}
        return cls(**{**value, "spans": spans, "objects": tuple(value["objects"]), "sizes": tuple(value["sizes"])})


def list_titles(dataset: EmbeddingDataset) -> TitleList:
    """Return the newest object of every committed title, from one listing. Raises DatasetError where there is none."""
    infos = sorted(newest_objects(dataset.output.list(SHOTS)), key=lambda info: object_key(info.name))
    if not infos:
        raise DatasetError(f"{dataset.output.store.uri} has no committed shots to train on: run mediafm embed first")
    return TitleList(
        dataset.version,
        dataset.model.dims["fused"],
        dataset.model.dims["text"],
        dict(dataset.model.spans),
        tuple(info.name for info in infos),
        tuple(info.size for info in infos),
    )


class StoredTitles:
    """The titles of a training (training.batches.Titles), read from storage, with a cache of bounded size."""

    def __init__(self, uri: str, titles: TitleList, held_out_fraction: float, max_held_out: int, storage: StorageConfig, cache_bytes: int):
        """``uri``: the output that holds the dataset version."""
        self.output = Output(uri, titles.dataset_version, storage)
        self.objects, self.fused_dim, self.metadata_dim = titles.objects, titles.fused_dim, titles.metadata_dim
        self.spans = titles.spans
        self.model = Model(titles.dataset_version, {}, {"fused": titles.fused_dim, "text": titles.metadata_dim}, {})
        self.sizes = np.array(titles.sizes, np.int64)
        self.train, self.held_out = titles.split(held_out_fraction, max_held_out)
        self.cache: OrderedDict[int, TitleVectors] = OrderedDict()
        self.cache_bytes, self.cached_bytes = cache_bytes, 0
        self.lock = threading.Lock()

    def read(self, index: int) -> TitleVectors:
        """Read a title. Raises UnusableTitle for one that is gone, damaged or not finite, and errors of the storage."""
        with self.lock:
            found = self.cache.get(index)
            if found is not None:
                self.cache.move_to_end(index)
                return found
        title = self._read(self.objects[index])
        with self.lock:
            if index not in self.cache and title.bytes <= self.cache_bytes:
                self.cache[index] = title
                self.cached_bytes += title.bytes
                while self.cached_bytes > self.cache_bytes:
                    self.cached_bytes -= self.cache.popitem(last=False)[1].bytes
        return title

    def _read(self, name: str) -> TitleVectors:
        try:
            shots = read_shots(self.output, name, self.model)
        except TitleError as error:
            raise UnusableTitle(f"title {urllib.parse.unquote(object_key(name)[0])}: {error}") from error
        title_id, metadata_M = shots.facts["title_id"], shots.metadata_M
        if metadata_M is not None and len(metadata_M) != self.metadata_dim:
            raise UnusableTitle(f"title {title_id}: its metadata embedding has {len(metadata_M)} dimensions, not {self.metadata_dim}")
        return TitleVectors(title_id, shots.fused_SD, shot_times(shots.start_S, shots.end_S), metadata_M)
