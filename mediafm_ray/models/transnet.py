"""Shot boundary detection with TransNet V2 (Soucek and Lokoc 2020, arXiv:2008.04838): frames -> probabilities -> shots (``shot_rules``).

The file reads in that order. The network is written here for inference (batch norm folded into the weights, the four dilated
branches' spatial convolutions done as one); its weights are the published ones.

Pixel contract: (T, 27, 48, 3) uint8 RGB (not BGR), rows top to bottom, the whole picture scaled to 48 x 27 whatever its aspect.

Shape suffixes
    B  windows of frames             H, W  rows and columns (27 x 48 at the input)
    T  frames                        S     positions of a frame, H * W
    C  channels                      K     neighbours a frame is compared with (101)
Weights are named _OIHW as torch has them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mediafm_ray.models import weights
from mediafm_ray.models.loading import MicroBatches, Workers, load_state, open_device
from mediafm_ray.models.options import DetectorConfig
from mediafm_ray.models.shot_rules import ShotsFromProbabilities, shots_from_probabilities
from mediafm_ray.spec import (
    DETECTOR_HEIGHT,
    DETECTOR_WIDTH,
    ShotSpan,
)

# ------------------------------------------------------------------------------------- the network: frames -> probabilities

DILATIONS = (1, 2, 4, 8)  # frames between the taps of the four branches of a layer
BLOCKS = 3  # each halves the picture; two layers in each
BATCH_NORM_EPS = 1e-3
NEIGHBOURS = 101  # K: 50 frames before, the frame itself, 50 after
HISTOGRAM_BITS = 3  # a colour channel's bits that choose its bin: 8 * 8 * 8 = 512 bins
PIXEL_MAX = 255.0


class DilatedLayer:
    """Four branches of (1 x 3 x 3 spatial, 3 x 1 x 1 temporal) convolution, their batch norm folded in."""

    def __init__(self, published: dict[str, Tensor], prefix: str, dtype: torch.dtype, input_scale: float = 1.0) -> None:
        spatial = [published[f"{prefix}.Conv3D_{dilation}.layers.0.weight"][:, :, 0] for dilation in DILATIONS]
        temporal = torch.stack([published[f"{prefix}.Conv3D_{dilation}.layers.1.weight"][..., 0] for dilation in DILATIONS])
        scale = published[f"{prefix}.bn.weight"] / torch.sqrt(published[f"{prefix}.bn.running_var"] + BATCH_NORM_EPS)
        bias = published[f"{prefix}.bn.bias"] - published[f"{prefix}.bn.running_mean"] * scale
        self.spatial_OIHW = (torch.cat(spatial) * input_scale).to(dtype).contiguous(memory_format=torch.channels_last)
        self.temporal_4OIHW = (temporal * scale.view(len(DILATIONS), -1, 1, 1, 1)).to(dtype)
        self.bias_4O = bias.view(len(DILATIONS), -1).to(dtype)

    def __call__(self, x_BTHWC: Tensor) -> Tensor:
        B, T, H, W, _ = x_BTHWC.shape
        # Channels last in memory: every permute below is a view, frames are the batch of the 2-D convolution.
        spatial_NCHW = functional.conv2d(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2), self.spatial_OIHW, padding=1)
        spatial_BCTS = spatial_NCHW.permute(0, 2, 3, 1).reshape(B, T, H * W, -1).permute(0, 3, 1, 2)
        branches = [
            functional.conv2d(branch_BCTS, weight_OIHW, bias_O, padding=(dilation, 0), dilation=(dilation, 1))
            for dilation, branch_BCTS, weight_OIHW, bias_O in zip(
                DILATIONS, spatial_BCTS.chunk(len(DILATIONS), dim=1), self.temporal_4OIHW, self.bias_4O, strict=True
            )
        ]
        return torch.cat(branches, dim=1).permute(0, 2, 3, 1).reshape(B, T, H, W, -1)


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
    """

    def __init__(self, published: dict[str, Tensor], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        published = {name: tensor.to(device) for name, tensor in published.items()}

        def dense(*names: str, dtype: torch.dtype = torch.float32) -> Dense:
            return Dense(*(torch.cat([published[f"{name}.{part}"] for name in names]).to(dtype) for part in ("weight", "bias")))

        self.device = device
        self.dtype = dtype
        # Pixels stay 0 ... 255, which bfloat16 holds exactly; the first layer's weights bring them to 0 ... 1.
        self.blocks = [
            [
                DilatedLayer(published, f"SDDCNN.{block}.DDCNN.{layer}", dtype, 1 / PIXEL_MAX if block == layer == 0 else 1.0)
                for layer in (0, 1)
            ]
            for block in range(BLOCKS)
        ]
        self.likeness_projection = dense("frame_sim_layer.projection")
        self.likeness = dense("frame_sim_layer.fc")
        self.colour = dense("color_hist_layer.fc")
        self.hidden = dense("fc1", dtype=dtype)
        self.heads = dense("cls_layer1", "cls_layer2")

    @torch.inference_mode()
    def __call__(self, frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        frames_BTHWC = frames_BTHWC.to(self.device)
        x_BTHWC = frames_BTHWC.to(self.dtype)
        means = []
        for first, second in self.blocks:
            shortcut_BTHWC = first(x_BTHWC).relu_()
            x_BTHWC = _half_size(second(shortcut_BTHWC).relu_().add_(shortcut_BTHWC))
            means.append(x_BTHWC.mean(dim=(2, 3), dtype=torch.float32))
        unit_BTC = functional.normalize(self.likeness_projection(torch.cat(means, dim=2)), dim=2)
        likeness_BTC = torch.relu(self.likeness(_neighbour_similarity(unit_BTC)))
        colour_BTC = torch.relu(self.colour(_neighbour_similarity(_colour_histograms(frames_BTHWC))))
        hidden_BTC = torch.relu(self.hidden(torch.cat([colour_BTC, likeness_BTC, x_BTHWC.flatten(2)], dim=2)))
        one_hot_BT, many_hot_BT = torch.sigmoid(self.heads(hidden_BTC)).unbind(dim=2)
        return one_hot_BT, many_hot_BT


def _half_size(x_BTHWC: Tensor) -> Tensor:
    """Mean over 2 x 2 positions; an odd last row or column is dropped, as in the published network."""
    B, T = x_BTHWC.shape[:2]
    pooled_NCHW = functional.avg_pool2d(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2), 2)
    return pooled_NCHW.permute(0, 2, 3, 1).unflatten(0, (B, T))


def _neighbour_similarity(unit_BTC: Tensor) -> Tensor:
    """Dot products of every frame with its K neighbours in time: (B, T, C) -> (B, T, K). Zero outside the window."""
    reach = NEIGHBOURS // 2
    similarity_BTT = functional.pad(unit_BTC @ unit_BTC.transpose(1, 2), (reach, reach))
    T = unit_BTC.shape[1]
    lookup_TK = torch.arange(T, device=unit_BTC.device).unsqueeze(1) + torch.arange(NEIGHBOURS, device=unit_BTC.device)
    return similarity_BTT.gather(2, lookup_TK.expand(len(unit_BTC), -1, -1))


def _colour_histograms(frames_BTHWC: Tensor) -> Tensor:
    """(B, T, 27, 48, 3) uint8 -> (B, T, 512) float32 of unit norm."""
    B, T = frames_BTHWC.shape[:2]
    bins_BTSC = (frames_BTHWC.flatten(2, 3) >> (8 - HISTOGRAM_BITS)).to(torch.int64)
    red, green, blue = bins_BTSC.unbind(dim=3)
    bins_BTS = (red << 2 * HISTOGRAM_BITS) + (green << HISTOGRAM_BITS) + blue
    counts = torch.zeros(B, T, 1 << 3 * HISTOGRAM_BITS, device=frames_BTHWC.device)
    counts.scatter_add_(2, bins_BTS, torch.ones_like(bins_BTS, dtype=counts.dtype))
    return functional.normalize(counts, dim=2)


# ---------------------------------------------------------------------------------- windows: any length of video, bit by bit


MAX_WAITING_FRAMES = 600  # of a title: a caller keeps the frames of shots that have not settled, however many threads there are


@dataclass(frozen=True)
class Windowing:
    """How a title is cut into overlapping windows, in frames; the predictions of both margins of a window are thrown away."""

    window: int
    margin: int
    whole: bool  # the title's last window is as long as the others (the last frame repeated); else it ends a margin behind the title

    @property
    def step(self) -> int:
        return self.window - 2 * self.margin


REFERENCE_WINDOWS = Windowing(window=100, margin=25, whole=True)  # as in the published predict_frames: every frame is computed twice
WIDE_WINDOWS = Windowing(window=250, margin=25, whole=False)  # the same margin; a frame is computed 1.25 times


class _Windows:
    """Cuts a stream of frames into overlapping windows as the reference's predict_frames does.

    The first frame is repeated over a margin before the title, the last one behind it.
    """

    def __init__(self, windowing: Windowing) -> None:
        self._windowing = windowing
        self._pending = np.empty((0, DETECTOR_HEIGHT, DETECTOR_WIDTH, 3), np.uint8)
        self._frames_seen = 0
        self._frames_cut = 0

    def push(self, frames_THWC: np.ndarray) -> list[np.ndarray]:
        """Take frames; return the (T, 27, 48, 3) windows that they complete."""
        if frames_THWC.dtype != np.uint8 or frames_THWC.shape[1:] != self._pending.shape[1:]:
            raise ValueError(
                f"the detector takes (T, {DETECTOR_HEIGHT}, {DETECTOR_WIDTH}, 3) uint8 RGB frames, "
                f"not {frames_THWC.shape} {frames_THWC.dtype}"
            )
        if len(frames_THWC) == 0:
            return []
        if self._frames_seen == 0:
            self._pending = np.repeat(frames_THWC[:1], self._windowing.margin, axis=0)
        self._frames_seen += len(frames_THWC)
        return self._cut(frames_THWC)

    def finish(self) -> list[np.ndarray]:
        """Return the last windows, padded; predictions beyond the title's frames are to be dropped."""
        missing = self._frames_seen - self._frames_cut
        if missing == 0:
            return []
        step = self._windowing.step
        wanted = (-(-missing // step) * step if self._windowing.whole else missing) + 2 * self._windowing.margin
        windows = self._cut(np.repeat(self._pending[-1:], wanted - len(self._pending), axis=0))
        if self._frames_cut < self._frames_seen:
            windows.append(self._pending)
        return windows

    def _cut(self, frames_THWC: np.ndarray) -> list[np.ndarray]:
        windows = []
        for start in range(0, len(frames_THWC), self._windowing.step):  # in pieces: a long push is not copied once a window
            self._pending = np.concatenate([self._pending, frames_THWC[start : start + self._windowing.step]])
            while len(self._pending) >= self._windowing.window:
                windows.append(self._pending[: self._windowing.window])
                self._pending = self._pending[self._windowing.step :]
                self._frames_cut += self._windowing.step
        return windows


# ----------------------------------------------------------------------------------------------------------- the detector


class ShotDetector:
    """TransNet V2 with its published weights on one device; detects the shots of any number of titles.

    config.exact: windows and float32 as in the published predict_frames. Otherwise windows are wider and the convolutions are done in
    bfloat16 where the processor has instructions for it (in float32 where not); probabilities differ by up to a few hundredths.
    On a CPU every window is computed alone, by one thread: probabilities depend neither on other titles nor on the number of threads.
    On a GPU windows of one length are computed ``config.batch`` at once, or as many as fit into its memory.

    Raises weights.WeightsError when the weights are not there or are not TransNet V2's, ValueError for a device that is not there or a
    configuration without sense.
    """

    def __init__(self, config: DetectorConfig) -> None:
        self.config = config
        self.windowing = REFERENCE_WINDOWS if config.exact else WIDE_WINDOWS
        device = open_device(config.device)
        path = weights.resolve(config.weights)
        published = load_state(path)
        try:
            self._network = TransNetV2(published, device, torch.float32 if config.exact else fast_dtype(device))
        except (KeyError, RuntimeError) as problem:
            raise weights.WeightsError(f"{path} does not hold the weights of TransNet V2 (PyTorch): {problem}") from problem
        self._alone = device.type == "cpu"
        self._workers = Workers(config.threads if self._alone else 1)
        self._micro_batches = MicroBatches(device, config.batch)
        self.wanted_windows = self._workers.threads if self._alone else config.batch  # what keeps the device busy
        self.most_waiting = max(1, MAX_WAITING_FRAMES // self.windowing.step)  # windows of one title

    def stream(self) -> DetectorStream:
        """A detector at work on one title (spec.ShotStream)."""
        return DetectorStream(self)

    def predict_frames(self, frames_THWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T, 27, 48, 3) uint8 RGB -> one_hot (T,), many_hot (T,) float32 probabilities of a whole title."""
        cutter = _Windows(self.windowing)
        parts = self.predict_windows(cutter.push(frames_THWC) + cutter.finish())
        predicted_2T = np.concatenate([np.empty((2, 0), np.float32), *parts], axis=1)[:, : len(frames_THWC)]
        return predicted_2T[0], predicted_2T[1]

    def detect(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        """All shots of a title whose frames are in memory; equal to what stream() gives."""
        return shots_from_probabilities(*self.predict_frames(frames_THWC), frames_THWC, self.config)

    def predict_windows(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Windows (T, 27, 48, 3) of any titles -> for each (2, T - 2 * margin) float32: one-hot and many-hot between the margins."""
        if self._alone:
            return self._workers.map(lambda window_THWC: self._predict_batch([window_THWC])[0], windows)
        alike = [list(group) for _, group in itertools.groupby(windows, key=len)]
        return [predicted_2T for group in alike for predicted_2T in self._micro_batches.compute(self._predict_batch, group)]

    def _predict_batch(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        # Of float32's 23 bits a GPU would keep 10 in convolutions; the setting is the process's, so only where one thread computes
        whole = contextlib.nullcontext() if self._alone else torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with whole:
            one_hot_BT, many_hot_BT = self._network(torch.from_numpy(np.stack(windows)))
        predicted_B2T = torch.stack([one_hot_BT, many_hot_BT], dim=1).cpu().numpy()
        return list(predicted_B2T[:, :, self.windowing.margin : -self.windowing.margin])


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")) else torch.float32


class DetectorStream:
    """Frames of one title in, settled shots out. Memory is bounded by a few windows, whatever the title's or a shot's length."""

    def __init__(self, detector: ShotDetector) -> None:
        self.detector = detector
        self._windows = _Windows(detector.windowing)
        self._waiting: list[np.ndarray] = []  # windows that are full and not predicted yet
        self._frames_pushed = 0
        self._frames_predicted = 0
        self._shots = ShotsFromProbabilities(detector.config)

    def push(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        """Take the next (T, 27, 48, 3) uint8 RGB frames; return the shots that no later frame can change.

        Raises ValueError for frames of another shape or type.
        """
        return push_all([self], [frames_THWC])[0]

    def finish(self) -> list[ShotSpan]:
        """The title has no more frames; return the remaining shots (none for a title without frames)."""
        return finish_all([self])[0]


def push_all(streams: Sequence[DetectorStream], frames: Sequence[np.ndarray]) -> list[list[ShotSpan]]:
    """DetectorStream.push for several titles at once, whose windows share the device; the streams are of one detector."""
    for stream, frames_THWC in zip(streams, frames, strict=True):
        stream._waiting.extend(stream._windows.push(frames_THWC))
        stream._frames_pushed += len(frames_THWC)
    idle = sum(len(stream._waiting) for stream in streams) < max((stream.detector.wanted_windows for stream in streams), default=0)
    if idle and all(len(stream._waiting) < stream.detector.most_waiting for stream in streams):
        return [[] for _ in streams]
    return _predict_waiting(streams)


def finish_all(streams: Sequence[DetectorStream]) -> list[list[ShotSpan]]:
    """DetectorStream.finish for several titles at once, whose windows share the device; the streams are of one detector."""
    for stream in streams:
        stream._waiting.extend(stream._windows.finish())
    return [shots + stream._shots.finish() for stream, shots in zip(streams, _predict_waiting(streams), strict=True)]


def _predict_waiting(streams: Sequence[DetectorStream]) -> list[list[ShotSpan]]:
    waiting = [window_THWC for stream in streams for window_THWC in stream._waiting]
    predictions = iter(streams[0].detector.predict_windows(waiting) if waiting else [])
    settled = []
    for stream in streams:
        shots: list[ShotSpan] = []
        for window_THWC, predicted_2T in zip(stream._waiting, predictions, strict=False):  # predictions go on with the next stream
            count = min(predicted_2T.shape[1], stream._frames_pushed - stream._frames_predicted)
            margin = stream.detector.windowing.margin
            one_hot_T, many_hot_T = predicted_2T[:, :count]
            shots.extend(stream._shots.push(one_hot_T, many_hot_T, window_THWC[margin : margin + count]))
            stream._frames_predicted += count
        stream._waiting = []
        settled.append(shots)
    return settled
