"""S3 servers for tests: moto's mock, a real OpenStack Swift, and a fault-injecting proxy in front of it. One of each a session."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.config import Config

from mediafm_ray.storage import s3
from tests.servers.environment import ServersUnavailable, server_python
from tests.servers.proxy import FaultProxy

HERE = Path(__file__).parent
START_TIMEOUT_S = 60
PORTS = 4  # that a server needs, one after the other
AWS_VARIABLES = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


@dataclass(frozen=True)
class S3Server:
    """A running server and the keys of its owner."""

    url: str
    access_key: str = "test:tester"
    secret_key: str = "testing"

    def environment(self) -> dict[str, str]:
        """What a program needs in its environment to use it: keys, and nothing of this machine's own."""
        kept = {name: value for name, value in os.environ.items() if name not in AWS_VARIABLES}
        none = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}
        return {**kept, **none, "AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def client(self) -> Any:
        """A plain client, as another program has it."""
        session = botocore.session.Session()
        session.set_credentials(self.access_key, self.secret_key)
        options = Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required")
        return session.create_client("s3", region_name="us-east-1", endpoint_url=self.url, config=options)

    def bucket(self) -> str:
        """A new, empty bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Every object below a prefix, by its name relative to it, as a plain client sees them."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {key.removeprefix(prefix): client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def uploads(self, bucket: str) -> list[str]:
        """The keys of multipart uploads that are open."""
        return [entry["Key"] for entry in self.client().list_multipart_uploads(Bucket=bucket).get("Uploads", ())]


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """moto's server. It believes every key and every signature."""
    with _running("moto_node.py", lambda port: [str(port)]) as url:
        yield S3Server(url)


@pytest.fixture(scope="session")
def swift() -> Iterator[S3Server]:
    """A real server: OpenStack Swift with its S3 API."""
    with tempfile.TemporaryDirectory(prefix="swift-") as folder, _running("swift_node.py", lambda port: [folder, str(port)]) as url:
        yield S3Server(url)


@pytest.fixture
def punctual_swift() -> Iterator[S3Server]:
    """A real server that refuses what was signed more than two seconds ago."""
    with tempfile.TemporaryDirectory(prefix="swift-") as folder:  # noqa: SIM117
        with _running("swift_node.py", lambda port: [folder, str(port)], CLOCK_SKEW_S="2") as url:
            yield S3Server(url)


@pytest.fixture
def proxy(swift: S3Server) -> Iterator[FaultProxy]:
    """A proxy in front of Swift that injects faults."""
    with FaultProxy(swift.url) as proxy:
        yield proxy


@pytest.fixture
def s3_keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The keys of the test servers in this process's environment."""
    for name in AWS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in S3Server("").environment().items():
        monkeypatch.setenv(name, value)
    s3._client.cache_clear()
    yield
    s3._client.cache_clear()


class _running:
    """A server process; its URL once it answers. Skips the test where the servers cannot be installed."""

    def __init__(self, script: str, arguments: Callable[[int], list[str]], **variables: str):
        self.script, self.arguments, self.variables = script, arguments, variables

    def __enter__(self) -> str:
        try:
            python = server_python()
        except ServersUnavailable as error:
            pytest.skip(str(error))
        port = free_ports(PORTS)
        self.log = tempfile.TemporaryFile("w+")
        command = [str(python), "-W", "ignore", str(HERE / self.script), *self.arguments(port)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env={**os.environ, **self.variables})
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(port):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.log.seek(0)
                raise RuntimeError(f"{self.script} did not start:\n{self.log.read()[-2000:]}")
            time.sleep(0.05)
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports of loopback on which nobody listens."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
        if port + count < 1 << 16 and not any(_connects(port + offset) for offset in range(count)):
            return port


def _connects(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def _answers(port: int) -> bool:
    """Whether what listens there speaks HTTP."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.recv(4) == b"HTTP"
    except ConnectionError:  # refused, or reset by a server that just begins
        return False
