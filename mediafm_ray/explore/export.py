"""A selection of shots as a CSV table, a JSON object, or an edit decision list (CMX 3600) for editing programs. No ray here.

CMX 3600 counts time in frames: an event has the source's and the record's time code, whose last number counts up to the nominal frame
rate. At 30000/1001 and 24000/1001 frames a second, time codes are non-drop: every frame counts, and the nominal rates are 30 and 24.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mediafm_ray.config.loader import ConfigError
from mediafm_ray.explore.catalog import Catalog
from mediafm_ray.media.source import file_name
from mediafm_ray.spec import parse_json
from mediafm_ray.text import escape_controls, escape_controls_in_json

FORMATS = {"csv": "text/csv; charset=utf-8", "json": "application/json", "edl": "text/plain; charset=utf-8"}  # -> media type
MAX_SHOTS = 5000  # shots of a selection
MAX_EVENTS = 999  # events of an edit decision list, whose numbers have three digits
MAX_NOMINAL = 60  # frames in a second of time code
NTSC = Fraction(1000, 1001)
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # With these a spreadsheet takes a text for a formula.
RECORD_START_S = 3600  # By custom a programme begins at one hour.
COLUMNS = ("title_id", "shot_index", "start_s", "end_s", "frame_rate", "video", "language", "text")


@dataclass(frozen=True)
class TimeCode:
    """Counts time at a frame rate."""

    rate: Fraction  # frames a second

    @property
    def nominal(self) -> int:
        """The number of frames in a second of time code."""
        return max(round(self.rate), 1)

    def frames(self, seconds: float) -> int:
        """Return the frame that is shown at a time, counted in frames of time code."""
        exact = self.rate in (self.nominal, self.nominal * NTSC)
        return round(seconds * (self.rate if exact else self.nominal))  # Odd rates count real time.

    def text(self, frames: int) -> str:
        """Return a number of frames as hh:mm:ss:ff."""
        seconds, rest = divmod(frames, self.nominal)
        return f"{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}:{rest:02d}"


def time_code(facts: Mapping[str, Any]) -> TimeCode | None:
    """Return the time code of a title by its average frame rate; None where that is not known. ``facts``: of its file."""
    try:
        rate = Fraction(str(facts.get("average_rate")))
    except (ValueError, ZeroDivisionError):
        return None
    while rate > MAX_NOMINAL:
        rate /= 2
    return TimeCode(rate) if rate > 0 else None


def parse_places(text: str) -> list[tuple[str, int]]:
    """Parse a selection: a JSON list of [title id, index of a shot]. Raises ConfigError for anything else."""
    try:
        places = parse_json(text)
    except ValueError:
        places = None
    fits = isinstance(places, list) and all(isinstance(place, list) and [type(part) for part in place] == [str, int] for place in places)
    if not fits or not places:
        raise ConfigError("the selection is empty or damaged: select shots again")
    if len(places) > MAX_SHOTS:
        raise ConfigError(f"a selection has at most {MAX_SHOTS} shots, this one has {len(places)}")
    return [(title_id, shot) for title_id, shot in places]


def export(catalog: Catalog, kind: str, places: Sequence[tuple[str, int]]) -> str:
    """Return the file of a selection. Raises ConfigError for an unknown format or too many shots, DatasetError for unknown shots."""
    writers = {"csv": as_csv, "json": as_json, "edl": as_edl}
    if kind not in writers:
        raise ConfigError(f"a selection is saved as {', '.join(writers)}, not as {kind!r}")
    return writers[kind](catalog, [_row(catalog, title_id, shot) for title_id, shot in places])


def _row(catalog: Catalog, title_id: str, shot: int) -> dict[str, Any]:
    title = catalog.title(title_id)
    title.check(shot)
    (row,) = title.shots.slice(shot, 1).to_pylist()
    found = {**row, "title_id": title_id, "frame_rate": title.source.get("average_rate") or "", "video": title.facts.get("video", "")}
    return {name: found[name] for name in COLUMNS} | {"facts": title.source, "has_audio": row["has_audio"]}


def as_csv(catalog: Catalog, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table. A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, COLUMNS, extrasaction="ignore", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({name: _plain_cell(row[name]) for name in COLUMNS} for row in rows)
    return sink.getvalue()


def _plain_cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def as_json(catalog: Catalog, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return an object with the dataset version and the shots."""
    content = {"dataset_version": catalog.dataset.version, "shots": [{name: row[name] for name in COLUMNS} for row in rows]}
    return escape_controls_in_json(json.dumps(content, ensure_ascii=False, indent=2)) + "\n"


def as_edl(catalog: Catalog, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return an edit decision list of the shots one after another. The record runs at the frame rate of the first title."""
    if len(rows) > MAX_EVENTS:
        raise ConfigError(f"an edit decision list has at most {MAX_EVENTS} events, the selection has {len(rows)}: save it as CSV or JSON")
    codes = [time_code(row["facts"]) for row in rows]
    unknown = [row["title_id"] for row, code in zip(rows, codes, strict=True) if code is None]
    if unknown:
        raise ConfigError(f"the frame rate of {unknown[0]!r} is not known: leave it out, or save the selection as CSV or JSON")
    known = [code for code in codes if code is not None]
    record = known[0]
    at = RECORD_START_S * record.nominal
    lines = ["TITLE: mediafm selection", "FCM: NON-DROP FRAME", ""]
    for number, (row, code) in enumerate(zip(rows, known, strict=True), start=1):
        first, last = code.frames(row["start_s"]), max(code.frames(row["end_s"]), code.frames(row["start_s"]) + 1)
        same = code == record
        length = last - first if same else max(record.frames(row["end_s"] - row["start_s"]), 1)
        channels = "AA/V" if row["has_audio"] else "V"
        times = [code.text(first), code.text(last), record.text(at), record.text(at + length)]
        lines += [
            f"{number:03d}  AX       {channels:<5} C        {' '.join(times)}",
            f"* FROM CLIP NAME: {_line(file_name(row['video']))}",
            f"* COMMENT: {_line(row['title_id'])}, shot {row['shot_index']}, {row['frame_rate']} frames/s",
            "",
        ]
        at += length
    return "\r\n".join(lines)


def _line(text: str) -> str:
    return escape_controls(text)
