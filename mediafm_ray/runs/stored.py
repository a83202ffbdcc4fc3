"""Plan over a committed dataset: its titles without contextual embeddings of a checkpoint."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from mediafm_ray.config.jobs import ContextualiseCatalogConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.config.sections import RunConfig
from mediafm_ray.models.options import BUILTIN_NEIGHBOURS
from mediafm_ray.pipeline.rows import ERROR, OK
from mediafm_ray.runs.plan import WITH_SHOTS, Plan, checkpoint_name
from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset, Output, dataset_versions, newest_objects
from mediafm_ray.storage.listing import each_shard, list_shard, shards_of
from mediafm_ray.storage.names import FAILURES, SHOTS, contextual, matching_object, object_key, shard_name
from mediafm_ray.storage.store import ObjectInfo, StorageConfig

STORED_SCHEMA = pa.schema(
    [
        ("title_id", pa.string()),  # As in the object's name, where a long id ends in a digest.
        ("source", pa.string()),
        ("shots", pa.string()),  # Name of the committed object.
        ("bytes", pa.int64()),  # Size of that object.
        ("superseded", pa.list_(pa.string())),  # Objects that are removed once this title is committed.
        ("outcome", pa.string()),
        ("error", ERROR),  # Set by the poison-title guard before the stage begins.
    ]
)


def make_stored_plan(config: ContextualiseCatalogConfig) -> Plan:
    """Return the titles with committed shots and without embeddings of the checkpoint. Writes nothing.

    Raises ConfigError, WeightsError, StorageError, and DatasetError where nothing is committed.
    """
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    if not config.contextualiser.checkpoint:
        raise ConfigError(f"contextualiser.checkpoint is required: {BUILTIN_NEIGHBOURS}, or the folder that a training wrote")
    checkpoint = checkpoint_name(config, dataset.model)
    shards = shards_of(dataset.output, SHOTS, config.run.shard_numbers)
    parts = list(each_shard(shards, lambda shard: _stored_titles(dataset.output, checkpoint, shard, config.run)))
    if not any(part.titles for part in parts) and config.run.shards == RunConfig.shards:
        raise DatasetError(f"{dataset.output.store.uri} has no committed shots: run mediafm embed first")
    pending = pa.concat_tables(part.pending for part in parts)
    taken = pending.slice(0, config.run.max_titles or None)
    return Plan(
        model=dataset.model,
        checkpoint=checkpoint,
        pending=taken,
        titles=sum(part.titles for part in parts),
        done=sum(part.done for part in parts),
        failed_before=sum(part.failed_before for part in parts),
        left=pending.num_rows - taken.num_rows,
        only_contextual=taken.num_rows,
        leftovers=tuple(info for part in parts for info in part.leftovers),
        titles_are=WITH_SHOTS,
    )


@dataclass(frozen=True)
class StoredTitles:
    """The titles of a shard with committed shots."""

    titles: int
    done: int
    failed_before: int
    leftovers: Sequence[ObjectInfo]
    pending: pa.Table  # STORED_SCHEMA


def _stored_titles(output: Output, checkpoint: str, shard: str, run: RunConfig) -> StoredTitles:
    """List a shard of the datasets; return its titles that the run may take. Raises StorageError."""
    taken = {shard_name(number) for number in run.shard_numbers}
    committed = [info for info in newest_objects(list_shard(output, SHOTS, shard)) if info.name.split("/")[1] in taken]
    written = list_shard(output, contextual(checkpoint), shard)
    failures = list_shard(output, FAILURES, shard)
    written_of_title: dict[str, list[ObjectInfo]] = {}
    for (title, _), infos in written.items():
        written_of_title.setdefault(title, []).extend(infos)
    rows, leftovers = [], []
    done = failed_before = 0
    for shots in committed:
        title, source = key = object_key(shots.name)
        # Newer objects stay: a job that embeds a newer source writes its contextual object before its shots.
        older = [info for info in written_of_title.get(title, ()) if object_key(info.name) != key and info.modified <= shots.modified]
        if key in written:
            done += 1
            leftovers += older
        elif key in failures and not run.retry_failed:
            failed_before += 1
        else:
            failed = [matching_object(shots.name, FAILURES)] if key in failures else []
            row = {"title_id": urllib.parse.unquote(title), "source": source, "shots": shots.name, "bytes": shots.size, "outcome": OK}
            rows.append({**row, "superseded": [*(info.name for info in older), *failed]})
    return StoredTitles(len(committed), done, failed_before, leftovers, pa.Table.from_pylist(rows, schema=STORED_SCHEMA))


def open_dataset(uri: str, version: str, storage: StorageConfig) -> EmbeddingDataset:
    """Open a dataset version of an output; ``version`` may be empty where there is only one. Raises ConfigError, DatasetError."""
    if not uri:
        raise ConfigError("output.uri is required: the output of mediafm embed")
    versions = [] if version else dataset_versions(uri, storage)
    if len(versions) > 1:
        raise ConfigError(f"{uri} has {len(versions)} dataset versions: set dataset.version to one of {', '.join(versions)}")
    return EmbeddingDataset(uri, version or None, storage)


def prepare_stored_output(plan: Plan, config: ContextualiseCatalogConfig) -> None:
    """Check that the output can be written, and finish the removals of earlier runs. Raises StorageError."""
    output = Output(config.output.uri, plan.model.dataset_version, config.storage)
    output.store.check_writable()
    for leftover in plan.leftovers:
        output.remove(leftover.name, leftover.modified)
