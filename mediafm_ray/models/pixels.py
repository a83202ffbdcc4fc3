"""Frames of video encoders: decoding, the common part of the encoders, and preprocessing for CLIP and SigLIP as checkpoints ask for it.

Pillow's resampling is two matrix products with rounding to bytes after each. Done here in float64 with Pillow's own integer
weights, every sum is exact and every byte equal to Pillow's, on a CPU or a GPU, and frames of one size are scaled together.

Shapes
    B  frames of one size
    S  shots
    T  frames of a shot
    F  frames of all shots
    D  dimension of an embedding
    C  3 channels, RGB
    H, W  height and width
"""

from __future__ import annotations

import abc
import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mediafm_ray.models.encoder import Encoded
from mediafm_ray.models.loading import MicroBatches, Workers, open_device
from mediafm_ray.models.options import VideoEncoderConfig
from mediafm_ray.models.weights import PREPROCESSOR, WeightsError, read_preprocessor

# Pillow reuses the memory of this many blocks (pictures). By default it reuses none: then the system allocates every picture's pages
# again while Python is locked, and decoding takes twice as long.
MAX_REUSED_BLOCKS = 32
Image.core.set_blocks_max(MAX_REUSED_BLOCKS)
PRECISION_BITS = 22  # Pillow's integer weights have 32 bits, less 8 of a pixel and 2 of headroom.


def _cubic(x: float) -> float:
    """Return Keys' kernel with a = -0.5, Pillow's bicubic."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


FILTERS: dict[int, tuple[Callable[[float], float], float]] = {  # Pillow's number of the filter -> kernel, its reach
    Image.Resampling.BILINEAR: (_triangle, 1.0),
    Image.Resampling.BICUBIC: (_cubic, 2.0),
}


@dataclass(frozen=True)
class PixelRecipe:
    """The preprocessing that a checkpoint's preprocessor_config.json asks for."""

    resize_to: tuple[int, int] | int  # (height, width), or the shorter side
    crop: tuple[int, int] | None  # (height, width) of the centre, after resizing
    resample: int  # Pillow's number of the filter
    scale: float  # factor on bytes
    mean: tuple[float, float, float]  # RGB, after scaling
    deviation: tuple[float, float, float]

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which a frame is scaled before the crop."""
        if not isinstance(self.resize_to, int):
            return self.resize_to
        if width <= height:
            return int(self.resize_to * height / width), self.resize_to
        return self.resize_to, int(self.resize_to * width / height)


def read_pixel_recipe(folder: Path) -> PixelRecipe:
    """Return the recipe of a checkpoint. Raises WeightsError if its file is missing or asks for an unsupported step."""
    config = read_preprocessor(str(folder))
    try:
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not config.get(step, True):
                raise ValueError(f"{step} is off")
        mean, deviation = (tuple(float(value) for value in config[name]) for name in ("image_mean", "image_std"))
        if len(mean) != 3 or len(deviation) != 3:
            raise ValueError("image_mean and image_std must have three values")
        resample = int(config.get("resample", Image.Resampling.BICUBIC))
        if resample not in FILTERS:
            raise ValueError(f"resample is {resample}: only {sorted(int(known) for known in FILTERS)} (bilinear, bicubic) are known")
        size = config["size"]
        if isinstance(size, dict):
            size = int(size["shortest_edge"]) if "shortest_edge" in size else (int(size["height"]), int(size["width"]))
        crop = config.get("crop_size") if config.get("do_center_crop") else None
        if isinstance(crop, dict):
            crop = (int(crop["height"]), int(crop["width"]))
        elif crop is not None:
            crop = (int(crop), int(crop))
        if crop is not None and max(crop) > (size if isinstance(size, int) else min(size)):
            raise ValueError(f"the crop {crop} is larger than the scaled picture {size}")
        if crop is None and isinstance(size, int):
            raise ValueError("there is no crop, so frames of different shapes would not get one size")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / PREPROCESSOR} cannot be followed: {error!r}") from error
    scale = float(config.get("rescale_factor", 1 / 255))
    return PixelRecipe(size, crop, resample, scale, mean, deviation)


def open_jpeg(jpeg: bytes, shot: int) -> Image.Image:
    """Decode a JPEG to an RGB image. Raises ValueError, with the index of its shot, if Pillow cannot decode it."""
    try:
        image = Image.open(io.BytesIO(jpeg))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except OSError as error:  # Pillow's UnidentifiedImageError and its errors for truncated files are OSErrors.
        raise ValueError(f"a frame of shot {shot} ({len(jpeg)} bytes) is not a JPEG that Pillow can decode: {error}") from error


def decode_jpeg(jpeg: bytes, shot: int) -> np.ndarray:
    """Return a JPEG as read-only (H, W, 3) uint8 RGB; see ``open_jpeg``."""
    return np.asarray(open_jpeg(jpeg, shot))


class FrameEncoder(abc.ABC):
    """The common part of video encoders: the embedding of a shot is the mean over its frames.

    On a CPU, every frame is computed alone and on one thread: its numbers depend neither on neighbours nor on the number of threads. On a
    GPU, frames of all shots share micro-batches, and numbers of different batchings agree to rounding.
    """

    dim: int
    decoded_together = 256  # Frames that are decoded while the GPU computes the previous ones.

    def __init__(self, config: VideoEncoderConfig) -> None:
        """Prepare device, threads and micro-batches. Raises ValueError for a device that this machine does not have."""
        self.device = open_device(config.device)
        self.alone = self.device.type == "cpu"  # There one frame per call is also the fastest: its activations stay in the cache.
        self.workers = Workers(config.threads)
        self.micro_batches = MicroBatches(self.device, config.micro_batch)

    def encode(self, shots: Sequence[Sequence[bytes]]) -> Encoded:
        """See VideoEncoder. Raises ValueError, with the index of the shot, for a frame that Pillow cannot decode."""
        jpegs = [(jpeg, shot) for shot, frames in enumerate(shots) for jpeg in frames]
        if self.alone:
            features = self.workers.map(lambda frame: self._embed_frames([self._decode(*frame)])[0], jpegs)
        else:
            features = self.workers.feed(
                lambda frame: self._decode(*frame),
                jpegs,
                self.decoded_together,
                lambda frames: self.micro_batches.compute(self._embed_frames, frames),
            )
        features_FD = torch.stack(features).cpu().numpy() if features else np.zeros((0, self.dim), np.float32)
        ends = np.cumsum([len(frames) for frames in shots], dtype=np.int64)
        of_shots = {shot: frames_TD for shot, frames_TD in enumerate(np.split(features_FD, ends[:-1])) if len(frames_TD)}
        embeddings_SD = np.zeros((len(shots), self.dim), np.float32)
        for shot, embedding_D in self._pool(of_shots).items():
            embeddings_SD[shot] = embedding_D
        return Encoded(embeddings_SD, np.array([len(frames) > 0 for frames in shots], bool))

    @abc.abstractmethod
    def _decode(self, jpeg: bytes, shot: int) -> Tensor:
        """Return a decoded frame of a shot, in memory from which the device can copy."""

    @abc.abstractmethod
    def _embed_frames(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """Return a (D,) float32 embedding of each decoded frame, on the device; a GPU may still be computing them."""

    def _pool(self, of_shots: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Pool the (T, D) frame embeddings of each shot to one (D,) embedding."""
        return {shot: frames_TD.mean(axis=0, dtype=np.float64) for shot, frames_TD in of_shots.items()}


def prepare(frames_BHWC: Tensor, recipe: PixelRecipe) -> Tensor:
    """Scale, crop and normalise (B, H, W, 3) uint8 RGB to (B, 3, h, w) float32 on the tensor's device."""
    height, width = frames_BHWC.shape[1:3]
    rows, columns = recipe.resized(height, width)
    crop_rows, crop_columns = recipe.crop or (rows, columns)
    device = frames_BHWC.device
    across = _weights(width, columns, crop_columns, recipe.resample, device)
    down = _weights(height, rows, crop_rows, recipe.resample, device)
    pixels_BCHW = frames_BHWC.permute(0, 3, 1, 2).double()
    if _down_first((height, width), (rows, columns)):
        pixels_BCHW = _to_bytes(_to_bytes(down @ pixels_BCHW) @ across.T)
    else:
        pixels_BCHW = _to_bytes(down @ _to_bytes(pixels_BCHW @ across.T))
    return ((pixels_BCHW * recipe.scale).float() - _of_channels(recipe.mean, device)) / _of_channels(recipe.deviation, device)


@functools.lru_cache(maxsize=8)  # A copy to a GPU would wait for all its earlier work.
def _of_channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Return a (C, 1, 1) float32 tensor."""
    return torch.tensor(values, device=device)[:, None, None]


def _down_first(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Return True if Pillow (since 13.0) scales the height before the width. The order matters: bytes are rounded between the passes."""
    lost_rows, lost_columns = size[0] - resized[0], size[1] - resized[1]
    return lost_rows > 0 and lost_rows > 2 * lost_columns


def _to_bytes(sums: Tensor) -> Tensor:
    """Round sums of bytes times integer weights half up to bytes; all are whole numbers in float64."""
    return torch.floor((sums + 2 ** (PRECISION_BITS - 1)) / 2**PRECISION_BITS).clamp_(0, 255)


@functools.lru_cache(maxsize=64)  # A title has one frame size, and many titles share a few sizes.
def _weights(size: int, resized: int, cropped: int, resample: int, device: torch.device) -> Tensor:
    """Return (cropped, size) whole numbers as float64: row i weighs the input for pixel i of the output's centre crop."""
    kernel, reach = FILTERS[resample]
    scale = size / resized
    stretch = max(scale, 1.0)  # For antialiasing, the kernel grows when scaling down.
    first = (resized - cropped) // 2
    weights = np.zeros((cropped, size))
    for row in range(cropped):
        centre = (first + row + 0.5) * scale
        start = max(0, int(centre - reach * stretch + 0.5))
        end = min(size, int(centre + reach * stretch + 0.5))
        values = np.array([kernel((x - centre + 0.5) / stretch) for x in range(start, end)])
        whole: list[Any] = [math.floor(abs(value) * 2**PRECISION_BITS + 0.5) * math.copysign(1, value) for value in values / values.sum()]
        weights[row, start:end] = whole
    return torch.from_numpy(weights).to(device)
