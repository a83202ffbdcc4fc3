"""Runs of shots that two titles share, from pairs of shots that look alike. numpy only.

Like copy detection (Douze, Jegou and Schmid 2010, "An image-based approach to video copy detection with spatio-temporal
post-filtering", IEEE Transactions on Multimedia 12(4), 257-266): pairs of shots that are near each other vote for the offset between their
titles, and only what agrees in time counts. Then the two titles are laid over each other at an offset and compared along their time, not
shot by shot, because a cut may be found in one of them only. Runs are the maximal scoring segments of that comparison (Ruzzo and Tompa
1999, "A linear time algorithm for finding all maximal scoring subsequences").

Shapes
    S  shots of a title
    E  pairs of near shots
    P  pieces of time in which no shot of either title ends
    D  dimension of a vector
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE_S = 0.15  # boundaries that differ by less are one: a frame or two, of either rate
MIN_PIECE_S = 0.2  # shorter pieces are where the detector puts one cut a frame or two apart
RIVAL = 0.75  # share of the strength of a pair from which another shot explains it as well
MAX_RIVALS = 9  # of a pair: the product of those of its two shots, themselves included
NORMAL_95 = 1.645  # standard deviations from the median to the 95 % quantile of a normal distribution
DEVIATIONS = 4  # above the median, where unrelated shots end
MAX_UNRELATED = 0.95  # for titles of which all shots are nearly equal
MAX_ALIKE = 0.5  # share of the way from unrelated shots to equal ones where shots that look alike end
NEARLY_EXACT = 0.55  # share of the way from these to equal ones from which one shot alone can be a repeat
MIN_EVIDENCE = 0.5  # of a run of several shots without its best one, which may be a logo; equal shots without rivals give 1 each
MAX_CROWD = 4  # titles that can share a shot which stands alone


@dataclass(frozen=True, eq=False)
class TitleShots:
    """The shots of a title in order: seconds, and unit vectors that are zero where a shot has none."""

    start_S: np.ndarray  # float64
    end_S: np.ndarray  # float64
    unit_SD: np.ndarray  # float32
    crowd_S: np.ndarray  # int64, other titles that have a shot which is nearly the same


@dataclass(frozen=True)
class Levels:
    """Cosines that tell repeats from coincidences, from the catalog itself."""

    unrelated: float  # two shots of different titles, drawn at random, are hardly nearer
    alike: float  # shots that look alike, but are not the same, are hardly nearer
    single: float  # from here on one shot alone can be a repeat

    def describe(self) -> str:
        """Describe them in one line."""
        return (
            f"cosines: {self.unrelated:.3f} of unrelated shots, {self.alike:.3f} of shots that look alike, "
            f"from {self.single:.3f} one shot alone can be a repeat"
        )


def unrelated_level(cosines: np.ndarray) -> float:
    """Return the cosine that unrelated shots hardly reach, from cosines of shots of different titles that were drawn at random.

    The upper part of their distribution has what looks alike, and repeats. The lower half says how far the upper one would reach without.
    """
    if not len(cosines):
        return MAX_UNRELATED
    low, middle = (float(bound) for bound in np.quantile(cosines, [0.05, 0.5]))
    return min(middle + DEVIATIONS * (middle - low) / NORMAL_95, MAX_UNRELATED)


def levels_of(unrelated: float, best_N: np.ndarray) -> Levels:
    """Return the levels of a catalog. ``best_N``: of every shot, the cosine to the nearest of other titles.

    Most shots do not recur, so that the median of ``best_N`` is that of shots that look alike; where most do, it is bounded.
    """
    bound = unrelated + MAX_ALIKE * (1 - unrelated)
    alike = min(float(np.median(best_N)), bound) if len(best_N) else bound
    return Levels(unrelated, alike, alike + NEARLY_EXACT * (1 - alike))


@dataclass(frozen=True, eq=False)
class Overlay:
    """Two titles laid over each other at an offset: pieces of time, with the shots that they show and their cosines."""

    a_P: np.ndarray  # int64, shot of the first title
    b_P: np.ndarray  # int64, shot of the second
    start_P: np.ndarray  # float64, seconds in the first title
    end_P: np.ndarray  # float64
    cosine_P: np.ndarray  # float32

    def where(self, chosen: np.ndarray | slice) -> Overlay:
        """Return some of the pieces."""
        return Overlay(self.a_P[chosen], self.b_P[chosen], self.start_P[chosen], self.end_P[chosen], self.cosine_P[chosen])


def lay_over(a: TitleShots, b: TitleShots, offset: float) -> Overlay:
    """Compare two titles along their time, where the second title shows at ``t + offset`` what the first shows at ``t``."""
    cuts = np.unique(np.concatenate([a.start_S, a.end_S, b.start_S - offset, b.end_S - offset]))
    cuts = cuts[(cuts >= max(a.start_S[0], b.start_S[0] - offset)) & (cuts <= min(a.end_S[-1], b.end_S[-1] - offset))]
    middle_P = (cuts[:-1] + cuts[1:]) / 2
    a_P = np.searchsorted(a.start_S, middle_P, "right") - 1
    b_P = np.searchsorted(b.start_S, middle_P + offset, "right") - 1
    cosine_P = np.einsum("pd,pd->p", a.unit_SD[a_P], b.unit_SD[b_P])
    return Overlay(a_P, b_P, cuts[:-1], cuts[1:], cosine_P)


@dataclass(frozen=True)
class Run:
    """A run of shots that two titles share, in seconds and shots of each, both last ones included."""

    first_shot_a: int
    last_shot_a: int
    first_shot_b: int
    last_shot_b: int
    start_a_s: float
    end_a_s: float
    start_b_s: float
    end_b_s: float
    offset_s: float
    shots: int  # of the title that has fewer
    mean_cosine: float  # weighted by seconds
    min_cosine: float
    exact: bool
    score: float


def find_runs(a: TitleShots, b: TitleShots, offsets: Sequence[float], levels: Levels, min_seconds: float) -> list[Run]:
    """Return the runs that two titles share at some offsets, in order; of runs that overlap in both titles the best."""
    strength_AB = np.maximum(a.unit_SD @ b.unit_SD.T - levels.alike, 0) / (1 - levels.alike)
    found: list[Run] = []
    for offset in offsets:
        overlay = lay_over(a, b, offset)
        strength_P = strength_AB[overlay.a_P, overlay.b_P]
        rivals_P = (strength_AB[overlay.a_P] >= RIVAL * strength_P[:, None]).sum(axis=1)
        rivals_P *= (strength_AB[:, overlay.b_P] >= RIVAL * strength_P).sum(axis=0)
        evidence_P = strength_P / np.sqrt(rivals_P)
        gain_P = (overlay.cosine_P - levels.alike) * (overlay.end_P - overlay.start_P)
        gain_P[(gain_P > 0) & (rivals_P > MAX_RIVALS)] = 0  # A run does not begin or end with what could be anything.
        for first, last in maximal_segments(gain_P.tolist()):
            pieces = slice(first, last + 1)
            run = _run(a, b, overlay.where(pieces), evidence_P[pieces], offset, levels)
            if run is not None and run.end_a_s - run.start_a_s >= min_seconds:
                found.append(run)
    return _without_overlaps(found)


def _run(a: TitleShots, b: TitleShots, overlay: Overlay, evidence_P: np.ndarray, offset: float, levels: Levels) -> Run | None:
    """Return the run of the pieces of an overlay, or None where they can be a coincidence."""
    chosen_P = (overlay.cosine_P > levels.alike) & (overlay.end_P - overlay.start_P > MIN_PIECE_S)
    overlay, evidence_P = overlay.where(chosen_P), evidence_P[chosen_P]
    a_P, b_P, cosine_P, seconds_P = overlay.a_P, overlay.b_P, overlay.cosine_P, overlay.end_P - overlay.start_P
    if not len(a_P):
        return None
    differences_2P = np.stack([b.start_S[b_P] - a.start_S[a_P], b.end_S[b_P] - a.end_S[a_P]])
    agree_2P = np.abs(differences_2P - offset) <= TOLERANCE_S
    alone_P = agree_2P.all(axis=0) & (cosine_P >= levels.single) & (evidence_P >= MIN_EVIDENCE)
    alone_P &= np.maximum(a.crowd_S[a_P], b.crowd_S[b_P]) <= MAX_CROWD
    if not alone_P.any() and min(_without_best(evidence_P, shots_P) for shots_P in (a_P, b_P)) < MIN_EVIDENCE:
        return None
    shots = min(len(np.unique(a_P)), len(np.unique(b_P)))
    agreeing = differences_2P[agree_2P]
    exact = all(np.array_equal(a.unit_SD[i], b.unit_SD[j]) for i, j in zip(a_P, b_P, strict=True))
    offset = float(np.median(agreeing)) if len(agreeing) else offset
    start_s = float(max(a.start_S[a_P[0]], b.start_S[b_P[0]] - offset))
    end_s = float(min(a.end_S[a_P[-1]], b.end_S[b_P[-1]] - offset))
    return Run(
        first_shot_a=int(a_P[0]),
        last_shot_a=int(a_P[-1]),
        first_shot_b=int(b_P[0]),
        last_shot_b=int(b_P[-1]),
        start_a_s=start_s,
        end_a_s=end_s,
        start_b_s=start_s + offset,
        end_b_s=end_s + offset,
        offset_s=offset,
        shots=shots,
        mean_cosine=float(np.average(cosine_P, weights=seconds_P)),
        min_cosine=float(cosine_P.min()),
        exact=exact,
        score=float(evidence_P @ seconds_P),
    )


def _without_best(evidence_P: np.ndarray, shots_P: np.ndarray) -> float:
    """Sum the best evidence of each shot, without the best shot."""
    best = [float(evidence_P[shots_P == shot].max()) for shot in np.unique(shots_P)]
    return sum(best) - max(best)


def _without_overlaps(runs: Sequence[Run]) -> list[Run]:
    """Keep the best of runs that overlap by more than half of the shorter in both titles."""
    kept: list[Run] = []
    for run in sorted(runs, key=lambda run: (-run.score, run.start_a_s, run.start_b_s)):
        if not any(_overlap(run, other) for other in kept):
            kept.append(run)
    return sorted(kept, key=lambda run: (run.start_a_s, run.start_b_s))


def _overlap(run: Run, other: Run) -> bool:
    def share(start: float, end: float, other_start: float, other_end: float) -> float:
        return (min(end, other_end) - max(start, other_start)) / max(min(end - start, other_end - other_start), 1e-9)

    return (
        share(run.start_a_s, run.end_a_s, other.start_a_s, other.end_a_s) > 0.5
        and share(run.start_b_s, run.end_b_s, other.start_b_s, other.end_b_s) > 0.5
    )


def maximal_segments(gains: Sequence[float]) -> list[tuple[int, int]]:
    """Return first and last place of every maximal scoring segment of a sequence of gains and losses, in order."""
    found: list[tuple[int, int, float, float]] = []  # first and last place, the sums before and with the segment
    total = 0.0
    for place, gain in enumerate(gains):
        before, total = total, total + gain
        if gain <= 0:
            continue
        segment = (place, place, before, total)
        while True:
            lower = next((k for k in reversed(range(len(found))) if found[k][2] < segment[2]), None)
            if lower is None or found[lower][3] >= segment[3]:
                found.append(segment)
                break
            segment = (found[lower][0], place, found[lower][2], total)
            del found[lower:]
    return [(first, last) for first, last, _, _ in found]
