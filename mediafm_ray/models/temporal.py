"""A small transformer over the frame embeddings of a shot: "seqTransf" of CLIP4Clip (Luo et al. 2021, arXiv:2104.08860).

    frames + position embeddings -> pre-norm transformer -> + frames -> mean over frames

Modules are named as in CLIP4Clip's checkpoints, which load once the prefix ``module.`` is removed.

Shapes
    S  shots of one number of frames
    T  frames of a shot
    D  dimension of a frame's embedding
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


class TemporalTransformerConfig(PreTrainedConfig):
    """The shape of a temporal transformer, as stored in config.json of its checkpoint."""

    model_type = "mediafm_temporal_transformer"

    hidden_size: int = 768  # D
    num_hidden_layers: int = 4
    num_attention_heads: int = 12
    max_frames: int = 64
    initializer_range: float = 0.02


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.sigmoid(1.702 * values)


class ResidualAttentionBlock(nn.Module):
    """CLIP's transformer block: layer norm before attention and before the two linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        layers = OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(layers)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, frames_STD: Tensor) -> Tensor:
        normed_STD = self.ln_1(frames_STD)
        frames_STD = frames_STD + self.attn(normed_STD, normed_STD, normed_STD, need_weights=False)[0]
        return frames_STD + self.mlp(self.ln_2(frames_STD))


class TemporalTransformer(PreTrainedModel):
    """The transformer from (S, T, D) frame embeddings to (S, D) shot embeddings."""

    config_class = TemporalTransformerConfig
    main_input_name = "frames_STD"

    def __init__(self, config: TemporalTransformerConfig) -> None:
        super().__init__(config)
        self.frame_position_embeddings = nn.Embedding(config.max_frames, config.hidden_size)
        blocks = [ResidualAttentionBlock(config.hidden_size, config.num_attention_heads) for _ in range(config.num_hidden_layers)]
        self.transformerClip = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=deviation)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=deviation)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, frames_STD: Tensor) -> Tensor:
        """Pool the frames of each shot. Raises ValueError for more frames than the checkpoint has positions."""
        count = frames_STD.shape[1]
        if count > self.config.max_frames:
            raise ValueError(
                f"a shot of {count} frames is longer than the temporal transformer's {self.config.max_frames}: lower frames.per_shot"
            )
        placed_STD = frames_STD + self.frame_position_embeddings.weight[:count]
        return (self.transformerClip["resblocks"](placed_STD) + frames_STD).mean(dim=1)
