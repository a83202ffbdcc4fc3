"""Write the index of shots: add titles in groups, delete those that are gone, train, and publish the result."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from mediafm_ray.storage.index import (
    BLOCK_SHOTS,
    PUBLISHED,
    SETTINGS_KEY,
    IndexFacts,
    NoIndex,
    SearchParams,
    ShotIndex,
    contents_of,
    explained,
    lance_at,
    quoted,
    storage_options,
)
from mediafm_ray.storage.store import StorageConfig, Store

INDEX_TYPE = "IVF_PQ"
SHOTS_PER_PARTITION = 4096
BYTE_DIMS = (16, 8, 4, 2, 1)  # The product quantiser encodes so many dimensions as a byte: the first that divides the vector's.
TRAINING = {"max_iters": 10, "sample_rate": 64}  # k-means; Lance's defaults of 50 and 256 take ten times as long for the same recall
GROUP_BYTES = 256 << 20  # vectors in memory that are written as one file
SPARE_FILES = 16  # Files are merged when there are so many more than the rows need.
KEYS_PER_DELETION = 200  # titles and sources in one condition


class IndexWriter:
    """The latest version of an index and the operations of a build. Only the holder of the lease may use it."""

    def __init__(self, uri: str, config: StorageConfig):
        """Raises StorageError, and NoIndex where something else is at the URI."""
        self.store, self.config = Store(uri, config), config
        self.uri = self.store.uri
        self.lance: Any = lance_at(uri, config)
        if self.lance is None and (found := contents_of(uri, config)):
            raise NoIndex(f"{uri} has no index of shots, and it is not empty; there is: {found}: choose another index.uri")

    @property
    def index(self) -> ShotIndex | None:
        """The latest version, published or not; None before the first."""
        return None if self.lance is None else ShotIndex(self.uri, self.lance)

    def latest(self) -> ShotIndex:
        """Return the latest version of an index that has been created."""
        assert self.index is not None
        return self.index

    def published(self) -> bool:
        """Return True if the latest version is the published one."""
        with explained(self.uri):
            return self.lance is not None and self.lance.tags.list().get(PUBLISHED, {}).get("version") == self.lance.version

    def create(self, facts: IndexFacts) -> None:
        """Create an empty index; an existing one stays published until this one is."""
        import lance

        with explained(self.uri):
            options = storage_options(self.uri, self.config)
            mode = "create" if self.lance is None else "overwrite"
            self.lance = lance.write_dataset(facts.schema().empty_table(), self.uri, mode=mode, storage_options=options)

    def add(self, tables: Iterable[pa.Table]) -> int:
        """Add tables, each with the shots of a title, in groups; return the number of rows. A written group stays if the build dies."""
        group: list[pa.Table] = []
        bytes_waiting = added = 0
        for table in tables:
            group.append(table)
            bytes_waiting += table.nbytes
            added += len(table)
            if bytes_waiting >= GROUP_BYTES:
                self._append(group)
                group, bytes_waiting = [], 0
        if group:
            self._append(group)
        return added

    def _append(self, group: Sequence[pa.Table]) -> None:
        import lance

        with explained(self.uri):
            options = storage_options(self.uri, self.config)
            schema = self.lance.schema.remove_metadata()
            rows = pa.concat_tables([table.cast(schema) for table in group])
            self.lance = lance.write_dataset(rows, self.lance, mode="append", storage_options=options)

    def remove(self, keys: Sequence[tuple[str, str]]) -> None:
        """Remove the rows of these titles and sources."""
        with explained(self.uri):
            for begin in range(0, len(keys), KEYS_PER_DELETION):
                some = keys[begin : begin + KEYS_PER_DELETION]
                terms = [f"(title_id = {quoted(title_id)} AND source = {quoted(source)})" for title_id, source in some]
                self.lance.delete(" OR ".join(terms))

    def merge_files(self) -> bool:
        """Merge files where there are many more than the rows need, and drop deleted rows; return True if anything was done."""
        rows = max(1, GROUP_BYTES // (2 * sum(self.latest().facts.dims.values())))  # a number has 2 bytes
        with explained(self.uri):
            files = len(self.lance.get_fragments())
            if files <= self.lance.count_rows() // rows + SPARE_FILES:
                return False
            before = self.lance.version
            self.lance.optimize.compact_files(target_rows_per_fragment=rows, batch_size=BLOCK_SHOTS)
            return self.lance.version != before

    def train(self, column: str) -> SearchParams:
        """Train and fill the vector index of a column, and replace an existing one."""
        index = self.latest()
        shots = index.shots(column)
        dim = index.facts.dims[column]
        partitions = max(1, shots // SHOTS_PER_PARTITION)
        byte_dims = next(dims for dims in BYTE_DIMS if dim % dims == 0)
        with explained(self.uri):
            self.lance = self.lance.create_index(
                column,
                INDEX_TYPE,
                name=column,
                metric="cosine",
                replace=True,
                num_partitions=partitions,
                num_sub_vectors=dim // byte_dims,
                **TRAINING,
            )
        return SearchParams(trained_shots=shots, partitions=partitions)

    def index_titles(self) -> None:
        """Create an index on the title ids, so that the shots of a title are found without a full scan."""
        with explained(self.uri):
            self.lance.create_scalar_index("title_id", "BTREE", name="title_id", replace=True)

    def indexed(self) -> Sequence[str]:
        """List the columns that have an index."""
        with explained(self.uri):
            return [description.name for description in self.lance.describe_indices()]

    def drop(self, column: str) -> None:
        """Remove the index of a column."""
        with explained(self.uri):
            self.lance.drop_index(column)

    def index_new_rows(self) -> None:
        """Put rows that were added into the existing indexes without training them again."""
        with explained(self.uri):
            self.lance.optimize.optimize_indices()

    def record(self, settings: Mapping[str, SearchParams]) -> None:
        """Store the search parameters of each column."""
        values = {column: dataclasses.asdict(setting) for column, setting in settings.items()}
        with explained(self.uri):
            self.lance.update_schema_metadata({SETTINGS_KEY: json.dumps(values, sort_keys=True)})

    def publish(self) -> None:
        """Make the latest version the one that is searched."""
        with explained(self.uri):
            tag = self.lance.tags.update if PUBLISHED in self.lance.tags.list() else self.lance.tags.create
            tag(PUBLISHED, self.lance.version)

    def prune_versions(self, older_than_hours: float) -> None:
        """Delete versions before the published one that are old enough, with the files that only they need."""
        with explained(self.uri):
            self.lance.cleanup_old_versions(datetime.timedelta(hours=older_than_hours), error_if_tagged_old_versions=False)

    def size(self) -> int:
        """Return the bytes of all objects at the URI, older versions included."""
        return sum(info.size for info in self.store.list())
