"""The pools of stages as operators of Ray Data: each takes a dataset of titles and adds the columns of its stages."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from mediafm_ray.config.sections import StageConfig
from mediafm_ray.pipeline import ray_compat
from mediafm_ray.pipeline.cluster import actors_at_once, configuration_fault, runs_alone
from mediafm_ray.pipeline.deaths import DeathGuard
from mediafm_ray.pipeline.stage_list import Pool
from mediafm_ray.runs.plan import Plan
from mediafm_ray.runs.report import clean_logs

ENCODER_NICENESS = 10  # For encoders that share their cores with the detector.
TASKS_IN_FLIGHT_PER_ACTOR = 2  # One is computed while the row of the next is on its way.
MIN_CALLS_PER_ACTOR = 8  # For stored titles, so that all actors end at about the same time.
MAX_TITLES_PER_CALL = 128  # For stored titles: an actor that ends loses no more than these.
GROUPS_PER_PART = 100  # Groups of a large plan that travel together to where they are divided.
MAX_GROUP_TITLES = 32  # The bounds of a group. What a kill costs grows with it; what a title costs the driver shrinks.
MAX_GROUP_SECONDS = 120.0  # Seconds of video.
MAX_GROUP_BYTES = 32 << 20  # Bytes of video, where the catalog says no duration.
MIN_GROUPS_PER_ACTOR = 8  # Of the detector, so that all actors end at about the same time.
GROUP_SCHEMA = pa.schema([("titles", pa.large_binary())])  # An Arrow stream of the rows of the group's titles.
SHARE_OF_NODE_RESOURCE = 0.001  # An actor takes so little of node_resource that no number of actors uses it up.


def embed_titles(plan: Plan, pools: Sequence[Pool], max_deaths_per_title: int) -> Dataset:
    """Return the dataset of the pending titles of a plan after all pools of actors, one pool after the other."""
    groups = list(title_groups(plan.pending, pools[0].resources.max_actors))
    titles, guard = plan_dataset(plan, groups), DeathGuard(max_deaths_per_title)
    for pool in pools:
        resources = pool.resources
        if pool is pools[0]:
            resources = replace(resources, min_actors=actors_at_once(pools, len(groups)))
        titles = titles.map_batches(_actor(pool, guard), batch_size=resources.titles_per_call, **_pool_options(resources))
    return titles


def plan_dataset(plan: Plan, groups: Sequence[tuple[int, int]]) -> Dataset:
    """Return the pending titles as a dataset of groups (their bounds in the plan), one block for each group, in the order of the plan.

    Ray takes some 30 ms of the driver's time for a block on its way through the graph, so short titles travel in groups. The groups of a
    large plan become blocks shortly before they begin: all at once would take 3 ms and some 20 kB of the driver's memory for each before
    the first one begins. A read task for each would cost more than the rest of its way through the graph, and a repartition is a
    barrier that switches off Ray's no-progress guard.
    """
    groups_per_block = GROUPS_PER_PART if len(groups) > GROUPS_PER_PART else 1
    parts = (groups[start : start + groups_per_block] for start in range(0, len(groups), groups_per_block))
    titles = ray.data.from_blocks([pack([plan.pending.slice(start, end - start) for start, end in part]) for part in parts])
    titles.context.target_max_block_size = 1  # With a bound of one byte, no two groups share a block.
    ray_compat.limit_waiting_titles(titles, titles_per_group=plan.pending.num_rows / max(1, len(groups)))
    if groups_per_block == 1:  # A task that has nothing to divide would still take a process, which starts beside the detector's.
        return titles
    # The task asks for no CPU, because the actors of all pools may leave none until the last title has passed them.
    return titles.map_batches(
        _as_they_are, batch_size=1, batch_format="pyarrow", zero_copy_batch=True, compute=TaskPoolStrategy(size=1), num_cpus=0
    )


def title_groups(pending: pa.Table, actors: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the groups: titles that follow one another and are short together. A title of unknown length is alone."""
    most = max(1, min(MAX_GROUP_TITLES, pending.num_rows // (MIN_GROUPS_PER_ACTOR * actors)))
    sizes, durations = pending["expected_bytes"].to_pylist(), pending["expected_s"].to_pylist()
    start, share = 0, 0.0
    for index, (size, duration_s) in enumerate(zip(sizes, durations, strict=True)):
        own = duration_s / MAX_GROUP_SECONDS if duration_s else size / MAX_GROUP_BYTES if size else 1.0
        if index > start and (share + own > 1.0 or index - start >= most):
            yield start, index
            start, share = index, 0.0
        share += own
    if pending.num_rows:
        yield start, pending.num_rows


def pack(groups: Iterable[pa.Table]) -> pa.Table:
    """Return groups of titles as a table with one row for each group."""
    cells = []
    for titles in groups:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, titles.schema) as writer:
            writer.write_table(titles.combine_chunks())
        stream = sink.getvalue()
        offsets = pa.py_buffer(np.array([0, stream.size], np.int64))
        cells.append(pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, stream]))
    return pa.table([pa.chunked_array(cells, pa.large_binary())], GROUP_SCHEMA)


def unpack(table: pa.Table) -> list[pa.Table]:
    """Return the groups of a packed table, without a copy. Ray may pass an empty block without columns."""
    groups = table["titles"] if table.num_columns else []
    return [pa.ipc.open_stream(group.as_buffer()).read_all() for group in groups]


def _as_they_are(group: pa.Table) -> pa.Table:
    return group


def contextualise_stored(plan: Plan, pool: Pool, max_deaths_per_title: int) -> Dataset:
    """Return a dataset that contextualises and commits the pending titles; its rows say how each title ended."""
    titles = plan.pending.num_rows
    calls = min(titles, max(MIN_CALLS_PER_ACTOR * pool.resources.max_actors, titles // MAX_TITLES_PER_CALL))
    bounds = [index * titles // calls for index in range(calls + 1)]
    rows = plan.pending.to_pylist()  # A slice would carry the whole plan.
    blocks = [pa.Table.from_pylist(rows[start:end], plan.pending.schema) for start, end in itertools.pairwise(bounds)]
    dataset = ray.data.from_blocks(blocks)
    dataset.context.target_max_block_size = 1  # With a bound of one byte, a title is reported when it is done, not when its call ends.
    actor = _actor(pool, DeathGuard(max_deaths_per_title), StoredActor)
    return dataset.map_batches(actor, batch_size=None, **_pool_options(pool.resources))


class PoolActor:
    """Actor that runs the stages of a pool, guarded against titles that end its process."""

    pool: Pool
    guard: DeathGuard
    niceness: int

    def __init__(self) -> None:
        os.nice(self.niceness)
        clean_logs()
        self.stages = self.pool.build()

    def __call__(self, table: pa.Table) -> Any:
        """Return the groups of titles with the columns of every stage."""
        groups = unpack(table)
        if not groups:
            return table
        titles = pa.concat_tables(groups)
        for stage in self.stages:
            titles = pa.concat_tables([*map(stage, self.guard.parts(stage, titles))])
        starts = itertools.accumulate((group.num_rows for group in groups), initial=0)
        return pack(titles.slice(start, group.num_rows) for start, group in zip(starts, groups, strict=False))


class StoredActor(PoolActor):
    """Actor of a pool whose only stage yields a table for every finished title."""

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield a group for every title."""
        for part in self.guard.parts(self.stages[0], table):
            for title in self.stages[0](part):
                yield pack([title])


def _actor(pool: Pool, guard: DeathGuard, kind: type[PoolActor] = PoolActor) -> type[PoolActor]:
    """Return the class of a pool's actors.

    They have a lower priority where they share their cores with the detector: its threads wait for one another, so that a delay of one
    delays all.
    """
    beside_detector = pool.is_on_cpu and not pool.detects and runs_alone() and kind is PoolActor
    fields = {"pool": pool, "guard": guard, "niceness": ENCODER_NICENESS if beside_detector else 0}
    return type(pool.name, (kind,), fields)  # Ray names the operator after the class.


def _pool_options(pool: StageConfig) -> dict[str, Any]:
    """Return the options of map_batches for a pool of actors."""
    return {
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "compute": ActorPoolStrategy(
            min_size=pool.min_actors, max_size=pool.max_actors, max_tasks_in_flight_per_actor=TASKS_IN_FLIGHT_PER_ACTOR
        ),
        "num_cpus": pool.num_cpus,
        "num_gpus": pool.num_gpus or None,
        "resources": {pool.node_resource: SHARE_OF_NODE_RESOURCE} if pool.node_resource else None,
    }


def blocks(titles: Dataset, say: Callable[[str], None] | None = None) -> Iterator[pa.Table]:
    """Run the graph; yield the tables of its last stage as they come. Raises ConfigError where an actor cannot work as configured.

    ``say``: called from another thread with reports about stages that wait for resources of the cluster.
    """
    if say and (warning := ray_compat.switched_off()):
        say(warning)
    try:
        for block in ray_compat.result_blocks(titles, say):
            yield from unpack(block)
    except Exception as error:
        fault = configuration_fault(error)
        if fault is None:
            raise
        raise fault from None
