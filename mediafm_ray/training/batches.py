"""Windows of titles and batches of windows as tensors, read ahead of the model by threads.

Shapes
    S  shots of a title; in a batch, those of its longest window
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
    """A title that cannot be used for training; the message names it and says why and what to do."""


@dataclass(frozen=True, eq=False)
class TitleVectors:
    """The vectors of a title. Raises UnusableTitle for NaN or infinity, or if there is nothing to predict."""

    title_id: str
    fused_SD: np.ndarray  # float32, unit norm; zero if a shot has no modality
    times_S2: np.ndarray  # float32, seconds
    metadata_M: np.ndarray | None  # float32; None if there are neither synopsis nor tags

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
            raise UnusableTitle(f"title {self.title_id}: no shot has an embedding to predict")

    @property
    def bytes(self) -> int:
        """Return its size in memory."""
        return self.fused_SD.nbytes + self.times_S2.nbytes + (0 if self.metadata_M is None else self.metadata_M.nbytes)


class Titles(Protocol):
    """The titles of a dataset for training."""

    sizes: np.ndarray  # (titles,): any quantity that grows with the shots of a title and is known without reading it
    train: np.ndarray  # indices of the titles to train on
    held_out: np.ndarray  # indices of the titles to evaluate on
    fused_dim: int
    metadata_dim: int

    @property
    def spans(self) -> Mapping[str, tuple[int, int]]:
        """Return the span of each modality in a fused vector; may be empty for training.objective=recipe."""
        ...

    def read(self, index: int) -> TitleVectors:
        """Read one title; called from several threads. Raises UnusableTitle for a title that must be skipped."""
        ...


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a title, with some of its shots hidden."""

    title: TitleVectors
    start: int
    masked_S: np.ndarray  # bool

    @property
    def shots(self) -> slice:
        """Return the rows of the title."""
        return slice(self.start, self.start + len(self.masked_S))


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows side by side, padded at their ends."""

    fused_BSD: Tensor  # float32, the original vectors
    given_BSD: Tensor  # float32, the input of the model, in which some shots are replaced by shots of other titles
    replaced_BS: Tensor  # bool, True for replaced shots
    metadata_BM: Tensor  # float32; zero for titles without metadata
    has_metadata_B: Tensor  # bool
    times_BS2: Tensor  # float32
    masked_BS: Tensor  # bool
    masked_K: Tensor  # int64, positions of the masked shots in the flattened (B * S)
    shots_BS: Tensor | None  # bool, False for padding; None without padding

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Copy the batch to page-locked memory, from which a GPU can copy while it computes."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a change to every tensor; a tensor in two fields is changed once."""
        changed = {id(field): change(field) for field in vars(self).values() if field is not None}
        return Batch(*(changed.get(id(field)) for field in vars(self).values()))  # type: ignore[arg-type]


class WindowSource:
    """The windows of every step and of the evaluation. They depend only on seed, step and titles."""

    def __init__(self, titles: Titles, seed: int, windows: int, longest: int, mask_fraction: float, say_unusable: Callable[[str], None]):
        """Take ``windows`` per step of at most ``longest`` shots; ``say_unusable`` is called once for each title that is skipped."""
        self.titles, self.seed, self.longest, self.mask_fraction = titles, seed, longest, mask_fraction
        self.order = TitleOrder(seed, titles.sizes[titles.train], windows)
        self.say_unusable = say_unusable
        self.unusable: set[int] = set()
        self.lock = threading.Lock()

    def of_step(self, step: int, rank: int, workers: int) -> list[Window]:
        """Return the windows of a step for one of the workers."""
        chosen = self.order.titles(step)
        return [
            self._window(self._usable(int(position), self.titles.train), random_of(self.seed, WINDOW, step, slot))
            for slot, position in enumerate(chosen)
            if slot % workers == rank
        ]

    def of_evaluation(self, slot: int) -> Window:
        """Return the window of a held-out title, with the same mask in every evaluation."""
        return self._window(self._usable(slot, self.titles.held_out), random_of(self.seed, HELD_OUT, int(self.titles.held_out[slot])))

    def _window(self, title: TitleVectors, random: np.random.Generator) -> Window:
        """Return a window that has something to predict."""
        shots = len(title.fused_SD)
        usable_S = np.abs(title.fused_SD).max(axis=1) > 0
        start = window_start(random, shots, self.longest)
        if not usable_S[start : start + self.longest].any():  # No shot of this window has a modality: take a window that has one.
            start = min(int(np.argmax(usable_S)), max(0, shots - self.longest))
        usable_S = usable_S[start : start + self.longest]
        return Window(title, start, masked_shots(random, usable_S, self.mask_fraction))

    def _usable(self, position: int, among: np.ndarray) -> TitleVectors:
        """Return the title at a position of ``among``, or the next usable one."""
        for offset in range(len(among)):
            index = int(among[(position + offset) % len(among)])
            if index in self.unusable:
                continue
            try:
                return self.titles.read(index)
            except UnusableTitle as error:
                with self.lock:  # Several threads may have read it.
                    known = index in self.unusable
                    self.unusable.add(index)
                if not known:
                    self.say_unusable(str(error))
        raise UnusableTitle(f"none of the {len(among)} titles of this part of the split can be used")


def collate(windows: Sequence[Window], metadata_dim: int, cut_aways: float = 0.0, random: np.random.Generator | None = None) -> Batch:
    """Collate windows to one batch, padded with zeros to the longest.

    On average a share ``cut_aways`` of the unmasked shots (0 to twice that share in a window) is replaced by shots of the batch's other
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
        None if shots_BS.all() else torch.from_numpy(shots_BS),
    )


def _with_cut_aways(
    fused_BSD: np.ndarray, usable_BS: np.ndarray, masked_BS: np.ndarray, title_B: np.ndarray, share: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the shots with some of them replaced by shots of other titles, and a mask of the replaced ones."""
    share_B1 = random.uniform(0, 2 * share, (len(usable_BS), 1))
    wanted = np.argwhere((random.random(usable_BS.shape) < share_B1) & usable_BS & ~masked_BS)
    usable = np.argwhere(usable_BS)
    drawn = usable[random.integers(len(usable), size=len(wanted))] if len(usable) else wanted
    foreign = title_B[drawn[:, 0]] != title_B[wanted[:, 0]]  # Otherwise the shot stays: all windows of a batch may be of one title.
    wanted, drawn = wanted[foreign], drawn[foreign]
    given_BSD, replaced_BS = fused_BSD.copy(), np.zeros_like(usable_BS)
    given_BSD[wanted[:, 0], wanted[:, 1]] = fused_BSD[drawn[:, 0], drawn[:, 1]]
    replaced_BS[wanted[:, 0], wanted[:, 1]] = True
    return given_BSD, replaced_BS


def read_ahead(make: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Generator[Result, None, None]:
    """Yield ``make(item)`` of every item, in order; threads are at most ``ahead`` items ahead of the caller."""
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
