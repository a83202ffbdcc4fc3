"""Processes that share the planning of a large catalog, which one process is busy with for minutes."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from logging.handlers import QueueHandler
from multiprocessing.connection import wait
from typing import Any, TypeVar

log = logging.getLogger(__name__)

MIN_ROWS = 200_000  # With fewer, the processes would take longer to start than they save.
MAX_PROCESSES = 8
AHEAD = 2  # Items for each process that are handed out before their turn.
START_METHOD = "spawn"  # A fork would copy locks that other threads hold.
OBJECTS_PER_COLLECTION = 500_000  # That may be garbage in cycles before Python looks for it.

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Processes that are started when there is work for them, and ended with the context. Pickled, it has none of them."""

    def __init__(self) -> None:
        self.count = min(os.cpu_count() or 1, MAX_PROCESSES)
        self.pool: ProcessPoolExecutor | None = None
        self.others: set[Any] = set()  # Processes that are somebody else's.

    def __reduce__(self) -> tuple[Any, ...]:
        return Workers, ()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pool:
            for process in set(multiprocessing.active_children()) - self.others:
                process.terminate()  # After an error or a signal some are still at work, and nobody waits for it.
            self.pool.shutdown(cancel_futures=True)

    def map(self, work: Callable[[Item], Result], items: Iterable[Item], rows: int) -> Iterator[Result]:
        """Yield ``work`` of each item in the order of the items, which are taken as they are needed.

        From MIN_ROWS ``rows`` of all items on, processes do it, for which ``work``, items and results can be pickled. What fails there is
        done again in this process, so that its error is raised here, with its causes.
        """
        if rows < MIN_ROWS or self.count < 2:
            yield from map(work, items)
            return
        pickle.dumps(work)  # Partitions write their items now: a full disk is an error here and not in a thread of the pool.
        waiting: deque[tuple[Item, Future[tuple[list[logging.LogRecord], Result]]]] = deque()
        for item in items:
            waiting.append((item, self._submit(work, item)))
            if len(waiting) > AHEAD * self.count:
                yield _result(work, *waiting.popleft())
        while waiting:
            yield _result(work, *waiting.popleft())

    def _submit(self, work: Callable[[Item], Result], item: Item) -> Future[tuple[list[logging.LogRecord], Result]]:
        if self.pool is None:
            context = multiprocessing.get_context(START_METHOD)
            level = logging.getLogger().getEffectiveLevel()
            self.others = set(multiprocessing.active_children())
            self.pool = ProcessPoolExecutor(self.count, context, initializer=_begin, initargs=(level,))
        try:
            return self.pool.submit(_logged, work, item)
        except BrokenExecutor as error:  # A process was killed.
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed


def _result(work: Callable[[Item], Result], item: Item, future: Future[tuple[list[logging.LogRecord], Result]]) -> Result:
    try:
        records, result = future.result()
    except Exception as error:
        log.info("a part of the plan is done again, because its process failed: %s: %s", type(error).__name__, error)
        return work(item)
    for record in records:
        logging.getLogger(record.name).handle(record)
    return result


def _begin(level: int) -> None:
    """Prepare a process: it ends with its parent, which alone minds signals from the terminal and writes the log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()
    logging.getLogger().setLevel(level)
    _collect_seldom()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _logged(work: Callable[[Item], Result], item: Item) -> tuple[list[logging.LogRecord], Result]:
    """Return what was logged during a piece of work, and its result."""
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = QueueHandler(records)
    logging.getLogger().addHandler(handler)
    try:
        result = work(item)
    finally:
        logging.getLogger().removeHandler(handler)
    return [records.get() for _ in range(records.qsize())], result


@contextlib.contextmanager
def few_collections() -> Iterator[None]:
    """Let Python look for garbage seldom, and not among the objects of the libraries: that takes half of the time of a plan.

    A plan makes millions of objects, hardly any of them in cycles.
    """
    before = gc.get_threshold()
    _collect_seldom()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _collect_seldom() -> None:
    gc.freeze()
    gc.set_threshold(OBJECTS_PER_COLLECTION, *gc.get_threshold()[1:])
