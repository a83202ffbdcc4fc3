"""A CLIP or SigLIP image tower as a video encoder (SeqCLIP): frames to embeddings, frame embeddings to one embedding per shot.

CLIP (Radford et al. 2021, arXiv:2103.00020) gives the projected embedding of its class token, SigLIP (Zhai et al. 2023,
arXiv:2303.15343) that of its pooling head. A shot is the mean over its frames, or the output of a temporal transformer over them.

Shapes
    B  frames in one call of the network
    S  shots
    T  frames of a shot
    D  dimension of an embedding
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, SiglipVisionModel
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPMLP

from mediafm_ray.models import weights
from mediafm_ray.models.loading import PRECISIONS, load_checkpoint, staged
from mediafm_ray.models.options import VideoEncoderConfig
from mediafm_ray.models.pixels import FrameEncoder, decode_jpeg, prepare, read_pixel_recipe
from mediafm_ray.models.temporal import TemporalTransformer

TOWERS = {  # model_type of config.json -> class of the image tower, name of the output that is the embedding
    "clip": (CLIPVisionModelWithProjection, "image_embeds"),
    "clip_vision_model": (CLIPVisionModelWithProjection, "image_embeds"),
    "siglip": (SiglipVisionModel, "pooler_output"),
    "siglip_vision_model": (SiglipVisionModel, "pooler_output"),
}
QUICK_GELU_FACTOR = 1.702


class ClipEncoder(FrameEncoder):
    """The video encoder of the MediaFM profile; see FrameEncoder."""

    def __init__(self, config: VideoEncoderConfig) -> None:
        """Load the weights. Raises ValueError for a wrong device, WeightsError for weights that are missing, damaged or of another kind."""
        super().__init__(config)
        folder = weights.resolve(config.weights)
        self.dtype = PRECISIONS[config.precision]
        self.tower, self.output = _load_tower(folder, config.weights, self.dtype, self.device)
        self.recipe = read_pixel_recipe(folder)
        self.dim = int(self.tower.config.projection_dim if self.output == "image_embeds" else self.tower.config.hidden_size)
        self.temporal = self._load_temporal(config.temporal_weights) if config.temporal_weights else None

    def _decode(self, jpeg: bytes, shot: int) -> Tensor:
        return staged(decode_jpeg(jpeg, shot), self.device)

    @torch.inference_mode()
    def _embed_frames(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """See FrameEncoder; frames are (H, W, 3) uint8 of any size."""
        places = defaultdict(list)
        for place, frame in enumerate(frames):
            places[frame.shape].append(place)
        pixels: list[Any] = [None] * len(frames)
        for same_size in places.values():
            frames_BHWC = torch.stack([frames[place].to(self.device, non_blocking=True) for place in same_size])
            prepared_BCHW = prepare(frames_BHWC, self.recipe)
            for place, image_CHW in zip(same_size, prepared_BCHW, strict=True):
                pixels[place] = image_CHW
        output = getattr(self.tower(pixel_values=torch.stack(pixels).to(self.dtype)), self.output)
        return list(output.float())

    def _pool(self, of_shots: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """See FrameEncoder."""
        if self.temporal is None:
            return super()._pool(of_shots)
        if self.alone:
            groups = [[shot] for shot in of_shots]
        else:
            by_frames = defaultdict(list)  # Shots of equal length share a call, so that nothing is padded.
            for shot, frames_TD in of_shots.items():
                by_frames[len(frames_TD)].append(shot)
            groups = list(by_frames.values())
        pooled = self.workers.map(lambda group: self._pool_in_time(np.stack([of_shots[shot] for shot in group])), groups)
        return {shot: row for group, rows in zip(groups, pooled, strict=True) for shot, row in zip(group, rows, strict=True)}

    @torch.inference_mode()
    def _pool_in_time(self, frames_STD: np.ndarray) -> np.ndarray:
        assert self.temporal is not None
        return self.temporal(torch.from_numpy(frames_STD).to(self.device)).cpu().numpy()

    def _load_temporal(self, address: str) -> Any:
        temporal = load_checkpoint(TemporalTransformer, weights.resolve(address), dtype=torch.float32)
        if temporal.config.hidden_size != self.dim:
            raise weights.WeightsError(
                f"the temporal transformer {address} takes embeddings of {temporal.config.hidden_size} dimensions, "
                f"the image encoder gives {self.dim}"
            )
        return temporal.requires_grad_(False).to(self.device)


def _load_tower(folder: Path, address: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
    kind = weights.read_config(str(folder)).get("model_type")
    if kind not in TOWERS:
        raise weights.WeightsError(f"{address} is a {kind!r} checkpoint; the clip encoder takes {', '.join(sorted(TOWERS))}")
    tower_class, output = TOWERS[kind]
    if device.type == "cpu":
        return load_checkpoint(tower_class, folder, dtype=dtype).requires_grad_(False), output
    tower = load_checkpoint(tower_class, folder, dtype=torch.float32).requires_grad_(False)
    fold_quick_gelu(tower)
    return tower.to(device=device, dtype=dtype), output


def fold_quick_gelu(tower: Any) -> None:
    """Replace CLIP's x sigmoid(1.702 x), three passes over the largest tensors of the network, by one pass: silu(1.702 x) / 1.702.

    The factors are multiplied into the weights before and after it. Numbers change by rounding.
    """
    for module in tower.modules():
        if isinstance(module, CLIPMLP) and isinstance(module.activation_fn, QuickGELUActivation):
            module.fc1.weight.mul_(QUICK_GELU_FACTOR)
            module.fc1.bias.mul_(QUICK_GELU_FACTOR)
            module.fc2.weight.div_(QUICK_GELU_FACTOR)
            module.activation_fn = nn.SiLU()
