"""Timed text to plain cues, and cues to the text of shots.

SubRip and WebVTT are read here because real files are looser than libraries accept (times without milliseconds, missing
headers, notes and styles between cues, a last cue cut off). TTML, IMSC and DFXP are read in ``ttml``, SCC by ttconv, the rest
(SubStation, SAMI, MicroDVD, ...) by pysubs2.

Rules for markup:
    tags, override codes, WebVTT classes and karaoke times   dropped; entities become characters
    voices: <v Name>, NAME: in capitals, >> and leading -    dropped, unless ``speakers``: voice and NAME: become "Name: "
    sounds: [door slams], (music), notes around lyrics       kept, or dropped with ``sound_cues: false``
    lines                                                    joined by a space
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import pysubs2

from mediafm_ray.errors import TitleError
from mediafm_ray.media import ttml
from mediafm_ray.media.options import TimedTextConfig
from mediafm_ray.spec import Cue, TimedTextSource

MAX_BYTES = 32 << 20  # bytes of one timed text object; a feature film has 0.1 MB
MAX_CUES = 100_000  # cues of one timed text object or stream; a day has 86,400 seconds
MAX_SCC_CHARACTERS = 1 << 20
MAX_SHOT_CHARACTERS = 20_000  # text of one shot; encoders read less
MAX_TITLE_CHARACTERS = 8_000_000  # text of all shots together; a feature film has 0.1 million
MAX_OVERLAPS = 2_000_000  # pairs of a cue and a shot that are compared
MIN_OVERLAP_S = 0.25  # a shot that shows less of a cue than this, and less than half of it, does not get its text
MAX_REASON = 500  # characters of a message about text that cannot be read
OPEN_END_S = 10.0  # maximum duration of a cue whose format gives no end
FALLBACK_ENCODING = "cp1252"  # the most common legacy encoding; a superset of the printable part of ISO 8859-1

TEXT_CODECS = ("subrip", "srt", "ass", "ssa", "mov_text", "webvtt", "text")  # subtitle streams that are text, not pictures

# Containers use ISO 639-2 codes; BCP 47 has the two-letter ones.
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
    """Decode bytes; return the text, and a remark where the encoding had to be guessed.

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


def parse(
    data: bytes,
    name: str,
    config: TimedTextConfig,
    language: str = "",
    kind: str = "",
    alive: Callable[[], None] = lambda: None,
) -> tuple[list[Cue], list[str]]:
    """Return the cues of one timed text object in order of time, and warnings for people.

    The content decides the format; the ending of ``name`` is only a hint. ``alive`` is called often during the work.
    Raises TitleError when the object is not timed text.
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
        raw_cues = list(itertools.islice(_reader_for(text, name)(text, alive), MAX_CUES + 1))
    except Exception as error:  # on hostile text the libraries raise RecursionError, OverflowError and others
        raise TitleError(f"timed text {name} cannot be read: {error.__class__.__name__}: {error}"[:MAX_REASON]) from error
    if len(raw_cues) > MAX_CUES:
        raise TitleError(f"timed text {name} cannot be read: it has more than {MAX_CUES} cues")
    cues, backwards = [], 0
    for start_s, end_s, marked in raw_cues:
        alive()
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


def _reader_for(text: str, name: str) -> Callable[[str, Callable[[], None]], Iterator[RawCue]]:
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
_LONE_CUE_NUMBER = re.compile(r"^\s*\d+\s*$")  # the number of a cue whose timing line is missing or cut off


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str | None) -> float:
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int((fraction or "0").ljust(3, "0")) / 1000


def _webvtt(text: str, alive: Callable[[], None]) -> Iterator[RawCue]:
    """Yield the blocks between blank lines that have a timing line; all others are headers, notes, styles or regions."""
    for block in re.split(r"\n\s*\n", text):
        alive()
        lines = block.strip("\n").split("\n")
        for position, line in enumerate(lines[:2]):  # a cue's identifier may stand before the timing
            if match := _TIMING.match(line):
                parts = match.groups()
                yield _seconds(*parts[:4]), _seconds(*parts[4:]), "\n".join(lines[position + 1 :])
                break


def _subrip(text: str, alive: Callable[[], None]) -> Iterator[RawCue]:
    """Yield cues as ``_webvtt`` does, but add a block without timing to the cue before it, whose text has a blank line inside.

    Cues may also follow each other without a blank line between them.
    """
    times: tuple[float, float] | None = None  # start and end of the open cue
    own: list[str] = []  # lines of the open cue
    for block in re.split(r"\n\s*\n", text):
        alive()
        lines = block.strip("\n").split("\n")
        timings = [_TIMING.match(line) for line in lines]
        if not any(timings):
            if times and not _LONE_CUE_NUMBER.match(lines[0]):
                own += block.split("\n")
            continue
        in_block = False
        for match, line in zip(timings, lines, strict=True):
            if not match:
                if in_block:
                    own.append(line)
                continue
            if times:
                yield *times, "\n".join(own[:-1] if in_block and own and _LONE_CUE_NUMBER.match(own[-1]) else own)
            parts = match.groups()
            times, own, in_block = (_seconds(*parts[:4]), _seconds(*parts[4:])), [], True
    if times:
        yield *times, "\n".join(own)


def _by_pysubs2(text: str, alive: Callable[[], None]) -> Iterator[RawCue]:
    format_ = "ass" if "[Script Info]" in text[:4096] else pysubs2.formats.autodetect_format(text)
    if format_ == "json":
        raise ValueError("it is JSON, which is not a format of timed text")
    alive()
    for event in pysubs2.SSAFile.from_string(text, format_=format_):
        alive()
        if not event.is_comment:
            yield event.start / 1000, event.end / 1000, event.text.replace("\\N", "\n").replace("\\n", "\n").replace("\\h", " ")


def _ttml(text: str, alive: Callable[[], None]) -> Iterator[RawCue]:
    for start_s, end_s, words in ttml.read(text, alive):
        yield start_s, start_s + OPEN_END_S if end_s is None else end_s, words


def _scc(text: str, alive: Callable[[], None]) -> Iterator[RawCue]:
    from ttconv import model  # its parsers take 0.3 s to import
    from ttconv.scc import reader

    if len(text) > MAX_SCC_CHARACTERS:
        raise ValueError(f"it is longer than {MAX_SCC_CHARACTERS >> 20} MB, and captions of a title in SCC have 0.2 MB")
    document = reader.to_model(text)
    alive()
    places = {region: place for place, region in enumerate(document.iter_regions())}
    parts: list[ttml.Part] = []

    def collect(element: Any, begin: Fraction, end: Fraction | None, place: int) -> None:
        if element.get_end() is not None:
            end = min(begin + element.get_end(), begin + element.get_end() if end is None else end)
        begin += element.get_begin() or 0
        place = places.get(element.get_region(), place)
        words = element.get_text() if isinstance(element, model.Text) else "\n" if isinstance(element, (model.Br, model.P)) else ""
        for child in element:
            collect(child, begin, end, place)
        if words and (end is None or begin < end):
            parts.append((round(begin * ttml.MICROSECOND), ttml.NO_END if end is None else round(end * ttml.MICROSECOND), place, words))

    collect(document.get_body(), Fraction(0), None, 0)
    for start_s, end_s, words in ttml.screens(parts, alive):
        yield start_s, start_s + OPEN_END_S if end_s is None else end_s, words


# ----------------------------------------------------------------------------------------------------- markup to words

_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<\d[\d:.]*>|\{\\[^{}]*\}")
_VOICE = re.compile(r"<v[.\w]*\s([^<>]*)>")
_SPEAKER = re.compile(r"^\s*(?:>>+\s*|[-\u2013]\s*)?(?:([A-Z][A-Z0-9 .'#&-]{1,30}):(?=\s)\s*)?")
_OVERLONG_REFERENCE = re.compile(r"&#[xX]?[0-9a-fA-F]{20,};?")  # references that are too long to be converted
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")  # cannot be encoded as UTF-8
_SOUND = re.compile(r"\[[^\[\]]*\]|\([^()]*\)|[\u266a\u266b#]+[^\u266a\u266b#]*[\u266a\u266b#]+|[\u266a\u266b]")


def plain(text: str, config: TimedTextConfig) -> str:
    """Return the words without markup, by the rules at the top of this module."""
    lines = []
    for line in text.split("\n"):
        voices = _VOICE.findall(line) if config.speakers else []
        line = html.unescape(_OVERLONG_REFERENCE.sub("\ufffd", _TAG.sub("", line)))
        line = _LONE_SURROGATE.sub("\ufffd", line.replace("\u200b", ""))
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
    """Return whether two language tags (BCP 47 or ISO 639-2) mean the same language; regions are ignored."""
    first, second = (tag.lower().replace("_", "-").split("-")[0] for tag in (one, other))
    return TWO_LETTERS.get(first, first) == TWO_LETTERS.get(second, second)


def rank(language: str, kind: str, config: TimedTextConfig) -> tuple[int, int] | None:
    """Return a sort key of how well timed text fits the configuration, smaller is better; None where it must not be used.

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
    """Return the sources that may be used, best first; equal ones keep their order."""
    ranked = [(rank(source.language, source.kind, config), source) for source in sources]
    return [source for place, source in sorted(((place, source) for place, source in ranked if place is not None), key=lambda one: one[0])]


def text_of_shots(cues: Sequence[Cue], shots: Sequence[tuple[float, float]], warnings: list[str] | None = None) -> list[tuple[str, str]]:
    """Return text and language of each shot ``[start_s, end_s)``; shots and cues are in order of time.

    A cue that spans a cut goes, whole, to every shot that shows at least ``MIN_OVERLAP_S`` of it or half of it, and
    always to the shot that shows most of it (the earlier of two equal ones). A cue that repeats the one before it in the
    same shot (rolling captions) adds nothing. Text beyond the limits at the top of this module is left out, with a warning.
    """
    texts: list[list[str]] = [[] for _ in shots]
    languages = [""] * len(shots)
    lengths = [0] * len(shots)
    first = total = compared = left_out = 0
    for cue in cues:
        if compared > MAX_OVERLAPS:
            left_out += 1
            continue
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
        compared += len(overlaps)
        length = len(cue.text) + 1
        enough = min(MIN_OVERLAP_S, (cue.end_s - cue.start_s) / 2)
        most = max(overlaps, key=lambda overlap: (overlap[0], -overlap[1]))[1]
        for overlap, index in overlaps:
            if (overlap >= enough or index == most) and texts[index][-1:] != [cue.text]:
                if lengths[index] + length > MAX_SHOT_CHARACTERS or total + length > MAX_TITLE_CHARACTERS:
                    left_out += 1
                    continue
                texts[index].append(cue.text)
                lengths[index] += length
                total += length
                languages[index] = languages[index] or cue.language
    if left_out and warnings is not None:
        warnings.append(f"{left_out} times a cue was left out: there is too much timed text, or too much at the same time")
    return [(" ".join(parts), language) for parts, language in zip(texts, languages, strict=True)]
