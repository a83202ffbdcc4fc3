"""One pass over a title: packets in, small pictures, sound, cues and the frames of settled shots out.

    container -> packets -> video frames -> detector's pictures -> (detector, elsewhere) -> settled spans -> a shot's frames
                         -> audio frames -> 16 kHz mono samples
                         -> cues         -> text of shots

The zero of a title's time line is its first picture; where the sound starts more than ``MAX_SOUND_LEAD_S`` before the
first picture, it is the start of the sound. Containers start anywhere (transport streams at any time, Matroska and MP4 a
few milliseconds late when the audio codec needs a lead-in), while sidecars and annotations count from the first picture.
The first shot starts at zero. The last shot ends when its last frame has been shown for its duration.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np

from mediafm_ray.media import picture, sampling, sound, source, timed_text
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.spec import Cue, ShotSpan, Title, TitleError

BLOCK_FRAMES = 64  # pictures handed to the detector at once
MAX_SOUND_LEAD_S = 0.5  # sound that starts earlier than this before the first picture is programme, not a codec's lead-in
MAX_PACKETS_BEFORE_PICTURE = 20_000  # sound packets that wait for the first picture, to know where the time line starts


class Exchange(Protocol):
    """Where the results of a pass go, and where the settled spans come from."""

    def pictures(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        """Hand over (T, 27, 48, 3) uint8 RGB pictures; return spans that have settled. Which ones must not depend on timing."""
        ...

    def no_more_pictures(self) -> list[ShotSpan]:
        """Return all spans that are left."""
        ...

    def sound(self, samples_N: np.ndarray) -> None:
        """Hand over the next (N,) int16 samples."""
        ...

    def shot(self, span: ShotSpan, start_s: float, end_s: float, frames: Sequence[bytes], thumbnail: bytes) -> None:
        """Hand over a shot."""
        ...


def read_title(
    title: Title, frames: FramesConfig, timed_text_config: TimedTextConfig, media: MediaConfig, exchange: Exchange
) -> dict[str, Any]:
    """Read one title; return what is known at its end: texts, languages, duration_s, frame_count, warnings, facts.

    Raises TitleError with a reason for people.
    """
    name = source.file_name(title.video)
    with source.open_bytes(title.video, media) as stream:
        container = source.open_container(stream, name, media)
        try:
            return _Pass(container, name, title, frames, timed_text_config, media, exchange).run()
        finally:
            container.close()


class _Pass:
    def __init__(
        self,
        container: av.container.InputContainer,
        name: str,
        title: Title,
        frames: FramesConfig,
        timed_text_config: TimedTextConfig,
        media: MediaConfig,
        exchange: Exchange,
    ):
        self.container, self.name, self.title = container, name, title
        self.frames, self.timed_text_config, self.media, self.exchange = frames, timed_text_config, media, exchange
        self.warnings: list[str] = []
        self.counts: dict[str, int] = {}
        self.video = choose_video(container, name)
        self.audio = choose_audio(container)
        self.tick = Fraction(self.video.time_base or Fraction(1, 1000))
        self.period = max(round(1 / (self.video.guessed_rate or Fraction(25)) / self.tick), 1)  # ticks of a usual frame
        self.painter = picture.Painter(frames.size, Fraction(self.video.sample_aspect_ratio or 1) or Fraction(1))
        self.candidates = sampling.CandidateBuffer(discard=self.painter.discard)
        self.block: list[np.ndarray] = []
        self.frame_count = 0
        self.zero_ticks: int | None = None
        self.last_ticks = 0
        self.last_duration = self.period
        self.track: sound.SoundTrack | None = None
        self.waiting_sound: list[av.AudioFrame] = []
        self.shot_times = array("d")  # start_s, end_s of each shot

    def run(self) -> dict[str, Any]:
        cues = self._sidecar_cues()
        streams = [stream for stream in (self.video, self.audio) if stream is not None]
        self.video.thread_type = "AUTO"
        self.video.codec_context.thread_count = self.media.threads or 2
        if self.audio is not None:
            self.audio.codec_context.thread_count = 1
        for packet in self._packets(streams):
            if packet.stream is self.video:
                for frame in self._decoded(packet, "video"):
                    self._picture(frame)
            else:
                for sounding in self._decoded(packet, "audio"):
                    self._sound(sounding)
        return self._finish(cues)

    def _packets(self, streams: Sequence[Any]) -> Any:
        packets = self.container.demux(streams)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError as error:
                self._count("container errors")
                self.warnings.append(f"the container breaks off: {error.strerror}")
                for stream in streams:  # frames that the decoders still hold
                    flush = av.Packet()
                    flush.stream = stream
                    yield flush
                return
            if packet.is_corrupt:
                self._count("corrupt packets")
            yield packet

    def _decoded(self, packet: Any, kind: str) -> list[Any]:
        try:
            return packet.decode() if packet.dts is not None or packet.size else packet.stream.decode(None)
        except (av.error.InvalidDataError, av.error.EOFError, av.error.PatchWelcomeError):
            self._count(f"{kind} packets that could not be decoded")
            return []
        except av.error.DecoderNotFoundError:
            raise TitleError(f"{self.name}: there is no decoder for its {kind}") from None

    # -- pictures

    def _picture(self, frame: av.VideoFrame) -> None:
        if frame.width * frame.height > self.media.max_pixels:
            raise TitleError(
                f"{self.name} has pictures of {frame.width}x{frame.height} pixels; media.max_pixels allows {self.media.max_pixels}"
            )
        if frame.is_corrupt:
            self._count("corrupt frames")
        ticks = frame.pts
        if ticks is None:
            self._count("frames without a time stamp")
            ticks = self.last_ticks + self.period if self.frame_count else 0
        if self.zero_ticks is None:
            self._start(ticks)
        elif ticks <= self.last_ticks:
            self._count("frames whose time does not grow")
            ticks = self.last_ticks + 1
        self.last_ticks = ticks
        self.last_duration = frame.duration or self.period
        detector_HWC, small = self.painter.pictures(frame)
        self.candidates.add(self.frame_count, ticks, small)
        self.block.append(detector_HWC)
        self.frame_count += 1
        if len(self.block) == BLOCK_FRAMES:
            self._settle(self.exchange.pictures(self._take_block()), last=False)

    def _start(self, first_ticks: int) -> None:
        self.zero_ticks = first_ticks
        waiting = self.waiting_sound
        if waiting and waiting[0].pts is not None and waiting[0].time_base is not None:
            sound_s = Fraction(waiting[0].pts * waiting[0].time_base)
            if first_ticks * self.tick - sound_s > MAX_SOUND_LEAD_S:
                self.zero_ticks = round(sound_s / self.tick)
        if self.audio is not None:
            self.track = sound.SoundTrack(self.zero_ticks * self.tick)
        self.waiting_sound = []
        for frame in waiting:
            self._sound(frame)

    def _take_block(self) -> np.ndarray:
        block_THWC = np.stack(self.block)
        self.block = []
        return block_THWC

    def _settle(self, spans: list[ShotSpan], last: bool) -> None:
        for span in spans:
            ends_title = last and span.end_frame == self.frame_count
            end_ticks = self.last_ticks + self.last_duration if ends_title else self.candidates.start_ticks(span.end_frame)
            start_s = self._seconds(self.candidates.start_ticks(span.start_frame)) if span.start_frame else 0.0
            chosen = self.candidates.choose(span.end_frame, end_ticks, self.frames.per_shot)
            kept = [picture.jpeg(self.painter.rgb_HWC(one.picture), self.frames.jpeg_quality) for one in chosen]
            thumbnail = b""
            if self.frames.thumbnail_width:
                middle = self.candidates.choose(span.end_frame, end_ticks, 1)[0]
                thumbnail = picture.jpeg(self.painter.rgb_HWC(middle.picture), self.frames.thumbnail_quality, self.frames.thumbnail_width)
            self.shot_times.extend((start_s, self._seconds(end_ticks)))
            self.exchange.shot(span, start_s, self._seconds(end_ticks), kept, thumbnail)
            if not ends_title:
                self.candidates.drop_before(span.end_frame)

    def _seconds(self, ticks: int) -> float:
        assert self.zero_ticks is not None
        return float((ticks - self.zero_ticks) * self.tick)

    # -- sound

    def _sound(self, frame: av.AudioFrame) -> None:
        if self.track is None:
            self.waiting_sound.append(frame)
            if len(self.waiting_sound) > MAX_PACKETS_BEFORE_PICTURE:
                raise TitleError(f"{self.name}: no picture could be decoded after {len(self.waiting_sound)} frames of sound")
            return
        for samples_N in self.track.add(frame):
            self.exchange.sound(samples_N)

    # -- the end

    def _finish(self, cues: list[Cue]) -> dict[str, Any]:
        if not self.frame_count:
            raise TitleError(f"{self.name}: no picture could be decoded ({self._summary()})")
        if self.block:
            self._settle(self.exchange.pictures(self._take_block()), last=False)
        self._settle(self.exchange.no_more_pictures(), last=True)
        if self.track is not None:
            for samples_N in self.track.finish():
                self.exchange.sound(samples_N)
        duration_s = self.shot_times[-1]
        declared_s = self.container.duration / av.time_base if self.container.duration else 0.0
        bad = self.counts.get("video packets that could not be decoded", 0) + self.counts.get("corrupt frames", 0)
        lost = max(1 - duration_s / declared_s, 0.0) if declared_s else 0.0
        damage = min(max(bad / (self.frame_count + bad), lost), 1.0)
        for what, count in self.counts.items():
            self.warnings.append(f"{count} {what}")
        if damage > 0.01:
            self.warnings.append(f"{damage:.0%} of the picture is missing or damaged")
        if damage > self.media.max_damage:
            raise TitleError(
                f"{self.name} is too damaged: {damage:.0%} of its picture is missing or damaged, "
                f"media.max_damage allows {self.media.max_damage:.0%} "
                f"({self._summary()}; declared {declared_s:.1f} s, decoded {duration_s:.1f} s)"
            )
        shots = list(zip(self.shot_times[::2], self.shot_times[1::2], strict=True))
        texts = timed_text.text_of_shots(cues, shots)
        context = self.video.codec_context
        facts: dict[str, Any] = {
            "container": self.container.format.name,
            "bytes": self.container.size,
            "video_codec": context.name,
            "width": context.width,
            "height": context.height,
            "average_rate": str(self.video.average_rate) if self.video.average_rate else None,
            "time_base": str(self.tick),
            "declared_duration_s": declared_s or None,
            "duration_s": duration_s,
            "audio_codec": self.audio.codec_context.name if self.audio is not None else None,
            "audio_rate": self.audio.codec_context.sample_rate if self.audio is not None else None,
            "audio_layout": self.audio.codec_context.layout.name if self.audio is not None else None,
            "damage": round(damage, 6),
        }
        return {
            "texts": [text for text, _ in texts],
            "languages": [language for _, language in texts],
            "duration_s": duration_s,
            "frame_count": self.frame_count,
            "has_sound": self.track is not None and self.track.started,
            "warnings": self.warnings,
            "facts": facts,
        }

    def _sidecar_cues(self) -> list[Cue]:
        cues: list[Cue] = []
        for one in timed_text.choose_sources(self.title.timed_text, self.timed_text_config):
            name = source.file_name(one.uri)
            try:
                data = source.read_whole(one.uri, self.media, timed_text.MAX_BYTES)
                found, warnings = timed_text.parse(data, name, one.language, one.kind)
            except TitleError as error:
                self.warnings.append(f"no text from {name}: {error}")
                continue
            cues += found
            self.warnings += warnings
        return cues

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _summary(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in self.counts.items()) or "no errors were reported"


def choose_video(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """The stream with the largest picture that is no attached picture; the first of equal ones. Raises TitleError."""
    attached = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not streams:
        if container.streams.video:
            raise TitleError(f"{name} has no video: its only picture is cover art")
        raise TitleError(f"{name} has no video" + (", only audio" if container.streams.audio else ""))
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise TitleError(f"{name}: its video is in a codec that cannot be decoded here")
    return max(decodable, key=lambda stream: (bool(stream.disposition & av.stream.Disposition.default), stream.width * stream.height))


def choose_audio(container: av.container.InputContainer) -> av.AudioStream | None:
    """The default audio stream that is neither commentary nor audio description; else the first such; else the first."""
    other = av.stream.Disposition.comment | av.stream.Disposition.visual_impaired | av.stream.Disposition.descriptions
    streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
    if not streams:
        return None

    def rank(stream: av.AudioStream) -> tuple[bool, bool]:
        return not stream.disposition & other, bool(stream.disposition & av.stream.Disposition.default)

    return max(streams, key=rank)
