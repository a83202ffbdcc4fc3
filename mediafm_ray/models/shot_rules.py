"""Shots from the probabilities of TransNet V2 and the pictures themselves: transitions, and shots between them. Numpy only.

Shape suffixes
    T  frames                        H, W  rows and columns (27 x 48)
    C  channels                      S     positions of a frame, H * W
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from mediafm_ray.models.options import DetectorConfig
from mediafm_ray.spec import (
    BOUNDARY_CUT,
    BOUNDARY_GRADUAL,
    BOUNDARY_SPLIT,
    DETECTOR_HEIGHT,
    DETECTOR_WIDTH,
    ShotSpan,
)

# ------------------------------------------------------------------------- transitions from the probabilities and the pictures
#
# What the heads mean decides the rules (section 3 of the paper: one-hot marks a transition's middle, many-hot all of its frames):
#   cut      one frame above the threshold by one-hot; or below it but a spike, far above the frames on both sides. The network saw few
#            shots of less than half a second in training and is unsure there, but its answer stays as narrow as for any cut; camera
#            motion and effects of the same height give broad humps.
#   gradual  a run of frames that many-hot takes for a transition, which holds at least one middle: one-hot passes the threshold there or
#            its sum, the expected number of middles, is at least one (long transitions: no frame is surely the middle).
# The pictures decide what the heads cannot:
#   fade     two transitions with an empty picture in between (a fade out and a fade in) are one.
#   flash    a picture that comes back after a few frames was not left.
#   wipe     the network hardly answers to wipes. Their edge crosses the picture at a steady pace: the frame at which a position's picture
#            changes is a linear function of where it lies, which neither cuts, dissolves nor motion bring about.

GRADUAL_FRAMES = 3  # frames: a shorter run is a cut (2 frames where fields or frame-rate conversion blend its two sides)
LONGEST_TRANSITION = 100  # frames, the network's window: a longer run is closed there, so that shots settle
EMPTY_CONTRAST = 2.0  # levels of 255, standard deviation over a frame's pixels: less is a picture of one colour, but for coding noise
WIPE_WINDOW = 16  # frames in which an edge is looked for
WIPE_STRIDE = 4  # frames between such windows
LONGEST_WIPE = 40  # frames
WIPE_CHANGE = 24.0  # levels of 255: positions of two shots differ by more
WIPE_SHARE = 0.25  # of the positions that differ: so many change at once, the others move as well
WIPE_FIT = 0.9  # the share of the variance of the times of change that the linear function explains
CHANNEL_MEAN = np.full(3, 1 / 3, np.float32)  # a product with it is several times faster than numpy's mean over 3 channels
RETURNED = 0.5  # a picture came back when it differs from the one before by less than this share of the change itself


@dataclass(frozen=True)
class Transition:
    """A transition between two shots: the last frame that shows only the outgoing one and the first that shows only the incoming one."""

    last_before: int
    first_after: int
    kind: str
    probability: float  # the highest of the one-hot head

    @property
    def middle(self) -> int:
        """The frame at which the new shot starts: the first after a cut, the middle one of a gradual transition."""
        return (self.last_before + self.first_after + 1) // 2


class _Wipes:
    """Finder of wipes in a stream of frames: (last frame before, first frame after, fit of the steady edge in [0, 1])."""

    def __init__(self) -> None:
        self._steps: list[np.ndarray] = []  # of each kept frame: (27 * 48,) mean absolute change to the next frame, levels of 255
        self._frames: list[np.ndarray] = []
        self._oldest = 0
        self._window = 0  # where the next window begins
        self._settled = 0  # the last wipe's end

    @property
    def known_until(self) -> int:
        """The first frame at which a wipe that is still to come may begin."""
        return self._window - LONGEST_WIPE

    def push(self, frames_THWC: np.ndarray) -> list[tuple[int, int, float]]:
        for frame_HWC in frames_THWC:
            frame_SC = frame_HWC.reshape(-1, 3).astype(np.float32)
            if self._frames:
                self._steps.append(_change(self._frames[-1], frame_SC))
            self._frames.append(frame_SC)
        return self._look(ahead=LONGEST_WIPE)

    def finish(self) -> list[tuple[int, int, float]]:
        return self._look(ahead=0)

    def _look(self, ahead: int) -> list[tuple[int, int, float]]:
        found = []
        while self._window + WIPE_WINDOW + ahead < self._oldest + len(self._frames):
            wipe = self._wipe_at(self._window)
            if wipe is not None and wipe[0] >= self._settled:  # else another window's view of the same wipe
                found.append(wipe)
                self._settled = wipe[1]
            self._window += WIPE_STRIDE
        useless = self.known_until - self._oldest
        if useless > LONGEST_WIPE:
            del self._frames[:useless], self._steps[:useless]
            self._oldest += useless
        return found

    def _wipe_at(self, window: int) -> tuple[int, int, float] | None:
        edge = self._edge(window, window + WIPE_WINDOW)
        if edge is None:
            return None
        last_before, first_after, _ = edge
        inside = max(window - LONGEST_WIPE, self._oldest) <= last_before and first_after < self._oldest + len(self._frames)
        if not inside or not GRADUAL_FRAMES < first_after - last_before <= LONGEST_WIPE:
            return None
        whole = self._edge(last_before, first_after)  # seen from its beginning to its end, half of the picture at least is another one
        if whole is None or (self._difference(last_before, first_after) > WIPE_CHANGE).mean() < 0.5:
            return None
        return last_before, first_after, whole[2]

    def _edge(self, first: int, last: int) -> tuple[int, int, float] | None:
        """The edge that moves between two frames: when it enters and leaves the picture, and how well it is a straight, steady one."""
        steps_TS = np.stack(self._steps[first - self._oldest : last - self._oldest])
        largest_S = steps_TS.max(axis=0)
        changed_S = self._difference(first, last) > WIPE_CHANGE
        at_once_S = changed_S & (largest_S > 0.5 * steps_TS.sum(axis=0))
        if changed_S.mean() < 0.25 or at_once_S.sum() < WIPE_SHARE * changed_S.sum():
            return None
        times = steps_TS.argmax(axis=0)[at_once_S].astype(np.float64)
        coefficients = np.linalg.lstsq(_PLACES_S3[at_once_S], times, rcond=None)[0]
        variance = times.var()
        fit = 1 - (times - _PLACES_S3[at_once_S] @ coefficients).var() / variance if variance > 0 else 0.0
        if fit < WIPE_FIT:
            return None
        corners = _PLACES_S3[[0, DETECTOR_WIDTH - 1, -DETECTOR_WIDTH, -1]] @ coefficients
        return first + round(corners.min()), first + round(corners.max()) + 1, float(fit)

    def _difference(self, first: int, last: int) -> np.ndarray:
        return _change(self._frames[first - self._oldest], self._frames[last - self._oldest])


def _change(frame_SC: np.ndarray, other_SC: np.ndarray) -> np.ndarray:
    return np.abs(other_SC - frame_SC) @ CHANNEL_MEAN


# (S, 3): 1, row, column of every position, the latter two from 0 to 1
_PLACES_S3 = np.stack(
    [
        np.ones(DETECTOR_HEIGHT * DETECTOR_WIDTH),
        np.repeat(np.linspace(0, 1, DETECTOR_HEIGHT), DETECTOR_WIDTH),
        np.tile(np.linspace(0, 1, DETECTOR_WIDTH), DETECTOR_HEIGHT),
    ],
    axis=1,
)


def _are_empty(frames_THWC: np.ndarray) -> list[bool]:
    """Return for each frame whether it is of one colour. Integers make the result independent of how many frames come at once."""
    positions = DETECTOR_HEIGHT * DETECTOR_WIDTH
    sums_TS = frames_THWC.astype(np.int64).reshape(len(frames_THWC), positions, 3) @ np.ones(
        3, np.int64
    )  # 3 times the mean of the channels
    variances_T = positions * (sums_TS**2).sum(axis=1) - sums_TS.sum(axis=1) ** 2  # positions ** 2 times the variance
    return (variances_T < (3 * EMPTY_CONTRAST * positions) ** 2).tolist()


class _Transitions:
    """Finder of transitions in a stream of probabilities and frames. A frame is judged by its neighbourhood only: memory is bounded."""

    def __init__(self, config: DetectorConfig) -> None:
        self._config = config
        self._ahead = config.flash_frames + 2  # frames that must be known behind the one that is judged
        self._behind = LONGEST_TRANSITION + 2 * config.flash_frames + 2  # frames that are kept before it
        self._oldest = 0  # index of the first frame that is kept
        self._one_hot: list[float] = []
        self._many_hot: list[float] = []
        self._empty: list[bool] = []
        self._frames: list[np.ndarray] = []
        self._wipe_fit: list[float] = []  # of the frames inside a wipe; 0 elsewhere
        self._wipes = _Wipes() if config.wipes else None
        self._cursor = 0  # the next frame to judge
        self._run_first = -1  # where the open run of transition frames began; -1: none is open
        self._run_last = -1  # its last frame so far
        self._run_is_told = False  # the run was too long: its transition is out, the rest of it is no other one
        self._pending: Transition | None = None  # may still merge with the next one
        self._visible = 0  # frames behind the pending transition that are not empty
        self.flashes: list[int] = []  # frames behind what was taken for a flash; for the caller to take away

    def push(self, one_hot_T: np.ndarray, many_hot_T: np.ndarray, frames_THWC: np.ndarray) -> list[Transition]:
        self._one_hot.extend(one_hot_T.tolist())
        self._many_hot.extend(many_hot_T.tolist())
        self._empty.extend(_are_empty(frames_THWC))
        self._frames.extend(frames_THWC.copy())
        self._wipe_fit.extend([0.0] * len(frames_THWC))
        if self._wipes:
            self._mark(self._wipes.push(frames_THWC))
        settled: list[Transition] = []
        while self._cursor + self._ahead < self._end and (self._wipes is None or self._cursor < self._wipes.known_until):
            self._judge(self._cursor, settled)
        return settled

    def finish(self) -> list[Transition]:
        """Return the last transitions. A run that reaches the title's last frame (a fade-out) separates nothing and is no transition."""
        if self._wipes:
            self._mark(self._wipes.finish())
        settled: list[Transition] = []
        while self._cursor < self._end:
            self._judge(self._cursor, settled)
        if self._run_first >= 0 and self._run_last < self._end - 1:
            self._close_run(settled)
        return settled + ([self._pending] if self._pending else [])

    def _mark(self, wipes: list[tuple[int, int, float]]) -> None:
        for last_before, first_after, fit in wipes:
            for frame in range(last_before + 1, first_after):
                self._wipe_fit[frame - self._oldest] = fit

    @property
    def settled_until(self) -> int:
        """The first frame at which a transition that is still to come may have its middle."""
        if self._pending:
            return self._pending.last_before + 1
        return self._run_first if self._run_first >= 0 and not self._run_is_told else self._cursor

    @property
    def _end(self) -> int:
        return self._oldest + len(self._one_hot)

    def _judge(self, frame: int, settled: list[Transition]) -> None:
        at = frame - self._oldest
        inside = max(self._one_hot[at], self._many_hot[at], self._wipe_fit[at]) > self._config.threshold or self._is_spike(frame)
        if self._run_first >= 0 and not inside:
            # Once a run is surely gradual, a dip of many-hot as short as a flash does not end it.
            is_dip = self._many_hot[at] > 0.5 * self._config.threshold and frame - self._run_last <= self._config.flash_frames
            if not is_dip or self._run_last - self._run_first + 1 < GRADUAL_FRAMES:
                self._close_run(settled)
                self._run_first = -1
        elif inside and self._run_first < 0:
            self._run_first = frame
            self._run_is_told = False
        elif inside and frame - self._run_first >= LONGEST_TRANSITION:
            self._close_run(settled)
            if self._is_spike(frame):  # the heads are stuck, but here the picture changes
                self._add(Transition(frame, frame + 1, BOUNDARY_CUT, self._one_hot[at]), settled)
        if inside:
            self._run_last = frame
        if self._pending and self._run_first < 0 and frame >= self._pending.first_after:
            self._visible += not self._empty[at]
            if self._visible > LONGEST_TRANSITION / 2 or frame - self._pending.first_after > LONGEST_TRANSITION:  # too late to merge
                settled.append(self._pending)
                self._pending = None
        self._cursor += 1
        useless = max(self._cursor - self._behind - self._oldest, 0)
        if useless >= self._behind:  # now and then, not for every frame
            for kept in (self._one_hot, self._many_hot, self._wipe_fit, self._empty, self._frames):
                del kept[:useless]
            self._oldest += useless

    def _close_run(self, settled: list[Transition]) -> None:
        if not self._run_is_told:
            self._add(self._transition_of(self._run_first, self._run_last), settled)
        self._run_is_told = True

    def _is_spike(self, frame: int) -> bool:
        at = frame - self._oldest
        sides = self._one_hot[max(at - 1, 0) : at] + self._one_hot[at + 1 : at + 2]
        return self._one_hot[at] - max(sides, default=0.0) >= self._config.spike

    def _transition_of(self, first: int, last: int) -> Transition | None:
        """Return the transition that the frames first ... last make, or None."""
        if first == 0 and last > 0:  # a fade-in at the title's beginning separates nothing
            return None
        one_hot = self._one_hot[first - self._oldest : last + 1 - self._oldest]
        wipe_fit = max(self._wipe_fit[first - self._oldest : last + 1 - self._oldest])
        probability = max(*one_hot, wipe_fit)
        if len(one_hot) < GRADUAL_FRAMES:
            peak = first + one_hot.index(max(one_hot))
            if probability <= self._config.threshold and not self._is_spike(peak):
                return None
            found = Transition(peak, peak + 1, BOUNDARY_CUT, probability)
        else:
            if probability <= self._config.threshold and sum(one_hot) < 1:
                return None
            found = Transition(first - 1, last + 1, BOUNDARY_GRADUAL, probability)
        if self._is_flash(found):
            self.flashes.append(found.first_after)
            return None
        return found

    def _is_flash(self, found: Transition) -> bool:
        """Return whether a picture from before the transition is back after it, within the length of a flash."""
        reach = self._config.flash_frames
        if found.first_after - found.last_before > reach + 1:
            return False
        change = self._difference(found.last_before, found.first_after)
        return any(
            self._difference(before, after) < RETURNED * change
            for before in range(max(found.last_before - reach, 0), found.last_before + 1)
            for after in range(found.first_after, min(before + reach + 1, self._end - 1) + 1)
        )

    def _difference(self, frame: int, other: int) -> float:
        """Return the mean absolute difference of two frames in levels of 255."""
        a_HWC, b_HWC = self._frames[frame - self._oldest], self._frames[other - self._oldest]
        return float(np.abs(a_HWC.astype(np.int16) - b_HWC).mean())

    def _add(self, found: Transition | None, settled: list[Transition]) -> None:
        if found is None:
            return
        before = self._pending
        self._pending = found
        self._visible = 0
        if before is None:
            return
        if self._is_empty_between(before, found):
            self._pending = Transition(before.last_before, found.first_after, BOUNDARY_GRADUAL, max(before.probability, found.probability))
        else:
            settled.append(before)

    def _is_empty_between(self, before: Transition, found: Transition) -> bool:
        """Return whether no shot lies between two transitions: at least half of the frames are empty (a slow fade-in is detected late)."""
        if found.first_after - before.last_before > LONGEST_TRANSITION:
            return False
        between = self._empty[before.first_after - self._oldest : found.last_before + 1 - self._oldest]
        return sum(between) >= 0.5 * len(between) > 0


# ------------------------------------------------------------------------------------------------- shots from the transitions

WHOLE_PARTS = 4  # parts of a long shot that are weighed together; beyond, parts of full length are given away, so that they settle


class _Shots:
    """Divider of a title into shots, in order and without gaps. It keeps one boundary back, which a stronger neighbour may replace."""

    def __init__(self, config: DetectorConfig) -> None:
        self._shortest = config.shortest_shot
        self._longest = config.longest_shot
        self._boundary = 0  # the last one that is not a split
        self._shot = ShotSpan(0, 0)  # the shot, or its part, that is being filled; its end is not known yet
        self._next: ShotSpan | None = None  # the shot behind it, when a boundary was found that may still be replaced
        self._dropped: list[int] = []  # frames at which boundaries were dropped, not yet counted to a shot

    def push(self, transitions: list[Transition], flashes: list[int], settled_until: int) -> list[ShotSpan]:
        """Take transitions and the frames of flashes; return the settled shots. No later ones lie before the frame settled_until."""
        self._dropped.extend(flashes)
        shots = []
        for found in transitions:
            start = ShotSpan(found.middle, found.middle, found.kind, found.probability, found.last_before, found.first_after)
            if self._next is not None and start.start_frame - self._next.start_frame >= max(self._shortest, 1):
                shots.extend(self._end_shot(self._next))
            if self._next is not None:  # two boundaries too close: the more probable one stays
                weaker, self._next = sorted((start, self._next), key=lambda boundary: boundary.boundary_probability)
                self._dropped.append(weaker.start_frame)
            elif start.start_frame - self._boundary >= max(self._shortest, 1):
                self._next = start
            else:
                self._dropped.append(start.start_frame)
        if self._next is not None and settled_until - self._next.start_frame >= self._shortest:
            shots.extend(self._end_shot(self._next))
        if self._next is None:
            shots.extend(self._give_away(settled_until))
            if not self._longest:  # so that an endless shot full of flashes takes no memory
                self._shot = self._with_dropped(self._shot, settled_until)
        return shots

    def finish(self, frame_count: int) -> list[ShotSpan]:
        shots = []
        if self._next is not None and frame_count - self._next.start_frame >= self._shortest:
            shots.extend(self._end_shot(self._next))
        if self._next is not None:
            self._dropped.append(self._next.start_frame)
            self._next = None
        return shots + (self._end_shot(ShotSpan(frame_count, frame_count)) if frame_count else [])

    def _end_shot(self, following: ShotSpan) -> list[ShotSpan]:
        shots = self._give_away(following.start_frame)
        length = following.start_frame - self._shot.start_frame
        parts = -(-length // self._longest) if self._longest else 1
        ends = [self._shot.start_frame + length * part // parts for part in range(1, parts + 1)]
        shots.extend(self._take(end) for end in ends)
        self._boundary = following.start_frame
        self._shot = following
        self._next = None
        return shots

    def _give_away(self, known_until: int) -> list[ShotSpan]:
        """Return the first parts of a shot that is too long to be weighed as a whole."""
        shots = []
        while self._longest and known_until - self._shot.start_frame > WHOLE_PARTS * self._longest:
            shots.append(self._take(self._shot.start_frame + self._longest))
        return shots

    def _take(self, end: int) -> ShotSpan:
        done = dataclasses.replace(self._with_dropped(self._shot, end), end_frame=end)
        self._shot = ShotSpan(end, end, BOUNDARY_SPLIT, 1.0, end - 1, end)
        return done

    def _with_dropped(self, shot: ShotSpan, end: int) -> ShotSpan:
        inside = [frame for frame in self._dropped if frame < end]
        self._dropped = [frame for frame in self._dropped if frame >= end]
        return dataclasses.replace(shot, dropped_boundaries=shot.dropped_boundaries + len(inside))


class ShotsFromProbabilities:
    """All the rules together: takes probabilities with their frames and returns settled shots."""

    def __init__(self, config: DetectorConfig) -> None:
        self._transitions = _Transitions(config)
        self._shots = _Shots(config)
        self._frame_count = 0

    def push(self, one_hot_T: np.ndarray, many_hot_T: np.ndarray, frames_THWC: np.ndarray) -> list[ShotSpan]:
        self._frame_count += len(frames_THWC)
        return self._shots.push(
            self._transitions.push(one_hot_T, many_hot_T, frames_THWC), self._take_flashes(), self._transitions.settled_until
        )

    def finish(self) -> list[ShotSpan]:
        shots = self._shots.push(self._transitions.finish(), self._take_flashes(), self._frame_count)
        return shots + self._shots.finish(self._frame_count)

    def _take_flashes(self) -> list[int]:
        flashes, self._transitions.flashes = self._transitions.flashes, []
        return flashes


def shots_from_probabilities(
    one_hot_T: np.ndarray, many_hot_T: np.ndarray, frames_THWC: np.ndarray, config: DetectorConfig
) -> list[ShotSpan]:
    """Return the shots that tile [0, T), from the two heads' (T,) probabilities and the (T, 27, 48, 3) uint8 frames; none for T = 0."""
    joined = ShotsFromProbabilities(config)
    shots = []
    for start in range(0, len(frames_THWC), 1000):  # in pieces, to bound what is kept
        piece = slice(start, start + 1000)
        shots.extend(joined.push(one_hot_T[piece], many_hot_T[piece], frames_THWC[piece]))
    return shots + joined.finish()
