"""Titles whose shots have known neighbours, the jobs that index and search them, and the same searches by hand."""

import json

import numpy as np
import pyarrow as pa

from benchmarks.stored_titles import commit_title, make_model
from jobs import build_index, search_shots
from mediafm_ray.config.jobs import BuildIndexConfig, SearchShotsConfig
from mediafm_ray.runs.command import run_job
from mediafm_ray.storage.dataset import EmbeddingDataset, Output
from mediafm_ray.storage.index import open_index
from mediafm_ray.storage.schemas import encode_parquet, read_facts
from mediafm_ray.storage.store import StorageConfig

MODEL = make_model("0123456789ab", video=20, audio=12, text=16)
PARTS = {"video": slice(0, 20), "audio": slice(20, 32), "text": slice(32, 48)}
SHOT_S = 2.0
TITLES = {"film": 12, "series/s01e01": 8, "series/s01e02": 9, "it's: ☃": 5}


def vectors_of(title_id, count, seed=0):
    """(S, D) fused vectors; the second of every four shots has no text."""
    random = np.random.default_rng([seed, *title_id.encode()])
    vectors = random.normal(size=(count, 48)).astype(np.float32)
    vectors[1::4, PARTS["text"]] = 0
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def commit(output, title_id, count, seed=0):
    """Put a title into an output; with another seed it is another source, with other vectors."""
    source = f"{seed:016x}"
    name = commit_title(str(output), MODEL, title_id, vectors_of(title_id, count, seed), np.full(count, SHOT_S), source=source)
    dataset = EmbeddingDataset(str(output))
    shots = dataset.read(name)
    texts = ["" if shot % 4 == 1 else f"{title_id} says {shot}" for shot in range(count)]
    languages = ["" if shot % 4 == 1 else ("en-US", "de")[shot % 2] for shot in range(count)]
    for column, values in (("text", texts), ("language", languages)):
        shots = shots.set_column(shots.column_names.index(column), column, pa.array(values))
    Output(str(output), MODEL.dataset_version).store.write(name, encode_parquet(shots, read_facts(shots.schema)))


def build(output, index, *overrides):
    options = [f"output.uri={output}", f"index.uri={index}", "vectors.kind=fused", *overrides]
    return run_job("", BuildIndexConfig, build_index.main, options)


def search(index, *overrides):
    return run_job("", SearchShotsConfig, search_shots.main, [f"index.uri={index}", *overrides])


def found(capsys, index, *overrides):
    """Places and cosines, as a program reads them."""
    capsys.readouterr()
    assert search(index, "format=json", *overrides) == 0
    content = json.loads(capsys.readouterr().out)
    return [(result["title_id"], result["shot_index"]) for result in content["results"]], [
        result["cosine"] for result in content["results"]
    ]


def expected(query, part=slice(None), titles=TITLES, without=()):
    """The same by hand."""
    places, cosines = [], []
    for title_id, count in titles.items():
        for shot, vector in enumerate(vectors_of(title_id, count)[:, part]):
            if vector.any() and (title_id, shot) not in without:
                places.append((title_id, shot))
                cosines.append(vector @ query / np.linalg.norm(vector) / np.linalg.norm(query))
    order = np.argsort(-np.array(cosines))
    return [places[one] for one in order], np.array(cosines)[order]


def contents(index):
    """Every row that is searched, by title and shot."""
    table = open_index(str(index), StorageConfig()).dataset.to_table()
    return table.sort_by([("title_id", "ascending"), ("shot_index", "ascending")]).to_pylist()
