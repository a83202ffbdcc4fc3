"""Timed text to plain cues, and cues to the text of shots.

SubRip and WebVTT are read here: what the world calls so is looser than libraries accept (times without milliseconds, missing
headers, notes and styles between cues, a last cue cut off). TTML, IMSC, DFXP and SCC are read by ttconv, the rest (SubStation,
SAMI, MicroDVD, ...) by pysubs2.

What becomes of markup, by rule:
    tags, override codes, WebVTT classes and karaoke times   dropped; entities become characters
    voices: <v Name>, NAME: in capitals, >> and leading -    dropped, unless ``speakers``: voice and NAME: become "Name: "
    sounds: [door slams], (music), notes around lyrics       kept, or dropped with ``sound_cues: false``
    lines                                                    joined by a space
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any
from xml.etree import ElementTree

import pysubs2

from mediafm_ray.media.options import TimedTextConfig
from mediafm_ray.spec import Cue, TimedTextSource, TitleError

MAX_BYTES = 32 << 20  # of one timed text object; a feature film has 0.1 MB
MIN_OVERLAP_S = 0.25  # a shot that shows less of a cue than this, and less than half of it, does not get its text
OPEN_END_S = 10.0  # how long a cue lasts whose format does not say when it ends, at most
FALLBACK_ENCODING = "cp1252"  # the most common legacy encoding; a superset of the printable part of ISO 8859-1

TEXT_CODECS = ("subrip", "srt", "ass", "ssa", "mov_text", "webvtt", "text")  # subtitle streams that are text, not pictures

# ISO 639-2 codes that containers use, to the two-letter ones of BCP 47
TWO_LETTERS = {
    three: two
    for two, threes in {
        **{"ar": "ara", "bg": "bul", "ca": "cat", "cs": "ces cze", "da": "dan", "de": "deu ger", "el": "ell gre", "en": "eng"},
        **{"es": "spa", "et": "est", "eu": "eus baq", "fi": "fin", "fr": "fra fre", "ga": "gle", "he": "heb", "hi": "hin"},
        **{"hr": "hrv", "hu": "hun", "id": "ind", "is": "isl ice", "it": "ita", "ja": "jpn", "ko": "kor", "lt": "lit", "lv": "lav"},
        **{"ms": "msa may", "nb": "nob", "nl": "nld dut", "no": "nor", "pl": "pol", "pt": "por", "ro": "ron rum", "ru": "rus"},
        **{"sk": "slk slo", "sl": "slv", "sr": "srp", "sv": "swe", "ta": "tam", "te": "tel", "th": "tha", "tr": "tur", "uk": "ukr"},
        **{"ur": "urd", "vi": "vie", "zh": "zho chi"},
    }.items()
    for three in threes.split()
}


# ------------------------------------------------------------------------------------------------- bytes to characters


def decode(data: bytes) -> tuple[str, str | None]:
    """Bytes to text, and a remark where the encoding had to be guessed.

    A byte order mark decides (UTF-8, UTF-16); else UTF-16 where every other byte of the beginning is zero; else UTF-8 where
    valid; else Windows-1252, whose few undefined bytes become U+FFFD.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        return data.decode("utf-8-sig", errors="replace"), None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace"), None
    head = data[:4096]
    for encoding, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
        if len(zeros) > 1 and zeros.count(0) > 0.5 * len(zeros):
            return data.decode(encoding, errors="replace"), "has no byte order mark; read as UTF-16"
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError:
        return data.decode(FALLBACK_ENCODING, errors="replace"), "is not UTF-8; read as Windows-1252"


# --------------------------------------------------------------------------------------------------- characters to cues

RawCue = tuple[float, float, str]  # start_s, end_s, text with its markup


def parse(data: bytes, name: str, config: TimedTextConfig, language: str = "", kind: str = "") -> tuple[list[Cue], list[str]]:
    """The cues of one timed text object, in order of time, and warnings in plain words.

    The format is told by the content; the ending of ``name`` is only a hint. Raises TitleError when it is no timed text.
    """
    warnings: list[str] = []
    text, remark = decode(data)
    if remark:
        warnings.append(f"timed text {name} {remark}")
    text = text.replace("\0", " ").replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    if not text.strip():
        warnings.append(f"timed text {name} is empty")
        return [], warnings
    try:
        raw_cues = list(_reader_for(text, name)(text))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ElementTree.ParseError, pysubs2.exceptions.Pysubs2Error) as error:
        raise TitleError(f"timed text {name} cannot be read: {error.__class__.__name__}: {error}") from error
    cues, backwards = [], 0
    for start_s, end_s, marked in raw_cues:
        if not end_s > start_s >= 0:
            backwards += 1
            continue
        words = plain(marked, config)
        if words:
            cues.append(Cue(start_s, end_s, words, language, kind))
    if backwards:
        warnings.append(f"timed text {name}: {backwards} cues that end before they start were left out")
    if not raw_cues:
        warnings.append(f"timed text {name} has no cues")
    return sorted(cues, key=lambda cue: (cue.start_s, cue.end_s)), warnings


def _reader_for(text: str, name: str) -> Callable[[str], Iterator[RawCue]]:
    head = text[:4096].lstrip()
    if head.startswith("WEBVTT"):
        return _webvtt
    if head.startswith("Scenarist_SCC"):
        return _scc
    if re.match(r"<\?xml|<(\w+:)?tt[\s>]", head):
        return _ttml
    if "[Script Info]" in head or re.match(r"\{\d+\}\{\d+\}|<SAMI", head, re.IGNORECASE):
        return _by_pysubs2
    if "-->" in text:
        return _webvtt if name.lower().endswith(".vtt") else _subrip
    return _by_pysubs2


_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?"
_TIMING = re.compile(rf"^\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?$")
_HALF_A_CUE = re.compile(r"^\s*\d+\s*$")  # the number of a cue whose timing line is missing or cut off


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int((fraction or "0").ljust(3, "0")) / 1000


def _webvtt(text: str) -> Iterator[RawCue]:
    """Blocks between blank lines; a block with a timing line is a cue, all others are headers, notes, styles, regions."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").split("\n")
        for position, line in enumerate(lines[:2]):  # a cue's identifier may stand before the timing
            if match := _TIMING.match(line):
                parts = match.groups()
                yield _seconds(*parts[:4]), _seconds(*parts[4:]), "\n".join(lines[position + 1 :])
                break


def _subrip(text: str) -> Iterator[RawCue]:
    """As WebVTT, but a block without timing belongs to the cue before it, whose text has a blank line inside."""
    open_cue: RawCue | None = None
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").split("\n")
        timing = next((position for position, line in enumerate(lines) if _TIMING.match(line)), None)
        if timing is None:
            if open_cue and not _HALF_A_CUE.match(lines[0]):
                open_cue = (*open_cue[:2], f"{open_cue[2]}\n{block}")
            continue
        while timing is not None:  # cues that follow each other without a blank line between them
            if open_cue:
                yield open_cue
            match = _TIMING.match(lines[timing])
            assert match is not None
            parts = match.groups()
            lines = lines[timing + 1 :]
            timing = next((position for position, line in enumerate(lines) if _TIMING.match(line)), None)
            own = lines if timing is None else lines[: timing - 1] if timing and _HALF_A_CUE.match(lines[timing - 1]) else lines[:timing]
            open_cue = _seconds(*parts[:4]), _seconds(*parts[4:]), "\n".join(own)
    if open_cue:
        yield open_cue


def _by_pysubs2(text: str) -> Iterator[RawCue]:
    for event in pysubs2.SSAFile.from_string(text, format_="ass" if "[Script Info]" in text[:4096] else None):
        if not event.is_comment:
            yield event.start / 1000, event.end / 1000, event.text.replace("\\N", "\n").replace("\\n", "\n").replace("\\h", " ")


def _ttml(text: str) -> Iterator[RawCue]:
    from ttconv.imsc import reader  # its parsers take 0.3 s to import

    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it declares XML entities, which timed text has no need of")
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)  # its encoding has done its work
    text = re.sub(r"http://www\.w3\.org/20\d\d/\d\d/ttaf1", "http://www.w3.org/ns/ttml", text)  # the drafts that DFXP files name
    document = reader.to_model(ElementTree.ElementTree(ElementTree.fromstring(text)))
    if document is None:
        raise ValueError("its root is no TTML document")
    yield from _changes(document)


def _scc(text: str) -> Iterator[RawCue]:
    from ttconv.scc import reader

    yield from _changes(reader.to_model(text))


def _changes(document: Any) -> Iterator[RawCue]:
    """The text on screen between the moments when it changes; equal neighbours are joined."""
    from ttconv import model
    from ttconv.isd import ISD

    def words(element: Any) -> str:
        if isinstance(element, model.Text):
            return str(element.get_text())
        if isinstance(element, model.Br):
            return "\n"
        text = "".join(words(child) for child in element)
        return f"{text}\n" if isinstance(element, model.P) else text

    last: tuple[Fraction, str] | None = None
    for begin, screen in ISD.generate_isd_sequence(document):
        text = "".join(words(body) for region in screen.iter_regions() for body in region).strip()
        if last and text == last[1]:
            continue
        if last and last[1]:
            yield float(last[0]), float(begin), last[1]
        last = (begin, text)
    if last and last[1]:
        yield float(last[0]), float(last[0]) + OPEN_END_S, last[1]


# ----------------------------------------------------------------------------------------------------- markup to words

_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<\d[\d:.]*>|\{\\[^{}]*\}")
_VOICE = re.compile(r"<v[.\w]*\s+([^<>]*)>")
_SPEAKER = re.compile(r"^\s*(?:>>+\s*|[-\u2013]\s*)?(?:([A-Z][A-Z0-9 .'#&-]{1,30}):(?=\s)\s*)?")
_SOUND = re.compile(r"\[[^\[\]]*\]|\([^()]*\)|[\u266a\u266b#]+[^\u266a\u266b#]*[\u266a\u266b#]+|[\u266a\u266b]")


def plain(text: str, config: TimedTextConfig) -> str:
    """Words without markup, by the rules at the top of this module."""
    lines = []
    for line in text.split("\n"):
        voices = _VOICE.findall(line) if config.speakers else []
        line = html.unescape(_TAG.sub("", line)).replace("\u200b", "")
        if not config.sound_cues:
            line = _SOUND.sub(" ", line)
        speaker = _SPEAKER.match(line)
        assert speaker is not None  # every part of the pattern is optional
        line = line[speaker.end() :]
        if config.speakers and (voices or speaker.group(1)):
            line = f"{(voices[0] if voices else speaker.group(1).title()).strip()}: {line}"
        lines.append(line)
    return " ".join(" ".join(lines).split())


# ------------------------------------------------------------------------------------------------ which text, and whose


def same_language(one: str, other: str) -> bool:
    """Whether two language tags (BCP 47 or ISO 639-2) mean the same language, whatever the region."""
    first, second = (tag.lower().replace("_", "-").split("-")[0] for tag in (one, other))
    return TWO_LETTERS.get(first, first) == TWO_LETTERS.get(second, second)


def rank(language: str, kind: str, config: TimedTextConfig) -> tuple[int, int] | None:
    """How well timed text fits the configuration, smaller is better; None where it must not be used.

    The order of ``languages`` comes first, then that of ``kinds``; text of unknown language is used after all wanted ones.
    """
    if kind not in config.kinds:
        return None
    if not config.languages:
        return 0, config.kinds.index(kind)
    for position, wanted in enumerate(config.languages):
        if language and same_language(language, wanted):
            return position, config.kinds.index(kind)
    return None if language else (len(config.languages), config.kinds.index(kind))


def by_fit(sources: Sequence[TimedTextSource], config: TimedTextConfig) -> list[TimedTextSource]:
    """The sources that may be used, best first; of equals, in the order given."""
    ranked = [(rank(source.language, source.kind, config), source) for source in sources]
    return [source for place, source in sorted(((place, source) for place, source in ranked if place is not None), key=lambda one: one[0])]


def text_of_shots(cues: Sequence[Cue], shots: Sequence[tuple[float, float]]) -> list[tuple[str, str]]:
    """Text and language of each shot ``[start_s, end_s)``; shots and cues in order of time.

    A cue that spans a cut goes, whole, to every shot that shows at least ``MIN_OVERLAP_S`` of it or half of it, and
    always to the shot that shows most of it (the earlier of two equal ones). A cue that repeats the one before it in the
    same shot (rolling captions) adds nothing.
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
            if (overlap >= enough or index == most) and texts[index][-1:] != [cue.text]:
                texts[index].append(cue.text)
                languages[index] = languages[index] or cue.language
    return [(" ".join(parts), language) for parts, language in zip(texts, languages, strict=True)]
