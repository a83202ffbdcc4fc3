"""Statistics of a title's shots, and a warning if they are implausible. Numpy only.

Too many or too few shots spoil everything after the detector, and no later stage can notice.

Plausible values: the average shot of English-language films fell from about 12 s in the 1930s to 2.5 ... 4 s today (Cutting, Brunick,
DeLong, Iricinschi and Candan 2011, "Quicker, faster, darker: changes in Hollywood film over 75 years"); trailers, music videos and
montages come near 1 s. So an average below MIN_AVERAGE_S, or many shots shorter than a fixation of the eye, suggest flicker, damage or
noise that was taken for cuts. Averages above MAX_AVERAGE_S occur in lectures, surveillance, games and a few one-take films, or when
the detector missed the cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_AVERAGE_S = 1.0
MAX_AVERAGE_S = 60.0
BLINK_S = 0.25  # About the shortest fixation of the eye.
MAX_BLINK_SHARE = 0.25  # share of all shots
MIN_SHOTS = 10  # Averages and shares of fewer shots mean little.
MIN_JUDGED_S = 300.0  # A shorter title may be one shot.


@dataclass(frozen=True)
class ShotStatistics:
    """Statistics of one title's shots; lengths in seconds."""

    shots: int
    shots_per_minute: float
    average_s: float
    shortest_s: float
    p10_s: float
    median_s: float
    p90_s: float
    longest_s: float
    warning: str  # why the shots are implausible, for people; empty if they are plausible


def shot_statistics(lengths_s: Sequence[float]) -> ShotStatistics:
    """Return the statistics of a title from the lengths of its shots in seconds; all zero for a title without shots.

    Raises ValueError for a length that is negative or not finite.
    """
    lengths = np.asarray(lengths_s, np.float64)
    if not np.all(np.isfinite(lengths) & (lengths >= 0)):
        raise ValueError("lengths of shots must be finite and not negative")
    if len(lengths) == 0 or lengths.sum() == 0:
        return ShotStatistics(len(lengths), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, "")
    total = float(lengths.sum())
    p10, median, p90 = (float(value) for value in np.percentile(lengths, [10, 50, 90]))
    return ShotStatistics(
        shots=len(lengths),
        shots_per_minute=60 * len(lengths) / total,
        average_s=total / len(lengths),
        shortest_s=float(lengths.min()),
        p10_s=p10,
        median_s=median,
        p90_s=p90,
        longest_s=float(lengths.max()),
        warning=_warning(lengths, total),
    )


def _warning(lengths: np.ndarray, total_s: float) -> str:
    average_s = total_s / len(lengths)
    if len(lengths) >= MIN_SHOTS and average_s < MIN_AVERAGE_S:
        return f"{len(lengths)} shots, {average_s:.2f} s on average (under {MIN_AVERAGE_S:g} s): flicker or damage may be taken for cuts"
    blinks = float((lengths < BLINK_S).mean())
    if len(lengths) >= MIN_SHOTS and blinks > MAX_BLINK_SHARE:
        return f"{blinks:.0%} of {len(lengths)} shots are shorter than {BLINK_S:g} s: flashes or damage may be taken for cuts"
    if total_s >= MIN_JUDGED_S and average_s > MAX_AVERAGE_S:
        return f"{len(lengths)} shots in {total_s / 60:.0f} min (over {MAX_AVERAGE_S:g} s each on average): cuts may have been missed"
    return ""
