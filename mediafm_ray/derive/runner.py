"""Datasets derived from committed vectors, one object for each title: plan the pending titles and compute them. No ray here.

A title means an object to read, some arithmetic on one core, and an object to write: threads of one process keep a disk or a bucket
busy. As everywhere, an object that exists is committed, and the pending titles are one listing minus another.

Shapes
    S  shots of the title
    D  dimension of an embedding
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
from threadpoolctl import threadpool_limits

from mediafm_ray.config.sections import DerivedRunConfig
from mediafm_ray.derive.reader import StoredVectors
from mediafm_ray.errors import TitleError
from mediafm_ray.runs.command import EXIT_FAILED_TITLES, EXIT_OK
from mediafm_ray.runs.report import MAX_FAILURES_SHOWN, Console
from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset, newest_objects
from mediafm_ray.storage.names import SHOTS, decode_title, matching_object, object_key
from mediafm_ray.storage.schemas import encode_parquet
from mediafm_ray.text import counted, public_line

log = logging.getLogger(__name__)
PROGRESS_S = 5.0  # seconds between progress lines
MAX_TITLES_LISTED = 50  # Only a run of so few titles prints a line for each.
IN_FLIGHT_PER_THREAD = 2  # The bound keeps memory independent of the size of the catalog.
Item = TypeVar("Item")
Result = TypeVar("Result")


# --------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class PendingTitle:
    """A title to compute."""

    title: str  # id for messages; a very long one ends in a digest
    shots: str  # name of its newest object of ``shots``
    superseded: tuple[str, ...]  # objects of older sources, which are removed once this one is committed


@dataclass(frozen=True)
class DerivedPlan:
    """The titles to compute and the dataset to write."""

    dataset: EmbeddingDataset
    target: str  # name of the dataset to write
    pending: tuple[PendingTitle, ...]
    titles: int  # number of titles in ``shots``
    done: int  # number of titles in the target before the run
    left: int  # number of titles beyond run.max_titles
    leftovers: tuple[str, ...]  # objects of an earlier run whose successor is committed

    def describe(self, made_from: str) -> str:
        """Describe the plan in one line."""
        later = f", {self.left} left for later" if self.left else ""
        return (
            f"{self.target}, from {made_from} of dataset version {self.dataset.version}: {counted(self.titles, 'title')}, "
            f"{self.done} committed before, {len(self.pending)} to do{later}"
        )


def make_derived_plan(dataset: EmbeddingDataset, target: str, config: DerivedRunConfig) -> DerivedPlan:
    """List the committed shots and the target; the pending titles are the difference. Writes nothing.

    Raises DatasetError where nothing is committed.
    """
    shots = newest_objects(dataset.output.list(SHOTS))
    if not shots:
        raise DatasetError(f"{dataset.output.store.uri} has no committed shots: run mediafm embed first")
    written = dataset.output.list(target)
    of_title: dict[str, list[Any]] = {}
    for (title, _), infos in written.items():
        of_title.setdefault(title, []).extend(infos)
    pending, leftovers = [], []
    for info in shots:
        title, _ = key = object_key(info.name)
        older = [other.name for other in of_title.get(title, ()) if object_key(other.name) != key and other.modified <= info.modified]
        if key in written:
            leftovers += older
        else:
            pending.append(PendingTitle(decode_title(title), info.name, tuple(older)))
    taken = pending[: config.max_titles] if config.max_titles else pending
    done = len(shots) - len(pending)
    return DerivedPlan(dataset, target, tuple(taken), len(shots), done, len(pending) - len(taken), tuple(leftovers))


# ---------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True, eq=False)
class Derived:
    """The rows computed for one title."""

    table: pa.Table
    facts: Mapping[str, Any]  # content of the file's metadata
    line: str  # result for the log


def table_of(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Make a table of a schema from Arrow arrays and sequences."""
    arrays = [value if isinstance(value := columns[field.name], pa.Array) else pa.array(value, field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def facts_of_title(dataset: EmbeddingDataset, title: StoredVectors, vectors: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a derived object: its title and source, and the vectors and options that it was made from."""
    own = {"title_id": title.title_id, "source": title.source, "dataset_version": dataset.version}
    return {**own, "vectors": vectors, "recipe": dict(recipe)}


@dataclass
class TitleCounts:
    """The results of a run's titles."""

    planned: int
    ok: int = 0
    rows: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)  # title, reason

    @property
    def finished(self) -> int:
        """Number of titles that succeeded or failed."""
        return self.ok + len(self.failures)


def derive_titles(plan: DerivedPlan, make: Callable[[PendingTitle], Derived], config: DerivedRunConfig, console: Console) -> TitleCounts:
    """Compute and commit every pending title with threads. Any exception of ``make`` is a failure of its title.

    Raises StorageError where the output cannot be written.
    """
    output = plan.dataset.output
    output.store.check_writable()
    for name in plan.leftovers:
        output.remove(name)

    def commit(pending: PendingTitle) -> Derived:
        made = make(pending)
        output.store.write(matching_object(pending.shots, plan.target), encode_parquet(made.table, made.facts))
        for name in pending.superseded:
            output.remove(name)
        return made

    counts = TitleCounts(len(plan.pending))
    for title, made in each_title(commit, {pending.title: pending for pending in plan.pending}, config.threads, counts, console):
        counts.rows += made.table.num_rows
        if counts.planned <= MAX_TITLES_LISTED:
            console.say(public_line(f"[{counts.finished:>{len(str(counts.planned))}}/{counts.planned}] {title}: {made.line}"))
    return counts


def each_title(
    work: Callable[[Item], Result], pending: Mapping[str, Item], threads: int, counts: TitleCounts, console: Console
) -> Iterator[tuple[str, Result]]:
    """Yield each title with the result of ``work``, computed by threads, in order; log the progress and count the titles.

    Any exception of ``work`` is a failure of its title, which is counted and left out.
    """

    def attempt(title: str) -> tuple[str, Result | None, str]:
        try:
            return title, work(pending[title]), ""
        except TitleError as error:
            return title, None, str(error)
        except Exception as error:  # One title's error does not end the run.
            log.exception("title %s failed", title)
            return title, None, f"{type(error).__name__}: {error}"

    begun = logged = time.monotonic()
    with threadpool_limits(limits=1):  # Each title has a thread of its own: threads of numpy would compete for the cores.
        for title, result, reason in ordered_map(attempt, pending, threads):
            if result is None:
                counts.failures.append((title, reason))
                console.say(public_line(f"FAILED {title}: {reason}"))
            else:
                counts.ok += 1
                yield title, result
            now = time.monotonic()
            if counts.planned > MAX_TITLES_LISTED and (now - logged > PROGRESS_S or counts.finished == counts.planned):
                logged = now
                pace = counts.finished / max(now - begun, 1e-9)
                console.say(f"[{counts.finished}/{counts.planned}] {pace:.1f} titles a second, {len(counts.failures)} failed")


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield ``work`` of each item, computed by threads, in order. At most IN_FLIGHT_PER_THREAD items a thread are begun ahead."""
    waiting: deque[Future[Result]] = deque()
    todo = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                while len(waiting) < threads * IN_FLIGHT_PER_THREAD:
                    for item in todo:
                        waiting.append(pool.submit(work, item))
                        break
                    else:
                        break
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def finish(plan: DerivedPlan, counts: TitleCounts, row: str, config: DerivedRunConfig, console: Console) -> int:
    """Log the summary of a run and return its exit code. ``row``: name of a row of the dataset, such as ``scene``."""
    console.say()
    console.say(
        f"  {counted(counts.ok, 'title')} done with {counted(counts.rows, row)}, {len(counts.failures)} failed; "
        f"{plan.done} were done before"
    )
    console.say(f"  dataset  {plan.dataset.output.store.uri}/{plan.target}")
    log_failures(counts.failures, console)
    return EXIT_FAILED_TITLES if len(counts.failures) > config.max_failed_fraction * counts.planned else EXIT_OK


def log_failures(failures: Sequence[tuple[str, str]], console: Console) -> None:
    """Log the titles that failed with their reasons, at most MAX_FAILURES_SHOWN."""
    if not failures:
        return
    console.say("\nfailures:")
    for title, reason in failures[:MAX_FAILURES_SHOWN]:
        console.say(public_line(f"  {title}: {reason}"))
    if len(failures) > MAX_FAILURES_SHOWN:
        console.say(f"  ... and {len(failures) - MAX_FAILURES_SHOWN} more")
