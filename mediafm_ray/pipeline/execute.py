"""Embedding and contextualising the pending titles on Ray, which is imported only here: a run without pending titles does without."""

from __future__ import annotations

import time
from functools import partial

from mediafm_ray.config.jobs import ContextualiseCatalogConfig, EmbedCatalogConfig
from mediafm_ray.pipeline.stage_list import make_pools, recipe_steps, stored_pool
from mediafm_ray.runs.limits import NO_LIMITS, Limits
from mediafm_ray.runs.metrics import Metrics
from mediafm_ray.runs.plan import Plan
from mediafm_ray.runs.report import Console, RunResult, follow


def embed(plan: Plan, config: EmbedCatalogConfig, console: Console, result: RunResult, limits: Limits = NO_LIMITS) -> None:
    """Take the pending titles through all steps of the recipe; ``result`` counts how they end."""
    from mediafm_ray.pipeline import graph
    from mediafm_ray.pipeline.allowance import SharedAllowance
    from mediafm_ray.pipeline.budget import SharedBudget
    from mediafm_ray.pipeline.cluster import check_room, connected, metric_series

    begun = time.monotonic()
    with connected(config.resources):
        may_skip = limits is not NO_LIMITS or config.text.encoder == "openai"  # Nothing else makes a run leave titles.
        budget = SharedBudget(limits) if may_skip else None
        allowance = SharedAllowance(config.text) if config.text.encoder == "openai" else None
        pools = make_pools(recipe_steps(plan, config, budget, allowance), config.resources)
        check_room(config.resources, pools)
        titles = graph.embed_titles(plan, pools, config.resources.max_deaths_per_title)
        ended = graph.blocks(titles, console.say)
        ended = budget.follow(ended, result, limits.interrupted) if budget else ended
        follow(ended, result, begun, console, Metrics(partial(metric_series, dataset=plan.model.dataset_version)))


def contextualise(plan: Plan, config: ContextualiseCatalogConfig, console: Console, result: RunResult) -> None:
    """Contextualise the committed shots of the pending titles; ``result`` counts how they end."""
    from mediafm_ray.pipeline import graph
    from mediafm_ray.pipeline.cluster import check_room, connected, metric_series

    begun = time.monotonic()
    with connected(config.resources):
        pool = stored_pool(plan, config)
        check_room(config.resources, [pool])
        titles = graph.contextualise_stored(plan, pool, config.resources.max_deaths_per_title)
        follow(
            graph.blocks(titles, console.say), result, begun, console, Metrics(partial(metric_series, dataset=plan.model.dataset_version))
        )
