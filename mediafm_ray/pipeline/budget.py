"""The budget of a run: one actor that every ``DetectShots`` asks before it begins a title, so that the job ends within its limits.

A budget stops new titles only; titles that have begun are finished. A run can therefore exceed it by the titles that are being processed
when it is reached, one for each actor. A title that does not fit as a whole is taken nevertheless: otherwise a film longer than the
budget would never be processed.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayActorError

from mediafm_ray.pipeline.cluster import on_this_node
from mediafm_ray.pipeline.coordination import Budget
from mediafm_ray.pipeline.rows import SKIPPED
from mediafm_ray.runs.limits import Limits
from mediafm_ray.runs.report import RunResult

ASKED_TO_END = "SIGTERM"


class SharedBudget:
    """A ``stages.TitleBudget`` that can be sent to any actor of the job."""

    def __init__(self, limits: Limits):
        self.drains = limits.drains
        keeper = ray.remote(num_cpus=0)(Budget).options(scheduling_strategy=on_this_node())
        self.keeper: Any = keeper.remote(limits.max_video_s, limits.wall_until - time.monotonic(), dict(limits.expected_s))

    def take(self, title_id: str) -> bool:
        """See TitleBudget."""
        try:
            return not ray.get(self.keeper.take.remote(title_id))
        except RayActorError:  # This is no fault of the title's; the driver finds the same, and ends the run.
            return False

    def was_read(self, title_id: str, duration_s: float) -> None:
        """See TitleBudget."""
        self.keeper.was_read.remote(title_id, duration_s)  # There is no answer to wait for.

    def give_back(self, title_id: str, reason: str) -> None:
        """See TitleBudget."""
        ray.get(self.keeper.give_back.remote(title_id, reason))  # It waits, because ``follow`` asks for the state next.

    def follow(self, ended: Iterator[pa.Table], result: RunResult, interrupted: Callable[[], str]) -> Iterator[pa.Table]:
        """Yield the titles that ended, without those that were skipped, until the last one that was taken is finished.

        Afterwards ``result`` has the number of titles that are left and the reason. ``interrupted`` is called after each title and gives a
        reason to take no more, or an empty string. Titles that the graph has not reached then are not waited for.
        """
        finished = 0
        with draining(lambda: self.keeper.end.remote(ASKED_TO_END)) if self.drains else nullcontext():
            for table in ended:
                taken = table.filter(pc.not_equal(table["outcome"], SKIPPED)) if table.num_columns else table
                finished += taken.num_rows
                if taken.num_rows:
                    yield taken
                reason = interrupted()
                if reason:
                    ray.get(self.keeper.end.remote(reason))
                if taken.num_rows < table.num_rows or reason:
                    ended_by, begun = ray.get(self.keeper.state.remote())
                    if ended_by and finished >= begun:
                        break
        ended_by, begun = ray.get(self.keeper.state.remote())
        result.ended_by = ended_by or result.ended_by
        result.left = result.planned - begun


@contextmanager
def draining(end: Callable[[], Any]) -> Iterator[None]:
    """Call ``end`` at the first SIGTERM, so that the run finishes the titles that have begun; a second SIGTERM has its previous effect.

    Outside the main thread, where Python handles no signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked, over = threading.Event(), threading.Event()
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, before)

    def wait() -> None:  # It runs in a thread, because the signal may interrupt the main thread while that holds a lock of Ray.
        asked.wait()
        if not over.is_set():
            end()

    signal.signal(signal.SIGTERM, note)
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        over.set()
        asked.set()
        waiting.join()
