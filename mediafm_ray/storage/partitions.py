"""Items by partition and tables in order, in memory while they are few and in temporary files where they are many."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mediafm_ray.storage.errors import StorageError, explain

MAX_ROWS_IN_MEMORY = 200_000  # Rows of all partitions together that wait in memory; beyond that, all go to files.
ITEMS_PER_PICKLE = 1000  # Items of a file that are read together.
ROWS_PER_TABLE = 100_000  # Rows of a sorted table that are in memory at once.
RANK = "rank"  # Column with the place of a row in the order.
ABANDONED_AFTER_S = 3600.0  # A younger folder may belong to a process that has not locked it yet.

Item = TypeVar("Item")


class Partitions(Generic[Item]):
    """Items by the number of their partition, in the order in which they came. Several threads may add.

    ``folder``: a temporary folder; ``name``: the beginning of the names of the files in it. Pickled, all its items are in files.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.rows = 0
        self._waiting: dict[int, list[Item]] = defaultdict(list)
        self._waiting_rows = 0
        self._written: set[int] = set()  # Partitions with a file.
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._write()
            return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def add(self, partition: int, item: Item, rows: int = 1) -> None:
        """Append an item that counts as so many rows. Raises StorageError where the temporary folder does not take it."""
        self._extend(partition, [item], rows)

    def extend(self, partition: int, items: Sequence[Item]) -> None:
        """Append items that count as a row each. Raises StorageError where the temporary folder does not take them."""
        self._extend(partition, items, len(items))

    def _extend(self, partition: int, items: Sequence[Item], rows: int) -> None:
        with self._lock:
            self._waiting[partition] += items
            self.rows += rows
            self._waiting_rows += rows
            if self._waiting_rows > MAX_ROWS_IN_MEMORY:
                self._write()

    def take(self, other: Partitions[Item]) -> None:
        """Take the items of another one with the same name, which has no partition that this one has. Raises as ``extend`` does."""
        with self._lock:
            self._written |= other._written
            self.rows += other.rows - other._waiting_rows
        for partition, items in other._waiting.items():
            self.extend(partition, items)

    def read(self, partition: int) -> Iterator[Item]:
        """Yield the items of a partition, of which some are in memory, and no file stays open."""
        path = self._path(partition)
        end = path.stat().st_size if partition in self._written else 0
        position = 0
        while position < end:
            with path.open("rb") as stream:
                stream.seek(position)
                items = pickle.load(stream)
                position = stream.tell()
            yield from items
        yield from self._waiting.get(partition, ())

    def _write(self) -> None:
        for partition, items in self._waiting.items():
            path = self._path(partition)
            try:
                # The first items of a partition replace those that a killed process has left.
                with path.open("ab" if partition in self._written else "wb") as stream:
                    for start in range(0, len(items), ITEMS_PER_PICKLE):
                        pickle.dump(items[start : start + ITEMS_PER_PICKLE], stream, pickle.HIGHEST_PROTOCOL)
            except OSError as error:
                raise full(path, error) from error
            self._written.add(partition)
        self._waiting.clear()
        self._waiting_rows = 0

    def _path(self, partition: int) -> Path:
        return self.folder / f"{self.name}-{partition}"


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """Provide a temporary folder, which its process keeps locked. Remove those of the same purpose that killed processes have left."""
    prefix = f"mediafm-{purpose}-"
    _remove_abandoned(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # A file system without locks: then nobody can lock it to remove it, either.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(folder)
        finally:
            os.close(descriptor)


def _remove_abandoned(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # It is another user's, in use, or just being removed.
            if time.time() - folder.stat().st_mtime < ABANDONED_AFTER_S:
                continue
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def full(path: Path, error: OSError) -> StorageError:
    """Return the error of a temporary file that cannot be written."""
    return StorageError(f"{explain(error, str(path))}; a large catalog is planned in temporary files: set TMPDIR to a folder with room")


class SortedTables:
    """Rows of tables in an order of their own: the columns that decide it stay in memory.

    ``order``: names of columns, each with ``ascending`` or ``descending``; rows that are equal in all of them stay as they came.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema, order: Sequence[tuple[str, str]]):
        self.folder, self.name, self.schema, self.order = folder, name, schema, order
        self._tables: Partitions[pa.Table] = Partitions(folder, name)
        self._keys: list[pa.Table] = []

    def __len__(self) -> int:
        return sum(keys.num_rows for keys in self._keys)

    def add(self, table: pa.Table) -> None:
        """Add the rows of a table of the schema."""
        if table.num_rows:
            self._tables.add(len(self._keys), table, table.num_rows)
            self._keys.append(table.select([column for column, _ in self.order]))

    def read(self, chosen: slice = slice(None)) -> pa.Table:
        """Return the chosen rows in order. A table of more than ROWS_PER_TABLE rows is a temporary file that is mapped into memory."""
        if not self._keys:
            return self.schema.empty_table()
        indices = pc.sort_indices(pa.concat_tables(self._keys), sort_keys=list(self.order)).to_numpy()[chosen]
        parts = Partitions[pa.Table](self.folder, f"{self.name}-ranked")
        for number, table in self._ranked(indices):
            parts.add(number, table, table.num_rows)
        count = -(-len(indices) // ROWS_PER_TABLE)
        tables = (pa.concat_tables(parts.read(number)).sort_by(RANK).drop_columns([RANK]) for number in range(count))
        if count <= 1:
            return next(tables, self.schema.empty_table())
        return _mapped(self.folder / f"{self.name}.arrow", self.schema, tables)

    def _ranked(self, indices: np.ndarray) -> Iterator[tuple[int, pa.Table]]:
        """Yield the rows with their ranks, in parts that each belong to one of the tables of the result, and the number of that."""
        rank_of = np.full(len(self), -1, np.int64)
        rank_of[indices] = np.arange(len(indices))
        bounds = np.arange(0, len(indices) + ROWS_PER_TABLE, ROWS_PER_TABLE)
        for source, ranks in enumerate(np.split(rank_of, np.cumsum([keys.num_rows for keys in self._keys])[:-1])):
            rows = np.argsort(ranks, kind="stable")[np.count_nonzero(ranks < 0) :]
            if not len(rows):
                continue
            (table,) = self._tables.read(source)
            starts = np.searchsorted(ranks[rows], bounds)
            for number in np.flatnonzero(np.diff(starts)):
                part = rows[starts[number] : starts[number + 1]]  # A slice of the table would be written with the whole of it.
                yield int(number), table.take(part).append_column(RANK, pa.array(ranks[part]))


def _mapped(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.Table:
    """Write tables to a file; return it as one table, which stays when the file is removed."""
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for table in tables:
                writer.write_table(table, max_chunksize=ROWS_PER_TABLE)
    except OSError as error:
        raise full(path, error) from error
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
