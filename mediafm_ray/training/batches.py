"""Titles become windows, and windows become batches of tensors; threads read ahead of the model.

Shapes
    S  shots of a title; in a batch, of its longest window
    B  windows of a batch
    K  masked shots of a batch, window after window
    D  dimension of a fused embedding
    M  dimension of a metadata embedding
    2  times of a shot (models.contextualiser.shot_times)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mediafm_ray.training.sampling import HELD_OUT, WINDOW, TitleOrder, masked_shots, random_of, window_start

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnusableTitle(Exception):
    """A title that nothing can be learned from; the message names it, says why, and what to do."""


@dataclass(frozen=True, eq=False)
class TitleVectors:
    """What a title is to the model. Raises UnusableTitle where it holds numbers that are none, or nothing to predict."""

    title_id: str
    fused_SD: np.ndarray  # float32, unit norm; zero where a shot has no modality at all
    times_S2: np.ndarray  # float32, seconds
    metadata_M: np.ndarray | None  # float32; None without synopsis and tags

    def __post_init__(self) -> None:
        if len(self.fused_SD) == 0:
            raise UnusableTitle(f"title {self.title_id} has no shots: embed it again")
        if not np.isfinite(self.fused_SD).all():
            shot = int(np.argmin(np.isfinite(self.fused_SD).all(axis=1)))
            raise UnusableTitle(f"title {self.title_id}: the fused embedding of shot {shot} is not finite: embed it again")
        if not np.isfinite(self.times_S2).all():
            raise UnusableTitle(f"title {self.title_id}: its shots have times that are not finite: embed it again")
        if self.metadata_M is not None and not np.isfinite(self.metadata_M).all():
            raise UnusableTitle(f"title {self.title_id}: its metadata embedding is not finite: embed it again")
        if not self.fused_SD.any():
            raise UnusableTitle(f"title {self.title_id}: no shot has an embedding that could be predicted")

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self.fused_SD.nbytes + self.times_S2.nbytes + (0 if self.metadata_M is None else self.metadata_M.nbytes)


class Titles(Protocol):
    """The catalog as training sees it."""

    sizes: np.ndarray  # (titles,): anything that grows with a title's shots, known without reading it
    train: np.ndarray  # indices of the titles that are trained on
    held_out: np.ndarray  # indices of those that the model is evaluated on
    fused_dim: int
    metadata_dim: int

    @property
    def spans(self) -> Mapping[str, tuple[int, int]]:
        """Where each modality lies in a fused vector; may be empty for training.objective=recipe."""
        ...

    def read(self, index: int) -> TitleVectors:
        """One title; called from several threads. Raises UnusableTitle for one that has to be passed over."""
        ...


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a title with some of its shots hidden."""

    title: TitleVectors
    start: int
    masked_S: np.ndarray  # bool

    @property
    def shots(self) -> slice:
        """The rows of the title."""
        return slice(self.start, self.start + len(self.masked_S))


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows side by side, padded at their ends."""

    fused_BSD: Tensor  # float32, as the titles have them
    given_BSD: Tensor  # float32, as the model reads them: some shots are those of other titles
    replaced_BS: Tensor  # bool, where they are
    metadata_BM: Tensor  # float32; zero where there is none
    has_metadata_B: Tensor  # bool
    times_BS2: Tensor  # float32
    masked_BS: Tensor  # bool
    masked_K: Tensor  # int64: places of the masked shots in the flattened (B * S)
    window_K: Tensor  # int64: the window of each
    shots_BS: Tensor | None  # bool, False where padded; None where no window is

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in page-locked memory, from which a GPU copies while it computes."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A tensor that stands in two fields is changed once."""
        changed = {id(field): change(field) for field in vars(self).values() if field is not None}
        return Batch(*(changed.get(id(field)) for field in vars(self).values()))  # type: ignore[arg-type]


class WindowSource:
    """The windows of every step and of the evaluation, read from the titles. Its answers depend on (seed, step) and the titles only."""

    def __init__(self, titles: Titles, seed: int, windows: int, longest: int, mask_fraction: float, say_unusable: Callable[[str], None]):
        """``windows`` of a step; ``longest`` window in shots; ``say_unusable`` is told once of each title that is passed over."""
        self.titles, self.seed, self.longest, self.mask_fraction = titles, seed, longest, mask_fraction
        self.order = TitleOrder(seed, titles.sizes[titles.train], windows)
        self.say_unusable = say_unusable
        self.unusable: set[int] = set()
        self.lock = threading.Lock()

    def of_step(self, step: int, rank: int, workers: int) -> list[Window]:
        """The windows of a step that fall to one of the workers."""
        chosen = self.order.titles(step)
        return [
            self._window(self._usable(int(position), self.titles.train), random_of(self.seed, WINDOW, step, slot))
            for slot, position in enumerate(chosen)
            if slot % workers == rank
        ]

    def of_evaluation(self, slot: int) -> Window:
        """The same window and mask of a held-out title every time."""
        return self._window(self._usable(slot, self.titles.held_out), random_of(self.seed, HELD_OUT, int(self.titles.held_out[slot])))

    def _window(self, title: TitleVectors, random: np.random.Generator) -> Window:
        """A window in which there is something to predict."""
        shots = len(title.fused_SD)
        usable_S = np.abs(title.fused_SD).max(axis=1) > 0
        start = window_start(random, shots, self.longest)
        if not usable_S[start : start + self.longest].any():  # shots without any modality, as long as a window: go where there are others
            start = min(int(np.argmax(usable_S)), max(0, shots - self.longest))
        usable_S = usable_S[start : start + self.longest]
        return Window(title, start, masked_shots(random, usable_S, self.mask_fraction))

    def _usable(self, position: int, among: np.ndarray) -> TitleVectors:
        """The title at a position of ``among``, or the next after it that can be used."""
        for offset in range(len(among)):
            index = int(among[(position + offset) % len(among)])
            if index in self.unusable:
                continue
            try:
                return self.titles.read(index)
            except UnusableTitle as error:
                with self.lock:  # several threads may have met it
                    known = index in self.unusable
                    self.unusable.add(index)
                if not known:
                    self.say_unusable(str(error))
        raise UnusableTitle(f"none of the {len(among)} titles on this side of the split can be used")


def collate(windows: Sequence[Window], metadata_dim: int, cut_aways: float = 0.0, random: np.random.Generator | None = None) -> Batch:
    """Windows as one batch, padded with zeros to the longest.

    A share ``cut_aways`` of the shots that are not masked, from none to twice that in a window, is replaced by shots of the batch's other
    titles, drawn with ``random``.
    """
    lengths = [len(window.masked_S) for window in windows]
    longest = max(lengths)
    first = windows[0].title
    fused_BSD = np.zeros((len(windows), longest, first.fused_SD.shape[1]), np.float32)
    times_BS2 = np.zeros((len(windows), longest, 2), np.float32)
    metadata_BM = np.zeros((len(windows), metadata_dim), np.float32)
    masked_BS = np.zeros((len(windows), longest), bool)
    for row, window in enumerate(windows):
        fused_BSD[row, : lengths[row]] = window.title.fused_SD[window.shots]
        times_BS2[row, : lengths[row]] = window.title.times_S2[window.shots]
        masked_BS[row, : lengths[row]] = window.masked_S
        if window.title.metadata_M is not None:
            metadata_BM[row] = window.title.metadata_M
    masked_K = np.flatnonzero(masked_BS)
    shots_BS = np.arange(longest) < np.array(lengths)[:, None]
    fused = given = torch.from_numpy(fused_BSD)
    replaced_BS = np.zeros_like(masked_BS)
    if cut_aways and random is not None:
        titles = np.unique([window.title.title_id for window in windows], return_inverse=True)[1]
        given_BSD, replaced_BS = _with_cut_aways(fused_BSD, shots_BS & fused_BSD.any(-1), masked_BS, titles, cut_aways, random)
        given = torch.from_numpy(given_BSD)
    return Batch(
        fused,
        given,
        torch.from_numpy(replaced_BS),
        torch.from_numpy(metadata_BM),
        torch.tensor([window.title.metadata_M is not None for window in windows]),
        torch.from_numpy(times_BS2),
        torch.from_numpy(masked_BS),
        torch.from_numpy(masked_K),
        torch.from_numpy(masked_K // longest),
        None if shots_BS.all() else torch.from_numpy(shots_BS),
    )


def _with_cut_aways(
    fused_BSD: np.ndarray, usable_BS: np.ndarray, masked_BS: np.ndarray, title_B: np.ndarray, share: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The shots with some of them replaced by shots of other titles, and which ones."""
    share_B1 = random.uniform(0, 2 * share, (len(usable_BS), 1))
    wanted = np.argwhere((random.random(usable_BS.shape) < share_B1) & usable_BS & ~masked_BS)
    usable = np.argwhere(usable_BS)
    drawn = usable[random.integers(len(usable), size=len(wanted))] if len(usable) else wanted
    foreign = title_B[drawn[:, 0]] != title_B[wanted[:, 0]]  # else the shot stays: a batch may be of one title
    wanted, drawn = wanted[foreign], drawn[foreign]
    given_BSD, replaced_BS = fused_BSD.copy(), np.zeros_like(usable_BS)
    given_BSD[wanted[:, 0], wanted[:, 1]] = fused_BSD[drawn[:, 0], drawn[:, 1]]
    replaced_BS[wanted[:, 0], wanted[:, 1]] = True
    return given_BSD, replaced_BS


def read_ahead(make: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Generator[Result, None, None]:
    """``make(item)`` of every item, in order; threads are at most ``ahead`` items ahead of the caller."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    coming: deque[Future[Result]] = deque()
    try:
        for item in items:
            coming.append(pool.submit(make, item))
            if len(coming) > ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
