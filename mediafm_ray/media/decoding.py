"""Container to frames: demuxing and decoding on the CPU or a card, with a note of every fault that demuxer and decoders report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import av

from mediafm_ray.errors import CardError, TitleError
from mediafm_ray.media import card, picture, streams
from mediafm_ray.media.damage import TROUBLE_REACH_PICTURES, TROUBLE_REACH_S, Damage, DecoderLog
from mediafm_ray.media.options import MediaConfig


class TitleDecoder:
    """Decodes the video, the sound and the subtitles of one container. Faults go to ``damage``, remarks for people to ``warnings``."""

    def __init__(
        self,
        container: av.container.InputContainer,
        name: str,
        media: MediaConfig,
        damage: Damage,
        warnings: list[str],
        log: DecoderLog | None,
        size: int,
        place: Callable[[Any], None],
    ):
        """``size`` is the shorter side of a kept frame; ``place`` is called with each video packet before it is decoded."""
        self.container, self.name, self.media = container, name, media
        self.damage, self.warnings, self.log, self.place = damage, warnings, log, place
        self.video = streams.choose_video(container, name)
        self.audio = streams.choose_audio(container)
        self.text: Any = None
        self.tick = Fraction(self.video.time_base or Fraction(1, 1000))
        rate = self.video.guessed_rate or self.video.average_rate or Fraction(25)
        self.period = max(round(1 / rate / self.tick), 1)  # ticks of a usual frame
        damage.reach_ticks = round(TROUBLE_REACH_S / self.tick)
        damage.decoder_reach_ticks = (TROUBLE_REACH_PICTURES + (media.threads or os.cpu_count() or 1) - 1) * self.period
        self.pixel_aspect = Fraction(self.video.sample_aspect_ratio or 1) or Fraction(1)
        self.converter = picture.FrameConverter(size, self.pixel_aspect)
        self.card: card.CardDecoder | None = None
        self.for_card: list[Any] | None = None  # the first packets, while a card may still take the title
        self.packet_count = 0  # video packets
        self.last_dts = -1  # largest decoding time of the video packets

    @property
    def without_pts(self) -> bool:
        """True where the container stores no times of presentation.

        AVI stores the order of decoding only, and the pts that are derived from it are wrong where there are B-frames; FFmpeg
        returns decoding times in the order of presentation, and they are even.
        """
        return bool(self.container.format.name == "avi")

    def packets(self, text: Any, not_on_card: str) -> Iterator[Any]:
        """Yield the packets of the chosen streams in file order, then an empty one for each decoder to flush.

        ``text`` is the subtitle stream to read, if any; ``not_on_card`` is the reason why no card may decode the title, if any.
        """
        self.text = text
        self.video.thread_type = "AUTO"
        self.video.codec_context.thread_count = self.media.threads
        if self.log is not None:
            self.log.video_codec, self.log.video_index = self.video.codec_context.name.encode(), self.video.index
            others = [other.codec_context.name for other in (self.audio, text) if other is not None]
            self.log.other_codecs = tuple(name.encode() for name in (*others, *card.LOGGED_AS))
        if self.audio is not None:
            self.audio.codec_context.thread_count = 1
        wanted = [stream for stream in (self.video, self.audio, text) if stream is not None]
        for stream in self.container.streams:
            if stream not in wanted:
                stream.discard = av.stream.Discard.all
        self._consider_card(not_on_card)
        packets = self.container.demux(wanted)
        while True:
            try:
                packet = next(packets)
            except StopIteration:  # after the packets that flush the decoders
                return
            except av.error.MemoryError:
                raise
            except av.error.FFmpegError as error:
                self.damage.note(f"the container breaks off ({error.strerror})")
                break
            except IndexError:  # PyAV raises it at the end of a file in which streams appeared that its header does not name
                self.warnings.append("streams appear in mid-file that the header does not name; they were not read")
                break
            if packet.stream is self.video:
                self.place(packet)
                self.packet_count += bool(packet.size)
                if packet.dts is not None:
                    self.last_dts = max(self.last_dts, packet.dts)
            if packet.is_corrupt:
                (self.damage.see if packet.stream is self.video else self.damage.remark)(f"corrupt {packet.stream.type} packets")
            yield packet
        for stream in wanted:
            if stream is not text:
                flush = av.Packet()
                flush.stream = stream
                yield flush

    def sounds(self, packet: Any) -> list[Any]:
        """Return the frames of sound that a packet completes."""
        return self._decoded(packet)

    def pictures(self, packet: Any) -> list[Any]:
        """Return the pictures that a packet completes. The CPU decodes the first one; a card then starts from the same packets.

        Raises TitleError where the video cannot be decoded at all, CardError where a card that has begun cannot go on.
        """
        if self.card is not None:
            self.check_card()
            return self.card.decode(packet)
        frames = self._decoded(packet)
        if self.for_card is None:
            return frames
        self.for_card.append(packet)
        if not frames and packet.size and len(self.for_card) < card.MAX_FIRST_PACKETS:
            return []
        packets, self.for_card = self.for_card, None
        try:
            return self._hand_to_card(packets, frames)
        except CardError as error:
            self._leave_to_cpu(str(error))
            return frames

    def read_log(self) -> None:
        """Count what FFmpeg has written about errors of the picture. Raises MemoryError where it had not enough memory."""
        if self.log is None or not self.log.grown():
            return
        concealed, of_video, errors = self.log.news()
        self.damage.concealed_frames += concealed
        self.damage.complaints += bool(of_video)
        if errors or concealed:
            self.damage.trouble(of_decoder=errors == of_video)
        if self.log.out_of_memory:
            raise MemoryError

    def _decoded(self, packet: Any) -> list[Any]:
        try:
            return packet.stream.decode(packet if packet.size else None)
        except av.error.MemoryError:
            raise
        except av.error.EOFError:  # flushed before
            return []
        except av.error.DecoderNotFoundError:
            raise TitleError(f"{self.name}: there is no decoder for its {packet.stream.type}") from None
        except av.error.FFmpegError:
            if packet.stream is self.video:
                if packet.has_sidedata("encryption_info"):
                    raise TitleError(f"{self.name} is encrypted; there is no key") from None
                self.damage.see("video packets that could not be decoded", of_decoder=True)
                self.damage.lost_frames += bool(packet.size)
            else:
                self.damage.remark("audio packets that could not be decoded")
        return []

    # -- the card

    def _consider_card(self, not_on_card: str) -> None:
        """Decide whether a card tries the title; a title that it certainly cannot decode is left to the CPU."""
        if self.media.decoder == "cpu" or (self.media.decoder == "auto" and not card.is_visible()):
            return
        codec = card.codec_of(self.video)
        if not_on_card:
            self._leave_to_cpu(not_on_card)
        elif codec in card.DECODERS:
            self.for_card = []
        elif self.media.decoder == "cuda":
            self._leave_to_cpu(f"cards have no decoder for {codec}")

    def _hand_to_card(self, packets: Sequence[Any], frames: Sequence[av.VideoFrame]) -> list[Any]:
        """Return the card's pictures of the first packets. Raises CardError."""
        self.read_log()
        if self.without_pts:
            raise CardError("the container stores no times of its pictures")
        if not frames or self.damage.troubles:
            raise CardError("its first picture is missing or damaged")
        if frames[0].width * frames[0].height > self.media.max_pixels:
            raise CardError("its pictures are too large")
        taken = card.CardDecoder(self.video, packets, frames[0], self.pixel_aspect, self.converter.size)
        self.converter.expect(frames[0], taken.kept)
        self.card = taken
        return taken.frames

    def check_card(self) -> None:
        """Raise CardError where anything is wrong with a title on a card, which reports less than the CPU about what is damaged."""
        if self.card is not None and self.damage.troubles:
            raise CardError(f"the file is damaged ({self.damage.summary()})")

    def _leave_to_cpu(self, reason: str) -> None:
        self.warnings.append(f"decoded on the CPU, not by media.decoder={self.media.decoder}: {reason}")
