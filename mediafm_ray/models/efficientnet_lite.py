"""EfficientNet-Lite0 as a video encoder: the mean over a shot's frames of the features before the classifier.

The network is EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946) without squeeze-and-excitation and with ReLU6 in place of
swish (the "lite" models of github.com/tensorflow/tpu). The weights are TensorFlow's own, so its conventions hold: padding "SAME",
batch norm with epsilon 0.001, pixels as (value - 127) / 128. Batch norm is folded into the convolutions when loading.

Shapes
    B  frames in one call of the network
    S  shots
    C  3 channels, RGB; or the channels of a layer
    H, W  height and width
    D  1280, the embedding
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mediafm_ray.models import weights
from mediafm_ray.models.encoder import EFFICIENTNET_LITE0_DIM, Encoded
from mediafm_ray.models.loading import MicroBatches, Workers, load_state, open_device, staged
from mediafm_ray.models.options import VideoEncoderConfig

IMAGE_SIZE = 224  # pixels, both ways
CROP_FRACTION = 224 / (224 + 32)  # of the shorter side, from the centre: the evaluation crop the weights were published with
PIXEL_MEAN = 127.0
PIXEL_SCALE = 128.0
BATCH_NORM_EPSILON = 1e-3
STEM_CHANNELS = 32
CLASSES = 1000
DECODED_TOGETHER = 512  # frames decoded while the GPU computes those before them

# (kernel, stride, expansion, channels out, repeats): the stages of EfficientNet-B0; only the first block of a stage strides
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class SamePaddedConv(nn.Conv2d):
    """A convolution whose output is ceil(input / stride), as TensorFlow pads: an odd pixel goes to the right and the bottom."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = images_BCHW.shape[-2:]
        down = max((-(-height // stride) - 1) * stride + kernel - height, 0)
        right = max((-(-width // stride) - 1) * stride + kernel - width, 0)
        if down % 2 == 0 and right % 2 == 0:
            return F.conv2d(images_BCHW, self.weight, self.bias, stride, (down // 2, right // 2), groups=self.groups)
        padded_BCHW = F.pad(images_BCHW, (right // 2, right - right // 2, down // 2, down - down // 2))
        return F.conv2d(padded_BCHW, self.weight, self.bias, stride, groups=self.groups)


class InvertedResidual(nn.Module):
    """Widen with 1 x 1, filter each channel, narrow with 1 x 1 and no activation (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, kernel: int, stride: int, expansion: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.expand = SamePaddedConv(channels_in, wide, 1) if expansion > 1 else None
        self.depthwise = SamePaddedConv(wide, wide, kernel, stride, groups=wide)
        self.project = SamePaddedConv(wide, channels_out, 1)
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, images_BCHW: Tensor) -> Tensor:
        wide_BCHW = images_BCHW if self.expand is None else F.relu6(self.expand(images_BCHW))
        narrow_BCHW = self.project(F.relu6(self.depthwise(wide_BCHW)))
        return images_BCHW + narrow_BCHW if self.residual else narrow_BCHW


class EfficientNetLite0(nn.Module):
    """(B, 3, 224, 224) pixels as ``(value - 127) / 128`` to (B, 1280) pooled features; ``classifier`` maps those to ImageNet's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SamePaddedConv(3, STEM_CHANNELS, 3, 2)
        blocks, channels = [], STEM_CHANNELS
        for kernel, stride, expansion, channels_out, repeats in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(kernel, stride if repeat == 0 else 1, expansion, channels, channels_out))
                channels = channels_out
        self.blocks = nn.ModuleList(blocks)
        self.head = SamePaddedConv(channels, EFFICIENTNET_LITE0_DIM, 1)
        self.classifier = nn.Linear(EFFICIENTNET_LITE0_DIM, CLASSES)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        images_BCHW = F.relu6(self.stem(images_BCHW))
        for block in self.blocks:
            images_BCHW = block(images_BCHW)
        return F.relu6(self.head(images_BCHW)).mean(dim=(2, 3))


def load_efficientnet_lite0(address: str) -> EfficientNetLite0:
    """The network with the published weights at ``address``, in evaluation mode. Raises WeightsError where they do not fit."""
    state = load_state(weights.resolve(address))
    network = EfficientNetLite0()
    try:
        _fold(network.stem, state, "_conv_stem", "_bn0")
        for index, block in enumerate(network.blocks):
            assert isinstance(block, InvertedResidual)
            prefix = f"_blocks.{index}."
            if block.expand is not None:
                _fold(block.expand, state, prefix + "_expand_conv", prefix + "_bn0")
            _fold(block.depthwise, state, prefix + "_depthwise_conv", prefix + "_bn1")
            _fold(block.project, state, prefix + "_project_conv", prefix + "_bn2")
        _fold(network.head, state, "_conv_head", "_bn1")
        network.classifier.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
    except (KeyError, RuntimeError, AttributeError) as error:
        raise weights.WeightsError(f"{address} does not hold the weights of EfficientNet-Lite0: {error}") from error
    return network.requires_grad_(False).eval()


def _fold(conv: nn.Conv2d, state: dict[str, Tensor], conv_name: str, norm_name: str) -> None:
    """Give a convolution the published weights with the batch norm that follows it multiplied in (in float64)."""
    scale_C = state[f"{norm_name}.weight"].double() / (state[f"{norm_name}.running_var"].double() + BATCH_NORM_EPSILON).sqrt()
    weight = state[f"{conv_name}.weight"].double() * scale_C[:, None, None, None]
    bias_C = state[f"{norm_name}.bias"].double() - state[f"{norm_name}.running_mean"].double() * scale_C
    conv.load_state_dict({"weight": weight.float(), "bias": bias_C.float()})


def load_frame(jpeg: bytes) -> np.ndarray:
    """A JPEG to (224, 224, 3) uint8 RGB: the central square of 7/8 of the shorter side, scaled by antialiased bicubic."""
    with Image.open(io.BytesIO(jpeg)) as opened:
        image = opened.convert("RGB")
    side = CROP_FRACTION * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box))


class EfficientNetLiteEncoder:
    """The video encoder of the offline profile. Weights: about 4.7 million, trained on ImageNet.

    On a CPU every frame is computed alone and on one thread: its numbers depend neither on neighbours nor on the number of threads.
    """

    dim = EFFICIENTNET_LITE0_DIM

    def __init__(self, config: VideoEncoderConfig) -> None:
        """Raises ValueError for a device this machine does not have, WeightsError for weights that are missing or do not fit."""
        self.device = open_device(config.device)
        self.alone = self.device.type == "cpu"  # one frame a call is the fastest there, too: its activations stay in the cache
        self.workers = Workers(config.threads)
        self.micro_batches = MicroBatches(self.device, config.micro_batch)
        self.network = load_efficientnet_lite0(config.weights).to(self.device)
        self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def encode(self, shots: Sequence[Sequence[bytes]]) -> Encoded:
        """See VideoEncoder. Raises ValueError, with the shot's position, for a frame that Pillow cannot decode."""
        frames = [(jpeg, shot) for shot, jpegs in enumerate(shots) for jpeg in jpegs]
        if self.alone:
            features = self.workers.map(lambda frame: self._features([self._load(*frame)])[0], frames)
        else:
            features = self.workers.feed(
                lambda frame: self._load(*frame),
                frames,
                DECODED_TOGETHER,
                lambda loaded: self.micro_batches.compute(self._features, loaded),
            )
        features_FD = torch.stack(features).cpu().numpy() if features else np.zeros((0, self.dim), np.float32)
        embeddings_SD = np.zeros((len(shots), self.dim), np.float32)
        first = 0
        for shot, jpegs in enumerate(shots):
            if jpegs:
                embeddings_SD[shot] = np.mean(features_FD[first : first + len(jpegs)], axis=0, dtype=np.float64)
                first += len(jpegs)
        return Encoded(embeddings_SD, np.array([len(jpegs) > 0 for jpegs in shots], bool))

    def _load(self, jpeg: bytes, shot: int) -> Tensor:
        try:
            return staged(load_frame(jpeg), self.device)
        except OSError as error:  # Pillow's UnidentifiedImageError and its errors for truncated files are OSErrors
            raise ValueError(f"a frame of shot {shot} ({len(jpeg)} bytes) is not a JPEG that Pillow can decode: {error}") from error

    @torch.inference_mode()
    def _features(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """(224, 224, 3) uint8 frames to (1280,) float32 each, on the device; a GPU may still be at work on them."""
        pixels_BHWC = torch.stack([frame.to(self.device, non_blocking=True) for frame in frames])
        images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float().sub_(PIXEL_MEAN).div_(PIXEL_SCALE)  # stays channels-last in memory
        return list(self.network(images_BCHW))
