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

import contextlib
import dataclasses
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
from mediafm_ray.spec import (
    BOUNDARY_CUT,
    BOUNDARY_GRADUAL,
    BOUNDARY_SPLIT,
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


MOST_WAITING_FRAMES = 600  # of a title: a caller keeps the frames of shots that have not settled, however many threads there are


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


# ------------------------------------------------------------------------- transitions from the probabilities and the pictures
#
# What the heads mean decides the rules (section 3 of the paper: one-hot marks a transition's middle, many-hot all of its frames):
#   cut      one frame above the threshold by one-hot; or below it but a spike, far above the frames on both sides. The network saw few
#            shots of less than half a second in training and is unsure there, but its answer stays as narrow as for any cut; camera
#            motion and effects of the same height give broad humps.
#   gradual  a run of frames that many-hot takes for a transition, which holds at least one middle: one-hot passes the threshold there or
#            its sum, the expected number of middles, is at least one (long transitions: no frame is surely the middle).
# The pictures decide what the heads cannot:
#   fade     two transitions with an empty picture in between (a fade out and a fade in) are one.
#   flash    a picture that comes back after a few frames was not left.
#   wipe     the network hardly answers to wipes. Their edge crosses the picture at a steady pace: the frame at which a position's picture
#            changes is a linear function of where it lies, which neither cuts, dissolves nor motion bring about.

GRADUAL_FRAMES = 3  # frames: a shorter run is a cut (2 frames where fields or frame-rate conversion blend its two sides)
LONGEST_TRANSITION = 100  # frames, the network's window: a longer run is closed there, so that shots settle
EMPTY_CONTRAST = 2.0  # levels of 255, standard deviation over a frame's pixels: less is a picture of one colour, but for coding noise
WIPE_WINDOW = 16  # frames in which an edge is looked for
WIPE_STRIDE = 4  # frames between such windows
LONGEST_WIPE = 40  # frames
WIPE_CHANGE = 24.0  # levels of 255: positions of two shots differ by more
WIPE_SHARE = 0.25  # of the positions that differ: so many change at once, the others move as well
WIPE_FIT = 0.9  # the share of the variance of the times of change that the linear function explains
CHANNEL_MEAN = np.full(3, 1 / 3, np.float32)  # a product with it is several times faster than numpy's mean over 3 channels
RETURNED = 0.5  # a picture came back when it differs from the one before by less than this share of the change itself


@dataclass(frozen=True)
class Transition:
    """Between two shots: the last frame that is only the outgoing one, the first that is only the incoming one."""

    last_before: int
    first_after: int
    kind: str
    probability: float  # the highest of the one-hot head

    @property
    def middle(self) -> int:
        """The frame at which the new shot starts: the first after a cut, the middle one of a gradual transition."""
        return (self.last_before + self.first_after + 1) // 2


class _Wipes:
    """Frames in, wipes out: (last frame before, first frame after, fit of the steady edge in [0, 1])."""

    def __init__(self) -> None:
        self._steps: list[np.ndarray] = []  # of each kept frame: (27 * 48,) mean absolute change to the next frame, levels of 255
        self._frames: list[np.ndarray] = []
        self._oldest = 0
        self._window = 0  # where the next window begins
        self._settled = 0  # the last wipe's end

    @property
    def known_until(self) -> int:
        """A wipe that is still to come begins at this frame or later."""
        return self._window - LONGEST_WIPE

    def push(self, frames_THWC: np.ndarray) -> list[tuple[int, int, float]]:
        for frame_HWC in frames_THWC:
            frame_SC = frame_HWC.reshape(-1, 3).astype(np.float32)
            if self._frames:
                self._steps.append(_change(self._frames[-1], frame_SC))
            self._frames.append(frame_SC)
        return self._look(ahead=LONGEST_WIPE)

    def finish(self) -> list[tuple[int, int, float]]:
        return self._look(ahead=0)

    def _look(self, ahead: int) -> list[tuple[int, int, float]]:
        found = []
        while self._window + WIPE_WINDOW + ahead < self._oldest + len(self._frames):
            wipe = self._wipe_at(self._window)
            if wipe is not None and wipe[0] >= self._settled:  # else another window's view of the same wipe
                found.append(wipe)
                self._settled = wipe[1]
            self._window += WIPE_STRIDE
        useless = self.known_until - self._oldest
        if useless > LONGEST_WIPE:
            del self._frames[:useless], self._steps[:useless]
            self._oldest += useless
        return found

    def _wipe_at(self, window: int) -> tuple[int, int, float] | None:
        edge = self._edge(window, window + WIPE_WINDOW)
        if edge is None:
            return None
        last_before, first_after, _ = edge
        inside = max(window - LONGEST_WIPE, self._oldest) <= last_before and first_after < self._oldest + len(self._frames)
        if not inside or not GRADUAL_FRAMES < first_after - last_before <= LONGEST_WIPE:
            return None
        whole = self._edge(last_before, first_after)  # seen from its beginning to its end, half of the picture at least is another one
        if whole is None or (self._difference(last_before, first_after) > WIPE_CHANGE).mean() < 0.5:
            return None
        return last_before, first_after, whole[2]

    def _edge(self, first: int, last: int) -> tuple[int, int, float] | None:
        """The edge that moves between two frames: when it enters and leaves the picture, and how well it is a straight, steady one."""
        steps_TS = np.stack(self._steps[first - self._oldest : last - self._oldest])
        largest_S = steps_TS.max(axis=0)
        changed_S = self._difference(first, last) > WIPE_CHANGE
        at_once_S = changed_S & (largest_S > 0.5 * steps_TS.sum(axis=0))
        if changed_S.mean() < 0.25 or at_once_S.sum() < WIPE_SHARE * changed_S.sum():
            return None
        times = steps_TS.argmax(axis=0)[at_once_S].astype(np.float64)
        coefficients = np.linalg.lstsq(_PLACES_S3[at_once_S], times, rcond=None)[0]
        variance = times.var()
        fit = 1 - (times - _PLACES_S3[at_once_S] @ coefficients).var() / variance if variance > 0 else 0.0
        if fit < WIPE_FIT:
            return None
        corners = _PLACES_S3[[0, DETECTOR_WIDTH - 1, -DETECTOR_WIDTH, -1]] @ coefficients
        return first + round(corners.min()), first + round(corners.max()) + 1, float(fit)

    def _difference(self, first: int, last: int) -> np.ndarray:
        return _change(self._frames[first - self._oldest], self._frames[last - self._oldest])


def _change(frame_SC: np.ndarray, other_SC: np.ndarray) -> np.ndarray:
    return np.abs(other_SC - frame_SC) @ CHANNEL_MEAN


# (S, 3): 1, row, column of every position, the latter two from 0 to 1
_PLACES_S3 = np.stack(
    [
        np.ones(DETECTOR_HEIGHT * DETECTOR_WIDTH),
        np.repeat(np.linspace(0, 1, DETECTOR_HEIGHT), DETECTOR_WIDTH),
        np.tile(np.linspace(0, 1, DETECTOR_WIDTH), DETECTOR_HEIGHT),
    ],
    axis=1,
)


def _are_empty(frames_THWC: np.ndarray) -> list[bool]:
    """Whether each frame is of one colour. In integers: exact, so that it cannot depend on how many frames come at once."""
    positions = DETECTOR_HEIGHT * DETECTOR_WIDTH
    sums_TS = frames_THWC.astype(np.int64).reshape(len(frames_THWC), positions, 3) @ np.ones(
        3, np.int64
    )  # 3 times the mean of the channels
    variances_T = positions * (sums_TS**2).sum(axis=1) - sums_TS.sum(axis=1) ** 2  # positions ** 2 times the variance
    return (variances_T < (3 * EMPTY_CONTRAST * positions) ** 2).tolist()


class _Transitions:
    """Probabilities and frames in, settled transitions out; a frame is judged by its neighbourhood only, which bounds the memory."""

    def __init__(self, config: DetectorConfig) -> None:
        self._config = config
        self._ahead = config.flash_frames + 2  # frames that must be known behind the one that is judged
        self._behind = LONGEST_TRANSITION + 2 * config.flash_frames + 2  # frames that are kept before it
        self._oldest = 0  # index of the first frame that is kept
        self._one_hot: list[float] = []
        self._many_hot: list[float] = []
        self._empty: list[bool] = []
        self._frames: list[np.ndarray] = []
        self._wipe_fit: list[float] = []  # of the frames inside a wipe; 0 elsewhere
        self._wipes = _Wipes() if config.wipes else None
        self._cursor = 0  # the next frame to judge
        self._run_first = -1  # where the open run of transition frames began; -1: none is open
        self._run_last = -1  # its last frame so far
        self._run_is_told = False  # the run was too long: its transition is out, the rest of it is no other one
        self._pending: Transition | None = None  # may still merge with the next one
        self._visible = 0  # frames behind the pending transition that are not empty
        self.flashes: list[int] = []  # frames behind what was taken for a flash; for the caller to take away

    def push(self, one_hot_T: np.ndarray, many_hot_T: np.ndarray, frames_THWC: np.ndarray) -> list[Transition]:
        self._one_hot.extend(one_hot_T.tolist())
        self._many_hot.extend(many_hot_T.tolist())
        self._empty.extend(_are_empty(frames_THWC))
        self._frames.extend(frames_THWC.copy())
        self._wipe_fit.extend([0.0] * len(frames_THWC))
        if self._wipes:
            self._mark(self._wipes.push(frames_THWC))
        settled: list[Transition] = []
        while self._cursor + self._ahead < self._end and (self._wipes is None or self._cursor < self._wipes.known_until):
            self._judge(self._cursor, settled)
        return settled

    def finish(self) -> list[Transition]:
        """A run that reaches the title's last frame (a fade-out) separates nothing and is no transition."""
        if self._wipes:
            self._mark(self._wipes.finish())
        settled: list[Transition] = []
        while self._cursor < self._end:
            self._judge(self._cursor, settled)
        if self._run_first >= 0 and self._run_last < self._end - 1:
            self._close_run(settled)
        return settled + ([self._pending] if self._pending else [])

    def _mark(self, wipes: list[tuple[int, int, float]]) -> None:
        for last_before, first_after, fit in wipes:
            for frame in range(last_before + 1, first_after):
                self._wipe_fit[frame - self._oldest] = fit

    @property
    def settled_until(self) -> int:
        """No transition that is still to come has its middle before this frame."""
        if self._pending:
            return self._pending.last_before + 1
        return self._run_first if self._run_first >= 0 and not self._run_is_told else self._cursor

    @property
    def _end(self) -> int:
        return self._oldest + len(self._one_hot)

    def _judge(self, frame: int, settled: list[Transition]) -> None:
        at = frame - self._oldest
        inside = max(self._one_hot[at], self._many_hot[at], self._wipe_fit[at]) > self._config.threshold or self._is_spike(frame)
        if self._run_first >= 0 and not inside:
            # Once a run is surely gradual, a dip of many-hot as short as a flash does not end it.
            is_dip = self._many_hot[at] > 0.5 * self._config.threshold and frame - self._run_last <= self._config.flash_frames
            if not is_dip or self._run_last - self._run_first + 1 < GRADUAL_FRAMES:
                self._close_run(settled)
                self._run_first = -1
        elif inside and self._run_first < 0:
            self._run_first = frame
            self._run_is_told = False
        elif inside and frame - self._run_first >= LONGEST_TRANSITION:
            self._close_run(settled)
            if self._is_spike(frame):  # the heads are stuck, but here the picture changes
                self._add(Transition(frame, frame + 1, BOUNDARY_CUT, self._one_hot[at]), settled)
        if inside:
            self._run_last = frame
        if self._pending and self._run_first < 0 and frame >= self._pending.first_after:
            self._visible += not self._empty[at]
            if self._visible > LONGEST_TRANSITION / 2 or frame - self._pending.first_after > LONGEST_TRANSITION:  # too late to merge
                settled.append(self._pending)
                self._pending = None
        self._cursor += 1
        useless = max(self._cursor - self._behind - self._oldest, 0)
        if useless >= self._behind:  # now and then, not for every frame
            for kept in (self._one_hot, self._many_hot, self._wipe_fit, self._empty, self._frames):
                del kept[:useless]
            self._oldest += useless

    def _close_run(self, settled: list[Transition]) -> None:
        if not self._run_is_told:
            self._add(self._transition_of(self._run_first, self._run_last), settled)
        self._run_is_told = True

    def _is_spike(self, frame: int) -> bool:
        at = frame - self._oldest
        sides = self._one_hot[max(at - 1, 0) : at] + self._one_hot[at + 1 : at + 2]
        return self._one_hot[at] - max(sides, default=0.0) >= self._config.spike

    def _transition_of(self, first: int, last: int) -> Transition | None:
        """The transition that the frames first ... last make, if any."""
        if first == 0 and last > 0:  # a fade-in at the title's beginning separates nothing
            return None
        one_hot = self._one_hot[first - self._oldest : last + 1 - self._oldest]
        wipe_fit = max(self._wipe_fit[first - self._oldest : last + 1 - self._oldest])
        probability = max(*one_hot, wipe_fit)
        if len(one_hot) < GRADUAL_FRAMES:
            peak = first + one_hot.index(max(one_hot))
            if probability <= self._config.threshold and not self._is_spike(peak):
                return None
            found = Transition(peak, peak + 1, BOUNDARY_CUT, probability)
        else:
            if probability <= self._config.threshold and sum(one_hot) < 1:
                return None
            found = Transition(first - 1, last + 1, BOUNDARY_GRADUAL, probability)
        if self._is_flash(found):
            self.flashes.append(found.first_after)
            return None
        return found

    def _is_flash(self, found: Transition) -> bool:
        """Whether a picture from before the transition is back after it, within the length of a flash."""
        reach = self._config.flash_frames
        if found.first_after - found.last_before > reach + 1:
            return False
        change = self._difference(found.last_before, found.first_after)
        return any(
            self._difference(before, after) < RETURNED * change
            for before in range(max(found.last_before - reach, 0), found.last_before + 1)
            for after in range(found.first_after, min(before + reach + 1, self._end - 1) + 1)
        )

    def _difference(self, frame: int, other: int) -> float:
        """Mean absolute difference of two frames, levels of 255."""
        a_HWC, b_HWC = self._frames[frame - self._oldest], self._frames[other - self._oldest]
        return float(np.abs(a_HWC.astype(np.int16) - b_HWC).mean())

    def _add(self, found: Transition | None, settled: list[Transition]) -> None:
        if found is None:
            return
        before = self._pending
        self._pending = found
        self._visible = 0
        if before is None:
            return
        if self._is_empty_between(before, found):
            self._pending = Transition(before.last_before, found.first_after, BOUNDARY_GRADUAL, max(before.probability, found.probability))
        else:
            settled.append(before)

    def _is_empty_between(self, before: Transition, found: Transition) -> bool:
        """Whether no shot lies between two transitions: at least half of the frames are empty (a slow fade-in is told late)."""
        if found.first_after - before.last_before > LONGEST_TRANSITION:
            return False
        between = self._empty[before.first_after - self._oldest : found.last_before + 1 - self._oldest]
        return sum(between) >= 0.5 * len(between) > 0


# ------------------------------------------------------------------------------------------------- shots from the transitions

WHOLE_PARTS = 4  # parts of a long shot that are weighed together; beyond, parts of full length are given away, so that they settle


class _Shots:
    """Transitions in, settled shots out, in order and without gaps; keeps one boundary back, which a stronger neighbour may replace."""

    def __init__(self, config: DetectorConfig) -> None:
        self._shortest = config.shortest_shot
        self._longest = config.longest_shot
        self._boundary = 0  # the last one that is not a split
        self._shot = ShotSpan(0, 0)  # the shot, or its part, that is being filled; its end is not known yet
        self._next: ShotSpan | None = None  # the shot behind it, when a boundary was found that may still be replaced
        self._dropped: list[int] = []  # frames at which boundaries were dropped, not yet counted to a shot

    def push(self, transitions: list[Transition], flashes: list[int], settled_until: int) -> list[ShotSpan]:
        """Take transitions and the frames of flashes; no later ones will lie before the frame settled_until."""
        self._dropped.extend(flashes)
        shots = []
        for found in transitions:
            start = ShotSpan(found.middle, found.middle, found.kind, found.probability, found.last_before, found.first_after)
            if self._next is not None and start.start_frame - self._next.start_frame >= max(self._shortest, 1):
                shots.extend(self._end_shot(self._next))
            if self._next is not None:  # two boundaries too close: the more probable one stays
                weaker, self._next = sorted((start, self._next), key=lambda boundary: boundary.boundary_probability)
                self._dropped.append(weaker.start_frame)
            elif start.start_frame - self._boundary >= max(self._shortest, 1):
                self._next = start
            else:
                self._dropped.append(start.start_frame)
        if self._next is not None and settled_until - self._next.start_frame >= self._shortest:
            shots.extend(self._end_shot(self._next))
        if self._next is None:
            shots.extend(self._give_away(settled_until))
            if not self._longest:  # so that an endless shot full of flashes takes no memory
                self._shot = self._with_dropped(self._shot, settled_until)
        return shots

    def finish(self, frame_count: int) -> list[ShotSpan]:
        shots = []
        if self._next is not None and frame_count - self._next.start_frame >= self._shortest:
            shots.extend(self._end_shot(self._next))
        if self._next is not None:
            self._dropped.append(self._next.start_frame)
            self._next = None
        return shots + (self._end_shot(ShotSpan(frame_count, frame_count)) if frame_count else [])

    def _end_shot(self, following: ShotSpan) -> list[ShotSpan]:
        shots = self._give_away(following.start_frame)
        length = following.start_frame - self._shot.start_frame
        parts = -(-length // self._longest) if self._longest else 1
        ends = [self._shot.start_frame + length * part // parts for part in range(1, parts + 1)]
        shots.extend(self._take(end) for end in ends)
        self._boundary = following.start_frame
        self._shot = following
        self._next = None
        return shots

    def _give_away(self, known_until: int) -> list[ShotSpan]:
        """The first parts of a shot that is too long to be weighed as a whole."""
        shots = []
        while self._longest and known_until - self._shot.start_frame > WHOLE_PARTS * self._longest:
            shots.append(self._take(self._shot.start_frame + self._longest))
        return shots

    def _take(self, end: int) -> ShotSpan:
        done = dataclasses.replace(self._with_dropped(self._shot, end), end_frame=end)
        self._shot = ShotSpan(end, end, BOUNDARY_SPLIT, 1.0, end - 1, end)
        return done

    def _with_dropped(self, shot: ShotSpan, end: int) -> ShotSpan:
        inside = [frame for frame in self._dropped if frame < end]
        self._dropped = [frame for frame in self._dropped if frame >= end]
        return dataclasses.replace(shot, dropped_boundaries=shot.dropped_boundaries + len(inside))


class ShotsFromProbabilities:
    """The rules above, joined: probabilities and their frames in, settled shots out."""

    def __init__(self, config: DetectorConfig) -> None:
        self._transitions = _Transitions(config)
        self._shots = _Shots(config)
        self._frame_count = 0

    def push(self, one_hot_T: np.ndarray, many_hot_T: np.ndarray, frames_THWC: np.ndarray) -> list[ShotSpan]:
        self._frame_count += len(frames_THWC)
        return self._shots.push(
            self._transitions.push(one_hot_T, many_hot_T, frames_THWC), self._take_flashes(), self._transitions.settled_until
        )

    def finish(self) -> list[ShotSpan]:
        shots = self._shots.push(self._transitions.finish(), self._take_flashes(), self._frame_count)
        return shots + self._shots.finish(self._frame_count)

    def _take_flashes(self) -> list[int]:
        flashes, self._transitions.flashes = self._transitions.flashes, []
        return flashes


def shots_from_probabilities(
    one_hot_T: np.ndarray, many_hot_T: np.ndarray, frames_THWC: np.ndarray, config: DetectorConfig
) -> list[ShotSpan]:
    """Shots that tile [0, T) from the two heads' (T,) probabilities and the (T, 27, 48, 3) uint8 frames; none for T = 0."""
    joined = ShotsFromProbabilities(config)
    shots = []
    for start in range(0, len(frames_THWC), 1000):  # in pieces, to bound what is kept
        piece = slice(start, start + 1000)
        shots.extend(joined.push(one_hot_T[piece], many_hot_T[piece], frames_THWC[piece]))
    return shots + joined.finish()


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
        self.most_waiting = max(1, MOST_WAITING_FRAMES // self.windowing.step)  # windows of one title

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
