"""Opening of a title's objects: the bytes are opened here and FFmpeg gets a stream, never a name that it could follow.

Container formats are an allow-list. Formats that refer to other files or addresses (playlists, concat scripts, image
sequences, SDP) are not on it, nested protocols are closed, and a demuxer that asks for another file gets an error.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import av
import av.container
import fsspec

from mediafm_ray.errors import OutageError, TitleError, is_outage, says_absent
from mediafm_ray.media.options import MediaConfig
from mediafm_ray.text import local_path, public_line, public_uri

LOCAL_BUFFER_BYTES = 1 << 20  # bytes that FFmpeg reads at once from a local file; each read costs a Python call
READ_ATTEMPTS = 4  # attempts to go on reading a remote file, on top of those of the file system
READ_PAUSE_S = 0.5  # half of the longest pause before the second attempt; it doubles each time
MAX_RIFF_CHUNKS = 1000  # chunks of an AVI file; each but the last holds about a GB
REMOTE_BLOCKS = 4  # blocks of a remote file in memory at once, each of media.read_ahead_mb

# Self-contained formats. Those of audio are here so that the error message can say "only audio".
VIDEO_FORMATS = ("mov", "matroska", "mpegts", "mpeg", "avi", "flv", "asf", "ogg", "mxf", "nut", "ivf", "dv", "gxf", "wtv", "rm")
ELEMENTARY_FORMATS = ("mpegvideo", "m4v", "h264", "hevc", "vvc", "obu", "yuv4mpegpipe", "gif")
AUDIO_FORMATS = ("mp3", "flac", "wav", "aac", "aiff", "amr", "ac3", "eac3", "caf", "w64", "dts")
ALLOWED_FORMATS = VIDEO_FORMATS + ELEMENTARY_FORMATS + AUDIO_FORMATS


def file_name(uri: str) -> str:
    """Return the last part of a URI or path for messages: no folders, no secrets, no control characters."""
    path = local_path(uri)
    if path is None:
        path = public_uri(uri).partition("://")[2]
        if uri.lower().startswith(("http://", "https://")):
            path = unquote(path)
    return public_line(path.rstrip("/").rsplit("/", 1)[-1] or path)


def is_local(uri: str) -> bool:
    """Return whether a URI names a file of this machine."""
    return local_path(uri) is not None


def open_bytes(uri: str, media: MediaConfig) -> BinaryIO:
    """Open a seekable binary stream of the object at ``uri``: a local path, ``file://``, ``s3://``, anything fsspec opens.

    Remote objects are read by range requests with read-ahead, never downloaded whole. Raises TitleError when there is no such object or
    it cannot be read, and OutageError where the cause is not the object.
    """
    name = file_name(uri)
    try:
        path = local_path(uri)
        if path is not None:
            if os.path.isdir(path):
                raise TitleError(f"{name} is a folder, not a file")
            return open(path, "rb", buffering=0)
        kind = fsspec.get_filesystem_class(uri.partition("://")[0].lower())  # not url_to_fs, which reads '::' as a chain of file systems
        found = {} if uri.startswith("s3:") else kind._get_kwargs_from_urls(uri)  # s3 keys may hold '?versionId='
        filesystem, path_there = kind(**{**found, **media.storage_options}), kind._strip_protocol(uri)

        def open_there() -> Any:
            return filesystem.open(
                path_there,
                "rb",
                block_size=media.read_ahead_mb << 20,
                cache_type="background",  # loads the next block while one is decoded
                cache_options={"maxblocks": REMOTE_BLOCKS},
            )

        opened = open_there()
        return cast(BinaryIO, RemoteStream(name, open_there, opened) if opened.size is not None else opened)  # no ranges
    except FileNotFoundError as error:
        if says_absent(error):
            raise TitleError(f"{name} does not exist") from None
        raise OutageError(f"{name} cannot be opened: {_without_path(str(error.__cause__), uri)}") from error
    except PermissionError:
        raise OutageError(f"{name} may not be read: permission denied") from None
    except (OSError, ValueError, ImportError) as error:
        kind = OutageError if is_outage(error) else TitleError
        raise kind(f"{name} cannot be opened: {error.__class__.__name__}: {_without_path(str(error), uri)}") from error


class RemoteStream:
    """A stream of a remote object that survives faults of the network: it opens the object again where reading failed.

    The file system retries single requests; this class handles the errors that remain, and answers that end early.
    """

    def __init__(self, name: str, open_there: Callable[[], Any], opened: Any):
        self.name, self._open, self._file = name, open_there, opened
        self._size, self._position = int(opened.size), 0
        self.version = _version_of(opened)

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes; fewer only at the end.

        Raises TitleError where the object has changed, OutageError where reading cannot go on.
        """
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                return self._read(size)
            except (TitleError, OutageError):
                raise
            except FileNotFoundError as error:
                if says_absent(error):
                    raise TitleError(f"{self.name} was removed while it was read") from None
                self._pause(attempt, error.__cause__ or error)
            except PermissionError as error:
                raise OutageError(f"{self.name} may not be read any more: {error}") from error
            except Exception as error:  # every file system has exceptions of its own
                self._pause(attempt, error)
        raise AssertionError("the last attempt returns or raises")

    def _pause(self, attempt: int, error: BaseException) -> None:
        """Wait before the object is opened again. Raises OutageError after the last attempt."""
        if attempt == READ_ATTEMPTS:
            raise OutageError(f"{self.name} cannot be read on at byte {self._position}: {type(error).__name__}: {error}") from error
        time.sleep(random.uniform(0, READ_PAUSE_S * 2**attempt))  # with jitter, because other readers met the same fault
        with contextlib.suppress(Exception):  # closing a failed stream may fail as well
            self._file.close()
        self._file = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; return the position from the start. Raises ValueError for a position before the start."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Return the position from the start."""
        return self._position

    def close(self) -> None:
        """Close the connection."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> RemoteStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._file = self._open()
            if self._file.size != self._size or _version_of(self._file) != self.version:
                raise TitleError(f"{self.name} was replaced while it was read")
        self._file.seek(self._position)
        content = self._file.read(size)
        expected = max(0, self._size - self._position) if size < 0 else min(size, max(0, self._size - self._position))
        if len(content) != expected:
            raise EOFError(f"{len(content)} bytes came instead of {expected}")
        self._position += len(content)
        return content


def _version_of(opened: Any) -> str:
    """Return what tells versions of an open file apart, or an empty string where the file system gives nothing."""
    return str(opened.details.get("ETag") or opened.details.get("Last-Modified", ""))


def read_whole(uri: str, media: MediaConfig, max_bytes: int) -> bytes:
    """Return all bytes of a small object.

    Raises what ``open_bytes`` raises, and TitleError where the object is larger than ``max_bytes``.
    """
    with open_bytes(uri, media) as stream:
        pieces: list[bytes] = []
        size = 0
        while piece := stream.read(1 << 20):
            size += len(piece)
            if size > max_bytes:
                raise TitleError(f"{file_name(uri)} is larger than {max_bytes >> 20} MB")
            pieces.append(piece)
        return b"".join(pieces)


def open_container(stream: BinaryIO, name: str, media: MediaConfig) -> av.container.InputContainer:
    """Open the container in ``stream``. Raises TitleError when the format is unknown or not allowed."""
    if stream.seek(0, os.SEEK_END) == 0:
        raise TitleError(f"{name} is empty (0 bytes)")
    stream.seek(0)
    try:
        return av.open(
            _Named(stream, name),
            mode="r",
            options={"format_whitelist": ",".join(ALLOWED_FORMATS), "protocol_whitelist": "none", "max_pixels": str(media.max_pixels)},
            io_open=_refuse,
            buffer_size=LOCAL_BUFFER_BYTES,
            metadata_errors="replace",
        )
    except av.error.ArgumentError as error:  # FFmpeg returns EINVAL for a format that is not on the list
        raise TitleError(f"{name} is in none of the containers that are read (playlists and scripts are not followed)") from error
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as error:
        stream.seek(4)
        if stream.read(4) == b"ftyp":
            raise TitleError(f"{name} is an MP4 without a usable index (moov): cut off, or never finished") from error
        raise TitleError(f"{name} is not a video that can be read: {_plain(error)}") from error
    except _ReferenceRefused as error:
        raise TitleError(f"{name} points to another file or address, which is not followed") from error


def is_cut_off(stream: BinaryIO) -> bool | None:
    """Return whether a Matroska, WebM or AVI file ends before its content does; None where no length is declared or for other formats."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(4096)
    cut_off = _avi_is_cut_off(stream, size) if head[:4] == b"RIFF" and head[8:12] == b"AVI " else _matroska_is_cut_off(head, size)
    stream.seek(0)
    return cut_off


def _avi_is_cut_off(stream: BinaryIO, size: int) -> bool | None:
    """Follow the RIFF chunks of an AVI file, each of which declares its size; a size of 0 means that it was never finished."""
    position = 0
    for _ in range(MAX_RIFF_CHUNKS):
        stream.seek(position)
        head = stream.read(8)
        if len(head) < 8 or head[:4] != b"RIFF":
            return position > size + 1  # the padding of the last chunk may be missing
        length = int.from_bytes(head[4:], "little")
        if not length:
            return None
        position += 8 + length + length % 2
    return None


def _matroska_is_cut_off(head: bytes, size: int) -> bool | None:
    """Compare the declared size of the segment with the file's.

    RFC 8794: an element is an identifier, a size whose leading zeros give its own length, and content; all ones means unknown.
    """
    position = 0
    for identifier in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # EBML header, segment
        if head[position : position + 4] != identifier or len(head) < position + 12 or not head[position + 4]:
            return None
        length = 9 - head[position + 4].bit_length()
        content = int.from_bytes(head[position + 4 : position + 4 + length]) & ((1 << 7 * length) - 1)
        if content == (1 << 7 * length) - 1:
            return None
        position += 4 + length
        if identifier == b"\x1a\x45\xdf\xa3":
            position += content
    return position + content > size


class _ReferenceRefused(Exception):
    pass


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    raise _ReferenceRefused(url)


class _Named:
    """A stream with a plain file name, which FFmpeg uses only in messages."""

    def __init__(self, stream: BinaryIO, name: str):
        self.name = name
        self.read = stream.read
        self.seek = stream.seek
        self.tell = stream.tell


def _plain(error: av.error.FFmpegError) -> str:
    return (error.strerror or error.__class__.__name__).strip()


def _without_path(message: str, uri: str) -> str:
    return message.replace(uri, file_name(uri))
