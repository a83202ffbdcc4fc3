"""Limits of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a run other than the number of titles."""

    max_video_s: float  # Seconds of video; 0 = no limit.
    wall_until: float  # time.monotonic() until which titles may begin; infinity = no limit.
    expected_s: Mapping[str, float]  # Seconds of video by title id, as far as known before reading.
    interrupted: Callable[[], str]  # Called after each title: a reason to take no more, or empty.
    drains: bool = True  # Whether titles that have begun are finished after a first SIGTERM.


NO_LIMITS = Limits(0.0, math.inf, {}, lambda: "", drains=False)
