"""Build the search index of shots, or bring it up to date. No video is opened and no model is loaded.

    mediafm index output.uri=embeddings/ index.uri=index/
    mediafm index output.uri=embeddings/ index.uri=s3://bucket/index vectors.kind=fused index.parts=[text]

The index is a Lance dataset: one row for each shot, with its contextual (or fused) vector, those of its modalities, title, times, text and
language. New and changed titles are added and missing ones removed; without changes nothing is done. A column of at least
index.least_shots vectors gets a vector index, whose recall@10 against exact search is measured and printed. A search sees the new version
only when it is complete. To finish a killed build, run the same command again.
Exit code 0: success; 1: more titles failed than run.max_failed_fraction allows (the others are added); 2: a bad configuration, dataset or
index, nothing was changed; 3: the build ended early, nothing new was published.
"""

from __future__ import annotations

import sys

from mediafm_ray.config.jobs import BuildIndexConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.indexing import add_titles, finish_build, index_vectors, make_index_plan, open_target, remove_titles
from mediafm_ray.derive.reader import vectors_dataset
from mediafm_ray.extras import need
from mediafm_ray.runs.command import holder_of_lease, run_job, working
from mediafm_ray.runs.report import Console
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.storage.index import LEASE
from mediafm_ray.storage.index_writer import IndexWriter
from mediafm_ray.storage.lease import LeaseLost, held
from mediafm_ray.storage.store import Store

LEASE_LOST = "the lease of this index was lost: another build may have begun"


def main(config: BuildIndexConfig) -> int:
    """Compare, add, remove, train, measure and publish."""
    need("search", "building an index")
    console = Console()
    if not config.index.uri:
        raise ConfigError("index.uri is required: a folder or bucket prefix of its own")
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    vectors = vectors_dataset(dataset, config.vectors)
    store = Store(config.index.uri, config.storage)
    open_target(dataset, vectors, IndexWriter(config.index.uri, config.storage), config.index)  # raises NoIndex before anything is written
    store.check_writable()
    with held(store, LEASE, holder_of_lease("mediafm index"), config.index.lease_minutes * 60) as lease, working():
        writer = IndexWriter(config.index.uri, config.storage)
        plan = make_index_plan(dataset, vectors, writer, config.index)
        console.say(plan.describe())
        if plan.begins:
            writer.create(plan.facts)
        added = add_titles(dataset, plan, writer, config, console)
        removed = remove_titles(plan, added, writer)
        index_vectors(writer, config.index, console, changed=bool(added.rows or removed or not writer.published()))
        if not lease.is_valid():
            raise LeaseLost(f"{LEASE_LOST}; nothing is published: run the same command again")
        return finish_build(writer, added, removed, config, console)


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", BuildIndexConfig, main))
