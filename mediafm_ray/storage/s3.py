"""Objects in an S3 bucket, through botocore: requests are retried while their errors are transient, and listings are paged.

Writes are atomic: a PUT is, larger objects are uploaded in parts that become visible with the last request, and an upload that fails is
aborted. An upload that a killed process left open is aborted by a later run (``remove_partial``), or by the bucket's lifecycle rule
AbortIncompleteMultipartUpload.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar
from xml.sax.saxutils import unescape

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.utils import parse_timestamp

from mediafm_ray.storage.base import ObjectInfo, StorageConfig, Unknown
from mediafm_ray.storage.errors import (
    DENIED,
    NOT_AS_EXPECTED,
    UNSUPPORTED,
    ReplacedMeanwhile,
    StorageError,
    code_of,
    explain,
    retrying,
)

log = logging.getLogger(__name__)

MB = 1 << 20
PAGE_KEYS = 1000  # objects in the answer to one listing request: S3's own limit
THREADS = 16  # parallel requests of a look-up of many objects
MIN_KEYS_PER_THREAD = 100
MAX_SINGLE_LOOKUPS = 2  # So few objects are looked up one by one.
# The first requests to a server fail within 30 s if the address is wrong, but are retried if the server fails now and then.
CHECK_CONNECT_S, CHECK_READ_S, CHECK_PATIENCE_S = 5.0, 7.0, 10.0
ABANDONED_AFTER_S = 24 * 3600  # An upload that began so long ago has no writer any more.
UPLOAD_ATTEMPTS = 3  # attempts at an upload that another process aborts
MISSING = ("NoSuchKey", "NoSuchVersion", "404")
FIELDS = re.compile(r"<(Key|LastModified|ETag|Size)>([^<]*)</\1>")  # Of an object in the answer to ListObjectsV2.
QUOTES = {"&quot;": '"', "&#34;": '"', "&apos;": "'", "&#39;": "'"}
MIN_FIELDS = 3  # A server may leave out the ETag.
UNUSUAL = re.compile("<!|&#|\ufffd")  # Comments, literal text, other numbers of characters, bytes that are not UTF-8.


def s3_config_options(config: StorageConfig) -> dict[str, Any]:
    """Return the arguments of botocore's Config, which are also s3fs's ``config_kwargs``: the same for every client.

    Checksums are sent only where S3 demands them: older servers refuse the trailing ones that botocore sends by default.
    """
    endpoint = config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    style = ("path" if endpoint else "auto") if config.addressing == "auto" else config.addressing
    return {
        "connect_timeout": config.connect_timeout_s,
        "read_timeout": config.read_timeout_s,
        "retries": {"total_max_attempts": config.retries, "mode": "standard"},
        "s3": {"addressing_style": style},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }


def with_short_timeouts(config: StorageConfig) -> StorageConfig:
    """Return a configuration for the first requests to a server: a wrong address fails soon."""
    timeouts = {
        "connect_timeout_s": min(config.connect_timeout_s, CHECK_CONNECT_S),
        "read_timeout_s": min(config.read_timeout_s, CHECK_READ_S),
    }
    return FirstContactConfig(**{**vars(config), **timeouts})


@dataclass(frozen=True)
class FirstContactConfig(StorageConfig):
    """A configuration with which every attempt begins within seconds."""

    patience_s: ClassVar[float] = CHECK_PATIENCE_S


class S3Objects:
    """The objects below one ``s3://`` URI. It holds no connection, so that it can be pickled."""

    def __init__(self, uri: str, config: StorageConfig):
        self.uri, self.config = uri, config
        self.bucket, _, key = uri.partition("://")[2].partition("/")
        self.prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object below ``prefix``, with one request for each PAGE_KEYS objects."""
        top = self.prefix + prefix.strip("/")
        for page in self._pages(Prefix=f"{top.rstrip('/')}/" if top else ""):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # Some consoles write such a marker of an empty folder.
                    yield self._info(entry["Key"].removeprefix(self.prefix), entry)

    def children(self) -> tuple[Sequence[str], Mapping[str, ObjectInfo]]:
        """Return the folders and the objects directly below the URI."""
        pages = [*self._pages(Prefix=self.prefix, Delimiter="/")]
        folders = [entry["Prefix"].removeprefix(self.prefix).rstrip("/") for page in pages for entry in page.get("CommonPrefixes", ())]
        entries = {entry["Key"].removeprefix(self.prefix): entry for page in pages for entry in page.get("Contents", ())}
        return folders, {name: self._info(name, entry) for name, entry in entries.items() if name and not name.endswith("/")}

    def info(self, name: str) -> ObjectInfo | None:
        """Look up one object; None where it does not exist."""
        try:
            answer = self._request("head_object", Key=self.prefix + name)
        except FileNotFoundError:
            return None
        return self._info(name, {**answer, "Size": answer["ContentLength"]})

    def find(self, names: Sequence[str]) -> Mapping[str, ObjectInfo | Unknown]:
        """Look up objects with listings that jump from one name to the next, which never needs more requests than names.

        Objects that do not exist are left out. Without permission to list the bucket, every object is looked up with a request of its own,
        and one for which that is refused is Unknown. Raises StorageError where it is refused for all of them.
        """
        wanted = sorted(set(names))
        if len(wanted) <= MAX_SINGLE_LOOKUPS:
            return self._find_singly(wanted)
        size = max(MIN_KEYS_PER_THREAD, -(-len(wanted) // THREADS))
        parts = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                return {name: info for found in pool.map(self._find_listed, parts) for name, info in found.items()}
        except StorageError as error:
            if code_of(error) not in DENIED:
                raise
            log.warning("%s may not be listed: %d objects are looked up one by one", self.uri, len(wanted))
            return self._find_singly(wanted)

    def _find_listed(self, wanted: Sequence[str]) -> dict[str, ObjectInfo]:
        """Look up sorted names in a listing, whose keys are in the order of their UTF-8 bytes, which is that of Python's strings."""
        prefix = self.prefix + _common_folder(wanted[0], wanted[-1])
        found: dict[str, ObjectInfo] = {}
        position, last = 0, prefix
        token: dict[str, str] = {}
        jumps = True  # Some servers ignore StartAfter: then every page is read.
        while position < len(wanted):
            start = max(last, self.prefix + wanted[position][:-1])  # a prefix, which sorts shortly before the name itself
            page = self._request("list_objects_v2", Prefix=prefix, MaxKeys=PAGE_KEYS, **(token or {"StartAfter": start}))
            contents, more = page.get("Contents", ()), page.get("IsTruncated", False)
            jumps = jumps and (bool(token) or not contents or contents[0]["Key"] > start)
            token = {"ContinuationToken": page["NextContinuationToken"]} if more and not (contents and jumps) else {}  # It may be empty.
            last = contents[-1]["Key"] if contents else last
            entries = {entry["Key"].removeprefix(self.prefix): entry for entry in contents}
            while position < len(wanted) and (not more or self.prefix + wanted[position] <= last):
                if entry := entries.get(wanted[position]):
                    found[wanted[position]] = self._info(wanted[position], entry)
                position += 1
        return found

    def _find_singly(self, names: Sequence[str]) -> Mapping[str, ObjectInfo | Unknown]:
        denials: list[StorageError] = []

        def look(name: str) -> ObjectInfo | Unknown | None:
            try:
                return self.info(name)
            except StorageError as error:
                if code_of(error) not in DENIED:
                    raise
            try:
                if answer := self._first_byte(name):
                    return self._info(name, {**answer, "Size": answer["ContentRange"].rpartition("/")[2]})
                return ObjectInfo(name, 0, "", 0.0)
            except FileNotFoundError:
                return None
            except StorageError as error:
                if code_of(error) not in DENIED:
                    raise
                log.warning("%s", error)
                denials.append(error)
                return Unknown(str(error), is_transient=False)

        with ThreadPoolExecutor(THREADS) as pool:
            found = {name: info for name, info in zip(names, pool.map(look, names), strict=True) if info}
        if denials and len(denials) == len(names):
            raise denials[0]
        return found

    def copy(self, name: str, path: str) -> None:
        """Copy an object to a local file; a truncated answer is retried. Raises FileNotFoundError."""
        key = self.prefix + name

        def get() -> None:
            answer = _client(self.config).get_object(Bucket=self.bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body, open(path, "wb") as stream:
                for part in body.iter_chunks(MB):  # raises where the length is wrong
                    stream.write(part)

        self._retried(get, key)

    def read(self, name: str) -> bytes:
        """Read a whole object; a truncated answer is retried. Raises FileNotFoundError."""
        key = self.prefix + name

        def get() -> bytes:
            answer = _client(self.config).get_object(Bucket=self.bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body:
                return body.read()  # raises where the length is wrong

        return self._retried(get, key)

    def write(self, name: str, content: bytes | memoryview, condition: Mapping[str, str] | None = None) -> None:
        """Write an object atomically, in parts if it is large. ``condition``: arguments of the request that makes it visible."""
        key = self.prefix + name
        if len(content) <= self.config.part_mb * MB:
            self._request("put_object", Key=key, Body=bytes(content), **(condition or {}))
        else:
            self._write_in_parts(key, content, UPLOAD_ATTEMPTS, condition or {})

    def replace(self, name: str, content: memoryview, expected: ObjectInfo | None) -> None:
        """Write an object in the place of the expected one, None: of none. A server without conditional writes replaces any."""
        condition = {"IfMatch": f'"{expected.version}"'} if expected else {"IfNoneMatch": "*"}
        try:
            self.write(name, content, condition)
        except StorageError as error:
            if code_of(error) in UNSUPPORTED:
                self.write(name, content)
            elif code_of(error) not in NOT_AS_EXPECTED:
                raise
            elif content != self.read(name):  # A first attempt, whose answer was lost, may have written it.
                raise ReplacedMeanwhile(f"{self.uri}/{name} was replaced by another process: run the same command again") from error

    def _write_in_parts(self, key: str, content: bytes | memoryview, attempts: int, condition: Mapping[str, str]) -> None:
        upload = self._begin_upload(key)
        try:
            size = self.config.part_mb * MB
            parts = []
            for number, start in enumerate(range(0, len(content), size), start=1):
                part = content[start : start + size]
                answer = self._request("upload_part", Key=key, UploadId=upload, PartNumber=number, Body=bytes(part))
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            self._complete_upload(key, upload, parts, content, condition)
        except BaseException as error:
            self._abort_upload(key, upload)
            if code_of(error) != "NoSuchUpload" or attempts == 1:
                raise
            self._write_in_parts(key, content, attempts - 1, condition)  # Another writer of the same title took this upload for a leftover.

    def _begin_upload(self, key: str) -> str:
        """Begin an upload; return its id. Abort the uploads of earlier attempts, whose answers with their ids were lost."""
        attempts = 0

        def begin() -> str:
            nonlocal attempts
            attempts += 1
            return _client(self.config).create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]

        upload = self._retried(begin, key)
        if attempts > 1:
            try:
                for other in self._uploads(key):
                    if other["Key"] == key and other["UploadId"] != upload:
                        self._abort_upload(key, other["UploadId"])
            except StorageError as error:  # Listing uploads needs a permission of its own, and not every server offers it.
                log.warning("an unfinished upload of %s may be left in %s: %s", key, self.bucket, error)
        return upload

    def _complete_upload(
        self, key: str, upload: str, parts: Sequence[Mapping[str, Any]], content: bytes | memoryview, condition: Mapping[str, str]
    ) -> None:
        try:
            self._request("complete_multipart_upload", Key=key, UploadId=upload, MultipartUpload={"Parts": parts}, **condition)
        except (StorageError, FileNotFoundError):
            # The first attempt may have succeeded although its answer was lost. Servers answer the second differently: read the object.
            try:
                is_written = content == self.read(key.removeprefix(self.prefix))
            except (StorageError, FileNotFoundError):
                is_written = False
            if not is_written:
                raise

    def _abort_upload(self, key: str, upload: str) -> None:
        try:
            self._request("abort_multipart_upload", Key=key, UploadId=upload)
        except StorageError as error:
            if code_of(error) != "NoSuchUpload":  # The upload is completed or gone.
                log.warning("an unfinished upload of %s is left in %s: %s", key, self.bucket, error)

    def _uploads(self, prefix: str) -> Iterator[Mapping[str, Any]]:
        """List the unfinished multipart uploads below a key prefix."""
        marks: dict[str, Any] = {}
        while True:
            page = self._request("list_multipart_uploads", Prefix=prefix, **marks)
            yield from page.get("Uploads", ())
            following = {"KeyMarker": page.get("NextKeyMarker"), "UploadIdMarker": page.get("NextUploadIdMarker")}
            if not page.get("IsTruncated") or not all(following.values()) or following == marks:
                return
            marks = following

    def delete(self, name: str) -> None:
        """Remove an object; a missing one is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._request("delete_object", Key=self.prefix + name)

    def delete_all(self, names: Sequence[str]) -> None:
        """Remove objects, PAGE_KEYS with a request; one by one where the server refuses that."""
        for start in range(0, len(names), PAGE_KEYS):
            part = names[start : start + PAGE_KEYS]
            objects = [{"Key": self.prefix + name} for name in part]
            try:
                answer = self._request("delete_objects", Delete={"Objects": objects, "Quiet": True})
                refused = [entry["Key"].removeprefix(self.prefix) for entry in answer.get("Errors", ())]
            except StorageError as error:
                log.info("%d objects are removed one by one: %s", len(part), error)
                refused = [*part]
            for name in refused:
                self.delete(name)

    def check_readable(self, name: str = "") -> bool:
        """Return True if there is such an object or, without a name, anything below the URI. Raises StorageError within seconds."""
        quick = S3Objects(self.uri, with_short_timeouts(self.config))
        if not name:
            return bool(quick._request("list_objects_v2", Prefix=self.prefix, MaxKeys=1).get("Contents"))
        try:
            quick._first_byte(name)
        except FileNotFoundError:
            return False
        return True

    def _first_byte(self, name: str) -> Mapping[str, Any]:
        """Request the first byte of an object, because a HEAD would be refused without a reason. An empty object gives an empty answer.

        Raises FileNotFoundError, StorageError.
        """
        try:
            answer = self._request("get_object", Key=self.prefix + name, Range="bytes=0-0")
        except StorageError as error:
            if code_of(error) != "InvalidRange":
                raise
            return {}
        answer["Body"].close()
        return answer

    def check_writable(self, name: str) -> None:
        """Write and remove an object. Raises StorageError within seconds where that is not possible."""
        quick = S3Objects(self.uri, with_short_timeouts(self.config))
        quick.write(name, b"probe")
        quick.delete(name)

    def remove_partial(self) -> int:
        """Abort the uploads that killed writers left a day ago or earlier; those that are being written stay. Return how many."""
        removed = 0
        try:
            for upload in self._uploads(self.prefix):
                if time.time() - upload["Initiated"].timestamp() > ABANDONED_AFTER_S:
                    self._abort_upload(upload["Key"], upload["UploadId"])
                    removed += 1
        except StorageError as error:  # Listing uploads needs a permission of its own, and the job does not depend on it.
            log.info("unfinished uploads of killed runs cannot be listed: %s", error)
        return removed

    def _pages(self, **parameters: Any) -> Iterator[Mapping[str, Any]]:
        token: dict[str, str] = {}
        while True:
            page = self._request("list_objects_v2", MaxKeys=PAGE_KEYS, **parameters, **token)
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _request(self, operation: str, **parameters: Any) -> Any:
        """Send one request. Raises FileNotFoundError for a missing key, StorageError for every other error."""
        return self._retried(lambda: getattr(_client(self.config), operation)(Bucket=self.bucket, **parameters), parameters.get("Key", ""))

    def _retried(self, request: Callable[[], Any], key: str) -> Any:
        try:
            return retrying(request, self.config.retries, self.config.patience_s)
        except Exception as error:
            if key and code_of(error) in MISSING:
                raise FileNotFoundError(f"s3://{self.bucket}/{key}") from error
            where = f"s3://{self.bucket}/{key}" if key else self.uri
            raise StorageError(explain(error, where, self.config.endpoint_url or "AWS", identity())) from error

    @staticmethod
    def _info(name: str, entry: Mapping[str, Any]) -> ObjectInfo:
        modified = entry["LastModified"].timestamp()
        return ObjectInfo(name, int(entry["Size"]), str(entry.get("ETag") or modified).strip('"'), modified)


def _common_folder(first: str, last: str) -> str:
    """Return the longest common prefix of two names that ends in '/'."""
    folder = first[: first.rfind("/") + 1]
    while not last.startswith(folder):
        folder = folder[: folder.rfind("/", 0, -1) + 1]
    return folder


def identity() -> str:
    """Describe the credentials of the standard chain for messages: their origin and the end of the access key's id."""
    try:
        credentials = botocore.session.Session().get_credentials()
        return f" ({credentials.method}, access key ...{credentials.access_key[-4:]})" if credentials else ""
    except (BotoCoreError, RuntimeError):  # They cannot be loaded, which the explained error says.
        return ""


@functools.cache
def _client(config: StorageConfig) -> Any:
    """Return botocore's client, one for each process and configuration, which threads share. Its own retries are off: see ``retrying``."""
    options = s3_config_options(config) | {"retries": {"total_max_attempts": 1, "mode": "standard"}, "max_pool_connections": 2 * THREADS}
    session = botocore.session.Session()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    client = session.create_client("s3", endpoint_url=config.endpoint_url or None, config=Config(**options))
    # By this name it comes before botocore's own for before-parse.s3.*, which parses the whole body to see whether it is an error.
    client.meta.events.register("before-parse.*.ListObjectsV2", _parse_contents)
    return client


def _parse_contents(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Parse the objects of a page of a listing, which takes botocore some twenty times as long; leave it the rest, and every other answer.

    A page that is cut short, or has comments or references to characters that servers seldom write, is left to botocore as it is.
    """
    text = response_dict["body"].decode(errors="replace")
    for reference, quote in QUOTES.items():
        text = text.replace(reference, quote)
    if UNUSUAL.search(text):
        return
    rest, *parts = text.split("<Contents>")
    entries = []
    for part in parts:
        content, end, more = part.partition("</Contents>")
        entry: dict[str, Any] = {name: unescape(value) if "&" in value else value for name, value in FIELDS.findall(content)}
        if not end or len(entry) < MIN_FIELDS:
            return
        entry["Size"], entry["LastModified"] = int(entry["Size"]), _timestamp(entry["LastModified"])
        entries.append(entry)
        rest += more
    if entries:
        customized_response_dict["Contents"] = entries
        response_dict["body"] = rest.encode()


def _timestamp(value: Any) -> datetime:
    """Parse the time of a listed object. botocore's own parser takes most of the time of a listing; it parses the other formats."""
    try:
        parsed = datetime.fromisoformat(value)
    except (TypeError, ValueError):  # a header's format, or a number
        return parse_timestamp(value)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
