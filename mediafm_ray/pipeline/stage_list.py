"""The steps of the recipe, in order, and the pools of actors that run them. No ray here.

A pool runs one or several consecutive steps: where no step asks for a GPU, the encoders, fusion, the contextualiser and the writer share
one process, because each process that imports torch costs seconds and hundreds of megabytes. Results do not depend on the pools.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mediafm_ray.config.jobs import ContextualiseCatalogConfig, EmbedCatalogConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.config.sections import ResourcesConfig, StageConfig
from mediafm_ray.models.weights import WeightsError
from mediafm_ray.pipeline import stages
from mediafm_ray.pipeline.contextualise_stored import ContextualiseStored
from mediafm_ray.pipeline.rows import Stage
from mediafm_ray.pipeline.write_title import WriteTitle
from mediafm_ray.runs.plan import Plan
from mediafm_ray.spec import SAMPLE_RATE

CORES_PER_DETECTOR, CORES_PER_ACTOR = 2, 8  # They decide the number of actors where max_actors is 0.


@dataclass(frozen=True)
class Step:
    """A stage that is not built yet."""

    stage: type[Stage] | type[ContextualiseStored]
    resources: StageConfig
    model: Any = None  # The first argument of the constructor: the configuration of the model, or None without one.
    others: tuple[Any, ...] = ()  # Further arguments of the constructor.

    @property
    def detects(self) -> bool:
        """Return whether this is the detector or a stand-in for it."""
        return self.stage.name == stages.DetectShots.name


@dataclass(frozen=True)
class Pool:
    """Steps that share their actors."""

    steps: tuple[Step, ...]

    @property
    def name(self) -> str:
        """The names of the steps, as resources.pools takes them."""
        return "+".join(step.stage.name for step in self.steps if step.stage is not stages.Fuse)

    @property
    def resources(self) -> StageConfig:
        """The largest resources that any step asks for, with the number of actors resolved."""
        each = [step.resources for step in self.steps]
        cores = CORES_PER_DETECTOR if self.detects else CORES_PER_ACTOR
        automatic = max(1, (os.cpu_count() or 1) // cores)
        fewest = max(one.min_actors for one in each)
        return StageConfig(
            min_actors=fewest,
            max_actors=max(fewest, *(one.max_actors or automatic for one in each)),
            titles_per_call=max(one.titles_per_call for one in each),
            num_cpus=max(one.num_cpus for one in each),
            num_gpus=max(one.num_gpus for one in each),
            node_resource=next((one.node_resource for one in each if one.node_resource), ""),
        )

    @property
    def detects(self) -> bool:
        """Return whether these steps begin with the detector."""
        return self.steps[0].detects

    @property
    def is_on_cpu(self) -> bool:
        """Return whether no model of the pool computes on a GPU."""
        return all(getattr(step.model, "device", "cpu") == "cpu" for step in self.steps)

    def with_threads(self) -> Pool:
        """Return the pool with the CPU threads of its models resolved: the configured number, or an actor's share of this machine."""
        pool = self.resources
        share = int(pool.num_cpus) if pool.num_cpus >= 1 else (os.cpu_count() or 1) // pool.max_actors

        def decided(step: Step) -> Step:
            if step.model is None or step.model.threads:
                return step
            return replace(step, model=replace(step.model, threads=max(1, share)))

        return Pool(tuple(map(decided, self.steps)))

    def build(self) -> list[Any]:
        """Build the stages with their models. Raises ConfigError with the name of a stage that can work in no process."""
        found = []
        for step in self.steps:
            try:
                found.append(step.stage(*(() if step.model is None else (step.model,)), *step.others))
            except (ConfigError, WeightsError, ValueError, ImportError) as error:
                raise ConfigError(f"stage {step.stage.name}: {' '.join(str(error).split())}") from error
        return found


def recipe_steps(plan: Plan, config: EmbedCatalogConfig, budget: stages.TitleBudget | None = None, allowance: Any = None) -> list[Step]:
    """Return all steps from a title of the catalog to its committed objects; without a checkpoint there is no contextualising step.

    ``budget`` decides whether the run takes another title; ``allowance`` holds the limits of the embeddings API that all actors share.
    """
    resources, fused_dim = config.resources, plan.model.dims["fused"]
    sample_rate = plan.model.recipe.get("media", {}).get("sample_rate", SAMPLE_RATE)
    reading = (config.frames, config.timed_text, config.media, config.storage, budget, sample_rate)
    contextualise = [Step(stages.Contextualise, resources.contextualise, config.contextualiser, (fused_dim,))] if plan.checkpoint else []
    return [
        Step(stages.DetectShots, resources.detect_shots, config.detector, reading),
        Step(stages.EncodeVideo, resources.encode_video, config.video),
        Step(stages.EncodeAudio, resources.encode_audio, config.audio),
        Step(stages.EncodeText, resources.encode_text, config.text, (allowance, budget)),
        Step(stages.Fuse, resources.contextualise if plan.checkpoint else resources.write, None, (fused_dim, config.fusion)),
        *contextualise,
        Step(WriteTitle, resources.write, None, (config.output.uri, plan.model, plan.checkpoint, config.storage)),
    ]


def make_pools(steps: Sequence[Step], resources: ResourcesConfig) -> list[Pool]:
    """Group steps into pools as resources.pools says; fusion, which has no model, shares the pool of the next step.

    Without resources.pools, steps that ask for no GPU and for the same nodes share a pool, but the detector has its own.
    """
    groups = [[steps[0]]]
    for step, after in zip(steps[1:], [*steps[2:], None], strict=True):
        last = groups[-1][-1]
        following = after if step.stage is stages.Fuse and after else step
        if last.stage is stages.Fuse or _share(last, following, resources):
            groups[-1].append(step)
        else:
            groups.append([step])
    return [Pool(tuple(group)).with_threads() for group in groups]


def _share(one: Step, other: Step, resources: ResourcesConfig) -> bool:
    if resources.pools:
        return any({one.stage.name, other.stage.name} <= set(group.split("+")) for group in resources.pools)
    if one.detects or one.resources.num_gpus or other.resources.num_gpus:
        return False
    return one.resources.node_resource == other.resources.node_resource


def stored_pool(
    plan: Plan, config: ContextualiseCatalogConfig | EmbedCatalogConfig, stage: type[ContextualiseStored] = ContextualiseStored
) -> Pool:
    """Return the pool that contextualises committed shots: a single step, so that no vectors travel between processes."""
    others = (config.output.uri, plan.model, plan.checkpoint, config.storage)
    return Pool((Step(stage, config.resources.contextualise, config.contextualiser, others),)).with_threads()
