"""The stages of the pipeline in their order. No ray here: ``graph`` puts them into actors.

Each applies one part of the layers below to the row of a title. Torch is imported in the constructors, where models are built.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from mediafm_ray.errors import CardError
from mediafm_ray.media.loudness import audio_levels
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.models.encoder import (
    BudgetExceeded,
    build_audio_encoder,
    build_text_encoder,
    build_video_encoder,
    encoder_sample_rate,
)
from mediafm_ray.models.fusion import fuse
from mediafm_ray.models.options import (
    AudioEncoderConfig,
    ContextualiserConfig,
    DetectorConfig,
    FusionConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)
from mediafm_ray.models.shot_statistics import shot_statistics
from mediafm_ray.pipeline.rows import (
    AUDIO,
    FLAGS,
    FRAMES,
    NORMS,
    SHOTS,
    Stage,
    TitleRow,
    list_cell,
    nested_cell,
    packed_array,
    to_json,
    vectors_cell,
    vectors_type,
)
from mediafm_ray.spec import MODALITIES, SAMPLE_RATE
from mediafm_ray.storage.store import StorageConfig, fsspec_options

CAP_REACHED = "max_cost_usd"  # The limit that ended the budget of a run.


class TitleBudget(Protocol):
    """Decides whether the run takes another title, for all actors of a job (budget.SharedBudget)."""

    def take(self, title_id: str) -> bool:
        """Begin a title; return False where the run takes no more."""
        ...

    def was_read(self, title_id: str, duration_s: float) -> None:
        """Note the true seconds of video of a title that has begun."""
        ...

    def give_back(self, title_id: str, reason: str) -> None:
        """Note that a title that has begun cannot be finished in this run, and take no more titles."""
        ...


class DetectShots(Stage):
    """Step 1: read a video once for its shots and their frames, audio and text."""

    name = "detect_shots"
    takes = ("title_id", "video", "timed_text")

    def __init__(
        self,
        detector: DetectorConfig,
        frames: FramesConfig,
        timed_text: TimedTextConfig,
        media: MediaConfig,
        storage: StorageConfig,
        budget: TitleBudget | None = None,
        sample_rate: int = SAMPLE_RATE,
    ):
        """``budget`` decides whether the run takes another title; without it, all are taken. ``sample_rate``: of the sound."""
        from mediafm_ray.media.isolation import IsolatedReader
        from mediafm_ray.models.detector import ShotDetector

        self.detector = ShotDetector(detector)
        self.media, self.storage, self.budget = media, storage, budget
        self.reader = IsolatedReader(frames, timed_text, media, sample_rate)

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {"shots": SHOTS, "frames": FRAMES, "audio": AUDIO, "sample_rate": pa.int32(), "media": pa.string()}

    def process(self, row: TitleRow) -> Mapping[str, Any] | None:
        title = row.title()
        if self.budget is not None and not self.budget.take(title.title_id):
            return None
        self.reader.media = media_options(self.media, title.video, self.storage)
        try:
            media = self.reader.read(title, self.detector.stream())
        except CardError as error:
            media = self.reader.read(title, self.detector.stream(), not_on_card=str(error))
        self.measure("frames_decoded", media.frame_count)
        self.measure("bytes_read", media.facts["bytes"])
        if self.budget is not None:
            self.budget.was_read(title.title_id, media.duration_s)
        shots = [
            {
                **dataclasses.asdict(shot.span),
                "start_s": shot.start_s,
                "end_s": shot.end_s,
                "text": shot.text,
                "language": shot.language,
                "thumbnail": shot.thumbnail,
                "audio_levels": audio_levels(np.frombuffer(shot.audio, "<i2"), self.reader.sample_rate),
            }
            for shot in media.shots
        ]
        statistics = dataclasses.asdict(shot_statistics([shot.end_s - shot.start_s for shot in media.shots]))
        implausible = statistics.pop("warning")
        facts = {
            "duration_s": media.duration_s,
            "frame_count": media.frame_count,
            "warnings": [*media.warnings, *([implausible] if implausible else [])],
            "facts": dict(media.facts),
            "shot_statistics": statistics,
        }
        return {
            "shots": shots,
            "frames": nested_cell(packed_array(media.frames), [len(shot.frames) for shot in media.shots]),
            "audio": list_cell(packed_array(media.audio)),
            "sample_rate": self.reader.sample_rate,
            "media": to_json(facts),
        }


def media_options(media: MediaConfig, uri: str, storage: StorageConfig) -> MediaConfig:
    """Return the configuration for reading a video, with the storage layer's access to object storage."""
    return dataclasses.replace(media, storage_options={**fsspec_options(uri, storage), **media.storage_options})


class EncodeShots(Stage):
    """Base class of the encoders of frames and of audio: one call encodes the shots of all titles of a block."""

    modality: ClassVar[str]
    supports_batching = True
    encoder: Any  # It has dim and encode, as in models.encoder.

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {f"{self.modality}_embeddings": vectors_type(self.encoder.dim), f"has_{self.modality}": FLAGS}

    @abstractmethod
    def shots(self, row: TitleRow) -> Sequence[Any]:
        """Return the encoder's input for each shot of a title."""

    def process(self, row: TitleRow) -> Mapping[str, Any]:
        return self.process_together([row])[0]

    def process_together(self, rows: Sequence[TitleRow]) -> Sequence[Mapping[str, Any]]:
        titles = [self.shots(row) for row in rows]
        encoded = self.encoder.encode([shot for shots in titles for shot in shots])
        ends = np.cumsum([len(shots) for shots in titles])
        parts = zip(np.split(encoded.embeddings_SD, ends[:-1]), np.split(encoded.present_S, ends[:-1]), strict=True)
        return [
            {f"{self.modality}_embeddings": vectors_cell(vectors_SD), f"has_{self.modality}": present_S.tolist()}
            for vectors_SD, present_S in parts
        ]


class EncodeVideo(EncodeShots):
    """Step 2: encode the frames of each shot as its video embedding."""

    name = "encode_video"
    modality = "video"
    takes = drops = ("frames",)

    def __init__(self, config: VideoEncoderConfig):
        self.encoder = build_video_encoder(config)

    def shots(self, row: TitleRow) -> Sequence[Any]:
        """Return the JPEG files of each shot."""
        return list(row.frames("frames"))


class EncodeAudio(EncodeShots):
    """Step 3: encode the samples of each shot as its audio embedding."""

    name = "encode_audio"
    modality = "audio"
    takes = drops = ("audio", "sample_rate")

    def __init__(self, config: AudioEncoderConfig):
        self.encoder, self.sample_rate = build_audio_encoder(config), encoder_sample_rate(config)

    def shots(self, row: TitleRow) -> Sequence[Any]:
        """Return the int16 samples of each shot."""
        if row["sample_rate"] != self.sample_rate:
            raise ValueError(
                f"its sound has {row['sample_rate']} Hz and the audio encoder takes {self.sample_rate} Hz: "
                "audio.weights must be the same checkpoint on every machine"
            )
        return list(row.byte_strings("audio"))


class EncodeText(Stage):
    """Step 4: encode the text of each shot, and the synopsis and tags of the title."""

    name = "encode_text"
    takes = ("shots", "synopsis", "tags")

    def __init__(self, config: TextEncoderConfig, allowance: Any = None, budget: TitleBudget | None = None):
        """``allowance``: the limits of the embeddings API that all actors of a job share (text_api.Allowance), where the encoder uses it.

        ``budget``: takes no more titles once the cost cap is reached.
        """
        self.encoder, self.budget = build_text_encoder(config, allowance), budget

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {
            "text_embeddings": vectors_type(self.encoder.dim),
            "has_text": FLAGS,
            "metadata_embedding": pa.list_(pa.float32()),  # Null where the title has neither synopsis nor tags.
        }

    def process(self, row: TitleRow) -> Mapping[str, Any] | None:
        shots = [shot["text"] for shot in row["shots"]]
        before = self._usage()
        try:
            # One call, which an API answers to one request.
            encoded = self.encoder.encode([*shots, metadata_text(row["synopsis"], row["tags"])])
        except BudgetExceeded:
            if self.budget is not None:
                self.budget.give_back(row.title_id, CAP_REACHED)
            return None
        finally:  # The usage of a failed title counts as well.
            for name, used in self._usage().items():
                self.measure(name, used - before[name])
        return {
            "text_embeddings": vectors_cell(encoded.embeddings_SD[:-1]),
            "has_text": encoded.present_S[:-1].tolist(),
            "metadata_embedding": encoded.embeddings_SD[-1].tolist() if encoded.present_S[-1] else None,
        }

    def _usage(self) -> dict[str, float]:
        """Return the encoder's usage of an API so far; empty where it uses none."""
        usage = getattr(self.encoder, "usage", None)
        return dataclasses.asdict(usage) if usage else {}


def metadata_text(synopsis: str, tags: list[str]) -> str:
    """Return the text that is embedded for [GLOBAL]: the synopsis, then the tags; empty where a title has neither."""
    return "\n".join(part for part in (synopsis.strip(), ", ".join(tag.strip() for tag in tags)) if part)


class Fuse(Stage):
    """Step 5: fuse the three embeddings of each shot into one unit vector."""

    name = "fuse"
    takes = tuple(f"{modality}_embeddings" for modality in MODALITIES)
    drops = takes

    def __init__(self, fused_dim: int, config: FusionConfig):
        self.fused_dim, self.config = fused_dim, config

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {"fused_embeddings": vectors_type(self.fused_dim), "fused_norms": NORMS}

    def process(self, row: TitleRow) -> Mapping[str, Any]:
        fused_SD, norms_S = fuse({modality: row.vectors(f"{modality}_embeddings") for modality in MODALITIES}, self.config)
        return {"fused_embeddings": vectors_cell(fused_SD), "fused_norms": norms_S.tolist()}


class Contextualise(Stage):
    """Step 6: set the fused embeddings in the context of the title; [CLS] gives one vector for the title."""

    name = "contextualise"
    takes = ("shots", "fused_embeddings", "metadata_embedding")
    supports_batching = True

    def __init__(self, config: ContextualiserConfig, contextual_dim: int):
        from mediafm_ray.models.contextualiser import TitleContextualiser

        self.contextualiser = TitleContextualiser(config)
        self.contextual_dim = contextual_dim

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {"contextual_embeddings": vectors_type(self.contextual_dim), "cls_embedding": pa.list_(pa.float32())}

    def process(self, row: TitleRow) -> Mapping[str, Any]:
        return self.process_together([row])[0]

    def process_together(self, rows: Sequence[TitleRow]) -> Sequence[Mapping[str, Any]]:
        from mediafm_ray.models.contextualiser import TitleShots, shot_times

        titles = []
        for row in rows:
            metadata, shots = row["metadata_embedding"], row.values("shots")
            times_S2 = shot_times(shots.field("start_s").to_numpy(), shots.field("end_s").to_numpy())
            metadata_M = None if metadata is None else np.asarray(metadata, np.float32)
            titles.append(TitleShots(row.vectors("fused_embeddings"), metadata_M, times_S2))
        return [
            {"contextual_embeddings": vectors_cell(contextual_SD), "cls_embedding": cls_D.tolist()}
            for contextual_SD, cls_D in self.contextualiser.contextualise_together(titles)
        ]
