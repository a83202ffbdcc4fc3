"""Objects under one root URI: a local folder, s3://, or anything else that fsspec opens.

Two promises hold on every kind of store. An object that can be seen is whole: a PUT is atomic on object storage, and a
local file is written beside its place and renamed into it. Names are what the caller said: no temporary object shows up
in a listing.
"""

from __future__ import annotations

import contextlib
import email.utils
import os
import secrets
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from mediafm_ray.errors import says_absent
from mediafm_ray.storage.base import ObjectInfo, StorageConfig, object_path
from mediafm_ray.storage.errors import StorageError, explain, retrying
from mediafm_ray.storage.local import PARTIAL_FOLDER, LocalObjects
from mediafm_ray.storage.s3 import S3Objects, s3_config_options
from mediafm_ray.text import local_path

ALLOWED_SCHEMES = ("file", "s3", "memory", "gs", "abfs", "az", "http", "https")  # what a catalog may make us open
LOOK_UP_THREADS = 16  # objects that are looked up one by one, at once

Result = TypeVar("Result")


def scheme_of(uri: str) -> str:
    """The lower-case scheme of a URI; 'file' for a plain path (also for C:\\...)."""
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else "file"


def open_filesystem(uri: str, config: StorageConfig) -> tuple[Any, str]:
    """The fsspec file system of a URI and the path in it, for readers that bring none of their own.

    Raises StorageError for a scheme that is not allowed.
    """
    scheme = scheme_of(uri)
    if scheme not in ALLOWED_SCHEMES:
        raise StorageError(f"{uri}: the scheme {scheme}:// is not allowed; use a path or one of {', '.join(ALLOWED_SCHEMES)}")
    if scheme == "file":
        return LocalFileSystem(), absolute(uri)
    try:
        kind = fsspec.get_filesystem_class(scheme)  # not url_to_fs: that would take a '::' in a key for a chain of file systems
    except ImportError as error:
        raise StorageError(f"{uri}: {error}; install the fsspec package of this kind of storage") from error
    found = {} if scheme == "s3" else kind._get_kwargs_from_urls(uri)  # of s3: a version, where a key holds '?versionId='
    return kind(**found, **fsspec_options(uri, config)), kind._strip_protocol(uri)


def fsspec_options(uri: str, config: StorageConfig) -> dict[str, Any]:
    """What fsspec needs beside the URI to open it: for s3:// the endpoint, timeouts and retries; nothing else has options here."""
    if scheme_of(uri) != "s3":
        return {}
    return {"endpoint_url": config.endpoint_url or None, "config_kwargs": s3_config_options(config)}


def absolute(uri: str) -> str:
    """A URI that means the same in every working folder: a local path becomes absolute, '~' is the home folder.

    Raises StorageError for what cannot be a path.
    """
    if scheme_of(uri) != "file" or not uri:
        return uri
    path = local_path(uri)
    assert path is not None
    try:
        return os.path.abspath(os.path.expanduser(path) if path is uri else path)
    except ValueError as error:  # of a user's name
        raise StorageError(f"{uri!r} is no path: {error}") from error


def join(base: str, relative: str) -> str:
    """A URI that may be relative, taken relative to the folder ``base``."""
    if "://" in relative or relative.startswith("/"):
        return relative
    return f"{base.rstrip('/')}/{relative}"


class Objects(Protocol):
    """What a kind of store does for Store."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]: ...
    def children(self) -> tuple[Sequence[str], Mapping[str, ObjectInfo]]: ...
    def info(self, name: str) -> ObjectInfo | None: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, content: bytes) -> None: ...
    def delete(self, name: str) -> None: ...
    def check_readable(self, name: str = "") -> bool: ...
    def check_writable(self, name: str) -> None: ...
    def remove_partial(self) -> int: ...


class Store:
    """The objects below one root URI.

    Whatever goes wrong is a StorageError whose message is one line and says what to do, but for an object that is not there: reading it
    raises FileNotFoundError.
    """

    def __init__(self, uri: str, config: StorageConfig | None = None):
        if not uri:
            raise StorageError("no location: the URI is empty")
        self.uri = absolute(uri).rstrip("/") or "/"
        self.config = config or StorageConfig()
        self.filesystem, self.root = open_filesystem(self.uri, self.config)
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self.objects: Objects
        if self.is_local:
            self.objects = LocalObjects(self.root)
        elif scheme_of(self.uri) == "s3":
            self.objects = S3Objects(self.uri, self.config)
        else:
            self.objects = FsspecObjects(self.filesystem, self.root, self.config)

    def path(self, name: str) -> str:
        """The path of an object in ``self.filesystem``."""
        return object_path(self.root, name)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object below ``prefix``, in no particular order; nothing when the prefix does not exist."""
        listing = self.objects.list(prefix)
        while (info := self._explained(lambda: next(listing, None))) is not None:
            yield info

    def children(self) -> Mapping[str, ObjectInfo]:
        """The objects directly below the root by name, in one (paged) listing."""
        return self._explained(self.objects.children)[1]

    def folders(self) -> Sequence[str]:
        """The names of the folders directly below the root, sorted, from one (paged) listing."""
        return sorted(self._explained(self.objects.children)[0])

    def info(self, name: str) -> ObjectInfo | None:
        """One object, or None when it is not there."""
        return self._explained(lambda: self.objects.info(name), name)

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        return self._explained(lambda: self.objects.read(name), name)

    def write(self, name: str, content: bytes) -> None:
        """Put an object: afterwards it is there whole, whoever else wrote it meanwhile; before, it was not there or was the old one."""
        self._explained(lambda: self.objects.write(name, content), name)

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is fine."""
        self._explained(lambda: self.objects.delete(name), name)

    def delete_unless_newer(self, name: str, modified: float) -> bool:
        """Remove an object, unless it was written after the given time, which the store gave; whether it was removed.

        No store does both at once: what is written between the look and the removal is lost.
        """
        found = self.info(name)
        if found is None or found.modified > modified:  # not the version: the same bytes written again have the same ETag
            return False
        self.delete(name)
        return True

    def prime_listing_cache(self, listed: Iterable[ObjectInfo]) -> None:
        """Tell ``self.filesystem`` what a listing said, so that a reader of these objects does not ask for each of them again."""
        if scheme_of(self.uri) != "s3":
            return
        entries = defaultdict(list)
        for info in listed:
            path = self.path(info.name)
            entries[path.rpartition("/")[0]].append({"name": path, "size": info.size, "type": "file"})
        for folder, found in entries.items():
            self.filesystem.dircache[folder] = found

    def check_readable(self, name: str = "") -> bool:
        """Whether there is such an object, or anything at all below the root.

        Raises StorageError when that cannot be told, and within 30 s: it waits less patiently than what comes after it.
        """
        return self._explained(lambda: self.objects.check_readable(name), name)

    def check_writable(self) -> None:
        """Raise StorageError, within 30 s and saying what to do, when nothing can be written below the root."""
        self._explained(lambda: self.objects.check_writable(f"{PARTIAL_FOLDER}/probe-{secrets.token_hex(4)}"))
        self.remove_partial()

    def remove_partial(self) -> int:
        """Remove what killed writers left; what is still being written stays. How many there were."""
        return self._explained(self.objects.remove_partial)

    def _explained(self, operation: Callable[[], Result], name: str = "") -> Result:
        try:
            return operation()
        except StorageError:
            raise
        except FileNotFoundError:
            if name:
                raise
            raise StorageError(f"{self.uri}: there is nothing at this location") from None
        except Exception as error:  # fsspec implementations raise many kinds
            raise StorageError(explain(error, object_path(self.uri, name) if name else self.uri)) from error


# ----------------------------------------------------------------------------------------------------- kinds of store


class FsspecObjects:
    """The objects below a path of a file system that fsspec opens."""

    def __init__(self, filesystem: Any, root: str, config: StorageConfig):
        self.filesystem, self.root, self.config = filesystem, root, config

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object below ``prefix``. Raises where a folder cannot be listed: what is in it is not gone."""
        top = object_path(self.root, prefix).rstrip("/")
        base = self.root.rstrip("/") + "/"
        self.filesystem.invalidate_cache()
        flat = getattr(type(self.filesystem), "_find", AsyncFileSystem._find) is not AsyncFileSystem._find  # one listing, not one a folder
        entries = self._find(top) if flat else self._walk(top)
        unsized = []  # a web server's listing says names only
        for info in entries:
            name = info["name"].removeprefix(base).lstrip("/")
            if info.get("type", "file") != "file":
                continue
            if info.get("size") is None:
                unsized.append(name)
            else:
                yield _object_info(name, info)
        with ThreadPoolExecutor(LOOK_UP_THREADS) as pool:
            yield from filter(None, pool.map(self.info, unsized))

    def _find(self, top: str) -> Iterable[dict[str, Any]]:
        try:
            return self._tried(lambda: self.filesystem.find(top, detail=True)).values()
        except FileNotFoundError:
            return ()

    def _walk(self, folder: str, is_top: bool = True) -> Iterator[dict[str, Any]]:
        """The entries of a folder and of those below it. Not fsspec's: that leaves out what it cannot list."""
        try:
            found = self._tried(lambda: self.filesystem.ls(folder, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            if is_top:
                return
            raise
        for info in found:
            if info["name"].rstrip("/") == folder.rstrip("/"):  # the mark of an empty folder
                continue
            if info.get("type") == "directory":
                yield from self._walk(info["name"], is_top=False)
            else:
                yield info

    def children(self) -> tuple[Sequence[str], Mapping[str, ObjectInfo]]:
        self.filesystem.invalidate_cache()
        try:
            found = self._tried(lambda: self.filesystem.ls(self.root, detail=True))
        except FileNotFoundError:
            return [], {}
        names = {info["name"].rstrip("/").rsplit("/", 1)[-1]: info for info in found}
        folders = [name for name, info in names.items() if info.get("type") == "directory"]
        return folders, {name: _object_info(name, info) for name, info in names.items() if info.get("type", "file") == "file"}

    def info(self, name: str) -> ObjectInfo | None:
        try:
            return _object_info(name, self._tried(lambda: self.filesystem.info(object_path(self.root, name))))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes:
        return self._tried(lambda: self.filesystem.cat_file(object_path(self.root, name)))

    def write(self, name: str, content: bytes) -> None:
        self._tried(lambda: self.filesystem.pipe_file(object_path(self.root, name), content))

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda: self.filesystem.rm_file(object_path(self.root, name)))

    def check_readable(self, name: str = "") -> bool:
        try:  # not exists(): to that, an error of any kind is absence
            return bool(self._tried(lambda: self.filesystem.info(object_path(self.root, name) if name else self.root)))
        except FileNotFoundError:
            return False

    def check_writable(self, name: str) -> None:
        self.filesystem.pipe_file(object_path(self.root, name), b"probe")
        self.filesystem.rm_file(object_path(self.root, name))

    def remove_partial(self) -> int:
        return 0

    def _tried(self, operation: Callable[[], Result]) -> Result:
        def attempt() -> Result:
            try:
                return operation()
            except FileNotFoundError as error:
                if says_absent(error):
                    raise
                raise error.__cause__ or error from None

        return retrying(attempt, self.config.retries)


def _object_info(name: str, info: dict[str, Any]) -> ObjectInfo:
    modified = info.get("LastModified") or info.get("Last-Modified") or info.get("mtime") or info.get("created") or 0.0
    if isinstance(modified, str):
        try:  # a header of HTTP
            modified = email.utils.parsedate_to_datetime(modified)
        except ValueError:
            modified = 0.0
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
