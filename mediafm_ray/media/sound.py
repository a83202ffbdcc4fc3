"""The audio of a title: mono int16 on the title's own time line, without holes, at 16 kHz unless the audio encoder takes another rate.

Sample n is heard at n / rate s after the title's zero. Time stamps decide: a gap becomes silence, an overlap is cut,
sound before the zero is dropped; jitter below ``RESYNC_S`` is left alone, so sound and picture differ by less.
Channels are mixed as FFmpeg's resampler does it by default (ITU-R BS.775: centre and front full, surround -3 dB, no LFE,
scaled so that nothing clips).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from mediafm_ray.spec import SAMPLE_RATE

RESYNC_S = 0.010  # time stamps that differ from the running count by more than this are followed
JUMP_BACK_S = 1.0  # a time stamp this far before the count starts a new count
MAX_SILENCES = 1000  # gaps that are recorded
SILENCE_PIECE = 960_000  # samples of silence in one piece


class SoundTrack:
    """Converts decoded audio frames, in order, to samples of the time line."""

    def __init__(self, zero_s: Fraction, max_hours: float, rate: int = SAMPLE_RATE):
        self.zero_s = zero_s  # the title's zero on the container's clock
        self.rate = rate  # samples a second of the time line
        self.limit = round(max_hours * 3600 * rate)
        self.jumps = 0  # time stamps that were not followed
        self.unusable = 0  # frames that could not be converted
        self.written = 0  # samples returned so far: the position on the time line
        self.to_drop = 0  # samples of the coming output that lie before the position or before zero
        self.expected = Fraction(0)  # where the next frame starts, in samples of the time line, if nothing is missing
        self.started = False
        self.layout: tuple[str, str, int] | None = None
        self.resampler: av.AudioResampler | None = None
        self.silences: list[tuple[int, int]] = []  # gaps within the sound: start and end in samples

    def add(self, frame: av.AudioFrame) -> list[np.ndarray]:
        """Take the next frame; return pieces of (N,) int16 that follow what was returned before."""
        pieces: list[np.ndarray] = []
        position = self.expected
        if frame.pts is not None and frame.time_base is not None:
            position = (frame.pts * frame.time_base - self.zero_s) * self.rate
            if self.started and self.expected - position > JUMP_BACK_S * self.rate:  # the recording was joined here
                self.jumps += 1
                self.zero_s -= (self.expected - position) / self.rate
                position = self.expected
            elif position > self.limit:
                self.jumps += 1
                position = self.expected
        layout = (frame.format.name, frame.layout.name, frame.sample_rate)
        if not self.started or abs(position - self.expected) > RESYNC_S * self.rate or layout != self.layout:
            pieces += self._flush()
            if self.started and position - self.expected > RESYNC_S * self.rate and len(self.silences) < MAX_SILENCES:
                self.silences.append((round(self.expected), round(position)))
            pieces += self._go_to(round(position))
            self.expected = position
            self.started, self.layout = True, layout
            self.resampler = av.AudioResampler(format="s16", layout="mono", rate=self.rate)
        assert self.resampler is not None
        self.expected += Fraction(frame.samples * self.rate, frame.sample_rate)
        frame.pts = None  # the resampler must count samples, not repair time stamps: that is done here
        try:
            pieces += self._take(self.resampler.resample(frame))
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError:  # damage can make up a layout or rate; silence takes the place of such sound
            self.unusable += 1
            self.resampler = self.layout = None
        return pieces

    def finish(self) -> list[np.ndarray]:
        """Return the samples that are left in the resampler."""
        return self._flush()

    def _flush(self) -> list[np.ndarray]:
        if self.resampler is None:
            return []
        pieces = self._take(self.resampler.resample(None))
        self.resampler = None
        return pieces

    def _take(self, frames: Sequence[av.AudioFrame | None]) -> list[np.ndarray]:
        pieces = []
        for frame in frames:
            if frame is None:
                continue
            samples = frame.to_ndarray().reshape(-1)
            dropped = min(self.to_drop, len(samples))
            self.to_drop -= dropped
            if len(samples) > dropped:
                pieces.append(samples[dropped:])
                self.written += len(samples) - dropped
        return pieces

    def _go_to(self, position: int) -> list[np.ndarray]:
        silence = position - self.written
        self.to_drop = max(-silence, 0)
        pieces = []
        while silence > 0:
            pieces.append(np.zeros(min(silence, SILENCE_PIECE), np.int16))
            silence -= len(pieces[-1])
            self.written += len(pieces[-1])
        return pieces
