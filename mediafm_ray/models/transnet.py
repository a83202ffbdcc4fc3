"""TransNet V2 (Soucek and Lokoc 2020, arXiv:2008.04838), the network: frames -> probabilities of a transition. ``detector`` runs it.

It is written here for inference (batch norm folded into the weights, the four dilated branches' spatial convolutions done as one); its
weights are the published ones. It computes either windows of a title, as published, or the title as one sequence that comes in chunks,
each layer keeping the frames that its next outputs need.

Pixel contract: (T, 27, 48, 3) uint8 RGB (not BGR), rows top to bottom, the whole picture scaled to 48 x 27 whatever its aspect.

Shape suffixes
    B     windows of frames          H, W  rows and columns (27 x 48 at the input)
    T, N  frames                     S     positions of a frame, H * W
    C     channels                   K     neighbours a frame is compared with (101)
Weights are named _OIHW as torch has them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------- the network: frames -> probabilities

DILATIONS = (1, 2, 4, 8)  # frames between the taps of the four branches of a layer
REACH = max(DILATIONS)  # frames before and after one that a layer's output for it depends on
BLOCKS = 3  # each halves the picture; two layers in each
BATCH_NORM_EPS = 1e-3
NEIGHBOURS = 101  # K: 50 frames before, the frame itself, 50 after
HISTOGRAM_BITS = 3  # a colour channel's bits that choose its bin: 8 * 8 * 8 = 512 bins
PIXEL_MAX = 255.0
MAX_INT8 = 127  # Largest integer of weights, and of inputs, which have 7 bits.
MIN_WEIGHT = 1e-12  # A channel whose weights are all zero has a scale, too.
RANGE_SIGMAS = 6  # Standard deviations above the mean, both known from the batch norm, at which a channel's values end.


class DilatedLayer:
    """Four branches of (1 x 3 x 3 spatial, 3 x 1 x 1 temporal) convolution, their batch norm folded in.

    ``input_max``: the largest input, where the spatial convolutions, nine tenths of the work, are to be done in 8-bit integers.
    """

    def __init__(
        self, published: dict[str, Tensor], prefix: str, dtype: torch.dtype, input_scale: float = 1.0, input_max: float | None = None
    ) -> None:
        spatial = [published[f"{prefix}.Conv3D_{dilation}.layers.0.weight"][:, :, 0] for dilation in DILATIONS]
        temporal = torch.stack([published[f"{prefix}.Conv3D_{dilation}.layers.1.weight"][..., 0] for dilation in DILATIONS])
        scale = published[f"{prefix}.bn.weight"] / torch.sqrt(published[f"{prefix}.bn.running_var"] + BATCH_NORM_EPS)
        bias = published[f"{prefix}.bn.bias"] - published[f"{prefix}.bn.running_mean"] * scale
        self.spatial_OIHW = (torch.cat(spatial) * input_scale).to(dtype).contiguous(memory_format=torch.channels_last)
        self.temporal_4OIHW = (temporal * scale.view(len(DILATIONS), -1, 1, 1, 1)).to(dtype)
        self.bias_4O = bias.view(len(DILATIONS), -1).to(dtype)
        self.integers = None if input_max is None else Int8Convolution(self.spatial_OIHW, input_max)

    def __call__(self, x_BTHWC: Tensor) -> Tensor:
        """Compute windows, with zeros before and after each."""
        B, T, H, W, _ = x_BTHWC.shape
        branches = self.spatial(x_BTHWC.flatten(0, 1)).unflatten(0, (B, T)).chunk(len(DILATIONS), dim=-1)
        out = [self.temporal(branch, spatial_BTSC, DILATIONS[branch]) for branch, spatial_BTSC in enumerate(branches)]
        return torch.cat(out, dim=-1).reshape(B, T, H, W, -1)

    def spatial(self, x_NHWC: Tensor) -> Tensor:
        """(N, H, W, I) -> (N, S, C): the spatial convolutions of all branches, each frame alone."""
        # Channels last in memory: every permute is a view, and frames are the batch of the 2-D convolution.
        x_NCHW = x_NHWC.permute(0, 3, 1, 2)
        out_NCHW = self.integers(x_NCHW) if self.integers else functional.conv2d(x_NCHW, self.spatial_OIHW, padding=1)
        return out_NCHW.permute(0, 2, 3, 1).flatten(1, 2)

    def temporal(self, branch: int, spatial_BTSC: Tensor, padding: int = 0) -> Tensor:
        """(B, T, S, C) of one branch -> (B, T', S, O): its temporal convolution, with so many frames of zeros before and after."""
        weight_OIHW, bias_O, dilation = self.temporal_4OIHW[branch], self.bias_4O[branch], (DILATIONS[branch], 1)
        spatial_BCTS = spatial_BTSC.permute(0, 3, 1, 2)
        return functional.conv2d(spatial_BCTS, weight_OIHW, bias_O, padding=(padding, 0), dilation=dilation).permute(0, 2, 3, 1)


class Int8Convolution:
    """A 3 x 3 convolution of 7-bit inputs, none of them negative, with 8-bit weights; (N, C, H, W) and its result are float32.

    Sums of two products fit 16 bits, so integers are exact, with and without instructions for dot products of bytes (VNNI): every CPU
    returns the same. Weights have a scale for each output channel, and inputs one, by their largest value.
    """

    def __init__(self, weight_OIHW: Tensor, input_max: float) -> None:
        self.scale = input_max / MAX_INT8
        self.scales_O = weight_OIHW.abs().amax(dim=(1, 2, 3)).clamp(min=MIN_WEIGHT) / MAX_INT8
        self.zeros_O = torch.zeros(len(weight_OIHW), dtype=torch.long)
        integers_OIHW = (weight_OIHW / self.scales_O.view(-1, 1, 1, 1)).round().to(torch.int8)
        self.weight: Tensor = torch.ops.onednn.qconv_prepack(integers_OIHW, self.scales_O, self.scale, 0, [1, 1], [1, 1], [1, 1], 1)

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Compute it; inputs above the largest value count as that."""
        integers_NCHW = (x_NCHW * (1 / self.scale)).round_().clamp_(0, MAX_INT8).to(torch.uint8)
        given = (integers_NCHW, self.scale, 0, self.weight, self.scales_O, self.zeros_O, None, [1, 1], [1, 1], [1, 1], 1)
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(*given, 1.0, 0, torch.float32, "none", [], "")
        return result


@functools.cache
def int8_is_there() -> bool:
    """Return whether this CPU has 8-bit convolutions that are faster than those in float32, and this torch exact ones.

    They are the operators of torch.compile, no public API: a version of torch may lack them or change them.
    """
    if not torch.cpu.get_capabilities().get("avx2"):
        return False
    largest_1CHW = torch.full((1, 64, 3, 3), float(MAX_INT8)).contiguous(memory_format=torch.channels_last)
    try:
        found_1OHW = Int8Convolution(largest_1CHW.expand(32, -1, -1, -1), MAX_INT8)(largest_1CHW)
    except (AttributeError, RuntimeError, TypeError) as problem:
        log.warning(
            "detection computes in float32 and takes longer: torch %s has other 8-bit convolutions (%s)", torch.__version__, problem
        )
        return False
    return float(found_1OHW[0, 0, 1, 1]) == float(largest_1CHW.square().sum())


class Dense:
    """A fully connected layer: (..., I) -> (..., O), in the layer's own precision."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor) -> None:
        self.weight_OI = weight_OI
        self.bias_O = bias_O

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight_OI.dtype), self.weight_OI, self.bias_O)


class TransNetV2:
    """The published network, for inference: (B, T, 27, 48, 3) uint8 RGB -> one_hot, many_hot: (B, T) float32 probabilities.

    one_hot: the frame is the middle of a transition (for a cut, the outgoing shot's last frame).
    many_hot: the frame belongs to a transition.
    Takes the published state dict; raises KeyError or RuntimeError when it is another network's. dtype is that of the convolutions and
    the large matrix product, which are nearly all of the work; what compares frames with one another stays in float32.
    int8: whether the spatial convolutions of features are done in 8-bit integers. What their inputs reach follows from the batch norms
    before them, without data (Nagel et al. 2019, arXiv:1906.04721, section 4.2.1).
    """

    def __init__(self, published: dict[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32, int8: bool = False) -> None:
        published = {name: tensor.to(device) for name, tensor in published.items()}

        def dense(*names: str, dtype: torch.dtype = torch.float32) -> Dense:
            return Dense(*(torch.cat([published[f"{name}.{part}"] for name in names]).to(dtype) for part in ("weight", "bias")))

        self.device = device
        self.dtype = dtype
        # Pixels stay 0 ... 255, which bfloat16 holds exactly; the first layer's weights bring them to 0 ... 1.
        self.blocks = []
        below: float | None = None  # The largest value of the block before.
        for name in (f"SDDCNN.{block}.DDCNN" for block in range(BLOCKS)):
            shortcut_C, added_C = (_largest(published, f"{name}.{layer}") for layer in (0, 1))
            first = DilatedLayer(published, f"{name}.0", dtype, 1 / PIXEL_MAX if below is None else 1.0, below if int8 else None)
            second = DilatedLayer(published, f"{name}.1", dtype, 1.0, float(shortcut_C.max()) if int8 else None)
            self.blocks.append([first, second])
            below = float((shortcut_C + added_C).max())
        self.likeness_projection = dense("frame_sim_layer.projection")
        self.likeness = dense("frame_sim_layer.fc")
        self.colour = dense("color_hist_layer.fc")
        self.hidden = dense("fc1", dtype=dtype)
        self.heads = dense("cls_layer1", "cls_layer2")

    @torch.inference_mode()
    def __call__(self, frames_BTHWC: Tensor) -> Tensor:
        """(B, T, 27, 48, 3) uint8 windows -> (B, 2, T) float32: one_hot and many_hot."""
        frames_BTHWC = frames_BTHWC.to(self.device)
        x_BTHWC = frames_BTHWC.to(self.dtype)
        means = []
        for first, second in self.blocks:
            shortcut_BTHWC = first(x_BTHWC).relu_()
            sum_BTHWC = second(shortcut_BTHWC).relu_().add_(shortcut_BTHWC)
            x_BTHWC = _half_size(sum_BTHWC.flatten(0, 1)).unflatten(0, sum_BTHWC.shape[:2])
            means.append(x_BTHWC.mean(dim=(2, 3), dtype=torch.float32))
        unit_BTC = self.unit_features(torch.cat(means, dim=2))
        histograms_BTC = _colour_histograms(frames_BTHWC.flatten(0, 1)).unflatten(0, frames_BTHWC.shape[:2])
        return self.predict(_neighbour_similarity(histograms_BTC), _neighbour_similarity(unit_BTC), x_BTHWC.flatten(2)).transpose(1, 2)

    def unit_features(self, means: Tensor) -> Tensor:
        """(..., C) the mean over each block's positions -> (..., C) what frames are compared by, of unit norm."""
        return functional.normalize(self.likeness_projection(means), dim=-1)

    def predict(self, colour_similarity: Tensor, similarity: Tensor, x: Tensor) -> Tensor:
        """(..., K), (..., K) and the last block's (..., C) -> (..., 2) probabilities."""
        colour, likeness = torch.relu(self.colour(colour_similarity)), torch.relu(self.likeness(similarity))
        return torch.sigmoid(self.heads(torch.relu(self.hidden(torch.cat([colour, likeness, x], dim=-1)))))


def _largest(published: dict[str, Tensor], prefix: str) -> Tensor:
    """Return the largest values of a layer's channels: where six standard deviations above the mean of the batch norm end."""
    return published[f"{prefix}.bn.bias"] + RANGE_SIGMAS * published[f"{prefix}.bn.weight"].abs()


def _half_size(x_NHWC: Tensor) -> Tensor:
    """Mean over 2 x 2 positions; an odd last row or column is dropped, as in the published network."""
    return functional.avg_pool2d(x_NHWC.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def _neighbour_similarity(unit_BTC: Tensor) -> Tensor:
    """Dot products of every frame with its K neighbours in time: (B, T, C) -> (B, T, K). Zero outside the window."""
    reach = NEIGHBOURS // 2
    similarity_BTT = functional.pad(unit_BTC @ unit_BTC.transpose(1, 2), (reach, reach))
    return _of_neighbours(similarity_BTT)


def _of_neighbours(similarity: Tensor) -> Tensor:
    """(..., T, T + K - 1) products of frames with those from K // 2 before the first one on -> (..., T, K) with their neighbours."""
    T, device = similarity.shape[-2], similarity.device
    lookup_TK = torch.arange(T, device=device).unsqueeze(1) + torch.arange(NEIGHBOURS, device=device)
    return similarity.gather(-1, lookup_TK.expand(*similarity.shape[:-2], -1, -1))


def _colour_histograms(frames_NHWC: Tensor) -> Tensor:
    """(N, 27, 48, 3) uint8 -> (N, 512) float32 of unit norm."""
    bins_NSC = (frames_NHWC.flatten(1, 2) >> (8 - HISTOGRAM_BITS)).to(torch.int64)
    red, green, blue = bins_NSC.unbind(dim=2)
    bins_NS = (red << 2 * HISTOGRAM_BITS) + (green << HISTOGRAM_BITS) + blue
    counts = torch.zeros(len(frames_NHWC), 1 << 3 * HISTOGRAM_BITS, device=frames_NHWC.device)
    counts.scatter_add_(1, bins_NS, torch.ones_like(bins_NS, dtype=counts.dtype))
    return functional.normalize(counts, dim=1)


# ------------------------------------------------------------------------- a title as one sequence: every frame computed once

END_FRAMES = 21  # A title goes on by these at both ends in the comparison with neighbours, and then by zeros; windows repeat 25 frames.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]


class _LayerSequence:
    """A dilated layer at work on one title. The layer's input goes on at both ends as it begins and ends."""

    def __init__(self, layer: DilatedLayer) -> None:
        self.layer = layer
        self.tail_TSC: Tensor | None = None  # of the spatial convolutions: what the next outputs depend on

    def push(self, x_NHWC: Tensor, is_last: bool, piece: int, run: Map) -> Tensor:
        """Take the next frames; return the outputs that they complete, REACH frames behind unless they are the last."""
        spatial = run(self.layer.spatial, x_NHWC.split(piece))
        before_TSC = spatial[0][:1].expand(REACH, -1, -1) if self.tail_TSC is None else self.tail_TSC
        after = [spatial[-1][-1:].expand(REACH, -1, -1)] if is_last else []
        known = [before_TSC, *spatial, *after]
        self.tail_TSC = torch.cat([part_TSC[-2 * REACH :] for part_TSC in known[-2:]])[-2 * REACH :]
        count, (_, S, _) = sum(map(len, known)) - 2 * REACH, before_TSC.shape
        out_TSO = before_TSC.new_empty(count, S, self.layer.bias_4O.numel())

        def compute(branch: int) -> None:
            # Only this branch's channels, side by side: convolutions would copy a part of all channels again.
            taken_TSC = torch.cat([part_TSC.chunk(len(DILATIONS), dim=-1)[branch] for part_TSC in known])
            unused = REACH - DILATIONS[branch]  # Frames at both ends.
            result_1TSO = self.layer.temporal(branch, taken_TSC[unused : len(taken_TSC) - unused].unsqueeze(0))
            out_TSO.chunk(len(DILATIONS), dim=-1)[branch].copy_(result_1TSO[0].relu_())

        run(compute, range(len(DILATIONS)))
        return out_TSO.unflatten(1, x_NHWC.shape[1:3])


class _BlockSequence:
    """Two layers, their sum with the first one's output, and the mean over 2 x 2 positions."""

    def __init__(self, layers: Iterable[DilatedLayer]) -> None:
        self.first, self.second = map(_LayerSequence, layers)
        self.shortcut = _Queue()

    def push(self, x_NHWC: Tensor, is_last: bool, piece: int, run: Map) -> Tensor:
        shortcut_NHWC = self.first.push(x_NHWC, is_last, piece, run)
        self.shortcut.push(shortcut_NHWC)
        out_NHWC = self.second.push(shortcut_NHWC, is_last, piece, run)
        return _half_size(out_NHWC.add_(self.shortcut.take(len(out_NHWC))))


class _Queue:
    """Frames that wait for what lags behind them."""

    def __init__(self) -> None:
        self.waiting: Tensor | None = None

    def push(self, values: Tensor) -> None:
        self.waiting = values if self.waiting is None else torch.cat([self.waiting, values])

    def take(self, count: int) -> Tensor:
        """The first ``count`` frames, which are gone from the queue."""
        assert self.waiting is not None
        taken, self.waiting = self.waiting[:count], self.waiting[count:].clone()
        return taken


class _Neighbours:
    """Vectors of unit norm of a title's frames, each compared with its neighbours when all of them are there."""

    def __init__(self) -> None:
        self.vectors_TC: Tensor | None = None  # from K // 2 before the next frame to compare

    def push(self, unit_NC: Tensor, is_last: bool) -> None:
        zeros = unit_NC.new_zeros(NEIGHBOURS // 2 - END_FRAMES, unit_NC.shape[1])
        before = [zeros, unit_NC[:1].expand(END_FRAMES, -1)] if self.vectors_TC is None else [self.vectors_TC]
        after = [unit_NC[-1:].expand(END_FRAMES, -1), zeros] if is_last else []
        self.vectors_TC = torch.cat([*before, unit_NC, *after])

    @property
    def ready(self) -> int:
        """The number of frames whose neighbours are all there."""
        assert self.vectors_TC is not None
        return max(0, len(self.vectors_TC) - NEIGHBOURS + 1)

    def take(self, count: int) -> Tensor:
        """(count, K) similarities of the next frames to their neighbours."""
        assert self.vectors_TC is not None
        reach = NEIGHBOURS // 2
        near_TC, queries_NC = self.vectors_TC[: count + 2 * reach], self.vectors_TC[reach : reach + count]
        self.vectors_TC = self.vectors_TC[count:].clone()
        return _of_neighbours(queries_NC @ near_TC.T)


class TransNetSequence:
    """The network at work on one title, whose frames come in chunks. Memory is that of a chunk, whatever the title's length.

    A frame's probabilities depend on 98 frames before and after it, in windows of 100 frames on 25 to 74. At both ends every layer's input
    goes on as it begins and ends, which costs nothing; windows go on by 25 frames.
    """

    def __init__(self, network: TransNetV2, piece: int, run: Map) -> None:
        """``piece``: frames that ``run`` computes at once."""
        self.network, self.piece, self.run = network, piece, run
        self.blocks = [_BlockSequence(layers) for layers in network.blocks]
        self.means = [_Queue() for _ in network.blocks]
        self.x = _Queue()
        self.colour, self.likeness = _Neighbours(), _Neighbours()

    @torch.inference_mode()
    def push(self, frames_NHWC: Tensor, is_last: bool) -> Tensor:
        """Take the next (N, 27, 48, 3) uint8 frames, one at least; return the (2, T) float32 probabilities that they complete."""
        frames_NHWC = frames_NHWC.to(self.network.device)
        self.colour.push(_colour_histograms(frames_NHWC), is_last)
        x_NHWC = frames_NHWC.to(self.network.dtype)
        for block, means in zip(self.blocks, self.means, strict=True):
            x_NHWC = block.push(x_NHWC, is_last, self.piece, self.run)
            means.push(x_NHWC.mean(dim=(1, 2), dtype=torch.float32))
        self.x.push(x_NHWC.flatten(1))
        self.likeness.push(self.network.unit_features(torch.cat([means.take(len(x_NHWC)) for means in self.means], dim=1)), is_last)
        count = self.likeness.ready
        return self.network.predict(self.colour.take(count), self.likeness.take(count), self.x.take(count)).T
