"""All uses of Ray's private API, tied to the minor version of Ray that they were tested with.

With another version of Ray they are switched off, and a run prints a warning.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset

from mediafm_ray.pipeline.cluster import StarvationClock

TESTED = "2.60"  # pyproject.toml requires the same version.
IS_TESTED = ray.__version__.startswith(f"{TESTED}.")
MAX_QUEUED_TITLES = 100  # A stage with this many finished titles in its queue takes no more.
MIN_QUEUED_GROUPS = 4  # Whatever their titles, so many groups may wait.
MIN_LOOP_INTERVAL_S = 0.05  # Ray Data's own loop waits up to 0.1 s for events.

BackpressurePolicy: Any = object
ExecutionCallback: Any = object
if IS_TESTED:
    from ray.data._internal.execution.backpressure_policy import (
        ENABLED_BACKPRESSURE_POLICIES,
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
        BackpressurePolicy,
    )
    from ray.data._internal.execution.execution_callback import ExecutionCallback


def switched_off() -> str:
    """Return a warning with the features that are switched off with this version of Ray; empty with the tested one."""
    if IS_TESTED:
        return ""
    return (
        f"warning: this is Ray {ray.__version__}, tested is {TESTED}; switched off are the limit of titles that wait between two stages, "
        "the savings of the driver's memory and time, and the messages about stages that wait for resources"
    )


def limit_waiting_titles(titles: Dataset, titles_per_group: float) -> None:
    """Let a stage take no further group while many of its finished titles wait for the next stage."""
    if IS_TESTED:
        max_groups = max(MIN_QUEUED_GROUPS, round(MAX_QUEUED_TITLES / titles_per_group))
        policy = type("LimitsWaitingTitles", (MaxQueuedGroupsPolicy,), {"max_groups": max_groups})  # Ray Data creates the object.
        titles.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, policy])


def result_blocks(titles: Dataset, say: Callable[[str], None] | None = None) -> Iterator[pa.Table]:
    """Run the graph; yield the blocks of its last stage as they come. ``say``: see ``graph.blocks``.

    With the tested version of Ray it avoids iter_batches, which sends statistics of all blocks so far to an actor every five seconds:
    after 4,000 titles that took a fifth of the driver's time.
    """
    if not IS_TESTED:
        yield from titles.iter_batches(batch_size=None, batch_format="pyarrow")
        return
    callbacks = titles.context.custom_execution_callback_classes
    if DriverLoadCallback not in callbacks:
        callbacks.append(DriverLoadCallback)
    if say:  # Ray Data creates the object and passes no arguments.
        callbacks.append(type("SaysStarvation", (StarvationCallback,), {"say": staticmethod(say)}))
    for bundle in titles.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield ray.get(entry.ref)


class MaxQueuedGroupsPolicy(BackpressurePolicy):
    """Backpressure policy: a stage takes no further group while many of its finished ones wait for the next stage.

    Ray Data bounds the bytes that wait, not the titles: a run would hold what it knows of thousands of small ones in the driver, and lose
    the work on all of them when it is killed.
    """

    max_groups: int

    def can_add_input(self, op: Any) -> bool:
        """See BackpressurePolicy."""
        return self._topology[op].output_queue.num_blocks < self.max_groups


class DriverLoadCallback(ExecutionCallback):
    """Callback that saves memory and time of the driver.

    Ray Data keeps statistics of every block of every operator until the end, for a report that is not used here: some 4 kB of the
    driver's memory for each title. And every step of its loop costs the driver milliseconds, even if few titles move on: with pauses
    between steps, more short titles move on in each.
    """

    def __init__(self) -> None:
        self.last_step = float("-inf")

    def on_execution_step(self, executor: Any) -> None:
        """See ExecutionCallback."""
        for operator in executor._topology or ():
            getattr(operator, "_output_blocks_stats", []).clear()
        time.sleep(max(0.0, self.last_step + MIN_LOOP_INTERVAL_S - time.monotonic()))
        self.last_step = time.monotonic()


class StarvationCallback(ExecutionCallback):
    """Callback that reports a stage which has had no actor for a while, because no node has room for one."""

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
    """Return whether an actor has no node yet; one whose constructor is running has."""
    found = ray._private.state.actors(actor._actor_id.hex())
    return not found.get("Address", {}).get("IPAddress")
