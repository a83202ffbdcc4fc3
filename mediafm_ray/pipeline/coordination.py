"""The state that the actors of a run share, as plain classes that ``budget`` and ``deaths`` put into actors.

Standard library only: the processes of these actors start with the run, beside the detector, and an import of ray.data or of torch there
would keep the first title waiting.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence


class Budget:
    """The limits of a run and what the titles that have begun use of them."""

    def __init__(
        self, max_video_s: float, wall_left_s: float, expected_s: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ):
        self.max_video_s, self.expected_s, self.clock = max_video_s, expected_s, clock
        self.wall_until = clock() + wall_left_s
        self.seconds_of_title: dict[str, float] = {}  # Expected seconds until a title is read, then the true ones.
        self.video_s = 0.0  # The sum of the above.
        self.ended_by = ""

    def take(self, title_id: str) -> str:
        """Begin a title; return an empty string, or the limit that keeps it from beginning. A title that began before may begin again."""
        if title_id in self.seconds_of_title:  # Its actor died.
            return ""
        if not self.ended_by and self.max_video_s and self.video_s >= self.max_video_s:
            self.ended_by = "max_video_hours"
        if not self.ended_by and self.clock() >= self.wall_until:
            self.ended_by = "max_wall_minutes"
        if not self.ended_by:
            self.was_read(title_id, self.expected_s.get(title_id, 0.0))
        return self.ended_by

    def was_read(self, title_id: str, duration_s: float) -> None:
        """Replace the expected seconds of video of a title that has begun by the true ones."""
        self.video_s += duration_s - self.seconds_of_title.get(title_id, 0.0)
        self.seconds_of_title[title_id] = duration_s

    def give_back(self, title_id: str, reason: str) -> None:
        """Count a title that has begun as not taken after all, and take no more titles."""
        self.video_s -= self.seconds_of_title.pop(title_id, 0.0)
        self.end(reason)

    def end(self, reason: str) -> None:
        """Take no more titles."""
        self.ended_by = self.ended_by or reason

    def state(self) -> tuple[str, int]:
        """Return the limit that ended the budget (empty while it lasts) and the number of titles that were taken."""
        return self.ended_by, len(self.seconds_of_title)


class DeathRegister:
    """The titles that each process is working on. Its size grows with the number of processes, not of titles."""

    def __init__(self) -> None:
        self.in_hand: dict[str, list[tuple[str, str]]] = {}  # Stages and titles by process.
        self.processes_with: Counter[tuple[str, str]] = Counter()

    def take(self, process: str, stage: str, titles: Sequence[str]) -> list[int]:
        """Note that a process begins these titles; return for each the number of other processes that began it and never went on.

        Those processes have ended, or are about to be found dead.
        """
        for key in self.in_hand.pop(process, ()):
            self.processes_with[key] -= 1
            if not self.processes_with[key]:
                del self.processes_with[key]
        keys = [(stage, title) for title in titles]
        others = [self.processes_with[key] for key in keys]
        self.in_hand[process] = keys
        self.processes_with.update(keys)
        return others

    def alone_with(self, stage: str, title: str) -> int:
        """Return the number of processes that are working on this title alone."""
        return sum(keys == [(stage, title)] for keys in self.in_hand.values())
