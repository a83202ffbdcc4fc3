"""What a run may take: one actor that every ``DetectShots`` asks before it begins a title, so that the job ends within its budget.

A budget stops new titles only; those begun are finished. It may be passed by what is under way when it is reached: a title for each
actor. A title that does not fit whole is taken all the same, or a film longer than the budget would never be done.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mediafm_ray.pipeline.rows import SKIPPED
from mediafm_ray.runs.limits import Limits
from mediafm_ray.runs.report import RunResult

ASKED_TO_END = "SIGTERM"


class Budget:
    """What is left of the limits; plain enough to be a Ray actor."""

    def __init__(
        self, max_video_s: float, wall_left_s: float, expected_s: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ):
        self.max_video_s, self.expected_s, self.clock = max_video_s, expected_s, clock
        self.wall_until = clock() + wall_left_s
        self.seconds_of_title: dict[str, float] = {}  # taken titles: expected until they are read, then true; failed ones stay as expected
        self.video_s = 0.0  # their sum
        self.ended_by = ""

    def take(self, title_id: str) -> str:
        """Begin a title: empty when it may, else what ended the budget. A title that was begun before may always begin again."""
        if title_id in self.seconds_of_title:  # its actor died
            return ""
        if not self.ended_by and self.max_video_s and self.video_s >= self.max_video_s:
            self.ended_by = "max_video_hours"
        if not self.ended_by and self.clock() >= self.wall_until:
            self.ended_by = "max_wall_minutes"
        if not self.ended_by:
            self.was_read(title_id, self.expected_s.get(title_id, 0.0))
        return self.ended_by

    def was_read(self, title_id: str, duration_s: float) -> None:
        """The seconds of video of a title that was begun."""
        self.video_s += duration_s - self.seconds_of_title.get(title_id, 0.0)
        self.seconds_of_title[title_id] = duration_s

    def give_back(self, title_id: str, reason: str) -> None:
        """A title that was begun is not finished in this run, and no more are taken."""
        self.video_s -= self.seconds_of_title.pop(title_id, 0.0)
        self.end(reason)

    def end(self, reason: str) -> None:
        """Take no more titles."""
        self.ended_by = self.ended_by or reason

    def state(self) -> tuple[str, int]:
        """What ended the budget (empty while it lasts), and how many titles were taken."""
        return self.ended_by, len(self.seconds_of_title)


class SharedBudget:
    """The budget of a job, for all its actors: a ``stages.TitleBudget`` that may be sent to any of them."""

    def __init__(self, limits: Limits):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # the driver's node: it lives as long
        self.drains = limits.drains
        keeper = ray.remote(num_cpus=0)(Budget).options(scheduling_strategy=here)
        self.keeper: Any = keeper.remote(limits.max_video_s, limits.wall_until - time.monotonic(), dict(limits.expected_s))

    def take(self, title_id: str) -> bool:
        """See TitleBudget."""
        try:
            return not ray.get(self.keeper.take.remote(title_id))
        except RayActorError:  # This is no fault of the title's; the driver finds the same, and ends the run.
            return False

    def was_read(self, title_id: str, duration_s: float) -> None:
        """See TitleBudget."""
        self.keeper.was_read.remote(title_id, duration_s)  # nothing to wait for

    def give_back(self, title_id: str, reason: str) -> None:
        """See TitleBudget."""
        ray.get(self.keeper.give_back.remote(title_id, reason))  # before the title goes on: whoever follows the results asks next

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
    """The first SIGTERM makes the run ``end`` with the titles that are begun; a second one does what it did before (Ray's: ends at once).

    Elsewhere than in the main thread, where Python takes no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked, over = threading.Event(), threading.Event()
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, before)

    def wait() -> None:  # in a thread: the signal may have come while the main one held a lock of Ray's
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
