"""The sections of a configuration: dataclasses whose fields say what a key means and whether it changes the numbers.

Sections that belong to a layer are in its ``options``; the messages of a section's own check name the key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mediafm_ray.spec import MODALITIES, resource

MIN_VECTORS_TO_TRAIN = 256  # vectors: what a byte of a product quantiser can be


@dataclass(frozen=True)
class CatalogConfig:
    """What to embed."""

    uri: str = resource("", "folder of videos, or a .parquet, .csv or .jsonl table of titles (required)")
    on_error: str = resource("fail", "at a bad row: fail = nothing is started; skip = it is recorded as a failure, the rest is done")

    def __post_init__(self) -> None:
        if self.on_error not in ("fail", "skip"):
            raise ValueError(f"catalog.on_error is fail or skip, not {self.on_error}")


@dataclass(frozen=True)
class OutputConfig:
    """Where to write."""

    uri: str = resource("", "folder or bucket prefix that receives the datasets (required)")


@dataclass(frozen=True)
class StageConfig:
    """The actor pool of one stage."""

    min_actors: int = resource(1, "actors kept, at least 1")
    max_actors: int = resource(0, "actors at most; 0 = one for every eight cores of this machine, of the detector one for every two")
    titles_per_call: int = resource(1, "titles that an actor takes at once, at most; more fill a GPU where titles are short")
    num_cpus: float = resource(0.25, "logical CPUs that Ray reserves for an actor")
    num_gpus: float = resource(0.0, "GPUs that Ray reserves for an actor; fractions share one")
    node_resource: str = resource("", "custom resource of the nodes that the actors are kept to (0.001 of it each); empty = any node")

    def __post_init__(self) -> None:
        if self.min_actors < 1 or (self.max_actors and self.max_actors < self.min_actors):
            raise ValueError(f"a stage needs 1 <= min_actors <= max_actors, has {self.min_actors} and {self.max_actors}")
        if self.titles_per_call < 1:
            raise ValueError(f"titles_per_call of a stage must be at least 1, is {self.titles_per_call}")
        if self.num_cpus < 0 or self.num_gpus < 0:
            raise ValueError("num_cpus and num_gpus of a stage cannot be negative")


def _detect_stage() -> StageConfig:
    return StageConfig(num_cpus=0.5)


STAGES = ("detect_shots", "encode_video", "encode_audio", "encode_text", "contextualise", "write")  # in order


@dataclass(frozen=True)
class ResourcesConfig:
    """What the stages run on. Nothing here changes a number in the output."""

    detect_shots: StageConfig = field(default_factory=_detect_stage)
    encode_video: StageConfig = field(default_factory=StageConfig)
    encode_audio: StageConfig = field(default_factory=StageConfig)
    encode_text: StageConfig = field(default_factory=StageConfig)
    contextualise: StageConfig = field(default_factory=StageConfig)
    write: StageConfig = field(default_factory=StageConfig)
    pools: list[str] = resource(
        [],
        "stages that share their actors, such as encode_video+encode_audio, which then ask for what the largest of them does; others have "
        "actors of their own. Empty = all stages but the detector share, where they ask for no GPU and for the same nodes",
    )
    ray_address: str = resource("", "Ray cluster to join; empty = RAY_ADDRESS if it is set, else a Ray of its own on this machine")
    object_store_gb: float = resource(0.0, "object store of a Ray of its own, in GB; 0 = Ray's default (30 % of the memory)")
    max_deaths_per_title: int = resource(
        3, "a title fails when so many processes ended while a stage worked on it (memory, crashes, lost nodes)"
    )
    no_progress_timeout_s: float = resource(
        21600.0, "seconds in which no title gets from one stage to the next until the job stops; longer than the longest title takes"
    )

    def __post_init__(self) -> None:
        if self.object_store_gb < 0 or self.no_progress_timeout_s < 0:
            raise ValueError("resources.object_store_gb and no_progress_timeout_s cannot be negative")
        for group in self.pools:
            if group not in "+".join(STAGES) or not set(group.split("+")) <= set(STAGES):
                raise ValueError(f"resources.pools: {group} is not a part of {'+'.join(STAGES)}")
        pooled = [stage for group in self.pools for stage in group.split("+")]
        if len(set(pooled)) < len(pooled):
            raise ValueError("resources.pools: a stage stands in two pools")
        if self.max_deaths_per_title < 1:
            raise ValueError(f"resources.max_deaths_per_title must be at least 1, is {self.max_deaths_per_title}")


@dataclass(frozen=True)
class RunConfig:
    """How a run ends and what it reports."""

    max_failed_fraction: float = resource(0.0, "the job exits with 1 when a larger share of the planned titles failed")
    retry_failed: bool = resource(True, "try again the titles that have a failure record")
    dry_run: bool = resource(False, "say what would be done, and what the text would cost at the embeddings API; write nothing")
    max_titles: int = resource(0, "take at most so many pending titles; 0 = all")
    log_format: str = resource("text", "text: lines for a person; json: one JSON object a line, for Loki and its like")

    def __post_init__(self) -> None:
        if self.log_format not in ("text", "json"):
            raise ValueError(f"run.log_format must be text or json, is {self.log_format!r}")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"run.max_failed_fraction must be between 0 and 1, is {self.max_failed_fraction}")
        if self.max_titles < 0:
            raise ValueError("run.max_titles cannot be negative")


@dataclass(frozen=True)
class StoredDatasetConfig:
    """Which of the output's datasets to read."""

    version: str = resource("", "dataset version, 12 hex digits; empty = the only one there is")


@dataclass(frozen=True)
class VectorsConfig:
    """Which of the committed vectors to work on."""

    kind: str = resource("contextual", "contextual (of a contextualiser) or fused (raw)")
    checkpoint: str = resource("", "the 12 hex digits behind contextual-; empty = the only checkpoint that has written")

    def __post_init__(self) -> None:
        if self.kind not in ("contextual", "fused"):
            raise ValueError(f"vectors.kind must be contextual or fused, is {self.kind!r}")


@dataclass(frozen=True)
class DerivedRunConfig:
    """How a run over committed titles goes and ends."""

    threads: int = resource(4, "titles that are read and done at once")
    max_failed_fraction: float = resource(0.0, "the job exits with 1 when a larger share of the planned titles failed")
    max_titles: int = resource(0, "take at most so many pending titles; 0 = all")

    def __post_init__(self) -> None:
        if self.threads < 1 or self.max_titles < 0:
            raise ValueError("run.threads must be at least 1, and run.max_titles not negative")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"run.max_failed_fraction must be between 0 and 1, is {self.max_failed_fraction}")


@dataclass(frozen=True)
class TableConfig:
    """The table of all titles that is written beside the dataset."""

    uri: str = resource("", "a .parquet or .jsonl object to write all titles to, with those nearest to each; empty = none")
    nearest: int = resource(3, "nearest titles to name for each")

    def __post_init__(self) -> None:
        if self.nearest < 0:
            raise ValueError("table.nearest cannot be negative")


@dataclass(frozen=True)
class ClipsConfig:
    """The clips to embed, and how."""

    uri: str = resource("", ".parquet, .csv or .jsonl table of clips: title_id, start_s, end_s, and what else is to be kept (required)")
    kind: str = resource("contextual", "contextual, contextual_alone (a clip's shots read by themselves), fused, video, audio or text")
    contextual: str = resource(
        "", "12 hex digits behind contextual-: whose stored embeddings to take where several checkpoints have written and none is given"
    )
    threads: int = resource(4, "titles read at once")

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError("clips.threads must be at least 1")


@dataclass(frozen=True)
class ClipTableConfig:
    """The table of vectors that is written."""

    uri: str = resource("", "a .parquet object for the clips with their vectors (required)")


@dataclass(frozen=True)
class LabelsConfig:
    """The labels to predict."""

    uri: str = resource("", ".parquet, .csv or .jsonl table: title_id, start_s, end_s of a clip, and its labels (required)")
    columns: list[str] = resource([], "columns of labels; empty = all but title_id, start_s, end_s and clip_id")
    group: str = resource(
        "",
        "column that says which titles belong together, such as a series or the cuts of one film: they are held out together; empty = none",
    )
    inputs: list[str] = resource(
        ["video", "audio", "text", "fused", "neighbours", "contextual_alone", "contextual"],
        "kinds of clip vectors to probe, in this order; neighbours: the fused vectors' mean over five shots",
    )
    baseline: str = resource("fused", "the input that the others are compared with; where it is not probed, the first one")
    contextual: str = resource(
        "", "12 hex digits behind contextual-: whose stored embeddings to take where several checkpoints have written and none is given"
    )
    threads: int = resource(4, "titles read at once")

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError("labels.threads must be at least 1")


@dataclass(frozen=True)
class ReportConfig:
    """Where results go."""

    uri: str = resource("", "a .json object to write all numbers to; empty = only the table on the terminal")


@dataclass(frozen=True)
class BackfillConfig:
    """What a scheduled run takes on, and when it stops."""

    order: str = resource("newest", "newest: the videos modified last go first; catalog: in the order of the catalog's rows")
    max_titles: int = resource(0, "take at most so many titles; 0 = all")
    max_video_hours: float = resource(0.0, "take no new title once so many hours of video are read; 0 = no limit")
    max_wall_minutes: float = resource(0.0, "take no new title so many minutes after the start; those begun are finished; 0 = no limit")
    max_attempts: int = resource(4, "a title that failed so often is given up until its source, or the dataset version, changes")
    retry_delay_hours: float = resource(1.0, "a failed title is tried again after so long, then after twice as long, and so on")
    recompute_stale: bool = resource(False, "compute titles, too, that are committed under another dataset version only")
    delete_missing: bool = resource(False, "delete the objects of titles that are gone from the catalog")
    max_delete_fraction: float = resource(0.1, "refuse to delete when a larger share of the committed titles is gone from the catalog")
    lease_minutes: float = resource(10.0, "after a crash, no other backfill of the dataset starts for so long; renewed while the job runs")

    def __post_init__(self) -> None:
        if self.order not in ("newest", "catalog"):
            raise ValueError(f"backfill.order must be newest or catalog, is {self.order!r}")
        for name in ("max_titles", "max_video_hours", "max_wall_minutes", "retry_delay_hours"):
            if getattr(self, name) < 0:
                raise ValueError(f"backfill.{name} cannot be negative, is {getattr(self, name)}")
        if self.max_attempts < 1 or self.lease_minutes <= 0:
            raise ValueError("backfill.max_attempts must be at least 1 and backfill.lease_minutes positive")
        if not 0 <= self.max_delete_fraction <= 1:
            raise ValueError(f"backfill.max_delete_fraction must be between 0 and 1, is {self.max_delete_fraction}")


@dataclass(frozen=True)
class VerifyConfig:
    """How the objects of an output are checked."""

    version: str = resource("", "dataset version to check; empty = all")
    repair: bool = resource(False, "delete what is broken, so that the next run computes it anew")
    threads: int = resource(8, "objects read at once; each is in memory whole")

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"verify.threads must be at least 1, is {self.threads}")


@dataclass(frozen=True)
class TitlePageConfig:
    """Where the page of the title goes."""

    path: str = resource("", "file or object to write; empty = pages/titles/<title>.html of the dataset version")


@dataclass(frozen=True)
class CatalogPagesConfig:
    """Where the pages of the catalog go, and which."""

    folder: str = resource("", "folder or bucket prefix that receives index.html and titles/; empty = pages/ of the dataset version")
    title_pages: bool = resource(False, "write the page of every committed title, too; without it the list links to those that are there")


@dataclass(frozen=True)
class DatasetConfig(StoredDatasetConfig):
    """What to train on: what ``jobs.embed_catalog`` wrote."""

    uri: str = resource("", "folder or bucket prefix that embed_catalog wrote to, its output.uri (required)")


@dataclass(frozen=True)
class CheckpointConfig:
    """Where the trained model goes."""

    uri: str = resource("", "folder or bucket prefix of one training; receives config.json, model.safetensors and the state (required)")


@dataclass(frozen=True)
class TrainingResourcesConfig:
    """What training runs on. It changes no number but those of dropout, and the last digits."""

    workers: int = resource(1, "processes that share every step; with training.device=cuda each has a GPU of its own")
    num_cpus: float = resource(1.0, "logical CPUs that Ray reserves for a worker")
    max_restarts: int = resource(3, "times that workers which died are replaced; training then goes on from the last saved state")
    ray_address: str = resource("", "Ray cluster to join; empty = RAY_ADDRESS if it is set, else a Ray of its own on this machine")

    def __post_init__(self) -> None:
        if self.workers < 1 or self.max_restarts < 0 or self.num_cpus < 0:
            raise ValueError("resources.workers must be at least 1, and max_restarts and num_cpus of resources not negative")


@dataclass(frozen=True)
class IndexConfig:
    """Where the index of shots is, what stands in it, and how well it must find."""

    uri: str = resource("", "folder or bucket prefix of its own that holds the index, a Lance dataset (required)")
    parts: list[str] = resource(
        ["video", "audio", "text"], "modalities whose own vectors can be searched, too; each adds its dimensions to the index"
    )
    least_shots: int = resource(
        20_000, "from so many vectors on a column gets a vector index, which is searched approximately; fewer are searched exactly"
    )
    recall: float = resource(0.97, "recall@10 that the vector index must reach on sampled shots; what it takes to reach it is recorded")
    queries: int = resource(200, "shots that are drawn to measure recall@10 against exact search")
    replace: bool = resource(False, "build anew in the place of an index of another dataset version, of other vectors or other parts")
    keep_hours: float = resource(24.0, "versions before the last are deleted after so long; a search may still be reading them")
    lease_minutes: float = resource(10.0, "after a crash, no other build of the index starts for so long; renewed while the job runs")

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in MODALITIES]
        if unknown or len(set(self.parts)) != len(self.parts):
            raise ValueError(f"index.parts are some of {', '.join(MODALITIES)}, each once; not {', '.join(self.parts)}")
        if self.least_shots < MIN_VECTORS_TO_TRAIN or self.queries < 1:
            raise ValueError(f"index.least_shots must be at least {MIN_VECTORS_TO_TRAIN}, and index.queries at least 1")
        if not 0 < self.recall <= 1:
            raise ValueError(f"index.recall must be above 0 and up to 1, is {self.recall}")
        if self.keep_hours < 0 or self.lease_minutes <= 0:
            raise ValueError("index.keep_hours cannot be negative, and index.lease_minutes must be positive")


@dataclass(frozen=True)
class SearchedIndexConfig:
    """Which index to search."""

    uri: str = resource("", "folder or bucket prefix of an index, the index.uri of mediafm index (required)")
    version: str = resource("", "dataset version that it must be of, 12 hex digits; empty = any")
    vectors: str = resource("", "vectors that it must hold, fused or contextual; empty = any")
    exact: bool = resource(False, "look at every shot instead of asking the vector index")

    def __post_init__(self) -> None:
        if self.vectors not in ("", "fused", "contextual"):
            raise ValueError(f"index.vectors must be fused or contextual, is {self.vectors!r}")


@dataclass(frozen=True)
class FilterConfig:
    """Which shots may be found."""

    titles: list[str] = resource([], "of these titles only; empty = of all")
    without_titles: list[str] = resource([], "of none of these titles")
    other_titles: bool = resource(False, "of other titles only than that of the shot or clip that is asked for")
    start_s: float | None = resource(None, "that end after this second of their title; null = any")
    end_s: float | None = resource(None, "that begin before this second of their title; null = any")
    languages: list[str] = resource([], "whose text is in one of these languages; en finds en-US, too; empty = any, and none")

    def __post_init__(self) -> None:
        for name in ("start_s", "end_s"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise ValueError(f"filter.{name} must be a finite number of seconds, is {value}")
        if self.start_s is not None and self.end_s is not None and self.start_s >= self.end_s:
            raise ValueError(f"filter.end_s ({self.end_s:g}) must come after filter.start_s ({self.start_s:g})")
