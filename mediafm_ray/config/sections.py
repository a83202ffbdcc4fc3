"""The sections of a configuration: dataclasses whose fields declare what a key means and which values it may have.

The sections of one layer are in the module ``options`` of that layer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from mediafm_ray.spec import MODALITIES, SHARDS, ConfigSection, resource

MIN_VECTORS_TO_TRAIN = 256  # A product quantiser has one centroid for each value of a byte, and each needs a vector.


@dataclass(frozen=True)
class CatalogConfig(ConfigSection):
    """The titles to embed."""

    uri: str = resource("", "folder of videos, or a .parquet, .csv or .jsonl table of titles (required)")
    on_error: str = resource(
        "fail", "a bad row: fail = stop before anything starts; skip = record it as a failure and go on", choices=("fail", "skip")
    )


@dataclass(frozen=True)
class OutputConfig(ConfigSection):
    """The location of the datasets."""

    uri: str = resource("", "folder or bucket prefix of the datasets (required)")


@dataclass(frozen=True)
class StageConfig(ConfigSection):
    """The actor pool of one stage."""

    min_actors: int = resource(1, "minimum number of actors", min=1)
    max_actors: int = resource(
        0, "maximum number of actors; 0 = one for every eight cores of this machine (detector: one for every two)", min=0
    )
    titles_per_call: int = resource(1, "maximum number of titles (or groups of short ones) in one call of an actor; more fill a GPU", min=1)
    num_cpus: float = resource(0.25, "logical CPUs that Ray reserves for an actor", min=0)
    num_gpus: float = resource(0.0, "GPUs that Ray reserves for an actor; actors with fractions share one", min=0)
    node_resource: str = resource("", "custom Ray resource of the nodes that run the actors (each reserves 0.001 of it); empty = any node")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_actors and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors must be at least min_actors ({self.min_actors}) or 0, is {self.max_actors}")


def _detect_stage() -> StageConfig:
    return StageConfig(num_cpus=0.5)


STAGES = ("detect_shots", "encode_video", "encode_audio", "encode_text", "contextualise", "write")  # in order


@dataclass(frozen=True)
class ResourcesConfig(ConfigSection):
    """Actors, CPUs and GPUs of the stages. No key of this section changes the output."""

    detect_shots: StageConfig = field(default_factory=_detect_stage)
    encode_video: StageConfig = field(default_factory=StageConfig)
    encode_audio: StageConfig = field(default_factory=StageConfig)
    encode_text: StageConfig = field(default_factory=StageConfig)
    contextualise: StageConfig = field(default_factory=StageConfig)
    write: StageConfig = field(default_factory=StageConfig)
    pools: list[str] = resource(
        [],
        "groups of stages that share actors, such as encode_video+encode_audio; a group reserves the maximum of its stages, other stages "
        "have actors of their own. Empty = all stages but the detector share actors if they reserve no GPU and run on the same nodes",
    )
    ray_address: str = resource("", "Ray cluster to join; empty = RAY_ADDRESS if it is set, else a local Ray instance")
    object_store_gb: float = resource(0.0, "object store of a local Ray instance, in GB; 0 = Ray's default (30 % of the memory)", min=0)
    max_deaths_per_title: int = resource(
        3, "a title fails after this many processes died while a stage processed it (out of memory, crashes, lost nodes)", min=1
    )
    no_progress_timeout_s: float = resource(
        21600.0,
        "the job stops after this many seconds in which no title moved to the next stage; must exceed the time of the longest title",
        min=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for group in self.pools:
            if group not in "+".join(STAGES) or not set(group.split("+")) <= set(STAGES):
                raise ValueError(f"pools: {group} is not a part of {'+'.join(STAGES)}")
        pooled = [stage for group in self.pools for stage in group.split("+")]
        if len(set(pooled)) < len(pooled):
            raise ValueError("pools: a stage is in two pools")


@dataclass(frozen=True)
class RunConfig(ConfigSection):
    """Limits and reporting of a run."""

    max_failed_fraction: float = resource(0.0, "the job exits with 1 if a larger share of the planned titles failed", min=0, max=1)
    retry_failed: bool = resource(True, "retry titles that have a failure record")
    dry_run: bool = resource(False, "print the plan and what the text would cost at the embeddings API; write nothing")
    max_titles: int = resource(0, "maximum number of pending titles to process; 0 = all", min=0)
    shards: str = resource(
        "0-255",
        "shards of the titles that this run takes, by a digest of their ids; several runs at once, each with its own, divide a catalog",
    )
    log_format: str = resource(
        "text", "text = lines for people; json = one JSON object per line, for log collectors such as Loki", choices=("text", "json")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\d{1,3}-\d{1,3}", self.shards) or not 0 <= self.shard_numbers.start < self.shard_numbers.stop <= SHARDS:
            raise ValueError(f"shards must be two numbers from 0 to {SHARDS - 1}, such as 0-63, and are {self.shards!r}")

    @property
    def shard_numbers(self) -> range:
        """The numbers of the shards."""
        first, last = map(int, self.shards.split("-"))
        return range(first, last + 1)


@dataclass(frozen=True)
class StoredDatasetConfig(ConfigSection):
    """The dataset to read."""

    version: str = resource("", "dataset version, 12 hex digits; empty = the only one")


@dataclass(frozen=True)
class VectorsConfig(ConfigSection):
    """The committed vectors to read."""

    kind: str = resource("contextual", "contextual = of a contextualiser; fused = of the encoders", choices=("contextual", "fused"))
    checkpoint: str = resource(
        "", "the 12 hex digits after contextual-; empty = the only trained checkpoint that has written, or builtin:neighbours"
    )


@dataclass(frozen=True)
class DerivedRunConfig(ConfigSection):
    """Threads and limits of a run over committed titles."""

    threads: int = resource(4, "titles that are processed at once", min=1)
    max_failed_fraction: float = resource(0.0, "the job exits with 1 if a larger share of the planned titles failed", min=0, max=1)
    max_titles: int = resource(0, "maximum number of pending titles to process; 0 = all", min=0)


@dataclass(frozen=True)
class TableConfig(ConfigSection):
    """The table of all titles."""

    uri: str = resource("", "a .parquet or .jsonl object for the table of all titles and the titles nearest to each; empty = none")
    nearest: int = resource(3, "number of nearest titles to list for each title", min=0)


CONTEXTUAL_MEANING = (
    "12 hex digits after contextual-: the stored embeddings to read if several checkpoints have written; empty = the only ones"
)


@dataclass(frozen=True)
class ClipsConfig(ConfigSection):
    """The clips to embed."""

    uri: str = resource("", ".parquet, .csv or .jsonl table of clips: title_id, start_s, end_s and other columns to keep (required)")
    kind: str = resource("contextual", "contextual, contextual_alone (only the shots of the clip as context), fused, video, audio or text")
    contextual: str = resource("", CONTEXTUAL_MEANING)
    threads: int = resource(4, "titles that are read at once", min=1)


@dataclass(frozen=True)
class ClipTableConfig(ConfigSection):
    """The table of clips and their vectors."""

    uri: str = resource("", "a .parquet object for the clips and their vectors (required)")


@dataclass(frozen=True)
class LabelsConfig(ConfigSection):
    """The labels to predict."""

    uri: str = resource("", ".parquet, .csv or .jsonl table: title_id, start_s, end_s of each clip, and its labels (required)")
    columns: list[str] = resource([], "columns of labels; empty = all but title_id, start_s, end_s and clip_id")
    group: str = resource(
        "", "column that groups titles, such as a series or the cuts of one film; a group is held out as a whole; empty = no groups"
    )
    inputs: list[str] = resource(
        ["video", "audio", "text", "fused", "neighbours", "contextual_alone", "contextual"],
        "kinds of clip vectors to probe, in this order; neighbours = mean of the fused vectors of five shots",
    )
    baseline: str = resource("fused", "the input that the others are compared with; the first one if it is not probed")
    contextual: str = resource("", CONTEXTUAL_MEANING)
    threads: int = resource(4, "titles that are read at once", min=1)


@dataclass(frozen=True)
class ReportConfig(ConfigSection):
    """The location of the results."""

    uri: str = resource("", "a .json object for all numbers; empty = print the table only")


@dataclass(frozen=True)
class BackfillConfig(ConfigSection):
    """Work and limits of a scheduled run."""

    order: str = resource(
        "newest", "newest = the last modified videos first; catalog = in the order of the catalog's rows", choices=("newest", "catalog")
    )
    max_titles: int = resource(0, "maximum number of titles to process; 0 = all", min=0)
    max_video_hours: float = resource(0.0, "start no title after this many hours of video were read; 0 = no limit", min=0)
    max_wall_minutes: float = resource(
        0.0, "start no title later than this many minutes after the start; titles in progress are finished; 0 = no limit", min=0
    )
    max_attempts: int = resource(
        4, "a title that failed this many times is not tried again until its source or the dataset version changes", min=1
    )
    retry_delay_hours: float = resource(1.0, "delay before a failed title is tried again; it doubles after each failure", min=0)
    recompute_stale: bool = resource(False, "also compute titles that are committed only under another dataset version")
    delete_missing: bool = resource(False, "delete the objects of titles that are no longer in the catalog")
    max_delete_fraction: float = resource(
        0.1, "refuse to delete if a larger share of the committed titles has left the catalog", min=0, max=1
    )
    lease_minutes: float = resource(
        10.0, "time after a crash in which no other backfill of the dataset can start; renewed while the job runs", above=0
    )


@dataclass(frozen=True)
class VerifyConfig(ConfigSection):
    """The objects to check."""

    version: str = resource("", "dataset version to check; empty = all")
    repair: bool = resource(False, "delete broken objects, so that the next run computes them again")
    threads: int = resource(8, "objects that are read at once; each is held in memory", min=1)


@dataclass(frozen=True)
class CompactConfig(ConfigSection):
    """When titles are merged, and how long their own objects stay."""

    min_titles: int = resource(16, "titles of a shard that are new, replaced or deleted, for which its merged file is written again", min=1)
    keep_hours: float = resource(
        12.0,
        "hours for which an object stays after its title was merged, for readers that have listed it; at least 1 on object storage",
        min=0,
    )
    threads: int = resource(2, "shards that are compacted at once", min=1)


@dataclass(frozen=True)
class TitlePageConfig(ConfigSection):
    """The location of the page of the title."""

    path: str = resource("", "file or object to write; empty = pages/titles/<title>.html of the dataset version")


@dataclass(frozen=True)
class CatalogPagesConfig(ConfigSection):
    """The location and the extent of the catalog's pages."""

    folder: str = resource("", "folder or bucket prefix for index.html and titles/; empty = pages/ of the dataset version")
    title_pages: bool = resource(
        False, "also write the pages of committed titles that changed since; the list links to the pages that exist"
    )


@dataclass(frozen=True)
class DatasetConfig(StoredDatasetConfig):
    """The dataset to train on, written by mediafm embed."""

    uri: str = resource("", "folder or bucket prefix that embed_catalog wrote to, its output.uri (required)")


@dataclass(frozen=True)
class CheckpointConfig(ConfigSection):
    """The location of the trained model."""

    uri: str = resource("", "folder or bucket prefix of one training, for config.json, model.safetensors and the saved state (required)")


@dataclass(frozen=True)
class TrainingResourcesConfig(ConfigSection):
    """Workers of a training. They change only dropout and rounding."""

    workers: int = resource(1, "processes that share every step; with training.device=cuda each has a GPU of its own", min=1)
    num_cpus: float = resource(1.0, "logical CPUs that Ray reserves for a worker", min=0)
    max_restarts: int = resource(3, "times that dead workers are replaced; training then continues from the last saved state", min=0)
    ray_address: str = resource("", "Ray cluster to join; empty = RAY_ADDRESS if it is set, else a local Ray instance")


@dataclass(frozen=True)
class IndexConfig(ConfigSection):
    """The index of shots: its location, its columns and its recall."""

    uri: str = resource("", "folder or bucket prefix of the index, a Lance dataset; nothing else may be in it (required)")
    parts: list[str] = resource(
        list(MODALITIES),
        "modalities whose own vectors can be searched, too; each adds its dimensions to the index",
        choices=MODALITIES,
    )
    least_shots: int = resource(
        20_000,
        "a column with at least this many vectors gets a vector index, which is searched approximately; smaller ones are searched exactly",
        min=MIN_VECTORS_TO_TRAIN,
    )
    recall: float = resource(
        0.97, "recall@10 that the vector index must reach on sampled shots; the search parameters that reach it are stored", above=0, max=1
    )
    queries: int = resource(200, "sampled shots on which recall@10 is measured against exact search", min=1)
    replace: bool = resource(False, "replace an index of another dataset version, of other vectors or of other parts")
    keep_hours: float = resource(24.0, "earlier versions of the index are deleted after this time; a search may still read them", min=0)
    lease_minutes: float = resource(
        10.0, "time after a crash in which no other build of the index can start; renewed while the job runs", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts: each modality can be listed once; is {', '.join(self.parts)}")


@dataclass(frozen=True)
class SearchedIndexConfig(ConfigSection):
    """The index to search."""

    uri: str = resource("", "folder or bucket prefix of an index, the index.uri of mediafm index (required)")
    version: str = resource("", "dataset version that the index must hold, 12 hex digits; empty = any")
    vectors: str = resource("", "vectors that the index must hold, fused or contextual; empty = any", choices=("", "fused", "contextual"))
    exact: bool = resource(False, "compare with every shot instead of using the vector index")


@dataclass(frozen=True)
class FilterConfig(ConfigSection):
    """The shots that a search may find."""

    titles: list[str] = resource([], "only shots of these titles; empty = of all titles")
    without_titles: list[str] = resource([], "no shots of these titles")
    other_titles: bool = resource(False, "no shots of the title of the queried shot or clip")
    start_s: float | None = resource(None, "only shots that end after this second of their title; null = any", below=math.inf)
    end_s: float | None = resource(None, "only shots that begin before this second of their title; null = any", below=math.inf)
    languages: list[str] = resource([], "only shots with text in one of these languages; en includes en-US; empty = all shots")
    min_length_s: float = resource(0.0, "only shots of at least this many seconds", min=0, below=math.inf)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_s is not None and self.end_s is not None and self.start_s >= self.end_s:
            raise ValueError(f"end_s ({self.end_s:g}) must be greater than start_s ({self.start_s:g})")


@dataclass(frozen=True)
class ComparedIndexConfig(ConfigSection):
    """The index whose shots are compared."""

    uri: str = resource("", "folder or bucket prefix of an index of this dataset version, the index.uri of mediafm index (required)")


@dataclass(frozen=True)
class ShownRepeatsConfig(ConfigSection):
    """The table of the repeats to show."""

    uri: str = resource("", "the repeats.uri of mediafm repeats; empty = show none")


@dataclass(frozen=True)
class RepeatsConfig(ConfigSection):
    """The table of the runs of shots that titles share."""

    uri: str = resource("", "a .parquet object for the repeats (required)")
    min_seconds: float = resource(2.0, "shorter repeats are left out", min=0, below=math.inf)


@dataclass(frozen=True)
class ExploreConfig(ConfigSection):
    """The local web application. No key of this section changes what is stored."""

    host: str = resource(
        "127.0.0.1", "address to listen at; another one than 127.0.0.1, ::1 or localhost can be reached by others and demands a token"
    )
    port: int = resource(8642, "port to listen at; 0 = a free one", min=0, max=65535)
    token: str = resource("", "token that visitors need; empty = none on this machine alone, a random one otherwise")
    hosts: list[str] = resource([], "further host names by which browsers may address the application, such as that of a proxy")
    second_index: str = resource(
        "", "a second index of the same dataset version with the other vectors, fused or contextual, for likeness by these; empty = none"
    )
    storage_options: dict[str, Any] = resource({}, "options of the file system of remote videos (fsspec), as media.storage_options")
