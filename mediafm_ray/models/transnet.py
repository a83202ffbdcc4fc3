"""Shot boundary detection with TransNet V2 (Soucek and Lokoc 2020, arXiv:2008.04838): frames -> probabilities -> shots.

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

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mediafm_ray.models import weights
from mediafm_ray.models.options import DetectorConfig
from mediafm_ray.spec import (
    BOUNDARY_CUT,
    BOUNDARY_GRADUAL,
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

    def __init__(self, published: dict[str, Tensor], prefix: str, input_scale: float = 1.0) -> None:
        spatial = [published[f"{prefix}.Conv3D_{dilation}.layers.0.weight"][:, :, 0] for dilation in DILATIONS]
        temporal = torch.stack([published[f"{prefix}.Conv3D_{dilation}.layers.1.weight"][..., 0] for dilation in DILATIONS])
        scale = published[f"{prefix}.bn.weight"] / torch.sqrt(published[f"{prefix}.bn.running_var"] + BATCH_NORM_EPS)
        bias = published[f"{prefix}.bn.bias"] - published[f"{prefix}.bn.running_mean"] * scale
        self.spatial_OIHW = (torch.cat(spatial) * input_scale).contiguous(memory_format=torch.channels_last)
        self.temporal_4OIHW = temporal * scale.view(len(DILATIONS), -1, 1, 1, 1)
        self.bias_4O = bias.view(len(DILATIONS), -1)

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
    """A fully connected layer: (..., I) -> (..., O)."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor) -> None:
        self.weight_OI = weight_OI
        self.bias_O = bias_O

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight_OI, self.bias_O)


class TransNetV2:
    """The published network, for inference: (B, T, 27, 48, 3) uint8 RGB -> one_hot, many_hot: (B, T) float32 probabilities.

    one_hot: the frame is the middle of a transition (for a cut, the outgoing shot's last frame).
    many_hot: the frame belongs to a transition.
    Takes the published state dict; raises KeyError or RuntimeError when it is another network's.
    """

    def __init__(self, published: dict[str, Tensor], device: str) -> None:
        published = {name: tensor.to(device) for name, tensor in published.items()}

        def dense(*names: str) -> Dense:
            return Dense(*(torch.cat([published[f"{name}.{part}"] for name in names]) for part in ("weight", "bias")))

        self.device = device
        self.blocks = [
            [DilatedLayer(published, f"SDDCNN.{block}.DDCNN.{layer}", 1 / PIXEL_MAX if block == layer == 0 else 1.0) for layer in (0, 1)]
            for block in range(BLOCKS)
        ]
        self.likeness_projection = dense("frame_sim_layer.projection")
        self.likeness = dense("frame_sim_layer.fc")
        self.colour = dense("color_hist_layer.fc")
        self.hidden = dense("fc1")
        self.heads = dense("cls_layer1", "cls_layer2")

    @torch.inference_mode()
    def __call__(self, frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        frames_BTHWC = frames_BTHWC.to(self.device)
        x_BTHWC = frames_BTHWC.float()
        means = []
        for first, second in self.blocks:
            shortcut_BTHWC = torch.relu(first(x_BTHWC))
            x_BTHWC = _half_size(torch.relu(second(shortcut_BTHWC)) + shortcut_BTHWC)
            means.append(x_BTHWC.mean(dim=(2, 3)))
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

WINDOW = 100  # frames: what the network was trained on
MARGIN = 25  # frames at both ends of a window whose predictions are thrown away
STEP = WINDOW - 2 * MARGIN  # frames


class _Windows:
    """Cuts a stream of frames into overlapping windows as the reference's predict_frames does.

    The first frame is repeated MARGIN times before the title, the last one behind it until the last window is full.
    """

    def __init__(self) -> None:
        self._pending = np.empty((0, DETECTOR_HEIGHT, DETECTOR_WIDTH, 3), np.uint8)
        self._frames_seen = 0
        self._frames_predicted = 0

    def push(self, frames_THWC: np.ndarray) -> Iterator[np.ndarray]:
        """Take frames; yield the (WINDOW, 27, 48, 3) windows that they complete."""
        if frames_THWC.dtype != np.uint8 or frames_THWC.shape[1:] != self._pending.shape[1:]:
            raise ValueError(
                f"the detector takes (T, {DETECTOR_HEIGHT}, {DETECTOR_WIDTH}, 3) uint8 RGB frames, "
                f"not {frames_THWC.shape} {frames_THWC.dtype}"
            )
        if len(frames_THWC) == 0:
            return
        if self._frames_seen == 0:
            self._pending = np.repeat(frames_THWC[:1], MARGIN, axis=0)
        self._frames_seen += len(frames_THWC)
        yield from self._cut(frames_THWC)

    def finish(self) -> Iterator[np.ndarray]:
        """Yield the last windows, padded; predictions beyond the title's frames are to be dropped."""
        missing = self._frames_seen - self._frames_predicted
        if missing > 0:
            windows = -(-missing // STEP)
            padding = windows * STEP + 2 * MARGIN - len(self._pending)
            yield from self._cut(np.repeat(self._pending[-1:], padding, axis=0))

    def _cut(self, frames_THWC: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(frames_THWC), STEP):  # in pieces, so that a long push is not copied once a window
            self._pending = np.concatenate([self._pending, frames_THWC[start : start + STEP]])
            while len(self._pending) >= WINDOW:
                yield self._pending[:WINDOW]
                self._pending = self._pending[STEP:]
                self._frames_predicted += STEP


# --------------------------------------------------------------------------------------------- shots from the probabilities

LONGEST_TRANSITION = 100  # frames: the network's window; a longer run of transition frames is closed, so that shots settle


@dataclass
class _Run:
    """Consecutive frames above the threshold: [first, last], all transition frames by the one-hot head."""

    first: int
    last: int
    probability: float


class _Boundaries:
    """Probabilities in, settled shots out; the state is a few numbers whatever the length of the title."""

    def __init__(self, config: DetectorConfig) -> None:
        self._threshold = config.threshold
        self._frame = 0
        self._shot = ShotSpan(0, 0)
        self._run: _Run | None = None

    def push(self, one_hot_T: np.ndarray, many_hot_T: np.ndarray) -> list[ShotSpan]:
        shots = []
        for probability in one_hot_T.tolist():
            if self._run is not None and (probability <= self._threshold or self._frame - self._run.first >= LONGEST_TRANSITION):
                shots.extend(self._close(self._run))
                self._run = None
            if probability > self._threshold:
                if self._run is None:
                    self._run = _Run(self._frame, self._frame, probability)
                self._run.last = self._frame
                self._run.probability = max(self._run.probability, probability)
            self._frame += 1
        return shots

    def finish(self) -> list[ShotSpan]:
        """The last shot. A run that reaches the title's last frame (a fade-out) separates nothing and is no boundary."""
        return [_ended(self._shot, self._frame)] if self._frame else []

    def _close(self, run: _Run) -> list[ShotSpan]:
        if run.first == 0:  # a fade-in at the title's beginning separates nothing
            return []
        start = (run.first + run.last) // 2 + 1  # the middle; right behind the frame of a cut
        done = _ended(self._shot, start)
        kind = BOUNDARY_CUT if run.first == run.last else BOUNDARY_GRADUAL
        self._shot = ShotSpan(start, start, kind, run.probability, run.first, run.last + 1)
        return [done]


def _ended(shot: ShotSpan, end_frame: int) -> ShotSpan:
    return ShotSpan(
        shot.start_frame, end_frame, shot.boundary_kind, shot.boundary_probability, shot.transition_start_frame, shot.transition_end_frame
    )


def shots_from_probabilities(one_hot_T: np.ndarray, many_hot_T: np.ndarray, config: DetectorConfig) -> list[ShotSpan]:
    """Shots that tile [0, T) from the two heads' (T,) probabilities; none for T = 0."""
    boundaries = _Boundaries(config)
    return boundaries.push(one_hot_T, many_hot_T) + boundaries.finish()


# ----------------------------------------------------------------------------------------------------------- the detector


class ShotDetector:
    """TransNet V2 with its published weights on one device; detects the shots of any number of titles.

    Raises weights.WeightsError when the weights are not there or are not TransNet V2's. The number of torch's threads is
    set when config.threads > 0; no other global state of torch is touched.
    """

    def __init__(self, config: DetectorConfig) -> None:
        if config.threads > 0:
            torch.set_num_threads(config.threads)
        self.config = config
        path = weights.resolve(config.weights)
        published = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self._network = TransNetV2(published, config.device)
        except (KeyError, RuntimeError) as problem:
            raise weights.WeightsError(f"{path} does not hold the weights of TransNet V2 (PyTorch): {problem}") from problem

    def stream(self) -> DetectorStream:
        """A detector at work on one title (spec.ShotStream)."""
        return DetectorStream(self)

    def predict_frames(self, frames_THWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T, 27, 48, 3) uint8 RGB -> one_hot (T,), many_hot (T,) float32 probabilities of a whole title."""
        cutter = _Windows()
        parts = [self.predict_window(window) for window in cutter.push(frames_THWC)]
        parts += [self.predict_window(window) for window in cutter.finish()]
        predicted = np.concatenate(parts, axis=1)[:, : len(frames_THWC)] if parts else np.empty((2, 0), np.float32)
        return predicted[0], predicted[1]

    def detect(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        """All shots of a title whose frames are in memory; equal to what stream() gives."""
        return shots_from_probabilities(*self.predict_frames(frames_THWC), self.config)

    def predict_window(self, window_THWC: np.ndarray) -> np.ndarray:
        """One (WINDOW, 27, 48, 3) window -> (2, STEP) float32: one-hot and many-hot of the frames between its margins."""
        one_hot_BT, many_hot_BT = self._network(torch.from_numpy(window_THWC).unsqueeze(0))
        return torch.cat([one_hot_BT, many_hot_BT])[:, MARGIN:-MARGIN].cpu().numpy()


class DetectorStream:
    """Frames of one title in, settled shots out. Memory is bounded by a window, whatever the title's or a shot's length."""

    def __init__(self, detector: ShotDetector) -> None:
        self._detector = detector
        self._windows = _Windows()
        self._boundaries = _Boundaries(detector.config)
        self._frames_pushed = 0
        self._frames_predicted = 0

    def push(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        """Take the next (T, 27, 48, 3) uint8 RGB frames; return the shots that no later frame can change."""
        self._frames_pushed += len(frames_THWC)
        return self._settle(self._windows.push(frames_THWC))

    def finish(self) -> list[ShotSpan]:
        """The title has no more frames; return the remaining shots (none for a title without frames)."""
        return self._settle(self._windows.finish()) + self._boundaries.finish()

    def _settle(self, windows: Iterator[np.ndarray]) -> list[ShotSpan]:
        shots = []
        for window_THWC in windows:
            one_hot_T, many_hot_T = self._detector.predict_window(window_THWC)[:, : self._frames_pushed - self._frames_predicted]
            self._frames_predicted += len(one_hot_T)
            shots.extend(self._boundaries.push(one_hot_T, many_hot_T))
        return shots
