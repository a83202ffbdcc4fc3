"""Shot boundary detection: frames -> probabilities (``transnet``) -> shots (``shot_rules``), for titles of any length, bit by bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from mediafm_ray.models import weights
from mediafm_ray.models.loading import MicroBatches, Workers, load_state, open_device
from mediafm_ray.models.options import DetectorConfig
from mediafm_ray.models.shot_rules import ShotsFromProbabilities, shots_from_probabilities
from mediafm_ray.models.transnet import TransNetSequence, TransNetV2, int8_is_there
from mediafm_ray.spec import DETECTOR_HEIGHT, DETECTOR_WIDTH, ShotSpan

# ---------------------------------------------------------------------------- windows of a title, as in the published predict_frames


WINDOW = 100  # frames
MARGIN = 25  # of a window's predictions, at both ends, that are thrown away: every frame is computed twice
STEP = WINDOW - 2 * MARGIN
MAX_WAITING_WINDOWS = 12  # A caller keeps the frames of shots that have not settled, however many threads there are.


class _Windows:
    """Cuts a stream of frames into overlapping windows as the reference's predict_frames does.

    The first frame is repeated over a margin before the title, the last one behind it.
    """

    def __init__(self) -> None:
        self._pending = np.empty((0, DETECTOR_HEIGHT, DETECTOR_WIDTH, 3), np.uint8)
        self._frames_seen = 0
        self._frames_cut = 0

    def push(self, frames_THWC: np.ndarray) -> list[np.ndarray]:
        """Take frames; return the (T, 27, 48, 3) windows that they complete."""
        if len(frames_THWC) == 0:
            return []
        if self._frames_seen == 0:
            self._pending = np.repeat(frames_THWC[:1], MARGIN, axis=0)
        self._frames_seen += len(frames_THWC)
        return self._cut(frames_THWC)

    def finish(self) -> list[np.ndarray]:
        """Return the last windows, padded; predictions beyond the title's frames are to be dropped."""
        missing = self._frames_seen - self._frames_cut
        if missing == 0:
            return []
        wanted = -(-missing // STEP) * STEP + 2 * MARGIN
        return self._cut(np.repeat(self._pending[-1:], wanted - len(self._pending), axis=0))

    def _cut(self, frames_THWC: np.ndarray) -> list[np.ndarray]:
        windows = []
        for start in range(0, len(frames_THWC), STEP):  # in pieces: a long push is not copied once a window
            self._pending = np.concatenate([self._pending, frames_THWC[start : start + STEP]])
            while len(self._pending) >= WINDOW:
                windows.append(self._pending[:WINDOW])
                self._pending = self._pending[STEP:]
                self._frames_cut += STEP
        return windows


# ----------------------------------------------------------------------------------------------------------- the detector

CHUNK = 100  # Frames that a CPU takes at once; a GPU takes ``config.batch`` times as many.
PADDING = 4  # Repeated frames at both ends; without them more boundaries near an end are missed, with 25, as a window has, no fewer.
PIECE = 25  # Frames that one CPU thread computes at once: what divides a chunk is the same for any number of threads.


class ShotDetector:
    """TransNet V2 with its published weights on one device; detects the shots of any number of titles.

    config.exact: windows and float32 as in the published predict_frames. Otherwise every frame is computed once, and the convolutions
    are done in bfloat16 where the processor has instructions for it, in 8-bit integers on other x86 processors, in float32 elsewhere;
    probabilities differ by less than 0.15.
    On a CPU every piece of work is computed by one thread: probabilities depend neither on other titles nor on the number of threads.

    Raises weights.WeightsError when the weights are not there or are not TransNet V2's, ValueError for a device that is not there or a
    configuration without sense.
    """

    def __init__(self, config: DetectorConfig) -> None:
        self.config = config
        device = open_device(config.device)
        path = weights.resolve(config.weights)
        published = load_state(path)
        try:
            dtype = torch.float32 if config.exact else fast_dtype(device)
            int8 = not config.exact and device.type == "cpu" and dtype == torch.float32 and int8_is_there()
            self.network = TransNetV2(published, device, dtype, int8)
        except (KeyError, RuntimeError) as problem:
            raise weights.WeightsError(f"{path} does not hold the weights of TransNet V2 (PyTorch): {problem}") from problem
        self.on_cpu = device.type == "cpu"
        self.workers = Workers(config.threads if self.on_cpu else 1)
        self.chunk = CHUNK if self.on_cpu else CHUNK * config.batch
        self._micro_batches = MicroBatches(device, config.batch)

    def stream(self) -> DetectorStream:
        """A detector at work on one title (spec.ShotStream)."""
        return DetectorStream(self)

    def predictions(self) -> _WindowPredictions | _SequencePredictions:
        """The probabilities of one title, whose frames come bit by bit."""
        return _WindowPredictions(self) if self.config.exact else _SequencePredictions(self)

    def predict_frames(self, frames_THWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T, 27, 48, 3) uint8 RGB -> one_hot (T,), many_hot (T,) float32 probabilities of a whole title."""
        predictions = self.predictions()
        parts = predictions.push(frames_THWC) + predictions.finish()
        predicted_2T = np.concatenate([np.empty((2, 0), np.float32), *parts], axis=1)[:, : len(frames_THWC)]
        return predicted_2T[0], predicted_2T[1]

    def detect(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        """All shots of a title whose frames are in memory; equal to what stream() gives."""
        return shots_from_probabilities(*self.predict_frames(frames_THWC), frames_THWC, self.config)

    def predict_windows(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Windows (100, 27, 48, 3) -> for each (2, 50) float32: one-hot and many-hot between the margins."""
        if self.on_cpu:
            return self.workers.map(lambda window_THWC: self._predict_batch([window_THWC])[0], windows)
        return self._micro_batches.compute(self._predict_batch, windows)

    def _predict_batch(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        with self.whole_float32():
            predicted_B2T = self.network(torch.from_numpy(np.stack(windows))).cpu().numpy()
        return list(predicted_B2T[:, :, MARGIN:-MARGIN])

    def whole_float32(self) -> contextlib.AbstractContextManager[None]:
        """Let a GPU keep all 23 bits of float32 in convolutions, of which it would drop 13; the setting is the whole process's."""
        return contextlib.nullcontext() if self.on_cpu else torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")) else torch.float32


class _WindowPredictions:
    """Probabilities of one title by windows."""

    def __init__(self, detector: ShotDetector) -> None:
        self._detector = detector
        self._windows = _Windows()
        self._waiting: list[np.ndarray] = []  # windows that are full and not predicted yet
        wanted = detector.workers.threads if detector.on_cpu else detector.config.batch
        self._wanted = min(wanted, MAX_WAITING_WINDOWS)  # what keeps the device busy

    def push(self, frames_THWC: np.ndarray) -> list[np.ndarray]:
        """Take frames; return (2, T) probabilities, which go on where those before ended."""
        self._waiting += self._windows.push(_checked(frames_THWC))
        return self._predict() if len(self._waiting) >= self._wanted else []

    def finish(self) -> list[np.ndarray]:
        """Return what is left, and more beyond the last frame, which is to be dropped."""
        self._waiting += self._windows.finish()
        return self._predict()

    def _predict(self) -> list[np.ndarray]:
        waiting, self._waiting = self._waiting, []
        return self._detector.predict_windows(waiting)


class _SequencePredictions:
    """Probabilities of one title as one sequence."""

    def __init__(self, detector: ShotDetector) -> None:
        self._detector = detector
        self._sequence = TransNetSequence(
            detector.network, PIECE if detector.on_cpu else detector.chunk, detector.workers.map if detector.on_cpu else _in_turn
        )
        self._pending = np.empty((0, DETECTOR_HEIGHT, DETECTOR_WIDTH, 3), np.uint8)
        self._padding = PADDING  # repeated frames before the title that have no prediction yet

    def push(self, frames_THWC: np.ndarray) -> list[np.ndarray]:
        """Take frames; return (2, T) probabilities, which go on where those before ended."""
        frames_THWC = _checked(frames_THWC)
        before = self._pending if len(self._pending) else np.repeat(frames_THWC[:1], PADDING, axis=0)
        self._pending = np.concatenate([before, frames_THWC])  # From the first frame on, some are always left.
        predicted = []
        while len(self._pending) > self._detector.chunk:  # what is left has a frame at least, for the title's end
            predicted.append(self._predict(self._pending[: self._detector.chunk], is_last=False))
            self._pending = self._pending[self._detector.chunk :]
        return predicted

    def finish(self) -> list[np.ndarray]:
        """Return what is left, and more beyond the last frame, which is to be dropped."""
        if len(self._pending) == 0:
            return []
        return [self._predict(np.concatenate([self._pending, np.repeat(self._pending[-1:], PADDING, axis=0)]), is_last=True)]

    def _predict(self, frames_NHWC: np.ndarray, is_last: bool) -> np.ndarray:
        with self._detector.whole_float32():
            predicted_2T = self._sequence.push(torch.from_numpy(frames_NHWC), is_last).cpu().numpy()
        dropped = min(self._padding, predicted_2T.shape[1])
        self._padding -= dropped
        return predicted_2T[:, dropped:]


def _in_turn(compute: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Workers.map for a GPU, on the calling thread: every new thread would begin with new handles of cuDNN and cuBLAS."""
    return [compute(item) for item in items]


def _checked(frames_THWC: np.ndarray) -> np.ndarray:
    if frames_THWC.dtype != np.uint8 or frames_THWC.shape[1:] != (DETECTOR_HEIGHT, DETECTOR_WIDTH, 3):
        raise ValueError(
            f"the detector takes (T, {DETECTOR_HEIGHT}, {DETECTOR_WIDTH}, 3) uint8 RGB frames, not {frames_THWC.shape} {frames_THWC.dtype}"
        )
    return frames_THWC


class DetectorStream:
    """Frames of one title in, settled shots out. Memory is bounded by a few chunks, whatever the title's or a shot's length."""

    def __init__(self, detector: ShotDetector) -> None:
        self._predictions = detector.predictions()
        self._frames_THWC = np.empty((0, DETECTOR_HEIGHT, DETECTOR_WIDTH, 3), np.uint8)  # those without a prediction
        self._shots = ShotsFromProbabilities(detector.config)

    def push(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        """Take the next (T, 27, 48, 3) uint8 RGB frames; return the shots that no later frame can change.

        Raises ValueError for frames of another shape or type.
        """
        predicted = self._predictions.push(frames_THWC)
        self._frames_THWC = np.concatenate([self._frames_THWC, frames_THWC])
        return self._settle(predicted)

    def finish(self) -> list[ShotSpan]:
        """The title has no more frames; return the remaining shots (none for a title without frames)."""
        return self._settle(self._predictions.finish()) + self._shots.finish()

    def _settle(self, predicted: Sequence[np.ndarray]) -> list[ShotSpan]:
        shots: list[ShotSpan] = []
        for predicted_2T in predicted:
            count = min(predicted_2T.shape[1], len(self._frames_THWC))
            one_hot_T, many_hot_T = predicted_2T[:, :count]
            shots += self._shots.push(one_hot_T, many_hot_T, self._frames_THWC[:count])
            self._frames_THWC = self._frames_THWC[count:]
        return shots
