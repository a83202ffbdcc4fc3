"""Compute the dataset of titles, one row for each, and the table of nearest titles.

Shapes
    T  titles
    D  dimension of an embedding
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.reader import read_vectors
from mediafm_ray.derive.runner import Derived, PendingTitle, facts_of_title, table_of
from mediafm_ray.derive.scenes import scenes_of_title, scenes_recipe
from mediafm_ray.downstream.options import ScenesConfig
from mediafm_ray.downstream.titles import is_speech, nearest_titles, pool_title, share_of
from mediafm_ray.errors import TitleError
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.names import TITLES, derived
from mediafm_ray.storage.schemas import embedding_array, embedding_type, embedding_values, titles_schema
from mediafm_ray.text import counted, public_line

NUMERICS_VERSION = 1  # Raise it with a change of the code that changes the rows: it is part of the dataset's name.
TEXT_COLUMNS = ("text", "has_audio", "has_text")  # columns of ``shots``


def titles_recipe(config: ScenesConfig) -> dict[str, Any]:
    """Return everything except the vectors that decides a row, which includes the number of scenes."""
    return {"arithmetic": NUMERICS_VERSION, "scenes": scenes_recipe(config)}


def titles_dataset(vectors: str, config: ScenesConfig) -> str:
    """Return the name of the dataset of titles from the dataset ``vectors``: ``titles-<fused|contextual>-<12 hex digits>``."""
    return derived(TITLES, vectors, titles_recipe(config))


def describe_title(dataset: EmbeddingDataset, vectors: str, pending: PendingTitle, config: ScenesConfig) -> Derived:
    """Compute the row of one title. Raises TitleError for vectors that are missing, damaged or without a mean direction."""
    title = read_vectors(dataset, pending.shots, vectors)
    content = pa.BufferReader(dataset.output.read(pending.shots))
    shots = pq.read_table(content, columns=list(TEXT_COLUMNS), use_threads=False, page_checksum_verification=True)
    seconds_S = title.end_S - title.start_S
    if len(shots) != len(seconds_S):
        raise TitleError(f"{vectors} has {len(seconds_S)} shots of it, {pending.shots} has {len(shots)}: run mediafm contextualise again")
    try:
        pooled_D = pool_title(title.start_S, title.end_S, title.vectors_SD)
    except ValueError as error:
        raise TitleError(str(error)) from error
    scenes = len(scenes_of_title(title, config))
    minutes = float(title.end_S[-1] - title.start_S[0]) / 60
    columns = {
        "title_id": [title.title_id],
        "duration_s": [minutes * 60],
        "shots": [len(seconds_S)],
        "scenes": [scenes],
        "shots_per_minute": [len(seconds_S) / minutes],
        "audio_share": [share_of(seconds_S, shots["has_audio"].to_numpy())],
        "text_share": [share_of(seconds_S, shots["has_text"].to_numpy())],
        "speech_share": [share_of(seconds_S, np.array([is_speech(text) for text in shots["text"].to_pylist()]))],
        "pooled_embedding": embedding_array(pooled_D[None]),
        "cls_embedding": pa.nulls(1, embedding_type(len(pooled_D))) if title.cls_D is None else embedding_array(title.cls_D[None]),
    }
    table, facts = table_of(columns, titles_schema(len(pooled_D))), facts_of_title(dataset, title, vectors, titles_recipe(config))
    return Derived(table, facts, f"{minutes * 60:.1f} s, {counted(len(seconds_S), 'shot')}, {counted(scenes, 'scene')}")


# ------------------------------------------------------------------------------------------------------- nearest titles


def read_titles(dataset: EmbeddingDataset, name: str) -> pa.Table:
    """Read all rows of a dataset of titles in the order of their ids. Raises DatasetError where there is none."""
    return dataset.dataset(name).to_table().drop_columns(["shard"]).combine_chunks().sort_by("title_id")


def with_nearest(titles: pa.Table, count: int, most: int) -> pa.Table:
    """Return the first ``most`` titles with ``nearest_title_id`` and ``nearest_cosine``, lists of the ``count`` nearest of all titles."""
    shown = titles.slice(0, most)
    rows_TN, cosine_TN = nearest_titles(embedding_values(titles["pooled_embedding"]), count, range(len(shown)))
    ids = np.array(titles["title_id"].to_pylist(), object)
    nearest = pa.array([ids[rows_N].tolist() for rows_N in rows_TN], pa.list_(pa.string()))
    cosines = pa.array(cosine_TN.tolist(), pa.list_(pa.float32()))
    return shown.append_column("nearest_title_id", nearest).append_column("nearest_cosine", cosines)


def describe_titles(titles: pa.Table) -> str:
    """Format titles ``with_nearest`` as a text table."""
    lines = [
        f"  {'title':<32} {'length':>8} {'shots':>6} {'scenes':>6} {'shots/min':>9} {'text':>5} {'speech':>6}  nearest titles (cosine)"
    ]
    for row in titles.drop_columns(["pooled_embedding", "cls_embedding"]).to_pylist():
        near = ", ".join(f"{name} ({cosine:.3f})" for name, cosine in zip(row["nearest_title_id"], row["nearest_cosine"], strict=True))
        lines.append(
            f"  {row['title_id']:<32.32} {row['duration_s']:>7.0f}s {row['shots']:>6} {row['scenes']:>6} {row['shots_per_minute']:>9.1f}"
            f" {row['text_share']:>5.0%} {row['speech_share']:>6.0%}  {near}"
        )
    return "\n".join(map(public_line, lines))


def check_table_uri(uri: str) -> None:
    """Raise ConfigError for a table's URI whose ending does not name its format."""
    if uri and PurePosixPath(uri).suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"table.uri={uri}: the ending must be .parquet or .jsonl")
