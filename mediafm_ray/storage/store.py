"""Objects below one root URI: a local folder, s3://, or anything else that fsspec opens.

Two guarantees hold on every kind of store. An object is visible only when it is whole: a PUT is atomic on object storage, and a local
file is written under another name and renamed. A listing shows only names that a caller wrote, no temporary objects.
"""

from __future__ import annotations

import contextlib
import email.utils
import mmap
import os
import re
import secrets
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from mediafm_ray.errors import says_absent
from mediafm_ray.storage.base import ObjectInfo, StorageConfig, object_path
from mediafm_ray.storage.errors import ReplacedMeanwhile, StorageError, explain, retrying
from mediafm_ray.storage.local import PARTIAL_FOLDER, LocalObjects
from mediafm_ray.storage.s3 import S3Objects, s3_config_options
from mediafm_ray.text import local_path

ALLOWED_SCHEMES = ("file", "s3", "memory", "gs", "abfs", "az", "http", "https")  # the schemes that a catalog may use
LOOK_UP_THREADS = 16
PLAIN = re.compile("[A-Za-z0-9_.-]*")  # Text that is its own percent-encoding.

Result = TypeVar("Result")


def scheme_of(uri: str) -> str:
    """Return the lower-case scheme of a URI; 'file' for a plain path (also for C:\\...)."""
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else "file"


def scheme_problem(uri: str) -> str:
    """Say that the scheme of a URI is not allowed; empty if it is."""
    scheme = scheme_of(uri)
    if scheme in ALLOWED_SCHEMES:
        return ""
    return f"{uri}: the scheme {scheme}:// is not allowed; use a path or one of {', '.join(ALLOWED_SCHEMES)}"


def open_filesystem(uri: str, config: StorageConfig) -> tuple[Any, str]:
    """Return the fsspec file system of a URI and the path in it. Raises StorageError for a scheme that is not allowed."""
    if problem := scheme_problem(uri):
        raise StorageError(problem)
    scheme = scheme_of(uri)
    if scheme == "file":
        return LocalFileSystem(), absolute(uri)
    try:
        kind = fsspec.get_filesystem_class(scheme)  # Not url_to_fs, which takes a '::' in a key for a chain of file systems.
    except ImportError as error:
        raise StorageError(f"{uri}: {error}; install the fsspec package of this kind of storage") from error
    found = {} if scheme == "s3" else kind._get_kwargs_from_urls(uri)  # s3fs would parse '?versionId=' in a key.
    return kind(**found, **fsspec_options(uri, config)), kind._strip_protocol(uri)


def fsspec_options(uri: str, config: StorageConfig) -> dict[str, Any]:
    """Return what fsspec needs beside the URI: for s3:// the endpoint, timeouts and retries, for other schemes nothing."""
    if scheme_of(uri) != "s3":
        return {}
    return {"endpoint_url": config.endpoint_url or None, "config_kwargs": s3_config_options(config)}


def absolute(uri: str) -> str:
    """Make a local path absolute, with '~' as the home folder; other URIs stay as they are. Raises StorageError for an invalid path."""
    if scheme_of(uri) != "file" or not uri:
        return uri
    path = local_path(uri)
    assert path is not None
    try:
        return os.path.abspath(os.path.expanduser(path) if path is uri else path)
    except ValueError as error:  # an invalid user name after '~'
        raise StorageError(f"{uri!r} is not a path: {error}") from error


def join(base: str, relative: str) -> str:
    """Resolve a URI that may be relative to the folder ``base``."""
    if "://" in relative or relative.startswith("/"):
        return relative
    return f"{base.rstrip('/')}/{relative}"


class Store:
    """The objects below one root URI.

    Every error is a StorageError whose message is one line and says what to do, with one exception: reading a missing object raises
    FileNotFoundError.
    """

    def __init__(self, uri: str, config: StorageConfig | None = None):
        if not uri:
            raise StorageError("no location: the URI is empty")
        self.uri = absolute(uri).rstrip("/") or "/"
        self.config = config or StorageConfig()
        self.filesystem, self.root = open_filesystem(self.uri, self.config)
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self.objects: LocalObjects | S3Objects | FsspecObjects
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
        """Yield every object below ``prefix``, in no particular order; nothing where the prefix does not exist."""
        listing = self.objects.list(prefix)
        while (info := self._explained(lambda: next(listing, None))) is not None:
            yield info

    def children(self) -> Mapping[str, ObjectInfo]:
        """Return the objects directly below the root by name, from one (paged) listing."""
        return self._explained(self.objects.children)[1]

    def folders(self) -> Sequence[str]:
        """Return the sorted names of the folders directly below the root, from one (paged) listing."""
        return sorted(self._explained(self.objects.children)[0])

    def info(self, name: str) -> ObjectInfo | None:
        """Look up one object; None where it does not exist."""
        return self._explained(lambda: self.objects.info(name), name)

    def read(self, name: str) -> bytes:
        """Read a whole object. Raises FileNotFoundError."""
        return self._explained(lambda: self.objects.read(name), name)

    def local_file(self, name: str, folder: str) -> str:
        """Return the path of a file with the content of an object: its own, or that of a copy in a folder. Raises FileNotFoundError."""
        objects, path = self.objects, os.path.join(folder, "copy")
        if isinstance(objects, LocalObjects):
            path = self.path(name)
            self._explained(lambda: open(path, "rb").close(), name)
        else:
            self._explained(lambda: objects.copy(name, path), name)
        return path

    def write(self, name: str, content: bytes) -> None:
        """Write an object atomically: a reader sees the old object, none, or the whole new one, also with several writers."""
        self._explained(lambda: self.objects.write(name, content), name)

    def replace(self, name: str, path: str, expected: ObjectInfo | None) -> None:
        """Write the content of a local file as an object, in the place of the expected object, None: of none.

        Raises ReplacedMeanwhile where another is there, if the kind of store can tell: the local one can, and servers with conditional
        writes (If-Match); others replace whatever is there.
        """
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            content = memoryview(mapped)
            try:
                self._explained(lambda: self.objects.replace(name, content, expected), name)
            finally:
                content.release()

    def delete(self, name: str) -> None:
        """Remove an object; a missing one is no error."""
        self._explained(lambda: self.objects.delete(name), name)

    def delete_unless_newer(self, name: str, modified: float) -> bool:
        """Remove an object, unless it was written after ``modified``, a time that the store gave; return True if it was removed.

        This is not atomic: what is written between the look-up and the removal is lost.
        """
        found = self.info(name)
        if found is None or found.modified > modified:  # The ETag would not do: the same bytes have the same one.
            return False
        self.delete(name)
        return True

    def delete_all_unless_newer(self, infos: Sequence[ObjectInfo]) -> int:
        """Remove listed objects but those that were written again since, as ``delete_unless_newer`` does; return how many were removed.

        S3 lists them and removes them with few requests, so that more than one request lies between the look-up and the removal.
        """
        objects = self.objects
        if not isinstance(objects, S3Objects):
            return sum(self.delete_unless_newer(info.name, info.modified) for info in infos)
        found = self._explained(lambda: objects.find([info.name for info in infos]))
        names = [info.name for info in infos if isinstance(now := found.get(info.name), ObjectInfo) and now.modified <= info.modified]
        self._explained(lambda: objects.delete_all(names))
        return len(names)

    def prime_listing_cache(self, listed: Iterable[ObjectInfo]) -> None:
        """Put listed objects into the cache of ``self.filesystem``, so that a reader of them does not look up each again."""
        if scheme_of(self.uri) != "s3":
            return
        entries = defaultdict(list)
        for info in listed:
            path = self.path(info.name)
            entries[path.rpartition("/")[0]].append({"name": path, "size": info.size, "type": "file"})
        for folder, found in entries.items():
            self.filesystem.dircache[folder] = found

    def check_readable(self, name: str = "") -> bool:
        """Return True if there is such an object or, without a name, anything below the root.

        Raises StorageError within 30 s where that cannot be told: the timeouts are shorter than those of other requests.
        """
        return self._explained(lambda: self.objects.check_readable(name), name)

    def check_writable(self) -> None:
        """Raise StorageError within 30 s where nothing can be written below the root."""
        self._explained(lambda: self.objects.check_writable(f"{PARTIAL_FOLDER}/probe-{secrets.token_hex(4)}"))
        self.remove_partial()

    def remove_partial(self) -> int:
        """Remove what killed writers left, but nothing that is still being written; return how many there were."""
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
        except Exception as error:  # fsspec's implementations raise many types.
            raise StorageError(explain(error, object_path(self.uri, name) if name else self.uri)) from error


# ----------------------------------------------------------------------------------------------------- kinds of store


class FsspecObjects:
    """The objects below a path of a file system that fsspec opens."""

    def __init__(self, filesystem: Any, root: str, config: StorageConfig):
        self.filesystem, self.root, self.config = filesystem, root, config

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object below ``prefix``. Raises where a folder cannot be listed: its objects are not gone."""
        top = object_path(self.root, prefix).rstrip("/")
        base = self.root.rstrip("/") + "/"
        self.filesystem.invalidate_cache()
        # A file system with a _find of its own lists everything at once, others list each folder.
        flat = getattr(type(self.filesystem), "_find", AsyncFileSystem._find) is not AsyncFileSystem._find
        entries = self._find(top) if flat else self._walk(top)
        unsized = []  # The listing of a web server has only names.
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
            return self._retried(lambda: self.filesystem.find(top, detail=True)).values()
        except FileNotFoundError:
            return ()

    def _walk(self, folder: str, is_top: bool = True) -> Iterator[dict[str, Any]]:
        """Yield the entries of a folder and of those below it. fsspec's own walk leaves out folders that it cannot list."""
        try:
            found = self._retried(lambda: self.filesystem.ls(folder, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            if is_top:
                return
            raise
        for info in found:
            if info["name"].rstrip("/") == folder.rstrip("/"):  # the marker of an empty folder
                continue
            if info.get("type") == "directory":
                yield from self._walk(info["name"], is_top=False)
            else:
                yield info

    def children(self) -> tuple[Sequence[str], Mapping[str, ObjectInfo]]:
        self.filesystem.invalidate_cache()
        try:
            found = self._retried(lambda: self.filesystem.ls(self.root, detail=True))
        except FileNotFoundError:
            return [], {}
        names = {info["name"].rstrip("/").rsplit("/", 1)[-1]: info for info in found}
        folders = [name for name, info in names.items() if info.get("type") == "directory"]
        return folders, {name: _object_info(name, info) for name, info in names.items() if info.get("type", "file") == "file"}

    def info(self, name: str) -> ObjectInfo | None:
        try:
            return _object_info(name, self._retried(lambda: self.filesystem.info(object_path(self.root, name))))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes:
        return self._retried(lambda: self.filesystem.cat_file(object_path(self.root, name)))

    def copy(self, name: str, path: str) -> None:
        self._retried(lambda: self.filesystem.get_file(object_path(self.root, name), path))

    def write(self, name: str, content: bytes) -> None:
        self._retried(lambda: self.filesystem.pipe_file(object_path(self.root, name), content))

    def replace(self, name: str, content: memoryview, expected: ObjectInfo | None) -> None:
        if self.info(name) != expected:
            raise ReplacedMeanwhile(f"{object_path(self.root, name)} was replaced by another process: run the same command again")
        self.write(name, bytes(content))

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._retried(lambda: self.filesystem.rm_file(object_path(self.root, name)))

    def check_readable(self, name: str = "") -> bool:
        try:  # Not exists(), which takes every error for absence.
            return bool(self._retried(lambda: self.filesystem.info(object_path(self.root, name) if name else self.root)))
        except FileNotFoundError:
            return False

    def check_writable(self, name: str) -> None:
        self.filesystem.pipe_file(object_path(self.root, name), b"probe")
        self.filesystem.rm_file(object_path(self.root, name))

    def remove_partial(self) -> int:
        return 0

    def _retried(self, operation: Callable[[], Result]) -> Result:
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
        try:  # an HTTP header
            modified = email.utils.parsedate_to_datetime(modified)
        except ValueError:
            modified = 0.0
    seconds = modified.timestamp() if hasattr(modified, "timestamp") else float(modified)
    version = str(info.get("ETag") or info.get("etag") or "").strip('"') or str(seconds)
    return ObjectInfo(name, int(info.get("size") or 0), version, seconds)


def percent_encode(text: str) -> str:
    """Encode text as a file name for any store: only letters, digits, '-', '.', '_' and %XX.

    A leading '.' or '_' is encoded too, because readers of Parquet folders skip files that begin with one.
    """
    encoded = text if PLAIN.fullmatch(text) else urllib.parse.quote(text, safe="").replace("~", "%7E")
    if encoded[:1] in (".", "_"):
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}"
    return encoded
