"""The search index: the shots of a dataset version as a Lance dataset, one row for each, with half-precision vectors and vector indexes.

Lance (Apache-2.0, package ``pylance``) keeps every version of a dataset readable. A build creates many versions: it adds titles in
groups, deletes those that are gone, and trains. A search sees none of them before the build moves the tag PUBLISHED to the last one, so
a killed build changes nothing for a reader, and the next build continues from what it left. A lease allows one build at a time: two
would add the same titles twice.

The cosine of unit vectors at half precision differs from that at single precision by less than 1e-3.

Shapes
    S  shots
    N  shots of a block
    D  dimension of a vector
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage.dataset import DatasetError
from mediafm_ray.storage.s3 import s3_config_options
from mediafm_ray.storage.schemas import METADATA_KEY, embedding_values, read_facts
from mediafm_ray.storage.store import StorageConfig, StorageError, Store, scheme_of

if TYPE_CHECKING:
    import lance

os.environ.setdefault("LANCE_LOG", "error")  # Lance reads it when it is imported; by default it logs every dataset that it creates.

FORMAT = 1  # Raise it with a change that an older release cannot read, or that cannot read older indexes.
PUBLISHED = "published"  # the tag of the version that is searched
SETTINGS_KEY = "mediafm_ray.search"  # key in the schema's metadata: a JSON object, column -> SearchParams
LEASE = "leases/build"  # folder below the index
LANCE_FOLDER = "_versions"  # every Lance dataset has it
EMBEDDING = "embedding"  # the column of fused or contextual vectors
MAX_EXACT_SHOTS = 20_000  # An exact search of so few shots is as quick as the vector index.
BLOCK_SHOTS = 4096  # shots in a batch of a full scan
KEYS_AT_ONCE = 1 << 16  # rows in a batch of titles and sources
DRAWN_FOR_ONE = 8  # shots drawn for each query, because not all have a vector of every modality
SPARE_RESULTS = 8  # more results than wanted, because Lance orders them by half-precision cosines
MIN_NORM = 1e-12
MAX_NAMED = 8  # objects named in a message
ROW_COLUMNS = ("title_id", "shot_index", "start_s", "end_s", "language", "text", "has_video", "has_audio", "has_text")
LANCE_ERRORS = (OSError, ValueError, RuntimeError, NotImplementedError, pa.ArrowException)  # errors of Lance's Rust code
RUST_PLACE = re.compile(r",? ?\S+\.rs:\d+(?::\d+)?")  # a place in Lance's source code, which does not help the user


class NoIndex(DatasetError):
    """An index that is missing or not the one that was asked for; the message says what exists instead."""


def part_column(modality: str) -> str:
    """Return the name of the column with the vectors of one modality's encoder."""
    return f"{modality}_embedding"


def modality_of(column: str) -> str:
    """Return the modality of a column: the inverse of ``part_column``."""
    return column.removesuffix("_embedding")


@dataclass(frozen=True)
class IndexFacts:
    """The dataset and the vectors that an index was made from."""

    dataset_version: str
    vectors: str  # source of the column ``embedding``: shots (fused vectors) or contextual-<checkpoint>
    dims: Mapping[str, int]  # column of vectors -> its dimension
    recipe: Mapping[str, Any]  # the dataset version's: encoders and the digests of their weights
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Return the bytes for the metadata of the Lance dataset."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @property
    def kind(self) -> str:
        """The kind of the vectors in ``embedding``: fused or contextual."""
        return "fused" if self.vectors == "shots" else "contextual"

    def describe(self) -> str:
        """Describe the source in words."""
        parts = ", ".join(modality for modality in MODALITIES if part_column(modality) in self.dims) or "none"
        return f"{self.vectors if self.kind == 'contextual' else 'fused vectors'} of dataset version {self.dataset_version}, parts: {parts}"

    def schema(self) -> pa.Schema:
        """Return the columns: a shot's source, fields of a result, and its vectors, which are null where a modality is absent."""
        fields = [
            pa.field("title_id", pa.string()),
            pa.field("source", pa.string()),  # the title's source, as in the names of its objects
            pa.field("shot_index", pa.int32()),
            pa.field("start_s", pa.float64()),
            pa.field("end_s", pa.float64()),
            pa.field("language", pa.string()),
            pa.field("text", pa.string()),
            *(pa.field(f"has_{modality}", pa.bool_()) for modality in MODALITIES),
            *(pa.field(column, pa.list_(pa.float16(), dim)) for column, dim in self.dims.items()),
        ]
        return pa.schema(fields, {METADATA_KEY: self.to_json()})


def half_vectors(unit_SD: np.ndarray, present_S: np.ndarray) -> pa.FixedSizeListArray:
    """Convert (S, D) float32 unit vectors to a column of the index, with null where not present."""
    values = pa.array(unit_SD.astype(np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, type=pa.list_(pa.float16(), unit_SD.shape[1]), mask=pa.array(~present_S))


def vectors_or_zero(column: pa.ChunkedArray) -> np.ndarray:
    """Convert a column of the index to (S, D) float32 vectors; zero where a shot has none."""
    present_S = column.is_valid().to_numpy()
    vectors_SD = np.zeros((len(column), column.type.list_size), np.float32)
    if present_S.any():
        vectors_SD[present_S] = embedding_values(column.drop_null())
    return vectors_SD


@dataclass(frozen=True)
class SearchParams:
    """Parameters of the search in a column's vector index, with the recall that was measured when it was built."""

    trained_shots: int
    partitions: int
    nprobes: int = 0  # partitions to search
    refine: int = 0  # candidates with exact cosines for each wanted result
    recall: float = 0.0  # recall@10 against exact search
    queries: int = 0  # number of queries of that measurement


@dataclass(frozen=True)
class ShotFilter:
    """A filter on the shots that a search may find."""

    titles: Sequence[str] = ()  # only shots of these titles; empty = of all
    without_titles: Sequence[str] = ()
    start_s: float | None = None  # only shots that overlap [start_s, end_s) of their title
    end_s: float | None = None
    languages: Sequence[str] = ()  # languages of the text; en also finds en-US
    min_length_s: float = 0.0
    title_part: str = ""  # only shots of titles whose id contains this text, in any case

    def sql(self) -> str:
        """Return the filter as an SQL condition on the columns; empty where it allows everything."""
        terms = []
        if self.titles:
            terms.append(f"title_id IN ({', '.join(map(quoted, self.titles))})")
        if self.without_titles:
            terms.append(f"title_id NOT IN ({', '.join(map(quoted, self.without_titles))})")
        if self.start_s is not None:
            terms.append(f"end_s > {float(self.start_s)!r}")
        if self.end_s is not None:
            terms.append(f"start_s < {float(self.end_s)!r}")
        if self.min_length_s:
            terms.append(f"end_s - start_s >= {float(self.min_length_s)!r}")
        if self.title_part:
            terms.append(f"contains(lower(title_id), {quoted(self.title_part.lower())})")
        tags = [language.lower() for language in self.languages]
        spoken = [f"lower(language) = {quoted(tag)} OR starts_with(lower(language), {quoted(f'{tag}-')})" for tag in tags]
        return " AND ".join([*terms, *([f"({' OR '.join(spoken)})"] if spoken else [])])


def quoted(text: str) -> str:
    """Quote text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


# ------------------------------------------------------------------------------------------------------------ reading


class ShotIndex:
    """One version of an index. Every error of the store is a StorageError that names the location."""

    def __init__(self, uri: str, dataset: lance.LanceDataset):
        """Raises NoIndex for a Lance dataset of something else, or of another release's format."""
        self.uri, self.dataset = uri, dataset
        found = read_facts(dataset.schema)
        if found.get("format") != FORMAT:
            what = f"its format is {found['format']}, this release reads {FORMAT}" if "format" in found else "it is another Lance dataset"
            raise NoIndex(f"{uri} is not a readable index of shots: {what}; choose another index.uri")
        self.facts = IndexFacts(**found)
        settings = json.loads((dataset.schema.metadata or {}).get(SETTINGS_KEY.encode(), b"{}"))
        self.settings = {column: SearchParams(**values) for column, values in settings.items()}

    @property
    def version(self) -> int:
        """The number that Lance gave to this version."""
        return self.dataset.version

    def shots(self, column: str = "") -> int:
        """Count the shots, or those that have a vector in a column."""
        with explained(self.uri):
            return self.dataset.count_rows(filter=f"{column} IS NOT NULL" if column else None)

    def titles(self) -> Mapping[tuple[str, str], int]:
        """Count the shots of every title and source."""
        counts: dict[tuple[str, str], int] = {}
        with explained(self.uri):
            for batch in self.dataset.scanner(columns=["title_id", "source"], batch_size=KEYS_AT_ONCE).to_batches():
                grouped = pa.table(batch).group_by(["title_id", "source"]).aggregate([([], "count_all")])
                for row in grouped.to_pylist():
                    key = row["title_id"], row["source"]
                    counts[key] = counts.get(key, 0) + row["count_all"]
        return counts

    def title(self, title_id: str, columns: Sequence[str]) -> pa.Table:
        """Return the shots of one title in order, with ROW_COLUMNS and these columns; no rows for an unknown title."""
        with explained(self.uri):
            scanner = self.dataset.scanner(columns=[*ROW_COLUMNS, *columns], filter=f"title_id = {quoted(title_id)}")
            return scanner.to_table().combine_chunks().sort_by("shot_index")

    def places(self) -> pa.Table:
        """Return the title, index and times of all shots in the order of a scan."""
        with explained(self.uri):
            return self.dataset.to_table(columns=["title_id", "shot_index", "start_s", "end_s"])

    def vectors(self, column: str, places_N: np.ndarray) -> np.ndarray:
        """Return the (N, D) float32 vectors of shots by their places in the order of a scan; zero where a shot has none."""
        with explained(self.uri):
            return vectors_or_zero(self.dataset.take(places_N, columns=[column])[column])

    def nearest(
        self, column: str, query_D: np.ndarray, count: int, where: str = "", setting: SearchParams | None = None, exact: bool = False
    ) -> pa.Table:
        """Return the at most ``count`` shots nearest by cosine, nearest first: ROW_COLUMNS, ``cosine`` and Lance's ``_rowid``.

        ``where``: a condition on the columns (ShotFilter.sql). The search uses the column's vector index with ``setting`` (by default the
        one that was chosen when the index was built). It is exact if ``exact``, without a vector index, or where few shots match.
        """
        setting = None if exact else setting or self.settings.get(column)
        with explained(self.uri):
            if setting and where and self.dataset.count_rows(filter=where) <= MAX_EXACT_SHOTS:
                setting = None
            spare = count + SPARE_RESULTS
            asked = {"column": column, "q": np.asarray(query_D, np.float32), "k": spare, "metric": "cosine", "use_index": bool(setting)}
            if setting:
                asked |= {"minimum_nprobes": setting.nprobes, "refine_factor": setting.refine}
                asked |= {} if where else {"maximum_nprobes": setting.nprobes}  # Lance searches more where the condition leaves too few.
            columns = [*ROW_COLUMNS, column, "_distance"]
            scanner = self.dataset.scanner(columns=columns, nearest=asked, filter=where or None, prefilter=bool(where), with_row_id=True)
            found = scanner.to_table()
        found = found.drop_columns(["_distance", column]).append_column("cosine", _cosines(embedding_values(found[column]), query_D))
        return found.sort_by([("cosine", "descending"), ("title_id", "ascending"), ("shot_index", "ascending")]).slice(0, count)

    def blocks(self, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield blocks of a column: Lance's row ids (N,) int64 and vectors (N, D) float16. Shots without a vector are left out."""
        with explained(self.uri):
            for batch in self.dataset.scanner(columns=[column], batch_size=BLOCK_SHOTS, with_row_id=True).to_batches():
                present = batch.filter(batch[column].is_valid())
                yield present["_rowid"].to_numpy().astype(np.int64), embedding_values(present[column])

    def sample(self, column: str, count: int, seed: int) -> np.ndarray:
        """Draw (Q, D) float16 vectors of a column at random: ``count``, or fewer where few shots have one."""
        random = np.random.default_rng(seed)
        with explained(self.uri):
            drawn = random.permutation(self.dataset.count_rows())[: DRAWN_FOR_ONE * count]
            table = self.dataset.take(sorted(drawn.tolist()), columns=[column]).combine_chunks()
        vectors_SD = embedding_values(table.filter(table[column].is_valid())[column])
        return vectors_SD[random.permutation(len(vectors_SD))[:count]]


def _cosines(vectors_SD: np.ndarray, query_D: np.ndarray) -> pa.Array:
    """Compute cosines with a query at double precision, because Lance's own have only half precision."""
    exact_SD, exact_D = vectors_SD.astype(np.float64), np.asarray(query_D, np.float64)
    return pa.array(exact_SD @ exact_D / np.maximum(np.linalg.norm(exact_SD, axis=1) * np.linalg.norm(exact_D), MIN_NORM))


def open_index(uri: str, config: StorageConfig) -> ShotIndex:
    """Open the published version of an index. Raises NoIndex, which says what exists instead, and StorageError."""
    there = lance_at(uri, config)
    if there is None:
        found = contents_of(uri, config)
        instead = f"there is: {found}" if found else "there is nothing"
        raise NoIndex(f"{uri} has no index of shots; {instead}: run mediafm index output.uri=... index.uri={uri}")
    with explained(uri):
        tags: Any = there.tags.list()
        published = tags.get(PUBLISHED)
        if published is None:
            raise NoIndex(f"{uri}: the first build of the index is not finished: run mediafm index again")
        return ShotIndex(uri, there.checkout_version(published["version"]))


def lance_at(uri: str, config: StorageConfig) -> lance.LanceDataset | None:
    """Open the latest version of the Lance dataset at a URI; None where there is none. Raises StorageError within seconds."""
    store = Store(uri, config)
    store.check_readable()
    if LANCE_FOLDER not in store.folders():
        return None
    import lance

    with explained(uri):
        return lance.dataset(store.uri, storage_options=storage_options(store.uri, config))


def contents_of(uri: str, config: StorageConfig) -> str:
    """List the objects at a URI without a Lance dataset, for a message."""
    store = Store(uri, config)
    names = [*store.folders(), *sorted(store.children())]
    names = [name for name in names if name != LEASE.split("/")[0]]
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")


# -------------------------------------------------------------------------------------------------------------- lance


def storage_options(uri: str, config: StorageConfig) -> dict[str, str]:
    """Return the options of Lance's own S3 client, equal to those of the other clients; it reads the standard AWS credentials itself."""
    if scheme_of(uri) != "s3":
        return {}
    endpoint = config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    style = s3_config_options(config)["s3"]["addressing_style"]
    options = {
        "aws_virtual_hosted_style_request": str(style == "virtual").lower(),
        "connect_timeout": f"{config.connect_timeout_s}s",
        "request_timeout": f"{config.read_timeout_s}s",
        "client_max_retries": str(config.retries),
    }
    if endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        options |= {"aws_endpoint": endpoint, "aws_region": region, "allow_http": str(endpoint.startswith("http://")).lower()}
    return options


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn Lance's errors into a StorageError of one line."""
    try:
        yield
    except LANCE_ERRORS as error:
        said = RUST_PLACE.sub("", " ".join(str(error).split()))
        raise StorageError(f"{uri}: {said or type(error).__name__}; check the location and the storage.* options") from error
