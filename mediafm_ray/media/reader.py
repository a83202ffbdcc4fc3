"""One pass over a title: packets in, small pictures, sound, cues and the frames of settled shots out.

    container -> packets -> video frames -> detector's pictures -> (detector, in the parent) -> settled spans -> a shot's frames
                         -> audio frames -> mono samples
                         -> cues         -> text of shots

Time. The zero of a title's time line is its first picture; where the sound starts more than ``MAX_SOUND_LEAD_S`` before
it, the start of the sound. Containers start anywhere (transport streams at any time, Matroska and MP4 some milliseconds
late when the audio codec needs a lead-in), while sidecars and annotations count from the first picture. Cues of subtitle
streams are on the container's clock and are moved along with it. The first shot starts at zero, each other one when its
first frame is shown, the last ends when its last frame has been shown for its duration. Inside this module time is an
integer count of the video stream's ticks since its first time stamp.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np

from mediafm_ray.errors import TitleError
from mediafm_ray.media import picture, sampling, sound, source, streams, timed_text
from mediafm_ray.media.cues import EmbeddedCues, SignsOfLife, read_sidecars
from mediafm_ray.media.damage import BROADCAST_FORMATS, LATE_PICTURE_S, LONG_HOLE_S, Damage, DecoderLog
from mediafm_ray.media.decoding import TitleDecoder
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.spec import SAMPLE_RATE, Cue, ShotSpan, Title

BLOCK_FRAMES = 64  # pictures in one block for the detector
READ_AHEAD_BLOCKS = 4  # blocks that decoding may be ahead: with fewer the detector waits for pictures after each window
CANDIDATE_LEAD = 2 * BLOCK_FRAMES  # pictures after those that the detector has answered for, up to which frames are candidates
MAX_SOUND_LEAD_S = 0.5  # sound that starts earlier before the first picture is programme, not a codec's lead-in
MAX_SOUND_WAITING = 2_000  # frames of sound that wait for the first picture, where the time line starts
JUMP_BACK_S = 1.0  # a time stamp this far before its predecessor starts a new count: recordings were joined there
MAX_LAST_FRAME_S = 60.0  # maximum duration of the last frame, whatever it declares
MISSING_END_S = 0.25  # a declared end this close to the last picture is rounding, or the end of the sound


class Exchange(Protocol):
    """Receiver of the results of a pass, and source of the settled spans."""

    def pictures(self, frames_THWC: np.ndarray) -> None:
        """Hand over the next (T, 27, 48, 3) uint8 RGB pictures."""
        ...

    def no_more_pictures(self) -> None:
        """Say that all pictures have been handed over."""
        ...

    def settled(self) -> list[ShotSpan]:
        """Return the spans that the earliest call of ``pictures`` or ``no_more_pictures`` without an answer has settled; wait for them."""
        ...

    def sound(self, samples_N: np.ndarray) -> None:
        """Hand over the next (N,) int16 samples."""
        ...

    def shot(self, span: ShotSpan, start_s: float, end_s: float, frames: Sequence[bytes], thumbnail: bytes) -> None:
        """Hand over a shot."""
        ...

    def alive(self) -> None:
        """Report progress without a result."""
        ...


def read_title(
    title: Title,
    frames: FramesConfig,
    timed_text_config: TimedTextConfig,
    media: MediaConfig,
    exchange: Exchange,
    log: DecoderLog | None = None,
    not_on_card: str = "",
    sample_rate: int = SAMPLE_RATE,
) -> dict[str, Any]:
    """Read one title; return what is known at its end: texts, languages, duration_s, frame_count, has_sound, warnings, facts.

    ``log`` is what FFmpeg writes; without it, concealed errors go unnoticed. ``not_on_card`` is the reason why a card that was tried
    before must not decode the title; ``sample_rate`` is that of the sound. Raises TitleError with a reason for people, and CardError where
    a card that has begun the title cannot go on: all results are then void.
    """
    name = source.file_name(title.video)
    with source.open_bytes(title.video, media) as stream:
        cut_off = source.is_cut_off(stream)
        container = source.open_container(stream, name, media)
        try:
            return _Pass(container, name, cut_off, title, frames, timed_text_config, media, exchange, log, sample_rate).run(not_on_card)
        finally:
            container.close()


class _Pass:
    """One reading of one title. Positions are ticks of the video stream since its first time stamp."""

    def __init__(
        self,
        container: av.container.InputContainer,
        name: str,
        cut_off: bool | None,
        title: Title,
        frames: FramesConfig,
        timed_text_config: TimedTextConfig,
        media: MediaConfig,
        exchange: Exchange,
        log: DecoderLog | None,
        sample_rate: int,
    ):
        self.sample_rate = sample_rate
        self.container, self.name, self.cut_off, self.title = container, name, cut_off, title
        self.frames, self.timed_text_config, self.media, self.exchange = frames, timed_text_config, media, exchange
        self.warnings: list[str] = []
        self.damage = Damage()
        self.decoder = TitleDecoder(container, name, media, self.damage, self.warnings, log, frames.size, self._place)
        self.video, self.tick, self.period = self.decoder.video, self.decoder.tick, self.decoder.period
        self.converter = self.decoder.converter
        self.candidates = sampling.CandidateBuffer(discard=self.converter.discard)

        self.alive = SignsOfLife(exchange.alive)
        self.block: list[np.ndarray] = []
        self.unanswered: deque[int] = deque()  # pictures in each block that the detector has not answered for
        self.answered = 0  # pictures that the detector has answered for
        self.ahead: deque[sampling.Candidate[picture.WorkingFrame]] = deque()  # pictures that are no candidates yet
        self.frame_count = 0
        self.first_pts: int | None = None  # the pts at 0 of our ticks, which no picture need have
        self.zero = 0  # the title's zero, in our ticks
        self.last_ticks = 0
        self.last_duration = self.period
        self.sizes: list[str] = []  # sizes of the pictures, each time that they change
        self.track: sound.SoundTrack | None = None
        self.waiting_sound: list[av.AudioFrame] = []
        self.cues: list[Cue] = []
        self.embedded: EmbeddedCues | None = None
        self.shot_times = array("d")  # start_s, end_s of each shot

    def run(self, not_on_card: str) -> dict[str, Any]:
        """Read to the end; return what ``read_title`` returns."""
        self.cues, warnings = read_sidecars(self.title, self.timed_text_config, self.media, self.alive)
        self.warnings += warnings
        text = None
        if self.timed_text_config.embedded and not self.cues:
            text = streams.choose_text(self.container, self.timed_text_config)
        if text is not None:
            self.embedded = EmbeddedCues(text, self.timed_text_config)
        for packet in self.decoder.packets(text, not_on_card):
            if packet.stream is self.video:
                for frame in self.decoder.pictures(packet):
                    self._picture(frame)
                self.decoder.read_log()
            elif packet.stream is self.decoder.audio:
                for sounding in self.decoder.sounds(packet):
                    self._sound(sounding)
            elif self.embedded is not None:
                try:
                    self.embedded.add(packet)
                except av.error.FFmpegError:
                    self.damage.remark("cues that could not be decoded")
        return self._finish()

    def _place(self, packet: Any) -> None:
        """Note the time of the packet that is read, for errors that it causes; its pictures come later."""
        pts = packet.dts if self.decoder.without_pts else packet.pts
        if pts is None or self.first_pts is None:
            self.damage.now_ticks = self.last_ticks
        else:
            self.damage.now_ticks = pts - self.first_pts

    # -- pictures

    def _picture(self, frame: av.VideoFrame) -> None:
        if frame.width * frame.height > self.media.max_pixels:  # a card's pictures are scaled, and their size was checked before
            raise TitleError(
                f"{self.name} has pictures of {frame.width}x{frame.height} pixels; media.max_pixels allows {self.media.max_pixels}"
            )
        self._note_oddities(frame)
        ticks = self._ticks_of(frame)
        detector_HWC, small = self.converter.pictures(frame)
        self.ahead.append(sampling.Candidate(self.frame_count, ticks, small))
        self.block.append(detector_HWC)
        self.frame_count += 1
        if len(self.block) == BLOCK_FRAMES:
            self._hand_over_block()
        else:
            self.alive()  # some pictures take seconds each

    def _note_oddities(self, frame: av.VideoFrame) -> None:
        if frame.is_corrupt:
            self.damage.see("pictures that the decoder marks as corrupt", of_decoder=True)
            self.damage.corrupt_frames += 1
        whole = frame if self.decoder.card is None else self.decoder.card.first  # on a card the size cannot change
        size = f"{whole.width}x{whole.height}"
        if self.sizes[-1:] != [size] and len(self.sizes) < 10:
            self.sizes.append(size)

    def _ticks_of(self, frame: av.VideoFrame) -> int:
        """Return when the frame is shown, in ticks that grow from frame to frame; 0 for the first."""
        usual = self.last_ticks + self.last_duration if self.frame_count else 0
        without_pts = self.decoder.without_pts
        pts = frame.dts if frame.pts is None or without_pts else frame.pts
        if pts is None:
            if not without_pts:
                self.damage.remark("pictures without a time stamp, placed after their predecessor")
            ticks = usual
        elif self.first_pts is None:  # earlier frames without a time stamp have been counted
            self.first_pts = pts - usual
            self._start()
            ticks = usual
        else:
            ticks = pts - self.first_pts
            if self.last_ticks - ticks > JUMP_BACK_S / self.tick:
                self.damage.remark("time the time stamps jump back; counted on")
                self.first_pts -= usual - ticks
                ticks = usual
        if self.frame_count and ticks <= self.last_ticks:
            self.damage.remark("pictures not later than their predecessor, shown after it")
            ticks = self.last_ticks + 1
        if ticks * self.tick > self.media.max_hours * 3600:
            raise TitleError(f"{self.name} claims to be longer than {self.media.max_hours:g} hours (media.max_hours)")
        if self.frame_count:
            interval = ticks - self.last_ticks
            expected = max(self.last_duration, self.period)
            if interval > 1.5 * expected:
                self.damage.hole(self.last_ticks + expected, ticks)
            if interval * self.tick > LONG_HOLE_S and interval > 10 * expected:
                self.warnings.append(
                    f"no new picture for {float(interval * self.tick):.1f} s from {self._seconds(self.last_ticks):.1f} s on"
                )
        self.last_ticks, self.last_duration = ticks, min(frame.duration or self.period, int(MAX_LAST_FRAME_S / self.tick))
        return ticks

    def _start(self) -> None:
        """Place the zero, now that the first time stamp is known, and convert the sound that has waited for it."""
        assert self.first_pts is not None
        waiting, self.waiting_sound = self.waiting_sound, []
        first_s = self.first_pts * self.tick
        start_s = _start_of(waiting)
        if start_s is not None and first_s - start_s > MAX_SOUND_LEAD_S:
            self.zero = round(start_s / self.tick) - self.first_pts
        declared = self.video.start_time
        if declared is not None and (self.first_pts - declared) * self.tick > LATE_PICTURE_S:
            late_s = float((self.first_pts - declared) * self.tick)
            self.warnings.append(
                f"the first {late_s:.2f} s of the video cannot be decoded (it starts in the middle of a group of pictures)"
            )
        if self.decoder.audio is not None and self.track is None:
            self.track = sound.SoundTrack(first_s + self.zero * self.tick, self.media.max_hours, self.sample_rate)
        for frame in waiting:
            self._sound(frame)

    def _hand_over_block(self) -> None:
        self.exchange.pictures(np.stack(self.block))
        self.unanswered.append(len(self.block))
        self.block = []
        if len(self.unanswered) > READ_AHEAD_BLOCKS:
            self._settle()

    def _settle(self, last: bool = False) -> None:
        """Hand over the shots that the earliest unanswered block settles.

        Only frames up to a fixed distance behind that block are candidates, so the choice depends on neither timing nor read-ahead.
        """
        spans = self.exchange.settled()
        self.answered += self.unanswered.popleft()
        while self.ahead and self.ahead[0].index < self.answered + CANDIDATE_LEAD:
            self.candidates.add(self.ahead.popleft())
        for span in spans:
            ends_title = last and span.end_frame == self.frame_count
            end_ticks = self.last_ticks + self.last_duration if ends_title else self.candidates.start_ticks(span.end_frame)
            start_s = self._seconds(self.candidates.start_ticks(span.start_frame)) if span.start_frame else 0.0
            end_s = self._seconds(end_ticks)
            chosen = self.candidates.choose(span.end_frame, end_ticks, self.frames.per_shot)
            kept = [picture.jpeg(self.converter.rgb_HWC(one.picture), self.frames.jpeg_quality) for one in chosen]
            thumbnail = b""
            if self.frames.thumbnail_width:
                (middle,) = self.candidates.choose(span.end_frame, end_ticks, 1)
                thumbnail = picture.jpeg(self.converter.rgb_HWC(middle.picture), self.frames.thumbnail_quality, self.frames.thumbnail_width)
            self.shot_times.extend((start_s, end_s))
            self.exchange.shot(span, start_s, end_s, kept, thumbnail)
            if not ends_title:
                self.candidates.drop_before(span.end_frame)

    def _seconds(self, ticks: int) -> float:
        """Convert ticks to seconds on the title's time line."""
        return max(float((ticks - self.zero) * self.tick), 0.0)

    # -- sound and cues

    def _sound(self, frame: av.AudioFrame) -> None:
        if self.track is None:
            self.waiting_sound.append(frame)
            if len(self.waiting_sound) < MAX_SOUND_WAITING:
                return
            start_s = _start_of(self.waiting_sound) or Fraction(0)  # far apart, so the start of the picture no longer matters
            declared = self.video.start_time
            zero_s = declared * self.tick if declared is not None and declared * self.tick - start_s < MAX_SOUND_LEAD_S else start_s
            self.track = sound.SoundTrack(zero_s, self.media.max_hours, self.sample_rate)
            waiting, self.waiting_sound = self.waiting_sound, []
            for one in waiting:
                self._sound(one)
            return
        for samples_N in self.track.add(frame):
            self.exchange.sound(samples_N)

    # -- the end

    def _finish(self) -> dict[str, Any]:
        self.decoder.read_log()
        if not self.frame_count:
            raise TitleError(f"{self.name}: no picture could be decoded ({self.damage.summary()})")
        if self.first_pts is None:  # no picture has a time stamp
            self.first_pts = 0
            self._start()
        if self.block:
            self._hand_over_block()
        self.decoder.read_log()
        if self.decoder.card is not None:
            self.decoder.card.check_end()
        self.exchange.no_more_pictures()
        self.unanswered.append(0)
        while self.unanswered:
            self._settle(last=True)
        if self.track is not None:
            for samples_N in self.track.finish():
                self.exchange.sound(samples_N)
            if self.track.unusable:
                self.warnings.append(f"{self.track.unusable} frames of sound in a form that cannot be converted; silence in their place")
            if self.track.jumps:
                self.warnings.append(f"{self.track.jumps} time stamps of the sound that jump back or beyond the limit; counted on")
        duration_s = self.shot_times[-1]
        damage = self._verdict()
        if self.embedded is not None:
            self.cues = self.embedded.on_time_line((self.first_pts + self.zero) * self.tick)
        shots = list(zip(self.shot_times[::2], self.shot_times[1::2], strict=True))
        texts = timed_text.text_of_shots(self.cues, shots, self.warnings)
        return {
            "texts": [text for text, _ in texts],
            "languages": [language for _, language in texts],
            "duration_s": duration_s,
            "frame_count": self.frame_count,
            "has_sound": self.track is not None and self.track.started,
            "warnings": self.warnings,
            "facts": self._facts(duration_s, damage),
        }

    def _verdict(self) -> float:
        """Return the share of the picture that is lost or damaged, and add warnings. Raises TitleError beyond ``max_damage``."""
        missing = self._missing_end_ticks()
        ticks = Fraction(1, self.sample_rate) / self.tick  # of a sample
        silences = [
            (self.zero + round(start * ticks), self.zero + round(end * ticks))
            for start, end in (self.track.silences if self.track is not None else ())
        ]
        broadcast = self.container.format.name in BROADCAST_FORMATS
        share = self.damage.share(self.frame_count, missing, self.last_ticks + self.last_duration, broadcast, silences)
        self.decoder.check_card()
        if share > self.media.max_damage:
            declared_s = self._declared_s()
            raise TitleError(
                f"{self.name} is too damaged: {share:.0%} of its pictures are missing or damaged, media.max_damage allows "
                f"{self.media.max_damage:.0%} ({self.damage.summary()}; {self._seconds(self.last_ticks + self.last_duration):.1f} s decoded"
                + (f" of {declared_s:.1f} s declared)" if declared_s else ")")
            )
        self.warnings += self.damage.in_words()
        if share:
            self.warnings.append(f"{share:.2%} of the pictures are missing or damaged")
        if len(self.sizes) > 1:
            self.warnings.append(f"the size of the picture changes: {', '.join(self.sizes)}")
        return share

    def _declared_s(self) -> float | None:
        """Return the declared duration of the video, else of the whole container, else None."""
        if self.video.duration:
            return float(self.video.duration * self.tick)
        tag = self.video.metadata.get("DURATION", "")  # Matroska writes 00:01:02.345000000 in its statistics
        parts = tag.strip("\0 ").split(":")
        if len(parts) == 3 and all(part.replace(".", "", 1).isdigit() for part in parts):
            return int(parts[0]) * 3600 + int(parts[1]) * 60 + float(parts[2])
        return self.container.duration / av.time_base if self.container.duration else None

    def _missing_end_ticks(self) -> int:
        """Return the time between the last picture and the declared end, or 0 where the declaration cannot be right."""
        if self.container.format.name == "avi":  # FFmpeg corrects the duration but not the count
            # A tick is a picture. Null frames, which captures write for dropped pictures, take a tick and have no packet.
            missing = self.video.frames - max(self.decoder.packet_count, self.decoder.last_dts + 1)
            if missing > 0 and self.cut_off is False and not self.damage.troubles:
                self.warnings.append(f"the last {missing} of the {self.video.frames} declared pictures are null frames")
                return 0
            if missing > 0:
                self.damage.note(f"{missing} of the {self.video.frames} declared pictures are missing")
                return missing * self.period
        declared_s = self._declared_s()
        if declared_s is None:
            return 0
        end_s = float((self.last_ticks + self.last_duration) * self.tick)
        if self.video.duration and self.video.start_time is not None and self.first_pts is not None:
            end_s += float((self.first_pts - self.video.start_time) * self.tick)  # both are relative to the declared start
        elif self.track is not None:  # the container's duration includes the sound
            end_s = max(end_s, self.track.written / self.sample_rate)
        missing_s = declared_s - end_s
        if self.cut_off and missing_s > 0:
            self.damage.note("the file is cut off")
        elif missing_s <= MISSING_END_S:
            return 0
        complete = self.cut_off is False or 0 < self.video.frames <= self.decoder.packet_count
        if complete or declared_s > self.media.max_hours * 3600:
            self.warnings.append(
                f"the container declares {declared_s:.1f} s, the pictures end at {end_s:.1f} s although the file is complete"
            )
            return 0
        self.damage.note(f"{missing_s:.1f} s are missing at the end")
        if self.video.frames:
            return min(round(missing_s / self.tick), (self.video.frames - self.decoder.packet_count) * self.period)
        return round(missing_s / self.tick)

    def _facts(self, duration_s: float, damage: float) -> dict[str, Any]:
        video, audio = self.video.codec_context, self.decoder.audio.codec_context if self.decoder.audio is not None else None
        return {
            "container": self.container.format.name,
            "bytes": self.container.size,
            "video_codec": video.name,
            "video_profile": video.profile,
            "pixel_format": video.pix_fmt,
            "width": video.width,
            "height": video.height,
            "pixel_aspect": str(self.decoder.pixel_aspect),
            "rotation": 90 * self.converter.turn.quarters,  # degrees counter-clockwise
            "average_rate": str(self.video.average_rate) if self.video.average_rate else None,
            "time_base": str(self.tick),
            "first_pts": self.first_pts,
            "declared_duration_s": self._declared_s(),
            "duration_s": duration_s,
            "audio_codec": audio.name if audio is not None else None,
            "audio_rate": audio.sample_rate if audio is not None else None,
            "audio_layout": audio.layout.name if audio is not None else None,
            "sound_gaps": len(self.track.silences) if self.track is not None else 0,
            "text_stream": self.embedded.stream.index if self.embedded is not None else None,
            "damage": round(damage, 6),
        } | ({"decoder": self.decoder.card.name} if self.decoder.card is not None else {})


def _start_of(frames: Sequence[av.AudioFrame]) -> Fraction | None:
    for frame in frames:
        if frame.pts is not None and frame.time_base is not None:
            return Fraction(frame.pts * frame.time_base)
    return None
