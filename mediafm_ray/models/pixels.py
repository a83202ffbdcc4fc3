"""Frames to the pixels that a CLIP or SigLIP network takes: the checkpoint's own preprocessing, in batches on any device.

Pillow's resampling is two matrix products with rounding to bytes after each. Done here in float64 with Pillow's own integer
weights, every sum is exact and every byte equal to Pillow's, on a CPU or a GPU, and frames need not be scaled one by one.

Shapes
    B  frames of one size
    C  3 channels, RGB
    H, W  height and width
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mediafm_ray.models.weights import WeightsError, read_json

# Pillow keeps the memory of so many pictures for the next ones. By default it keeps none, and until the system has handed out the pages
# of a picture anew, with Python locked, decoding it takes twice as long.
PICTURES_KEPT = 32
Image.core.set_blocks_max(PICTURES_KEPT)
PRECISION_BITS = 22  # of Pillow's integer weights: 32 less 8 of a pixel and 2 of headroom
PREPROCESSOR = "preprocessor_config.json"


def _cubic(x: float) -> float:
    """Keys' kernel with a = -0.5, Pillow's bicubic."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


FILTERS: dict[int, tuple[Callable[[float], float], float]] = {  # by Pillow's number: kernel, and how far it reaches
    Image.Resampling.BILINEAR: (_triangle, 1.0),
    Image.Resampling.BICUBIC: (_cubic, 2.0),
}


@dataclass(frozen=True)
class PixelRecipe:
    """What preprocessor_config.json of a checkpoint says."""

    resize_to: tuple[int, int] | int  # (height, width), or the length of the shorter side
    crop: tuple[int, int] | None  # (height, width) of the centre, after resizing
    resample: int  # Pillow's number of the filter
    scale: float  # from bytes
    mean: tuple[float, float, float]  # of RGB, after scaling
    deviation: tuple[float, float, float]

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) to which a frame of that size is scaled, before the crop."""
        if not isinstance(self.resize_to, int):
            return self.resize_to
        if width <= height:
            return int(self.resize_to * height / width), self.resize_to
        return self.resize_to, int(self.resize_to * width / height)


def read_pixel_recipe(folder: Path) -> PixelRecipe:
    """The recipe of a checkpoint. Raises WeightsError where the file is missing or asks for what is not done here."""
    path = folder / PREPROCESSOR
    if not path.is_file():
        raise WeightsError(f"no {PREPROCESSOR} in {folder}: the checkpoint must say how its pixels are prepared")
    config = read_json(path)
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
            raise ValueError("frames of different shapes would stay so: there is no crop")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} cannot be followed: {error!r}") from error
    scale = float(config.get("rescale_factor", 1 / 255))
    return PixelRecipe(size, crop, resample, scale, mean, deviation)


def decode_jpeg(jpeg: bytes, shot: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB, read-only. Raises ValueError, with the position of its shot, for what Pillow cannot decode."""
    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except OSError as error:  # Pillow's UnidentifiedImageError and its errors for truncated files are OSErrors
        raise ValueError(f"a frame of shot {shot} ({len(jpeg)} bytes) is not a JPEG that Pillow can decode: {error}") from error


def prepare(frames_BHWC: Tensor, recipe: PixelRecipe) -> Tensor:
    """(B, H, W, 3) uint8 RGB to (B, 3, h, w) float32, scaled, cropped and normalised on the tensor's own device."""
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


@functools.lru_cache(maxsize=8)  # a copy to a GPU would wait for all that it has to compute before
def _of_channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """(C, 1, 1) float32."""
    return torch.tensor(values, device=device)[:, None, None]


def _down_first(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Whether Pillow (since 13.0) scales the height before the width. It shows: the bytes between the two passes are rounded."""
    lost_rows, lost_columns = size[0] - resized[0], size[1] - resized[1]
    return lost_rows > 0 and lost_rows > 2 * lost_columns


def _to_bytes(sums: Tensor) -> Tensor:
    """Sums of bytes times integer weights, rounded half up to bytes; all whole numbers in float64."""
    return torch.floor((sums + 2 ** (PRECISION_BITS - 1)) / 2**PRECISION_BITS).clamp_(0, 255)


@functools.lru_cache(maxsize=64)  # a title has one size, and there are few among many titles
def _weights(size: int, resized: int, cropped: int, resample: int, device: torch.device) -> Tensor:
    """(cropped, size) float64, whole numbers: row i holds the weights of the input for pixel i of the centre crop of the output."""
    kernel, reach = FILTERS[resample]
    scale = size / resized
    stretch = max(scale, 1.0)  # antialiasing: the kernel grows when scaling down
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
