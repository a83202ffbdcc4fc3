"""Steps that the jobs over a catalog share: log the plan, run it, report how it ended."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from mediafm_ray.config.jobs import ContextualiseCatalogConfig, EmbedCatalogConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.runs.command import EXIT_ABORTED, EXIT_FAILED_TITLES, EXIT_OK, debugging
from mediafm_ray.runs.plan import Plan
from mediafm_ray.runs.report import Console, RunResult, reason_of, summary, summary_table
from mediafm_ray.runs.run_log import RunLog
from mediafm_ray.storage.errors import StorageError
from mediafm_ray.text import counted, public_line

MAX_TITLES_SHOWN = 5


def run(plan: Plan, console: Console, work: Callable[[RunResult], None]) -> RunResult:
    """Call ``work``, which counts the titles that it finishes, if any are pending; return how the run ended.

    Raises ConfigError where ``work`` does before a title was finished.
    """
    result = RunResult.of(plan)
    if not plan.pending.num_rows:
        return result
    try:
        work(result)
    except ConfigError as error:
        if not result.finished:
            raise
        result.aborted, result.retry_helps = str(error), False
    except Exception as error:  # Titles that were finished are reported, whatever ended the run.
        console.keep(traceback.format_exc(), shown=debugging())
        result.aborted = reason_of(error)
    return result


def log_plan(plan: Plan, config: EmbedCatalogConfig, console: Console) -> None:
    """Log the plan of a run."""
    console.say(
        f"dataset version {plan.model.dataset_version}: {counted(plan.titles, 'title')} in the catalog, {plan.done} committed before, "
        f"{plan.pending.num_rows} to compute"
    )
    if plan.failed_before:
        console.say(f"{counted(plan.failed_before, 'title')} failed before, passed over (run.retry_failed=false)")
    if plan.only_contextual:
        console.say(
            f"{plan.only_contextual} of them lack only this checkpoint's contextual embeddings, and are computed again from their videos; "
            f"faster, without a video: mediafm contextualise output.uri={config.output.uri} "
            f"dataset.version={plan.model.dataset_version} contextualiser.checkpoint={config.contextualiser.checkpoint}"
        )
    if plan.without_context:
        console.say(
            f"{counted(plan.without_context, 'title')} embedded without context; to add it, without a video: "
            f"mediafm contextualise output.uri={config.output.uri} dataset.version={plan.model.dataset_version}"
        )
    log_passed_over(plan, console)
    if not plan.checkpoint:
        console.say("no contextualiser.checkpoint is set: writing fused (raw) embeddings only")


def log_passed_over(plan: Plan, console: Console) -> None:
    """Log titles that are passed over, because their rows are bad or their sources cannot be compared with the committed ones."""
    if plan.bad_rows:
        console.say(f"warning: {counted(len(plan.bad_rows), 'problem')} of the catalog; their titles are recorded as failures; the first:")
        for row in plan.bad_rows[:MAX_TITLES_SHOWN]:
            console.say(public_line(f"  {row}"))
    if plan.unknown:
        console.say(f"warning: {counted(len(plan.unknown), 'title')} passed over, because their sources cannot be looked at; the first:")
        for title_id, reason in plan.unknown[:MAX_TITLES_SHOWN]:
            console.say(public_line(f"  {title_id}: {reason}"))


def report(
    plan: Plan,
    result: RunResult,
    wall_s: float,
    config: EmbedCatalogConfig | ContextualiseCatalogConfig,
    console: Console,
    log: RunLog,
    more: Mapping[str, Any] | None = None,
) -> int:
    """Print the summary, write it with ``more`` and the logs to the output, and return the exit code."""
    content = {**summary(plan, result, wall_s, dataclasses.asdict(config)), **(more or {})}
    console.say()
    console.say(summary_table(content, config.output.uri, log.names[0]))
    try:
        log.end(content)
    except StorageError as error:
        console.say(f"error: the run's summary could not be written: {error}")
        return EXIT_ABORTED
    if result.aborted:
        hint = "; run the same command again" if result.retry_helps else ""
        console.say(f"error: the run ended early, {counted(result.lost, 'title')} not done: {result.aborted}{hint}")
        return EXIT_ABORTED
    if result.lost:
        console.say(f"error: {counted(result.lost, 'title')} planned and never came back; run the same command again")
        return EXIT_FAILED_TITLES
    fraction = config.run.max_failed_fraction
    not_tried = len(plan.unknown) + plan.given_up + len(plan.bad_titles)
    too_many = result.failed > fraction * result.finished or not_tried > fraction * plan.titles
    return EXIT_FAILED_TITLES if too_many else EXIT_OK
