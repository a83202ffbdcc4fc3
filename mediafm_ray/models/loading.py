"""What every torch module does before it computes: open its device, and load a checkpoint without noise or silent gaps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from mediafm_ray.models.weights import WeightsError


def open_device(device: str, threads: int) -> torch.device:
    """The torch device of that name. With threads > 0, CPU kernels of this process use that many; nothing else global is set.

    Raises ValueError for a device that torch does not know or this machine does not have.
    """
    if threads < 0:
        raise ValueError(f"threads must be 0 (leave torch's own choice) or more, not {threads}")
    try:
        opened = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not a torch device: use cpu, cuda or cuda:0") from error
    if opened.type == "cuda" and (not torch.cuda.is_available() or (opened.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {device!r}: this process sees {torch.cuda.device_count()} CUDA devices; use device: cpu or give it a GPU")
    if threads > 0:
        torch.set_num_threads(threads)
    return opened


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file (weights only: nothing in it is executed). Raises WeightsError where it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file: zip, pickle, EOF, runtime
        raise WeightsError(f"{path} is not a readable torch weights file ({type(error).__name__}: {error}); fetch it again") from error


def load_checkpoint(model_class: Any, path: Path, **options: Any) -> Any:
    """A transformers model from a local folder, in evaluation mode. Nothing is fetched.

    transformers fills weights that the checkpoint lacks with random numbers and only warns; here that is an error.
    Raises WeightsError for a missing, damaged or partial checkpoint. Weights of a BERT's unused pooler may be missing.
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
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    mismatched = sorted(str(entry) for entry in report["mismatched_keys"])
    if missing or mismatched:
        gaps = ", ".join((missing + mismatched)[:5])
        raise WeightsError(f"the checkpoint {path} is not complete for {type(model).__name__}: {len(missing + mismatched)} gaps ({gaps})")
    return model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside; its settings are restored afterwards."""
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
