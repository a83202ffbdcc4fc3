"""Merge the objects of an output, one a title, into one Parquet file a dataset and shard. Jobs may write and read meanwhile.

    mediafm compact output.uri=embeddings/
    mediafm compact output.uri=embeddings/ compact.keep_hours=0

For catalogs of millions of short titles: fewer objects to list and to scan. Titles that are merged count as committed for every job; one
that is replaced or deleted later is merged or left out by the next compaction, so run it every night. Objects stay for compact.keep_hours
after their titles were merged, and a later compaction removes them. One compaction runs at a time.
Exit code 0: success; 1: some objects cannot be merged and stay as they are; 2: the output cannot be read, or another compaction is at
work: nothing was started; 3: the compaction ended before all was merged: what is merged stays.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mediafm_ray.config.jobs import CompactDatasetConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.runner import ordered_map
from mediafm_ray.runs.command import EXIT_FAILED_TITLES, EXIT_OK, holder_of_lease, run_job, working
from mediafm_ray.runs.report import MAX_FAILURES_SHOWN, Console
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.storage.compaction import Compaction, compact_shard, present_shards
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.lease import Lease, held
from mediafm_ray.storage.names import compaction_lease_folder
from mediafm_ray.storage.partitions import scratch_folder
from mediafm_ray.storage.store import Store
from mediafm_ray.text import public_line

HOUR = 3600  # seconds
LEASE_S = 300
MIN_KEEP_HOURS = 1  # on object storage, where a stopped process may write long after it lost its lease


def main(config: CompactDatasetConfig) -> int:
    """Compact each dataset under the lease, shard by shard."""
    console = Console()
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    store = Store(config.output.uri, config.storage)
    if not store.is_local and config.compact.keep_hours < MIN_KEEP_HOURS:
        raise ConfigError(f"compact.keep_hours must be at least {MIN_KEEP_HOURS} on object storage, is {config.compact.keep_hours:g}")
    store.check_writable()
    left: list[tuple[str, str]] = []
    holder = holder_of_lease("mediafm compact")
    with held(store, compaction_lease_folder(dataset.version), holder, LEASE_S) as lease, working(), scratch_folder("compact") as scratch:
        for name in dataset.names():
            left += compact(dataset, name, lease, scratch, config, console).left
    for name, reason in left[:MAX_FAILURES_SHOWN]:
        console.say(public_line(f"NOT MERGED {name}: {reason}"))
    if len(left) > MAX_FAILURES_SHOWN:
        console.say(f"... and {len(left) - MAX_FAILURES_SHOWN} more")
    return EXIT_FAILED_TITLES if left else EXIT_OK


def compact(
    dataset: EmbeddingDataset, name: str, lease: Lease, scratch: Path, config: CompactDatasetConfig, console: Console
) -> Compaction:
    """Compact one dataset; log and return the result."""
    begun, result = time.monotonic(), Compaction()
    min_titles, keep_s = config.compact.min_titles, config.compact.keep_hours * HOUR

    def work(shard: str) -> Compaction:
        return compact_shard(dataset, name, shard, lease, min_titles, keep_s, scratch)

    for done in ordered_map(work, present_shards(dataset, name), config.compact.threads):
        result.add(done)
    seconds = time.monotonic() - begun
    console.say(
        f"{name}: {result.titles} titles in merged files; {result.merged} merged now into {result.files} files, {result.dropped} left out, "
        f"{result.waiting} waiting, {len(result.left)} cannot be merged; {result.removed} objects removed; "
        f"{result.read_bytes / 1e6:.1f} MB in {seconds:.1f} s"
    )
    return result


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", CompactDatasetConfig, main))
