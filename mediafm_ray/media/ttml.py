"""TTML, IMSC and DFXP to the text on screen between the moments when it changes, in time that grows with the document's size.

This module reads: times of body, div, p, span, br and regions (clock times, offsets, frames, ticks; begin, end, dur; parallel
and sequential containers), the regions of text, ``display="none"`` of elements, regions and styles, ``xml:space``. Animation and
styling of looks are ignored. Content outside of all regions is shown only where the document has none.

Expat calls back for every element, no tree is built: neither nesting nor length of a document costs more than its bytes.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

NAMESPACE = re.compile(r"http://www\.w3\.org/(?:ns/ttml|20\d\d/\d\d/ttaf1)(?:#\w+)?")  # DFXP files name the drafts
XML_NAMESPACE = "http://www.w3.org/XML/1998/namespace"
PIECE_CHARACTERS = 1 << 16  # characters parsed between two signs of life
MAX_SCREEN_PARTS = 2_000_000  # pieces of text on all screens together; more of them means that nearly all text is shown at once
MAX_NAMES = 1000  # element names that are cached
MICROSECOND = 1_000_000  # microseconds in a second
NO_END = 1 << 62

CLOCK_TIME = re.compile(r"(\d{2,5}):(\d\d):(\d\d)(?:([.,]\d{1,9})\d*|:(\d{2,5})(?:\.\d{1,5})?)?")
OFFSET_TIME = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\d*(h|m|s|ms|f|t)")
UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
Part = tuple[int, int, int, str]  # a piece of text: begin and end in microseconds, position of its region, text

TIMED = ("body", "div", "p", "span", "br", "region")


@dataclass(slots=True)
class _Element:
    """An open element."""

    name: str
    begin: int  # microseconds on the document's clock
    end: int
    region: str  # empty where none is named
    preserve: bool  # white space
    hidden: bool
    sequential: bool  # whether its children follow each other
    next_begin: int = 0  # begin of the next child in a sequential container
    latest_end: int = 0  # latest end of its children, where that is known
    has_end: bool = False
    first_part: int = 0  # index of its first part


@dataclass
class _Region:
    begin: int
    end: int
    hidden: bool
    place: int


@dataclass
class _Document:
    """State of the parser: the open elements and the text found so far."""

    frame_rate: float = 30.0
    tick_rate: float = 1.0
    counts_frames: bool = False  # whether clock times with frames are SMPTE time codes, which count frames instead of time
    drops_frames: bool = False  # whether time codes skip numbers to keep up with the clock
    styles: dict[str, bool] = field(default_factory=dict)  # whether a style hides the elements that use it
    regions: dict[str, _Region] = field(default_factory=dict)
    parts: list[tuple[int, int, str, str]] = field(default_factory=list)  # begin, end, region, text; in the document's order
    open: list[_Element] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # cache of ``_name``
    foreign: int = 0  # depth within elements of other namespaces and metadata
    region_of_style: str = ""  # the region in whose element styles stand

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = self._name(tag)
        if not self.open:
            if name != "tt":
                raise ValueError("its root is no TTML document")
            self._parameters(attributes)
            self.open.append(_Element("tt", 0, NO_END, "", attributes.get(f"{XML_NAMESPACE} space") == "preserve", False, False))
            return
        if self.foreign or not name:
            self.foreign += 1
            return
        parent = self.open[-1]
        element = _Element(name, parent.begin, parent.end, parent.region, parent.preserve, parent.hidden, False)
        element.first_part = len(self.parts)
        if attributes:
            self._attributes(element, attributes)
        if name in TIMED:
            self._time(element, parent, attributes)
        if name == "region":
            place = len(self.regions)
            self.region_of_style = attributes.get(f"{XML_NAMESPACE} id", "")
            self.regions[self.region_of_style] = _Region(element.begin, element.end, element.hidden, place)
        elif name == "style":
            hidden = element.hidden
            if parent.name == "region":
                self.regions[self.region_of_style].hidden |= hidden
            else:
                self.styles[attributes.get(f"{XML_NAMESPACE} id", "")] = hidden
        elif name == "br":
            self._text(element, "\n")
        self.open.append(element)

    def _name(self, tag: str) -> str:
        """Return the local name of a TTML element; empty for metadata and for elements of other namespaces."""
        name = self.names.get(tag)
        if name is None:
            namespace, _, name = tag.rpartition(" ")
            if not NAMESPACE.fullmatch(namespace) or namespace.endswith("#metadata") or name == "metadata":
                name = ""
            if len(self.names) < MAX_NAMES:
                self.names[tag] = name
        return name

    def end(self, tag: str) -> None:
        if self.foreign:
            self.foreign -= 1
            return
        element = self.open.pop()
        if element.name == "p" and len(self.parts) > element.first_part:
            self._text(element, "\n")
        if self.open and element.name in TIMED:
            parent = self.open[-1]
            end = element.end if element.has_end else max(element.latest_end, element.begin)
            parent.latest_end = max(parent.latest_end, end)
            if parent.sequential:
                parent.next_begin = end

    def characters(self, text: str) -> None:
        if self.foreign or self.open[-1].name not in ("p", "span"):
            return
        element = self.open[-1]
        self._text(element, text if element.preserve else text.replace("\n", " "))

    def shown_parts(self) -> list[Part]:
        """Return the text inside regions while these are shown, or all text where the document has no regions."""
        if not self.regions:
            return [(begin, end, 0, text) for begin, end, _, text in self.parts]
        placed = ((part, self.regions[part[2]]) for part in self.parts if part[2] in self.regions)
        cut = (
            (max(begin, region.begin), min(end, region.end), region.place, text)
            for (begin, end, _, text), region in placed
            if not region.hidden
        )
        return [part for part in cut if part[0] < part[1]]

    def _text(self, element: _Element, text: str) -> None:
        if element.begin < element.end and not element.hidden:
            self.parts.append((element.begin, element.end, element.region, text))

    def _parameters(self, attributes: dict[str, str]) -> None:
        given = {name.rpartition(" ")[2]: value for name, value in attributes.items()}
        multiplier = re.match(r"(\d{1,9})[ :](\d{1,9})", given.get("frameRateMultiplier", "")) or ("", 1, 1)
        rates = [re.match(r"\d{1,9}", given.get(name, "")) for name in ("frameRate", "subFrameRate", "tickRate")]
        frame_rate, sub_frames, tick_rate = (int(rate[0]) if rate else None for rate in rates)
        if 0 in (frame_rate, sub_frames, tick_rate, int(multiplier[1]), int(multiplier[2])):
            raise ValueError("its rates of frames and ticks must be positive")
        self.frame_rate = (frame_rate or 30) * int(multiplier[1]) / int(multiplier[2])
        self.tick_rate = tick_rate or (self.frame_rate * (sub_frames or 1) if frame_rate else 1.0)
        self.counts_frames = given.get("timeBase") == "smpte"
        self.drops_frames = given.get("dropMode", "nonDrop") != "nonDrop"

    def _attributes(self, element: _Element, attributes: dict[str, str]) -> None:
        space = attributes.get(f"{XML_NAMESPACE} space")
        if space is not None:
            element.preserve = space == "preserve"
        hides = None
        for name in attributes.get("style", "").split():
            hides = self.styles.get(name, hides)
        for name, value in attributes.items():
            if name.endswith("#styling display"):
                hides = value == "none"
        element.hidden |= bool(hides)
        region = attributes.get("region")
        if region in self.regions and region != element.region:
            if element.region:  # within another region: it is in neither
                element.hidden = True
            element.region = region or ""

    def _time(self, element: _Element, parent: _Element, attributes: dict[str, str]) -> None:
        """Place an element; one whose times cannot be read is never shown."""
        base = parent.next_begin if parent.sequential else parent.begin
        element.next_begin = element.latest_end = element.begin = base
        if not attributes:
            return
        begin, end, duration = (self._microseconds(attributes.get(name)) for name in ("begin", "end", "dur"))
        if -1 in (begin, end, duration):
            element.hidden = True
            begin = end = duration = None
        element.begin = base + (begin or 0)
        element.has_end = end is not None or duration is not None
        element.end = min(parent.end, NO_END if end is None else base + end, NO_END if duration is None else element.begin + duration)
        element.sequential = attributes.get("timeContainer") == "seq"
        element.next_begin = element.latest_end = element.begin

    def _frame_number(self, time_s: int, frames: int) -> int:
        """Return the frame number of a time code: at 30 frames a second two numbers are skipped each minute, except every tenth."""
        nominal = round(self.frame_rate) or 1
        minutes = time_s // 60
        dropped = nominal // 15 * (minutes - minutes // 10) if self.drops_frames else 0
        return time_s * nominal + frames - dropped

    def _microseconds(self, expression: str | None) -> int | None:
        """Return the value of a time expression, None where the attribute is missing, -1 where it cannot be read."""
        if expression is None:
            return None
        if match := CLOCK_TIME.fullmatch(expression.strip()):
            hours, minutes, seconds, fraction, frames = match.groups()
            time_s = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
            if frames is not None and self.counts_frames:
                return round(self._frame_number(time_s, int(frames)) / self.frame_rate * MICROSECOND)
            rest_s = float("0" + fraction.replace(",", ".")) if fraction else int(frames or 0) / self.frame_rate
            return time_s * MICROSECOND + round(rest_s * MICROSECOND)
        if match := OFFSET_TIME.fullmatch(expression.strip()):
            count, unit = float(match[1]), match[2]
            unit_s = UNITS_S.get(unit) or 1 / (self.frame_rate if unit == "f" else self.tick_rate)
            return min(round(count * unit_s * MICROSECOND), NO_END)
        return -1


def read(text: str, alive: Callable[[], None]) -> Iterator[tuple[float, float | None, str]]:
    """Yield the texts on screen: start and end in seconds (None where the text stays), and the text.

    Raises ValueError where ``text`` is not a TTML document.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it declares XML entities, which timed text has no need of")
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)  # the declared encoding no longer applies to a decoded text
    document = _Document()
    parser = expat.ParserCreate(encoding="utf-8", namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = document.start, document.end
    parser.CharacterDataHandler = document.characters
    try:
        for start in range(0, len(text), PIECE_CHARACTERS):
            parser.Parse(text[start : start + PIECE_CHARACTERS].encode(errors="replace"))
            alive()
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise ValueError(f"it is no well-formed XML: {error}") from None
    yield from screens(document.shown_parts(), alive)


def screens(parts: list[Part], alive: Callable[[], None]) -> Iterator[tuple[float, float | None, str]]:
    """Yield the text on screen between the moments when it changes; equal neighbours are joined."""
    order = sorted(range(len(parts)), key=lambda index: (parts[index][2], index))
    place_of = {index: place for place, index in enumerate(order)}
    begins = sorted(range(len(parts)), key=lambda index: parts[index][0])
    ends = sorted(range(len(parts)), key=lambda index: parts[index][1])
    times = sorted({time for part in parts for time in part[:2]})
    active: list[int] = []  # places of the parts on screen, in order
    shown: tuple[int, str] | None = None
    visited = next_begin = next_end = 0
    for time in times:
        gone = set()
        while next_end < len(ends) and parts[ends[next_end]][1] == time:
            gone.add(place_of[ends[next_end]])
            next_end += 1
        if gone:
            active = [place for place in active if place not in gone]
        while next_begin < len(begins) and parts[begins[next_begin]][0] == time:
            bisect.insort(active, place_of[begins[next_begin]])
            next_begin += 1
        visited += len(active) + len(gone)
        if visited > MAX_SCREEN_PARTS:
            raise ValueError("too much of its text is on screen at the same time")
        lines = "".join(parts[order[place]][3] for place in active).split("\n")
        text = "\n".join(filter(None, (" ".join(line.split()) for line in lines)))
        alive()
        if shown and text == shown[1]:
            continue
        if shown and shown[1]:
            yield shown[0] / MICROSECOND, time / MICROSECOND if time < NO_END else None, shown[1]
        shown = (time, text)
