"""Embed a catalog: every title's shots as fused (and, with a checkpoint, contextual) embeddings.

    mediafm embed --config offline catalog.uri=videos/ output.uri=embeddings/

What is committed already is skipped; a killed run is finished by running the same command again. Its logs stand below runs/ in the output.
Exit code 0: all is well; 1: more titles failed, or could not be looked at, than run.max_failed_fraction allows; 2: a bad configuration
or catalog, nothing was started; 3: the run ended before its titles did.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from mediafm_ray.config import ConfigError, ContextualiseCatalogConfig, EmbedCatalogConfig
from mediafm_ray.pipeline.backfill import NO_LIMITS, Limits
from mediafm_ray.pipeline.command import EXIT_ABORTED, EXIT_FAILED_TITLES, EXIT_OK, debugging, run_job, working
from mediafm_ray.pipeline.dry_run import describe_cost
from mediafm_ray.pipeline.metrics import Metrics
from mediafm_ray.pipeline.plan import Plan, make_plan, prepare_output
from mediafm_ray.pipeline.report import Console, Tally, follow, reason_of, summary, summary_table
from mediafm_ray.pipeline.run_log import RunLog
from mediafm_ray.pipeline.stage_list import make_pools, recipe_steps
from mediafm_ray.spec import public_line
from mediafm_ray.storage.errors import StorageError
from mediafm_ray.storage.store import Store

UNKNOWN_SHOWN = 5  # titles


def main(config: EmbedCatalogConfig) -> int:
    """Plan, embed what is pending, report."""
    console, start = Console(log_format=config.run.log_format), time.monotonic()
    plan = make_plan(config)
    say_plan(plan, config, console)
    if config.run.dry_run:
        console.say(describe_cost(plan, config))
        return EXIT_OK
    prepare_output(plan, config)
    with working(), RunLog(console, Store(config.output.uri, config.storage)) as log:
        tally = Tally.of(plan)
        run(plan, tally, console, lambda: embed(plan, config, console, tally))
        return report(plan, tally, time.monotonic() - start, config, console, log)


def run(plan: Plan, tally: Tally, console: Console, work: Callable[[], None]) -> None:
    """Do the work, if anything is pending; what ends it early is kept in ``tally``. Raises ConfigError, unless titles were done."""
    if not plan.pending.num_rows:
        return
    try:
        work()
    except ConfigError as error:
        if not tally.finished:
            raise
        tally.aborted, tally.retry_helps = str(error), False
    except Exception as error:  # whatever ended the run early: what was done until then is reported all the same
        console.keep(traceback.format_exc(), shown=debugging())
        tally.aborted = reason_of(error)


def embed(plan: Plan, config: EmbedCatalogConfig, console: Console, tally: Tally, limits: Limits = NO_LIMITS) -> None:
    """The recipe, step by step, over the pending titles; ``tally`` counts how they end."""
    from mediafm_ray.pipeline import graph  # ray takes a second to import: not for a run that has nothing to do
    from mediafm_ray.pipeline.allowance import SharedAllowance
    from mediafm_ray.pipeline.budget import SharedBudget
    from mediafm_ray.pipeline.cluster import check_room, connected

    begun = time.monotonic()
    with connected(config.resources):
        budget = SharedBudget(limits)
        allowance = SharedAllowance(config.text) if config.text.encoder == "openai" else None
        pools = make_pools(recipe_steps(plan, config, budget, allowance), config.resources)
        check_room(config.resources, pools)
        titles = graph.run_pools(graph.read_plan(plan), pools, config.resources.max_deaths_per_title)
        results = budget.follow(graph.blocks(titles, console.say), tally, limits.interrupted)
        follow(results, tally, begun, console, Metrics(plan.model.dataset_version))


def say_plan(plan: Plan, config: EmbedCatalogConfig, console: Console) -> None:
    """What the run is about to do."""
    console.say(
        f"dataset version {plan.model.dataset_version}: {plan.titles} titles in the catalog, {plan.done} committed before, "
        f"{plan.pending.num_rows} to compute"
    )
    if plan.failed_before:
        console.say(f"{plan.failed_before} titles failed before and are passed over (run.retry_failed=false)")
    if plan.only_contextual:
        console.say(
            f"{plan.only_contextual} of them lack only this checkpoint's contextual embeddings, and are computed again from their videos; "
            f"faster, without a video: python -m jobs.contextualise_catalog output.uri={config.output.uri} "
            f"dataset.version={plan.model.dataset_version} contextualiser.checkpoint={config.contextualiser.checkpoint}"
        )
    if plan.without_context:
        console.say(
            f"{plan.without_context} titles were embedded without context; to add it, without a video: "
            f"python -m jobs.contextualise_catalog output.uri={config.output.uri} dataset.version={plan.model.dataset_version}"
        )
    say_unknown(plan, console)
    if not plan.checkpoint:
        console.say("no contextualiser.checkpoint is set: writing fused (raw) embeddings only")


def say_unknown(plan: Plan, console: Console) -> None:
    """Name titles that are passed over: their rows are bad, or nobody can say whether their sources are those that are committed."""
    if plan.bad_rows:
        console.say(f"warning: {len(plan.bad_rows)} problems of the catalog; their titles are recorded as failures; the first:")
        for row in plan.bad_rows[:UNKNOWN_SHOWN]:
            console.say(public_line(f"  {row}"))
    if plan.unknown:
        console.say(f"warning: {len(plan.unknown)} titles are passed over, because their sources cannot be looked at; the first:")
        for title_id, reason in plan.unknown[:UNKNOWN_SHOWN]:
            console.say(public_line(f"  {title_id}: {reason}"))


def report(
    plan: Plan,
    tally: Tally,
    wall_s: float,
    config: EmbedCatalogConfig | ContextualiseCatalogConfig,
    console: Console,
    log: RunLog,
    more: Mapping[str, Any] | None = None,
) -> int:
    """Summary on the terminal and in the output, with ``more`` in it and the logs beside it; the exit code."""
    content = {**summary(plan, tally, wall_s, dataclasses.asdict(config)), **(more or {})}
    console.say()
    console.say(summary_table(content, config.output.uri, log.names[0]))
    try:
        log.end(content)
    except StorageError as error:
        console.say(f"error: the run's summary could not be written: {error}")
        return EXIT_ABORTED
    if tally.aborted:
        hint = "; run the same command again" if tally.retry_helps else ""
        console.say(f"error: the run ended early, {tally.lost} titles were not done: {tally.aborted}{hint}")
        return EXIT_ABORTED
    if tally.lost:
        console.say(f"error: {tally.lost} titles were planned and never came back; run the same command again")
        return EXIT_FAILED_TITLES
    fraction = config.run.max_failed_fraction
    too_many = tally.failed > fraction * tally.finished or len(plan.unknown) + plan.given_up + len(plan.bad_titles) > fraction * plan.titles
    return EXIT_FAILED_TITLES if too_many else EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", EmbedCatalogConfig, main))
