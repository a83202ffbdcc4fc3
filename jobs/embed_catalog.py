"""Embed a catalog: compute fused and, with a checkpoint, contextual embeddings of the shots of every title.

    mediafm embed --config offline catalog.uri=videos/ output.uri=embeddings/

Committed titles are skipped: to finish a killed run, run the same command again. Its logs are below runs/ in the output.
Exit code 0: success; 1: more titles failed, or could not be looked up, than run.max_failed_fraction allows; 2: a bad configuration
or catalog, nothing was started; 3: the run ended before all titles were done.
"""

from __future__ import annotations

import sys
import time
from functools import partial

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.pipeline.execute import embed
from mediafm_ray.runs.catalog_run import log_plan, report, run
from mediafm_ray.runs.command import EXIT_OK, run_job, working
from mediafm_ray.runs.dry_run import describe_cost
from mediafm_ray.runs.plan import make_plan, prepare_output
from mediafm_ray.runs.report import Console
from mediafm_ray.runs.run_log import RunLog
from mediafm_ray.storage.store import Store


def main(config: EmbedCatalogConfig) -> int:
    """Plan, embed the pending titles, report."""
    console, start = Console(log_format=config.run.log_format), time.monotonic()
    plan = make_plan(config)
    log_plan(plan, config, console)
    if config.run.dry_run:
        console.say(describe_cost(plan, config))
        return EXIT_OK
    prepare_output(plan, config)
    with working(), RunLog(console, Store(config.output.uri, config.storage)) as log:
        result = run(plan, console, partial(embed, plan, config, console))
        return report(plan, result, time.monotonic() - start, config, console, log)


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", EmbedCatalogConfig, main))
