"""The cues of a title: those of the sidecar that fits best, or those of a subtitle stream of its container."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av

from mediafm_ray.errors import TitleError
from mediafm_ray.media import source, streams, timed_text
from mediafm_ray.media.options import MediaConfig, TimedTextConfig
from mediafm_ray.spec import Cue, Title

SIGN_OF_LIFE_S = 2.0  # Seconds between two reports of slow work.


class SignsOfLife:
    """A callable for slow work that hands nothing over: it reports progress at most once in SIGN_OF_LIFE_S."""

    def __init__(self, report: Callable[[], None]):
        self.report, self.last = report, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self.last > SIGN_OF_LIFE_S:
            self.last = time.monotonic()
            self.report()


def read_sidecars(title: Title, config: TimedTextConfig, media: MediaConfig, alive: Callable[[], None]) -> tuple[list[Cue], list[str]]:
    """Return the cues of the first sidecar, in order of fit, that can be read and has any, and warnings for people."""
    warnings: list[str] = []
    for one in timed_text.by_fit(title.timed_text, config):
        name = source.file_name(one.uri)
        try:
            data = source.read_whole(one.uri, media, timed_text.MAX_BYTES)
            cues, remarks = timed_text.parse(data, name, config, one.language, one.kind, alive)
        except TitleError as error:
            warnings.append(f"no text from {name}: {error}")
            continue
        warnings += remarks
        if cues:
            return cues, warnings
    return [], warnings


class EmbeddedCues:
    """Collects the cues of one subtitle stream, whose times count on the container's clock."""

    def __init__(self, stream: av.subtitles.stream.SubtitleStream, config: TimedTextConfig):
        self.stream, self.config = stream, config
        self.found: list[tuple[Fraction, Fraction, str]] = []  # start, end, text

    def add(self, packet: Any) -> None:
        """Decode a packet of the stream. Raises FFmpegError where that fails."""
        if not packet.size or packet.pts is None or len(self.found) >= timed_text.MAX_CUES:
            return
        start_s = packet.pts * packet.time_base
        end_s = start_s + (packet.duration or 0) * packet.time_base
        lines = [line.dialogue.decode(errors="replace") for line in packet.stream.decode(packet)]
        self.found.append((start_s, end_s, "\n".join(lines)))

    def on_time_line(self, zero_s: Fraction) -> list[Cue]:
        """Return the cues in order, with ``zero_s`` of the container's clock as zero; a cue without an end lasts until the next."""
        language, kind = streams.language_of(self.stream), streams.kind_of(self.stream)
        cues = []
        for position, (start_s, end_s, text) in enumerate(self.found):
            if end_s <= start_s:
                end_s = start_s + Fraction(timed_text.OPEN_END_S)
                if position + 1 < len(self.found):
                    end_s = min(end_s, self.found[position + 1][0])
            words = timed_text.plain(text.replace("\\N", "\n").replace("\\h", " "), self.config)
            if words and end_s > zero_s:
                cues.append(Cue(max(float(start_s - zero_s), 0.0), float(end_s - zero_s), words, language, kind))
        return sorted(cues, key=lambda cue: (cue.start_s, cue.end_s))
