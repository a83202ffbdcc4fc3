"""Errors of a store: tell transient ones, retry them, and explain the others to the user in one line."""

from __future__ import annotations

import email.utils
import errno
import logging
import math
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from botocore import exceptions as boto

from mediafm_ray.errors import OutageError

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5  # upper bound of the pause before the second attempt; it doubles with each further attempt
MAX_PAUSE_S = 20.0

# S3's codes of transient errors, beside every status 429 and 5xx.
TRANSIENT_CODES = frozenset(
    (
        *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests"),
        *("RequestTimeout", "RequestTimeoutException", "InternalError", "ServiceUnavailable", "OperationAborted"),
        *("IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),  # The body was damaged in transit.
    )
)
TRANSIENT_ERRNOS = (errno.EIO, errno.ESTALE, errno.ENETDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH)  # errors of a mounted file system
PERMANENT_STATUS = (501, 505, 507)  # HTTP status: not implemented, version not supported, storage full

WRONG_KEY = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity", "AuthFailure")
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired")
DENIED = ("AccessDenied", "AllAccessDisabled", "AccountProblem", "NotSignedUp", "Forbidden", "403")
WRONG_REGION = ("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301")
FULL = ("QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity", "507")
NOT_AS_EXPECTED = ("PreconditionFailed", "ConditionalRequestConflict", "412")
UNSUPPORTED = ("NotImplemented", "MethodNotAllowed", "501", "405")
NO_CREDENTIALS = (
    *(boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.ProfileNotFound, boto.SSOError, boto.TokenRetrievalError),
    *(boto.UnknownCredentialError, boto.ConfigParseError, boto.LoginError, boto.MetadataRetrievalError),
)

Result = TypeVar("Result")


class StorageError(OutageError):
    """A location that cannot be read or written. The message is one line with the location, the reason and what to do."""


class ReplacedMeanwhile(StorageError):
    """An object that was not replaced, because it is not the expected one any more."""


def retrying(operation: Callable[[], Result], attempts: int, patience_s: float = math.inf) -> Result:
    """Call ``operation`` up to ``attempts`` times while its errors are transient, and begin no attempt after ``patience_s``.

    The pauses have full jitter (uniform from 0 to a bound that doubles: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture
    Blog 2015), so that many workers that met the same fault do not retry together. The last error is raised unchanged.
    """
    begun = time.monotonic()
    for attempt in range(1, attempts):
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
            pause_s = random.uniform(0, min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)))
            if time.monotonic() + pause_s > begun + patience_s:
                raise
            log.info("attempt %d of %d failed, the next in %.1f s: %s: %s", attempt, attempts, pause_s, type(error).__name__, error)
            time.sleep(pause_s)
    return operation()


def is_transient(error: BaseException) -> bool:
    """Return True if the same request may succeed later, because the server or the network failed and not the request itself."""
    answer = _answer(error)
    if answer is not None:
        return _code(answer) in TRANSIENT_CODES or _is_transient_status(_status(answer))
    if isinstance(error, boto.SSLError):
        return "CERTIFICATE" not in str(error).upper()
    if isinstance(error, (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.FlexibleChecksumError)):
        return True
    if type(error).__name__ == "ResponseParserError":  # Overloaded servers and balancers do not always send XML.
        return True
    if isinstance(error, (ConnectionError, TimeoutError)) or (isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS):
        return True
    status = getattr(error, "status", None) or getattr(error, "code", None)  # aiohttp, gcsfs
    if isinstance(status, int):
        return _is_transient_status(status)
    return _is_broken_connection(error)


def _is_transient_status(status: int) -> bool:
    return status == 429 or (status >= 500 and status not in PERMANENT_STATUS)


def code_of(error: BaseException) -> str:
    """Return the code of S3's answer that caused an error, such as NoSuchKey; empty where there was no answer."""
    answer = _answer(error)
    return _code(answer) if answer is not None else ""


def explain(error: BaseException, uri: str, endpoint: str = "", identity: str = "") -> str:
    """Return one line with the location, the reason and what to do. ``identity`` names the credentials that were used."""
    answer = _answer(error)
    if answer is not None:
        return f"{uri}: {_explain_answer(answer, uri, endpoint, identity)}"
    if isinstance(error, (boto.BotoCoreError, RuntimeError)) or type(error).__name__ == "ResponseParserError":
        return f"{uri}: {_explain_client_error(error, endpoint)}"
    if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
        return f"{uri}: {LOCAL_ERRORS[error.errno]} ({_one_line(error)})"
    return f"{uri}: {type(error).__name__}: {_one_line(error)}; check the location and your permissions"


LOCAL_ERRORS = {  # errno -> reason and what to do
    errno.ENOSPC: "the disk is full: free some space or choose another location",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another location",
    errno.EFBIG: "files may not grow that large here: raise the limit (ulimit -f) or choose another location",
    errno.EROFS: "the file system is read-only: choose another location",
    errno.EACCES: "permission denied: choose another location, or run as a user that may use this one",
    errno.EPERM: "permission denied: choose another location, or run as a user that may use this one",
    errno.ENOTDIR: "a part of this path is a file, not a folder: correct the location",
    errno.EEXIST: "a part of this path is a file, not a folder: correct the location",
    errno.EISDIR: "this is a folder where a file is expected: correct the location",
    errno.ENAMETOOLONG: "the file system does not take names that long: choose another location",
    errno.EIO: "the disk reports an error: look into the system's log",
    errno.ESTALE: "the network file system is gone: mount it again",
}


def _explain_answer(answer: Any, uri: str, endpoint: str, identity: str) -> str:
    """Explain why an S3 server refused a request."""
    code, status = _code(answer), _status(answer)
    said = f"the server at {endpoint} says {code}" + (f": {message}" if (message := _message(answer)) else "")
    if code == "NoSuchBucket":
        return f"there is no bucket {uri.partition('://')[2].partition('/')[0]} ({said}): create it, or correct the location"
    if code == "RequestTimeTooSkewed":
        return f"this machine's clock is wrong ({_clocks(answer)}; {said}): set it, for example with 'timedatectl set-ntp true'"
    if code in EXPIRED:
        return f"the credentials{identity} have expired ({said}): renew them (aws sso login, or a new AWS_SESSION_TOKEN)"
    if code in WRONG_KEY:
        return f"the credentials{identity} are wrong ({said}): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile"
    if code in DENIED:
        return (
            f"permission denied to the credentials{identity} ({said}): they need s3:ListBucket on the bucket, s3:GetObject to read, "
            "and s3:PutObject and s3:DeleteObject to write"
        )
    if code in WRONG_REGION:
        return f"the bucket is in another region ({said}): set AWS_DEFAULT_REGION to it"
    if code in FULL or status == 507:
        return f"the store is full ({said}): free some space, raise the quota, or choose another location"
    if code in UNSUPPORTED:
        return f"the server does not offer what is needed ({said}): is storage.endpoint_url that of an S3 service?"
    if status == 429 or status >= 500 or code in TRANSIENT_CODES:
        return f"the server is overloaded or failing ({status}, {said}), also after every retry: run the same command again later"
    return f"refused ({status}, {said}): correct the location or the storage.* options"


def _explain_client_error(error: BaseException, endpoint: str) -> str:
    """Explain why no answer came, or why no request could be sent."""
    reason = _one_line(error)
    if isinstance(error, boto.NoCredentialsError):
        return "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give this machine a role"
    if isinstance(error, RuntimeError):  # botocore: a process or a role renewed the credentials, and they have expired already.
        return f"the credentials cannot be used ({reason}): renew them"
    if isinstance(error, NO_CREDENTIALS):
        return f"the credentials cannot be loaded ({reason}): check AWS_PROFILE and the files in ~/.aws, or log in again"
    if isinstance(error, boto.SSLError):
        return f"no secure connection to {endpoint} ({reason}): check storage.endpoint_url, or set AWS_CA_BUNDLE to its authority"
    if isinstance(error, boto.ProxyConnectionError):
        return f"the HTTP proxy cannot be reached ({reason}): check HTTPS_PROXY and NO_PROXY"
    if isinstance(error, (boto.ConnectTimeoutError, boto.ReadTimeoutError)):
        return f"{endpoint} does not answer ({reason}): check storage.endpoint_url, the network and its firewalls"
    if isinstance(error, (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)):
        cause = error.kwargs.get("error") if isinstance(error, boto.BotoCoreError) else None
        reason = _one_line(cause).rpartition(": ")[2] if isinstance(cause, Exception) else reason
        return f"cannot connect to {endpoint} ({reason}): check storage.endpoint_url, and that the server runs"
    if type(error).__name__ == "ResponseParserError":
        return f"the server at {endpoint} is not an S3 server ({reason}): check storage.endpoint_url"
    return f"{type(error).__name__}: {reason}; check the location and the storage.* options"


def _clocks(answer: Any) -> str:
    """Return this machine's time and the server's, from the answer's Date header."""
    ours = datetime.now(UTC)
    stated = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        theirs = f"{email.utils.parsedate_to_datetime(stated):%H:%M:%S} there"
    except (TypeError, ValueError):  # The header is missing or malformed.
        theirs = "another there"
    return f"{ours:%Y-%m-%d %H:%M:%S} UTC here, {theirs}"


def _answer(error: BaseException | None) -> Any:
    """Return S3's answer that caused an error, also where s3fs raised another error from it."""
    while error is not None:
        if isinstance(error, boto.ClientError):
            return error.response
        error = error.__cause__
    return None


def _code(answer: Any) -> str:
    return str(answer.get("Error", {}).get("Code", ""))


def _status(answer: Any) -> int:
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def _message(answer: Any) -> str:
    return " ".join(str(answer.get("Error", {}).get("Message", "")).split())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or repr(error)


def _is_broken_connection(error: BaseException) -> bool:
    """Return True if aiohttp, which fsspec's file systems use, lost a connection or a part of a body."""
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("aiohttp")}
    return bool(names & {"ClientConnectionError", "ClientPayloadError"})
