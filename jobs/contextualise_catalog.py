"""Compute the contextual embeddings of a checkpoint from committed shots. No video is opened.

    mediafm contextualise output.uri=embeddings/ contextualiser.checkpoint=checkpoint/

Writes contextual-<checkpoint>/ beside the shots, with the same bytes as mediafm embed with that checkpoint. Committed titles are skipped:
to finish a killed run, run the same command again. --config also takes files for mediafm embed.
Exit code 0: success; 1: more titles failed than run.max_failed_fraction allows; 2: a bad configuration, dataset or checkpoint,
nothing was started; 3: the run ended before all titles were done.
"""

from __future__ import annotations

import sys
import time
from functools import partial

from mediafm_ray.config.jobs import ContextualiseCatalogConfig
from mediafm_ray.pipeline.execute import contextualise
from mediafm_ray.runs.catalog_run import report, run
from mediafm_ray.runs.command import EXIT_OK, run_job, working
from mediafm_ray.runs.plan import Plan
from mediafm_ray.runs.report import Console
from mediafm_ray.runs.run_log import RunLog
from mediafm_ray.runs.stored import make_stored_plan, prepare_stored_output
from mediafm_ray.storage.store import Store
from mediafm_ray.text import counted

LOGS = ("contextualise-summary.json", "contextualise.log", "contextualise-titles.jsonl")  # beside the files of mediafm embed


def main(config: ContextualiseCatalogConfig) -> int:
    """Plan, contextualise the pending titles, report."""
    console, start = Console(log_format=config.run.log_format), time.monotonic()
    plan = make_stored_plan(config)
    log_plan(plan, console)
    if config.run.dry_run:
        return EXIT_OK
    prepare_stored_output(plan, config)
    with working(), RunLog(console, Store(config.output.uri, config.storage), LOGS) as log:
        result = run(plan, console, partial(contextualise, plan, config, console))
        return report(plan, result, time.monotonic() - start, config, console, log)


def log_plan(plan: Plan, console: Console) -> None:
    """Log the plan of a run."""
    console.say(
        f"dataset version {plan.model.dataset_version}, checkpoint {plan.checkpoint}: {counted(plan.titles, 'title')} with committed "
        f"shots, {plan.done} contextualised before, {plan.pending.num_rows} to compute"
    )
    if plan.failed_before:
        console.say(f"{counted(plan.failed_before, 'title')} failed before, skipped (run.retry_failed=false)")
    if plan.left:
        console.say(f"{plan.left} more are left for later runs (run.max_titles)")


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", ContextualiseCatalogConfig, main))
