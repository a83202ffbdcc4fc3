"""wav2vec 2.0 (Baevski et al. 2020, arXiv:2006.11477), HuBERT or WavLM as an audio encoder: the mean over time of one layer.

facebook/wav2vec2-base normalises its first convolution over time (group norm) and was trained without an attention mask, so zeros
appended to a sound change all of its output. If sounds share a batch, the statistics of that norm are computed over each sound's own
samples, and attention is masked: a sound's numbers are then the same as alone, to rounding.

Shapes
    B  chunks of sound in one call
    N  samples
    T  time steps, 50 a second
    C  channels of a convolution, I and O of one of its groups
    D  hidden size
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from mediafm_ray.models import weights
from mediafm_ray.models.encoder import Encoded
from mediafm_ray.models.loading import PRECISIONS, MicroBatches, Workers, load_checkpoint, open_device, staged
from mediafm_ray.models.options import AudioEncoderConfig
from mediafm_ray.spec import SAMPLE_RATE

KINDS = ("wav2vec2", "hubert", "wavlm")  # model_type of config.json
MIN_SAMPLES = SAMPLE_RATE // 5  # These are 9 time steps; the first norm would turn a single step into zeros.
VARIANCE_FLOOR = 1e-7  # The checkpoints' feature extractor has the same floor.
INT16_SCALE = 32768.0


@dataclass(frozen=True)
class Chunk:
    """A part of a shot: int16 samples and their normalisation. It is converted to float32 only when needed, to save memory."""

    samples_N: np.ndarray
    mean: float  # mean of the whole shot, full scale = 1
    deviation: float

    @property
    def length(self) -> int:
        """Return the number of samples of ``sound()``."""
        return max(len(self.samples_N), MIN_SAMPLES)

    @property
    def start(self) -> int:
        """Return the place of the first sample in ``sound()``: a sound shorter than 0.2 s is centred between zeros."""
        return (self.length - len(self.samples_N)) // 2

    def sound(self) -> np.ndarray:
        """Return (length,) float32 as the checkpoint's feature extractor does."""
        sound_N = (self.samples_N / INT16_SCALE - self.mean) / self.deviation  # float64
        return np.pad(sound_N, (self.start, self.length - self.start - len(sound_N))).astype(np.float32)


class Wav2Vec2Encoder:
    """The audio encoder of the MediaFM profile.

    A shot is normalised to zero mean and unit variance as a whole (if the checkpoint's feature extractor does so) and divided into equal
    chunks no longer than ``chunk_seconds``; its embedding is their mean, weighted by length. A shot of less than 0.2 s is centred in
    0.2 s of zeros. Silence (all samples equal) becomes zeros and gets a finite embedding; it is present.

    On a CPU, every chunk is computed alone, on one thread and without padding.
    """

    def __init__(self, config: AudioEncoderConfig) -> None:
        """Load the weights. Raises ValueError for a wrong option, WeightsError for weights that are missing, damaged or of another kind."""
        self.longest = round(config.chunk_seconds * SAMPLE_RATE)
        if self.longest < MIN_SAMPLES:
            raise ValueError(f"audio.chunk_seconds must be at least {MIN_SAMPLES / SAMPLE_RATE}, not {config.chunk_seconds}")
        folder = weights.resolve(config.weights)
        kind = weights.read_config(config.weights).get("model_type")
        if kind not in KINDS:
            raise weights.WeightsError(f"{config.weights} is a {kind!r} checkpoint; the wav2vec2 encoder takes {', '.join(KINDS)}")
        self.device = open_device(config.device)
        self.alone = self.device.type == "cpu"
        self.workers = Workers(config.threads)
        self.micro_batches = MicroBatches(self.device, config.micro_batch)
        self.dtype = PRECISIONS[config.precision]
        model = load_checkpoint(AutoModel, folder, optional=("masked_spec_embed",), dtype=self.dtype)
        self.model: Any = model.requires_grad_(False).to(self.device)
        self.norm = _own_statistics(self.model)
        if self.device.type == "cuda":
            _positions_by_products(self.model)
        self.layer = config.layer
        layers = int(self.model.config.num_hidden_layers)
        if not -1 <= self.layer <= layers:
            raise ValueError(f"audio.layer must be -1 (the last) or 0 to {layers} (0 = before the first), not {self.layer}")
        self.dim = int(self.model.config.hidden_size)
        self.normalise = _asks_to_normalise(folder)

    def encode(self, shots: Sequence[bytes]) -> Encoded:
        """See AudioEncoder. Raises ValueError for an odd number of bytes."""
        embeddings_SD = np.zeros((len(shots), self.dim), np.float64)
        present_S = np.array([len(samples) > 0 for samples in shots], bool)
        chunks: list[Chunk] = []
        places: list[tuple[int, float]] = []  # the shot of each chunk and its share of the shot
        for shot, samples in enumerate(shots):
            if len(samples) % 2:
                raise ValueError(f"the audio of shot {shot} has {len(samples)} bytes: int16 samples take an even number")
            if samples:
                samples_N = np.frombuffer(samples, "<i2")
                for chunk in self._chunks(samples_N):
                    chunks.append(chunk)
                    places.append((shot, len(chunk.samples_N) / len(samples_N)))
        for (shot, share), embedding_D in zip(places, self._embed(chunks), strict=True):
            embeddings_SD[shot] += share * embedding_D
        return Encoded(embeddings_SD.astype(np.float32), present_S)

    def _chunks(self, samples_N: np.ndarray) -> list[Chunk]:
        mean, deviation = 0.0, 1.0
        if self.normalise:
            mean = float(samples_N.mean(dtype=np.float64)) / INT16_SCALE
            deviation = float(np.sqrt(samples_N.var(dtype=np.float64) / INT16_SCALE**2 + VARIANCE_FLOOR))
        count = -(-len(samples_N) // self.longest)
        bounds = [index * len(samples_N) // count for index in range(count + 1)]
        return [Chunk(samples_N[start:end], mean, deviation) for start, end in itertools.pairwise(bounds)]

    def _embed(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        if self.alone:
            return self.workers.map(lambda chunk: self._embed_batch([chunk])[0], chunks)
        # The longest come first: the first micro-batch measures the most memory, and similar lengths share a call.
        order = sorted(range(len(chunks)), key=lambda index: -chunks[index].length)
        computed = self.micro_batches.compute(self._embed_batch, [chunks[index] for index in order])
        embeddings: list[Any] = [None] * len(chunks)
        for index, embedding_D in zip(order, computed, strict=True):
            embeddings[index] = embedding_D
        return embeddings

    @torch.inference_mode()
    def _embed_batch(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """Return a (D,) float32 embedding of each chunk."""
        lengths_B = np.array([chunk.length for chunk in chunks])
        sounds_BN = torch.from_numpy(chunks[0].sound()[None]) if self.alone else self._sounds(chunks)
        padded = bool((lengths_B < lengths_B.max()).any())
        mask_BN = torch.from_numpy(np.arange(lengths_B.max()) < lengths_B[:, None]).to(self.device) if padded else None
        if self.norm is not None:
            self.norm.lengths_B = torch.from_numpy(lengths_B).to(self.device) if padded else None
        try:
            output = self.model(sounds_BN.to(self.dtype), attention_mask=mask_BN, output_hidden_states=self.layer != -1)
        finally:
            if self.norm is not None:
                self.norm.lengths_B = None  # They apply to this call only.
        hidden_BTD = (output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]).float()
        if not padded:
            return list(hidden_BTD.mean(dim=1).cpu().numpy())
        steps_B = self.model._get_feat_extract_output_lengths(torch.from_numpy(lengths_B)).to(self.device)
        inside_BT1 = (torch.arange(hidden_BTD.shape[1], device=self.device) < steps_B[:, None])[:, :, None]
        return list(((hidden_BTD * inside_BT1).sum(dim=1) / steps_B[:, None]).cpu().numpy())

    def _sounds(self, chunks: Sequence[Chunk]) -> Tensor:
        """Return the chunks' sounds, (B, N) float32 with zeros behind them: int16 is copied to the device and normalised there."""
        samples_BN = np.zeros((len(chunks), max(chunk.length for chunk in chunks)), np.int16)
        for row, chunk in enumerate(chunks):
            samples_BN[row, chunk.start : chunk.start + len(chunk.samples_N)] = chunk.samples_N
        of_chunks_4B1 = torch.tensor(
            [[chunk.start, chunk.start + len(chunk.samples_N), chunk.mean, chunk.deviation] for chunk in chunks], device=self.device
        ).T.unsqueeze(2)
        start_B1, end_B1, mean_B1, deviation_B1 = of_chunks_4B1
        place_N = torch.arange(samples_BN.shape[1], device=self.device)
        sounds_BN = (staged(samples_BN, self.device).to(self.device, non_blocking=True) / INT16_SCALE - mean_B1) / deviation_B1
        return sounds_BN * ((place_N >= start_B1) & (place_N < end_B1))


class OwnStatisticsGroupNorm(nn.GroupNorm):
    """Group norm with one channel per group, with mean and variance over each sound's own part of a padded batch."""

    kernel: int
    stride: int
    lengths_B: Tensor | None = None  # samples of each sound in the batch; None if nothing is padded

    def forward(self, values_BCT: Tensor) -> Tensor:
        if self.lengths_B is None:
            return super().forward(values_BCT)
        steps_B = (self.lengths_B - self.kernel) // self.stride + 1
        inside_B1T = (torch.arange(values_BCT.shape[2], device=values_BCT.device) < steps_B[:, None])[:, None]
        exact_BCT = values_BCT.float()
        count_B11 = steps_B[:, None, None]
        mean_BC1 = (exact_BCT * inside_B1T).sum(dim=2, keepdim=True) / count_B11
        centred_BCT = exact_BCT - mean_BC1
        variance_BC1 = (centred_BCT.square() * inside_B1T).sum(dim=2, keepdim=True) / count_B11
        normed_BCT = centred_BCT * torch.rsqrt(variance_BC1 + self.eps)
        return (normed_BCT * self.weight.float()[:, None] + self.bias.float()[:, None]).to(values_BCT.dtype)


def _own_statistics(model: Any) -> OwnStatisticsGroupNorm | None:
    """Replace the model's group norm, if it has one, by one that excludes padding."""
    layer = model.feature_extractor.conv_layers[0]
    old = getattr(layer, "layer_norm", None)
    if not isinstance(old, nn.GroupNorm):
        return None
    new = OwnStatisticsGroupNorm(old.num_groups, old.num_channels, old.eps, device=old.weight.device, dtype=old.weight.dtype)
    new.load_state_dict(old.state_dict())
    new.requires_grad_(False)
    new.kernel, new.stride = layer.conv.kernel_size[0], layer.conv.stride[0]
    layer.layer_norm = new
    return new


class ConvolutionByProducts(nn.Module):
    """A grouped 1-D convolution as one matrix product a group, for GPUs: (B, C, T) -> (B, O, T + 2 * padding - K + 1).

    wav2vec 2.0's convolution of the positions has 16 groups and K = 128 taps; cuDNN computes it without tensor cores, in more time
    than the rest of the network takes. STEPS outputs in a row depend on STEPS + K - 1 inputs; the matrix from the ones to the others
    holds the kernel STEPS times, each time one step on. Its zeros cost STEPS / K more arithmetic, and the inputs are copied
    (STEPS + K - 1) / STEPS times.
    """

    STEPS = 16

    def __init__(self, convolution: nn.Conv1d) -> None:
        """Take the weights of a convolution with a bias, zeros as padding, and stride and dilation 1."""
        super().__init__()
        self.groups, self.kernel, self.padding = convolution.groups, convolution.kernel_size[0], int(convolution.padding[0])
        weight_GOIK = convolution.weight.detach().unflatten(0, (self.groups, -1))
        groups, outputs, inputs, kernel = weight_GOIK.shape
        matrix_GIWSO = weight_GOIK.new_zeros(groups, inputs, self.STEPS + kernel - 1, self.STEPS, outputs)
        for step in range(self.STEPS):
            matrix_GIWSO[:, :, step : step + kernel, step] = weight_GOIK.permute(0, 2, 3, 1)
        self.matrix = matrix_GIWSO.flatten(3).flatten(1, 2)
        assert convolution.bias is not None
        self.bias: Tensor = convolution.bias

    def forward(self, x_BCT: Tensor) -> Tensor:
        B, _, T = x_BCT.shape
        steps = T + 2 * self.padding - self.kernel + 1
        pieces = -(-steps // self.STEPS)
        padded_BCT = functional.pad(x_BCT, (self.padding, pieces * self.STEPS + self.kernel - 1 - T - self.padding))
        inputs_BGIPW = padded_BCT.unfold(2, self.STEPS + self.kernel - 1, self.STEPS).unflatten(1, (self.groups, -1))
        outputs = inputs_BGIPW.permute(1, 0, 3, 2, 4).reshape(self.groups, B * pieces, -1) @ self.matrix
        outputs_BCT = outputs.view(self.groups, B, pieces * self.STEPS, -1).permute(1, 0, 3, 2).flatten(1, 2)
        return outputs_BCT[:, :, :steps] + self.bias[:, None]


def _positions_by_products(model: Any) -> None:
    """Replace the convolution of the positions. (Of HuBERT it may be a sequence with a norm: that stays.)"""
    positions = model.encoder.pos_conv_embed
    if isinstance(positions.conv, nn.Conv1d):
        positions.conv = ConvolutionByProducts(positions.conv)


def _asks_to_normalise(folder: Path) -> bool:
    """Return do_normalize of the checkpoint's feature extractor. Raises WeightsError if it is missing or has another sampling rate."""
    config = weights.read_preprocessor(str(folder))
    if config.get("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
        raise weights.WeightsError(f"the checkpoint {folder} takes {config['sampling_rate']} Hz; shots have {SAMPLE_RATE} Hz")
    return bool(config.get("do_normalize", True))
