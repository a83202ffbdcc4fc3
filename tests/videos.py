"""Test videos made with PyAV, whose right answers are known: every frame carries its own number in its picture.

make_video(path, shots=[30, 12, 58], clicks=[0.5, 2.0], ...) -> Made
number_in(picture_HWC)   the number of the frame that a picture shows
KnownCuts([30, 42])      a detector that knows where the cuts are
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from mediafm_ray.spec import ShotSpan, TitleMedia

BITS = 12  # of a frame's number, in cells along the lower edge, most significant first
BAR = 8  # the bar is this part of the picture's height
ASS_HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, Italic, Underline, StrikeOut, \
ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,16,&Hffffff,&Hffffff,&H0,&H0,0,0,0,0,100,100,0,0,1,1,0,2,10,10,10,1

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""
CLICK_S = 0.02  # length of a click


@dataclass(frozen=True)
class Made:
    """A video that was written, and its right answers."""

    path: Path
    times: tuple[Fraction, ...]  # seconds when each frame is shown, from the first frame
    cuts: tuple[int, ...]  # first frame of every shot but the first
    end: Fraction  # seconds when the last frame has been shown

    @property
    def frame_count(self) -> int:
        return len(self.times)


def numbered_picture(number: int, shot: int, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8 RGB: a coloured texture that is the shot's own, and the frame's number along the lower edge."""
    random = np.random.default_rng(1000 + shot)
    tiles = random.integers(40, 216, (4, 6, 3), dtype=np.uint8)
    rows = np.arange(height) * 4 // height
    columns = (np.arange(width) * 6 // width + number // 8) % 6  # moves slowly
    picture = tiles[rows][:, columns].copy()
    bar = max(height // BAR, 2)
    for bit in range(BITS):
        lit = number >> (BITS - 1 - bit) & 1
        picture[-bar:, bit * width // BITS : (bit + 1) * width // BITS] = 235 if lit else 20
    return picture


def number_in(picture_HWC: np.ndarray) -> int:
    """The number that ``numbered_picture`` put into a picture, after coding and scaling."""
    height, width = picture_HWC.shape[:2]
    row = picture_HWC[height - max(height // BAR // 2, 1)].astype(float).mean(axis=-1)
    cells = [row[(2 * bit + 1) * width // (2 * BITS)] for bit in range(BITS)]
    return sum((cell > 128) << (BITS - 1 - bit) for bit, cell in enumerate(cells))


def picture_of(jpeg: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a JPEG."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def clicks_at(times_s: Sequence[float], duration_s: float, rate: int, channels: int = 1, tone_hz: float = 1000.0) -> np.ndarray:
    """(channels, samples) float32: silence with short tones that start at the given times."""
    samples = np.zeros(round(duration_s * rate), np.float32)
    click = 0.7 * np.sin(2 * np.pi * tone_hz * np.arange(round(CLICK_S * rate)) / rate)
    for time_s in times_s:
        start = round(time_s * rate)
        piece = samples[start : start + len(click)]
        piece[:] = click[: len(piece)]
    return np.repeat(samples[None], channels, axis=0)


def onsets_in(samples: bytes, rate: int = 16_000) -> list[float]:
    """Seconds at which sound starts after at least 50 ms of silence, in mono int16 samples."""
    loud = np.flatnonzero(np.abs(np.frombuffer(samples, "<i2").astype(int)) > 2000)
    if not len(loud):
        return []
    starts = loud[np.diff(loud, prepend=-rate) > 0.05 * rate]
    return [float(start / rate) for start in starts]


def make_video(
    path: Path,
    shots: Sequence[int] = (30, 30),
    *,
    size: tuple[int, int] = (320, 180),
    rate: Fraction = Fraction(25),
    durations: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    start: Fraction = Fraction(0),
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    b_frames: int = 2,
    gop: int = 12,
    pixel_aspect: Fraction | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    clicks: Sequence[float] | None = None,
    sound_s: float | None = None,
    sound_start_s: float = 0.0,
    sound_codec: str = "aac",
    sound_rate: int = 48_000,
    sound_layout: str = "stereo",
    cues: Sequence[tuple[float, float, str]] = (),
    cue_codec: str = "mov_text",
    cue_language: str = "eng",
    container_options: dict[str, str] | None = None,
) -> Made:
    """Write a video of ``shots`` (frames of each), all numbered, and return what a reader must find in it.

    ``durations`` (ticks of ``time_base`` of each frame) makes the frame rate variable; ``start`` is the time stamp of the
    first frame in seconds; ``rotation`` is the counter-clockwise turn that players apply; ``clicks`` (seconds from the first
    frame) adds sound that starts ``sound_start_s`` after the first frame.
    """
    time_base = time_base or 1 / rate
    count = sum(shots)
    durations = list(durations or [round(1 / rate / time_base)] * count)
    ticks = np.cumsum([0, *durations])
    total = Fraction(int(ticks[-1])) * time_base
    width, height = size
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = container.add_stream(codec, rate=rate, options={"bf": str(b_frames), "g": str(gop), **(options or {})})
        video.width, video.height, video.pix_fmt = width, height, pixel_format
        video.codec_context.time_base = time_base
        if pixel_aspect:
            video.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation or mirrored:
            video.set_display_rotation(rotation, hflip=mirrored)
        sound = None
        if clicks is not None:
            sound = container.add_stream(sound_codec, rate=sound_rate, layout=sound_layout)
        text = None
        if cues:
            text = container.add_stream(cue_codec)
            text.metadata["language"] = cue_language
            text.codec_context.time_base = Fraction(1, 1000)
            text.codec_context.subtitle_header = ASS_HEADER
        container.start_encoding()
        waiting = []
        if sound is not None:
            waiting = _sound_packets(sound, clicks or (), sound_s or float(total), sound_start_s + float(start), sound_rate, sound_layout)
        for packet in waiting:
            container.mux(packet)
        if text is not None:
            for start_s, end_s, words in cues:
                packet = av.Packet(len(words.encode()).to_bytes(2) + words.encode() if cue_codec == "mov_text" else words.encode())
                packet.stream, packet.time_base = text, Fraction(1, 1000)
                packet.pts = packet.dts = round((start_s + float(start)) * 1000)
                packet.duration = round((end_s - start_s) * 1000)
                container.mux(packet)
        number = 0
        for shot, length in enumerate(shots):
            for _ in range(length):
                frame = av.VideoFrame.from_ndarray(numbered_picture(number, shot, width, height), format="rgb24")
                frame.pts, frame.time_base = int(ticks[number]) + round(start / time_base), time_base
                frame.duration = durations[number]
                container.mux(video.encode(frame))
                number += 1
        container.mux(video.encode(None))
    times = tuple(Fraction(int(tick)) * time_base for tick in ticks[:-1])
    return Made(path, times, tuple(int(cut) for cut in np.cumsum(shots)[:-1]), total)


def _sound_packets(
    stream: av.AudioStream, clicks: Sequence[float], sound_s: float, start_s: float, rate: int, layout: str
) -> list[av.Packet]:
    channels = av.AudioLayout(layout).nb_channels
    samples = clicks_at(clicks, sound_s, rate, channels)
    first = round(start_s * rate)
    packets = []
    for position in range(0, samples.shape[1], 1024):
        piece = np.ascontiguousarray(samples[:, position : position + 1024])
        frame = av.AudioFrame(format="fltp", layout=layout, samples=piece.shape[1])
        planes = frame.planes  # of eight channels PyAV gives nine
        for channel in range(channels):
            planes[channel].update(piece[channel])
        frame.sample_rate, frame.pts, frame.time_base = rate, first + position, Fraction(1, rate)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def flat(media: TitleMedia) -> list[object]:
    """All of a title's media in a form that can be compared, byte for byte."""
    shots = [
        (
            shot.span,
            shot.start_s,
            shot.end_s,
            [bytes(frame) for frame in shot.frames],
            bytes(shot.audio),
            shot.text,
            shot.language,
            shot.thumbnail,
        )
        for shot in media.shots
    ]
    return [shots, media.duration_s, media.frame_count, media.warnings, dict(media.facts)]


class KnownCuts:
    """A detector that knows the cuts, and settles a shot only ``lag`` frames after its end, as a real one does."""

    def __init__(self, cuts: Sequence[int], lag: int = 40):
        self.cuts = list(cuts)
        self.lag = lag
        self.start = 0
        self.seen = 0
        self.pictures: list[np.ndarray] = []

    def push(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        assert frames_THWC.dtype == np.uint8
        assert frames_THWC.shape[1:] == (27, 48, 3)
        self.pictures.extend(frames_THWC)
        self.seen += len(frames_THWC)
        settled = []
        while self.cuts and self.cuts[0] + self.lag <= self.seen:
            settled.append(self._close(self.cuts.pop(0)))
        return settled

    def finish(self) -> list[ShotSpan]:
        return [self._close(cut) for cut in [*(cut for cut in self.cuts if cut < self.seen), self.seen] if cut > self.start]

    def _close(self, end: int) -> ShotSpan:
        span = ShotSpan(self.start, end, "cut" if self.start else "start", 0.9 if self.start else 1.0, max(self.start - 1, 0), self.start)
        self.start = end
        return span
