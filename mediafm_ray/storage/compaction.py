"""Compaction: merge the objects of a shard, one a title, into one Parquet file. See merged.py for the file.

The ledger is, at every moment, the objects of titles, and the merged rows of titles without an object and without a mark of deletion
(``Output.list``). The steps of one shard, each of which leaves it as it was for every reader, however it is killed:

    1. List the objects, then the merged file and its marks.
    2. Write a new merged file, beside nothing: the rows of titles that have exactly one object come from it; marked rows are left
       out; all others are copied from the present file. Rows whose object a job has removed meanwhile are marked. Then it takes the
       present file's place in one step, if that is still there.
    3. Read its end back. Remove the marks that it has made needless.
    4. List the objects again. Rows whose object a job has removed since are marked.
    5. Remove objects whose rows a merged file has had for ``keep_s`` seconds.

A title with several objects is being replaced: it waits until the job that does so has removed the older ones. A job writes a title as
ever, and its object hides the merged rows until the next compaction.

A lease keeps compactions apart. One that was stopped for so long that it lost the lease finds another file than it expects, where the
store can tell (see ``Store.replace``). Where it cannot, ``keep_s`` must be longer than any request can be under way: an outdated merged
file may then appear, but every title that it lacks still has its object, and the next compaction merges it again. ``keep_s`` also
serves readers that listed the objects before they were removed. Times decide nothing else: a merged file has an object's rows if their
modification times are equal, and a clock that jumps only changes how long objects stay.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.storage import merged
from mediafm_ray.storage.dataset import EmbeddingDataset, dataset_schema
from mediafm_ray.storage.lease import Lease, LeaseLost
from mediafm_ray.storage.merged import MergedFile, MergedTitle, MergedWriter
from mediafm_ray.storage.names import object_key, object_name
from mediafm_ray.storage.schemas import read_facts
from mediafm_ray.storage.store import ObjectInfo, StorageError, Store
from mediafm_ray.text import PublicError

log = logging.getLogger(__name__)
THREADS = 16  # batches of objects of one shard that are read or removed at once
REMOVED_AT_ONCE = 250  # objects in a batch that is removed
BATCH_OBJECTS = 8  # A batch that is read ends with the object that reaches one of these: small ones cost less than handing them over.
BATCH_BYTES = 1 << 20


class NotMerged(PublicError):
    """An object that stays as it is; the message says why."""


@dataclass
class Compaction:
    """The result of a compaction of one or several shards."""

    files: int = 0  # merged files that were written
    titles: int = 0  # titles in merged files
    merged: int = 0  # ... whose rows were taken from their objects
    dropped: int = 0  # titles whose merged rows were left out
    removed: int = 0  # objects and marks that were removed
    waiting: int = 0  # titles with an object that is not merged yet
    read_bytes: int = 0  # of merged objects
    left: list[tuple[str, str]] = field(default_factory=list)  # objects that cannot be merged, with the reasons

    def add(self, other: Compaction) -> None:
        """Add the result of other shards."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def present_shards(dataset: EmbeddingDataset, name: str) -> list[str]:
    """List the shards of a dataset that have objects or a merged file, as two hex digits."""
    store = dataset.output.store
    places = (f"{store.uri}/{name}", f"{store.uri}/{merged.COMPACTED}/{name}")
    found = {folder for place in places for folder in Store(place, store.config).folders()}
    return sorted(folder.removeprefix("shard=") for folder in found if folder.startswith("shard="))


def compact_shard(
    dataset: EmbeddingDataset,
    name: str,
    shard: str,
    lease: Lease,
    min_titles: int = 1,
    keep_s: float = 0.0,
    scratch: Path | None = None,
) -> Compaction:
    """Compact one shard of the dataset ``name``. See the module.

    A merged file is written again only for ``min_titles`` titles that are new, replaced or deleted. ``scratch``: the folder that it is made
    in, by default the temporary one. Raises LeaseLost, MergedFileError, ReplacedMeanwhile and other errors of the store.
    """
    output, result = dataset.output, Compaction()
    objects = output.list_objects(name, f"shard={shard}/")
    compacted = output.list_compacted(name, f"shard={shard}/")
    old = merged.open_merged(output.store, merged.file_name(name, shard))
    try:
        present: Mapping[str, MergedTitle] = old.titles if old else {}
        gone: set[tuple[str, str]] = set()
        alone = _alone(objects)
        due = {title: info for title, info in alone.items() if not _holds(present.get(title), info)}
        dropped = {title for title, entry in present.items() if title not in alone and (title, entry.source) in compacted.marks}
        with_object = {title for title, _ in objects}
        result.waiting = len(with_object) - len(alone)
        if len(due) + len(dropped) < min_titles:
            result.waiting += len(due)
        elif due or dropped:
            present, gone = _write(dataset, name, shard, old, due, dropped, with_object, lease, scratch, result)
    finally:
        if old:
            old.close()
    result.titles = len(present)
    settled = _settle_marks(dataset, name, compacted.marks, present, alone, lease, result)
    merged_now = {object_key(info.name) for title, info in due.items() if _holds(present.get(title), info)}
    merged_now |= {(title, present[title].source) for title in settled}
    for title, source in merged_now - gone - output.list_objects(name, f"shard={shard}/").keys():
        output.mark_deleted(f"{name}/shard={shard}/{title}@{source}.parquet")
    oldest = lease.store_time() - keep_s
    spare = [info for title, info in alone.items() if _holds(present.get(title), info) and present[title].since <= oldest]
    held = {(title, source) for title, source in output.list_compacted(name, f"shard={shard}/").marks} if spare else set()
    spare = [info for info in spare if object_key(info.name) not in held]
    result.removed += _remove(dataset, spare, lease)
    return result


def _alone(objects: Mapping[tuple[str, str], list[ObjectInfo]]) -> dict[str, ObjectInfo]:
    """Return the object of every title that has exactly one."""
    found: dict[str, list[ObjectInfo]] = {}
    for (title, _), infos in objects.items():
        found.setdefault(title, []).extend(infos)
    return {title: infos[0] for title, infos in found.items() if len(infos) == 1}


def _holds(entry: MergedTitle | None, info: ObjectInfo) -> bool:
    """Return whether a merged file has the rows of an object."""
    return entry is not None and (entry.source, entry.modified) == (object_key(info.name)[1], info.modified)


def _write(
    dataset: EmbeddingDataset,
    name: str,
    shard: str,
    old: MergedFile | None,
    due: Mapping[str, ObjectInfo],
    dropped: set[str],
    with_object: set[str],
    lease: Lease,
    scratch: Path | None,
    result: Compaction,
) -> tuple[Mapping[str, MergedTitle], set[tuple[str, str]]]:
    """Write the merged file anew and read its end back; return its titles, and those that were deleted meanwhile and have a mark."""
    output, schema = dataset.output, dataset_schema(name, dataset.model.dims["fused"])
    present = old.titles if old else {}
    since = lease.store_time()
    titles = sorted({*present, *due} - dropped)
    taken: set[tuple[str, str]] = set()  # Titles and sources whose objects are merged.
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = os.path.join(folder, "titles.parquet")
        with MergedWriter(path, schema) as writer:
            contents = _read_ahead(output.store, [due[title] for title in titles if title in due])
            for title in titles:
                if title in due:
                    info = due[title]
                    rows = _rows(dataset, name, info, next(contents), schema)
                    if isinstance(rows, pa.Table):
                        writer.add(title, object_key(info.name)[1], info.modified, info.size, since, rows)
                        taken.add(object_key(info.name))
                        result.merged += 1
                        result.read_bytes += info.size
                        continue
                    if rows:
                        result.left.append((info.name, rows))
                if title in present:
                    assert old is not None
                    entry = present[title]
                    try:
                        kept = _old_rows(old, entry, schema)
                    except merged.MergedFileError:
                        if title in with_object:  # It hides these rows, and is merged later.
                            continue
                        raise
                    writer.add(title, entry.source, entry.modified, entry.size, entry.since, kept)
            writer.finish()
        if not lease.is_valid():
            raise LeaseLost(f"{output.store.uri}/{merged.file_name(name, shard)} was not replaced: the lease is lost")
        # Readers would see the rows of a title that was deleted meanwhile until this process looks again, after the file is there.
        gone = taken - output.list_objects(name, f"shard={shard}/").keys()
        for title, source in gone:
            merged.write_mark(output.store, name, shard, title, source)
        output.store.replace(merged.file_name(name, shard), path, old.info if old else None)
    new = merged.open_merged(output.store, merged.file_name(name, shard))
    if new is None or [*new.titles] != writer.listed["titles"]:
        raise StorageError(f"{output.store.uri}/{merged.file_name(name, shard)} is not the file that was just written: run it again")
    new.close()
    result.files += 1
    result.dropped += len(dropped)
    return new.titles, gone


def _rows(dataset: EmbeddingDataset, name: str, info: ObjectInfo, content: bytes | None, schema: pa.Schema) -> pa.Table | str:
    """Return the rows of an object that is to be merged; the reason where it cannot be, which is empty where a job has removed it."""
    if content is None:
        return ""
    try:
        return _conforming(_checked(dataset, name, info, content), schema)
    except NotMerged as error:
        return str(error)


def _checked(dataset: EmbeddingDataset, name: str, info: ObjectInfo, content: bytes) -> pa.Table:
    try:
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read(use_threads=False)
        facts = read_facts(table.schema)
        named = object_name(name, facts["title_id"], facts["source"])
        titles = table["title_id"].unique().to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise NotMerged(f"it is damaged ({reason}): mediafm verify verify.repair=true removes it") from error
    if named != info.name or facts.get("dataset_version") != dataset.version or titles != [facts["title_id"]]:
        raise NotMerged("it holds another title than its name says: mediafm verify verify.repair=true removes it")
    return table


def _conforming(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the rows with the columns of a schema. Raises NotMerged where that would change them."""
    found = table.schema
    if found.equals(schema):  # As a rule: the comparison of each column takes as long as reading the object.
        return table
    columns = []
    for column in schema:
        if column.name not in found.names and column.nullable:  # an older object
            columns.append(pa.chunked_array([pa.nulls(len(table), column.type)]))
        elif column.name not in found.names or found.field(column.name).type != column.type:
            raise NotMerged(f"its column {column.name} is not that of this version of mediafm_ray: it stays as it is")
        else:
            columns.append(table[column.name])
    if more := set(found.names) - set(schema.names):
        raise NotMerged(f"it has columns of a later version of mediafm_ray ({', '.join(sorted(more))}): it stays as it is")
    return pa.table(columns, schema=schema.with_metadata(found.metadata))


def _old_rows(old: MergedFile, entry: MergedTitle, schema: pa.Schema) -> pa.Table:
    try:
        return _conforming(old.rows(entry), schema)
    except Exception as error:  # Arrow's error depends on the damaged byte.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise merged.MergedFileError(
            f"{old.where} cannot be compacted, because title {entry.title} in it cannot be read ({reason}): run mediafm verify "
            "verify.repair=true"
        ) from error


def _settle_marks(
    dataset: EmbeddingDataset,
    name: str,
    marks: Mapping[tuple[str, str], list[ObjectInfo]],
    present: Mapping[str, MergedTitle],
    alone: Mapping[str, ObjectInfo],
    lease: Lease,
    result: Compaction,
) -> set[str]:
    """Remove the marks of rows that the merged file has not, or has again from a title's object; return the titles of the latter."""
    needless: list[ObjectInfo] = []
    again = set()
    for (title, source), infos in marks.items():
        entry = present.get(title)
        if entry is None or entry.source != source:
            needless += infos
        elif title in alone and _holds(entry, alone[title]) and dataset.output.store.info(alone[title].name) is not None:
            needless += infos
            again.add(title)
    result.removed += _remove(dataset, needless, lease)
    return again


def _remove(dataset: EmbeddingDataset, infos: Sequence[ObjectInfo], lease: Lease) -> int:
    def remove(batch: Sequence[ObjectInfo]) -> int:
        if not lease.is_valid():
            raise LeaseLost(f"{dataset.output.store.uri}: the lease of the compaction is lost; what it wrote stays")
        return dataset.output.store.delete_all_unless_newer(batch)

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(remove, [infos[start : start + REMOVED_AT_ONCE] for start in range(0, len(infos), REMOVED_AT_ONCE)]))


def _read_ahead(store: Store, infos: Iterable[ObjectInfo]) -> Iterator[bytes | None]:
    """Yield the content of each object, in order, read by threads that are only a few batches ahead; None where there is no such object.

    The caller parses it: threads that do so as well would wait for each other.
    """

    def read(batch: Sequence[ObjectInfo]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for info in batch:
            try:
                found.append(store.read(info.name))
            except FileNotFoundError:
                found.append(None)
        return found

    waiting: deque[Future[list[bytes | None]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in _batches(infos):
            waiting.append(pool.submit(read, batch))
            if len(waiting) > 2 * THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _batches(infos: Iterable[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
    batch: list[ObjectInfo] = []
    for info in infos:
        batch.append(info)
        if len(batch) == BATCH_OBJECTS or sum(one.size for one in batch) >= BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch
