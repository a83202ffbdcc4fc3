"""Timed text to plain cues, and cues to the text of shots."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import pysubs2

from mediafm_ray.media.options import TimedTextConfig
from mediafm_ray.spec import Cue, TimedTextSource, TitleError

MAX_BYTES = 32 << 20  # of one timed text object
MIN_OVERLAP_S = 0.25  # a shot that shows less of a cue than this, and less than half of it, does not get its text

FALLBACK_ENCODING = "cp1252"  # the most common legacy encoding; superset of the printable part of ISO 8859-1


def decode(data: bytes) -> tuple[str, str | None]:
    """Bytes to text, and a remark where the encoding had to be guessed.

    A byte order mark decides (UTF-8, UTF-16); else UTF-8 where valid; else UTF-16 where every other byte is zero; else
    Windows-1252, whose undefined bytes become U+FFFD.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        return data.decode("utf-8-sig", errors="replace"), None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace"), None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode(FALLBACK_ENCODING, errors="replace"), "not UTF-8; read as Windows-1252"
    if "\0" in text:
        for encoding, offset in (("utf-16-le", 1), ("utf-16-be", 0)):
            if data[offset::2].count(0) > 0.7 * len(data[offset::2]):
                return data.decode(encoding, errors="replace"), "UTF-16 without a byte order mark"
        return text.replace("\0", " "), "contains null characters"
    return text, None


def parse(data: bytes, name: str, language: str = "", kind: str = "") -> tuple[list[Cue], list[str]]:
    """The cues of one timed text object, in order of time, and warnings in plain words.

    Raises TitleError when no cue can be read from it.
    """
    warnings: list[str] = []
    text, remark = decode(data)
    if remark:
        warnings.append(f"timed text {name}: {remark}")
    suffix = name.rsplit(".", 1)[-1].lower()
    try:
        subtitles = pysubs2.SSAFile.from_string(text, format_={"vtt": "vtt", "srt": "srt"}.get(suffix))
    except (pysubs2.exceptions.Pysubs2Error, ValueError) as error:
        raise TitleError(f"timed text {name} cannot be read: {error}") from error
    cues = []
    for event in subtitles:
        words = plain(event.plaintext)
        if words and event.end > event.start >= 0:
            cues.append(Cue(event.start / 1000, event.end / 1000, words, language, kind))
        elif words:
            warnings.append(f"timed text {name}: a cue that ends before it starts was left out")
    return sorted(cues, key=lambda cue: (cue.start_s, cue.end_s)), warnings


_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<\d[\d:.]*>|\{\\[^{}]*\}")


def plain(text: str) -> str:
    """Text without markup, entities resolved, white space joined."""
    return " ".join(html.unescape(_TAG.sub("", text)).split())


def text_of_shots(cues: Sequence[Cue], shots: Sequence[tuple[float, float]]) -> list[tuple[str, str]]:
    """Text and language of each shot ``[start_s, end_s)``; shots and cues in order of time.

    A cue that spans a cut goes, whole, to every shot that shows at least ``MIN_OVERLAP_S`` of it or half of it, and
    always to the shot that shows most of it (the earlier of two equal ones).
    """
    texts: list[list[str]] = [[] for _ in shots]
    languages = [""] * len(shots)
    first = 0
    for cue in cues:
        while first < len(shots) and shots[first][1] <= cue.start_s:
            first += 1
        overlaps = []
        for index in range(first, len(shots)):
            start_s, end_s = shots[index]
            if start_s >= cue.end_s:
                break
            overlaps.append((min(end_s, cue.end_s) - max(start_s, cue.start_s), index))
        if not overlaps:
            continue
        enough = min(MIN_OVERLAP_S, (cue.end_s - cue.start_s) / 2)
        most = max(overlaps, key=lambda overlap: (overlap[0], -overlap[1]))[1]
        for overlap, index in overlaps:
            if overlap >= enough or index == most:
                texts[index].append(cue.text)
                languages[index] = languages[index] or cue.language
    return [(" ".join(parts), language) for parts, language in zip(texts, languages, strict=True)]


def choose_sources(sources: Sequence[TimedTextSource], config: TimedTextConfig) -> list[TimedTextSource]:
    """The sources to use: those of the preferred language and, among them, of the preferred kind."""

    def rank(source: TimedTextSource) -> tuple[int, int] | None:
        if source.kind not in config.kinds:
            return None
        if not config.languages:
            return 0, config.kinds.index(source.kind)
        for position, language in enumerate(config.languages):
            if source.language.lower().split("-")[0] == language.lower().split("-")[0] or not source.language:
                return position, config.kinds.index(source.kind)
        return None

    ranked = [(rank(source), source) for source in sources]
    usable = [(place, source) for place, source in ranked if place is not None]
    if not usable:
        return []
    return [min(usable, key=lambda one: one[0])[1]]
