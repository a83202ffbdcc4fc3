"""Choice of a container's video, audio and subtitle streams."""

from __future__ import annotations

import av
from av.stream import Disposition

from mediafm_ray.errors import TitleError
from mediafm_ray.media import timed_text
from mediafm_ray.media.options import TimedTextConfig

NOT_PICTURE = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
NOT_PROGRAMME = Disposition.comment | Disposition.visual_impaired | Disposition.descriptions | Disposition.karaoke


def choose_video(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """Return the stream marked as default, else the one with the largest picture, else the first; never an attached picture.

    Raises TitleError when there is no such stream or none that can be decoded.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & NOT_PICTURE]
    if not streams:
        if container.streams.video:
            raise TitleError(f"{name} has no video: its only picture is cover art")
        raise TitleError(f"{name} has no video stream" + (", only audio" if container.streams.audio else ""))
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise TitleError(f"{name}: its video is in a codec that cannot be decoded here")
    return max(decodable, key=lambda stream: (bool(stream.disposition & Disposition.default), stream.width * stream.height))


def choose_audio(container: av.container.InputContainer) -> av.AudioStream | None:
    """Return the default stream, else the first, preferring those that are not commentary or audio description; None without audio."""
    streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
    if not streams:
        return None
    return max(streams, key=lambda stream: (not stream.disposition & NOT_PROGRAMME, bool(stream.disposition & Disposition.default)))


def choose_text(container: av.container.InputContainer, config: TimedTextConfig) -> av.subtitles.stream.SubtitleStream | None:
    """Return the text subtitle stream (not pictures of text) that fits the configuration best; None where there is none."""
    ranked = []
    for stream in container.streams.subtitles:
        if stream.codec_context is not None and stream.codec_context.name in timed_text.TEXT_CODECS:
            place = timed_text.rank(language_of(stream), kind_of(stream), config)
            if place is not None:
                ranked.append((place, not stream.disposition & Disposition.default, stream.index, stream))
    return min(ranked)[3] if ranked else None


def language_of(stream: av.stream.Stream) -> str:
    """Return the stream's language as a BCP 47 tag where the container's code is known, else unchanged; empty when unknown."""
    language = (stream.metadata.get("language") or "").lower()
    return "" if language in ("und", "mis", "mul", "zxx") else timed_text.TWO_LETTERS.get(language, language)


def kind_of(stream: av.stream.Stream) -> str:
    """Return the kind of text by the stream's disposition: forced, descriptions, commentary, captions, or subtitles."""
    disposition = stream.disposition
    if disposition & Disposition.forced:
        return "forced"
    if disposition & (Disposition.descriptions | Disposition.visual_impaired):
        return "descriptions"
    if disposition & (Disposition.comment | Disposition.lyrics | Disposition.karaoke):
        return "commentary"
    if disposition & (Disposition.hearing_impaired | Disposition.captions):
        return "captions"
    return "subtitles"
