"""Compute the dataset of scenes of committed titles."""

from __future__ import annotations

from typing import Any

from mediafm_ray.derive.reader import StoredVectors, read_vectors
from mediafm_ray.derive.runner import Derived, PendingTitle, facts_of_title, table_of
from mediafm_ray.downstream.options import ScenesConfig
from mediafm_ray.downstream.scenes import Scenes, find_scenes
from mediafm_ray.errors import TitleError
from mediafm_ray.spec import recipe_of
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.names import SCENES, derived
from mediafm_ray.storage.schemas import scenes_schema
from mediafm_ray.text import counted

NUMERICS_VERSION = 1  # Raise it with a change of the code that changes the scenes: it is part of the dataset's name.


def scenes_recipe(config: ScenesConfig) -> dict[str, Any]:
    """Return everything except the vectors that decides which scenes are found."""
    return {"arithmetic": NUMERICS_VERSION, **recipe_of(config)}


def scenes_dataset(vectors: str, config: ScenesConfig) -> str:
    """Return the name of the dataset of scenes from the dataset ``vectors``: ``scenes-<fused|contextual>-<12 hex digits>``."""
    return derived(SCENES, vectors, scenes_recipe(config))


def scenes_of_title(title: StoredVectors, config: ScenesConfig) -> Scenes:
    """Find the scenes of one title. Raises TitleError for vectors that are not finite."""
    try:
        return find_scenes(title.vectors_SD, config)
    except ValueError as error:
        raise TitleError(str(error)) from error


def segment_title(dataset: EmbeddingDataset, vectors: str, pending: PendingTitle, config: ScenesConfig) -> Derived:
    """Compute the rows of one title. Raises TitleError for a title whose vectors are missing or damaged."""
    title = read_vectors(dataset, pending.shots, vectors)
    scenes = scenes_of_title(title, config)
    columns = {
        "title_id": [title.title_id] * len(scenes),
        "scene_index": range(len(scenes)),
        "first_shot": scenes.first_K,
        "last_shot": scenes.last_K,
        "start_s": title.start_S[scenes.first_K],
        "end_s": title.end_S[scenes.last_K],
        "score": scenes.score_K,
    }
    facts = facts_of_title(dataset, title, vectors, scenes_recipe(config))
    return Derived(table_of(columns, scenes_schema()), facts, f"{counted(len(scenes), 'scene')} of {counted(len(title.start_S), 'shot')}")
