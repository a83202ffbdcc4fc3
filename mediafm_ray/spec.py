"""The types of the domain (titles, shots, cues) and the constants and options that all layers share. Standard library and numpy only.

Conventions
    Intervals are half-open, ``[start, end)``, for frames and for seconds.
    Times between layers are float64 seconds on the title's own time line (zero = start of its presentation).
    Frame indices count decoded frames in presentation order, from 0.
    Shots of a title tile it: no gap, no overlap, in order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np

SAMPLE_RATE = 16_000  # Hz, mono int16; the sound of a title, unless its audio encoder takes another rate
DETECTOR_HEIGHT = 27  # pixels, as in the training of TransNet V2
DETECTOR_WIDTH = 48  # pixels
MAX_SHOTS_PER_WINDOW = 512  # shots in the attention window of the contextualiser (MediaFM)
MODALITIES = ("video", "audio", "text")  # in the order of a fused embedding
SHARDS = 256  # Of a dataset, by the first byte of a digest of the id of a title.

BOUNDARY_START = "start"  # the first shot of a title
BOUNDARY_CUT = "cut"  # the picture changes from one frame to the next
BOUNDARY_GRADUAL = "gradual"  # a dissolve, fade or wipe; the shot starts in the middle of it
BOUNDARY_SPLIT = "split"  # no transition: a shot that was longer than the maximum


# ---------------------------------------------------------------------------------------------------------- options


class Bounds(TypedDict, total=False):
    """The values that a configuration field may have; for a list or a mapping, those of its elements."""

    min: float
    above: float
    max: float
    below: float
    choices: Sequence[str]


COMPARISONS = {
    "min": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "max": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def recipe(default: Any, help: str, **bounds: Unpack[Bounds]) -> Any:
    """Return a configuration field that changes the numbers and is part of the dataset version."""
    return _option(default, help, True, bounds)


def resource(default: Any, help: str, **bounds: Unpack[Bounds]) -> Any:
    """Return a configuration field that changes only cost or place (devices, threads, limits, paths), not the version."""
    return _option(default, help, False, bounds)


def _option(default: Any, help: str, changes_numbers: bool, bounds: Bounds) -> Any:
    metadata = {"help": help, "changes_numbers": changes_numbers, "bounds": bounds}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def describe_bounds(bounds: Mapping[str, Any]) -> str:
    """Return the bounds of a field in words; empty if it has none."""
    if "choices" in bounds:
        return f"one of {', '.join(filter(None, bounds['choices']))}"
    found = [(words, bounds[name]) for name, (words, _) in COMPARISONS.items() if name in bounds]
    return " and ".join("finite" if bound == math.inf else f"{words} {bound}" for words, bound in found)


@dataclass(frozen=True)
class ConfigSection:
    """A section of a configuration whose fields are checked against their bounds.

    Its errors are ValueErrors that begin with the name of a field; the reader of the configuration puts the name of the section before it.
    """

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            bounds, value = entry.metadata.get("bounds", {}), getattr(self, entry.name)
            for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,):
                kept = item is None or all(compare(item, bounds[name]) for name, (_, compare) in COMPARISONS.items() if name in bounds)
                if not kept or item not in bounds.get("choices", (item,)):
                    raise ValueError(f"{entry.name} must be {describe_bounds(bounds)}, is {item!r}")


def recipe_of(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration dataclass that change the numbers, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.metadata.get("changes_numbers")}


def digest_of(value: Any) -> str:
    """Return the SHA-256 (64 hex digits) of a JSON value in canonical form: sorted keys, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_json(content: str | bytes) -> Any:
    """Parse untrusted JSON. Raises ValueError if it is invalid or nested deeper than Python's stack allows."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


# ----------------------------------------------------------------------------------------------------------- titles


@dataclass(frozen=True)
class TimedTextSource:
    """One timed-text object of a title."""

    uri: str
    language: str = ""  # BCP 47 tag from the catalog or the file name; empty if unknown
    kind: str = ""  # captions, subtitles, descriptions, forced, ...; empty if unknown


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
    """The frames of a detected shot, ``[start_frame, end_frame)``, and the boundary at its start.

    ``boundary_*`` and ``transition_*`` describe the boundary at the *start*. A transition extends from the last pure frame of the outgoing
    shot to the first pure frame of the incoming one; in a cut they are adjacent.
    """

    start_frame: int
    end_frame: int
    boundary_kind: str = BOUNDARY_START
    boundary_probability: float = 1.0  # the detector's probability of the boundary; 1 if nothing was detected (start, split)
    transition_start_frame: int = 0
    transition_end_frame: int = 0
    dropped_boundaries: int = 0  # detected boundaries inside the shot that were flashes or too close to a more probable one


class ShotStream(Protocol):
    """A shot detector for one title: it takes frames and returns final shots, in order, that tile the title."""

    def push(self, frames_THWC: np.ndarray) -> list[ShotSpan]:
        """Take the next (T, 27, 48, 3) uint8 RGB frames; return the shots that no later frame can change."""
        ...

    def finish(self) -> list[ShotSpan]:
        """Return the remaining shots after the last frame."""
        ...


@dataclass(frozen=True, eq=False)
class Packed:
    """Concatenated byte strings, of which string i is ``data[offsets[i]:offsets[i + 1]]``, as in an Arrow array."""

    data: memoryview
    offsets: np.ndarray  # (N + 1,) int64, ascending

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> memoryview:
        return self.data[self.offsets[index] : self.offsets[index + 1]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packed) and self.data == other.data and np.array_equal(self.offsets, other.offsets)

    __hash__ = None  # type: ignore[assignment]


@dataclass
class ShotMedia:
    """The three modalities of one shot, ready for the encoders."""

    span: ShotSpan
    start_s: float
    end_s: float
    frames: Sequence[bytes | memoryview]  # JPEG, evenly spread over the shot, in order
    audio: bytes | memoryview  # mono int16 little-endian at the reader's rate; empty if the title has no audio
    text: str = ""  # plain text spoken or shown during the shot; empty if there is none
    language: str = ""
    thumbnail: bytes = b""  # a small JPEG of the middle frame, for people


@dataclass
class TitleMedia:
    """The content of one title, read in one pass."""

    shots: list[ShotMedia]
    frames: Packed  # the frames of all shots
    audio: Packed  # the audio of all shots, one string per shot
    duration_s: float
    frame_count: int
    warnings: list[str] = dataclasses.field(default_factory=list)  # oddities and damage, for people
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON: container, codecs, size, rates, ...
