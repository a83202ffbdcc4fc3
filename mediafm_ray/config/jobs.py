"""The configurations of the jobs, composed of sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from mediafm_ray.config.sections import (
    BackfillConfig,
    CatalogConfig,
    CatalogPagesConfig,
    CheckpointConfig,
    ClipsConfig,
    ClipTableConfig,
    CompactConfig,
    ComparedIndexConfig,
    DatasetConfig,
    DerivedRunConfig,
    ExploreConfig,
    FilterConfig,
    IndexConfig,
    LabelsConfig,
    OutputConfig,
    RepeatsConfig,
    ReportConfig,
    ResourcesConfig,
    RunConfig,
    SearchedIndexConfig,
    ShownRepeatsConfig,
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
from mediafm_ray.spec import MODALITIES, ConfigSection, resource
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.training.options import ShapeConfig, TrainingConfig

MAX_RESULTS = 1000  # Shots that one search can return.


@dataclass(frozen=True)
class EmbedCatalogConfig:
    """All keys of ``jobs.embed_catalog``."""

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
    """All keys of ``jobs.contextualise_catalog``."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    run: RunConfig = field(default_factory=RunConfig)
    contextualiser: ContextualiserConfig = field(default_factory=ContextualiserConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class SegmentScenesConfig:
    """All keys of ``jobs.segment_scenes``."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    run: DerivedRunConfig = field(default_factory=DerivedRunConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class DescribeTitlesConfig:
    """All keys of ``jobs.describe_titles``."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    table: TableConfig = field(default_factory=TableConfig)
    run: DerivedRunConfig = field(default_factory=DerivedRunConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


def _no_contextualiser() -> ContextualiserConfig:
    """Return the default of jobs that read stored contextual embeddings: without a checkpoint they compute none."""
    return ContextualiserConfig(checkpoint="")


@dataclass(frozen=True)
class EmbedClipsConfig:
    """All keys of ``jobs.embed_clips``."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    contextualiser: ContextualiserConfig = field(default_factory=_no_contextualiser)
    table: ClipTableConfig = field(default_factory=ClipTableConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class EvaluateProbesConfig:
    """All keys of ``jobs.evaluate_probes``."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    contextualiser: ContextualiserConfig = field(default_factory=_no_contextualiser)
    report: ReportConfig = field(default_factory=ReportConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class BackfillCatalogConfig(EmbedCatalogConfig):
    """All keys of ``jobs.backfill_catalog``."""

    backfill: BackfillConfig = field(default_factory=BackfillConfig)

    def __post_init__(self) -> None:
        if self.run.max_titles or not self.run.retry_failed:
            raise ValueError("run.max_titles and run.retry_failed are for mediafm embed; set backfill.max_titles and backfill.max_attempts")
        if self.run.shards != RunConfig.shards:
            raise ValueError("run.shards is for mediafm embed: a backfill has all titles of a catalog, and one lease")


@dataclass(frozen=True)
class CompactDatasetConfig:
    """All keys of ``jobs.compact_dataset``."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    compact: CompactConfig = field(default_factory=CompactConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class VerifyDatasetConfig:
    """All keys of ``jobs.verify_dataset``."""

    output: OutputConfig = field(default_factory=OutputConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class ReportTitleConfig:
    """All keys of ``jobs.report_title``."""

    title_id: str = resource("", "the title to show (required)")
    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    report: TitlePageConfig = field(default_factory=TitlePageConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class ReportCatalogConfig:
    """All keys of ``jobs.report_catalog``."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    report: CatalogPagesConfig = field(default_factory=CatalogPagesConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class TrainContextualiserConfig:
    """All keys of ``jobs.train_contextualiser``."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    model: ShapeConfig = field(default_factory=ShapeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    resources: TrainingResourcesConfig = field(default_factory=TrainingResourcesConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class BuildIndexConfig:
    """All keys of ``jobs.build_index``."""

    index: IndexConfig = field(default_factory=IndexConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    run: DerivedRunConfig = field(default_factory=DerivedRunConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class SearchShotsConfig(ConfigSection):
    """All keys of ``jobs.search_shots``."""

    shot: str = resource("", "TITLE:INDEX of the shot to search with")
    clip: str = resource("", "TITLE:START-END, in seconds, of the clip to search with")
    query: str = resource("", "words to search with")
    by: str = resource(
        "",
        "vectors to compare: all (fused or contextual, as in the index), video, audio or text; empty = text for words, otherwise all",
        choices=("", "all", *MODALITIES),
    )
    count: int = resource(10, "number of shots to return", min=1, max=MAX_RESULTS)
    format: str = resource("table", "output format", choices=("table", "json"))
    index: SearchedIndexConfig = field(default_factory=SearchedIndexConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    video: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    audio: AudioEncoderConfig = field(default_factory=AudioEncoderConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class FindRepeatsConfig:
    """All keys of ``jobs.find_repeats``."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    index: ComparedIndexConfig = field(default_factory=ComparedIndexConfig)
    repeats: RepeatsConfig = field(default_factory=RepeatsConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True)
class ExploreCatalogConfig:
    """All keys of ``jobs.explore_catalog``."""

    output: OutputConfig = field(default_factory=OutputConfig)
    dataset: StoredDatasetConfig = field(default_factory=StoredDatasetConfig)
    index: SearchedIndexConfig = field(default_factory=SearchedIndexConfig)
    repeats: ShownRepeatsConfig = field(default_factory=ShownRepeatsConfig)
    explore: ExploreConfig = field(default_factory=ExploreConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    video: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    audio: AudioEncoderConfig = field(default_factory=AudioEncoderConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
