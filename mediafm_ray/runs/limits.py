"""The limits of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a run may take, beside the number of titles."""

    max_video_s: float  # seconds of video; 0 = no limit
    wall_until: float  # time.monotonic() at which the last title may begin; infinity = no limit
    expected_s: Mapping[str, float]  # seconds of video by title id, where something is known before it is read
    interrupted: Callable[[], str]  # asked after each title: a reason to take no more, or empty
    drains: bool = True  # whether a first SIGTERM lets the titles that are begun end


NO_LIMITS = Limits(0.0, math.inf, {}, lambda: "", drains=False)
