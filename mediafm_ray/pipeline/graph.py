"""The steps as operators on Ray Data: each takes a dataset of titles and gives one with its stage's columns added."""

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

from mediafm_ray.config import ConfigError, ContextualiseCatalogConfig, EmbedCatalogConfig, StageConfig
from mediafm_ray.models.weights import WeightsError
from mediafm_ray.pipeline import stages, stored
from mediafm_ray.pipeline.allowance import SharedAllowance
from mediafm_ray.pipeline.cluster import StarvationClock, configuration_fault, runs_alone
from mediafm_ray.pipeline.deaths import DeathGuard
from mediafm_ray.pipeline.plan import Plan
from mediafm_ray.pipeline.report import clean_logs
from mediafm_ray.pipeline.rows import Stage
from mediafm_ray.pipeline.stages import max_actors, with_threads

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
    # it asks for no CPU: tasks get what actors leave (see fuse), and none would ever be begun
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


def detect_shots(
    titles: Dataset, config: EmbedCatalogConfig, budget: stages.TitleBudget | None = None, stage: type[Stage] = stages.DetectShots
) -> Dataset:
    """Find the shots of each title, and read the frames, audio and text of each shot, in one pass over the video.

    Titles that the budget does not take any more pass through as TitleLeft.
    """
    pool = config.resources.detect_shots
    detector = with_threads(config.detector, pool)
    return _actors(titles, config, pool, stage, detector, config.frames, config.timed_text, config.media, config.storage, budget)


def encode_video(titles: Dataset, config: EmbedCatalogConfig, stage: type[Stage] = stages.EncodeVideo) -> Dataset:
    """Embed the frames of each shot."""
    pool = config.resources.encode_video
    return _actors(titles, config, pool, stage, with_threads(config.video, pool))


def encode_audio(titles: Dataset, config: EmbedCatalogConfig, stage: type[Stage] = stages.EncodeAudio) -> Dataset:
    """Embed the audio of each shot."""
    pool = config.resources.encode_audio
    return _actors(titles, config, pool, stage, with_threads(config.audio, pool))


def encode_text(
    titles: Dataset, config: EmbedCatalogConfig, budget: stages.TitleBudget | None = None, stage: type[Stage] = stages.EncodeText
) -> Dataset:
    """Embed the text of each shot, and the metadata of each title. What may be spent on an API ends the budget."""
    pool = config.resources.encode_text
    allowance = SharedAllowance(config.text) if config.text.encoder == "openai" else None
    return _actors(titles, config, pool, stage, with_threads(config.text, pool), allowance, budget)


def fuse(titles: Dataset, plan: Plan, config: EmbedCatalogConfig) -> Dataset:
    """Concatenate the three embeddings of each shot and scale them to unit norm.

    A stage without a model to keep. It asks for what the actors of the next stage ask for, and Ray then runs it in them. Tasks of their own
    would get the CPUs that the actors of all stages leave, which may be none until the last title has passed the actors.
    """
    pool = config.resources.contextualise if plan.checkpoint else config.resources.write
    stage, guard = stages.Fuse(plan.model.dims["fused"], config.fusion), DeathGuard(config.resources.max_deaths_per_title)

    def fuse(table: pa.Table) -> pa.Table:
        return guard.run(stage, stage, table)

    return titles.map_batches(fuse, batch_size=1, **{**_in_pool(pool), "compute": None})


def contextualise(titles: Dataset, plan: Plan, config: EmbedCatalogConfig) -> Dataset:
    """Embed each title's sequence of shots in context; nothing where no checkpoint is configured."""
    if not plan.checkpoint:
        return titles
    pool = config.resources.contextualise
    return _actors(titles, config, pool, stages.Contextualise, with_threads(config.contextualiser, pool), plan.model.dims["fused"])


def write(titles: Dataset, plan: Plan, config: EmbedCatalogConfig) -> Dataset:
    """Commit each title's objects; what is left is how each title ended."""
    return _actors(
        titles, config, config.resources.write, stages.WriteTitle, config.output.uri, plan.model, plan.checkpoint, config.storage
    )


def contextualise_stored(
    plan: Plan,
    config: ContextualiseCatalogConfig | EmbedCatalogConfig,
    stage: type[stored.ContextualiseStored] = stored.ContextualiseStored,
) -> Dataset:
    """Embed the committed shots of each pending title in context and commit them; what is left is how each title ended.

    One stage, in actors: vectors that are read anyway need not travel between processes.
    """
    pool = config.resources.contextualise
    calls = min(plan.pending.num_rows, max(CALLS_PER_ACTOR * max_actors(pool), plan.pending.num_rows // MAX_TITLES_PER_CALL))
    bounds = [index * plan.pending.num_rows // calls for index in range(calls + 1)]
    rows = plan.pending.to_pylist()  # not slices: each would carry the whole plan
    titles = ray.data.from_blocks([pa.Table.from_pylist(rows[start:end], plan.pending.schema) for start, end in itertools.pairwise(bounds)])
    titles.context.target_max_block_size = 1  # byte: every title that is done is heard of at once, not when its call ends
    return titles.map_batches(
        _in_actor(stage, 0, DeathGuard(config.resources.max_deaths_per_title)),
        fn_constructor_args=(config.output.uri, plan.model, plan.checkpoint, with_threads(config.contextualiser, pool), config.storage),
        batch_size=None,
        **_in_pool(pool),
    )


def _actors(titles: Dataset, config: EmbedCatalogConfig, pool: StageConfig, stage: type[Stage], *arguments: Any) -> Dataset:
    """A stage in a pool of actors, each of which loads its model once."""
    niceness = NICENESS if _shares_cores(stage, arguments) else 0
    return titles.map_batches(
        _in_actor(stage, niceness, DeathGuard(config.resources.max_deaths_per_title)),
        fn_constructor_args=arguments,
        batch_size=pool.titles_per_call,
        **_in_pool(pool),
    )


def _in_pool(pool: StageConfig) -> dict[str, Any]:
    """What map_batches is told of a pool of actors; a node resource keeps them to the nodes that are meant for them."""
    return {
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "compute": ActorPoolStrategy(
            min_size=pool.min_actors, max_size=max_actors(pool), max_tasks_in_flight_per_actor=TASKS_IN_FLIGHT_PER_ACTOR
        ),
        "num_cpus": pool.num_cpus,
        "num_gpus": pool.num_gpus or None,
        "resources": {pool.node_resource: SHARE_OF_NODE_RESOURCE} if pool.node_resource else None,
    }


def _shares_cores(stage: type[Stage], arguments: Sequence[Any]) -> bool:
    """Whether a stage computes on the cores that the detector uses: on one machine without GPU."""
    on_cpu = all(getattr(argument, "device", "cpu") == "cpu" for argument in arguments)
    return not issubclass(stage, stages.DetectShots) and on_cpu and runs_alone()


def _in_actor(stage: Any, niceness: int, guard: DeathGuard) -> Any:
    """The stage as an actor runs it: guarded, and at a lower priority where it shares its cores with the detector, whose threads wait
    for one another, so that one that is disturbed costs the time of all."""

    def begin(self: Any, *arguments: Any) -> None:
        os.nice(niceness)
        clean_logs()
        try:
            stage.__init__(self, *arguments)
        except (ConfigError, WeightsError, ValueError, ImportError) as error:  # the next process would fail alike
            raise ConfigError(f"stage {stage.name}: {' '.join(str(error).split())}") from error

    def call(self: Any, table: pa.Table) -> pa.Table:
        return guard.run(self, lambda titles: stage.__call__(self, titles), table)

    def call_for_each(self: Any, table: pa.Table) -> Iterator[pa.Table]:
        for part in guard.parts(self, table):
            yield from stage.__call__(self, part)

    several = issubclass(stage, stored.ContextualiseStored)
    return type(stage.__name__, (stage,), {"__init__": begin, "__call__": call_for_each if several else call})


def pools(plan: Plan, config: EmbedCatalogConfig) -> dict[str, StageConfig]:
    """The actor pools that the graph of a plan has."""
    resources = config.resources
    found = {
        "detect_shots": resources.detect_shots,
        "encode_video": resources.encode_video,
        "encode_audio": resources.encode_audio,
        "encode_text": resources.encode_text,
    }
    return found | ({"contextualise": resources.contextualise} if plan.checkpoint else {}) | {"write": resources.write}


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
                stage = "stage " + re.sub(r"MapBatches\((\w+)\)", r"\1", operator.name)
                self.say(self.clocks[operator].describe(stage, {name: amount for name, amount in wanted.items() if amount}))


def _has_no_node(actor: Any) -> bool:
    """Tell an actor that is not placed yet from one whose constructor runs."""
    found = ray._private.state.actors(actor._actor_id.hex())
    return not found.get("Address", {}).get("IPAddress")
