"""Opening a title's objects: we open the bytes ourselves and hand FFmpeg a stream, never a name it could follow.

Container formats are an allow-list. Formats that refer to other files or addresses (playlists, concat scripts, image
sequences, SDP) are not on it, nested protocols are closed, and a demuxer that asks for another file gets an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import av
import av.container
import fsspec

from mediafm_ray.media.options import MediaConfig
from mediafm_ray.spec import TitleError

LOCAL_BUFFER_BYTES = 1 << 20  # what FFmpeg reads at once from a local file; small reads cost a Python call each
REMOTE_BLOCKS = 4  # of a remote file in memory at once, each of media.read_ahead_mb

# Self-contained containers of video. The audio-only ones are here so that the error can say "audio only".
VIDEO_FORMATS = ("mov", "matroska", "mpegts", "mpeg", "avi", "flv", "asf", "ogg", "mxf", "nut", "ivf", "dv", "gxf", "wtv", "rm")
ELEMENTARY_FORMATS = ("mpegvideo", "m4v", "h264", "hevc", "vvc", "obu", "yuv4mpegpipe", "gif")
AUDIO_FORMATS = ("mp3", "flac", "wav", "aac", "aiff", "amr", "ac3", "eac3", "caf", "w64", "dts")
ALLOWED_FORMATS = VIDEO_FORMATS + ELEMENTARY_FORMATS + AUDIO_FORMATS


def file_name(uri: str) -> str:
    """The last part of a URI or path, for messages: no folders, no query."""
    path = urlsplit(uri).path if "://" in uri else uri
    return unquote(path.rstrip("/").rsplit("/", 1)[-1]) or uri


def is_local(uri: str) -> bool:
    """Whether a URI names a file of this machine."""
    return "://" not in uri or uri.startswith("file://")


def open_bytes(uri: str, media: MediaConfig) -> BinaryIO:
    """A seekable binary stream of the object at ``uri``: a local path, ``file://``, ``s3://``, anything fsspec opens.

    Remote objects are read by range requests with read-ahead, never downloaded whole. Raises TitleError when there is
    no such object or it cannot be read.
    """
    name = file_name(uri)
    try:
        if is_local(uri):
            path = Path(unquote(urlsplit(uri).path)) if uri.startswith("file://") else Path(uri)
            if path.is_dir():
                raise TitleError(f"{name} is a folder, not a file")
            return path.open("rb", buffering=0)
        filesystem, path_there = fsspec.url_to_fs(uri, **media.storage_options)
        return cast(
            BinaryIO,
            filesystem.open(
                path_there,
                "rb",
                block_size=media.read_ahead_mb << 20,
                cache_type="background",  # the next block is on its way while one is decoded
                cache_options={"maxblocks": REMOTE_BLOCKS},
            ),
        )
    except FileNotFoundError:
        raise TitleError(f"{name} does not exist") from None
    except PermissionError:
        raise TitleError(f"{name} may not be read: permission denied") from None
    except (OSError, ValueError, ImportError) as error:
        raise TitleError(f"{name} cannot be opened: {error.__class__.__name__}: {_without_path(str(error), uri)}") from error


def read_whole(uri: str, media: MediaConfig, max_bytes: int) -> bytes:
    """All bytes of a small object. Raises TitleError when it is missing, unreadable or larger than ``max_bytes``."""
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
    """Open the container in ``stream``. Raises TitleError when it is none, or none of the allowed formats."""
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
    except av.error.ArgumentError as error:  # EINVAL: what FFmpeg says of a format that is not on the list
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


def matroska_is_cut_off(stream: BinaryIO) -> bool | None:
    """Whether a Matroska or WebM file ends before its segment does; None where it does not say or is something else.

    RFC 8794: an element is an identifier, a size whose leading zeros tell its length, and content; all ones is unknown.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(4096)
    stream.seek(0)
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
    """A stream under a plain file name: FFmpeg sees the name in messages and for nothing else."""

    def __init__(self, stream: BinaryIO, name: str):
        self.name = name
        self.read = stream.read
        self.seek = stream.seek
        self.tell = stream.tell


def _plain(error: av.error.FFmpegError) -> str:
    return (error.strerror or error.__class__.__name__).strip()


def _without_path(message: str, uri: str) -> str:
    return message.replace(uri, file_name(uri))
