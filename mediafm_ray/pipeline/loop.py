"""The same stages in a plain loop, one title after the other in one process: for debugging, tests, and as the measure of Ray's overhead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.pipeline.rows import Stage
from mediafm_ray.pipeline.stage_list import make_pools, recipe_steps
from mediafm_ray.runs.plan import Plan


def build_stages(plan: Plan, config: EmbedCatalogConfig) -> list[Stage]:
    """Every stage of the graph, with its models loaded, in order."""
    return [stage for pool in make_pools(recipe_steps(plan, config), config.resources) for stage in pool.build()]


def run(pending: pa.Table, steps: Sequence[Stage]) -> Iterator[pa.Table]:
    """Each pending title through every stage; the rows that the last one leaves."""
    for index in range(pending.num_rows):
        title = pending.slice(index, 1)
        for stage in steps:
            title = stage(title)
        yield title
