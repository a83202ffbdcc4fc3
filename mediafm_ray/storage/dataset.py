"""The layout of an output: the names of its objects, and functions that list, write and read them.

    <output>/<dataset version>/model.json
    <output>/<dataset version>/shots/shard=<00..ff>/<title>@<source>.parquet
    <output>/<dataset version>/contextual-<checkpoint>/shard=<00..ff>/<title>@<source>.parquet
    <output>/<dataset version>/scenes-<fused|contextual>-<options>/shard=<00..ff>/<title>@<source>.parquet
    <output>/<dataset version>/titles-<fused|contextual>-<options>/shard=<00..ff>/<title>@<source>.parquet
    <output>/<dataset version>/failures/shard=<00..ff>/<title>@<source>.json
    <output>/leases/<dataset version>/...                                       leases of running jobs, see lease.py
    <output>/runs/<UTC time>-<id>/...                                           the logs of every run, see runs/run_log.py

The listing is the ledger: an object that exists is committed, and what is pending is the catalog minus the listing. There is no journal.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.spec import MODALITIES, digest_of, parse_json
from mediafm_ray.storage.schemas import contextual_schema, embedding_values, read_facts, scenes_schema, shots_schema, titles_schema
from mediafm_ray.storage.store import ObjectInfo, StorageConfig, Store, percent_encode
from mediafm_ray.text import PublicError

if TYPE_CHECKING:
    import pyarrow.dataset as pads

log = logging.getLogger(__name__)

SHOTS = "shots"
FAILURES = "failures"
SCENES = "scenes"  # Scenes and titles are derived from the vectors of shots: see derived().
TITLES = "titles"
LEASES = "leases"
MODEL = "model.json"
SHARDS = 256  # of a dataset, by the first byte of a digest of the title's id
DERIVED_DIGITS = 12  # hex digits in the name of a derived dataset
MAX_DIM = 1 << 31  # Arrow counts the elements of a fixed-size list with 32 bits.
MAX_NAME_BYTES = 160  # The title's share of an object's name, of which file systems allow 255 bytes.
VERSION_PATTERN = re.compile(r"[0-9a-f]{12}")
DATASET_PATTERN = re.compile(r"shots|failures|contextual-.+|(?:scenes|titles)-(?:fused|contextual)-[0-9a-f]{12}")
OBJECT_PATTERN = re.compile(r"shard=[0-9a-f]{2}/(?P<title>[^/@]+)@(?P<source>[^/@.]+)\.(?:parquet|json)")


class DatasetError(PublicError):
    """A dataset that is missing or not the one that was asked for; the message says what exists instead."""


def contextual(checkpoint: str) -> str:
    """Return the name of the dataset of a contextualiser's checkpoint."""
    return f"contextual-{checkpoint}"


def derived(kind: str, vectors: str, recipe: Mapping[str, Any]) -> str:
    """Return the name of a dataset that is made from the vectors of shots, such as ``scenes-contextual-<12 hex digits>``.

    ``kind``: SCENES or TITLES. The digits are a digest of the dataset ``vectors`` that it is made from (``shots``: their fused vectors)
    and of the ``recipe``: the options, and whatever else changes its content.
    """
    source = "fused" if vectors == SHOTS else "contextual"
    return f"{kind}-{source}-{digest_of({'vectors': vectors, 'recipe': dict(recipe)})[:DERIVED_DIGITS]}"


def lease_folder(dataset_version: str) -> str:
    """Return the folder of a dataset version's lease below the output: beside the version, which may not exist yet."""
    return f"{LEASES}/{dataset_version}"


def encode_title(title_id: str) -> str:
    """Encode a title id for an object's name. A long id is cut and ends in '~' and its digest."""
    encoded = percent_encode(title_id)
    if len(encoded) <= MAX_NAME_BYTES:
        return encoded
    beginning = re.sub(r"%[0-9A-F]?$", "", encoded[: MAX_NAME_BYTES - 33])
    return f"{beginning}~{hashlib.sha256(title_id.encode()).hexdigest()[:32]}"


def decode_title(encoded: str) -> str:
    """Return the title id for messages: the inverse of ``encode_title``, but that a long id stays cut."""
    return urllib.parse.unquote(encoded)


def object_key(name: str) -> tuple[str, str]:
    """Return the encoded title and the source in the name of a title's object. Raises ValueError for any other name."""
    match = OBJECT_PATTERN.fullmatch(name.split("/", 1)[-1])
    if match is None:
        raise ValueError(f"{name} is not the name of a title's object")
    return match["title"], match["source"]


def matching_object(name: str, dataset: str) -> str:
    """Return the name of the object of the same title and source in another dataset."""
    ending = "json" if dataset == FAILURES else "parquet"
    return f"{dataset}/{name.split('/', 1)[1].rsplit('.', 1)[0]}.{ending}"


def shard_of(title_id: str) -> int:
    """Return the number of a title's shard, below SHARDS."""
    return hashlib.sha256(title_id.encode(errors="surrogatepass")).digest()[0]


def object_name(dataset: str, title_id: str, source: str) -> str:
    """Return the name of a title's object below the dataset version."""
    ending = "json" if dataset == FAILURES else "parquet"
    return f"{dataset}/shard={shard_of(title_id):02x}/{encode_title(title_id)}@{source}.{ending}"


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


class Output:
    """One dataset version below an output URI, for the jobs that write it."""

    def __init__(self, uri: str, dataset_version: str, config: StorageConfig | None = None):
        self.store = Store(f"{uri.rstrip('/')}/{dataset_version}", config)
        self.dataset_version = dataset_version

    def list(self, dataset: str, shard: str = "") -> dict[tuple[str, str], list[ObjectInfo]]:
        """List the committed objects of a dataset, or of one shard of it, by encoded title and source, in one (paged) listing."""
        found: dict[tuple[str, str], list[ObjectInfo]] = {}
        for info in self.store.list(f"{dataset}/{shard}"):
            match = OBJECT_PATTERN.fullmatch(info.name.removeprefix(f"{dataset}/"))
            if match:
                found.setdefault((match["title"], match["source"]), []).append(info)
        return found

    def datasets(self) -> Sequence[str]:
        """List the names of the datasets: shots, contextual-<checkpoint>, scenes-..., titles-..., failures."""
        return [name for name in self.store.folders() if DATASET_PATTERN.fullmatch(name)]

    def facts(self, name: str) -> dict[str, Any]:
        """Read an object's facts, which needs only its end. Raises pyarrow's errors where it is not a Parquet file."""
        with self.store.filesystem.open(self.store.path(name), "rb") as stream:
            return read_facts(pq.read_schema(stream))

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

        Raises DatasetError where nothing of that name is committed.
        """
        import pyarrow.dataset as pads  # It imports pandas, which takes a third of the time of --help.

        newest = newest_objects(self.output.list(name))
        if not newest:
            raise DatasetError(f"{self.output.store.uri} has no committed object of {name}; there are: {', '.join(self.names()) or 'none'}")
        store = self.output.store
        store.prime_listing_cache(newest)
        return pads.dataset(
            [store.path(info.name) for info in newest],
            schema=self._schema(name),
            format=pads.ParquetFileFormat(default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)),
            filesystem=store.filesystem,
            partitioning=pads.partitioning(pa.schema([("shard", pa.string())]), flavor="hive"),
        )

    def names(self) -> list[str]:
        """List the names of the datasets of vectors and rows: shots, contextual-<checkpoint>, scenes-..., titles-..."""
        return [name for name in self.output.datasets() if name != FAILURES]

    def title(self, title_id: str, name: str = SHOTS) -> pa.Table:
        """Read the shots of one title in order. Raises DatasetError where the title is not committed."""
        return self.read(self.title_object(title_id, name))

    def read(self, name: str) -> pa.Table:
        """Read the rows of an object. Raises FileNotFoundError, and pyarrow's errors or OSError where it is damaged."""
        return pq.read_table(pa.BufferReader(self.output.store.read(name)), page_checksum_verification=True)

    def title_object(self, title_id: str, name: str = SHOTS) -> str:
        """Find the name of a title's newest object in a listing of its shard. Raises DatasetError where the title is not committed."""
        encoded = encode_title(title_id)
        shard = object_name(name, title_id, "").split("/")[1]
        found = newest_objects({key: infos for key, infos in self.output.list(name, shard).items() if key[0] == encoded})
        if not found:
            raise DatasetError(f"{self.output.store.uri} has no title {title_id!r} in {name}")
        return found[0].name

    def _schema(self, name: str) -> pa.Schema:
        fused_dim = self.model.dims["fused"]
        kind = name.split("-")[0]
        if kind == SCENES:
            schema = scenes_schema()
        elif kind == TITLES:
            schema = titles_schema(fused_dim)
        else:
            schema = shots_schema(fused_dim) if kind == SHOTS else contextual_schema(fused_dim)
        return schema.append(pa.field("shard", pa.string()))

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
