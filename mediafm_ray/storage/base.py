"""The configuration of object storage and the description of one object, for all kinds of store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from mediafm_ray.spec import ConfigSection, resource

PROBE_BYTES = 1 << 20  # A job starts only where a local file of this size can be written.
ADDRESSING_STYLES = ("auto", "path", "virtual")
MIN_PART_MB = 5  # S3 refuses smaller parts of an upload, but for the last.


@dataclass(frozen=True)
class StorageConfig(ConfigSection):
    """Access to object storage. Credentials come from the environment only (the standard AWS chain)."""

    endpoint_url: str = resource("", "URL of an S3-compatible server; empty = AWS, or AWS_ENDPOINT_URL_S3 where it is set")
    addressing: str = resource(
        "auto",
        "place of the bucket's name in a request: path, virtual (in the host name), auto = path with an endpoint_url",
        choices=ADDRESSING_STYLES,
    )
    connect_timeout_s: float = resource(10.0, "seconds after which an attempt to connect to object storage fails", above=0)
    read_timeout_s: float = resource(60.0, "seconds without a byte after which a request to object storage fails", above=0)
    retries: int = resource(8, "attempts at a request to object storage while its errors are transient; the pauses grow to 20 s", min=1)
    part_mb: int = resource(64, "size of a part in MB; larger objects are uploaded in parts", min=MIN_PART_MB)
    patience_s: ClassVar[float] = math.inf  # No attempt begins later than this after the first one.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoint_url and not self.endpoint_url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint_url must begin with http:// or https://, is {self.endpoint_url.rpartition('@')[2]}")


class ObjectInfo(NamedTuple):
    """One object as a listing describes it. (A plan makes millions, and a named tuple takes a third of the time of a frozen dataclass.)"""

    name: str  # relative to the store's root, with '/' between the parts
    size: int  # bytes
    version: str  # ETag, or the modification time in nanoseconds; changes with the content
    modified: float  # seconds since the epoch
    is_merged: bool = False  # There is no such object: the title lies in a merged file (see merged.py).


class Unknown(NamedTuple):
    """An object that could not be looked up: it may or may not exist."""

    reason: str  # message for the user
    is_transient: bool


def object_path(root: str, name: str) -> str:
    """Return the path of an object below a root."""
    return f"{root.rstrip('/')}/{name}"
