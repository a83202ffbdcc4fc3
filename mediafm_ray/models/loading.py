"""What the torch encoders have in common: a device, CPU threads that do not change the numbers, and loading without silent gaps."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mediafm_ray.models.weights import WeightsError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # names in the configuration

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


def open_device(device: str) -> torch.device:
    """The torch device of that name.

    Raises ValueError for a device that torch does not know or this machine does not have.
    """
    try:
        opened = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not a torch device: use cpu, cuda or cuda:0") from error
    if opened.type == "cuda" and (not torch.cuda.is_available() or (opened.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {device!r}: this process sees {torch.cuda.device_count()} CUDA devices; use device: cpu or give it a GPU")
    return opened


class Workers:
    """CPU threads that share a list of items, each item computed by one thread alone.

    torch's own threads divide every single operation: some kernels then sum in another order (so the number of threads would change
    the last bits of the result), and on a busy machine all wait for the slowest at every operation. Here torch computes every item
    on one thread, and items run side by side: the same bytes for any number of threads.
    """

    def __init__(self, threads: int) -> None:
        """``threads`` 0 takes as many as torch would. Raises ValueError where it is negative."""
        if threads < 0:
            raise ValueError(f"threads must be 0 (as many as torch would take) or more, not {threads}")
        self.threads = threads or torch.get_num_threads()

    def map(self, compute: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """``[compute(item) for item in items]``, in order, without gradients; the first exception in that order is raised."""
        items = list(items)
        with _one_thread_an_operation(), ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda item: _without_gradients(compute, item), items))

    def feed(
        self, prepare: Callable[[Item], Prepared], items: Sequence[Item], group: int, launch: Callable[[list[Prepared]], Iterable[Result]]
    ) -> list[Result]:
        """What ``launch`` gives for every group of items prepared by the threads.

        ``launch`` starts work on a GPU and does not wait for it: the threads prepare the next group while the GPU computes. They rest
        while ``launch`` runs: it makes hundreds of short calls, and before each it would wait until all threads had their turn of Python.
        """
        results: list[Result] = []
        for first in range(0, len(items), group):
            results.extend(launch(self.map(prepare, items[first : first + group])))
        return results


def _without_gradients(compute: Callable[[Item], Result], item: Item) -> Result:
    with torch.inference_mode():  # is a property of the thread
        return compute(item)


def staged(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of an array on the CPU; for a GPU in page-locked memory, out of which it can be copied without waiting."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    tensor = torch.empty(array.shape, dtype=dtype, pin_memory=device.type == "cuda")
    tensor.numpy()[...] = array
    return tensor


class MicroBatches:
    """How many items a CUDA device computes at once: as many as fit, found by trying.

    The first micro-batch is small; what it took of the device's memory decides the next. When memory runs out all the same (other
    processes share the device), the size halves, for good, and the items are tried again. An item may count for more than one
    (sequences of unlike length do by their length): sizes are then sums.
    """

    FIRST = 8  # items of the measuring micro-batch
    SHARE = 0.6  # of the memory free after it, which later ones may take

    def __init__(self, device: torch.device, size: int, most: int = 512, first: int = FIRST) -> None:
        """``size`` is fixed, or 0 to measure, with ``first`` at once and ``most`` later. Raises ValueError where it is negative."""
        if size < 0:
            raise ValueError(f"micro_batch must be 0 (as many as fit) or more, not {size}")
        self.device = device
        self.measured = size > 0
        self.size = size or first
        self.most = most

    def compute(
        self,
        function: Callable[[Sequence[Item]], Sequence[Result]],
        items: Sequence[Item],
        counts: Callable[[Item], int] = lambda item: 1,
    ) -> list[Result]:
        """``function`` over all items, at most ``size`` at once. Raises torch.OutOfMemoryError where even one item does not fit.

        ``counts`` says for how much an item counts; the largest come first, for each of a batch counts (is padded) like its first.
        """
        results: list[Result] = []
        while len(results) < len(items):
            each = counts(items[len(results)])
            fits = max(1, self.size // each)
            batch = items[len(results) : len(results) + fits]
            try:
                results.extend(self._measured(function, batch, each, is_full=len(batch) == fits))
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.size, self.measured = max(1, len(batch) * each // 2), True
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        return results

    def _measured(
        self, function: Callable[[Sequence[Item]], Sequence[Result]], batch: Sequence[Item], each: int, is_full: bool
    ) -> Sequence[Result]:
        if self.measured or self.device.type != "cuda" or not is_full:
            return function(batch)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        results = function(batch)
        taken = torch.cuda.max_memory_allocated(self.device) - before
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        self.size, self.measured = fitting_size(taken, len(batch) * each, free, self.SHARE, self.most), True
        return results


def fitting_size(taken: int, items: int, free: int, share: float, most: int) -> int:
    """Items at once, a power of two from 1 to ``most``: ``items`` took ``taken`` bytes, and ``share`` of ``free`` bytes may be."""
    fits = share * free / max(1, taken / items)
    return int(min(most, 2 ** max(0, math.floor(math.log2(max(1, fits))))))


_counting = threading.Lock()
_users = 0  # calls under way in this process
_threads_before = 1  # of torch, before the first of them


@contextlib.contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """Part of torch's number of threads belongs to the thread that sets it, part to the process; the last to leave restores the latter."""
    global _users, _threads_before
    with _counting:
        if _users == 0:
            _threads_before = torch.get_num_threads()
        _users += 1
    try:
        yield
    finally:
        with _counting:
            _users -= 1
            if _users == 0:
                torch.set_num_threads(_threads_before)


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file (weights only: nothing in it is executed). Raises WeightsError where it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file: zip, pickle, EOF, runtime
        raise WeightsError(f"{path} is not a readable torch weights file ({type(error).__name__}: {error}); fetch it again") from error


def load_checkpoint(model_class: Any, path: Path, optional: tuple[str, ...] = ("pooler.",), **options: Any) -> Any:
    """A transformers model from a local folder, in evaluation mode. Nothing is fetched.

    transformers fills weights that the checkpoint lacks with random numbers and only warns; here that is an error.
    ``optional`` are beginnings of names of weights that are not used and may be missing: by default those of a BERT's pooler.
    Raises WeightsError for a missing, damaged or partial checkpoint.
    """
    if not path.is_dir():
        raise WeightsError(f"no checkpoint at {path}: it must be a folder with config.json and model.safetensors")
    if not (path / "config.json").is_file():
        raise WeightsError(f"no config.json in {path}: it must be the folder that save_pretrained wrote")
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(path, local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # safetensors, torch, transformers and the OS each raise their own
        raise WeightsError(f"the checkpoint {path} cannot be loaded ({type(error).__name__}: {error}); copy it again") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(optional))
    mismatched = sorted(str(entry) for entry in report["mismatched_keys"])
    if missing or mismatched:
        gaps = ", ".join((missing + mismatched)[:5])
        raise WeightsError(f"the checkpoint {path} is not complete for {type(model).__name__}: {len(missing + mismatched)} gaps ({gaps})")
    return model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside; its settings are restored afterwards."""
    from transformers.utils import logging as transformers_logging  # The detector, which starts first, does without transformers.

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
