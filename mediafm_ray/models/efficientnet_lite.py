"""EfficientNet-Lite0 as a video encoder: the mean over a shot's frames of the features before the classifier.

The network is EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946) without squeeze-and-excitation and with ReLU6 in place of
swish (the "lite" models of github.com/tensorflow/tpu). The weights are TensorFlow's, so its conventions apply: padding "SAME",
batch norm with epsilon 0.001, pixels as (value - 127) / 128. Batch norm is folded into the convolutions when loading.

Shapes
    B  frames in one call of the network
    C  3 channels, RGB; or the channels of a layer
    H, W  height and width
    D  1280, the embedding
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mediafm_ray.models import weights
from mediafm_ray.models.encoder import EFFICIENTNET_LITE0_DIM
from mediafm_ray.models.loading import load_state, staged
from mediafm_ray.models.options import VideoEncoderConfig
from mediafm_ray.models.pixels import FrameEncoder, open_jpeg

IMAGE_SIZE = 224  # pixels, width and height
CROP_FRACTION = 224 / (224 + 32)  # Part of the shorter side in the centre crop, as in the evaluation of the published weights.
PIXEL_MEAN = 127.0
PIXEL_SCALE = 128.0
BATCH_NORM_EPSILON = 1e-3
STEM_CHANNELS = 32
CLASSES = 1000

# The stages of EfficientNet-B0: (kernel, stride, expansion, channels out, repeats). Only the first block of a stage has the stride.
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
    """A convolution with TensorFlow's padding: the output has ceil(input / stride) pixels, odd padding is at the right and bottom."""

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
    """A 1 x 1 expansion, a depthwise convolution and a linear 1 x 1 projection (Sandler et al. 2018, arXiv:1801.04381)."""

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
    """The network from (B, 3, 224, 224) pixels, ``(value - 127) / 128``, to (B, 1280) pooled features; ``classifier`` is ImageNet's."""

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
    """Load the network with the published weights at ``address``, in evaluation mode. Raises WeightsError if they do not fit."""
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
    """Load the published weights into a convolution, with the following batch norm folded in (in float64)."""
    scale_C = state[f"{norm_name}.weight"].double() / (state[f"{norm_name}.running_var"].double() + BATCH_NORM_EPSILON).sqrt()
    weight = state[f"{conv_name}.weight"].double() * scale_C[:, None, None, None]
    bias_C = state[f"{norm_name}.bias"].double() - state[f"{norm_name}.running_mean"].double() * scale_C
    conv.load_state_dict({"weight": weight.float(), "bias": bias_C.float()})


def load_frame(jpeg: bytes, shot: int) -> np.ndarray:
    """Return the central square of 7/8 of the shorter side of a JPEG, scaled to (224, 224, 3) uint8 RGB by antialiased bicubic."""
    image = open_jpeg(jpeg, shot)
    side = CROP_FRACTION * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box))


class EfficientNetLiteEncoder(FrameEncoder):
    """The video encoder of the offline profile; see FrameEncoder. Its 4.7 million weights were trained on ImageNet."""

    dim = EFFICIENTNET_LITE0_DIM
    decoded_together = 512

    def __init__(self, config: VideoEncoderConfig) -> None:
        """Load the weights. Raises ValueError for a wrong device, WeightsError for weights that are missing or do not fit."""
        super().__init__(config)
        self.network = load_efficientnet_lite0(config.weights).to(self.device)
        self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def _decode(self, jpeg: bytes, shot: int) -> Tensor:
        return staged(load_frame(jpeg, shot), self.device)

    @torch.inference_mode()
    def _embed_frames(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """See FrameEncoder; frames are (224, 224, 3) uint8."""
        pixels_BHWC = torch.stack([frame.to(self.device, non_blocking=True) for frame in frames])
        images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float().sub_(PIXEL_MEAN).div_(PIXEL_SCALE)  # The memory stays channels-last.
        return list(self.network(images_BCHW))
