"""Choice of the frames of a shot that are kept: those on screen at the centres of equal parts of its time.

A shot's end is known only some frames after it, so every recent frame waits as a candidate; for a very long shot the older
candidates are thinned to every second, fourth, eighth ... frame, so that memory stays bounded and the choice uniform.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Picture = TypeVar("Picture")

# Recent frames that are never thinned. A detector settles a boundary within about 700 frames: its wide windows, gathered for its
# threads, and the blocks on their way. With a smaller limit the frames of short shots would be chosen from thinned ones.
DENSE_FRAMES = 1024
SPARSE_FRAMES = 128  # maximum number of older frames of the open shot


@dataclass
class Candidate(Generic[Picture]):
    """A frame that may be kept, with its time in ticks."""

    index: int
    ticks: int
    picture: Picture


class CandidateBuffer(Generic[Picture]):
    """The frames since the last settled boundary: all of the recent ones, a thinned choice of the older ones."""

    def __init__(self, discard: Callable[[Picture], None] = lambda picture: None) -> None:
        self.discard = discard  # called with every picture that is not needed any more
        self.first_index = 0  # first frame of the open shot
        self.ticks = array("q")  # times of all frames since then; 8 bytes a frame
        self.sparse: list[Candidate[Picture]] = []
        self.dense: deque[Candidate[Picture]] = deque()
        self.stride = 1

    def add(self, frame: Candidate[Picture]) -> None:
        """Take the next frame. ``ticks`` grow from frame to frame."""
        self.ticks.append(frame.ticks)
        self.dense.append(frame)
        if len(self.dense) > DENSE_FRAMES:
            self.sparse.append(self.dense.popleft())
            self._thin()

    def _thin(self) -> None:
        """Keep every ``stride``-th of the older frames; double the stride where there are too many."""
        if (self.sparse[-1].index - self.first_index) % self.stride:
            self.discard(self.sparse.pop().picture)
        if len(self.sparse) > SPARSE_FRAMES:
            self.stride *= 2
            old, self.sparse = self.sparse, []
            for one in old:
                if (one.index - self.first_index) % self.stride == 0:
                    self.sparse.append(one)
                else:
                    self.discard(one.picture)

    def start_ticks(self, index: int) -> int:
        """Return the time at which frame ``index`` is first shown."""
        return self.ticks[index - self.first_index]

    def choose(self, end_index: int, end_ticks: int, count: int) -> list[Candidate[Picture]]:
        """Return at most ``count`` different frames of the open shot ``[first_index, end_index)``, in order.

        The shot is divided into equal parts of time, as many as frames are wanted; the frame on screen at the centre of
        each is taken. Where candidates were thinned it is the last kept one before that centre.
        """
        within = [one for one in (*self.sparse, *self.dense) if one.index < end_index]
        times = [one.ticks for one in within]
        start_ticks = self.ticks[0]
        parts = min(count, end_index - self.first_index)
        chosen: dict[int, Candidate[Picture]] = {}
        for part in range(parts):
            centre = start_ticks + (2 * part + 1) * (end_ticks - start_ticks) / (2 * parts)
            one = within[max(bisect_right(times, centre) - 1, 0)]
            chosen[one.index] = one
        return list(chosen.values())

    def drop_before(self, index: int) -> None:
        """Let the open shot start at frame ``index``; drop all frames before it."""
        del self.ticks[: index - self.first_index]
        self.first_index, self.stride = index, 1
        candidates = [*self.sparse, *self.dense]
        self.sparse = []
        self.dense.clear()
        for one in candidates:
            if one.index < index:
                self.discard(one.picture)
            else:
                self.dense.append(one)
        while len(self.dense) > DENSE_FRAMES:
            self.sparse.append(self.dense.popleft())
            self._thin()
