"""Read and check the rows of a catalog's table: Parquet, CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.spec import TimedTextSource, Title, parse_json
from mediafm_ray.storage.store import join, scheme_problem

TIMED_TEXT_KINDS = frozenset(["captions", "cc", "sdh", "subtitles", "subtitle", "forced", "descriptions", "ad", "chapters"])
COLUMNS = ("title_id", "video", "timed_text", "synopsis", "tags", "duration_s")
CSV_LIST_SEPARATOR = ";"
MAX_TITLE_ID_BYTES = 1024  # encoded as UTF-8
ROWS_PER_BATCH = 10_000  # of a Parquet table, which are in memory at once
SURROGATES = re.compile("[\ud800-\udfff]")
CONTROLS_OR_SURROGATES = re.compile("[\x00-\x1f\ud800-\udfff]")


@dataclass(frozen=True)
class BadRow:
    """A row of a table, or a title of a folder, that cannot be used."""

    where: str  # such as "line 3", or the name of a file; empty for the whole catalog
    problem: str
    title_id: str = ""  # the id of its title, if it has one that no other row has

    @property
    def name(self) -> str:
        """The title's id, or ``where`` in parentheses if it has none; always valid Unicode, which the name of a file need not be."""
        return (self.title_id or f"({self.where})").encode(errors="backslashreplace").decode()

    def __str__(self) -> str:
        title = f" ({self.title_id})" if self.title_id and self.title_id not in self.where else ""
        return f"{self.where}{title}: {self.problem}" if self.where else self.problem


class Row(NamedTuple):
    """A checked row of a table, of values that are written to files in a third of the time that a Title takes."""

    position: int
    where: str  # such as "line 3"
    title_id: str | None  # None if it is no string
    problems: Sequence[str]
    video: str = ""  # URI, as are those of timed_text
    timed_text: Sequence[tuple[str, str, str]] = ()  # the fields of TimedTextSource
    synopsis: str = ""
    tags: Sequence[str] = ()
    duration_s: float | None = None

    @property
    def uris(self) -> list[str]:
        """The objects of the title."""
        return [self.video, *(uri for uri, _, _ in self.timed_text)]

    def title(self) -> Title:
        """Return the title of a row without problems."""
        assert self.title_id is not None
        return Title(self.title_id, self.video, tuple(TimedTextSource(*text) for text in self.timed_text), self.synopsis, tuple(self.tags))

    def bad_rows(self, seen: Mapping[str, str]) -> Iterator[BadRow]:
        """Yield the problems of this row. ``seen``: the places of earlier rows by their ids."""
        title_id, own = self.title_id or "", ""
        if title_id in seen:
            yield BadRow(self.where, f"title_id {title_id!r} is already that of {seen[title_id]}")
        elif title_id.strip() and not problems_of_id(title_id):
            own = title_id
        for problem in self.problems:
            yield BadRow(self.where, problem, own)


def checked_row(position: int, where: str, row: Mapping[str, Any], base: str) -> Row:
    """Check the values of one row of a table in the folder ``base``."""
    wrong: list[str] = []
    title_id, video = row.get("title_id"), row.get("video")
    for name, value in (("title_id", title_id), ("video", video)):
        if name not in row:
            wrong.append(f"the column {name} is missing")
        elif value is None or value == "":
            wrong.append(f"{name} is empty")
        elif not isinstance(value, str):
            wrong.append(f"{name} must be a string, is {type(value).__name__} ({value!r})")
        elif not value.strip():
            wrong.append(f"{name} is empty (white space)")
    if isinstance(title_id, str):
        wrong.extend(problems_of_id(title_id))
    timed_text, synopsis, tags = row.get("timed_text"), row.get("synopsis"), row.get("tags")
    wrong.extend(_problems_of_list("timed_text", timed_text))
    wrong.extend(problems_of_metadata(synopsis, tags))
    wrong.extend(_problems_of_duration(row.get("duration_s")))
    uris = [video] if isinstance(video, str) else []
    uris += [uri for uri in timed_text if isinstance(uri, str)] if isinstance(timed_text, (list, tuple)) else []
    wrong += [f"{uri!r} is not a URI: it has control characters or is not valid Unicode" for uri in uris if not is_clean(uri)]
    wrong.extend(filter(None, map(scheme_problem, uris)))
    if wrong or not isinstance(title_id, str) or not isinstance(video, str):
        return Row(position, where, title_id if isinstance(title_id, str) else None, wrong)
    texts = [(join(base, text), *_language_and_kind(text)) for text in timed_text or ()]
    duration_s = float(row["duration_s"]) if row.get("duration_s") else None
    return Row(position, where, title_id, (), join(base, video), texts, synopsis or "", tags or (), duration_s)


def _language_and_kind(uri: str) -> tuple[str, str]:
    """Parse language and kind from the name of a timed-text object: ``film.en.captions.srt`` -> ('en', 'captions')."""
    marks = PurePosixPath(uri).name.split(".")[1:-1]
    kind = marks.pop().lower() if marks and marks[-1].lower() in TIMED_TEXT_KINDS else ""
    language = marks[-1] if marks and 2 <= len(marks[-1].split("-")[0]) <= 3 and marks[-1].replace("-", "").isalnum() else ""
    return language, kind


def problems_of_id(title_id: str) -> list[str]:
    if not is_clean(title_id):
        return ["title_id has control characters or is not valid Unicode"]
    size = len(title_id.encode())
    return [f"title_id has {size} bytes; the limit is {MAX_TITLE_ID_BYTES}"] if size > MAX_TITLE_ID_BYTES else []


def is_clean(text: str) -> bool:
    """Return True for valid Unicode (JSON may hold half a surrogate pair) without control characters."""
    return CONTROLS_OR_SURROGATES.search(text) is None


def _is_unicode(text: str) -> bool:
    return SURROGATES.search(text) is None


def _problems_of_list(name: str, value: Any) -> list[str]:
    if value is None or value == []:
        return []
    if not isinstance(value, (list, tuple)):
        return [f"{name} must be a list of strings, is {type(value).__name__} ({value!r})"]
    wrong = [item for item in value if not isinstance(item, str)]
    if wrong:
        return [f"{name} must be a list of strings, has {type(wrong[0]).__name__} ({wrong[0]!r})"]
    return [f"{name} has an empty entry"] if not all(map(str.strip, value)) else []


def problems_of_metadata(synopsis: Any, tags: Any) -> list[str]:
    wrong = _problems_of_list("tags", tags)
    if synopsis is not None and not isinstance(synopsis, str):
        wrong.append(f"synopsis must be a string, is {type(synopsis).__name__}")
    if not wrong and not _is_unicode("".join([synopsis or "", *(tags or ())])):
        wrong.append("synopsis or tags are not valid Unicode")
    return wrong


def _problems_of_duration(value: Any) -> list[str]:
    """Check a number, or its text in a CSV; an empty value or 0 is an unknown duration."""
    if value is None:
        return []
    try:
        seconds = float(value or 0)
    except (TypeError, ValueError, OverflowError):  # OverflowError: an integer of hundreds of digits.
        seconds = math.nan
    return [] if 0 <= seconds < math.inf else [f"duration_s must be a number of seconds, is {value!r}"]


def _missing_columns(names: Sequence[str]) -> list[BadRow]:
    there = ", ".join(names)
    return [BadRow("", f"the column {name} is missing (there are: {there})") for name in ("title_id", "video") if name not in names]


def parquet_rows(path: str, problems: list[BadRow]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a Parquet file, each with its number."""
    count = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := _missing_columns(names):
                problems.extend(missing)
                return
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=[name for name in COLUMNS if name in names]):
                for row in batch.to_pylist():
                    count += 1
                    yield f"row {count}", row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # OverflowError: a time that Python cannot hold.
        problems.append(BadRow("", f"not a readable Parquet file: {error}"))  # The rows after it were not read.


def csv_rows(path: str, problems: list[BadRow]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a CSV file, each with the number of its last line."""
    with open(path, "rb") as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
        try:
            header = reader.fieldnames or []
            if missing := _missing_columns(header):
                problems.extend(missing)
                return
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row:
                    problems.append(BadRow(where, f"more fields than the header has ({len(header)})"))
                    continue
                for name in ("timed_text", "tags"):
                    if name in row:
                        row[name] = [item.strip() for item in (row[name] or "").split(CSV_LIST_SEPARATOR) if item.strip()]
                yield where, row
        except UnicodeDecodeError as error:  # The rows after it were not read.
            problems.append(BadRow("", f"not UTF-8: {error.reason} at byte {stream.tell() - len(error.object) + error.start}"))
        except csv.Error as error:
            problems.append(BadRow("", f"line {reader.line_num}: {error}"))  # The lines after it were not read.


def jsonl_rows(path: str, problems: list[BadRow]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a file of JSON lines, each with the number of its line."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                row = parse_json(line.removesuffix(b"\n"))
            except ValueError as error:
                problems.append(BadRow(f"line {number}", f"not valid JSON: {error}"))
                continue
            if isinstance(row, dict):
                yield f"line {number}", row
            else:
                problems.append(BadRow(f"line {number}", f"must be a JSON object, is {type(row).__name__}"))
