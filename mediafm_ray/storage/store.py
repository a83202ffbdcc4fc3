"""Objects under one root URI: a local folder, s3://, or anything else that fsspec opens.

Two promises hold on every kind of store. An object that can be seen is whole: a PUT is atomic on object storage, and a
local file is written beside its place and renamed into it. Names are what the caller said: no temporary object shows up
in a listing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mediafm_ray.spec import resource

PARTIAL_FOLDER = ".partial"  # local stores only: files that are being written
ALLOWED_SCHEMES = ("file", "s3", "memory", "gs", "abfs", "az", "http", "https")  # what a catalog may make us open
PARTIAL_ATTEMPTS = 3
FILE_MODE = 0o644  # before the umask


class StorageError(Exception):
    """A location that cannot be read or written; the message says which and what to do."""


@dataclass(frozen=True)
class StorageConfig:
    """How object storage is reached. Credentials come from the environment only (the standard AWS chain)."""

    endpoint_url: str = resource("", "URL of an S3-compatible server; empty = AWS")
    connect_timeout_s: float = resource(10.0, "seconds until a connection attempt to object storage is given up")
    read_timeout_s: float = resource(60.0, "seconds without a byte until a request to object storage is given up")
    retries: int = resource(5, "attempts of one request to object storage")

    def __post_init__(self) -> None:
        if self.retries < 1 or self.connect_timeout_s <= 0 or self.read_timeout_s <= 0:
            raise ValueError("storage.retries must be at least 1, and storage timeouts positive")


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing tells of one object."""

    name: str  # relative to the store's root, with '/' between the parts
    size: int  # bytes
    version: str  # ETag, or the modification time in nanoseconds: changes when the content does
    modified: float  # seconds since the epoch


def scheme_of(uri: str) -> str:
    """The lower-case scheme of a URI; 'file' for a plain path (also for C:\\...)."""
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else "file"


def open_filesystem(uri: str, config: StorageConfig) -> tuple[Any, str]:
    """The fsspec file system of a URI and the path in it. Raises StorageError for a scheme that is not allowed."""
    scheme = scheme_of(uri)
    if scheme not in ALLOWED_SCHEMES:
        raise StorageError(f"{uri}: the scheme {scheme}:// is not allowed; use a path or one of {', '.join(ALLOWED_SCHEMES)}")
    if scheme == "file":
        return LocalFileSystem(), absolute(uri)
    try:
        return fsspec.core.url_to_fs(uri, **fsspec_options(uri, config))
    except ImportError as error:
        raise StorageError(f"{uri}: {error}; install the fsspec package of this kind of storage") from error


def fsspec_options(uri: str, config: StorageConfig) -> dict[str, Any]:
    """What fsspec needs beside the URI to open it: for s3:// the endpoint, timeouts and retries; nothing else has options here."""
    if scheme_of(uri) != "s3":
        return {}
    return {
        "endpoint_url": config.endpoint_url or None,
        "config_kwargs": {
            "connect_timeout": config.connect_timeout_s,
            "read_timeout": config.read_timeout_s,
            "retries": {"max_attempts": config.retries, "mode": "standard"},
            "s3": {"addressing_style": "path" if config.endpoint_url else "auto"},
        },
    }


def absolute(uri: str) -> str:
    """A URI that means the same in every working folder: a local path becomes absolute, '~' is the home folder."""
    if scheme_of(uri) != "file" or not uri:
        return uri
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def public_uri(uri: str) -> str:
    """A URI without what may be secret in it: user and password, and the query of a signed link."""
    if scheme_of(uri) not in ("http", "https"):
        return uri
    parts = urllib.parse.urlsplit(uri)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path, "", ""))


def join(base: str, relative: str) -> str:
    """A URI that may be relative, taken relative to the folder ``base``."""
    if "://" in relative or relative.startswith("/"):
        return relative
    return f"{base.rstrip('/')}/{relative}"


class Store:
    """The objects below one root URI."""

    def __init__(self, uri: str, config: StorageConfig | None = None):
        if not uri:
            raise StorageError("no location: the URI is empty")
        self.uri = absolute(uri).rstrip("/") or "/"
        self.config = config or StorageConfig()
        self.filesystem, self.root = open_filesystem(self.uri, self.config)
        self.is_local = isinstance(self.filesystem, LocalFileSystem)

    def path(self, name: str) -> str:
        """The path of an object in ``self.filesystem``."""
        return f"{self.root.rstrip('/')}/{name}"

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object below ``prefix``, in no particular order; nothing when the prefix does not exist."""
        top = self.path(prefix).rstrip("/")
        if self.is_local:
            yield from self._list_local(top)
            return
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.find(top, detail=True)
        except FileNotFoundError:
            return
        base = self.root.rstrip("/") + "/"
        for path, info in found.items():
            if info.get("type", "file") == "file":
                yield _object_info(path.removeprefix(base).lstrip("/"), info)

    def _list_local(self, top: str) -> Iterator[ObjectInfo]:
        base = len(self.root.rstrip("/")) + 1
        for folder, folders, files in os.walk(top):
            folders[:] = sorted(name for name in folders if name != PARTIAL_FOLDER)
            for file in sorted(files):
                path = f"{folder}/{file}"
                try:
                    status = os.stat(path)
                except FileNotFoundError:  # removed since the folder was read (or a dangling link): not there
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield ObjectInfo(path[base:], status.st_size, str(status.st_mtime_ns), status.st_mtime)

    def children(self) -> dict[str, ObjectInfo]:
        """The objects directly below the root by name, in one (paged) listing."""
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.ls(self.root, detail=True)
        except FileNotFoundError:
            return {}
        names = {info["name"].rstrip("/").rsplit("/", 1)[-1]: info for info in found if info.get("type", "file") == "file"}
        return {name: _object_info(name, info) for name, info in names.items()}

    def info(self, name: str) -> ObjectInfo | None:
        """One object, or None when it is not there."""
        try:
            if self.is_local:
                status = os.stat(self.path(name))
                return ObjectInfo(name, status.st_size, str(status.st_mtime_ns), status.st_mtime)
            return _object_info(name, self.filesystem.info(self.path(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        if self.is_local:
            return Path(self.path(name)).read_bytes()
        return self.filesystem.cat_file(self.path(name))

    def write(self, name: str, content: bytes) -> None:
        """Put an object: afterwards it is there whole, whoever else wrote it meanwhile; before, it was not there or was the old one."""
        if self.is_local:
            self._write_local(name, content)
        else:
            self.filesystem.pipe_file(self.path(name), content)

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is fine."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                os.unlink(self.path(name))
            else:
                self.filesystem.rm_file(self.path(name))

    def check_writable(self) -> None:
        """Raise StorageError, saying what to do, when nothing can be written below the root."""
        probe = f"{PARTIAL_FOLDER}/probe-{secrets.token_hex(4)}"
        try:
            self.write(probe, b"probe")
            self.delete(probe)
        except Exception as error:  # fsspec implementations raise many kinds; each means the same to the person
            raise StorageError(
                f"cannot write to {self.uri}: {type(error).__name__}: {error}; check that it exists and that you may write there"
            ) from error
        self.remove_partial()

    def remove_partial(self) -> int:
        """Remove what killed writers left in a local store; files still being written (they are locked) stay."""
        folder = Path(self.root, PARTIAL_FOLDER)
        if not self.is_local or not folder.is_dir():
            return 0
        removed = 0
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                path.unlink()
                removed += 1
        with contextlib.suppress(OSError):  # another writer is at work in it
            folder.rmdir()
        return removed

    def _write_local(self, name: str, content: bytes) -> None:
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for attempt in range(PARTIAL_ATTEMPTS):
            descriptor, partial = _create_partial(os.path.join(self.root, PARTIAL_FOLDER))
            with os.fdopen(descriptor, "wb") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX)
                    stream.write(content)
                    stream.flush()
                    os.fsync(descriptor)
                    os.rename(partial, path)
                    return
                except FileNotFoundError:  # a starting job took the file for a dead writer's, before it was locked
                    if attempt == PARTIAL_ATTEMPTS - 1:
                        raise
                finally:
                    with contextlib.suppress(FileNotFoundError):  # renamed
                        os.unlink(partial)
                    with contextlib.suppress(OSError):  # not empty: another writer is at work in it
                        os.rmdir(os.path.dirname(partial))


def _create_partial(folder: str) -> tuple[int, str]:
    """A new file in the folder of partial files: its descriptor and path."""
    path = os.path.join(folder, f"{os.getpid()}-{secrets.token_hex(8)}")
    while True:
        os.makedirs(folder, exist_ok=True)
        try:
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, FILE_MODE), path
        except FileNotFoundError:  # another job removed the empty folder just now
            continue


def _object_info(name: str, info: dict[str, Any]) -> ObjectInfo:
    modified = info.get("LastModified") or info.get("mtime") or info.get("created") or 0.0
    seconds = modified.timestamp() if hasattr(modified, "timestamp") else float(modified)
    version = str(info.get("ETag") or info.get("etag") or "").strip('"') or str(seconds)
    return ObjectInfo(name, int(info.get("size") or 0), version, seconds)


def percent_encode(text: str) -> str:
    """Text as a file name that any store takes: only letters, digits, '-', '.', '_' and %XX.

    A leading '.' or '_' is encoded too, because readers of Parquet folders skip files that begin so.
    """
    encoded = urllib.parse.quote(text, safe="").replace("~", "%7E")
    if encoded[:1] in (".", "_"):
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}"
    return encoded
