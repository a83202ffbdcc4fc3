"""Describe committed titles, one row each: vectors for recommendation from the first day, length, pace and amount of speech.

    mediafm titles output.uri=embeddings/ [table.uri=titles.parquet]

Writes titles-<fused|contextual>-<options>/ beside the shots, and prints the titles nearest to each by the cosine of their pooled
embeddings. No video is opened and no model is loaded. Committed titles are skipped: to finish a killed run, run the same command again.
Exit code 0: success; 1: more titles failed than run.max_failed_fraction allows; 2: a bad configuration or dataset, nothing was started;
3: the run ended before all titles were done.
"""

from __future__ import annotations

import sys

from mediafm_ray.config.jobs import DescribeTitlesConfig
from mediafm_ray.derive.reader import vectors_dataset
from mediafm_ray.derive.runner import DerivedPlan, derive_titles, finish, make_derived_plan
from mediafm_ray.derive.titles import check_table_uri, describe_title, describe_titles, read_titles, titles_dataset, with_nearest
from mediafm_ray.runs.command import run_job, working
from mediafm_ray.runs.report import Console
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.storage.tables import write_table

MAX_SHOWN = 40  # titles in the printed table


def main(config: DescribeTitlesConfig) -> int:
    """Plan, describe the pending titles, find the nearest, report."""
    console = Console()
    check_table_uri(config.table.uri)
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    vectors = vectors_dataset(dataset, config.vectors)
    plan = make_derived_plan(dataset, titles_dataset(vectors, config.scenes), config.run)
    console.say(plan.describe(vectors))
    with working():
        tally = derive_titles(plan, lambda title: describe_title(dataset, vectors, title, config.scenes), config.run, console)
        if tally.ok + plan.done:
            show_titles(plan, config, console)
        return finish(plan, tally, "row", config.run, console)


def show_titles(plan: DerivedPlan, config: DescribeTitlesConfig, console: Console) -> None:
    """Print the titles with those nearest to each, and write them to table.uri."""
    titles = read_titles(plan.dataset, plan.target)
    described = with_nearest(titles, config.table.nearest, len(titles) if config.table.uri else MAX_SHOWN)
    console.say()
    console.say(describe_titles(described.slice(0, MAX_SHOWN)))
    if len(titles) > MAX_SHOWN:
        console.say(f"  ... and {len(titles) - MAX_SHOWN} more")
    if config.table.uri:
        write_table(described, config.table.uri, config.storage, without=("pooled_embedding", "cls_embedding"))
        console.say(f"\n  table    {config.table.uri}")


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", DescribeTitlesConfig, main))
