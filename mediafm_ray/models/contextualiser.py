"""The contextualiser: a BERT-style encoder over the shots of a title (MediaFM, step 4).

    fused shots -> linear -+-> [CLS] [GLOBAL] shot 1 ... shot N  + positions -> encoder layers -> linear -> contextual shots
    title metadata -> linear -> [GLOBAL]
    shot times -> log-scaled sinusoids -> linear, added to the shots      (optional: a fused vector does not hold the length of its shot)

[CLS] is learned. [GLOBAL] is the title's projected metadata embedding (synopsis and tags), or a learned vector if a title has none.
[MASK] is learned and replaces shots that are hidden in training (Devlin et al. 2019, arXiv:1810.04805).
A window holds at most 512 shots; a longer title is read in overlapping windows.

Shapes
    B  windows (each of one title)
    S  shots; in the model, those of the longest window in the batch
    L  S + 2 tokens
    2  times of a shot in seconds: its duration, and the time since the previous shot started (0 for the first shot of a title)
    D  dimension of a fused embedding
    M  dimension of a metadata embedding
    H  hidden size
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mediafm_ray.models import weights
from mediafm_ray.models.loading import PRECISIONS, MicroBatches, Workers, load_checkpoint, open_device, staged
from mediafm_ray.models.neighbours import ContextualiserOutput, NeighbourAttention, builtin_model
from mediafm_ray.models.options import BUILTIN_NEIGHBOURS, ContextualiserConfig
from mediafm_ray.spec import MAX_SHOTS_PER_WINDOW

SPECIAL_TOKENS = 2  # [CLS] at position 0, [GLOBAL] at position 1
MIN_TIME_S = 1 / 32  # About a frame: above it, ratios of times matter; shorter times are hardly distinguished.
TIME_WAVES_OCTAVES = (64.0, 32.0, 16.0, 8.0, 4.0, 2.0)  # Wavelengths over log2 of a time; a frame to a day are 22 octaves.
TIME_FEATURES = 2 * 2 * len(TIME_WAVES_OCTAVES)  # sine and cosine of two times
MAX_TOKENS = 2**15  # Tokens in one forward pass: more use a GPU hardly better and delay its first one.
MAX_RELATED_TOKENS = 2**13  # The same for features of all pairs of shots: 16 windows of 512 take 2 GB.


class ContextualiserModelConfig(PreTrainedConfig):
    """The shape of a contextualiser, as stored in config.json. Defaults are BERT-base's width and MediaFM's depth."""

    model_type = "mediafm_contextualiser"

    fused_dim: int = 2304  # D
    metadata_dim: int = 768  # M
    hidden_size: int = 768  # H
    num_hidden_layers: int = 3
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_shots: int = MAX_SHOTS_PER_WINDOW
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    time_features: bool = False  # the times of the shots are an input
    dataset_version: str = ""  # 12 hex digits of the dataset version that it was trained on; empty if unknown


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
    """The contextualiser model, with transformers' ``from_pretrained`` and ``save_pretrained`` (config.json and model.safetensors)."""

    config_class = ContextualiserModelConfig
    base_model_prefix = "contextualiser"
    main_input_name = "fused_BSD"

    def __init__(self, config: ContextualiserModelConfig) -> None:
        super().__init__(config)
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}")
        self.shot_input = nn.Linear(config.fused_dim, config.hidden_size)
        self.metadata_input = nn.Linear(config.metadata_dim, config.hidden_size)
        self.time_input = nn.Linear(TIME_FEATURES, config.hidden_size) if config.time_features else None
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
        """Initialise as BERT: normal with standard deviation ``initializer_range``; biases zero, layer norms the identity."""
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
        times_BS2: Tensor | None = None,
    ) -> ContextualiserOutput:
        """Contextualise B windows.

        ``metadata_BM`` may be None if no title has any; ``has_metadata_B`` (bool) says which titles have, all by default. ``shots_BS``
        (bool) is False where a window is padded, ``masked_BS`` (bool) is True where a shot is replaced by [MASK]. ``times_BS2`` (float32,
        see ``shot_times``) is needed with ``config.time_features`` and ignored otherwise; the times of masked shots stay visible.
        Raises ValueError for a window of more shots than ``config.max_shots``, or if times are needed and missing.
        """
        windows, shots = fused_BSD.shape[:2]
        if shots > self.config.max_shots:
            raise ValueError(f"a window of {shots} shots is longer than the model's {self.config.max_shots}")
        shot_BSH = self.shot_input(fused_BSD)
        if masked_BS is not None:
            shot_BSH = torch.where(masked_BS[:, :, None], self.mask_token, shot_BSH)
        if self.time_input is not None:
            if times_BS2 is None:
                raise ValueError("this contextualiser was trained with time features: it needs times_BS2, the times of the shots")
            shot_BSH = shot_BSH + self.time_input(encode_times(times_BS2).to(shot_BSH.dtype))
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


def encode_times(times_BS2: Tensor) -> Tensor:
    """Return (B, S, TIME_FEATURES) float32 sinusoids of the logarithm of (B, S, 2) seconds: a ratio of times is a shift of phases.

    The sinusoids are those of Vaswani et al. 2017 (arXiv:1706.03762, 3.5), over octaves instead of positions.
    """
    octaves_BS2 = torch.log2(times_BS2.float().clamp(min=0) + MIN_TIME_S)
    waves_W = torch.tensor(TIME_WAVES_OCTAVES, device=times_BS2.device)
    phases_BSF = (2 * torch.pi * octaves_BS2[..., None] / waves_W).flatten(-2)
    return torch.cat([phases_BSF.sin(), phases_BSF.cos()], dim=-1)


def shot_times(start_S: np.ndarray, end_S: np.ndarray) -> np.ndarray:
    """Return the (S, 2) float32 times of a title's shots from their float64 starts and ends in seconds.

    Compute them for the whole title and take the rows of a window: only the first shot of the title has no previous shot.
    """
    return np.stack([end_S - start_S, np.diff(start_S, prepend=start_S[:1])], axis=1).astype(np.float32)


def window_starts(shots: int, window: int) -> list[int]:
    """Return the starts of the windows over a title: 0 if all shots fit in one, otherwise evenly spread, at most half a window apart."""
    if shots <= window:
        return [0]
    step = max(1, window // 2)
    count = -(-(shots - window) // step) + 1
    return [index * (shots - window) // (count - 1) for index in range(count)]


def window_of_shots(shots: int, window: int) -> np.ndarray:
    """Return (S,) int64, the window whose middle is nearest to each shot; the earlier of two equally near."""
    starts_W = np.array(window_starts(shots, window))
    ends_W = np.minimum(starts_W + window, shots)
    twice_distance_SW = np.abs(2 * np.arange(shots)[:, None] + 1 - (starts_W + ends_W)[None])
    return np.argmin(twice_distance_SW, axis=1)


@dataclass(frozen=True, eq=False)
class TitleShots:
    """The input of the model for the shots of a title, or of a window of them."""

    fused_SD: np.ndarray  # float32
    metadata_M: np.ndarray | None = None  # float32; None if the title has neither synopsis nor tags
    times_S2: np.ndarray | None = None  # float32, see shot_times; used only by a model that was trained with times

    def __len__(self) -> int:
        return len(self.fused_SD)

    def part(self, start: int, end: int) -> TitleShots:
        """Return the shots of a window with the title's metadata and their times in the title."""
        return TitleShots(self.fused_SD[start:end], self.metadata_M, None if self.times_S2 is None else self.times_S2[start:end])


def _load(address: str, dtype: torch.dtype) -> Any:
    """Load the model at an address: the built-in one, or a checkpoint of the kind in its config.json."""
    if address == BUILTIN_NEIGHBOURS:
        return builtin_model().to(dtype)
    kinds: dict[str, Any] = {kind.config_class.model_type: kind for kind in (Contextualiser, NeighbourAttention)}
    kind = kinds.get(str(weights.read_config(address).get("model_type", "")), Contextualiser)
    return load_checkpoint(kind, weights.resolve(address), dtype=dtype)


class TitleContextualiser:
    """A checkpoint, or ``builtin:neighbours``, applied to whole titles.

    On a CPU, every window is computed alone, on one thread: the numbers of a title do not depend on other titles. On a GPU, windows of all
    given titles share batches, the longest first, padded and masked: the numbers differ by rounding.
    """

    def __init__(self, config: ContextualiserConfig) -> None:
        """Load the checkpoint. Raises WeightsError if it is missing, damaged, incomplete or not finite."""
        self.checkpoint = config.checkpoint
        self.device = open_device(config.device)
        self.alone = self.device.type == "cpu"
        self.workers = Workers(config.threads)
        self.dtype = PRECISIONS[config.precision]
        model = _load(config.checkpoint, self.dtype)
        if broken := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
            raise weights.WeightsError(f"the checkpoint {config.checkpoint} has weights that are not finite ({broken[0]}): train it again")
        self.model: Any = model.requires_grad_(False).to(self.device)
        self.fused_dim = int(model.config.fused_dim)
        self.metadata_dim = int(model.config.metadata_dim)
        self.window = int(model.config.max_shots)
        longest = self.window + SPECIAL_TOKENS
        most = MAX_TOKENS if isinstance(model, Contextualiser) else MAX_RELATED_TOKENS
        self.micro_batches = MicroBatches(self.device, config.micro_batch, most=most, first=MicroBatches.FIRST * longest)

    def contextualise(
        self, fused_SD: np.ndarray, metadata_M: np.ndarray | None, times_S2: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Contextualise one title; see ``contextualise_together``."""
        return self.contextualise_together([TitleShots(fused_SD, metadata_M, times_S2)])[0]

    def contextualise_together(self, titles: Sequence[TitleShots]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the (S, D) float32 contextual embeddings and the (D,) float32 [CLS] embedding of each title.

        A title longer than a window is computed in windows that overlap by half or more: every shot is taken from the window whose middle
        is nearest, and [CLS] is the mean over the windows, weighted by the shots taken from each.
        Raises ValueError for dimensions other than the checkpoint's, no shots, missing times, and input or output that is not finite.
        """
        self.workers.map(self._check, titles)
        starts = [window_starts(len(title), self.window) for title in titles]
        windows = [title.part(start, start + self.window) for title, begun in zip(titles, starts, strict=True) for start in begun]
        outputs = iter(self._read(windows))
        parts = [(len(title), begun, list(itertools.islice(outputs, len(begun)))) for title, begun in zip(titles, starts, strict=True)]
        return self.workers.map(lambda part: self._join(*part), parts)

    def _join(self, shots: int, starts: Sequence[int], outputs: Sequence[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
        """Join the windows of a title."""
        owner_S = window_of_shots(shots, self.window)
        of_windows = []
        cls_D = np.zeros(outputs[0][1].shape, np.float64)
        for index, (start, (window_SD, window_cls_D)) in enumerate(zip(starts, outputs, strict=True)):
            first, end = np.searchsorted(owner_S, [index, index + 1])
            of_windows.append(window_SD[first - start : end - start].float().cpu().numpy())
            cls_D += window_cls_D.cpu().double().numpy() * ((end - first) / shots)
        contextual_SD = of_windows[0] if len(of_windows) == 1 else np.concatenate(of_windows)
        if not np.isfinite(contextual_SD).all() or not np.isfinite(cls_D).all():
            raise ValueError(f"the output of the contextualiser {self.checkpoint} is not finite: is it trained, and for this input?")
        return contextual_SD, cls_D.astype(np.float32)

    def _read(self, windows: Sequence[TitleShots]) -> list[tuple[Tensor, Tensor]]:
        """Return (S, D) contextual and (D,) [CLS] embeddings of each window, on the device; a GPU may still be computing them."""
        if self.alone:
            return self.workers.map(lambda window: self._read_batch([window])[0], windows)
        # The longest come first: the first micro-batch measures the most memory, and similar lengths share a call.
        order = sorted(range(len(windows)), key=lambda index: -len(windows[index]))
        computed = self.micro_batches.compute(
            self._read_batch, [windows[index] for index in order], counts=lambda window: len(window) + SPECIAL_TOKENS
        )
        return [output for _, output in sorted(zip(order, computed, strict=True), key=lambda pair: pair[0])]

    @torch.inference_mode()
    def _read_batch(self, windows: Sequence[TitleShots]) -> list[tuple[Tensor, Tensor]]:
        lengths_B = np.array([len(window) for window in windows])
        longest = int(lengths_B.max())
        has_metadata_B = np.array([window.metadata_M is not None for window in windows])
        with_times = bool(self.model.config.time_features)
        fused_BSD = torch.zeros(len(windows), longest, windows[0].fused_SD.shape[1], dtype=self.dtype, device=self.device)
        metadata_BM = np.zeros((len(windows), self.metadata_dim), np.float32)
        times_BS2 = np.zeros((len(windows), longest, 2), np.float32)
        stage: Any = map if self.alone else self.workers.map  # On a CPU this already runs in a worker thread.
        given = stage(lambda window: staged(window.fused_SD, self.device), windows)
        for row, (window, fused_SD) in enumerate(zip(windows, given, strict=True)):
            fused_BSD[row, : len(window)].copy_(fused_SD, non_blocking=True)
            if window.metadata_M is not None and self.metadata_dim:
                metadata_BM[row] = window.metadata_M
            if with_times:
                times_BS2[row, : len(window)] = window.times_S2
        shots_BS = np.arange(longest) < lengths_B[:, None]

        def moved(array: np.ndarray) -> Tensor:
            return staged(array, self.device).to(self.device, non_blocking=True)

        output = self.model(
            fused_BSD,
            moved(metadata_BM).to(self.dtype) if has_metadata_B.any() else None,
            None if has_metadata_B.all() else moved(has_metadata_B),
            None if shots_BS.all() else moved(shots_BS),
            times_BS2=moved(times_BS2) if with_times else None,
        )
        return [(output.contextual_BSD[row, :length], output.cls_BD[row]) for row, length in enumerate(lengths_B)]

    def _check(self, title: TitleShots) -> None:
        fused_SD, metadata_M, times_S2 = title.fused_SD, title.metadata_M, title.times_S2
        if fused_SD.ndim != 2 or fused_SD.shape[1] != (self.fused_dim or fused_SD.shape[1]):
            raise ValueError(
                f"the contextualiser {self.checkpoint} was trained on fused embeddings of {self.fused_dim} dimensions; these are "
                f"{fused_SD.shape}: use the encoders it was trained with, or another checkpoint"
            )
        if len(fused_SD) == 0:
            raise ValueError("a title without shots cannot be contextualised")
        if not np.isfinite(fused_SD).all():
            raise ValueError(f"the fused embedding of shot {int(np.argmin(np.isfinite(fused_SD).all(axis=1)))} is not finite")
        if self.model.config.time_features and (times_S2 is None or times_S2.shape != (len(fused_SD), 2)):
            found = "none" if times_S2 is None else f"{times_S2.shape}"
            raise ValueError(f"the contextualiser {self.checkpoint} was trained with the times of shots: it needs (S, 2), got {found}")
        if times_S2 is not None and not np.isfinite(times_S2).all():
            raise ValueError(f"the times of shot {int(np.argmin(np.isfinite(times_S2).all(axis=1)))} are not finite")
        if metadata_M is None or not self.metadata_dim:
            return
        if metadata_M.shape != (self.metadata_dim,):
            raise ValueError(
                f"the contextualiser {self.checkpoint} takes metadata embeddings of {self.metadata_dim} dimensions; this is "
                f"{metadata_M.shape}: use the text encoder it was trained with"
            )
        if not np.isfinite(metadata_M).all():
            raise ValueError("the metadata embedding is not finite")
