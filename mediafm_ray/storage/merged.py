"""Merged files: the titles of one shard of a dataset in one Parquet file, sorted by title, as compaction.py writes them.

    <dataset version>/compacted/<dataset>/shard=<00..ff>/titles.parquet
    <dataset version>/compacted/<dataset>/shard=<00..ff>/_deleted/<title>@<source>.<16 hex digits>.json

The rows are those of the titles' own objects, with two more columns: ``encoded_title``, the title in the names of objects, and ``facts``,
the JSON that a title's own object has as metadata, in the first row of each title. A title lies in one row group. The end of the file
lists the titles, so that a listing reads no rows.

A mark below ``_deleted`` says that the rows of a title and source count no longer; the next compaction leaves them out.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.errors import TitleError
from mediafm_ray.spec import parse_json
from mediafm_ray.storage.schemas import METADATA_KEY, parquet_options
from mediafm_ray.storage.store import ObjectInfo, StorageError, Store

COMPACTED = "compacted"
ENCODED_TITLE, FACTS = "encoded_title", "facts"  # the columns that only merged files have
LISTED_KEY = b"mediafm_ray_titles"  # in the file's key-value metadata
FORMAT = 1
MIN_GROUP_ROWS = 2048  # Row groups end with the first title that reaches these rows or bytes.
MIN_GROUP_BYTES = 64 << 20
MIN_COPIED_BYTES = 1 << 20  # Titles of so many bytes are copied into one table before they are written.
MAX_OPEN_FILES = 8  # merged files that are kept open for reading, by one Output
MAX_CACHED_GROUPS = 2  # row groups that each of them keeps decoded
READ_ATTEMPTS = 3  # A file may be replaced while it is read.
FILE_PATTERN = re.compile(r"compacted/(?P<dataset>[^/]+)/shard=(?P<shard>[0-9a-f]{2})/titles\.parquet")
MARK_PATTERN = re.compile(r"compacted/[^/]+/shard=[0-9a-f]{2}/_deleted/(?P<title>[^/@]+)@(?P<source>[^/@.]+)\.[0-9a-f]+\.json")


class MergedFileError(StorageError):
    """A merged file that cannot be read. The message names it and says what to do."""


class LaterFormat(MergedFileError):
    """A merged file of a later version of this program, which is not broken."""


class DamagedRows(TitleError):
    """Rows of a title in a merged file that cannot be read."""


@dataclass(frozen=True, slots=True)
class MergedTitle:
    """One title of a merged file, as its end lists it."""

    title: str  # as in the names of objects
    source: str
    modified: float  # modification time of the object that its rows come from, seconds since the epoch
    size: int  # bytes of that object
    since: float  # the store's time when a merged file with these rows was first written
    group: int  # row group
    start: int  # first row in it
    rows: int


def file_name(dataset: str, shard: str) -> str:
    """Return the name of a merged file below the dataset version. ``shard``: two hex digits."""
    return f"{COMPACTED}/{dataset}/shard={shard}/titles.parquet"


def write_mark(store: Store, dataset: str, shard: str, title: str, source: str) -> str:
    """Write a mark of deletion; return its name. Every mark has its own, so that removing one removes no later one."""
    name = f"{COMPACTED}/{dataset}/shard={shard}/_deleted/{title}@{source}.{secrets.token_hex(8)}.json"
    store.write(name, b"{}\n")
    return name


def merged_schema(schema: pa.Schema) -> pa.Schema:
    """Return the columns of a merged file of a dataset with the columns ``schema``."""
    return schema.append(pa.field(ENCODED_TITLE, pa.string(), nullable=False)).append(pa.field(FACTS, pa.string()))


# -------------------------------------------------------------------------------------------------------------- reading


class MergedFile:
    """One version of a merged file, open for reading. Threads may share it.

    A replaced file is read on: a local one is held open, and object storage refuses ranges of another version.
    """

    def __init__(self, store: Store, info: ObjectInfo):
        """Read the list of titles. Raises LaterFormat, and pyarrow's errors, OSError or ValueError where the file is damaged."""
        self.name, self.info, self.where = info.name, info, f"{store.uri}/{info.name}"
        path = store.path(info.name)
        store.filesystem.invalidate_cache(path.rpartition("/")[0])  # It may know the size of the file that this one replaced.
        options = {} if store.is_local else {"cache_type": "none"}  # pyarrow asks for whole ranges.
        self.stream = store.filesystem.open(path, "rb", **options)
        try:
            self.file = pq.ParquetFile(self.stream, page_checksum_verification=True)
            self.titles = self._listed()
        except BaseException:
            self.stream.close()
            raise
        self.columns = [name for name in self.file.schema_arrow.names if name not in (ENCODED_TITLE, FACTS)]
        self.lock = threading.Lock()
        self.groups: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()

    def _listed(self) -> dict[str, MergedTitle]:
        listed = parse_json(zlib.decompress(base64.b64decode(self.file.metadata.metadata[LISTED_KEY], validate=True)))
        if listed["format"] != FORMAT:
            raise LaterFormat(
                f"{self.where} was written by a later version of mediafm_ray (format {listed['format']}, this one reads {FORMAT}): "
                "update this installation"
            )
        found: dict[str, MergedTitle] = {}
        group = start = 0
        sizes = [self.file.metadata.row_group(number).num_rows for number in range(self.file.metadata.num_row_groups)]
        names = ("titles", "sources", "modified", "sizes", "since", "rows")
        for title, source, modified, size, since, rows in zip(*(listed[name] for name in names), strict=True):
            if start == sizes[group]:
                group, start = group + 1, 0
            found[title] = MergedTitle(title, source, modified, size, since, group, start, rows)
            start += rows
        if found and (start != sizes[group] or group != len(sizes) - 1):
            raise ValueError("its list of titles does not agree with its row groups")
        return found

    def close(self) -> None:
        """Close the file."""
        self.stream.close()

    def rows(self, title: MergedTitle, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the rows of a title, by default with all columns of its dataset, and its facts as metadata, as its own object has them.

        Raises pyarrow's errors, OSError or ValueError where they cannot be read.
        """
        wanted = tuple(self.columns if columns is None else [name for name in columns if name in self.columns])
        rows = self._group(title.group, (*wanted, ENCODED_TITLE, FACTS)).slice(title.start, title.rows)
        facts = rows[FACTS][0].as_py()
        if rows[ENCODED_TITLE][0].as_py() != title.title or facts is None:
            raise ValueError(f"row {title.start} of row group {title.group} is not the first one of {title.title}")
        return rows.select(wanted).replace_schema_metadata({METADATA_KEY: facts.encode()})

    def _group(self, group: int, columns: tuple[str, ...]) -> pa.Table:
        with self.lock:
            key = group, columns
            if key in self.groups:
                self.groups.move_to_end(key)
            else:
                self.groups[key] = self.file.read_row_group(group, columns=list(columns), use_threads=False)
                while len(self.groups) > MAX_CACHED_GROUPS:
                    self.groups.popitem(last=False)
            return self.groups[key]


def open_merged(store: Store, name: str) -> MergedFile | None:
    """Open a merged file; None where there is none. Raises MergedFileError where it cannot be read."""
    for attempt in range(1, READ_ATTEMPTS + 1):
        info = store.info(name)
        if info is None:
            return None
        try:
            return MergedFile(store, info)
        except LaterFormat:
            raise
        except Exception as error:  # Arrow's and fsspec's implementations raise many types.
            if attempt < READ_ATTEMPTS and store.info(name) != info:
                continue
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise MergedFileError(
                f"{store.uri}/{name} cannot be read ({reason}): its titles are not counted as missing, so nothing is planned; "
                "try again, or run mediafm verify, which tells and repairs damage"
            ) from error
    raise AssertionError("the last attempt returns or raises")


class MergedFiles:
    """The merged files of a dataset version, of which the last used ones stay open. Threads may share it, and it can be pickled."""

    def __init__(self, store: Store):
        self.store = store
        self.lock = threading.Lock()
        self.open: OrderedDict[str, MergedFile] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return MergedFiles, (self.store,)

    def rows(self, dataset: str, shard: str, title: str, source: str, columns: Sequence[str] | None = None) -> pa.Table | None:
        """Read the rows of a title; None where the merged file does not have it from this source. Raises MergedFileError, DamagedRows.

        The rows of a title and source never change, so an older version of the file is as good as the present one.
        """
        name = file_name(dataset, shard)
        for attempt in range(1, READ_ATTEMPTS + 1):
            file = self._file(name, title, source)
            if file is None:
                return None
            try:
                return file.rows(file.titles[title], columns)
            except Exception as error:  # Arrow's error depends on the damaged byte.
                self._forget(file)
                if attempt < READ_ATTEMPTS and self.store.info(name) != file.info:
                    continue
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise DamagedRows(f"its rows in {file.where} cannot be read ({reason}): run mediafm verify verify.repair=true") from error
        raise AssertionError("the last attempt returns or raises")

    def _file(self, name: str, title: str, source: str) -> MergedFile | None:
        """Return an open file that has the title from this source."""
        with self.lock:
            file = self.open.get(name)
            if file is None or not _has(file, title, source):
                file = open_merged(self.store, name)
                self.open.pop(name, None)  # Another thread may still read it.
                if file is None:
                    return None
                self.open[name] = file
                if len(self.open) > MAX_OPEN_FILES:
                    self.open.popitem(last=False)
            self.open.move_to_end(name)
            return file if _has(file, title, source) else None

    def _forget(self, file: MergedFile) -> None:
        with self.lock:
            if self.open.get(file.name) is file:
                del self.open[file.name]


def _has(file: MergedFile, title: str, source: str) -> bool:
    return title in file.titles and file.titles[title].source == source


# -------------------------------------------------------------------------------------------------------------- writing


class MergedWriter:
    """Writes a merged file to a local path, title by title in the order of their encoded names. Memory holds one row group."""

    def __init__(self, path: str, schema: pa.Schema):
        """``schema``: the columns of the dataset."""
        self.schema = merged_schema(schema)
        self.file = pq.ParquetWriter(path, self.schema, **parquet_options(self.schema))
        self.added: list[pa.Table] = []  # titles that are not copied into one table yet, and what their two columns will hold
        self.added_titles: list[str] = []
        self.added_facts: list[str | None] = []
        self.added_bytes = 0  # of their objects
        self.pending: list[pa.Table] = []
        self.pending_rows = self.pending_bytes = 0
        self.listed: dict[str, list[Any]] = {name: [] for name in ("titles", "sources", "modified", "sizes", "since", "rows")}

    def __enter__(self) -> MergedWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def add(self, title: str, source: str, modified: float, size: int, since: float, rows: pa.Table) -> None:
        """Add a title. ``rows``: its columns, in order, with its facts as metadata; the other arguments as in MergedTitle."""
        self.added.append(rows)
        self.added_titles += [title] * len(rows)
        self.added_facts += [rows.schema.metadata[METADATA_KEY].decode(), *[None] * (len(rows) - 1)]
        self.added_bytes += size
        self.pending_rows += len(rows)
        for name, value in zip(self.listed, (title, source, modified, size, since, len(rows)), strict=True):
            self.listed[name].append(value)
        if self.added_bytes >= MIN_COPIED_BYTES:
            self._copy()
        if self.pending_rows >= MIN_GROUP_ROWS or self.pending_bytes >= MIN_GROUP_BYTES:
            self._write_group()

    def finish(self) -> None:
        """Write the last row group and the list of titles."""
        self._write_group()
        self.file.add_key_value_metadata({LISTED_KEY.decode(): encode_list({"format": FORMAT, **self.listed}).decode()})

    def _copy(self) -> None:
        """Copy the added titles into one table: writing many small ones, and counting their bytes, takes longer."""
        if self.added:
            rows = pa.concat_tables(self.added)
            for name, values in ((ENCODED_TITLE, self.added_titles), (FACTS, self.added_facts)):
                rows = rows.append_column(self.schema.field(name), pa.array(values, pa.string()))
            self.pending.append(rows.combine_chunks())
            self.pending_bytes += self.pending[-1].nbytes
            self.added, self.added_titles, self.added_facts, self.added_bytes = [], [], [], 0

    def _write_group(self) -> None:
        self._copy()
        if self.pending:
            self.file.write_table(pa.concat_tables(self.pending), row_group_size=self.pending_rows)
            self.pending, self.pending_rows, self.pending_bytes = [], 0, 0


def encode_list(listed: Mapping[str, Any]) -> bytes:
    """Encode the list of titles at the end of a merged file."""
    return base64.b64encode(zlib.compress(json.dumps(listed, separators=(",", ":")).encode()))
