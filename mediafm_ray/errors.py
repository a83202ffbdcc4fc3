"""The errors of one title, and which of any error's kinds are outages. Standard library only."""

from __future__ import annotations

import errno

from mediafm_ray.text import PublicError

OUTAGES = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ENETDOWN])


class TitleError(PublicError):
    """A reason, written for a person, why one title cannot be done. It ends that title, never the job."""


class CardError(PublicError):
    """A reason, written for a person, why a card cannot decode one title, which a CPU may."""


class OutageError(PublicError):
    """A reason, written for a person, why one title cannot be done now, and that is no fault of the title's: it costs it no attempt."""


def is_outage(error: BaseException) -> bool:
    """Tell failures of a network, a server, a disk or of missing rights from those of the title at hand."""
    if type(error).__module__.startswith("av."):  # FFmpeg's codes are PyAV's OSErrors, whatever in the media they come from
        return False
    passing = (OutageError, ConnectionError, TimeoutError, PermissionError)
    return isinstance(error, passing) or (isinstance(error, OSError) and error.errno in OUTAGES)


def says_absent(error: FileNotFoundError) -> bool:
    """Tell absence from trouble: fsspec raises the same of HTTP where the server failed or was not reached."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return status in (404, 410)
    return cause is None or not (isinstance(cause, (ConnectionError, TimeoutError)) or type(cause).__module__.startswith("aiohttp"))
