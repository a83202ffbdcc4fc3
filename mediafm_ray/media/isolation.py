"""Reading in a separate process: a crash, a hang or a memory bomb ends one title, never the job."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mediafm_ray.errors import CardError, OutageError, TitleError
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.media.source import file_name
from mediafm_ray.media.spool import Spool
from mediafm_ray.media.wire import Channel, DeadlineExceeded, PeerClosed, WireError
from mediafm_ray.spec import DETECTOR_HEIGHT, DETECTOR_WIDTH, SAMPLE_RATE, ShotMedia, ShotSpan, ShotStream, Title, TitleMedia
from mediafm_ray.text import PublicError

Result = TypeVar("Result")

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
BYTES_PER_SAMPLE = 2
MAX_LEAD_S = 120.0  # maximum duration of the last picture, and rounding
FSSPEC_PREFIX = "FSSPEC_"  # prefix of fsspec's own configuration

# Environment variables of the child; hostile media must not be able to read any other. Processes need the first group, the network
# the second, and object stores the others: those that botocore, gcsfs and adlfs read.
PASSED_ON = frozenset(
    """
    PATH HOME USER LOGNAME LANG LANGUAGE LC_ALL LC_CTYPE LC_MESSAGES TZ TMPDIR TEMP TMP LD_LIBRARY_PATH VIRTUAL_ENV XDG_CACHE_HOME
    XDG_CONFIG_HOME PYTHONHOME PYTHONUSERBASE PYTHONNOUSERSITE PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX PYTHONHASHSEED PYTHONUTF8
    OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER

    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE
    CURL_CA_BUNDLE

    AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_SECURITY_TOKEN AWS_CREDENTIAL_EXPIRATION AWS_PROFILE
    AWS_DEFAULT_PROFILE AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE AWS_REGION AWS_DEFAULT_REGION AWS_ROLE_ARN AWS_ROLE_SESSION_NAME
    AWS_WEB_IDENTITY_TOKEN_FILE AWS_CONTAINER_CREDENTIALS_RELATIVE_URI AWS_CONTAINER_CREDENTIALS_FULL_URI
    AWS_CONTAINER_AUTHORIZATION_TOKEN AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE AWS_EC2_METADATA_DISABLED
    AWS_EC2_METADATA_SERVICE_ENDPOINT AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE AWS_EC2_METADATA_V1_DISABLED AWS_METADATA_SERVICE_TIMEOUT
    AWS_METADATA_SERVICE_NUM_ATTEMPTS AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 AWS_ENDPOINT_URL_STS AWS_IGNORE_CONFIGURED_ENDPOINT_URLS
    AWS_CA_BUNDLE AWS_MAX_ATTEMPTS AWS_RETRY_MODE AWS_DEFAULTS_MODE AWS_STS_REGIONAL_ENDPOINTS AWS_USE_FIPS_ENDPOINT
    AWS_USE_DUALSTACK_ENDPOINT AWS_S3_US_EAST_1_REGIONAL_ENDPOINT AWS_REQUEST_CHECKSUM_CALCULATION AWS_RESPONSE_CHECKSUM_VALIDATION
    BOTO_CONFIG

    GOOGLE_APPLICATION_CREDENTIALS GOOGLE_CLOUD_PROJECT GCLOUD_PROJECT GOOGLE_CLOUD_QUOTA_PROJECT GCSFS_DEFAULT_PROJECT
    STORAGE_EMULATOR_HOST GCE_METADATA_HOST GCE_METADATA_IP CLOUDSDK_CONFIG NO_GCE_CHECK

    AZURE_STORAGE_ACCOUNT_NAME AZURE_STORAGE_ACCOUNT_KEY AZURE_STORAGE_CONNECTION_STRING AZURE_STORAGE_SAS_TOKEN
    AZURE_STORAGE_CLIENT_ID AZURE_STORAGE_CLIENT_SECRET AZURE_STORAGE_TENANT_ID AZURE_STORAGE_ANON AZURE_CLIENT_ID
    AZURE_CLIENT_SECRET AZURE_TENANT_ID AZURE_CLIENT_CERTIFICATE_PATH AZURE_FEDERATED_TOKEN_FILE AZURE_AUTHORITY_HOST AZURE_CONFIG_DIR
    IDENTITY_ENDPOINT IDENTITY_HEADER MSI_ENDPOINT MSI_SECRET
    """.split()  # noqa: SIM905 (a list of names is easier to read)
)


class IsolatedReader:
    """Reads titles one after another in a child process, and replaces that process when it fails.

    The child decodes; the detector runs here. The child decodes up to reader.READ_AHEAD_BLOCKS blocks ahead of the detector.
    """

    def __init__(self, frames: FramesConfig, timed_text: TimedTextConfig, media: MediaConfig, sample_rate: int = SAMPLE_RATE):
        """``sample_rate``: of the sound of the titles."""
        self.frames, self.timed_text, self.media, self.sample_rate = frames, timed_text, media, sample_rate
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the reader)
        fcntl.fcntl(self.log, fcntl.F_SETFL, os.O_RDWR | os.O_APPEND)  # the child truncates it now and then

    def read(self, title: Title, detector: ShotStream, not_on_card: str = "") -> TitleMedia:
        """Return all that the encoders need of one title.

        Raises TitleError when the title cannot be read, is too damaged, exceeds a limit of ``media`` or makes no progress.
        Errors of ``detector`` pass through; the child is replaced then as well.

        Where ``media.decoder`` allows a card, raises CardError when the card fails after it has begun: read the title again with a new
        detector stream and that error as ``not_on_card``, and the CPU decodes it.
        """
        may_retry = self.media.decoder != "cpu" and not not_on_card
        return self._guarded(title, lambda: self._converse(title, detector, not_on_card), CardError if may_retry else TitleError)

    def texts(self, title: Title) -> list[str]:
        """Return the texts of the cues of the sidecar that would be used; empty where none can be read. The video is not opened.

        Raises what ``read`` raises.
        """
        return self._guarded(title, lambda: self._ask_for_texts(title))

    def _guarded(self, title: Title, exchange: Callable[[], Result], at_death: type[PublicError] = TitleError) -> Result:
        """Return the result of an exchange with the child about a title; replace the child where that fails.

        ``at_death`` is raised where the child hangs or ends.
        """
        self.start()
        finished = False
        try:
            result = exchange()
            finished = True
            return result
        except _Refused as error:  # the child goes on, only the title has failed
            finished = True
            raise error.kind(str(error)) from None
        except TimeoutError:
            raise at_death(
                f"{file_name(title.video)}: reading made no progress for {self.media.no_progress_timeout_s:g} s and was stopped"
            ) from None
        except DeadlineExceeded:
            raise TitleError(
                f"{file_name(title.video)} could not be read and cut into shots within media.max_processing_s="
                f"{self.media.max_processing_s:g} s and was stopped"
            ) from None
        except PeerClosed:
            raise at_death(f"{file_name(title.video)}: {self._cause_of_death()}") from None
        except WireError as error:
            raise TitleError(f"{file_name(title.video)}: the reading process sent something that is not understood ({error})") from None
        finally:
            if not finished:
                self._stop()

    def close(self) -> None:
        """End the child process."""
        self._stop()
        self.log.close()

    def _ask(self, kind: str, title: Title, not_on_card: str = "") -> Channel:
        assert self.channel is not None
        self.channel.deadline = time.monotonic() + self.media.max_processing_s
        self.channel.send(
            kind,
            {
                "title": asdict(title),
                "frames": asdict(self.frames),
                "timed_text": asdict(self.timed_text),
                "media": asdict(self.media),
                "not_on_card": not_on_card,
                "sample_rate": self.sample_rate,
            },
        )
        return self.channel

    def _ask_for_texts(self, title: Title) -> list[str]:
        channel = self._ask("texts", title)
        while True:
            header, parts = channel.receive()
            if header["kind"] == "end":
                try:
                    return parts[0].decode().split("\n") if parts else []
                except ValueError as error:
                    raise WireError("texts are not UTF-8") from error
            if header["kind"] == "error":
                raise _Refused(header)
            if header["kind"] != "alive":
                raise WireError(f"unknown message {header['kind']}")

    def _converse(self, title: Title, detector: ShotStream, not_on_card: str) -> TitleMedia:
        channel = self._ask("read", title, not_on_card)
        assembly = _Assembly(self.media.max_hours, self.sample_rate)
        name, frame_count = file_name(title.video), 0
        while True:
            header, parts = channel.receive()
            kind = header["kind"]
            try:
                if kind == "pictures":
                    frames_THWC = np.frombuffer(parts[0], np.uint8).reshape(-1, DETECTOR_HEIGHT, DETECTOR_WIDTH, 3)
                elif kind == "sound":
                    assembly.sound(parts[0])
                elif kind == "shot":
                    if len(assembly.shots) == self.media.max_shots:
                        raise TitleError(f"{name} has more than {self.media.max_shots} shots (media.max_shots)")
                    assembly.shot(_span(header["span"]), float(header["start_s"]), float(header["end_s"]), parts[1:], parts[0])
                elif kind == "end":
                    return assembly.finish(header)
                elif kind == "error":
                    raise _Refused(header)
                elif kind not in ("no more pictures", "alive"):
                    raise WireError(f"unknown message {kind}")
            except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
                raise WireError(f"a message of kind {kind} is not well formed") from error
            if kind == "pictures":
                frame_count += len(frames_THWC)
                if frame_count > self.media.max_frames:
                    raise TitleError(f"{name} has more than {self.media.max_frames} pictures (media.max_frames)")
                self._reply(detector.push(frames_THWC))
            elif kind == "no more pictures":
                self._reply(detector.finish())

    def _reply(self, spans: list[ShotSpan]) -> None:
        assert self.channel is not None
        self.channel.send("spans", {"spans": [asdict(span) for span in spans]})

    def start(self) -> None:
        """Start the child process if it does not run. ``read`` calls this, too."""
        if self.process is not None and self.process.poll() is None:
            return
        self._stop()
        ours, theirs = socket.socketpair()
        ours.settimeout(self.media.no_progress_timeout_s)
        self.log.seek(0)
        self.log.truncate()
        passed_on = PASSED_ON.union(self.media.environment)
        memory_limit = str(self.media.memory_limit_gb)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mediafm_ray.media.child", str(theirs.fileno()), str(os.getpid()), memory_limit, self.media.decoder],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.log,
                pass_fds=[theirs.fileno()],
                env={
                    **{name: value for name, value in os.environ.items() if name in passed_on or name.startswith(FSSPEC_PREFIX)},
                    "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")])),
                    "MALLOC_ARENA_MAX": "2",  # an arena for each thread would use up the limited address space
                },
            )
        self.channel = Channel(ours)

    def _stop(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _cause_of_death(self) -> str:
        assert self.process is not None
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "the reading process closed the connection and was stopped"
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        last = f" ({lines[-1]})" if lines else ""
        if code < 0:
            return f"the reading process was killed by {signal.Signals(-code).name} while decoding it{last}"
        return f"the reading process ended with exit code {code} while decoding it{last}"


class _Refused(Exception):
    """The child's reason why it cannot read the title, and the class of error for it."""

    def __init__(self, header: dict[str, Any]):
        super().__init__(_text(header.get("reason", "")))
        kinds: list[tuple[str, type[PublicError]]] = [("outage", OutageError), ("card", CardError)]
        self.kind = next((kind for name, kind in kinds if header.get(name) is True), TitleError)


def _text(value: Any) -> str:
    """Return a string of the child in a form that can be stored. Raises ValueError where it is not a string."""
    if not isinstance(value, str):
        raise ValueError(f"a text is {type(value).__name__}")
    return value.encode(errors="replace").decode()  # a file name may hold an incomplete character


def _span(fields: dict[str, Any]) -> ShotSpan:
    """Return a span of the child. Raises ValueError or TypeError where it is not valid."""
    span = ShotSpan(**fields)
    for name, value in asdict(span).items():
        if name == "boundary_kind":
            _text(value)
        elif name == "boundary_probability":
            if not 0 <= float(value) <= 1:
                raise ValueError(f"a probability is {value}")
        elif type(value) is not int or not 0 <= value < 1 << 62:
            raise ValueError(f"{name} is {value!r}")
    return span


class _Assembly:
    """Collects shots and sound, which arrive in no fixed order; frames and sound are not held in memory.

    Raises ValueError for input of the child that would cost disk or memory without limit, or that could not be stored.
    """

    def __init__(self, max_hours: float, sample_rate: int) -> None:
        self.max_s = 2 * max_hours * 3600 + MAX_LEAD_S  # sound may begin long before the first picture
        self.sample_rate = sample_rate
        self.shots: list[ShotMedia] = []
        self.frames, self.samples = Spool(), Spool()
        self.frame_offsets = [0]

    def sound(self, samples: bytes) -> None:
        self.samples.append(samples)
        if self.samples.size > self.max_s * self.sample_rate * BYTES_PER_SAMPLE:
            raise ValueError("too much sound")

    def shot(self, span: ShotSpan, start_s: float, end_s: float, frames: list[bytes], thumbnail: bytes) -> None:
        before_s, before = (self.shots[-1].end_s, self.shots[-1].span.end_frame) if self.shots else (0.0, 0)
        if not before_s <= start_s <= end_s <= self.max_s or not before <= span.start_frame < span.end_frame:
            raise ValueError("shots do not follow each other")
        for frame in frames:
            self.frames.append(frame)
            self.frame_offsets.append(self.frames.size)
        self.shots.append(ShotMedia(span, start_s, end_s, range(len(frames)), b"", thumbnail=thumbnail))  # type: ignore[arg-type]

    def finish(self, header: dict[str, Any]) -> TitleMedia:
        """Cut the sound at the shots, which tile the title; where the sound has ended, silence fills the rest."""
        texts, languages, warnings = ([_text(text) for text in header[name]] for name in ("texts", "languages", "warnings"))
        duration_s, frame_count, facts = float(header["duration_s"]), int(header["frame_count"]), dict(header["facts"])
        if not 0 <= duration_s <= self.max_s:
            raise ValueError("the duration is not finite or too long")
        json.dumps([frame_count, facts], allow_nan=False, ensure_ascii=False).encode()  # raises for values that could not be stored
        ends = [round(shot.end_s * self.sample_rate) * BYTES_PER_SAMPLE if header["has_sound"] else 0 for shot in self.shots]
        self.samples.fill(ends[-1] if ends else 0)
        frames, audio = self.frames.packed(self.frame_offsets), self.samples.packed([0, *ends])
        first = 0
        for index, (shot, text, language) in enumerate(zip(self.shots, texts, languages, strict=True)):
            shot.frames = [frames[first + number] for number in range(len(shot.frames))]
            first += len(shot.frames)
            shot.audio, shot.text, shot.language = audio[index], text, language
        return TitleMedia(self.shots, frames, audio, duration_s, frame_count, warnings, facts)
