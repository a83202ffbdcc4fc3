"""The contextualiser: a BERT-style encoder over the shots of a title (MediaFM, step 4).

    fused shots -> linear -+-> [CLS] [GLOBAL] shot 1 ... shot N  + positions -> encoder layers -> linear -> contextual shots
    title metadata -> linear -> [GLOBAL]
    shot times -> log-scaled sinusoids -> linear, added to the shots      (a vector of fixed size forgets how long a shot was; optional)

[CLS] is learned. [GLOBAL] is the title's metadata embedding (synopsis and tags), projected; a learned stand-in where a title has none.
[MASK] is learned and takes the place of shots that are hidden in training (Devlin et al. 2019, arXiv:1810.04805).
A window holds at most 512 shots; a longer title is read in overlapping windows.

Shapes
    B  windows (each of one title)
    S  shots; in the model, of the longest window in the batch
    L  S + 2 tokens
    2  times of a shot in seconds: its duration, and since the start of the shot before it (0 for the first of a title)
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
SHORTEST_TIME_S = 1 / 32  # seconds: times differ by their ratio above it and hardly below it; it is about a frame
TIME_WAVES_OCTAVES = (64.0, 32.0, 16.0, 8.0, 4.0, 2.0)  # of the sinusoids over log2 of a time; frame to day: 22 octaves
TIME_FEATURES = 2 * 2 * len(TIME_WAVES_OCTAVES)  # sine and cosine of two times
MAX_TOKENS = 2**15  # that a GPU computes at once: more fill it hardly better, and it would wait longer for the first
MAX_RELATED_TOKENS = 2**13  # the same where every pair of shots has features: 16 windows of 512 take 2 GB


class ContextualiserModelConfig(PreTrainedConfig):
    """The shape of a contextualiser: what config.json of a checkpoint holds. Defaults are BERT-base's width and MediaFM's depth."""

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
    time_features: bool = False  # the model is told the times of the shots
    dataset_version: str = ""  # what it was trained on: 12 hex digits of a dataset's version; empty where that is not known


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
        times_BS2: Tensor | None = None,
    ) -> ContextualiserOutput:
        """Contextualise B windows.

        ``metadata_BM`` may be left out where no title has any; ``has_metadata_B`` (bool) says which have, all by default. ``shots_BS``
        (bool) is False where a window is padded, ``masked_BS`` (bool) True where a shot is hidden behind [MASK]. ``times_BS2`` (float32,
        see ``shot_times``) is what a model with ``config.time_features`` needs, and no other looks at; a masked shot's times stay visible.
        Raises ValueError where a window holds more shots than ``config.max_shots``, or times are needed and missing.
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
    """(B, S, 2) seconds as (B, S, TIME_FEATURES) sinusoids of their logarithm, in float32: a ratio of times is a shift of phases.

    Sinusoids are those of Vaswani et al. 2017 (arXiv:1706.03762, 3.5), over octaves instead of positions.
    """
    octaves_BS2 = torch.log2(times_BS2.float().clamp(min=0) + SHORTEST_TIME_S)
    waves_W = torch.tensor(TIME_WAVES_OCTAVES, device=times_BS2.device)
    phases_BSF = (2 * torch.pi * octaves_BS2[..., None] / waves_W).flatten(-2)
    return torch.cat([phases_BSF.sin(), phases_BSF.cos()], dim=-1)


def shot_times(start_S: np.ndarray, end_S: np.ndarray) -> np.ndarray:
    """(S, 2) float32 times of a title's shots from their float64 starts and ends in seconds.

    They belong to the whole title: a window takes its rows, so only the first shot of the title has no shot before it.
    """
    return np.stack([end_S - start_S, np.diff(start_S, prepend=start_S[:1])], axis=1).astype(np.float32)


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


@dataclass(frozen=True, eq=False)
class TitleShots:
    """What the model is told of the shots of a title, or of a window of them."""

    fused_SD: np.ndarray  # float32
    metadata_M: np.ndarray | None = None  # float32; None where the title has neither synopsis nor tags
    times_S2: np.ndarray | None = None  # float32, see shot_times; only a model that was trained with times looks at them

    def __len__(self) -> int:
        return len(self.fused_SD)

    def part(self, start: int, end: int) -> TitleShots:
        """The shots of a window, with the title's metadata and with the times that they have in the title."""
        return TitleShots(self.fused_SD[start:end], self.metadata_M, None if self.times_S2 is None else self.times_S2[start:end])


def _load(address: str, dtype: torch.dtype) -> Any:
    """The model at an address: the built-in one, or a checkpoint of the kind that its config.json names."""
    if address == BUILTIN_NEIGHBOURS:
        return builtin_model().to(dtype)
    kinds: dict[str, Any] = {kind.config_class.model_type: kind for kind in (Contextualiser, NeighbourAttention)}
    kind = kinds.get(str(weights.read_config(address).get("model_type", "")), Contextualiser)
    return load_checkpoint(kind, weights.resolve(address), dtype=dtype)


class TitleContextualiser:
    """A checkpoint, or ``builtin:neighbours``, at work on whole titles.

    On a CPU every window is computed alone, on one thread: no title's numbers depend on another's. On a GPU windows of all titles at hand
    share batches, the longest first, padded and masked: the numbers differ by rounding.
    """

    def __init__(self, config: ContextualiserConfig) -> None:
        """Raises WeightsError for a checkpoint that is missing, damaged, incomplete or not finite."""
        self.checkpoint = config.checkpoint
        self.device = open_device(config.device)
        self.alone = self.device.type == "cpu"
        self.workers = Workers(config.threads)
        self.dtype = PRECISIONS[config.precision]
        model = _load(config.checkpoint, self.dtype)
        if broken := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
            raise weights.WeightsError(
                f"the checkpoint {config.checkpoint} holds numbers that are not finite ({broken[0]}): train it again"
            )
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
        """The (S, D) float32 contextual embeddings of each title and its (D,) float32 [CLS] embedding.

        A title of more shots than a window holds is read in windows that overlap by half or more: every shot is taken from the window
        in whose middle it is most nearly, and [CLS] is the mean of the windows', weighted by the shots taken from each.
        Raises ValueError for other dimensions than the checkpoint's, no shots, missing times, and input or output that is not finite.
        """
        self.workers.map(self._check, titles)
        starts = [window_starts(len(title), self.window) for title in titles]
        windows = [title.part(start, start + self.window) for title, begun in zip(titles, starts, strict=True) for start in begun]
        outputs = iter(self._read(windows))
        parts = [(len(title), begun, list(itertools.islice(outputs, len(begun)))) for title, begun in zip(titles, starts, strict=True)]
        return self.workers.map(lambda part: self._join(*part), parts)

    def _join(self, shots: int, starts: Sequence[int], outputs: Sequence[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
        """A title from its windows."""
        owner_S = window_of_shots(shots, self.window)
        of_windows = []
        cls_D = np.zeros(outputs[0][1].shape, np.float64)
        for index, (start, (window_SD, window_cls_D)) in enumerate(zip(starts, outputs, strict=True)):
            first, end = np.searchsorted(owner_S, [index, index + 1])
            of_windows.append(window_SD[first - start : end - start].float().cpu().numpy())
            cls_D += window_cls_D.cpu().double().numpy() * ((end - first) / shots)
        contextual_SD = of_windows[0] if len(of_windows) == 1 else np.concatenate(of_windows)
        if not np.isfinite(contextual_SD).all() or not np.isfinite(cls_D).all():
            raise ValueError(f"the contextualiser {self.checkpoint} gave numbers that are not finite: is it trained, and for this input?")
        return contextual_SD, cls_D.astype(np.float32)

    def _read(self, windows: Sequence[TitleShots]) -> list[tuple[Tensor, Tensor]]:
        """The (S, D) contextual embeddings and the (D,) [CLS] embedding of each window, on the device; a GPU may still be at work."""
        if self.alone:
            return self.workers.map(lambda window: self._read_batch([window])[0], windows)
        # longest first: the first micro-batch measures the most memory, and like lengths share a call
        order = sorted(range(len(windows)), key=lambda index: -len(windows[index]))
        computed = self.micro_batches.compute(
            self._read_batch, [windows[index] for index in order], counts=lambda window: len(window) + SPECIAL_TOKENS
        )
        return [output for _, output in sorted(zip(order, computed, strict=True), key=lambda pair: pair[0])]

    @torch.inference_mode()
    def _read_batch(self, windows: Sequence[TitleShots]) -> list[tuple[Tensor, Tensor]]:
        lengths_B = np.array([len(window) for window in windows])
        longest = int(lengths_B.max())
        told_B = np.array([window.metadata_M is not None for window in windows])
        with_times = bool(self.model.config.time_features)
        fused_BSD = torch.zeros(len(windows), longest, windows[0].fused_SD.shape[1], dtype=self.dtype, device=self.device)
        metadata_BM = np.zeros((len(windows), self.metadata_dim), np.float32)
        times_BS2 = np.zeros((len(windows), longest, 2), np.float32)
        stage: Any = map if self.alone else self.workers.map  # alone, this is one of the workers' threads
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
            moved(metadata_BM).to(self.dtype) if told_B.any() else None,
            None if told_B.all() else moved(told_B),
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
            raise ValueError(
                f"the contextualiser {self.checkpoint} was trained with the times of shots: it needs (S, 2) of them, got {found}"
            )
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
