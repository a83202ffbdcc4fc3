"""Submit a job to a Ray cluster, follow its log, and end with the job's own exit code.

    mediafm submit [--address http://127.0.0.1:8265] [--working-dir .] [--runtime-env FILE] -- \\
        python -m jobs.embed_catalog --config offline catalog.uri=s3://... output.uri=s3://...

The command after -- runs in the working directory that the job takes to the cluster, where python -m needs no installed package.
`ray job submit` does the same, but exits with 1 whatever the job's exit code was. Ray finds the token of a cluster that needs one:
RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
Interrupting this command does not stop the job: `ray job stop ID` does. If the connection breaks while the log is followed, the job
continues: this command connects again, prints what it missed, and exits with the job's own exit code.
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
EXIT_UNKNOWN = 3  # The exit code is unknown: the job's node was lost, it was stopped, or the cluster does not answer.
FIRST_PAUSE_S = 1.0  # pause before the cluster is asked again; it doubles with each further attempt
MAX_PAUSE_S = 30.0
ANSWER_TIMEOUT_S = 30.0  # time for the answer to one request for the job's details
SILENCE_S = 60.0  # After so long without a line of the log the job's state is requested, because a connection may be dead.
PATIENCE_S = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit the job, follow its log, report its end."""
    options = parse(arguments)
    try:
        client, job = submit(options)
    except SubmitError as error:
        print(public_line(f"error: {error}"), file=sys.stderr)
        return EXIT_BAD_INPUT
    look = f"ray job status {job} --address {options.address}"
    print(public_line(f"submitted {job}; to see its state: {look}; ray job logs {job}; ray job stop {job}"), flush=True)
    if options.no_wait:
        return 0
    try:
        with working():
            details = asyncio.run(Follower(client, job, options.patience).follow())
    except (KeyboardInterrupt, SystemExit) as ending:  # SIGTERM raises SystemExit.
        print(public_line(f"interrupted: the job continues; to see its state: {look}; to stop it: ray job stop {job}"), file=sys.stderr)
        return EXIT_INTERRUPTED if isinstance(ending, KeyboardInterrupt) else EXIT_TERMINATED
    except Unreachable as error:
        why = f"error: the cluster at {options.address} does not answer any more ({error}); the job may continue; to see its state: {look}"
        print(public_line(why), file=sys.stderr)
        return EXIT_UNKNOWN
    reason = (details.message or "").partition("\n")[0]  # The rest repeats the end of the log.
    print(f"{job} {details.status}: {reason}", flush=True)
    return exit_code(details)


class SubmitError(Exception):
    """A job that was not submitted; the message says why and what to do."""


class Unreachable(Exception):
    """A cluster that did not answer for longer than --patience; the message has the last reason."""


def submit(options: argparse.Namespace) -> tuple[JobSubmissionClient, str]:
    """Submit the job; return the client and the job's id. Raises SubmitError."""
    try:
        client = JobSubmissionClient(options.address)
        job = client.submit_job(
            entrypoint=shlex.join(options.entrypoint), runtime_env=runtime_env(options), submission_id=options.submission_id
        )
    except AuthenticationError as error:
        raise SubmitError(
            f"the cluster at {options.address} requires another token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH where the token is "
            "not in ~/.ray/auth_token"
        ) from error
    except ConnectionError as error:
        raise SubmitError(f"no Ray cluster answers at {options.address}: start one (ray start --head), or give --address") from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: an answer of the cluster, such as a name that is taken.
        lines = [line for line in str(error).splitlines() if any(map(str.isalnum, line))]  # The cluster sends a whole traceback.
        raise SubmitError(lines[-1] if lines else repr(error)) from error
    return client, job


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS), help="of the cluster's dashboard")
    parser.add_argument("--working-dir", default=".", help="folder that is copied to the cluster")
    parser.add_argument(
        "--runtime-env",
        type=Path,
        default=CONF / "cluster" / "runtime_env.yaml",
        help="YAML file of Ray's runtime environment: excluded files, variables, packages (default: conf/cluster/runtime_env.yaml)",
    )
    parser.add_argument("--submission-id", help="a name for the job; a second job of the same name is refused")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, metavar="SECONDS", help="how long the cluster may be unreachable")
    parser.add_argument("--no-wait", action="store_true", help="submit the job and exit")
    parser.add_argument("entrypoint", nargs="+", metavar="-- COMMAND", help="command to run on the cluster")
    return parser.parse_args(arguments)


def runtime_env(options: argparse.Namespace) -> dict[str, Any]:
    """Return Ray's runtime environment of the job."""
    found = yaml.safe_load(options.runtime_env.read_text(encoding="utf-8")) or {}
    return {**found, "working_dir": options.working_dir}


class Follower:
    """Print a job's log until the job ends, over as many connections as needed."""

    def __init__(self, client: JobSubmissionClient, job: str, patience_s: float):
        """``patience_s``: seconds for which the cluster may be unreachable."""
        self.client, self.job, self.patience_s = client, job, patience_s
        self.printed = 0  # printed characters of the log
        self.pause_s = FIRST_PAUSE_S

    async def follow(self) -> Any:
        """Return the details of the job when it has ended. Raises Unreachable."""
        had_ended = False
        while True:
            broken = await self._print_log()
            details = self._details()
            has_ended = details.status.is_terminal()
            if has_ended and (had_ended or not broken):  # The log of a job that has ended is read once more.
                if broken:
                    print(f"the end of the log could not be read ({broken}): ray job logs {self.job}", file=sys.stderr, flush=True)
                return details
            if broken and not has_ended and self.pause_s == FIRST_PAUSE_S:
                print(f"the connection to the job's log broke ({broken}); the job continues: connecting again", file=sys.stderr, flush=True)
            had_ended = has_ended
            await asyncio.sleep(self.pause_s)
            self.pause_s = min(MAX_PAUSE_S, 2 * self.pause_s)

    async def _print_log(self) -> str:
        """Print the new part of the log over one connection; return why it broke, or an empty string at the end of the log."""
        seen = 0  # characters received; every connection sends the log from its start
        log: AsyncIterator[str] = self.client.tail_job_logs(self.job)
        try:
            while True:
                following = asyncio.ensure_future(anext(log))
                while not (await asyncio.wait({following}, timeout=SILENCE_S))[0]:
                    if self._details().status.is_terminal():
                        following.cancel()
                        return f"silent for {SILENCE_S:g} s"
                lines = following.result()
                seen += len(lines)
                if seen > self.printed:
                    print(lines[self.printed - seen :], end="", flush=True)
                    self.printed, self.pause_s = seen, FIRST_PAUSE_S
        except StopAsyncIteration:
            return ""
        except Unreachable:
            raise
        except Exception as error:  # many types of aiohttp, and Ray's RuntimeError
            return " ".join(f"{type(error).__name__}: {error}".split())

    def _details(self) -> Any:
        """Ask the cluster for the job's details until it answers. Raises Unreachable."""
        until, pause_s = time.monotonic() + self.patience_s, FIRST_PAUSE_S
        while True:
            try:
                return within(ANSWER_TIMEOUT_S, lambda: self.client.get_job_info(self.job))
            except Exception as error:  # many types of requests, and Ray's RuntimeError
                if time.monotonic() + pause_s > until:
                    raise Unreachable(f"for {self.patience_s:g} s: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
            time.sleep(pause_s)
            pause_s = min(MAX_PAUSE_S, 2 * pause_s)


def within(seconds: float, ask: Callable[[], Any]) -> Any:
    """Return the result of ``ask``. Raises TimeoutError, because Ray's client never gives up on a server that does not answer."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # answer.result() raises it.
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(seconds)


def exit_code(details: Any) -> int:
    """Return the exit code of the job's own command; for a signal 128 and its number, as in a shell."""
    code = details.driver_exit_code
    if code is None:
        return EXIT_UNKNOWN
    return 128 - code if code < 0 else code


def command(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    logging.disable(logging.WARNING)  # Ray logs a line for every excluded file.
    return guarded(lambda: main(arguments))


if __name__ == "__main__":
    sys.exit(command())
