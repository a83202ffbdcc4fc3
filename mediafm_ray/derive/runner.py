"""Datasets that are derived from committed vectors, one object a title: what is pending, and how the titles are done. No ray here.

A title is an object read, some arithmetic on one core, and an object written: threads of one process keep a disk or a bucket busy.
As everywhere, an object that exists is committed, and what is pending is one listing minus another.

Shapes
    S  shots of the title
    D  dimension of an embedding
"""

from __future__ import annotations

import logging
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
from threadpoolctl import threadpool_limits

from mediafm_ray.config.sections import DerivedRunConfig
from mediafm_ray.errors import TitleError
from mediafm_ray.runs.command import EXIT_FAILED_TITLES, EXIT_OK
from mediafm_ray.runs.report import MAX_FAILURES_SHOWN, Console
from mediafm_ray.storage.dataset import SHOTS, DatasetError, EmbeddingDataset, matching_object, newest_objects, object_key
from mediafm_ray.storage.schemas import encode_parquet
from mediafm_ray.text import public_line

log = logging.getLogger(__name__)
PROGRESS_S = 5.0  # seconds between lines of progress
MAX_TITLES_LISTED = 50  # so many have a line each
IN_FLIGHT_PER_THREAD = 2  # titles that are read or waiting: memory does not grow with the catalog
Item = TypeVar("Item")
Result = TypeVar("Result")


# --------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class PendingTitle:
    """A title to do."""

    title: str  # its id, for people: a very long one ends in a digest
    shots: str  # name of its newest object of ``shots``
    superseded: tuple[str, ...]  # objects of older sources, to remove once this one is committed


@dataclass(frozen=True)
class DerivedPlan:
    """The titles to do and where they go."""

    dataset: EmbeddingDataset
    target: str  # the dataset that is written
    pending: tuple[PendingTitle, ...]
    titles: int  # committed in ``shots``
    done: int  # committed in the target before
    left: int  # pending, but beyond run.max_titles
    leftovers: tuple[str, ...]  # of an earlier run: objects whose successor is committed

    def describe(self, made_from: str) -> str:
        """What the run is about to do, in a line."""
        later = f", {self.left} left for later" if self.left else ""
        return (
            f"{self.target}, from {made_from} of dataset version {self.dataset.version}: {self.titles} titles, "
            f"{self.done} committed before, {len(self.pending)} to do{later}"
        )


def make_derived_plan(dataset: EmbeddingDataset, target: str, config: DerivedRunConfig) -> DerivedPlan:
    """List the committed shots and what stands in the target already; pending is the difference. Writes nothing.

    Raises DatasetError where nothing is committed.
    """
    shots = newest_objects(dataset.output.list(SHOTS))
    if not shots:
        raise DatasetError(f"{dataset.output.store.uri} has no committed shots: run python -m jobs.embed_catalog first")
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
            pending.append(PendingTitle(urllib.parse.unquote(title), info.name, tuple(older)))
    taken = pending[: config.max_titles] if config.max_titles else pending
    done = len(shots) - len(pending)
    return DerivedPlan(dataset, target, tuple(taken), len(shots), done, len(pending) - len(taken), tuple(leftovers))


# ---------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True, eq=False)
class Derived:
    """What is made of one title."""

    table: pa.Table
    facts: Mapping[str, Any]  # for the file's metadata
    line: str  # for people


@dataclass
class Tally:
    """How the titles ended."""

    planned: int
    ok: int = 0
    rows: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)  # title, reason

    @property
    def finished(self) -> int:
        """Titles that ended, one way or the other."""
        return self.ok + len(self.failures)


def derive_titles(plan: DerivedPlan, make: Callable[[PendingTitle], Derived], config: DerivedRunConfig, console: Console) -> Tally:
    """Make and commit every pending title with threads, and say how it goes. Whatever ``make`` raises is that title's failure.

    Raises StorageError when the output cannot be written.
    """
    store = plan.dataset.output.store
    store.check_writable()
    for name in plan.leftovers:
        store.delete(name)

    def attempt(pending: PendingTitle) -> tuple[PendingTitle, Derived | None, str]:
        try:
            made = make(pending)
            store.write(matching_object(pending.shots, plan.target), encode_parquet(made.table, made.facts))
            for name in pending.superseded:
                store.delete(name)
            return pending, made, ""
        except Exception as error:  # a title's failure is a value, the job goes on
            if isinstance(error, TitleError):
                return pending, None, str(error)
            log.exception("title %s failed", pending.title)
            return pending, None, f"{type(error).__name__}: {error}"

    with threadpool_limits(limits=1):  # a core a title: threads of threads would wait for each other
        return _follow(in_order(attempt, plan.pending, config.threads), len(plan.pending), console)


def _follow(ended: Iterator[tuple[PendingTitle, Derived | None, str]], planned: int, console: Console) -> Tally:
    """Count the titles as they end, and say how it goes."""
    tally, begun = Tally(planned), time.monotonic()
    said = begun
    for pending, made, reason in ended:
        if made is None:
            tally.failures.append((pending.title, reason))
            console.say(public_line(f"FAILED {pending.title}: {reason}"))
        else:
            tally.ok += 1
            tally.rows += made.table.num_rows
            if tally.planned <= MAX_TITLES_LISTED:
                console.say(public_line(f"[{tally.finished:>{len(str(tally.planned))}}/{tally.planned}] {pending.title}: {made.line}"))
        now = time.monotonic()
        if tally.planned > MAX_TITLES_LISTED and (now - said > PROGRESS_S or tally.finished == tally.planned):
            said = now
            pace = tally.finished / max(now - begun, 1e-9)
            console.say(f"[{tally.finished}/{tally.planned}] {pace:.1f} titles a second, {len(tally.failures)} failed")
    return tally


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """``work`` of each item by threads, in the order of the items, a few of them ahead: what is not asked for is not begun."""
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


def finish(plan: DerivedPlan, tally: Tally, rows: str, config: DerivedRunConfig, console: Console) -> int:
    """The end of a run for a person; the exit code. ``rows``: what a row of the dataset is called."""
    console.say()
    console.say(f"  {tally.ok} titles done with {tally.rows} {rows}, {len(tally.failures)} failed; {plan.done} were done before")
    console.say(f"  dataset  {plan.dataset.output.store.uri}/{plan.target}")
    say_failures(tally.failures, console)
    return EXIT_FAILED_TITLES if len(tally.failures) > config.max_failed_fraction * tally.planned else EXIT_OK


def say_failures(failures: Sequence[tuple[str, str]], console: Console) -> None:
    """The titles that failed, each with its reason; the first of many."""
    if not failures:
        return
    console.say("\nfailures:")
    for title, reason in failures[:MAX_FAILURES_SHOWN]:
        console.say(public_line(f"  {title}: {reason}"))
    if len(failures) > MAX_FAILURES_SHOWN:
        console.say(f"  ... and {len(failures) - MAX_FAILURES_SHOWN} more")
