"""Submit a job to a Ray cluster, follow its log, and end with the job's own exit code.

    python -m jobs.submit [--address http://127.0.0.1:8265] [--working-dir .] [--runtime-env conf/cluster/runtime_env.yaml] -- \\
        python -m jobs.embed_catalog --config conf/offline.yaml catalog.uri=s3://... output.uri=s3://...

`ray job submit` does the same, but ends with 1 whatever the job's exit code was. Where the cluster asks for a token, it is found as Ray
finds it: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
Interrupting this command does not stop the job: `ray job stop ID` does.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from mediafm_ray.pipeline.command import EXIT_BAD_INPUT
from mediafm_ray.spec import public_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
EXIT_UNKNOWN = 3  # the job ended and nobody knows with what: its node was lost, or it was stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit, follow, report."""
    options = parse(arguments)
    try:
        client, job = submit(options)
    except SubmitError as error:
        print(public_line(f"error: {error}"), file=sys.stderr)
        return EXIT_BAD_INPUT
    print(
        public_line(
            f"submitted {job}; to look again: ray job status {job} --address {options.address}; ray job logs {job}; ray job stop {job}"
        ),
        flush=True,
    )
    if options.no_wait:
        return 0
    asyncio.run(follow(client, job))
    details = client.get_job_info(job)
    reason = (details.message or "").partition("\n")[0]  # what follows is the end of the log, once more
    print(f"{job} {details.status}: {reason}", flush=True)
    return exit_code(details)


class SubmitError(Exception):
    """Why nothing was submitted, and what to do."""


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
        "--runtime-env", type=Path, default=Path("conf/cluster/runtime_env.yaml"), help="YAML: what not to take along, variables, packages"
    )
    parser.add_argument("--submission-id", help="a name for the job; a second job of the same name is refused")
    parser.add_argument("--no-wait", action="store_true", help="submit and leave")
    parser.add_argument("entrypoint", nargs="+", metavar="-- COMMAND", help="what runs on the cluster")
    return parser.parse_args(arguments)


def runtime_env(options: argparse.Namespace) -> dict[str, Any]:
    """What the job takes along."""
    found = yaml.safe_load(options.runtime_env.read_text(encoding="utf-8")) or {}
    return {**found, "working_dir": options.working_dir}


async def follow(client: JobSubmissionClient, job: str) -> None:
    """Print the job's log until it ends."""
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def exit_code(details: Any) -> int:
    """The exit code of the job's own command."""
    if details.driver_exit_code is None:
        return EXIT_UNKNOWN
    return (
        128 - details.driver_exit_code if details.driver_exit_code < 0 else details.driver_exit_code
    )  # killed by a signal: as a shell says it


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # Ray's line for every file that is not taken along
    sys.exit(main())
