"""What all kinds of store have in common: how they are configured, and what a listing tells of an object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mediafm_ray.spec import ConfigSection, resource

PROBE_BYTES = 1 << 20  # what must fit on a disk before a job begins
ADDRESSING_STYLES = ("auto", "path", "virtual")
MIN_PART_MB = 5  # S3's own limit for every part but the last


@dataclass(frozen=True)
class StorageConfig(ConfigSection):
    """How object storage is reached. Credentials come from the environment only (the standard AWS chain)."""

    endpoint_url: str = resource("", "URL of an S3-compatible server; empty = AWS, or AWS_ENDPOINT_URL_S3 where it is set")
    addressing: str = resource(
        "auto",
        "where the bucket's name stands in a request: path, virtual (in the host name), auto = path with an endpoint_url",
        choices=ADDRESSING_STYLES,
    )
    connect_timeout_s: float = resource(10.0, "seconds until a connection attempt to object storage is given up", above=0)
    read_timeout_s: float = resource(60.0, "seconds without a byte until a request to object storage is given up", above=0)
    retries: int = resource(8, "attempts of one request to object storage, where the error can pass; the pauses grow to 20 s", min=1)
    part_mb: int = resource(64, "larger objects are put in parts of so many MB", min=MIN_PART_MB)
    patience_s: ClassVar[float] = math.inf  # within which an attempt that follows a failed one must begin

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoint_url and not self.endpoint_url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint_url must begin with http:// or https://, is {self.endpoint_url.rpartition('@')[2]}")


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing tells of one object."""

    name: str  # relative to the store's root, with '/' between the parts
    size: int  # bytes
    version: str  # ETag, or the modification time in nanoseconds: changes when the content does
    modified: float  # seconds since the epoch


@dataclass(frozen=True)
class Unknown:
    """An object that could not be looked at: neither there nor gone."""

    reason: str  # for a person
    is_transient: bool


def object_path(root: str, name: str) -> str:
    """Return the path of an object below a root."""
    return f"{root.rstrip('/')}/{name}"
