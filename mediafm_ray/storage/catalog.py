"""Catalogs: which titles there are, from a folder of videos or from a table, with every problem reported at once.

A folder
    Every video file below it is a title; its id is the relative path without the ending. Beside ``<stem>.mp4`` may stand
    timed text ``<stem>[.<language>][.<kind>].srt|.vtt|...`` and ``<stem>.json`` with ``synopsis`` and ``tags``.
    Hidden files and folders (a leading dot) are passed over.
A table
    Parquet, CSV or JSON lines with ``title_id``, ``video`` and optionally ``timed_text`` (a list of URIs; in CSV separated by
    ';'), ``synopsis``, ``tags`` (a list; in CSV separated by ';'), ``duration_s`` (seconds of video; only plans and budgets use it).
    Other columns are left alone. Relative URIs are relative to the table.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.spec import TimedTextSource, Title, digest_of, parse_json
from mediafm_ray.storage.base import ObjectInfo, StorageConfig, Unknown
from mediafm_ray.storage.errors import StorageError, may_pass
from mediafm_ray.storage.s3 import S3Objects, hasty
from mediafm_ray.storage.store import ALLOWED_SCHEMES, LOOK_UP_THREADS, Store, absolute, join, scheme_of
from mediafm_ray.text import PublicError

log = logging.getLogger(__name__)

VIDEO_ENDINGS = frozenset(
    (
        *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
        *(".mts", ".mxf", ".nut", ".ogm", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
    )
)
TIMED_TEXT_ENDINGS = frozenset([".srt", ".vtt", ".ttml", ".dfxp", ".imsc", ".xml", ".scc", ".ass", ".ssa"])
TIMED_TEXT_KINDS = frozenset(["captions", "cc", "sdh", "subtitles", "subtitle", "forced", "descriptions", "ad", "chapters"])
COLUMNS = ("title_id", "video", "timed_text", "synopsis", "tags", "duration_s")
TABLE_ENDINGS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
CSV_LIST_SEPARATOR = ";"
MAX_TITLE_ID_BYTES = 1024  # of UTF-8
MAX_PROBLEMS_SHOWN = 50
MAX_FAILED_LOOK_UPS = 16  # of a server that has answered none: it is down, or its address is wrong
SOURCE_DIGITS = 16  # hex digits of a source digest


class CatalogError(PublicError):
    """A catalog that cannot be used. ``problems`` has one line for each, naming its row."""

    def __init__(self, uri: str, problems: list[str]):
        self.problems = problems
        super().__init__(*list_problems(f"catalog {uri}", problems))


@dataclass(frozen=True)
class BadRow:
    """A row of a table, or a title of a folder, that cannot be used."""

    where: str  # such as "line 3", or the name of a file; empty for the catalog as a whole
    problem: str
    title_id: str = ""  # its title's, where it has one that no other row has

    @property
    def name(self) -> str:
        """The title's id, or what stands for it where it has none; valid Unicode, which the name of a file need not be."""
        return (self.title_id or f"({self.where})").encode(errors="backslashreplace").decode()

    def __str__(self) -> str:
        title = f" ({self.title_id})" if self.title_id and self.title_id not in self.where else ""
        return f"{self.where}{title}: {self.problem}" if self.where else self.problem


def list_problems(what: str, problems: list[str]) -> list[str]:
    """The problems of a catalog or another table that people bring, as the lines of one message."""
    shown = problems[:MAX_PROBLEMS_SHOWN]
    more = [f"  ... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
    return [f"{what}: {count}; nothing was started", *(f"  {problem}" for problem in shown), *more]


@dataclass(frozen=True)
class Entry:
    """A title and the digest of its source objects' identity."""

    title: Title
    source: str  # 16 hex digits over URI, size and ETag or modification time of the video and the timed text
    position: int = 0  # in the catalog: its row, or its place in the order of names
    size: int = 0  # bytes of the video; 0 = unknown
    modified: float = 0.0  # of the video, seconds since the epoch; 0 = unknown
    duration_s: float | None = None  # seconds of video, where the catalog says so
    unknown: str = ""  # why one of its objects could not be looked at: ``source`` is then neither the old one nor a new one
    is_outage: bool = False  # whether that may pass


def read_catalog(uri: str, config: StorageConfig | None = None, skipped: list[BadRow] | None = None) -> list[Entry]:
    """The titles of a catalog in the order of their ids, each with its source digest.

    With a list ``skipped``, bad rows are no error of the catalog but are put there.

    A video or timed text that is not there is no problem of the catalog: that title fails when its turn comes. One that may be there and
    cannot be looked at makes its entry ``unknown``. Raises CatalogError with every problem found, and StorageError where the catalog, or
    a store that holds its videos, cannot be read: a listing that is not complete says nothing about what is gone.
    """
    config = config or StorageConfig()
    if not uri:
        raise CatalogError("(not set)", ["catalog.uri is empty: give a folder of videos or a .parquet, .csv or .jsonl table"])
    store = Store(uri, config)
    folder, _, name = store.uri.rpartition("/")
    folder = folder or "/"
    ending = PurePosixPath(name).suffix.lower()
    if ending in TABLE_ENDINGS and not os.path.isdir(store.root) and Store(folder, config).check_readable(name):
        entries = _read_table(folder, name, TABLE_ENDINGS[ending], config, skipped)
    elif store.check_readable() and not os.path.isfile(store.root):
        entries = _read_folder(store, skipped)
    elif not folder.endswith(":/") and Store(folder, config).check_readable(name):
        known = ", ".join(sorted(TABLE_ENDINGS))
        raise CatalogError(store.uri, [f"not a folder, and the ending {ending or '(none)'} is not one of {known}"])
    else:
        raise CatalogError(store.uri, ["there is nothing at this location"])
    return sorted(entries, key=lambda entry: entry.title.title_id)


def _check(uri: str, problems: list[BadRow], skipped: list[BadRow] | None) -> None:
    """Raise CatalogError with the problems, unless bad rows are to be skipped and each of them is one."""
    if skipped is None or not all(problem.where for problem in problems):
        if problems:
            raise CatalogError(uri, [str(problem) for problem in problems])
        return
    skipped += problems


def source_digest(title: Title, objects: Mapping[str, ObjectInfo | Unknown | None]) -> str:
    """The identity of a title's source objects: changes when one of them is replaced."""
    identity = []
    for uri in _uris(title):
        info = objects.get(uri)
        identity.append([uri, info.size, info.version] if isinstance(info, ObjectInfo) else [uri, None, None])
    return digest_of(identity)[:SOURCE_DIGITS]


def _uris(title: Title) -> list[str]:
    return [title.video, *(text.uri for text in title.timed_text)]


def _entry(title: Title, objects: Mapping[str, ObjectInfo | Unknown | None], position: int, duration_s: float | None = None) -> Entry:
    video = objects.get(title.video)
    size, modified = (video.size, video.modified) if isinstance(video, ObjectInfo) else (0, 0.0)
    unknown = [found for uri in _uris(title) if isinstance(found := objects.get(uri), Unknown)]
    reason, may_pass = (unknown[0].reason, any(one.may_pass for one in unknown)) if unknown else ("", False)
    return Entry(title, source_digest(title, objects), position, size, modified, duration_s, reason, may_pass)


# ----------------------------------------------------------------------------------------------------------- folders


def _read_folder(store: Store, skipped: list[BadRow] | None) -> list[Entry]:
    uri = store.uri
    objects = {info.name: info for info in store.list() if not any(part.startswith(".") for part in info.name.split("/"))}
    problems: list[BadRow] = []
    by_stem: dict[str, str] = {}
    for name in sorted(objects):
        path = PurePosixPath(name)
        if path.suffix.lower() not in VIDEO_ENDINGS:
            continue
        stem = str(path.with_suffix(""))
        if stem in by_stem:
            problems.append(BadRow(name, f"the title id {stem!r} is already that of {by_stem[stem]}; rename one of them"))
        else:
            by_stem[stem] = name
    if not by_stem:
        raise CatalogError(uri, [f"no video file below this folder (endings known: {' '.join(sorted(VIDEO_ENDINGS))})"])
    sidecars = _sidecars_of(by_stem, objects)
    names = ((stem, name) for stem, texts in sidecars.items() for name, _, _ in texts)
    problem = "the name has control characters or is not valid Unicode; rename it"
    problems.extend(BadRow(name, problem, stem) for stem, name in names if not _is_clean(name))
    described = [stem for stem in by_stem if f"{stem}.json" in objects]
    with ThreadPoolExecutor(LOOK_UP_THREADS) as pool:
        found_metadata = dict(zip(described, pool.map(lambda stem: _read_metadata(store, stem, problems), described), strict=True))
    entries: list[Entry] = []
    for stem, name in by_stem.items():
        metadata = found_metadata.get(stem, {})
        texts = sidecars.get(stem, [])
        title = Title(
            title_id=stem,
            video=join(uri, name),
            timed_text=tuple(TimedTextSource(join(uri, text), language, kind) for text, language, kind in texts),
            synopsis=metadata.get("synopsis", ""),
            tags=metadata.get("tags", ()),
        )
        problems.extend(BadRow(name, problem) for problem in _problems_of_id(stem))
        found = {title.video: objects[name]} | {join(uri, text): objects[text] for text, _, _ in texts}
        entries.append(_entry(title, found, len(entries)))
    _check(uri, problems, skipped)
    bad = {problem.title_id for problem in problems} | {problem.where for problem in problems}
    return [entry for entry in entries if entry.title.title_id not in bad and by_stem[entry.title.title_id] not in bad]


def _sidecars_of(by_stem: Mapping[str, str], objects: Iterable[str]) -> dict[str, list[tuple[str, str, str]]]:
    """For each title the names, languages and kinds of its timed text, in the order of the names.

    ``film.en.captions.srt`` belongs to ``film.en`` if that is a title, else to ``film`` in language ``en``: the longest stem wins.
    """
    found = defaultdict(list)
    for name in sorted(objects):
        path = PurePosixPath(name)
        if path.suffix.lower() not in TIMED_TEXT_ENDINGS:
            continue
        stem = str(path.with_suffix(""))
        marks: list[str] = []
        while stem not in by_stem and len(marks) < 2:
            base = PurePosixPath(stem)
            if not base.suffix:
                break
            marks.insert(0, base.suffix[1:])
            stem = str(base.with_suffix(""))
        if stem not in by_stem:
            continue
        kind = marks.pop() if marks and marks[-1].lower() in TIMED_TEXT_KINDS else ""
        if len(marks) <= 1:
            found[stem].append((name, marks[0] if marks else "", kind.lower()))
    return found


def _read_metadata(store: Store, stem: str, problems: list[BadRow]) -> dict[str, Any]:
    name = f"{stem}.json"
    try:
        content = parse_json(store.read(name))
    except FileNotFoundError:  # it was removed just now
        return {}
    except ValueError as error:
        problems.append(BadRow(name, f"not valid JSON: {error}", stem))
        return {}
    if not isinstance(content, dict):
        problems.append(BadRow(name, f"must be a JSON object with synopsis and tags, is {type(content).__name__}", stem))
        return {}
    synopsis, tags = content.get("synopsis"), content.get("tags")
    wrong = _problems_of_metadata(synopsis, tags)
    if wrong:
        problems.extend(BadRow(name, problem, stem) for problem in wrong)
        return {}
    return {"synopsis": synopsis or "", "tags": tuple(tags or ())}


# ------------------------------------------------------------------------------------------------------------ tables


def _read_table(base: str, name: str, kind: str, config: StorageConfig, skipped: list[BadRow] | None) -> list[Entry]:
    content = Store(base, config).read(name)
    problems: list[BadRow] = []
    rows = {"parquet": _parquet_rows, "csv": _csv_rows, "jsonl": _jsonl_rows}[kind](content, problems)
    titles: list[Title] = []
    durations: list[float | None] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        title_id = row.get("title_id")
        if isinstance(title_id, str) and title_id in seen:
            problems.append(BadRow(where, f"title_id {title_id!r} is already that of {seen[title_id]}"))
        title = _title_of(where, row, base, problems, seen)
        if title is not None and title.title_id not in seen:
            titles.append(title)
            durations.append(float(row["duration_s"]) if row.get("duration_s") else None)
        if isinstance(title_id, str) and title_id.strip():
            seen.setdefault(title_id, where)
    if not titles and not problems:
        problems.append(BadRow("", "the table has no rows"))
    _check(f"{base}/{name}", problems, skipped)
    objects = _look_up([uri for title in titles for uri in _uris(title)], config)
    found = zip(titles, durations, strict=True)
    return [_entry(title, objects, position, duration_s) for position, (title, duration_s) in enumerate(found)]


def _title_of(where: str, row: Mapping[str, Any], base: str, problems: list[BadRow], seen: Mapping[str, str]) -> Title | None:
    """The title of one row of a table; None, and ``problems``, when there is something wrong with it. ``seen``: the ids of other rows."""
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
        wrong.extend(_problems_of_id(title_id))
    timed_text, synopsis, tags = row.get("timed_text"), row.get("synopsis"), row.get("tags")
    wrong.extend(_problems_of_list("timed_text", timed_text))
    wrong.extend(_problems_of_metadata(synopsis, tags))
    wrong.extend(_problems_of_duration(row.get("duration_s")))
    uris = [video] if isinstance(video, str) else []
    uris += [uri for uri in timed_text if isinstance(uri, str)] if isinstance(timed_text, (list, tuple)) else []
    wrong.extend(f"{uri!r} is no URI: it has characters that none has" for uri in uris if not _is_clean(uri))
    wrong.extend(
        f"{uri}: the scheme {scheme_of(uri)}:// is not allowed; use a path or one of {', '.join(ALLOWED_SCHEMES)}"
        for uri in uris
        if scheme_of(uri) not in ALLOWED_SCHEMES
    )
    if wrong:
        own = isinstance(title_id, str) and title_id.strip() and title_id not in seen and not _problems_of_id(title_id)
        problems.extend(BadRow(where, problem, title_id if own and isinstance(title_id, str) else "") for problem in wrong)
        return None
    assert isinstance(title_id, str)
    assert isinstance(video, str)
    texts = tuple(TimedTextSource(join(base, text), *_marks_of(text)) for text in timed_text or ())
    return Title(title_id, join(base, video), texts, synopsis or "", tuple(tags or ()))


def _marks_of(uri: str) -> tuple[str, str]:
    """Language and kind as the name of a timed-text object gives them: ``film.en.captions.srt`` -> ('en', 'captions')."""
    marks = PurePosixPath(uri).name.split(".")[1:-1]
    kind = marks.pop().lower() if marks and marks[-1].lower() in TIMED_TEXT_KINDS else ""
    language = marks[-1] if marks and 2 <= len(marks[-1].split("-")[0]) <= 3 and marks[-1].replace("-", "").isalnum() else ""
    return language, kind


def _problems_of_id(title_id: str) -> list[str]:
    if not _is_clean(title_id):
        return ["title_id has control characters or is not valid Unicode"]
    size = len(title_id.encode())
    return [f"title_id has {size} bytes; the limit is {MAX_TITLE_ID_BYTES}"] if size > MAX_TITLE_ID_BYTES else []


def _is_clean(text: str) -> bool:
    """Whether text is valid Unicode (JSON may hold half a surrogate pair) without control characters."""
    return _is_unicode(text) and not any(ord(character) < 32 for character in text)


def _is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def _problems_of_list(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        return [f"{name} must be a list of strings, is {type(value).__name__} ({value!r})"]
    wrong = [item for item in value if not isinstance(item, str)]
    if wrong:
        return [f"{name} must be a list of strings, has {type(wrong[0]).__name__} ({wrong[0]!r})"]
    return [f"{name} has an empty entry"] if any(not item.strip() for item in value) else []


def _problems_of_metadata(synopsis: Any, tags: Any) -> list[str]:
    wrong = _problems_of_list("tags", tags)
    if synopsis is not None and not isinstance(synopsis, str):
        wrong.append(f"synopsis must be a string, is {type(synopsis).__name__}")
    if not wrong and not all(map(_is_unicode, [synopsis or "", *(tags or ())])):
        wrong.append("synopsis or tags are not valid Unicode")
    return wrong


def _problems_of_duration(value: Any) -> list[str]:
    """Of a number, or of its text in a CSV; nothing, or 0, is a duration that is not known."""
    try:
        seconds = float(value or 0)
    except (TypeError, ValueError, OverflowError):  # OverflowError: an integer of hundreds of digits
        seconds = math.nan
    return [] if 0 <= seconds < math.inf else [f"duration_s must be a number of seconds, is {value!r}"]


def _parquet_rows(content: bytes, problems: list[BadRow]) -> list[tuple[str, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        names = file.schema_arrow.names
        missing = [name for name in ("title_id", "video") if name not in names]
        if missing:
            problems.extend(BadRow("", f"the column {name} is missing (there are: {', '.join(names)})") for name in missing)
            return []
        rows = file.read([name for name in COLUMNS if name in names]).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the latter of times that Python has no value for
        problems.append(BadRow("", f"not a readable Parquet file: {error}"))
        return []
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def _csv_rows(content: bytes, problems: list[BadRow]) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(BadRow("", f"not UTF-8: {error}"))
        return []
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[str, dict[str, Any]]] = []
    try:
        header = reader.fieldnames or []
        missing = [name for name in ("title_id", "video") if name not in header]
        if missing:
            problems.extend(BadRow("", f"the column {name} is missing (there are: {', '.join(header)})") for name in missing)
            return []
        for row in reader:
            where = f"line {reader.line_num}"
            if None in row:
                problems.append(BadRow(where, f"more fields than the header has ({len(header)})"))
                continue
            for name in ("timed_text", "tags"):
                if name in row:
                    row[name] = [item.strip() for item in (row[name] or "").split(CSV_LIST_SEPARATOR) if item.strip()]
            rows.append((where, dict(row)))
    except csv.Error as error:
        problems.append(BadRow("", f"line {reader.line_num}: {error}"))  # what comes after it was not read
    return rows


def _jsonl_rows(content: bytes, problems: list[BadRow]) -> list[tuple[str, dict[str, Any]]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            problems.append(BadRow(f"line {number}", f"not valid JSON: {error}"))
            continue
        if isinstance(row, dict):
            rows.append((f"line {number}", row))
        else:
            problems.append(BadRow(f"line {number}", f"must be a JSON object, is {type(row).__name__}"))
    return rows


def _look_up(uris: Iterable[str], config: StorageConfig) -> dict[str, ObjectInfo | Unknown | None]:
    """What is known of each object, without opening any: on s3:// by few listings a bucket, elsewhere one by one.

    None is an object that is not there. Raises StorageError where a bucket or a server cannot be asked at all.
    """
    elsewhere: list[str] = []
    keys: dict[str, dict[str, str]] = defaultdict(dict)  # bucket -> key -> URI
    for uri in uris:
        if scheme_of(uri) == "s3":
            bucket, _, key = uri.partition("://")[2].partition("/")
            keys[bucket][key] = uri
        else:
            elsewhere.append(uri)
    servers: dict[str, _Server] = defaultdict(_Server)
    with ThreadPoolExecutor(LOOK_UP_THREADS) as pool:
        infos = pool.map(lambda uri: _info(uri, config, servers[_server_of(uri)]), elsewhere)
        found: dict[str, ObjectInfo | Unknown | None] = dict(zip(elsewhere, infos, strict=True))
    for bucket, uri_of in keys.items():
        there = S3Objects(f"s3://{bucket}", config).find(list(uri_of))
        found |= {uri: there.get(key) for key, uri in uri_of.items()}
    return found


@dataclass
class _Server:
    """Outcomes of the look-ups at a server; counts need not be exact, for threads share them without a lock."""

    answered: bool = False
    failed: int = 0


def _server_of(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    return f"{scheme.lower()}://{rest.partition('/')[0]}" if rest else ""


def _info(uri: str, config: StorageConfig, server: _Server) -> ObjectInfo | Unknown | None:
    """Look one object up. Raises StorageError where its server has failed again and again and never answered."""
    folder, _, name = uri.rpartition("/") if scheme_of(uri) != "file" else absolute(uri).rpartition("/")
    try:
        found = Store(folder or "/", hasty(config)).info(name)
        server.answered = True
        return found
    except StorageError as error:
        passing = may_pass(error.__cause__ or error)
        server.failed += passing
        server.answered |= not passing
        if server.failed >= MAX_FAILED_LOOK_UPS and not server.answered:
            raise
        log.warning("cannot look at %s", error)
        return Unknown(str(error), passing)
