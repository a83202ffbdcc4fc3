"""Functions that list, write and read the objects of an output. Their names, and the layout, are in names.py."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.spec import MODALITIES, parse_json
from mediafm_ray.storage import merged
from mediafm_ray.storage.merged import COMPACTED, ENCODED_TITLE, READ_ATTEMPTS, MergedFiles
from mediafm_ray.storage.names import (
    DATASET_PATTERN,
    FAILURES,
    MODEL,
    OBJECT_PATTERN,
    SCENES,
    SHOTS,
    TITLES,
    VERSION_PATTERN,
    encode_title,
    object_key,
    object_name,
)
from mediafm_ray.storage.schemas import (
    contextual_schema,
    embedding_values,
    encode_parquet,
    read_facts,
    scenes_schema,
    shots_schema,
    titles_schema,
)
from mediafm_ray.storage.store import ObjectInfo, StorageConfig, Store
from mediafm_ray.text import PublicError

if TYPE_CHECKING:
    import pyarrow.dataset as pads

log = logging.getLogger(__name__)

LISTING_THREADS = 16  # merged files whose ends are read at once
MAX_DIM = 1 << 31  # Arrow counts the elements of a fixed-size list with 32 bits.

Objects = dict[tuple[str, str], list[ObjectInfo]]  # by encoded title and source


class DatasetError(PublicError):
    """A dataset that is missing or not the one that was asked for; the message says what exists instead."""


@dataclass(frozen=True)
class Model:
    """The content of ``model.json``: everything that decides the numbers of a dataset version."""

    dataset_version: str  # 12 hex digits
    recipe: Mapping[str, Any]  # input of the version's digest: configuration that changes the numbers, digests of weights
    dims: Mapping[str, int]  # video, audio, text, fused
    spans: Mapping[str, tuple[int, int]]  # modality -> [start, end) in a fused embedding

    def to_json(self) -> bytes:
        """Return the bytes of model.json."""
        content = {
            "dataset_version": self.dataset_version,
            "recipe": self.recipe,
            "dims": dict(self.dims),
            "spans": {name: list(span) for name, span in self.spans.items()},
        }
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> Model:
        """Parse model.json. Raises ValueError for any other content."""
        fields = parse_json(content)
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        version, recipe, dims, spans = (fields.get(name) for name in ("dataset_version", "recipe", "dims", "spans"))
        if not isinstance(version, str) or not isinstance(recipe, dict):
            raise ValueError("it lacks its dataset_version or its recipe")
        if not isinstance(dims, dict) or not all(
            type(dims.get(name)) is int and 0 < dims[name] < MAX_DIM for name in (*MODALITIES, "fused")
        ):
            raise ValueError(f"its dims are not those of {', '.join(MODALITIES)} and fused")
        if not isinstance(spans, dict) or spans.keys() != set(MODALITIES) or not all(map(is_span, spans.values())):
            raise ValueError(f"its spans are not those of {', '.join(MODALITIES)}")
        return cls(version, recipe, dims, {name: (span[0], span[1]) for name, span in spans.items()})


def is_span(value: Any) -> bool:
    """Return True for a list [start, end] that can be the span of a modality in a fused embedding."""
    return isinstance(value, list) and [type(end) for end in value] == [int, int] and 0 <= value[0] <= value[1] < MAX_DIM


def dataset_schema(name: str, fused_dim: int) -> pa.Schema:
    """Return the columns of a dataset of rows. ``fused_dim``: dimension of a fused embedding."""
    kind = name.split("-")[0]
    if kind == SCENES:
        return scenes_schema()
    if kind == TITLES:
        return titles_schema(fused_dim)
    return shots_schema(fused_dim) if kind == SHOTS else contextual_schema(fused_dim)


@dataclass
class Compacted:
    """The merged files of a dataset, and its marks of deletion, from one (paged) listing."""

    files: list[ObjectInfo] = field(default_factory=list)
    marks: dict[tuple[str, str], list[ObjectInfo]] = field(default_factory=dict)  # by encoded title and source


class Output:
    """One dataset version below an output URI, for the jobs that write it."""

    def __init__(self, uri: str, dataset_version: str, config: StorageConfig | None = None):
        self.store = Store(f"{uri.rstrip('/')}/{dataset_version}", config)
        self.dataset_version = dataset_version
        self.merged = MergedFiles(self.store)

    def list(self, dataset: str, shard: str = "") -> Objects:
        """List the committed objects of a dataset, or of one shard of it, by encoded title and source.

        Titles in merged files are among them, as the objects that their rows come from. Objects are listed before the merged files: a
        title that is merged meanwhile is seen once. Raises MergedFileError where a merged file cannot be read.
        """
        found = self.list_objects(dataset, shard)
        if dataset == FAILURES:
            return found
        with_object = {title for title, _ in found}
        compacted = self.list_compacted(dataset, shard)

        def listed(info: ObjectInfo) -> Sequence[tuple[tuple[str, str], ObjectInfo]]:
            file = merged.open_merged(self.store, info.name)
            if file is None:  # A repair has removed it.
                return []
            file.close()
            folder = info.name.split("/")[2]
            return [
                (
                    key,
                    ObjectInfo(f"{dataset}/{folder}/{title.title}@{title.source}.parquet", title.size, "", title.modified, is_merged=True),
                )
                for title in file.titles.values()
                if title.title not in with_object and (key := (title.title, title.source)) not in compacted.marks
            ]

        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            for entries in pool.map(listed, compacted.files):
                found.update((key, [info]) for key, info in entries)
        return found

    def list_objects(self, dataset: str, shard: str = "") -> Objects:
        """List the objects that titles have of their own, in one (paged) listing; see ``list``."""
        found: Objects = {}
        for info in self.store.list(f"{dataset}/{shard}"):
            match = OBJECT_PATTERN.fullmatch(info.name.removeprefix(f"{dataset}/"))
            if match:
                found.setdefault((match["title"], match["source"]), []).append(info)
        return found

    def list_compacted(self, dataset: str, shard: str = "") -> Compacted:
        """List the merged files of a dataset, or of one shard of it, and its marks of deletion."""
        found = Compacted()
        for info in self.store.list(f"{COMPACTED}/{dataset}/{shard}"):
            if merged.FILE_PATTERN.fullmatch(info.name):
                found.files.append(info)
            elif match := merged.MARK_PATTERN.fullmatch(info.name):
                found.marks.setdefault((match["title"], match["source"]), []).append(info)
        return found

    def marked_titles(self, compacted: Compacted) -> set[str]:
        """Return the encoded titles whose rows in merged files count no longer because of a mark.

        A marked title that its file does not have is one of them: a compaction at work may have read its object before it was deleted, and
        put the file that has it in the place of this one before a reader comes to it.
        """
        shards = {info.name.split("/")[2] for infos in compacted.marks.values() for info in infos}
        found = {title for title, _ in compacted.marks}
        for info in compacted.files:
            if info.name.split("/")[2] in shards and (file := merged.open_merged(self.store, info.name)):
                file.close()
                found -= {title.title for title in file.titles.values() if (title.title, title.source) not in compacted.marks}
        return found

    def datasets(self) -> Sequence[str]:
        """List the names of the datasets: shots, contextual-<checkpoint>, scenes-..., titles-..., failures."""
        names = set(self.store.folders())
        if COMPACTED in names:
            names |= set(Store(f"{self.store.uri}/{COMPACTED}", self.store.config).folders())
        return sorted(name for name in names if DATASET_PATTERN.fullmatch(name))

    def read(self, name: str) -> bytes:
        """Read a title's object, or write the same bytes anew from the rows of a merged file.

        Raises FileNotFoundError, MergedFileError, DamagedRows.
        """
        try:
            return self.store.read(name)
        except FileNotFoundError:
            table = self._merged_rows(name)
            return encode_parquet(table, read_facts(table.schema))

    def table(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Read some columns of a title, which may be none, and its facts as metadata, without the rest of the object.

        Raises FileNotFoundError, MergedFileError, DamagedRows, and pyarrow's errors where the object is not a Parquet file.
        """
        try:
            with self.store.filesystem.open(self.store.path(name), "rb") as stream:
                return pq.ParquetFile(stream, page_checksum_verification=True).read(list(columns))
        except FileNotFoundError:
            return self._merged_rows(name, columns)

    def _merged_rows(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        (title, source), (dataset, shard, _) = object_key(name), name.split("/")
        rows = None
        if dataset != FAILURES:
            rows = self.merged.rows(dataset, shard.removeprefix("shard="), title, source, columns)
        if rows is None:
            raise FileNotFoundError(f"{self.store.uri}/{name}")
        return rows

    def facts(self, name: str) -> dict[str, Any]:
        """Read a title's facts, which needs little more than the end of its object. Raises as ``table`` does."""
        return read_facts(self.table(name, []).schema)

    def has(self, name: str) -> bool:
        """Return whether a title's object exists, or a merged file has its rows."""
        if self.store.info(name) is not None:
            return True
        try:
            return self._merged_rows(name, []) is not None
        except FileNotFoundError:
            return False

    def remove(self, name: str, modified: float = math.inf) -> bool:
        """Remove a title's object, unless it was written after ``modified``, and let rows of it in a merged file count no longer.

        Returns whether there was anything to remove. The mark is written before the object is removed, so that the title cannot come back
        from the merged file, and looked at again afterwards, because a compaction at work may have read the object before.
        """
        mark = self.mark_deleted(name)
        removed = self.store.delete_unless_newer(name, modified)
        if not mark or self.store.info(mark) is None:
            mark = self.mark_deleted(name)
        return removed or bool(mark)

    def mark_deleted(self, name: str) -> str:
        """Let the rows of a title's object in a merged file count no longer; return the mark's name, empty without a merged file."""
        (title, source), (dataset, folder, _) = object_key(name), name.split("/")
        shard = folder.removeprefix("shard=")
        if dataset == FAILURES or self.store.info(merged.file_name(dataset, shard)) is None:
            return ""
        return merged.write_mark(self.store, dataset, shard, title, source)

    def write_model(self, model: Model) -> None:
        """Write model.json; the same version always has the same bytes."""
        self.store.write(MODEL, model.to_json())

    def write(self, dataset: str, title_id: str, source: str, content: bytes) -> str:
        """Write a title's object; return its name."""
        name = object_name(dataset, title_id, source)
        self.store.write(name, content)
        return name


def record_failure(output: Output, name: str, title: Mapping[str, Any], error: Mapping[str, Any]) -> None:
    """Write the failure record of that name and count the attempt, unless an outage caused the error.

    ``title``: fields that describe the title; ``error``: fields that describe the error.
    """
    try:
        attempts = parse_failure(output.store.read(name))["attempts"]
    except (FileNotFoundError, ValueError):  # ValueError: the object is not a failure record and is replaced.
        attempts = 0
    record = {
        **title,
        **{key: value for key, value in error.items() if value},
        "attempts": attempts + (not error.get("outage")),
        "dataset_version": output.dataset_version,
    }
    output.store.write(name, (json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


# ------------------------------------------------------------------------------------------------------- reading back


def dataset_versions(uri: str, config: StorageConfig | None = None) -> list[str]:
    """List the dataset versions below an output URI."""
    return [name for name in Store(uri, config).folders() if VERSION_PATTERN.fullmatch(name)]


class EmbeddingDataset:
    """The committed datasets of one dataset version: the newest object of every title.

    ``version`` may be left out where the output has only one. Raises DatasetError where it has none, or several.
    """

    def __init__(self, uri: str, version: str | None = None, config: StorageConfig | None = None):
        versions = dataset_versions(uri, config)
        if version is None and len(versions) > 1:
            raise DatasetError(
                f"{uri} has {len(versions)} dataset versions, whose numbers differ: pass version= one of {', '.join(versions)}"
            )
        if not versions or (version is not None and version not in versions):
            there = f"there are: {', '.join(versions)}" if versions else "there is none; has a job written here?"
            raise DatasetError(f"{uri} has no dataset version{f' {version}' if version else ''}: {there}")
        self.output = Output(uri, version or versions[0], config)
        try:
            self.model = Model.from_json(self.output.store.read(MODEL))
        except (FileNotFoundError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DatasetError(f"{self.output.store.uri}/{MODEL} cannot be read ({reason}): embedding any title again writes it") from error

    @property
    def version(self) -> str:
        """The dataset version: 12 hex digits."""
        return self.output.dataset_version

    def dataset(self, name: str = SHOTS) -> pads.Dataset:
        """Return a pyarrow dataset of the newest object of every title, with the Hive partition ``shard``.

        Where there are merged files it also has the column ``encoded_title``, null for titles with an object of their own, and leaves
        out the merged rows of those titles, whenever it is scanned: a title that is merged meanwhile is seen once.
        Raises DatasetError where nothing of that name is committed.
        """
        import pyarrow.dataset as pads  # It imports pandas, which takes a third of the time of --help.

        objects = self.output.list_objects(name)
        compacted = self.output.list_compacted(name)  # after the objects, see Output.list
        files = [*newest_objects(objects), *compacted.files]
        if not files:
            raise DatasetError(f"{self.output.store.uri} has no committed object of {name}; there are: {', '.join(self.names()) or 'none'}")
        store = self.output.store
        store.prime_listing_cache(files)
        schema = dataset_schema(name, self.model.dims["fused"]).append(pa.field("shard", pa.string()))
        if compacted.files:
            schema = schema.append(pa.field(ENCODED_TITLE, pa.string()))
        found = pads.dataset(
            [store.path(info.name) for info in files],
            schema=schema,
            format=pads.ParquetFileFormat(default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)),
            filesystem=store.filesystem,
            partitioning=pads.partitioning(pa.schema([("shard", pa.string())]), flavor="hive"),
        )
        hidden = {title for title, _ in objects} | self.output.marked_titles(compacted)
        if not compacted.files or not hidden:
            return found
        merged_title = pads.field(ENCODED_TITLE)
        return found.filter(merged_title.is_null() | ~merged_title.isin(pa.array(sorted(hidden), pa.string())))

    def names(self) -> list[str]:
        """List the names of the datasets of vectors and rows: shots, contextual-<checkpoint>, scenes-..., titles-..."""
        return [name for name in self.output.datasets() if name != FAILURES]

    def title(self, title_id: str, name: str = SHOTS) -> pa.Table:
        """Read the shots of one title in order. Raises DatasetError where the title is not committed."""
        for _ in range(READ_ATTEMPTS - 1):
            with contextlib.suppress(FileNotFoundError):  # A job has replaced the title since it was listed.
                return self.read(self.title_object(title_id, name))
        return self.read(self.title_object(title_id, name))

    def read(self, name: str) -> pa.Table:
        """Read the rows of an object. Raises FileNotFoundError, and pyarrow's errors or OSError where it is damaged."""
        return pq.read_table(pa.BufferReader(self.output.read(name)), page_checksum_verification=True)

    def title_object(self, title_id: str, name: str = SHOTS) -> str:
        """Find the name of a title's newest object in a listing of its shard. Raises DatasetError where the title is not committed."""
        encoded = encode_title(title_id)
        shard = object_name(name, title_id, "").split("/")[1]
        found = newest_objects({key: infos for key, infos in self.output.list(name, shard).items() if key[0] == encoded})
        if not found:
            raise DatasetError(f"{self.output.store.uri} has no title {title_id!r} in {name}")
        return found[0].name

    def embeddings(self, shots: pa.Table, part: str = "fused") -> np.ndarray:
        """Return the embeddings of rows of ``shots`` as float32 (S, D).

        ``part``: ``fused`` (unit norm; a view where the table is one chunk), or a modality: its encoder's own vectors,
        recovered as ``fused[a:b] * norm``.
        """
        fused_SD = embedding_values(shots["fused_embedding"])
        if part == "fused":
            return fused_SD
        if part not in self.model.spans:
            raise DatasetError(f"no part {part!r} in a fused embedding; there are: fused, {', '.join(MODALITIES)}")
        start, end = self.model.spans[part]
        return fused_SD[:, start:end] * shots["fused_norm"].to_numpy()[:, None]


def title_facts(table: pa.Table) -> dict[str, Any]:
    """The facts of a title (source, media, versions) that its file carries."""
    return read_facts(table.schema)


def read_failures(output: Output) -> Iterator[dict[str, Any]]:
    """Yield the failure records of a dataset version in the order of their names. Objects that are not failure records are skipped."""
    for info in _sorted_objects(output.list(FAILURES)):
        try:
            yield parse_failure(output.store.read(info.name))
        except FileNotFoundError:  # Another job has embedded the title meanwhile.
            continue
        except ValueError as error:
            log.warning("%s is not a failure record (%s); mediafm verify can remove it", info.name, error)


def parse_failure(content: bytes) -> dict[str, Any]:
    """Parse a failure record. Raises ValueError for any other content."""
    record = parse_json(content)
    if not isinstance(record, dict) or not isinstance(record.get("title_id"), str):
        raise ValueError("it is not a JSON object with a title_id")
    attempts = record.get("attempts")
    if type(attempts) is not int or attempts < 0:
        raise ValueError("its attempts are not an integer of at least 0")
    return record


def newest_objects(objects: Mapping[tuple[str, str], list[ObjectInfo]]) -> list[ObjectInfo]:
    """Return the last modified object of each title, in the order of the names; among equals, the one with the last name."""
    newest: dict[str, ObjectInfo] = {}
    for info in _sorted_objects(objects):
        title = info.name.rsplit("/", 1)[-1].split("@")[0]
        if title not in newest or info.modified >= newest[title].modified:
            newest[title] = info
    return list(newest.values())


def _sorted_objects(objects: Mapping[tuple[str, str], Iterable[ObjectInfo]]) -> list[ObjectInfo]:
    return sorted((info for infos in objects.values() for info in infos), key=lambda info: info.name)
