"""Logs of every run under unique names, written during the run: a killed run leaves its logs, and no run overwrites those of another.

    <output>/runs/<UTC time>-<id>/run.log, titles.jsonl              the printed lines; a JSON line for each title that ended
    <output>/runs/<UTC time>-<id>/run-0002.log, titles-0002.jsonl    the continuation after the first 256 KiB of each, and so on
    <output>/runs/<UTC time>-<id>/run-summary.json                   written at the end of the run; a killed one has none
    <output>/run-summary.json, run.log, titles.jsonl                 the same of the last run that ended by itself, each log whole

``<UTC time>`` is the start of the run, such as 20261125T020000Z. jobs.contextualise_catalog has other names for the three files.
Object storage has no append: the last part of a log is written again every few seconds if it has grown, earlier parts never.
The newest MAX_RUNS runs are kept; older ones are removed when a run begins.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, TextIO

from mediafm_ray.runs.report import LOG, SUMMARY, TITLES_LOG, Console, write_summary
from mediafm_ray.storage.store import StorageError, Store

log = logging.getLogger(__name__)

RUNS = "runs"
RUN_PATTERN = re.compile(rf"{RUNS}/(\d{{8}}T\d{{6}}Z-[0-9a-f]{{8}})/.+")
MAX_RUNS = 100  # Number of runs whose logs are kept.
MAX_PART_BYTES = 256 << 10  # Size of an object of a log.
LOCAL_INTERVAL_S = 1.0  # Time between two writes.
REMOTE_INTERVAL_S = 10.0  # A write is a request that costs money.


class RunLog:
    """Context manager that writes the output of a console to the store, and the traceback of an exception that ends the block.

    A failure of the store during the run is a warning, and the write is repeated. Raises StorageError where the end cannot be written.
    """

    def __init__(self, console: Console, store: Store, names: tuple[str, str, str] = (SUMMARY, LOG, TITLES_LOG)):
        """``names``: the names of summary, log and titles' log in the folder of this run and at the root of the output."""
        self.console, self.store, self.names = console, store, names
        self.folder = f"{RUNS}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"
        streams = (console.lines, console.titles)
        self.kept = [_Parts(store, f"{self.folder}/{name}", stream) for name, stream in zip(names[1:], streams, strict=True)]
        self.interval_s = LOCAL_INTERVAL_S if store.is_local else REMOTE_INTERVAL_S
        self.over = threading.Event()
        self.writer = threading.Thread(target=self._write_until_over, name="run log", daemon=True)

    def __enter__(self) -> RunLog:
        self.console.keep(f"process {os.getpid()} on {socket.gethostname()}, {self.store.uri}/{self.folder}")
        self.writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.console.keep("".join(traceback.format_exception(error)))
        self.over.set()
        self.writer.join()
        try:
            self._write()
        except StorageError as failure:
            if error is None:
                raise
            log.warning("the end of the run's log could not be written: %s", failure)

    def end(self, content: Mapping[str, Any]) -> None:
        """Write the run's summary beside its logs, and again with the whole logs at the root of the output. Raises StorageError."""
        for folder in (f"{self.folder}/", ""):
            write_summary(self.store, {**content, "run": self.folder}, folder + self.names[0])
        self.console.write_log(self.store, self.names[1:])

    def _write_until_over(self) -> None:
        try:
            remove_old_runs(self.store)
        except StorageError as error:
            log.warning("the logs of old runs could not be removed: %s", error)
        while not self.over.wait(self.interval_s):
            try:
                self._write()
            except StorageError as error:
                log.warning("the run's log could not be written, trying again: %s", error)

    def _write(self) -> None:
        for parts in self.kept:
            parts.write()


class _Parts:
    """A log in objects of at most MAX_PART_BYTES."""

    def __init__(self, store: Store, name: str, stream: TextIO):
        self.store, self.name, self.descriptor = store, name, stream.fileno()
        self.number, self.start, self.written = 1, 0, 0  # Number of the last part, bytes before it, bytes written.

    def write(self) -> None:
        """Write what is new: the last part again, and further parts."""
        size = os.fstat(self.descriptor).st_size
        while self.written < size:
            content = os.pread(self.descriptor, min(size - self.start, MAX_PART_BYTES), self.start)  # It keeps the position.
            is_full = len(content) == MAX_PART_BYTES
            if is_full:
                content = content[: content.rfind(b"\n") + 1] or content
            base, dot, ending = self.name.rpartition(".")
            self.store.write(self.name if self.number == 1 else f"{base}-{self.number:04d}{dot}{ending}", content)
            self.written = self.start + len(content)
            if is_full:
                self.number, self.start = self.number + 1, self.written


def remove_old_runs(store: Store) -> None:
    """Remove the logs of all but the newest MAX_RUNS - 1 runs, before another one begins."""
    names: dict[str, list[str]] = {}
    for info in store.list(f"{RUNS}/"):
        if match := RUN_PATTERN.fullmatch(info.name):
            names.setdefault(match[1], []).append(info.name)
    for run in sorted(names)[: max(0, len(names) - MAX_RUNS + 1)]:
        for name in names[run]:
            store.delete(name)
