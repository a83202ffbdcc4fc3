"""Ray clusters of our own on this machine, whose processes can be told from all others: to submit to, and to kill pieces of."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.kills import MARK, marked
from tests.end_to_end.clips import ROOT


def wait_until_gone(mark: str, timeout_s: float = 60) -> dict[int, str]:
    """Wait for the processes with a mark to end; what is left then."""
    deadline = time.monotonic() + timeout_s
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Head:
    """``ray start --head`` with its dashboard, as a user starts it, on free ports; ended with everything that it started."""

    def __init__(self, token_file: Path | None = None, num_cpus: int = 2):
        """``token_file``: holds the token that clients must show; None: token authentication is off."""
        self.mark = secrets.token_hex(8)
        self.folder = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)  # short: paths of sockets are limited
        gcs, dashboard, self.metrics_port, client, agent, agent_grpc, runtime_env = free_ports(7)
        self.address, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self.environment = {**os.environ, MARK: self.mark, "RAY_AUTH_MODE": "disabled", "RAY_API_SERVER_ADDRESS": self.dashboard}
        self.environment.pop("RAY_ADDRESS", None)
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as where the environment is activated
        if token_file:
            self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
        self.token = token_file.read_text().strip() if token_file else ""
        ports = {
            "port": gcs,
            "dashboard-port": dashboard,
            "metrics-export-port": self.metrics_port,
            "ray-client-server-port": client,
            "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": agent_grpc,
            "runtime-env-agent-port": runtime_env,
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={num_cpus}"]
        command += [f"--temp-dir={self.folder.name}", "--node-ip-address=127.0.0.1", f"--object-store-memory={300 << 20}"]
        command += ["--include-dashboard=true", *(f"--{name}={port}" for name, port in ports.items())]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the cluster)
        self.process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=subprocess.STDOUT, cwd=self.folder.name)

    def __enter__(self) -> "Head":
        deadline = time.monotonic() + 120
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{self.dashboard}/api/version", headers=headers), timeout=5).read()
                return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.log.seek(0)
                    raise AssertionError(self.log.read().decode()) from None
                time.sleep(0.3)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        for pid in wait_until_gone(self.mark, timeout_s=20):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.folder.cleanup()

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        """A command as a user of the cluster types it."""
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=500,
        )
