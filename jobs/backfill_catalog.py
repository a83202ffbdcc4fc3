"""Keep an output up to date with its catalog, as a nightly job of a scheduler.

    mediafm backfill --config offline catalog.uri=videos/ output.uri=embeddings/ backfill.max_wall_minutes=300
    mediafm backfill --dry-run ...

Computes titles that are new, changed, or failed and due again, and by choice those that are committed only under another dataset version.
Limits bound the run, and the next run continues; a lease allows one run at a time for a dataset version. With --dry-run it prints the
plan and writes nothing. The logs of every run are below runs/ in the output, also those of a killed run.
Exit code 0: success; 1: more titles failed, were given up or could not be looked up than run.max_failed_fraction allows; 2: a bad
configuration or catalog, or another run holds the lease: nothing was started; 3: the run ended before all titles were done.
"""

from __future__ import annotations

import sys
import time
from functools import partial

from mediafm_ray.config.jobs import BackfillCatalogConfig
from mediafm_ray.pipeline.execute import embed
from mediafm_ray.runs.backfill import Backfill, delete_missing, describe, describe_time, last_pace, plan_backfill, summary_part
from mediafm_ray.runs.catalog_run import log_passed_over, report, run
from mediafm_ray.runs.command import EXIT_ABORTED, EXIT_OK, holder_of_lease, run_job, working
from mediafm_ray.runs.dry_run import describe_cost
from mediafm_ray.runs.hours import HOUR
from mediafm_ray.runs.limits import Limits
from mediafm_ray.runs.plan import describe_model, prepare_output
from mediafm_ray.runs.report import Console
from mediafm_ray.runs.run_log import RunLog
from mediafm_ray.storage.dataset import Output
from mediafm_ray.storage.lease import Lease, held
from mediafm_ray.storage.names import lease_folder
from mediafm_ray.storage.store import Store
from mediafm_ray.text import counted

MINUTE = 60  # seconds
LEASE_LOST = "the lease was lost"


def main(config: BackfillCatalogConfig) -> int:
    """Take the lease, then plan, delete, embed and report; with --dry-run only plan."""
    console, start = Console(log_format=config.run.log_format), time.monotonic()
    store = Store(config.output.uri, config.storage)
    if config.run.dry_run:
        return preview(config, store, console)
    model = describe_model(config)
    store.check_writable()
    holder = holder_of_lease("mediafm backfill")
    duration_s = config.backfill.lease_minutes * MINUTE
    with held(store, lease_folder(model.dataset_version), holder, duration_s) as lease, RunLog(console, store) as log:
        backfill = plan_backfill(config, model)
        console.say(describe(backfill, config))
        log_passed_over(backfill.plan, console)
        prepare_output(backfill.plan, config)
        pace = last_pace(store)
        with working():
            deleted = delete(backfill, config, console)
            budget = limits(backfill, config, start, lease)
            result = run(backfill.plan, console, partial(embed, backfill.plan, config, console, limits=budget))
            wall_s = time.monotonic() - start
            part = summary_part(backfill, result, wall_s, deleted, pace)
            code = report(backfill.plan, result, wall_s, config, console, log, more={"backfill": part})
    if result.ended_by == LEASE_LOST:
        console.say("error: the run stopped because its lease was lost: another may have begun; if not, run the same command again")
        return EXIT_ABORTED
    return code


def preview(config: BackfillCatalogConfig, store: Store, console: Console) -> int:
    """Print what a run would do, its duration and its cost."""
    backfill = plan_backfill(config)
    console.say(describe(backfill, config))
    log_passed_over(backfill.plan, console)
    console.say(describe_time(backfill, last_pace(store)))
    console.say(describe_cost(backfill.plan, config))
    return EXIT_OK


def limits(backfill: Backfill, config: BackfillCatalogConfig, start: float, lease: Lease) -> Limits:
    """Return the limits of the run. ``start``: time.monotonic() when the job began."""
    minutes = config.backfill.max_wall_minutes
    return Limits(
        max_video_s=config.backfill.max_video_hours * HOUR,
        wall_until=start + minutes * MINUTE if minutes else float("inf"),
        expected_s=backfill.hours.expected_s if config.backfill.max_video_hours else {},
        interrupted=lambda: "" if lease.is_valid() else LEASE_LOST,
    )


def delete(backfill: Backfill, config: BackfillCatalogConfig, console: Console) -> int:
    """Delete the objects of titles that are gone from the catalog, if so configured; return their number."""
    if not config.backfill.delete_missing or not backfill.missing.objects:
        return 0
    deleted = delete_missing(backfill.missing, Output(config.output.uri, backfill.plan.model.dataset_version, config.storage))
    console.say(f"deleted {counted(deleted, 'object')} of {counted(len(backfill.missing.titles), 'title')} gone from the catalog")
    return deleted


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", BackfillCatalogConfig, main))
