"""The command line that the jobs share: ``--config a.yaml [b.yaml ...] key=value ...``, --help, and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from mediafm_ray.config.loader import ConfigError, describe, read_config
from mediafm_ray.extras import MissingExtra
from mediafm_ray.models.weights import WeightsError
from mediafm_ray.runs.report import clean_logs, reason_of
from mediafm_ray.storage.catalog import CatalogError
from mediafm_ray.storage.dataset import DatasetError
from mediafm_ray.storage.lease import release_all
from mediafm_ray.storage.store import StorageError
from mediafm_ray.text import public_lines

EXIT_OK = 0
EXIT_FAILED_TITLES = 1
EXIT_BAD_INPUT = 2  # The configuration, catalog, weights or output are at fault, and nothing was started.
EXIT_ABORTED = 3  # The run ended before its titles did: an actor, the cluster or the program itself failed.
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
TERMINATED = "ended by SIGTERM: every committed title stays; run the same command again to do the rest"
GRACE_S = 3.0  # Time for leaving blocks after a signal; schedulers kill after 10 to 30 s.
DEBUG_VARIABLE = "MEDIAFM_DEBUG"  # Environment variable that sends tracebacks of unexpected errors to the terminal.
BEGUN = "the job had begun to change something"  # A note on an error.
MAX_REASON = 1000  # Characters of an unexpected error in its line.
Job = TypeVar("Job")


def run_job(description: str, kind: type[Job], job: Callable[[Job], int], arguments: Sequence[str] | None = None) -> int:
    """Read the configuration from the command line and run the job; turn errors into a message and an exit code."""
    clean_logs()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return guarded(lambda: job(parse(description, kind, arguments)))


def guarded(job: Callable[[], int]) -> int:
    """Run a job; turn an error that ends it into one line and an exit code: EXIT_ABORTED if it was ``working``, else EXIT_BAD_INPUT."""
    try:
        with ended_by_signals():
            return job()
    except (ConfigError, CatalogError, StorageError, WeightsError, DatasetError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return _exit_code(error)
    except KeyboardInterrupt:
        print("interrupted: every committed title stays; run the same command again to do the rest", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as ending:
        if ending.code != signal.SIGTERM:
            raise
        print(TERMINATED, file=sys.stderr)
        return EXIT_TERMINATED
    except Exception as error:  # A defect of the program, or an unforeseen input.
        code = _exit_code(error)
        fate = "nothing was started" if code == EXIT_BAD_INPUT else "what was committed stays"
        print(f"error: unexpected {reason_of(error)[:MAX_REASON]}; {fate}; {_kept_traceback(error)}", file=sys.stderr)
        return code


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end the job by an exception (SystemExit) as SIGINT does, so that context managers release what they hold.

    That can take long, for example where threads wait for a server that stalls: after GRACE_S the leases are released nevertheless, and
    SIGTERM ends the process. While Ray runs, SIGTERM is handled by Ray or by ``budget.draining``.
    Outside the main thread, where Python handles no signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    come: queue.SimpleQueue[int] = queue.SimpleQueue()  # Its put is safe in a signal handler.
    over = threading.Event()

    def note(number: int, frame: Any) -> None:
        come.put(number)
        if number == signal.SIGTERM:
            sys.exit(number)
        raise KeyboardInterrupt

    def watch() -> None:
        number = come.get()
        if over.wait(GRACE_S if number else None):
            return
        release_all()
        if number == signal.SIGTERM:
            print(TERMINATED, file=sys.stderr, flush=True)
            os._exit(EXIT_TERMINATED)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    # A signal that is ignored stays ignored, as under nohup.
    taken = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in taken}
    try:
        yield
    finally:
        release_all()
        over.set()
        come.put(0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Mark the part of a job that changes something: an error in it, other than ConfigError, ends the job with EXIT_ABORTED."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        error.add_note(BEGUN)
        raise


def debugging() -> bool:
    """Return whether tracebacks go to the terminal."""
    return bool(os.environ.get(DEBUG_VARIABLE))


def _exit_code(error: BaseException) -> int:
    return EXIT_ABORTED if BEGUN in getattr(error, "__notes__", ()) else EXIT_BAD_INPUT


def _kept_traceback(error: BaseException) -> str:
    """Write the traceback of an error to a file or to the terminal; return where it is."""
    lines = public_lines("".join(traceback.format_exception(error)))
    if not debugging():
        with (
            contextlib.suppress(OSError),  # Where no disk takes it, it goes to the terminal.
            tempfile.NamedTemporaryFile("w", prefix="mediafm-", suffix=".log", errors="backslashreplace", delete=False) as stream,
        ):
            stream.write(lines)
            return f"its traceback is in {stream.name} ({DEBUG_VARIABLE}=1 in the environment prints it)"
    print(lines, file=sys.stderr)
    return "its traceback stands above"


def holder_of_lease(job: str) -> str:
    """Return the name of this process, for others that find the lease held."""
    return f"{job} (process {os.getpid()} on {socket.gethostname()})"


def parse(description: str, kind: type[Any], arguments: Sequence[str] | None) -> Any:
    """Return the configuration of a command line. Raises ConfigError."""
    plans = any(section.name == "run" for section in dataclasses.fields(kind))
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"%(prog)s [--help]{' [--dry-run]' if plans else ''} [--config PROFILE_OR_FILE ...] [key=value ...]",
        epilog=f"keys, with their defaults:\n{describe(kind)}",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="PROFILE_OR_FILE",
        help="YAML files or names of profiles, later ones over earlier ones",
    )
    if plans:
        parser.add_argument("--dry-run", action="store_true", help="the same as run.dry_run=true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="single values, over the files")
    found = parser.parse_intermixed_args(arguments)
    # Argparse assigns all words up to the next option to --config; those with an equals sign are overrides.
    files = [value for value in found.config if "=" not in value]
    rest = [value for value in found.config if "=" in value]
    dry = ["run.dry_run=true"] if getattr(found, "dry_run", False) else []
    return read_config(kind, files, [*rest, *found.overrides, *dry])
