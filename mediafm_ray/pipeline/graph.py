"""The pools of stages as operators on Ray Data: each takes a dataset of titles and gives one with its stages' columns added."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback

from mediafm_ray.config.sections import StageConfig
from mediafm_ray.pipeline.cluster import StarvationClock, configuration_fault, runs_alone
from mediafm_ray.pipeline.deaths import DeathGuard
from mediafm_ray.pipeline.stage_list import Pool
from mediafm_ray.runs.plan import Plan
from mediafm_ray.runs.report import clean_logs

NICENESS = 10  # of encoders that share their cores with the detector
TASKS_IN_FLIGHT_PER_ACTOR = 2  # one at work, the next one's row already on its way
CALLS_PER_ACTOR = 8  # at least, of stored titles: the actors end at about the same time
MAX_TITLES_PER_CALL = 128  # stored titles: few enough that one actor's end costs little
TITLES_PER_PART = 100  # of the plan that travel together to where they are divided
TITLES_WAITING = 100  # for a stage, before the one in front of it takes no more
LEAST_STEP_S = 0.05  # of Ray Data's loop: it waits twice as long for news by itself
SHARE_OF_NODE_RESOURCE = 0.001  # what an actor takes of stage.node_resource: no number of actors on a node uses it up


def read_plan(plan: Plan) -> Dataset:
    """The pending titles as a dataset: one title, one row, one block, in the order of the plan.

    They are made blocks shortly before they are begun. All at once took 3 ms and some 20 kB of the driver's memory a title before the
    first one began; a read task for each would cost more than the rest of a title's way; and a repartition is a barrier that switches
    off Ray's no-progress guard.
    """
    starts = range(0, plan.pending.num_rows, TITLES_PER_PART)
    parts = (plan.pending.slice(start, TITLES_PER_PART).to_pylist() for start in starts)
    titles = ray.data.from_blocks([pa.Table.from_pylist(rows, plan.pending.schema) for rows in parts])  # slices would carry the whole plan
    titles.context.target_max_block_size = 1  # byte: no two titles share a block
    titles.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, NoLongQueues])
    # it asks for no CPU: tasks get what the actors of all pools leave, which may be none until the last title has passed them
    return titles.map_batches(
        _as_they_are, batch_size=1, batch_format="pyarrow", zero_copy_batch=True, compute=TaskPoolStrategy(size=1), num_cpus=0
    )


def _as_they_are(title: pa.Table) -> pa.Table:
    return title


class NoLongQueues(BackpressurePolicy):
    """A stage takes no further title while many of its own wait for the next stage.

    Ray Data bounds the bytes that wait, not the titles: a run would hold what it knows of thousands of small ones in the driver, and lose
    the work on all of them when it is killed.
    """

    def can_add_input(self, op: Any) -> bool:
        """See BackpressurePolicy."""
        return self._topology[op].output_queue.num_blocks < TITLES_WAITING


def run_pools(titles: Dataset, pools: Sequence[Pool], max_deaths_per_title: int) -> Dataset:
    """Take titles through pools of actors, one pool after the other."""
    for pool in pools:
        titles = titles.map_batches(
            _actor(pool, max_deaths_per_title), batch_size=pool.resources.titles_per_call, **_in_pool(pool.resources)
        )
    return titles


def contextualise_stored(plan: Plan, pool: Pool, max_deaths_per_title: int) -> Dataset:
    """Embed the committed shots of each pending title in context and commit them; what is left is how each title ended."""
    titles = plan.pending.num_rows
    calls = min(titles, max(CALLS_PER_ACTOR * pool.resources.max_actors, titles // MAX_TITLES_PER_CALL))
    bounds = [index * titles // calls for index in range(calls + 1)]
    rows = plan.pending.to_pylist()  # not slices: each would carry the whole plan
    blocks = [pa.Table.from_pylist(rows[start:end], plan.pending.schema) for start, end in itertools.pairwise(bounds)]
    dataset = ray.data.from_blocks(blocks)
    dataset.context.target_max_block_size = 1  # byte: every title that is done is heard of at once, not when its call ends
    return dataset.map_batches(_actor(pool, max_deaths_per_title, StoredActor), batch_size=None, **_in_pool(pool.resources))


class PoolActor:
    """The stages of a pool at work on titles, each guarded against titles that end its process."""

    pool: Pool
    guard: DeathGuard
    niceness: int

    def __init__(self) -> None:
        os.nice(self.niceness)
        clean_logs()
        self.stages = self.pool.build()

    def __call__(self, table: pa.Table) -> Any:
        """Give the rows with the columns of every stage."""
        for stage in self.stages:
            table = self.guard.run(stage, stage, table)
        return table


class StoredActor(PoolActor):
    """A pool's only stage, which gives a table for every title that it is done with."""

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Give a row for every title."""
        for part in self.guard.parts(self.stages[0], table):
            yield from self.stages[0](part)


def _actor(pool: Pool, max_deaths_per_title: int, kind: type[PoolActor] = PoolActor) -> type[PoolActor]:
    """The class of a pool's actors. They have a lower priority where they share their cores with the detector, whose threads wait for one
    another, so that one that is disturbed costs the time of all."""
    beside_detector = pool.is_on_cpu and not pool.detects and runs_alone() and kind is PoolActor
    fields = {"pool": pool, "guard": DeathGuard(max_deaths_per_title), "niceness": NICENESS if beside_detector else 0}
    return type(pool.name, (kind,), fields)  # the name that Ray gives the operator


def _in_pool(pool: StageConfig) -> dict[str, Any]:
    """What map_batches is told of a pool of actors; a node resource keeps them to the nodes that are meant for them."""
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
    """Run the graph; the blocks of its last stage as they come, none kept. Raises ConfigError where an actor found that it cannot work.

    ``say``: hears, from another thread, which stage waits for which resource of the cluster.

    Not iter_batches: every five seconds it sends statistics of all blocks so far to an actor; after 4,000 titles that was a fifth of
    what a profile saw of the driver.
    """
    if SparesTheDriver not in titles.context.custom_execution_callback_classes:
        titles.context.custom_execution_callback_classes.append(SparesTheDriver)
    if say:  # Ray Data makes the object, without arguments
        titles.context.custom_execution_callback_classes.append(type("SaysStarvation", (StarvationCallback,), {"say": staticmethod(say)}))
    try:
        for bundle in titles.iter_internal_ref_bundles():
            for entry in bundle.blocks:
                yield ray.get(entry.ref)
    except Exception as error:
        fault = configuration_fault(error)
        if fault is None:
            raise
        raise fault from None


class SparesTheDriver(ExecutionCallback):
    """What Ray Data's loop does for nobody here, and how often it goes round.

    It keeps the statistics of every block of every operator until the end, for a report that is not asked for: some 4 kB of the driver's
    memory a title. And every step of it costs the driver milliseconds, however few titles went on: where titles are short, more of them
    go on in one step.
    """

    def __init__(self) -> None:
        self.last_step = float("-inf")

    def on_execution_step(self, executor: Any) -> None:
        """See ExecutionCallback."""
        for operator in executor._topology or ():
            getattr(operator, "_output_blocks_stats", []).clear()
        time.sleep(max(0.0, self.last_step + LEAST_STEP_S - time.monotonic()))
        self.last_step = time.monotonic()


class StarvationCallback(ExecutionCallback):
    """Say which stage has had no actor for a while, for lack of a node with room for one."""

    say: Callable[[str], None]

    def __init__(self) -> None:
        self.clocks: dict[Any, StarvationClock] = defaultdict(StarvationClock)

    def on_execution_step(self, executor: Any) -> None:
        """See ExecutionCallback."""
        for operator in executor._topology or ():
            pool = getattr(operator, "_actor_pool", None)
            if pool is None:
                continue
            coming = [*pool._pending_actors.values(), *(pool._running_actors if pool.num_restarting_actors() else ())]
            working = pool.num_running_actors() - pool.num_restarting_actors()
            if self.clocks[operator].is_due(waits=bool(coming) and not working) and any(map(_has_no_node, coming)):
                wants = operator._ray_remote_args
                wanted = {"CPU": wants.get("num_cpus"), "GPU": wants.get("num_gpus"), **(wants.get("resources") or {})}
                stage = "stage " + re.sub(r"MapBatches\((.+)\)", r"\1", operator.name)
                self.say(self.clocks[operator].describe(stage, {name: amount for name, amount in wanted.items() if amount}))


def _has_no_node(actor: Any) -> bool:
    """Tell an actor that is not placed yet from one whose constructor runs."""
    found = ray._private.state.actors(actor._actor_id.hex())
    return not found.get("Address", {}).get("IPAddress")
