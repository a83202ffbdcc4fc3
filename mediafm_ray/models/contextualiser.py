"""The contextualiser: a BERT-style encoder over the shots of a title (MediaFM, step 4).

    fused shots -> linear -+-> [CLS] [GLOBAL] shot 1 ... shot N  + positions -> encoder layers -> linear -> contextual shots
    title metadata -> linear -> [GLOBAL]

[CLS] is learned. [GLOBAL] is the title's metadata embedding (synopsis and tags), projected; a learned stand-in where a title has none.
[MASK] is learned and takes the place of shots that are hidden in training (Devlin et al. 2019, arXiv:1810.04805).
A window holds at most 512 shots; a longer title is read in overlapping windows.

Shapes
    B  windows (each of one title)
    S  shots; in the model, of the longest window in the batch
    L  S + 2 tokens
    D  dimension of a fused embedding
    M  dimension of a metadata embedding
    H  hidden size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mediafm_ray.models import weights
from mediafm_ray.models.loading import Workers, load_checkpoint, open_device
from mediafm_ray.models.options import ContextualiserConfig
from mediafm_ray.spec import MAX_SHOTS_PER_WINDOW

SPECIAL_TOKENS = 2  # [CLS] at position 0, [GLOBAL] at position 1


class ContextualiserModelConfig(PreTrainedConfig):
    """The shape of a contextualiser: what config.json of a checkpoint holds. Defaults are BERT-base's over MediaFM's 2304 dimensions."""

    model_type = "mediafm_contextualiser"

    fused_dim: int = 2304  # D
    metadata_dim: int = 768  # M
    hidden_size: int = 768  # H
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_shots: int = MAX_SHOTS_PER_WINDOW
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


@dataclass
class ContextualiserOutput(ModelOutput):
    """What the model gives for B windows."""

    contextual_BSD: Tensor | None = None  # the shots, in the space of the fused embeddings; undefined where shots_BS is False
    cls_BD: Tensor | None = None  # [CLS], through the same output projection
    hidden_BLH: Tensor | None = None  # last layer before the output projection: [CLS], [GLOBAL], shots


class EncoderLayer(nn.Module):
    """Self-attention, then two linear layers with GELU; each with a residual and layer norm after it, as in BERT."""

    def __init__(self, config: ContextualiserModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.attention_output = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.widen = nn.Linear(config.hidden_size, config.intermediate_size)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden_BLH: Tensor, attend_B11L: Tensor | None) -> Tensor:
        split_heads = self.query_key_value(hidden_BLH).unflatten(-1, (3, self.heads, -1))  # B, L, 3, heads, H / heads
        query, key, value = split_heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attend_B11L, dropout_p=dropout)
        attended_BLH = self.attention_output(attended.transpose(1, 2).flatten(2))
        hidden_BLH = self.attention_norm(hidden_BLH + F.dropout(attended_BLH, self.dropout, self.training))
        widened_BLH = self.narrow(F.gelu(self.widen(hidden_BLH)))
        return self.output_norm(hidden_BLH + F.dropout(widened_BLH, self.dropout, self.training))


class Contextualiser(PreTrainedModel):
    """The model; ``from_pretrained`` and ``save_pretrained`` (config.json and model.safetensors) are those of transformers."""

    config_class = ContextualiserModelConfig
    base_model_prefix = "contextualiser"
    main_input_name = "fused_BSD"

    def __init__(self, config: ContextualiserModelConfig) -> None:
        super().__init__(config)
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}")
        self.shot_input = nn.Linear(config.fused_dim, config.hidden_size)
        self.metadata_input = nn.Linear(config.metadata_dim, config.hidden_size)
        self.cls_token = nn.Parameter(torch.empty(config.hidden_size))
        self.no_metadata_token = nn.Parameter(torch.empty(config.hidden_size))
        self.mask_token = nn.Parameter(torch.empty(config.hidden_size))
        self.positions = nn.Embedding(config.max_shots + SPECIAL_TOKENS, config.hidden_size)
        self.input_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.shot_output = nn.Linear(config.hidden_size, config.fused_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """BERT's: normal with standard deviation ``initializer_range``; biases zero, layer norms the identity."""
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=deviation)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Contextualiser):
            for token in (module.cls_token, module.no_metadata_token, module.mask_token):
                nn.init.normal_(token, std=deviation)

    def forward(
        self,
        fused_BSD: Tensor,
        metadata_BM: Tensor | None = None,
        has_metadata_B: Tensor | None = None,
        shots_BS: Tensor | None = None,
        masked_BS: Tensor | None = None,
    ) -> ContextualiserOutput:
        """Contextualise B windows.

        ``metadata_BM`` may be left out where no title has any; ``has_metadata_B`` (bool) says which have, all by default. ``shots_BS``
        (bool) is False where a window is padded, ``masked_BS`` (bool) True where a shot is hidden behind [MASK].
        Raises ValueError where a window holds more shots than ``config.max_shots``.
        """
        windows, shots = fused_BSD.shape[:2]
        if shots > self.config.max_shots:
            raise ValueError(f"a window of {shots} shots is longer than the model's {self.config.max_shots}")
        shot_BSH = self.shot_input(fused_BSD)
        if masked_BS is not None:
            shot_BSH = torch.where(masked_BS[:, :, None], self.mask_token, shot_BSH)
        global_BH = self.no_metadata_token.expand(windows, -1)
        if metadata_BM is not None:
            projected_BH = self.metadata_input(metadata_BM)
            global_BH = projected_BH if has_metadata_B is None else torch.where(has_metadata_B[:, None], projected_BH, global_BH)
        tokens_BLH = torch.cat([self.cls_token.expand(windows, 1, -1), global_BH[:, None], shot_BSH], dim=1)
        hidden_BLH = self.input_norm(tokens_BLH + self.positions.weight[: shots + SPECIAL_TOKENS])
        hidden_BLH = F.dropout(hidden_BLH, self.config.dropout, self.training)
        attend_B11L = None if shots_BS is None else F.pad(shots_BS, (SPECIAL_TOKENS, 0), value=True)[:, None, None]
        for layer in self.layers:
            hidden_BLH = layer(hidden_BLH, attend_B11L)
        return ContextualiserOutput(
            contextual_BSD=self.shot_output(hidden_BLH[:, SPECIAL_TOKENS:]),
            cls_BD=self.shot_output(hidden_BLH[:, 0]),
            hidden_BLH=hidden_BLH,
        )


def window_starts(shots: int, window: int) -> list[int]:
    """Where the windows over a title begin: one at 0 where all shots fit, else evenly spread, at most half a window apart."""
    if shots <= window:
        return [0]
    step = max(1, window // 2)
    count = -(-(shots - window) // step) + 1
    return [index * (shots - window) // (count - 1) for index in range(count)]


def window_of_shots(shots: int, window: int) -> np.ndarray:
    """(S,) int64: for every shot the index of the window in whose middle it is most nearly; the earlier of two alike."""
    starts_W = np.array(window_starts(shots, window))
    ends_W = np.minimum(starts_W + window, shots)
    twice_distance_SW = np.abs(2 * np.arange(shots)[:, None] + 1 - (starts_W + ends_W)[None])
    return np.argmin(twice_distance_SW, axis=1)


class TitleContextualiser:
    """A checkpoint at work on whole titles, one at a time: no title's numbers depend on another's."""

    def __init__(self, config: ContextualiserConfig) -> None:
        """Raises WeightsError for a checkpoint that is missing, damaged or incomplete."""
        self.checkpoint = config.checkpoint
        self.device = open_device(config.device)
        self.workers = Workers(config.threads)
        model = load_checkpoint(Contextualiser, weights.resolve(config.checkpoint), dtype=torch.float32)
        self.model: Any = model.requires_grad_(False).to(self.device)
        self.fused_dim = int(model.config.fused_dim)
        self.metadata_dim = int(model.config.metadata_dim)

    def contextualise(self, fused_SD: np.ndarray, metadata_M: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Contextualise one title: (S, D) float32 fused embeddings and its (M,) float32 metadata embedding, or None without one.

        Returns the (S, D) float32 contextual embeddings and the (D,) float32 [CLS] embedding. A title of more shots than a window holds is
        read in windows that overlap by half or more: every shot is taken from the window in whose middle it is most nearly,
        and [CLS] is the mean of the windows', weighted by the shots taken from each.
        Raises ValueError for other dimensions than the checkpoint's, no shots, or input that is not finite.
        """
        self._check(fused_SD, metadata_M)
        shots, window = len(fused_SD), int(self.model.config.max_shots)
        starts = window_starts(shots, window)
        outputs = self.workers.map(lambda start: self._read_window(fused_SD[start : start + window], metadata_M), starts)
        owner_S = window_of_shots(shots, window)
        contextual_SD = np.empty((shots, self.fused_dim), np.float32)
        cls_D = np.zeros(self.fused_dim, np.float64)
        for index, (start, (window_SD, window_cls_D)) in enumerate(zip(starts, outputs, strict=True)):
            owned = np.flatnonzero(owner_S == index)
            contextual_SD[owned] = window_SD[owned - start]
            cls_D += window_cls_D.astype(np.float64) * (len(owned) / shots)
        return contextual_SD, cls_D.astype(np.float32)

    @torch.inference_mode()
    def _read_window(self, fused_SD: np.ndarray, metadata_M: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        # copies: arrays may come reversed or read-only out of an Arrow table
        fused_BSD = torch.from_numpy(np.array(fused_SD, np.float32)[None]).to(self.device)
        metadata_BM = None if metadata_M is None else torch.from_numpy(np.array(metadata_M, np.float32)[None]).to(self.device)
        output = self.model(fused_BSD, metadata_BM)
        return output.contextual_BSD[0].cpu().numpy(), output.cls_BD[0].cpu().numpy()

    def _check(self, fused_SD: np.ndarray, metadata_M: np.ndarray | None) -> None:
        if fused_SD.ndim != 2 or fused_SD.shape[1] != self.fused_dim:
            raise ValueError(
                f"the contextualiser {self.checkpoint} was trained on fused embeddings of {self.fused_dim} dimensions; these are "
                f"{fused_SD.shape}: use the encoders it was trained with, or another checkpoint"
            )
        if len(fused_SD) == 0:
            raise ValueError("a title without shots cannot be contextualised")
        if not np.isfinite(fused_SD).all():
            raise ValueError(f"the fused embedding of shot {int(np.argmin(np.isfinite(fused_SD).all(axis=1)))} is not finite")
        if metadata_M is None:
            return
        if metadata_M.shape != (self.metadata_dim,):
            raise ValueError(
                f"the contextualiser {self.checkpoint} takes metadata embeddings of {self.metadata_dim} dimensions; this is "
                f"{metadata_M.shape}: use the text encoder it was trained with"
            )
        if not np.isfinite(metadata_M).all():
            raise ValueError("the metadata embedding is not finite")
