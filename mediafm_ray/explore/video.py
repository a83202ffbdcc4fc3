"""Videos for a browser: the parts of a file that it asks for, and what it can play. No ray, no web framework here."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from mediafm_ray.errors import TitleError
from mediafm_ray.media.options import MediaConfig
from mediafm_ray.media.source import RemoteStream, file_name, open_bytes
from mediafm_ray.text import local_path

RANGE_PATTERN = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
CONTENT_TYPES = (  # part of FFmpeg's name of a container -> the type by which browsers know it
    ("mp4", "video/mp4"),
    ("matroska", "video/webm"),
    ("ogg", "video/ogg"),
)
OTHER_TYPE = "application/octet-stream"
CODECS = {  # FFmpeg's decoder -> its name in a media type, as canPlayType takes it
    "h264": "avc1.42E01E",
    "hevc": "hvc1.1.6.L93.B0",
    "vp8": "vp8",
    "vp9": "vp09.00.10.08",
    "av1": "av01.0.05M.08",
    "libdav1d": "av01.0.05M.08",
    "libaom-av1": "av01.0.05M.08",
    "theora": "theora",
    "mpeg4": "mp4v.20.9",
}


class RangeError(Exception):
    """A part that a file does not have."""


@dataclass(frozen=True)
class OpenVideo:
    """An open video, its size, and a tag that changes with its content."""

    stream: BinaryIO
    size: int
    tag: str


def open_video(uri: str, storage_options: Mapping[str, Any]) -> OpenVideo:
    """Open a video wherever it lies. Raises TitleError and OutageError, as ``media.source.open_bytes``."""
    path = local_path(uri)
    if path is not None and os.path.exists(path) and not os.path.isfile(path):  # Opening a pipe would wait for its writer.
        raise TitleError(f"{file_name(uri)} is not a file")
    stream = open_bytes(uri, MediaConfig(storage_options=dict(storage_options), read_ahead_mb=1))
    size = stream.seek(0, io.SEEK_END)
    if isinstance(stream, RemoteStream):
        identity = stream.version
    else:
        identity = str(os.fstat(stream.fileno()).st_mtime_ns) if hasattr(stream, "fileno") else ""
    return OpenVideo(stream, size, hashlib.sha256(f"{uri}\n{size}\n{identity}".encode(errors="surrogateescape")).hexdigest()[:32])


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Return the part ``[start, end)`` that a Range header asks for (RFC 9110, section 14).

    None, for the whole, where there is none, or one that a server may ignore: another unit, several parts, no numbers. Raises RangeError
    where no byte of the part exists.
    """
    match = RANGE_PATTERN.fullmatch(header.replace(" ", ""))
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        last = int(match[2])
        if not last or not size:
            raise RangeError
        return max(size - last, 0), size
    start, end = int(match[1]), int(match[2]) + 1 if match[2] else size
    if end <= start and match[2]:
        return None
    if start >= size:
        raise RangeError
    return start, min(end, size)


def content_type(facts: Mapping[str, Any]) -> str:
    """Return the media type of a video for browsers. ``facts``: of its file."""
    container = str(facts.get("container", ""))
    return next((type_ for part, type_ in CONTENT_TYPES if part in container), OTHER_TYPE)


def playable_type(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the media type with which a browser can be asked whether it plays a video, or an empty one and the reason why none does."""
    container, codec = str(facts.get("container", "")), str(facts.get("video_codec", ""))
    if not container:
        return "video/mp4", ""  # Nothing is known, so the browser has to try.
    if content_type(facts) == OTHER_TYPE:
        return "", f"Browsers do not play this container ({container})."
    if codec not in CODECS:
        return "", f"Browsers do not play this codec ({codec or 'unknown'})."
    return f'{content_type(facts)}; codecs="{CODECS[codec]}"', ""
