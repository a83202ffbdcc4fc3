"""The shots of a dataset version as a Lance dataset that is searched: one row a shot, vectors at half precision, a vector index on each.

Lance (Apache-2.0, package ``pylance``) keeps every version of a dataset readable. A build goes through many versions: it adds titles in
groups, deletes those that are gone, trains. None of them is seen by a search before the build moves the tag PUBLISHED to the last; a
killed build changes nothing for a reader, and the next one goes on from what it left. One build at a time, kept by a lease: two at
once would add the same titles twice.

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

os.environ.setdefault("LANCE_LOG", "error")  # which lance reads when it is imported: else it tells of every dataset that it creates

FORMAT = 1  # of what is written: raise it with a change that an older release cannot read, or that cannot read older indexes
PUBLISHED = "published"  # the tag of the version that is searched
SETTINGS_KEY = "mediafm_ray.search"  # in the schema's metadata: how each column is searched, a JSON object
LEASE = "leases/build"  # below the index: who is building
LANCE_FOLDER = "_versions"  # of every Lance dataset
EMBEDDING = "embedding"  # the column of fused or contextual vectors
MAX_EXACT_SHOTS = 20_000  # so many are searched one by one: that is as quick, and exact
BLOCK_SHOTS = 4096  # that are read at once where all are
KEYS_AT_ONCE = 1 << 16  # rows of which titles and sources are read at once
DRAWN_FOR_ONE = 8  # shots that are drawn for one query: not all have a vector of each modality
SPARE_RESULTS = 8  # beyond those asked for: Lance orders them by cosines of half precision
MIN_NORM = 1e-12
MAX_NAMED = 8  # objects that a message names
ROW_COLUMNS = ("title_id", "shot_index", "start_s", "end_s", "language", "text", "has_video", "has_audio", "has_text")  # of a result
LANCE_ERRORS = (OSError, ValueError, RuntimeError, NotImplementedError, pa.ArrowException)  # what its Rust side raises
RUST_PLACE = re.compile(r",? ?\S+\.rs:\d+(?::\d+)?")  # where in its source, which helps nobody here


class NoIndex(DatasetError):
    """There is no index, or it is not the one that was asked for; the message says what is there instead."""


def part_column(modality: str) -> str:
    """The column that holds the vectors of one modality's encoder."""
    return f"{modality}_embedding"


def modality_of(column: str) -> str:
    """The inverse of ``part_column``."""
    return column.removesuffix("_embedding")


@dataclass(frozen=True)
class IndexFacts:
    """What an index was made from."""

    dataset_version: str
    vectors: str  # the dataset that ``embedding`` is taken from: shots (fused vectors) or contextual-<checkpoint>
    dims: Mapping[str, int]  # column of vectors -> its dimension
    recipe: Mapping[str, Any]  # of the dataset version: which encoders, with the digests of their weights
    format: int = FORMAT

    def to_json(self) -> bytes:
        """As it stands in the metadata of the Lance dataset."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @property
    def kind(self) -> str:
        """fused or contextual."""
        return "fused" if self.vectors == "shots" else "contextual"

    def describe(self) -> str:
        """What it was made from, in words."""
        parts = ", ".join(modality for modality in MODALITIES if part_column(modality) in self.dims) or "none"
        return f"{self.vectors if self.kind == 'contextual' else 'fused vectors'} of dataset version {self.dataset_version}, parts: {parts}"

    def schema(self) -> pa.Schema:
        """The columns: what a result says of a shot, where it is from, and its vectors; a vector is null where a modality is absent."""
        fields = [
            pa.field("title_id", pa.string()),
            pa.field("source", pa.string()),  # of the title, as in the names of its objects
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
    """(S, D) float32 unit vectors as a column of the index; null where not present."""
    values = pa.array(unit_SD.astype(np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, type=pa.list_(pa.float16(), unit_SD.shape[1]), mask=pa.array(~present_S))


@dataclass(frozen=True)
class SearchParams:
    """How a column's vector index is searched, and how well that does, as it was measured when the index was built."""

    trained_shots: int
    partitions: int
    nprobes: int = 0  # partitions that are searched
    refine: int = 0  # of so many times the wanted results the exact cosines are computed
    recall: float = 0.0  # recall@10 against exact search
    queries: int = 0  # that it was measured with


@dataclass(frozen=True)
class ShotFilter:
    """Which shots may be found."""

    titles: Sequence[str] = ()  # of these titles only; empty = of all
    without_titles: Sequence[str] = ()
    start_s: float | None = None  # shots that reach into [start_s, end_s) of their title
    end_s: float | None = None
    languages: Sequence[str] = ()  # of their text; en finds en-US, too

    def sql(self) -> str:
        """As a condition on the columns; empty where nothing is asked for."""
        terms = []
        if self.titles:
            terms.append(f"title_id IN ({', '.join(map(quoted, self.titles))})")
        if self.without_titles:
            terms.append(f"title_id NOT IN ({', '.join(map(quoted, self.without_titles))})")
        if self.start_s is not None:
            terms.append(f"end_s > {float(self.start_s)!r}")
        if self.end_s is not None:
            terms.append(f"start_s < {float(self.end_s)!r}")
        tags = [language.lower() for language in self.languages]
        spoken = [f"lower(language) = {quoted(tag)} OR starts_with(lower(language), {quoted(f'{tag}-')})" for tag in tags]
        return " AND ".join([*terms, *([f"({' OR '.join(spoken)})"] if spoken else [])])


def quoted(text: str) -> str:
    """Text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


# ------------------------------------------------------------------------------------------------------------ reading


class ShotIndex:
    """One version of an index. Whatever goes wrong with the store is a StorageError that says where."""

    def __init__(self, uri: str, dataset: lance.LanceDataset):
        """Raises NoIndex for a Lance dataset of something else, or of another release's format."""
        self.uri, self.dataset = uri, dataset
        found = read_facts(dataset.schema)
        if found.get("format") != FORMAT:
            what = f"format {found['format']}; this release reads {FORMAT}" if "format" in found else "a Lance dataset of something else"
            raise NoIndex(f"{uri} is no index of shots that can be read: {what}; choose another index.uri")
        self.facts = IndexFacts(**found)
        settings = json.loads((dataset.schema.metadata or {}).get(SETTINGS_KEY.encode(), b"{}"))
        self.settings = {column: SearchParams(**values) for column, values in settings.items()}

    @property
    def version(self) -> int:
        """Lance's number of this version."""
        return self.dataset.version

    def shots(self, column: str = "") -> int:
        """How many there are, or how many have a vector in a column."""
        with explained(self.uri):
            return self.dataset.count_rows(filter=f"{column} IS NOT NULL" if column else None)

    def titles(self) -> Mapping[tuple[str, str], int]:
        """Shots of every title and source that is there."""
        counts: dict[tuple[str, str], int] = {}
        with explained(self.uri):
            for batch in self.dataset.scanner(columns=["title_id", "source"], batch_size=KEYS_AT_ONCE).to_batches():
                grouped = pa.table(batch).group_by(["title_id", "source"]).aggregate([([], "count_all")])
                for row in grouped.to_pylist():
                    key = row["title_id"], row["source"]
                    counts[key] = counts.get(key, 0) + row["count_all"]
        return counts

    def title(self, title_id: str, columns: Sequence[str]) -> pa.Table:
        """The shots of one title in order: ROW_COLUMNS and these. Empty where the title is not there."""
        with explained(self.uri):
            scanner = self.dataset.scanner(columns=[*ROW_COLUMNS, *columns], filter=f"title_id = {quoted(title_id)}")
            return scanner.to_table().combine_chunks().sort_by("shot_index")

    def nearest(
        self, column: str, query_D: np.ndarray, count: int, where: str = "", setting: SearchParams | None = None, exact: bool = False
    ) -> pa.Table:
        """The shots whose vectors are nearest by cosine, at most ``count``, nearest first: ROW_COLUMNS, ``cosine`` and Lance's ``_rowid``.

        ``where``: a condition on the columns (ShotFilter.sql). Through the column's vector index, searched as ``setting`` says (by default
        as it was found best when the index was built); exactly if asked to, where there is none, and where few shots fulfil the condition.
        """
        setting = None if exact else setting or self.settings.get(column)
        with explained(self.uri):
            if setting and where and self.dataset.count_rows(filter=where) <= MAX_EXACT_SHOTS:
                setting = None
            spare = count + SPARE_RESULTS
            asked = {"column": column, "q": np.asarray(query_D, np.float32), "k": spare, "metric": "cosine", "use_index": bool(setting)}
            if setting:
                asked |= {"minimum_nprobes": setting.nprobes, "refine_factor": setting.refine}
                asked |= {} if where else {"maximum_nprobes": setting.nprobes}  # more only where the condition leaves too few
            columns = [*ROW_COLUMNS, column, "_distance"]
            scanner = self.dataset.scanner(columns=columns, nearest=asked, filter=where or None, prefilter=bool(where), with_row_id=True)
            found = scanner.to_table()
        found = found.drop_columns(["_distance", column]).append_column("cosine", _cosines(embedding_values(found[column]), query_D))
        return found.sort_by([("cosine", "descending"), ("title_id", "ascending"), ("shot_index", "ascending")]).slice(0, count)

    def blocks(self, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Lance's row ids (N,) int64 and the vectors (N, D) float16 of a column, block by block; shots without one are left out."""
        with explained(self.uri):
            for batch in self.dataset.scanner(columns=[column], batch_size=BLOCK_SHOTS, with_row_id=True).to_batches():
                present = batch.filter(batch[column].is_valid())
                yield present["_rowid"].to_numpy().astype(np.int64), embedding_values(present[column])

    def sample(self, column: str, count: int, seed: int) -> np.ndarray:
        """(Q, D) float16 vectors of a column, drawn at random: ``count``, or fewer where few shots have one."""
        random = np.random.default_rng(seed)
        with explained(self.uri):
            drawn = random.permutation(self.dataset.count_rows())[: DRAWN_FOR_ONE * count]
            table = self.dataset.take(sorted(drawn.tolist()), columns=[column]).combine_chunks()
        vectors_SD = embedding_values(table.filter(table[column].is_valid())[column])
        return vectors_SD[random.permutation(len(vectors_SD))[:count]]


def _cosines(vectors_SD: np.ndarray, query_D: np.ndarray) -> pa.Array:
    """Cosines of stored vectors with a query, at double precision: Lance's own have the few digits of half precision."""
    exact_SD, exact_D = vectors_SD.astype(np.float64), np.asarray(query_D, np.float64)
    return pa.array(exact_SD @ exact_D / np.maximum(np.linalg.norm(exact_SD, axis=1) * np.linalg.norm(exact_D), MIN_NORM))


def open_index(uri: str, config: StorageConfig) -> ShotIndex:
    """The published version of an index. Raises NoIndex, saying what is there instead, and StorageError."""
    there = lance_at(uri, config)
    if there is None:
        found = contents_of(uri, config)
        said = f"there is: {found}" if found else "there is nothing"
        raise NoIndex(f"{uri} has no index of shots; {said}: run python -m jobs.build_index output.uri=... index.uri={uri}")
    with explained(uri):
        tags: Any = there.tags.list()
        published = tags.get(PUBLISHED)
        if published is None:
            raise NoIndex(f"{uri}: the index has not been built to its end yet: run python -m jobs.build_index again")
        return ShotIndex(uri, there.checkout_version(published["version"]))


def lance_at(uri: str, config: StorageConfig) -> lance.LanceDataset | None:
    """The latest version of the Lance dataset at a URI; None where there is none. Raises StorageError, soon, where nothing can be read."""
    store = Store(uri, config)
    store.check_readable()
    if LANCE_FOLDER not in store.folders():
        return None
    import lance

    with explained(uri):
        return lance.dataset(store.uri, storage_options=storage_options(store.uri, config))


def contents_of(uri: str, config: StorageConfig) -> str:
    """What is at a URI that is no Lance dataset, for a message."""
    store = Store(uri, config)
    names = [*store.folders(), *sorted(store.children())]
    names = [name for name in names if name != LEASE.split("/")[0]]
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")


# -------------------------------------------------------------------------------------------------------------- lance


def storage_options(uri: str, config: StorageConfig) -> dict[str, str]:
    """What Lance's own client is told of an S3 server, so that it does as the others here; it has the standard AWS chain of credentials."""
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
    """What Lance raises inside as a StorageError of one line."""
    try:
        yield
    except LANCE_ERRORS as error:
        said = RUST_PLACE.sub("", " ".join(str(error).split()))
        raise StorageError(f"{uri}: {said or type(error).__name__}; check the location and the storage.* options") from error
