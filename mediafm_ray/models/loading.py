"""Common parts of the torch encoders: devices, CPU threads that do not change the numbers, micro-batches, complete checkpoints."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mediafm_ray.models.weights import WeightsError

# torch gives large blocks back at once; with pages of 4 KB, taking them again costs the detector a tenth of its time. torch reads this
# when it first needs memory, and does nothing where the system has no huge pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # name in the configuration -> dtype

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


def open_device(device: str) -> torch.device:
    """Return the torch device of a name.

    Raises ValueError for a device that torch does not know or that this machine does not have.
    """
    try:
        opened = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not a torch device: use cpu, cuda or cuda:0") from error
    if opened.type == "cuda" and (not torch.cuda.is_available() or (opened.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {device!r}: this process sees {torch.cuda.device_count()} CUDA devices; use device: cpu or give it a GPU")
    return opened


class Workers:
    """CPU threads that share a list of items; each item is computed on one thread.

    torch's own threads divide every operation: some kernels then sum in another order (so the number of threads changes the last bits
    of the result), and on a busy machine all threads wait for the slowest one at every operation. Here torch computes every item on one
    thread, and items run in parallel: the result is the same for any number of threads.
    """

    def __init__(self, threads: int) -> None:
        """Make ``threads`` threads; 0 = as many as torch would."""
        self.threads = threads or torch.get_num_threads()

    def map(self, compute: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Return ``[compute(item) for item in items]``, computed without gradients. Raises the first exception in that order."""
        items = list(items)
        with _one_thread_per_operation(), ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda item: _without_gradients(compute, item), items))

    def feed(
        self, prepare: Callable[[Item], Prepared], items: Sequence[Item], group: int, launch: Callable[[list[Prepared]], Iterable[Result]]
    ) -> list[Result]:
        """Prepare groups of items on the threads and return the results of ``launch`` for all groups.

        ``launch`` starts work on a GPU and does not wait for it, so the threads prepare the next group while the GPU computes. No thread
        prepares while ``launch`` runs: it makes hundreds of short calls, and each would compete with all threads for Python's lock.
        """
        results: list[Result] = []
        for first in range(0, len(items), group):
            results.extend(launch(self.map(prepare, items[first : first + group])))
        return results


def _without_gradients(compute: Callable[[Item], Result], item: Item) -> Result:
    with torch.inference_mode():  # The mode belongs to a thread.
        return compute(item)


def staged(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a CPU tensor; for a GPU in page-locked memory, which allows asynchronous copies."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    tensor = torch.empty(array.shape, dtype=dtype, pin_memory=device.type == "cuda")
    tensor.numpy()[...] = array
    return tensor


class MicroBatches:
    """Micro-batches of as many items as fit in the memory of a CUDA device.

    The first micro-batch is small; its memory use determines the size of the next ones. If memory runs out nevertheless (other processes
    share the device), the size is halved permanently and the items are tried again. An item may count for more than one (a sequence
    counts its length): sizes are then sums.
    """

    FIRST = 8  # Items of the first micro-batch, which measures memory.
    SHARE = 0.6  # Later ones may use this share of the memory that is free after it.

    def __init__(self, device: torch.device, size: int, most: int = 512, first: int = FIRST) -> None:
        """Use a fixed ``size``, or 0 to measure it on ``first`` items, up to ``most``."""
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
        """Apply ``function`` to all items, at most ``size`` at once. Raises torch.OutOfMemoryError if a single item does not fit.

        ``counts`` returns the size of an item. The largest must come first: all items of a batch are padded to the first.
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
    """Return a power of two from 1 to ``most``: items that fit in ``share`` of ``free`` bytes if ``items`` took ``taken`` bytes."""
    fits = share * free / max(1, taken / items)
    return int(min(most, 2 ** max(0, math.floor(math.log2(max(1, fits))))))


_lock = threading.Lock()
_users = 0  # Calls in progress in this process.
_threads_before = 1  # torch's number of threads before the first of them.


@contextlib.contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Restore torch's number of threads after the last concurrent call: setting it in a thread also changes it for the process."""
    global _users, _threads_before
    with _lock:
        if _users == 0:
            _threads_before = torch.get_num_threads()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                torch.set_num_threads(_threads_before)


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .pth file (weights only: no code in it is executed). Raises WeightsError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of error for a damaged file: zip, pickle, EOF, runtime.
        raise WeightsError(f"{path} is not a readable torch weights file ({type(error).__name__}: {error}); fetch it again") from error


def load_checkpoint(model_class: Any, path: Path, optional: tuple[str, ...] = ("pooler.",), **options: Any) -> Any:
    """Load a transformers model from a local folder, in evaluation mode. Nothing is fetched.

    transformers initialises weights that the checkpoint lacks at random and only warns; here that is an error.
    ``optional`` are prefixes of names of unused weights that may be missing, by default those of a BERT's pooler.
    Raises WeightsError for a missing, damaged or partial checkpoint.
    """
    if not path.is_dir():
        raise WeightsError(f"no checkpoint at {path}: it must be a folder with config.json and model.safetensors")
    if not (path / "config.json").is_file():
        raise WeightsError(f"no config.json in {path}: it must be the folder that save_pretrained wrote")
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(path, local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # safetensors, torch, transformers and the OS raise errors of their own.
        raise WeightsError(f"the checkpoint {path} cannot be loaded ({type(error).__name__}: {error}); copy it again") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(optional))
    mismatched = sorted(str(entry) for entry in report["mismatched_keys"])
    if missing or mismatched:
        gaps = ", ".join((missing + mismatched)[:5])
        count = len(missing + mismatched)
        raise WeightsError(
            f"the checkpoint {path} is incomplete for {type(model).__name__}: {count} weights do not fit or are missing ({gaps})"
        )
    return model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers; restore its settings afterwards."""
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
