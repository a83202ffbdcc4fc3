"""The same stages in a plain loop in one process, for debugging, tests, and to measure the overhead of Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.pipeline.rows import Stage
from mediafm_ray.pipeline.stage_list import make_pools, recipe_steps
from mediafm_ray.runs.plan import Plan


def build_stages(plan: Plan, config: EmbedCatalogConfig) -> list[Stage]:
    """Return the stages of the graph in order, with their models loaded."""
    return [stage for pool in make_pools(recipe_steps(plan, config), config.resources) for stage in pool.build()]


def run(pending: pa.Table, steps: Sequence[Stage]) -> Iterator[pa.Table]:
    """Take each pending title through every stage; yield the rows that the last stage returns."""
    for index in range(pending.num_rows):
        title = pending.slice(index, 1)
        for stage in steps:
            title = stage(title)
        yield title
