"""Locations that cannot be used: the main job says so in one line, with exit code 2, within 30 s, before any title is read."""

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mediafm_ray.storage import errors
from mediafm_ray.storage.base import PROBE_BYTES
from mediafm_ray.storage.errors import StorageError, explain, is_transient
from mediafm_ray.storage.store import Store
from tests.servers.fixtures import S3Server, free_ports
from tests.servers.proxy import Fault, FaultProxy

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
LIMIT_S = 30
MAIN = [sys.executable, "-m", "jobs.embed_catalog"]


@pytest.fixture
def videos(tmp_path):
    """A catalog that would do."""
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "one.mp4").write_bytes(b"never read")
    return folder


def refused(overrides, environment=None, **options) -> str:
    """Run the main job; it must refuse in one line, soon. That line."""
    start = time.monotonic()
    done = subprocess.run(
        [*MAIN, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=4 * LIMIT_S, check=False, **options
    )
    elapsed_s = time.monotonic() - start
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert done.stderr.splitlines()[-1] == line
    assert "Traceback" not in done.stderr
    assert elapsed_s < LIMIT_S, elapsed_s
    return line


def on(server: S3Server, bucket: str, videos: Path, url: str = "") -> list[str]:
    """A job whose output is in a bucket."""
    return [f"catalog.uri={videos}", f"output.uri=s3://{bucket}/out", f"storage.endpoint_url={url or server.url}"]


def test_no_bucket(swift, videos):
    line = refused(on(swift, "no-such-bucket", videos), swift.environment())
    assert "there is no bucket no-such-bucket" in line
    assert "create it" in line
    line = refused(["catalog.uri=s3://no-such-bucket/videos", "output.uri=/tmp", f"storage.endpoint_url={swift.url}"], swift.environment())
    assert "there is no bucket no-such-bucket" in line


def test_a_wrong_secret(swift, videos):
    bucket = swift.bucket()
    line = refused(on(swift, bucket, videos), S3Server(swift.url, secret_key="wrong").environment())
    assert "SignatureDoesNotMatch" in line
    assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in line


def test_may_read_and_not_write(swift, videos):
    """Swift's own test users cannot be told apart so finely: the refusal is put in on the way, in AWS's words."""
    bucket = swift.bucket()
    with FaultProxy(swift.url) as proxy:
        proxy.faults = [Fault("status", match="^PUT", status=403, code="AccessDenied")]
        line = refused(on(swift, bucket, videos, proxy.url), swift.environment())
    assert "permission denied to the credentials (env, access key ...ster)" in line
    assert "s3:PutObject" in line


def test_no_credentials(swift, videos):
    environment = {name: value for name, value in swift.environment().items() if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    assert "no credentials were found: set AWS_ACCESS_KEY_ID" in refused(on(swift, "any", videos), environment)


def test_expired_credentials_as_a_program_gives_them(swift, videos, tmp_path):
    """What a single sign-on tool does whose session is over."""
    expired = '{"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "c", "Expiration": "2020-01-01T00:00:00Z"}'
    (tmp_path / "config").write_text(f"[default]\ncredential_process = echo '{expired}'\n")
    environment = {**swift.environment(), "AWS_CONFIG_FILE": str(tmp_path / "config")}
    del environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    line = refused(on(swift, "any", videos), environment)
    assert "still expired" in line
    assert "renew them" in line


def test_a_clock_that_is_wrong(punctual_swift, videos):
    """A request that is held up on its way looks to the server like one from a clock that is slow."""
    bucket = punctual_swift.bucket()
    with FaultProxy(punctual_swift.url) as proxy:
        proxy.faults = [Fault("delay", seconds=4)]
        line = refused(on(punctual_swift, bucket, videos, proxy.url), punctual_swift.environment())
    assert "RequestTimeTooSkewed" in line
    assert "this machine's clock is wrong" in line
    assert "timedatectl" in line


def test_nobody_listens(videos):
    url = f"http://127.0.0.1:{free_ports(1)}"
    line = refused(on(S3Server(url), "any", videos), S3Server(url).environment())
    assert f"cannot connect to {url}" in line
    assert "Connection refused" in line
    assert "check storage.endpoint_url" in line


@pytest.mark.parametrize(
    "timeouts", [["storage.read_timeout_s=1.5"], pytest.param([], marks=pytest.mark.slow)], ids=["short timeout", "default timeout"]
)
def test_a_black_hole(videos, timeouts):
    """What accepts the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        url = f"http://127.0.0.1:{hole.getsockname()[1]}"
        line = refused([*on(S3Server(url), "any", videos), *timeouts], S3Server(url).environment())
    assert f"{url} does not answer" in line


def test_what_is_no_s3_server(videos, tmp_path):
    server = subprocess.Popen([sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1"], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().split()[5].decode()}"
        line = refused(on(S3Server(url), "any", videos), S3Server(url).environment())
    finally:
        server.kill()
        server.wait()
    assert "check storage.endpoint_url" in line or "correct the location" in line


def test_an_endpoint_without_scheme(videos):
    assert "must begin with http" in refused([f"catalog.uri={videos}", "output.uri=s3://b/o", "storage.endpoint_url=localhost:9000"])


def test_files_that_may_not_grow(videos, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (PROBE_BYTES // 2, PROBE_BYTES // 2))

    line = refused([f"catalog.uri={videos}", f"output.uri={tmp_path}/out"], preexec_fn=limit)
    assert "ulimit -f" in line
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_full_disk(videos, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", disk], capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small file system needs root and a kernel that lets it")
    try:
        assert "the disk is full: free some space" in refused([f"catalog.uri={videos}", f"output.uri={disk}/out"])
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not os.geteuid(), reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="permission denied"):
        Store(str(tmp_path / "closed" / "out")).check_writable()


def test_every_known_refusal_is_explained_in_one_line():
    """Answers as botocore parses them, each with the advice that a person needs."""
    from botocore.exceptions import ClientError

    advice = {
        "ExpiredToken": "renew them",
        "RequestTimeTooSkewed": "this machine's clock is wrong",
        "AccessDenied": "s3:GetObject",
        "PermanentRedirect": "AWS_DEFAULT_REGION",
        "QuotaExceeded": "the store is full",
        "MethodNotAllowed": "is storage.endpoint_url that of an S3 service?",
        "SlowDown": "run the same command again later",
        "SomethingNew": "refused",
    }
    for code, words in advice.items():
        headers = {"date": "Mon, 23 Nov 2026 12:00:00 GMT"}
        answer = {
            "Error": {"Code": code, "Message": "two\nlines"},
            "ResponseMetadata": {"HTTPStatusCode": 503 if code == "SlowDown" else 403, "HTTPHeaders": headers},
        }
        error = ClientError(answer, "PutObject")
        line = explain(error, "s3://bucket/key", "http://host")
        assert words in line
        assert "\n" not in line
        assert line.startswith("s3://bucket/key: ")
        assert is_transient(error) == (code == "SlowDown")
        assert ("12:00:00 there" in line) == (code == "RequestTimeTooSkewed")
    assert all("\n" not in words for words in errors.LOCAL_ERRORS.values())
