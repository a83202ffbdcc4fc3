"""Find the shots that several titles share, exactly or nearly: recaps, openings, adverts, trailers and their films. No video is opened.

    mediafm repeats output.uri=embeddings/ index.uri=index/ repeats.uri=repeats.parquet

Writes a table with one row for each run of consecutive shots that two titles show at one offset in time: both titles, seconds and shots in
both, and how near the pictures are (mediafm_ray/downstream/repeats.py explains the method). Only pictures are compared: sound and texts
differ where a film is dubbed, and trailers have their own. Shots that recur within one title are left out. Run mediafm index first. The
table is written as a whole every time; the same index gives the same bytes.
Exit code 0: success; 2: a bad configuration, dataset or index, nothing was written; 3: the run ended early, nothing was written.
"""

from __future__ import annotations

import sys

from mediafm_ray.config.jobs import FindRepeatsConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.repeats import describe_repeats, find_repeats, open_repeated, read_catalog, repeats_table
from mediafm_ray.extras import need
from mediafm_ray.runs.command import EXIT_OK, run_job, working
from mediafm_ray.runs.report import Console
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.storage.tables import write_table


def main(config: FindRepeatsConfig) -> int:
    """Check the index, compare, write."""
    need("search", "finding repeats")
    console = Console()
    if not config.repeats.uri.endswith(".parquet"):
        raise ConfigError(f"repeats.uri={config.repeats.uri}: give a .parquet object for the repeats")
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    index = open_repeated(dataset, config, console)
    catalog = read_catalog(index)
    with working():
        table = repeats_table(index, *find_repeats(index, catalog, config.repeats.min_seconds, console))
        write_table(table, config.repeats.uri, config.storage)
    console.say(describe_repeats(table))
    console.say(f"  table    {config.repeats.uri}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", FindRepeatsConfig, main))
