"""Read a catalog, which is a folder of videos or a table of titles, and report all its problems at once.

A folder
    Every video file below it is a title; its id is the relative path without the ending. ``<stem>.mp4`` may be accompanied by
    timed text ``<stem>[.<language>][.<kind>].srt|.vtt|...`` and by ``<stem>.json`` with ``synopsis`` and ``tags``.
    Hidden files and folders (a leading dot) are skipped.
A table
    Parquet, CSV or JSON lines with ``title_id``, ``video`` and optionally ``timed_text`` (a list of URIs; in CSV separated by
    ';'), ``synopsis``, ``tags`` (a list; in CSV separated by ';'), ``duration_s`` (seconds of video; only plans and budgets use it).
    Other columns are ignored. Relative URIs are relative to the table.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mediafm_ray.spec import TimedTextSource, Title, digest_of, parse_json
from mediafm_ray.storage.base import ObjectInfo, StorageConfig, Unknown
from mediafm_ray.storage.catalog_rows import (
    TIMED_TEXT_KINDS,
    BadRow,
    csv_rows,
    is_clean,
    jsonl_rows,
    parquet_rows,
    problems_of_id,
    problems_of_metadata,
    title_of,
)
from mediafm_ray.storage.errors import StorageError, is_transient
from mediafm_ray.storage.s3 import S3Objects, with_short_timeouts
from mediafm_ray.storage.store import LOOK_UP_THREADS, Store, absolute, join, scheme_of
from mediafm_ray.text import PublicError

log = logging.getLogger(__name__)

VIDEO_ENDINGS = frozenset(
    (
        *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
        *(".mts", ".mxf", ".nut", ".ogm", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
    )
)
TIMED_TEXT_ENDINGS = frozenset([".srt", ".vtt", ".ttml", ".dfxp", ".imsc", ".xml", ".scc", ".ass", ".ssa"])
TABLE_ENDINGS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
MAX_PROBLEMS_SHOWN = 50
MAX_FAILED_LOOK_UPS = 16  # A server that fails so many and answers none is down, or its address is wrong.
SOURCE_DIGITS = 16  # hex digits


class CatalogError(PublicError):
    """A catalog that cannot be used. ``problems`` has one line for each, naming its row."""

    def __init__(self, uri: str, problems: list[str]):
        self.problems = problems
        super().__init__(*list_problems(f"catalog {uri}", problems))


def list_problems(what: str, problems: list[str]) -> list[str]:
    """Return the problems of a catalog or another table of the user's as the lines of one message."""
    shown = problems[:MAX_PROBLEMS_SHOWN]
    more = [f"  ... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
    return [f"{what}: {count}; nothing was started", *(f"  {problem}" for problem in shown), *more]


@dataclass(frozen=True)
class Entry:
    """A title and the digest of its source objects' identity."""

    title: Title
    source: str  # 16 hex digits over URI, size and ETag or modification time of the video and the timed text
    position: int = 0  # row of the table, or place in the order of the file names
    size: int = 0  # bytes of the video; 0 = unknown
    modified: float = 0.0  # modification time of the video, seconds since the epoch; 0 = unknown
    duration_s: float | None = None  # seconds of video, if the catalog says so
    unknown: str = ""  # why one of its objects could not be looked up; ``source`` is then meaningless
    is_outage: bool = False  # True if that reason is transient


def read_catalog(uri: str, config: StorageConfig | None = None, skipped: list[BadRow] | None = None) -> list[Entry]:
    """Return the titles of a catalog in the order of their ids, each with its source digest.

    Bad rows are appended to the list ``skipped`` if there is one; otherwise they are errors of the catalog.

    A missing video or timed text is no error of the catalog: its title fails when it is processed. An object that may exist but cannot be
    looked up makes its entry ``unknown``. Raises CatalogError with every problem found, and StorageError where the catalog, or a store
    that holds its videos, cannot be read: an incomplete listing does not show which titles are gone.
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


def _skip_or_raise(uri: str, problems: list[BadRow], skipped: list[BadRow] | None) -> None:
    """Append the problems to ``skipped`` if there is such a list and each problem belongs to a row; otherwise raise CatalogError."""
    if skipped is None or not all(problem.where for problem in problems):
        if problems:
            raise CatalogError(uri, [str(problem) for problem in problems])
        return
    skipped += problems


def source_digest(title: Title, objects: Mapping[str, ObjectInfo | Unknown | None]) -> str:
    """Return the digest of a title's source objects, which changes when one of them is replaced."""
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
    reason, is_transient = (unknown[0].reason, any(one.is_transient for one in unknown)) if unknown else ("", False)
    return Entry(title, source_digest(title, objects), position, size, modified, duration_s, reason, is_transient)


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
    problems.extend(BadRow(name, problem, stem) for stem, name in names if not is_clean(name))
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
        problems.extend(BadRow(name, problem) for problem in problems_of_id(stem))
        found = {title.video: objects[name]} | {join(uri, text): objects[text] for text, _, _ in texts}
        entries.append(_entry(title, found, len(entries)))
    _skip_or_raise(uri, problems, skipped)
    bad = {problem.title_id for problem in problems} | {problem.where for problem in problems}
    return [entry for entry in entries if entry.title.title_id not in bad and by_stem[entry.title.title_id] not in bad]


def _sidecars_of(by_stem: Mapping[str, str], objects: Iterable[str]) -> dict[str, list[tuple[str, str, str]]]:
    """Return the names, languages and kinds of the timed text of each title, in the order of the names.

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
    except FileNotFoundError:  # It was removed after the listing.
        return {}
    except ValueError as error:
        problems.append(BadRow(name, f"not valid JSON: {error}", stem))
        return {}
    if not isinstance(content, dict):
        problems.append(BadRow(name, f"must be a JSON object with synopsis and tags, is {type(content).__name__}", stem))
        return {}
    synopsis, tags = content.get("synopsis"), content.get("tags")
    wrong = problems_of_metadata(synopsis, tags)
    if wrong:
        problems.extend(BadRow(name, problem, stem) for problem in wrong)
        return {}
    return {"synopsis": synopsis or "", "tags": tuple(tags or ())}


# ------------------------------------------------------------------------------------------------------------ tables


def _read_table(base: str, name: str, kind: str, config: StorageConfig, skipped: list[BadRow] | None) -> list[Entry]:
    content = Store(base, config).read(name)
    problems: list[BadRow] = []
    rows = {"parquet": parquet_rows, "csv": csv_rows, "jsonl": jsonl_rows}[kind](content, problems)
    titles: list[Title] = []
    durations: list[float | None] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        title_id = row.get("title_id")
        if isinstance(title_id, str) and title_id in seen:
            problems.append(BadRow(where, f"title_id {title_id!r} is already that of {seen[title_id]}"))
        title = title_of(where, row, base, problems, seen)
        if title is not None and title.title_id not in seen:
            titles.append(title)
            durations.append(float(row["duration_s"]) if row.get("duration_s") else None)
        if isinstance(title_id, str) and title_id.strip():
            seen.setdefault(title_id, where)
    if not titles and not problems:
        problems.append(BadRow("", "the table has no rows"))
    _skip_or_raise(f"{base}/{name}", problems, skipped)
    objects = _look_up([uri for title in titles for uri in _uris(title)], config)
    found = zip(titles, durations, strict=True)
    return [_entry(title, objects, position, duration_s) for position, (title, duration_s) in enumerate(found)]


def _look_up(uris: Iterable[str], config: StorageConfig) -> dict[str, ObjectInfo | Unknown | None]:
    """Look up every object without opening it: on s3:// with a few listings of each bucket, elsewhere one by one.

    An object that does not exist is None. Raises StorageError where a bucket or a server gives no answer at all.
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
    """Outcomes of the look-ups at a server. Threads share it without a lock, so the count is approximate."""

    answered: bool = False
    failed: int = 0


def _server_of(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    return f"{scheme.lower()}://{rest.partition('/')[0]}" if rest else ""


def _info(uri: str, config: StorageConfig, server: _Server) -> ObjectInfo | Unknown | None:
    """Look up one object. Raises StorageError where its server has failed MAX_FAILED_LOOK_UPS times and never answered."""
    folder, _, name = uri.rpartition("/") if scheme_of(uri) != "file" else absolute(uri).rpartition("/")
    try:
        found = Store(folder or "/", with_short_timeouts(config)).info(name)
        server.answered = True
        return found
    except StorageError as error:
        may_succeed_later = is_transient(error.__cause__ or error)
        server.failed += may_succeed_later
        server.answered |= not may_succeed_later
        if server.failed >= MAX_FAILED_LOOK_UPS and not server.answered:
            raise
        log.warning("cannot look up %s", error)
        return Unknown(str(error), may_succeed_later)
