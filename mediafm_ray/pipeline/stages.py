"""The stages of the pipeline, in the order in which a title meets them. No ray here: ``graph`` puts them into actors and tasks.

Each joins one piece of the layers below to the row of a title; torch is imported where a model is built, in the constructor.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from mediafm_ray.media.loudness import audio_levels
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.models.encoder import BudgetExceeded, build_audio_encoder, build_text_encoder, build_video_encoder
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
    TitleLeft,
    TitleRow,
    error_value,
    list_cell,
    nested_cell,
    packed_array,
    to_json,
    vectors_cell,
    vectors_type,
    was_left,
)
from mediafm_ray.spec import MODALITIES, CardError, public_line, public_uri
from mediafm_ray.storage.dataset import FAILURES, Model, Output, contextual, object_name, record_failure, sibling
from mediafm_ray.storage.dataset import SHOTS as SHOTS_DATASET
from mediafm_ray.storage.schemas import contextual_schema, embedding_array, encode_parquet, shots_schema
from mediafm_ray.storage.store import StorageConfig, fsspec_options

CAP_REACHED = "max_cost_usd"  # why a run took no more titles
FACTS = ("title_id", "source", "video", "dataset_version", "dims", "spans")  # that the objects of a title share


class TitleBudget(Protocol):
    """Decides whether the run takes another title; one for all actors of a job (budget.SharedBudget)."""

    def take(self, title_id: str) -> None:
        """Begin a title. Raises TitleLeft when the run takes no more."""
        ...

    def was_read(self, title_id: str, duration_s: float) -> None:
        """A title that was begun turned out to have so many seconds of video."""
        ...

    def give_back(self, title_id: str, reason: str) -> None:
        """A title that was begun cannot be finished in this run, nor can others: take no more."""
        ...


class DetectShots(Stage):
    """Step 1: one pass over the container gives the shots, and of each its frames, audio and text."""

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
    ):
        """``budget``: who decides whether the run takes another title; without it, all are taken."""
        from mediafm_ray.media.isolation import IsolatedReader
        from mediafm_ray.models.transnet import ShotDetector

        self.detector = ShotDetector(detector)
        self.media, self.storage, self.budget = media, storage, budget
        self.reader = IsolatedReader(frames, timed_text, media)

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {"shots": SHOTS, "frames": FRAMES, "audio": AUDIO, "media": pa.string()}

    def process(self, row: TitleRow) -> Mapping[str, Any]:
        title = row.title()
        if self.budget is not None:
            self.budget.take(title.title_id)
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
                "audio_levels": audio_levels(np.frombuffer(shot.audio, "<i2")),
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
            "media": to_json(facts),
        }


def media_options(media: MediaConfig, uri: str, storage: StorageConfig) -> MediaConfig:
    """The media layer's configuration for a video at a URI: it reaches object storage as the storage layer does."""
    return dataclasses.replace(media, storage_options={**fsspec_options(uri, storage), **media.storage_options})


class EncodeShots(Stage):
    """What encoding frames and encoding audio have in common: the shots of all titles at hand go through the encoder in one call."""

    modality: ClassVar[str]
    gains_from_several = True
    encoder: Any  # models.encoder: dim, encode

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {f"{self.modality}_embeddings": vectors_type(self.encoder.dim), f"has_{self.modality}": FLAGS}

    @abstractmethod
    def shots(self, row: TitleRow) -> Sequence[Any]:
        """What the encoder takes of each shot of a title."""

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
    """Step 2: the frames of each shot become its video embedding."""

    name = "encode_video"
    modality = "video"
    takes = drops = ("frames",)

    def __init__(self, config: VideoEncoderConfig):
        self.encoder = build_video_encoder(config)

    def shots(self, row: TitleRow) -> Sequence[Any]:
        """Each shot's JPEG files."""
        return list(row.frames("frames"))


class EncodeAudio(EncodeShots):
    """Step 3: the samples of each shot become its audio embedding."""

    name = "encode_audio"
    modality = "audio"
    takes = drops = ("audio",)

    def __init__(self, config: AudioEncoderConfig):
        self.encoder = build_audio_encoder(config)

    def shots(self, row: TitleRow) -> Sequence[Any]:
        """Each shot's int16 samples."""
        return list(row.byte_strings("audio"))


class EncodeText(Stage):
    """Step 4: the text of each shot, and the title's synopsis and tags, become embeddings."""

    name = "encode_text"
    takes = ("shots", "synopsis", "tags")

    def __init__(self, config: TextEncoderConfig, allowance: Any = None, budget: TitleBudget | None = None):
        """``allowance``: the limits that all actors of a job share, where the encoder asks an API (text_api.Allowance); ``budget``: who is
        told that the run can take no more titles because what may be spent is spent."""
        self.encoder, self.budget = build_text_encoder(config, allowance), budget

    @property
    def adds(self) -> Mapping[str, pa.DataType]:
        return {
            "text_embeddings": vectors_type(self.encoder.dim),
            "has_text": FLAGS,
            "metadata_embedding": pa.list_(pa.float32()),  # null where the title has neither synopsis nor tags
        }

    def process(self, row: TitleRow) -> Mapping[str, Any]:
        shots = [shot["text"] for shot in row["shots"]]
        before = self._usage()
        try:
            encoded = self.encoder.encode(
                [*shots, metadata_text(row["synopsis"], row["tags"])]
            )  # one call: one request where an API is asked
        except BudgetExceeded as error:
            if self.budget is not None:
                self.budget.give_back(row.title_id, CAP_REACHED)
            raise TitleLeft(str(error)) from None
        finally:  # what a failed title used counts, too
            for name, used in self._usage().items():
                self.measure(name, used - before[name])
        return {
            "text_embeddings": vectors_cell(encoded.embeddings_SD[:-1]),
            "has_text": encoded.present_S[:-1].tolist(),
            "metadata_embedding": encoded.embeddings_SD[-1].tolist() if encoded.present_S[-1] else None,
        }

    def _usage(self) -> dict[str, float]:
        """What the encoder has asked of an API so far; nothing where it asks none."""
        usage = getattr(self.encoder, "usage", None)
        return dataclasses.asdict(usage) if usage else {}


def metadata_text(synopsis: str, tags: list[str]) -> str:
    """What is embedded for [GLOBAL]: the synopsis, then the tags; empty where a title has neither."""
    return "\n".join(part for part in (synopsis.strip(), ", ".join(tag.strip() for tag in tags)) if part)


class Fuse(Stage):
    """Step 5: the three embeddings of a shot become one unit vector."""

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
    """Step 6: the sequence of fused embeddings becomes contextual embeddings, and [CLS] one vector for the title."""

    name = "contextualise"
    takes = ("shots", "fused_embeddings", "metadata_embedding")
    gains_from_several = True

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
            metadata, shots = row["metadata_embedding"], row.table.column("shots")[0].values
            times_S2 = shot_times(shots.field("start_s").to_numpy(), shots.field("end_s").to_numpy())
            metadata_M = None if metadata is None else np.asarray(metadata, np.float32)
            titles.append(TitleShots(row.vectors("fused_embeddings"), metadata_M, times_S2))
        return [
            {"contextual_embeddings": vectors_cell(contextual_SD), "cls_embedding": cls_D.tolist()}
            for contextual_SD, cls_D in self.contextualiser.contextualise_together(titles)
        ]


class WriteTitle(Stage):
    """Step 7: the finished title becomes one object a dataset, the failed one a failure record; afterwards only its result is left.

    The shots are put last of a title's datasets and superseded objects are removed after that, so that a title is never without a
    committed object once it had one.
    """

    name = "write"
    takes = ("title_id", "source", "video", "superseded", "shots", "media", "has_video", "has_audio", "has_text", "fused_embeddings")
    adds: ClassVar[Mapping[str, pa.DataType]] = {
        "shot_count": pa.int64(),
        "duration_s": pa.float64(),
        "warnings": pa.list_(pa.string()),
        "bytes_written": pa.int64(),
    }

    def __init__(self, output_uri: str, model: Model, checkpoint: str, storage: StorageConfig):
        self.output = Output(output_uri, model.dataset_version, storage)
        self.model, self.checkpoint = model, checkpoint

    def process(self, row: TitleRow) -> Mapping[str, Any]:
        media, shots, title_id, source = json.loads(row["media"]), row["shots"], row.title_id, row["source"]
        files = {}
        if self.checkpoint:
            files[contextual(self.checkpoint)] = self._contextual_file(row, shots)
        files[SHOTS_DATASET] = self._shots_file(row, shots, media)
        for dataset, content in files.items():
            own = self.output.write(dataset, title_id, source, content)
        return {
            "shot_count": len(shots),
            "duration_s": media["duration_s"],
            "warnings": media["warnings"] + remove_superseded(self.output, own, [*row["superseded"], sibling(own, FAILURES)]),
            "bytes_written": sum(map(len, files.values())),
        }

    def __call__(self, table: pa.Table) -> pa.Table:
        """Commit or record every title; the rows that are left say how each ended."""
        table = super().__call__(table)
        if table.num_columns == 0:
            return table
        errors = table.column("error").to_pylist()
        for index, error in enumerate(errors):
            if error is not None and not was_left(error):
                row = TitleRow(table.slice(index, 1))
                try:
                    self._record_failure(row, error)
                except Exception as failure:  # the store is gone too: the driver still hears of both
                    unrecorded = error_value(self.name, failure)["message"]
                    errors[index] = {**error, "message": f"{error['message']} (and its failure record could not be written: {unrecorded})"}
        kept = ["title_id", "source", "seconds", "measures", *self.adds]
        return table.select(kept).append_column("error", pa.array(errors, table.schema.field("error").type))

    def _record_failure(self, row: TitleRow, error: Mapping[str, str]) -> None:
        title = {"title_id": row.title_id, "source": row["source"], "video": public_uri(row["video"])}
        record_failure(self.output, object_name(FAILURES, row.title_id, row["source"]), title, error)
        for older in row["superseded"]:
            if older.startswith(f"{FAILURES}/"):
                self.output.store.delete(older)

    def _shots_file(self, row: TitleRow, shots: list[dict[str, Any]], media: Mapping[str, Any]) -> bytes:
        metadata = row["metadata_embedding"]
        facts = {
            **self._facts(row),
            "media": media,
            "metadata_embedding": None if metadata is None else _base64(metadata),
        }
        columns: dict[str, Any] = {name: [shot[name] for shot in shots] for name in SHOTS.value_type.names}
        columns |= {
            "title_id": [row.title_id] * len(shots),
            "shot_index": range(len(shots)),
            "has_video": row["has_video"],
            "has_audio": row["has_audio"],
            "has_text": row["has_text"],
            "fused_embedding": embedding_array(row.vectors("fused_embeddings")),
            "fused_norm": row["fused_norms"],
        }
        return encode_parquet(_table(columns, shots_schema(self.model.dims["fused"])), facts)

    def _contextual_file(self, row: TitleRow, shots: list[dict[str, Any]]) -> bytes:
        times = [shot["start_s"] for shot in shots], [shot["end_s"] for shot in shots]
        cls_D = np.asarray(row["cls_embedding"], np.float32)
        return contextual_file(self._facts(row), self.checkpoint, times, row.vectors("contextual_embeddings"), cls_D)

    def _facts(self, row: TitleRow) -> dict[str, Any]:
        return {
            "title_id": row.title_id,
            "source": row["source"],
            "video": public_uri(row["video"]),
            "dataset_version": self.model.dataset_version,
            "dims": dict(self.model.dims),
            "spans": {name: list(span) for name, span in self.model.spans.items()},
        }


def contextual_file(
    facts: Mapping[str, Any], checkpoint: str, times: tuple[Iterable[float], Iterable[float]], contextual_SD: np.ndarray, cls_D: np.ndarray
) -> bytes:
    """The object of a title in the dataset of a checkpoint. ``facts``: what its object in ``shots`` says of title and model;
    ``times``: the starts and the ends of its shots, in seconds."""
    vectors = embedding_array(contextual_SD)
    columns = {
        "title_id": [facts["title_id"]] * len(vectors),
        "shot_index": range(len(vectors)),
        "start_s": times[0],
        "end_s": times[1],
        "contextual_embedding": vectors,
    }
    facts = {**{name: facts[name] for name in FACTS}, "checkpoint": checkpoint, "cls_embedding": _base64(cls_D)}
    return encode_parquet(_table(columns, contextual_schema(vectors.type.list_size)), facts)


def remove_superseded(output: Output, own: str, names: Sequence[str]) -> list[str]:
    """Remove what a committed title supersedes; what cannot be removed is a warning, for the title is done.

    ``own``: the title's object. Where it is gone, or another one is newer, another job takes the title for that source meanwhile.
    """
    warnings = []
    for name in names:
        try:
            if name == sibling(own, FAILURES):
                output.store.delete(name)
            elif (committed := output.store.info(own)) is not None:
                output.store.delete_unless_newer(name, committed.modified)
        except Exception as error:  # fsspec implementations raise many kinds
            warnings.append(f"{name} is superseded and could not be removed ({public_line(str(error))}); the next run will try again")
    return warnings


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns in the order and with the types of a schema."""
    arrays = [
        columns[field.name] if isinstance(columns[field.name], pa.Array) else pa.array(list(columns[field.name]), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _base64(vector: Sequence[float] | np.ndarray) -> str:
    """A vector as base64 of its float32 little-endian bytes: exact, and small in a file's metadata."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
