"""Errors of one title, and the classification of outages. Standard library only."""

from __future__ import annotations

import errno

from mediafm_ray.text import PublicError

OUTAGES = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ENETDOWN])


class TitleError(PublicError):
    """The reason, for people, why one title cannot be processed. It ends that title, never the job."""


class CardError(PublicError):
    """The reason, for people, why a card cannot decode one title; a CPU may decode it."""


class OutageError(PublicError):
    """The reason, for people, why one title cannot be processed now through no fault of its own; it does not count as an attempt."""


def is_outage(error: BaseException) -> bool:
    """Return True for failures of network, server, disk or permissions, which are not the title's fault."""
    if type(error).__module__.startswith("av."):  # PyAV raises OSErrors with FFmpeg's codes for faults of the media.
        return False
    passing = (OutageError, ConnectionError, TimeoutError, PermissionError)
    return isinstance(error, passing) or (isinstance(error, OSError) and error.errno in OUTAGES)


def says_absent(error: FileNotFoundError) -> bool:
    """Return True if a file is absent: over HTTP, fsspec raises the same error if the server failed or was not reached."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return status in (404, 410)
    return cause is None or not (isinstance(cause, (ConnectionError, TimeoutError)) or type(cause).__module__.startswith("aiohttp"))
