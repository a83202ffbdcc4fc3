"""The configuration of each job, composed of sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from mediafm_ray.config.sections import (
    BackfillConfig,
    CatalogConfig,
    CatalogPagesConfig,
    CheckpointConfig,
    ClipsConfig,
    ClipTableConfig,
    DatasetConfig,
    DerivedRunConfig,
    FilterConfig,
    IndexConfig,
    LabelsConfig,
    OutputConfig,
    ReportConfig,
    ResourcesConfig,
    RunConfig,
    SearchedIndexConfig,
    StoredDatasetConfig,
    TableConfig,
    TitlePageConfig,
    TrainingResourcesConfig,
    VectorsConfig,
    VerifyConfig,
)
from mediafm_ray.downstream.options import ProbesConfig, ScenesConfig
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.models.options import (
    AudioEncoderConfig,
    ContextualiserConfig,
    DetectorConfig,
    FusionConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)
from mediafm_ray.spec import MODALITIES, resource
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.training.options import ShapeConfig, TrainingConfig

MAX_RESULTS = 1000  # of one search


@dataclass(frozen=True)
class EmbedCatalogConfig:
    """Everything that ``jobs.embed_catalog`` takes."""

    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    run: RunConfig = field(default_factory=RunConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    timed_text: TimedTextConfig = field(default_factory=TimedTextConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    video: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    audio: AudioEncoderConfig = field(default_factory=AudioEncoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    contextualiser: ContextualiserConfig = field(default_factory=ContextualiserConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class ContextualiseCatalogConfig:
    """Everything that ``jobs.contextualise_catalog`` takes."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    run: RunConfig = field(default_factory=RunConfig)
    contextualiser: ContextualiserConfig = field(default_factory=ContextualiserConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class SegmentScenesConfig:
    """Everything that ``jobs.segment_scenes`` takes."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    run: DerivedRunConfig = field(default_factory=DerivedRunConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class DescribeTitlesConfig:
    """Everything that ``jobs.describe_titles`` takes."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    table: TableConfig = field(default_factory=TableConfig)
    run: DerivedRunConfig = field(default_factory=DerivedRunConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


def _no_contextualiser() -> ContextualiserConfig:
    """What a job that reads stored contextual embeddings computes by itself: nothing, unless it is told a checkpoint."""
    return ContextualiserConfig(checkpoint="")


@dataclass(frozen=True)
class EmbedClipsConfig:
    """Everything that ``jobs.embed_clips`` takes."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    contextualiser: ContextualiserConfig = field(default_factory=_no_contextualiser)
    table: ClipTableConfig = field(default_factory=ClipTableConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class EvaluateProbesConfig:
    """Everything that ``jobs.evaluate_probes`` takes."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    contextualiser: ContextualiserConfig = field(default_factory=_no_contextualiser)
    report: ReportConfig = field(default_factory=ReportConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class BackfillCatalogConfig(EmbedCatalogConfig):
    """Everything that ``jobs.backfill_catalog`` takes."""

    backfill: BackfillConfig = field(default_factory=BackfillConfig)

    def __post_init__(self) -> None:
        if self.run.max_titles or not self.run.retry_failed:
            raise ValueError(
                "run.max_titles and run.retry_failed are for mediafm embed; for a backfill set backfill.max_titles and max_attempts"
            )


@dataclass(frozen=True)
class VerifyDatasetConfig:
    """Everything that ``jobs.verify_dataset`` takes."""

    output: OutputConfig = field(default_factory=OutputConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class ReportTitleConfig:
    """Everything that ``jobs.report_title`` takes."""

    title_id: str = resource("", "the title to show (required)")
    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    report: TitlePageConfig = field(default_factory=TitlePageConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class ReportCatalogConfig:
    """Everything that ``jobs.report_catalog`` takes."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    report: CatalogPagesConfig = field(default_factory=CatalogPagesConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class TrainContextualiserConfig:
    """Everything that ``jobs.train_contextualiser`` takes."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    model: ShapeConfig = field(default_factory=ShapeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    resources: TrainingResourcesConfig = field(default_factory=TrainingResourcesConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class BuildIndexConfig:
    """Everything that ``jobs.build_index`` takes."""

    index: IndexConfig = field(default_factory=IndexConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    run: DerivedRunConfig = field(default_factory=DerivedRunConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class SearchShotsConfig:
    """Everything that ``jobs.search_shots`` takes."""

    shot: str = resource("", "TITLE:INDEX of the shot whose like is wanted")
    clip: str = resource("", "TITLE:START-END, in seconds, of the clip whose like is wanted")
    query: str = resource("", "words that say what is wanted")
    by: str = resource(
        "", "vectors to compare: all (fused or contextual, as the index has them), video, audio or text; empty = all, and text for words"
    )
    count: int = resource(10, "shots to find")
    format: str = resource("table", "table or json")
    index: SearchedIndexConfig = field(default_factory=SearchedIndexConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    video: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if self.by not in ("", "all", *MODALITIES):
            raise ValueError(f"by must be one of all, {', '.join(MODALITIES)}; is {self.by!r}")
        if self.format not in ("table", "json"):
            raise ValueError(f"format must be table or json, is {self.format!r}")
        if not 1 <= self.count <= MAX_RESULTS:
            raise ValueError(f"count must be from 1 to {MAX_RESULTS}, is {self.count}")
