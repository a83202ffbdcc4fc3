"""The virtual environment of the S3 servers that the tests start: their packages stay out of the program's own.

It is made once a machine, in the user's cache, from the pinned ``requirements.txt`` beside this file, and needs the package index for that.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


class ServersUnavailable(Exception):
    """The servers cannot be installed here; the message says why."""


def server_python() -> Path:
    """The interpreter of that environment, made if need be. Raises ServersUnavailable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mediafm_ray" / "test-servers"
    cache.mkdir(parents=True, exist_ok=True)
    pins = REQUIREMENTS.read_bytes() + sys.version.encode()
    folder = cache / hashlib.sha256(pins).hexdigest()[:16]
    ready, python = folder / ".ready", folder / "bin" / "python"
    with FileLock(f"{folder}.lock"):
        if not ready.exists():
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", str(REQUIREMENTS)])
            ready.touch()
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise ServersUnavailable(f"the S3 servers of the tests could not be installed: {lines[-1]}")
