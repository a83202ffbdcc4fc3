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

import functools
import hashlib
import heapq
import itertools
import json
import logging
import operator
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mediafm_ray.spec import SHARDS, TimedTextSource, Title, parse_json
from mediafm_ray.storage.base import ObjectInfo, StorageConfig, Unknown
from mediafm_ray.storage.catalog_rows import (
    TIMED_TEXT_KINDS,
    BadRow,
    Row,
    checked_row,
    csv_rows,
    is_clean,
    jsonl_rows,
    parquet_rows,
    problems_of_id,
    problems_of_metadata,
)
from mediafm_ray.storage.errors import DENIED, StorageError, code_of, explain, is_transient
from mediafm_ray.storage.names import encode_title, shard_of
from mediafm_ray.storage.partitions import Partitions, scratch_folder
from mediafm_ray.storage.s3 import S3Objects, with_short_timeouts
from mediafm_ray.storage.store import LOOK_UP_THREADS, Store, absolute, join, scheme_of
from mediafm_ray.storage.workers import Workers
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
Found = tuple[str, type[ObjectInfo | Unknown], tuple[Any, ...]]  # Bucket and key, and what is known of the object, as plain values.
KEYS_AT_ONCE = 50_000  # of a bucket, which are looked up together
PATHS_AT_ONCE = 64  # local files that a thread looks up in a row: a hand-over costs more than a look-up


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


class Entry(NamedTuple):
    """A title and the digest of its source objects' identity."""

    title: Title
    key: tuple[str, str]  # The encoded title and its present source, as in a listing.
    position: int = 0  # row of the table, or place in the order of the file names
    size: int = 0  # bytes of the video; 0 = unknown
    modified: float = 0.0  # modification time of the video, seconds since the epoch; 0 = unknown
    duration_s: float | None = None  # seconds of video, if the catalog says so
    unknown: str = ""  # why one of its objects could not be looked up; ``source`` is then meaningless
    is_outage: bool = False  # True if that reason is transient

    @property
    def source(self) -> str:
        """The 16 hex digits over URI, size and ETag or modification time of the video and the timed text."""
        return self.key[1]


@dataclass(frozen=True)
class Catalog:
    """The titles of a catalog by the shard of their objects."""

    titles: int
    of_shards: Callable[[Sequence[int]], Iterable[Entry]]

    def entries(self, shards: Sequence[int]) -> list[Entry]:
        """Return the titles of some shards in the order of their ids, each with its source digest. Raises StorageError."""
        return sorted(self.of_shards(shards), key=lambda entry: entry.title.title_id)


def read_catalog(uri: str, config: StorageConfig | None = None, skipped: list[BadRow] | None = None) -> list[Entry]:
    """Return all titles of a catalog in the order of their ids; see ``open_catalog``."""
    with scratch_folder("catalog") as scratch, Workers() as workers:
        return open_catalog(uri, config or StorageConfig(), scratch, skipped, workers).entries(range(SHARDS))


def open_catalog(uri: str, config: StorageConfig, scratch: Path, skipped: list[BadRow] | None, workers: Workers) -> Catalog:
    """Read and check a catalog, which can be pickled; ``scratch``, a temporary folder, receives its titles where they are many.

    Bad rows are appended to the list ``skipped`` if there is one; otherwise they are errors of the catalog.

    A missing video or timed text is no error of the catalog: its title fails when it is processed. An object that may exist but cannot be
    looked up makes its entry ``unknown``. Raises CatalogError with every problem found, and StorageError where the catalog, or a store
    that holds its videos, cannot be read: an incomplete listing does not show which titles are gone.
    """
    if not uri:
        raise CatalogError("(not set)", ["catalog.uri is empty: give a folder of videos or a .parquet, .csv or .jsonl table"])
    store = Store(uri, config)
    folder, _, name = store.uri.rpartition("/")
    folder = folder or "/"
    ending = PurePosixPath(name).suffix.lower()
    if ending in TABLE_ENDINGS and not os.path.isdir(store.root) and Store(folder, config).check_readable(name):
        return _open_table(folder, name, TABLE_ENDINGS[ending], config, scratch, skipped, workers)
    if store.check_readable() and not os.path.isfile(store.root):
        return _open_folder(store, scratch, skipped)
    if not folder.endswith(":/") and Store(folder, config).check_readable(name):
        known = ", ".join(sorted(TABLE_ENDINGS))
        raise CatalogError(store.uri, [f"not a folder, and the ending {ending or '(none)'} is not one of {known}"])
    raise CatalogError(store.uri, ["there is nothing at this location"])


def _skip_or_raise(uri: str, problems: list[BadRow], skipped: list[BadRow] | None) -> None:
    """Append the problems to ``skipped`` if there is such a list and each problem belongs to a row; otherwise raise CatalogError."""
    if skipped is None or not all(problem.where for problem in problems):
        if problems:
            raise CatalogError(uri, [str(problem) for problem in problems])
        return
    skipped += problems


def source_digest(title: Title, objects: Mapping[str, ObjectInfo | Unknown | None]) -> str:
    """Return the digest of a title's source objects, which changes when one of them is replaced."""
    uris = [title.video, *(text.uri for text in title.timed_text)]
    return _digest(uris, [objects.get(uri) for uri in uris])


def _digest(uris: Iterable[str], infos: Iterable[ObjectInfo | Unknown | None]) -> str:
    """Return digest_of([[URI, size, version], ...]); its text is made here, because a large catalog needs it for every title."""
    parts = [
        f"[{json.dumps(uri)},{info.size},{json.dumps(info.version)}]" if isinstance(info, ObjectInfo) else f"[{json.dumps(uri)},null,null]"
        for uri, info in zip(uris, infos, strict=True)
    ]
    return hashlib.sha256(f"[{','.join(parts)}]".encode()).hexdigest()[:SOURCE_DIGITS]


def _entry(
    title: Title, uris: Sequence[str], infos: Sequence[ObjectInfo | Unknown | None], position: int, duration_s: float | None = None
) -> Entry:
    """Return the entry of a title. ``uris``: its video and its timed text; ``infos``: what is known of them."""
    video = infos[0]
    size, modified = (video.size, video.modified) if isinstance(video, ObjectInfo) else (0, 0.0)
    unknown = [info for info in infos if isinstance(info, Unknown)]
    reason, is_transient = (unknown[0].reason, any(one.is_transient for one in unknown)) if unknown else ("", False)
    key = encode_title(title.title_id), _digest(uris, infos)
    return Entry(title, key, position, size, modified, duration_s, reason, is_transient)


# ----------------------------------------------------------------------------------------------------------- folders


def _open_folder(store: Store, scratch: Path, skipped: list[BadRow] | None) -> Catalog:
    entries: Partitions[Entry] = Partitions(scratch, "entries")
    titles = 0
    for entry in _read_folder(store, skipped):
        titles += 1
        entries.add(shard_of(entry.title.title_id), entry)
    return Catalog(titles, functools.partial(_entries_of_folder, entries))


def _entries_of_folder(entries: Partitions[Entry], shards: Sequence[int]) -> Iterator[Entry]:
    return (entry for shard in shards for entry in entries.read(shard))


def _read_folder(store: Store, skipped: list[BadRow] | None) -> Iterator[Entry]:
    """Yield the titles of a folder. The names of all its files are in memory, because any may belong to any title."""
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
    problems.extend(BadRow(name, problem) for stem, name in by_stem.items() for problem in problems_of_id(stem))
    _skip_or_raise(uri, problems, skipped)
    bad = {problem.title_id for problem in problems} | {problem.where for problem in problems}
    for position, (stem, name) in enumerate(by_stem.items()):
        if stem in bad or name in bad:
            continue
        metadata = found_metadata.get(stem, {})
        texts = sidecars.get(stem, [])
        title = Title(
            title_id=stem,
            video=join(uri, name),
            timed_text=tuple(TimedTextSource(join(uri, text), language, kind) for text, language, kind in texts),
            synopsis=metadata.get("synopsis", ""),
            tags=metadata.get("tags", ()),
        )
        files = [name, *(text for text, _, _ in texts)]
        yield _entry(title, [join(uri, file) for file in files], [objects[file] for file in files], position)


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


def _open_table(
    base: str, name: str, kind: str, config: StorageConfig, scratch: Path, skipped: list[BadRow] | None, workers: Workers
) -> Catalog:
    rows: Partitions[tuple[Any, ...]] = Partitions(scratch, "rows")
    unread: list[BadRow] = []
    path = Store(base, config).local_file(name, str(scratch))
    read = {"parquet": parquet_rows, "csv": csv_rows, "jsonl": jsonl_rows}[kind]
    try:
        for position, (where, row) in enumerate(read(path, unread)):
            checked = checked_row(position, where, row, base)
            rows.add(shard_of(checked.title_id or ""), tuple(checked))
    except OSError as error:
        raise StorageError(explain(error, f"{base}/{name}")) from error
    problems: list[tuple[int, BadRow]] = []
    keys: Partitions[str] = Partitions(scratch, "keys")
    titles = 0
    for shard in range(SHARDS):
        of_shard: set[str] = set()
        for good in _good_rows(rows.read(shard), problems):
            titles += 1
            of_shard.update(filter(None, map(_s3_key, good.uris)))
        keys.extend(shard, sorted(of_shard))
    bad = [*unread, *(problem for _, problem in sorted(problems, key=operator.itemgetter(0)))]
    if not titles and not bad:
        bad.append(BadRow("", "the table has no rows"))
    _skip_or_raise(f"{base}/{name}", bad, skipped)
    listed = _find(keys, config, scratch, workers)
    return Catalog(titles, functools.partial(_entries_of_table, rows, listed, config, defaultdict(_Server)))


def _entries_of_table(
    rows: Partitions[tuple[Any, ...]],
    listed: Partitions[Found],
    config: StorageConfig,
    servers: dict[str, _Server],
    shards: Sequence[int],
) -> Iterator[Entry]:
    good = [(row, row.uris) for shard in shards for row in _good_rows(rows.read(shard), [])]
    found = _look_up([uri for _, uris in good for uri in uris if not _s3_key(uri)], config, servers)
    in_buckets = {key: kind._make(values) for shard in shards for key, kind, values in listed.read(shard)}
    for row, uris in good:
        infos = [in_buckets.get(key) if (key := _s3_key(uri)) else found.get(uri) for uri in uris]
        yield _entry(row.title(), uris, infos, row.position, row.duration_s)


def _good_rows(rows: Iterable[tuple[Any, ...]], problems: list[tuple[int, BadRow]]) -> Iterator[Row]:
    """Yield the good Rows of a shard, the first of several with one id; append the problems of the others, with their places."""
    seen: dict[str, str] = {}
    for row in map(Row._make, rows):
        is_again = row.title_id in seen
        if is_again or row.problems:
            problems.extend((row.position, problem) for problem in row.bad_rows(seen))
        elif row.title_id is not None:
            yield row
        if row.title_id and row.title_id.strip():
            seen.setdefault(row.title_id, row.where)


def _s3_key(uri: str) -> str:
    """Return the bucket and the key of a URI of S3 as one path; empty for other URIs."""
    scheme, _, rest = uri.partition("://")
    return rest if scheme == "s3" or scheme.lower() == "s3" else ""


def _find(keys: Partitions[str], config: StorageConfig, scratch: Path, workers: Workers) -> Partitions[Found]:
    """Look up the objects of all shards with a few listings of each bucket; return those that exist, by shard.

    The keys of a shard are sorted, so that they can be merged to the order of the listings. Raises StorageError where a bucket gives no
    answer at all.
    """
    found: Partitions[Found] = Partitions(scratch, "listed")
    denied: dict[str, StorageError] = {}  # The last refusal of each bucket, which may be of some of its keys only.
    answered = set()
    for bucket, by_shard, refusal in workers.map(functools.partial(_find_part, config), _parts_of_buckets(keys), keys.rows):
        if refusal:
            denied[bucket] = refusal
        else:
            answered.add(bucket)
        for shard, of_shard in by_shard.items():
            found.extend(shard, of_shard)
    for bucket in denied.keys() - answered:
        raise denied[bucket]
    return found


def _parts_of_buckets(keys: Partitions[str]) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yield buckets, each with some of its keys, in order, and their shards."""

    def of_shard(shard: int) -> Iterator[tuple[str, int]]:
        return ((key, shard) for key in keys.read(shard))

    merged = heapq.merge(*map(of_shard, range(SHARDS)))
    for bucket, of_bucket in itertools.groupby(merged, key=lambda pair: pair[0].partition("/")[0]):
        while wanted := list(itertools.islice(of_bucket, KEYS_AT_ONCE)):
            yield bucket, wanted


def _find_part(
    config: StorageConfig, part: tuple[str, Sequence[tuple[str, int]]]
) -> tuple[str, Mapping[int, Sequence[Found]], StorageError | None]:
    """Look up keys of a bucket; return it, what was found by shard, and the error where looking up is not allowed."""
    bucket, wanted = part
    names = [key.partition("/")[2] for key, _ in wanted]
    denied = None
    try:
        there: Mapping[str, ObjectInfo | Unknown] = S3Objects(f"s3://{bucket}", config).find(names)
    except StorageError as error:
        if code_of(error) not in DENIED:
            raise
        denied = error
        there = dict.fromkeys(names, Unknown(str(error), is_transient=False))
    found: dict[int, list[Found]] = defaultdict(list)
    for name, (key, shard) in zip(names, wanted, strict=True):
        if info := there.get(name):
            found[shard].append((key, type(info), tuple(info)))
    return bucket, found, denied


def _look_up(uris: Sequence[str], config: StorageConfig, servers: dict[str, _Server]) -> dict[str, ObjectInfo | Unknown | None]:
    """Look up objects one by one, without opening them. An object that does not exist is None. ``servers``: what is known of them.

    Raises StorageError where a server gives no answer at all.
    """
    local = [uri for uri in uris if scheme_of(uri) == "file"]
    elsewhere = [uri for uri in uris if scheme_of(uri) != "file"]
    parts = [*_batched(local, PATHS_AT_ONCE), *_batched(elsewhere, 1)]

    def look_up(part: Sequence[str]) -> list[ObjectInfo | Unknown | None]:
        return [_info(uri, config, servers[_server_of(uri)]) for uri in part]

    with ThreadPoolExecutor(LOOK_UP_THREADS) as pool:
        infos = itertools.chain.from_iterable(pool.map(look_up, parts))
        return dict(zip([*local, *elsewhere], infos, strict=True))


def _batched(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


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
    is_local = scheme_of(uri) == "file"
    folder, _, name = ("", "", absolute(uri)[1:]) if is_local else uri.rpartition("/")
    try:
        found = (_files() if is_local else Store(folder, with_short_timeouts(config))).info(name)
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


@functools.cache
def _files() -> Store:
    """Return the store of all local files: making one for the folder of each takes longer than a look-up."""
    return Store("/")
