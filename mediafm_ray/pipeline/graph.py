"""The pools of stages as operators of Ray Data: each takes a dataset of titles and adds the columns of its stages."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from mediafm_ray.config.sections import StageConfig
from mediafm_ray.pipeline import ray_compat
from mediafm_ray.pipeline.cluster import configuration_fault, runs_alone
from mediafm_ray.pipeline.deaths import DeathGuard
from mediafm_ray.pipeline.stage_list import Pool
from mediafm_ray.runs.plan import Plan
from mediafm_ray.runs.report import clean_logs

ENCODER_NICENESS = 10  # For encoders that share their cores with the detector.
TASKS_IN_FLIGHT_PER_ACTOR = 2  # One is computed while the row of the next is on its way.
MIN_CALLS_PER_ACTOR = 8  # For stored titles, so that all actors end at about the same time.
MAX_TITLES_PER_CALL = 128  # For stored titles: an actor that ends loses no more than these.
TITLES_PER_PART = 100  # Titles of a large plan that travel together to where they are divided.
SHARE_OF_NODE_RESOURCE = 0.001  # An actor takes so little of node_resource that no number of actors uses it up.


def plan_dataset(plan: Plan) -> Dataset:
    """Return the pending titles as a dataset, one block for each title, in the order of the plan.

    The titles of a large plan become blocks shortly before they begin: all at once would take 3 ms and some 20 kB of the driver's memory
    for each title before the first one begins. A read task for each title would cost more than the rest of its way through the graph, and
    a repartition is a barrier that switches off Ray's no-progress guard.
    """
    titles_per_block = TITLES_PER_PART if plan.pending.num_rows > TITLES_PER_PART else 1
    starts = range(0, plan.pending.num_rows, titles_per_block)
    parts = (plan.pending.slice(start, titles_per_block).to_pylist() for start in starts)
    # The blocks are made anew, because slices would carry the whole plan.
    titles = ray.data.from_blocks([pa.Table.from_pylist(rows, plan.pending.schema) for rows in parts])
    titles.context.target_max_block_size = 1  # With a bound of one byte, no two titles share a block.
    ray_compat.limit_waiting_titles(titles)
    if titles_per_block == 1:  # A task that has nothing to divide would still take a process, which starts beside the detector's.
        return titles
    # The task asks for no CPU, because the actors of all pools may leave none until the last title has passed them.
    return titles.map_batches(
        _as_they_are, batch_size=1, batch_format="pyarrow", zero_copy_batch=True, compute=TaskPoolStrategy(size=1), num_cpus=0
    )


def _as_they_are(title: pa.Table) -> pa.Table:
    return title


def run_pools(titles: Dataset, pools: Sequence[Pool], max_deaths_per_title: int) -> Dataset:
    """Take titles through pools of actors, one pool after the other."""
    guard = DeathGuard(max_deaths_per_title)
    for pool in pools:
        titles = titles.map_batches(_actor(pool, guard), batch_size=pool.resources.titles_per_call, **_pool_options(pool.resources))
    return titles


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
        """Return the titles with the columns of every stage."""
        for stage in self.stages:
            table = pa.concat_tables([*map(stage, self.guard.parts(stage, table))])
        return table


class StoredActor(PoolActor):
    """Actor of a pool whose only stage yields a table for every finished title."""

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield a row for every title."""
        for part in self.guard.parts(self.stages[0], table):
            yield from self.stages[0](part)


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
    """Run the graph; yield the blocks of its last stage as they come. Raises ConfigError where an actor cannot work as configured.

    ``say``: called from another thread with reports about stages that wait for resources of the cluster.
    """
    if say and (warning := ray_compat.switched_off()):
        say(warning)
    try:
        yield from ray_compat.result_blocks(titles, say)
    except Exception as error:
        fault = configuration_fault(error)
        if fault is None:
            raise
        raise fault from None
