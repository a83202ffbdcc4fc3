"""The protocols of the three kinds of encoder, and registries that build the configured one. No torch.

The driver plans with the dimensions and digests; only ``build_*`` imports the module of an encoder.

Shapes
    S  shots (or texts)
    D  dimension of the encoder
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mediafm_ray.extras import need
from mediafm_ray.models import weights
from mediafm_ray.models.options import AudioEncoderConfig, TextEncoderConfig, VideoEncoderConfig
from mediafm_ray.spec import SAMPLE_RATE, digest_of
from mediafm_ray.text import PublicError

EncoderConfig = VideoEncoderConfig | AudioEncoderConfig | TextEncoderConfig
EFFICIENTNET_LITE0_DIM = 1280  # channels of the last convolution
LOG_MEL_DIM = 192  # three statistics of 64 mel bands
CLAP_SAMPLE_RATE = 48_000  # Hz; the default of CLAP's feature extractor
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 8_000, 192_000  # Hz


class ApiError(PublicError):
    """A failed request to the embeddings API; the message says why and never contains the key."""


class BudgetExceeded(ApiError):
    """The configured cap on the cost is reached: nothing more is sent."""


@dataclass(frozen=True)
class Encoded:
    """The embeddings of some shots: (S, D) float32, zeros where the modality is absent, and (S,) bool presence flags.

    Raises ValueError for another shape or type, or a value that is not finite.
    """

    embeddings_SD: np.ndarray
    present_S: np.ndarray

    def __post_init__(self) -> None:
        if self.embeddings_SD.ndim != 2 or self.embeddings_SD.dtype != np.float32:
            raise ValueError(f"embeddings must be (S, D) float32, not {self.embeddings_SD.shape} {self.embeddings_SD.dtype}")
        if self.present_S.shape != self.embeddings_SD.shape[:1] or self.present_S.dtype != np.bool_:
            raise ValueError(f"presence flags must be ({len(self.embeddings_SD)},) bool, not {self.present_S.shape} {self.present_S.dtype}")
        finite_S = np.isfinite(self.embeddings_SD).all(axis=1)
        if not finite_S.all():
            raise ValueError(
                f"the encoder returned NaN or infinity for shot {int(np.argmin(finite_S))} ({int((~finite_S).sum())} shots in all)"
            )


class VideoEncoder(Protocol):
    """An encoder of the frames of shots."""

    dim: int

    def encode(self, shots: Sequence[Sequence[bytes]]) -> Encoded:
        """Encode the JPEG frames of each shot (colour or grey, any size). A shot without frames is absent."""
        ...


class AudioEncoder(Protocol):
    """An encoder of the audio of shots."""

    dim: int

    def encode(self, shots: Sequence[bytes]) -> Encoded:
        """Encode the mono int16 little-endian samples of each shot, at ``encoder_sample_rate``.

        A shot without samples is absent; a silent one is not.
        """
        ...


class TextEncoder(Protocol):
    """An encoder of texts."""

    dim: int

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode one text per shot (or the metadata of a title). A text of only white space is absent."""
        ...


@dataclass(frozen=True)
class _Implementation:
    """The module of an encoder, and the facts that are known before it is imported."""

    module: str
    factory: str
    dim: Callable[[Any], int]
    has_weights: bool = True
    extra: str = ""  # the extra of the package that the module needs
    sample_rate: Callable[[Any], int] = lambda config: SAMPLE_RATE  # of the sound that an audio encoder takes


def _number_in_config(address: str, *paths: tuple[str, ...]) -> int:
    """Return the first number at one of the paths in the checkpoint's config.json."""
    config = weights.read_config(address)
    for path in paths:
        found: Any = config
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, int):
            return found
    wanted = " or ".join(".".join(path) for path in paths)
    raise weights.WeightsError(f"the config.json of {address} gives no {wanted}: is it a checkpoint for this encoder?")


def _hidden_size(config: TextEncoderConfig | AudioEncoderConfig) -> int:
    return _number_in_config(config.weights, ("hidden_size",))


def _clip_dim(config: VideoEncoderConfig) -> int:
    """Return CLIP's projection or SigLIP's width; both are at the top of config.json if the tower was saved alone."""
    siglip = str(weights.read_config(config.weights).get("model_type", "")).startswith("siglip")
    key = "hidden_size" if siglip else "projection_dim"
    return _number_in_config(config.weights, ("vision_config", key), (key,))


def _clap_sample_rate(config: AudioEncoderConfig) -> int:
    """Return the rate in the checkpoint's preprocessor_config.json. It must be divisible by 10, because levels of sound last 0.1 s."""
    rate = weights.read_preprocessor(config.weights).get("sampling_rate", CLAP_SAMPLE_RATE)
    if not isinstance(rate, int) or rate % 10 or not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise weights.WeightsError(
            f"the {weights.PREPROCESSOR} of {config.weights} gives the sampling_rate {rate}: it must be a whole number of Hz from "
            f"{MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} that is divisible by 10"
        )
    return rate


VIDEO_ENCODERS: Mapping[str, _Implementation] = {
    "clip": _Implementation("clip", "ClipEncoder", _clip_dim),
    "efficientnet_lite0": _Implementation("efficientnet_lite", "EfficientNetLiteEncoder", lambda config: EFFICIENTNET_LITE0_DIM),
}
AUDIO_ENCODERS: Mapping[str, _Implementation] = {
    "wav2vec2": _Implementation("wav2vec2", "Wav2Vec2Encoder", _hidden_size),
    "clap": _Implementation(
        "clap", "ClapEncoder", lambda config: _number_in_config(config.weights, ("projection_dim",)), sample_rate=_clap_sample_rate
    ),
    "log_mel": _Implementation("log_mel", "LogMelEncoder", lambda config: LOG_MEL_DIM, has_weights=False),
}
TEXT_ENCODERS: Mapping[str, _Implementation] = {
    "openai": _Implementation("text_api", "ApiTextEncoder", lambda config: config.dimensions, has_weights=False, extra="openai"),
    "sentence_transformer": _Implementation("sentence", "SentenceEncoder", _hidden_size),
}
REGISTRIES: Mapping[type[EncoderConfig], tuple[str, Mapping[str, _Implementation]]] = {
    VideoEncoderConfig: ("video", VIDEO_ENCODERS),
    AudioEncoderConfig: ("audio", AUDIO_ENCODERS),
    TextEncoderConfig: ("text", TEXT_ENCODERS),
}


def build_video_encoder(config: VideoEncoderConfig) -> VideoEncoder:
    """Build the configured video encoder and load its weights. Raises ValueError for an unknown name, WeightsError for bad weights."""
    return _build(config)


def build_audio_encoder(config: AudioEncoderConfig) -> AudioEncoder:
    """Build the configured audio encoder and load its weights. Raises ValueError for an unknown name, WeightsError for bad weights."""
    return _build(config)


def build_text_encoder(config: TextEncoderConfig, allowance: Any = None) -> TextEncoder:
    """Build the configured text encoder and load its weights. Raises ValueError for an unknown name, WeightsError for bad weights.

    ``allowance`` (see text_api.Allowance) is shared by all API encoders of a job; other encoders ignore it.
    """
    return _build(config, allowance) if config.encoder == "openai" else _build(config)


def encoder_dim(config: EncoderConfig) -> int:
    """Return the dimension of the configured encoder, without importing torch."""
    return _find(config).dim(config)


def encoder_sample_rate(config: AudioEncoderConfig) -> int:
    """Return the samples a second that the configured encoder takes, without importing torch. Raises WeightsError if that is not known."""
    return _find(config).sample_rate(config)


def weights_digest(config: EncoderConfig) -> str:
    """Return the SHA-256 of the configured weights (64 hex digits); empty without weights. Raises WeightsError if they are missing."""
    implementation = _find(config)
    if not implementation.has_weights:
        return ""
    if isinstance(config, VideoEncoderConfig) and config.temporal_weights:
        return digest_of([weights.digest(config.weights), weights.digest(config.temporal_weights)])
    return weights.digest(config.weights)


def _build(config: EncoderConfig, *more: Any) -> Any:
    implementation = _find(config)
    module = importlib.import_module(f"mediafm_ray.models.{implementation.module}")
    return getattr(module, implementation.factory)(config, *more)


def _find(config: EncoderConfig) -> _Implementation:
    modality, implementations = REGISTRIES[type(config)]
    if config.encoder not in implementations:
        raise ValueError(f"{modality}.encoder: unknown encoder {config.encoder!r}; must be one of {', '.join(sorted(implementations))}")
    found = implementations[config.encoder]
    if found.extra:
        need(found.extra, f"{modality}.encoder={config.encoder}")
    return found
