"""Objects in a local folder: a file is written under another name and renamed, so that a visible file is whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mediafm_ray.storage.base import PROBE_BYTES, ObjectInfo, object_path
from mediafm_ray.storage.errors import ReplacedMeanwhile

PARTIAL_FOLDER = ".partial"  # below a root: files that are being written (local stores), and probes of check_writable
PARTIAL_ATTEMPTS = 3
NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
FILE_MODE = 0o644  # The umask still applies.


class LocalObjects:
    """Files below a local folder."""

    def __init__(self, root: str):
        self.root = root

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every file below ``prefix``, following symbolic links; a broken link has no size and no version.

        Raises OSError where a folder cannot be read: its files are not gone.
        """
        yield from self._walk(object_path(self.root, prefix).rstrip("/") or "/", len(self.root.rstrip("/")) + 1, ())

    def _walk(self, folder: str, base: int, above: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
        """``base``: length of the root's part of a path; ``above``: device and inode of each parent folder, against loops of links."""
        try:
            status = os.stat(folder)
            here = status.st_dev, status.st_ino
            if here in above:
                return
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):  # It is not a folder, or was removed.
            return
        for entry in entries:
            path = f"{folder.rstrip('/')}/{entry.name}"
            if _is_folder(entry):
                if entry.name != PARTIAL_FOLDER:
                    yield from self._walk(path, base, (*above, here))
            elif info := _stat(path, path[base:]):
                yield info

    def children(self) -> tuple[Sequence[str], Mapping[str, ObjectInfo]]:
        try:
            entries = list(os.scandir(self.root))
        except FileNotFoundError:
            return [], {}
        folders = [entry.name for entry in entries if entry.is_dir() and entry.name != PARTIAL_FOLDER]
        infos = {entry.name: _stat(entry.path, entry.name) for entry in entries if not entry.is_dir()}
        return folders, {name: info for name, info in infos.items() if info}

    def info(self, name: str) -> ObjectInfo | None:
        return _stat(object_path(self.root, name), name)

    def read(self, name: str) -> bytes:
        return Path(object_path(self.root, name)).read_bytes()

    def write(self, name: str, content: bytes | memoryview) -> None:
        path = object_path(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for attempt in range(PARTIAL_ATTEMPTS):
            descriptor, partial = _create_partial(os.path.join(self.root, PARTIAL_FOLDER))
            with os.fdopen(descriptor, "wb", buffering=0) as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX)
                    _write_all(stream, content)
                    os.fsync(descriptor)
                    os.rename(partial, path)
                    return
                except FileNotFoundError:  # A starting job removed the file before it was locked.
                    if attempt == PARTIAL_ATTEMPTS - 1:
                        raise
                finally:
                    with contextlib.suppress(FileNotFoundError):  # It was renamed.
                        os.unlink(partial)
                    with contextlib.suppress(OSError):  # It is not empty: another writer uses it.
                        os.rmdir(os.path.dirname(partial))

    def replace(self, name: str, content: memoryview, expected: ObjectInfo | None) -> None:
        """Write a file in the place of the expected one, None: of none. A lock on the folder keeps other replacements out meanwhile."""
        path = object_path(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ReplacedMeanwhile(f"{path} is being replaced by another process, perhaps a stopped one") from None
            if _stat(path, name) != expected:
                raise ReplacedMeanwhile(f"{path} was replaced by another process: run the same command again")
            self.write(name, content)
        finally:
            os.close(folder)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(object_path(self.root, name))

    def check_readable(self, name: str = "") -> bool:
        path = object_path(self.root, name) if name else self.root
        if os.path.isdir(path):
            next(os.scandir(path), None)  # raises PermissionError where it may not be read
        return os.path.exists(path)

    def check_writable(self, name: str) -> None:
        self.write(name, bytes(PROBE_BYTES))
        self.delete(name)

    def remove_partial(self) -> int:
        folder = Path(self.root, PARTIAL_FOLDER)
        if not folder.is_dir():
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
        with contextlib.suppress(OSError):  # It is not empty: another writer uses it.
            folder.rmdir()
        return removed


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder or a link to one. Raises OSError where that cannot be determined."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _stat(path: str, name: str) -> ObjectInfo | None:
    """Describe a regular file, or a broken link, which is a file that cannot be read and not one that is gone.

    None for anything else, and where nothing exists.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno not in NOTHING_THERE:
            raise
        return ObjectInfo(name, 0, "", 0.0) if os.path.islink(path) else None
    return ObjectInfo(name, status.st_size, str(status.st_mtime_ns), status.st_mtime) if stat.S_ISREG(status.st_mode) else None


def _create_partial(folder: str) -> tuple[int, str]:
    """Create a file in the folder of partial files; return its descriptor and path."""
    path = os.path.join(folder, f"{os.getpid()}-{secrets.token_hex(8)}")
    while True:
        try:
            os.makedirs(folder, exist_ok=True)
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, FILE_MODE), path
        except FileNotFoundError:  # Another writer has just removed the empty folder.
            continue
        except FileExistsError:  # ... while makedirs checked whether the existing path is a folder.
            if os.path.exists(folder) and not os.path.isdir(folder):
                raise


def _write_all(stream: Any, content: bytes | memoryview) -> None:
    """Write without a buffer, so that a full disk raises here and not a second time when the stream is closed."""
    left = memoryview(content)
    while left:
        left = left[stream.write(left) :]
