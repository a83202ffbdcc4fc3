"""Hours of video of the titles of a plan: from the catalog, from facts of stored objects, or estimated from bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mediafm_ray.config.jobs import BackfillCatalogConfig
from mediafm_ray.runs.plan import Survey, Surveys
from mediafm_ray.storage.catalog import Entry
from mediafm_ray.storage.dataset import Output
from mediafm_ray.storage.partitions import SortedTables
from mediafm_ray.text import counted

log = logging.getLogger(__name__)

HOUR = 3600  # Seconds.
READ_THREADS = 16  # Small reads at once.
SAMPLED_TITLES = 32  # Committed titles whose duration is read to estimate seconds per byte.
MAX_FACTS_READ = 1000  # Pending titles whose duration is read from a committed object.
Elsewhere = Mapping[tuple[str, str], str]  # Names below the output of shots of other dataset versions, by encoded title and source.
IS_DONE = "is_done"  # Column of titles that may be sampled, which are all committed somewhere.
SAMPLE_SCHEMA = pa.schema([(IS_DONE, pa.bool_()), ("title_id", pa.string()), ("size", pa.int64()), ("stored", pa.string())])


@dataclass(frozen=True)
class Hours:
    """Known and estimated seconds of video of the titles that a run takes."""

    title_ids: pa.ChunkedArray
    seconds: pa.Array  # Null where they are unknown.
    estimated: int = 0  # Number of titles whose seconds are estimated from bytes.

    @cached_property
    def expected_s(self) -> Mapping[str, float]:
        """The seconds by title, where they are known."""
        pairs = zip(self.title_ids.to_pylist(), self.seconds.to_pylist(), strict=True)
        return {title_id: seconds for title_id, seconds in pairs if seconds is not None}

    @property
    def known(self) -> int:
        """The number of titles whose seconds are known or estimated."""
        return len(self.seconds) - self.seconds.null_count

    @property
    def total_s(self) -> float:
        """The sum of the seconds that are known."""
        return pc.sum(self.seconds).as_py() or 0.0

    def __str__(self) -> str:
        unknown = self.seconds.null_count
        how = [f"of {counted(self.estimated, 'title')} estimated from bytes"] if self.estimated else []
        how += [f"of {counted(unknown, 'title')} unknown"] if unknown else []
        if not self.known:
            return "unknown hours of video"
        return f"{time_span(self.total_s)} of video" + (f" ({', '.join(how)})" if how else "")


@dataclass(frozen=True)
class Sized:
    """Titles of a survey from which seconds of video per byte can be told."""

    size: int  # Bytes of the titles whose duration the catalog has.
    seconds: float
    is_in_catalog: bool  # The catalog has the duration of a title: then it decides.
    sample: pa.Table  # SAMPLE_SCHEMA: committed titles whose durations can be read; empty where the catalog has durations.

    @classmethod
    def of(cls, there: Survey, elsewhere: Elsewhere, done: Sequence[Entry]) -> Sized:
        """Find them. ``done``: those that are committed under this dataset version."""
        known = [entry for entry in there.entries if entry.duration_s]
        size, seconds = sum(entry.size for entry in known), sum(entry.duration_s or 0.0 for entry in known if entry.size)
        if known:
            return cls(size, seconds, True, SAMPLE_SCHEMA.empty_table())
        version = there.model.dataset_version
        here = [(True, entry, f"{version}/{there.wanted[0][entry.key][0].name}") for entry in done]
        both = [*here, *((False, entry, cls._name(there, elsewhere, entry)) for entry in there.entries if entry.key in elsewhere)]
        rows = [(is_done, entry.title.title_id, entry.size, name) for is_done, entry, name in both if entry.size]
        return cls(0, 0.0, False, pa.Table.from_pylist([dict(zip(SAMPLE_SCHEMA.names, row, strict=True)) for row in rows], SAMPLE_SCHEMA))

    @staticmethod
    def _name(there: Survey, elsewhere: Elsewhere, entry: Entry) -> str:
        here = there.wanted[0].get(entry.key)
        return f"{there.model.dataset_version}/{here[0].name}" if here else elsewhere[entry.key]


@dataclass
class Measured:
    """Titles of the catalog from which seconds of video per byte can be told, collected shard by shard."""

    surveys: Surveys
    is_in_catalog: bool = False  # See Sized, as for the next two.
    size: int = 0
    seconds: float = 0.0
    sample: SortedTables = field(init=False)

    def __post_init__(self) -> None:
        order = [(IS_DONE, "descending"), ("title_id", "ascending")]
        self.sample = SortedTables(self.surveys.scratch, "sample", SAMPLE_SCHEMA, order)

    def add(self, sized: Sized | None) -> None:
        """Add the titles of a survey."""
        if sized:
            self.is_in_catalog |= sized.is_in_catalog
            self.size += sized.size
            self.seconds += sized.seconds
            self.sample.add(sized.sample)

    def seconds_per_byte(self, config: BackfillCatalogConfig) -> float:
        """Return the seconds of video per byte; 0 where they are unknown."""
        if self.is_in_catalog:
            return self.seconds / self.size if self.size else 0.0
        sample = self.sample.read(slice(None, None, max(1, len(self.sample) // SAMPLED_TITLES))).slice(0, SAMPLED_TITLES)
        found = zip(sample["size"].to_pylist(), _durations(sample, config), strict=True)
        measured = [(size, seconds) for size, seconds in found if seconds is not None]
        size = sum(size for size, _ in measured)
        return sum(seconds for _, seconds in measured) / size if size else 0.0


def hours_of(taken: pa.Table, measured: Measured | None, config: BackfillCatalogConfig) -> Hours:
    """Return the durations of the videos: from the catalog, from facts of stored objects, else estimated from bytes.

    Objects are read only where ``measured`` is given, because each costs a request.
    """
    seconds = taken["expected_s"].to_numpy(zero_copy_only=False).copy()  # NaN where they are unknown.
    seconds[seconds == 0] = np.nan
    estimated = 0
    if measured and np.isnan(seconds).any():
        stored = np.flatnonzero(np.isnan(seconds) & taken["stored"].is_valid().to_numpy(zero_copy_only=False))[:MAX_FACTS_READ]
        seconds[stored] = [math.nan if found is None else found for found in _durations(taken.take(stored), config)]
        rate = measured.seconds_per_byte(config)
        sizes = taken["expected_bytes"].to_numpy()
        guessed = np.isnan(seconds) & (sizes > 0) & (rate > 0)
        seconds[guessed] = sizes[guessed] * rate
        estimated = int(guessed.sum())
    return Hours(taken["title_id"], pa.array(seconds, from_pandas=True), estimated)


def _durations(titles: pa.Table, config: BackfillCatalogConfig) -> list[float | None]:
    """Return the durations of committed titles from the facts of their objects; None for unreadable objects."""

    def read(title_id: str, stored: str) -> float | None:
        version, _, name = stored.partition("/")
        try:
            return float(Output(config.output.uri, version, config.storage).facts(name)["media"]["duration_s"])
        except Exception as error:  # An estimate can do without a broken object.
            log.warning("the duration of %s is not known: %s: %s", title_id, type(error).__name__, error)
            return None

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(read, titles["title_id"].to_pylist(), titles["stored"].to_pylist()))


def time_span(seconds: float) -> str:
    """Return a duration for people."""
    return f"{seconds / HOUR:.1f} h" if seconds >= HOUR else f"{seconds / 60:.1f} min"
