"""Compute vectors for a table of clips, any [start, end) of committed titles.

    mediafm clips output.uri=embeddings/ clips.uri=clips.csv table.uri=vectors.parquet
    mediafm clips ... clips.kind=contextual_alone contextualiser.checkpoint=checkpoint/
    mediafm clips ... clips.kind=fused

A clip's vector is the mean direction of its shots, each weighted by its seconds in the clip. The written table has the rows and columns
of the given one, and a column embedding. No video is opened. A model is loaded for clips without their context (contextual_alone), or
for a checkpoint that has not written the contextual embeddings of a title.
Exit code 0: success; 2: a bad configuration, dataset or table (all its problems are printed), nothing was written.
"""

from __future__ import annotations

import sys

from mediafm_ray.config.jobs import EmbedClipsConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.clip_tables import ClipSource, clip_vectors, read_clips
from mediafm_ray.runs.command import EXIT_OK, run_job
from mediafm_ray.runs.report import Console
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.storage.schemas import embedding_array
from mediafm_ray.storage.tables import write_table
from mediafm_ray.text import counted


def main(config: EmbedClipsConfig) -> int:
    """Read the clips, embed them, write them."""
    console = Console()
    if not config.table.uri.endswith(".parquet"):
        raise ConfigError(f"table.uri={config.table.uri}: give a .parquet object for the vectors")
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    clips = read_clips(config.clips.uri, config.storage)
    if "embedding" in clips.column_names:
        raise ConfigError(f"clips.uri={config.clips.uri}: its column embedding would be overwritten; rename it")
    stored = ("clips.contextual", config.clips.contextual)
    source = ClipSource(config.output.uri, dataset, stored, config.contextualiser, config.storage, config.clips.threads)
    vectors_ND = clip_vectors(source, clips, config.clips.uri, [config.clips.kind])[config.clips.kind]
    write_table(clips.append_column("embedding", embedding_array(vectors_ND)), config.table.uri, config.storage)
    titles = len(clips["title_id"].unique())
    console.say(
        f"{counted(len(clips), 'clip')} of {counted(titles, 'title')}, {config.clips.kind}, "
        f"{vectors_ND.shape[1]} dimensions: {config.table.uri}"
    )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", EmbedClipsConfig, main))
