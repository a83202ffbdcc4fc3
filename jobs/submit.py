"""Submit a job to a Ray cluster, follow its log, and end with the job's own exit code.

    mediafm submit [--address http://127.0.0.1:8265] [--working-dir .] [--runtime-env FILE] -- \\
        python -m jobs.embed_catalog --config offline catalog.uri=s3://... output.uri=s3://...

`ray job submit` does the same, but ends with 1 whatever the job's exit code was. Where the cluster asks for a token, it is found as Ray
finds it: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
Interrupting this command does not stop the job: `ray job stop ID` does. Where the connection breaks while the log is followed, the job goes
on: this command connects again, says what it missed, and ends with the job's own exit code.
Exit code: the job's own; 2: nothing was submitted; 3: the job was stopped or its node lost, or the cluster did not answer for --patience.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from mediafm_ray.config.loader import CONF
from mediafm_ray.runs.command import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED, guarded, working
from mediafm_ray.text import public_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
EXIT_UNKNOWN = 3  # the job ended and nobody knows with what: its node was lost, it was stopped, or the cluster does not answer
FIRST_PAUSE_S = 1.0  # before the cluster is asked again; it doubles with every further time
MAX_PAUSE_S = 30.0
ANSWER_S = 30.0  # for one question about the job
SILENCE_S = 60.0  # without a line of the log: then the job's state is asked for, because a connection may be dead without a word
PATIENCE_S = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit, follow, report."""
    options = parse(arguments)
    try:
        client, job = submit(options)
    except SubmitError as error:
        print(public_line(f"error: {error}"), file=sys.stderr)
        return EXIT_BAD_INPUT
    look = f"ray job status {job} --address {options.address}"
    print(public_line(f"submitted {job}; to look again: {look}; ray job logs {job}; ray job stop {job}"), flush=True)
    if options.no_wait:
        return 0
    try:
        with working():
            details = asyncio.run(Follower(client, job, options.patience).follow())
    except (KeyboardInterrupt, SystemExit) as ending:  # SystemExit: of SIGTERM
        print(public_line(f"interrupted: the job goes on; to look: {look}; to stop it: ray job stop {job}"), file=sys.stderr)
        return EXIT_INTERRUPTED if isinstance(ending, KeyboardInterrupt) else EXIT_TERMINATED
    except Unreachable as error:
        why = f"error: the cluster at {options.address} does not answer any more ({error}); the job may still be at work; to look: {look}"
        print(public_line(why), file=sys.stderr)
        return EXIT_UNKNOWN
    reason = (details.message or "").partition("\n")[0]  # what follows is the end of the log, once more
    print(f"{job} {details.status}: {reason}", flush=True)
    return exit_code(details)


class SubmitError(Exception):
    """Why nothing was submitted, and what to do."""


class Unreachable(Exception):
    """The last reason why the cluster said nothing of a job, for longer than is waited."""


def submit(options: argparse.Namespace) -> tuple[JobSubmissionClient, str]:
    """The client and the job's name. Raises SubmitError."""
    try:
        client = JobSubmissionClient(options.address)
        job = client.submit_job(
            entrypoint=shlex.join(options.entrypoint), runtime_env=runtime_env(options), submission_id=options.submission_id
        )
    except AuthenticationError as error:
        raise SubmitError(
            f"the cluster at {options.address} wants another token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH where the token is "
            "not in ~/.ray/auth_token"
        ) from error
    except ConnectionError as error:
        raise SubmitError(f"no Ray cluster answers at {options.address}: start one (ray start --head), or give --address") from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: what the cluster answered, such as a name that is taken
        said = [line for line in str(error).splitlines() if any(map(str.isalnum, line))]  # the cluster sends its whole traceback
        raise SubmitError(said[-1] if said else repr(error)) from error
    return client, job


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS), help="of the cluster's dashboard")
    parser.add_argument("--working-dir", default=".", help="folder that the job takes along")
    parser.add_argument(
        "--runtime-env",
        type=Path,
        default=CONF / "cluster" / "runtime_env.yaml",
        help="YAML: what not to take along, variables, packages (default: conf/cluster/runtime_env.yaml)",
    )
    parser.add_argument("--submission-id", help="a name for the job; a second job of the same name is refused")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, metavar="SECONDS", help="how long the cluster may be out of reach")
    parser.add_argument("--no-wait", action="store_true", help="submit and leave")
    parser.add_argument("entrypoint", nargs="+", metavar="-- COMMAND", help="what runs on the cluster")
    return parser.parse_args(arguments)


def runtime_env(options: argparse.Namespace) -> dict[str, Any]:
    """What the job takes along."""
    found = yaml.safe_load(options.runtime_env.read_text(encoding="utf-8")) or {}
    return {**found, "working_dir": options.working_dir}


class Follower:
    """Prints a job's log until the job ends, over as many connections as it takes."""

    def __init__(self, client: JobSubmissionClient, job: str, patience_s: float):
        """``patience_s``: how long the cluster may be out of reach."""
        self.client, self.job, self.patience_s = client, job, patience_s
        self.printed = 0  # characters of the log
        self.pause_s = FIRST_PAUSE_S

    async def follow(self) -> Any:
        """The details of the job when it has ended. Raises Unreachable."""
        had_ended = False
        while True:
            broken = await self._print_log()
            details = self._details()
            has_ended = details.status.is_terminal()
            if has_ended and (had_ended or not broken):  # of a job that has ended, the log is asked for once more
                if broken:
                    print(f"the end of the log could not be read ({broken}): ray job logs {self.job}", file=sys.stderr, flush=True)
                return details
            if broken and not has_ended and self.pause_s == FIRST_PAUSE_S:
                print(f"the connection to the job's log broke ({broken}); the job goes on: connecting again", file=sys.stderr, flush=True)
            had_ended = has_ended
            await asyncio.sleep(self.pause_s)
            self.pause_s = min(MAX_PAUSE_S, 2 * self.pause_s)

    async def _print_log(self) -> str:
        """Print what is new in the log, over one connection; why it ended too early, or empty."""
        seen = 0  # characters of this connection, which begins with the first of the log
        log: AsyncIterator[str] = self.client.tail_job_logs(self.job)
        try:
            while True:
                following = asyncio.ensure_future(anext(log))
                while not (await asyncio.wait({following}, timeout=SILENCE_S))[0]:
                    if self._details().status.is_terminal():
                        following.cancel()
                        return f"no word for {SILENCE_S:g} s"
                lines = following.result()
                seen += len(lines)
                if seen > self.printed:
                    print(lines[self.printed - seen :], end="", flush=True)
                    self.printed, self.pause_s = seen, FIRST_PAUSE_S
        except StopAsyncIteration:
            return ""
        except Unreachable:
            raise
        except Exception as error:  # aiohttp's of many kinds, Ray's RuntimeError
            return " ".join(f"{type(error).__name__}: {error}".split())

    def _details(self) -> Any:
        """Ask the cluster for the job's details until it answers. Raises Unreachable."""
        until, pause_s = time.monotonic() + self.patience_s, FIRST_PAUSE_S
        while True:
            try:
                return within(ANSWER_S, lambda: self.client.get_job_info(self.job))
            except Exception as error:  # requests' of many kinds, Ray's RuntimeError
                if time.monotonic() + pause_s > until:
                    raise Unreachable(f"for {self.patience_s:g} s: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
            time.sleep(pause_s)
            pause_s = min(MAX_PAUSE_S, 2 * pause_s)


def within(seconds: float, ask: Callable[[], Any]) -> Any:
    """The answer to a question, or TimeoutError: Ray's client waits for ever where a server takes a request and does not answer it."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # raised again where it is waited for
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(seconds)


def exit_code(details: Any) -> int:
    """The exit code of the job's own command."""
    if details.driver_exit_code is None:
        return EXIT_UNKNOWN
    return (
        128 - details.driver_exit_code if details.driver_exit_code < 0 else details.driver_exit_code
    )  # killed by a signal: as a shell says it


def command(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    logging.disable(logging.WARNING)  # Ray's line for every file that is not taken along
    return guarded(lambda: main(arguments))


if __name__ == "__main__":
    sys.exit(command())
