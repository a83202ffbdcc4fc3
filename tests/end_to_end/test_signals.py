"""A backfill that is asked to end while it plans: its lease is given back, whatever it waits for, and the next one may begin at once."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mediafm_ray.config.jobs import BackfillCatalogConfig
from mediafm_ray.config.loader import read_config
from tests.end_to_end.clips import ROOT
from tests.runs.test_backfill import compute, put

NAMES = ("a", "b")


class StallingServer:
    """Takes requests over HTTP, and answers none until it is closed."""

    def __init__(self) -> None:
        self.asked, over = threading.Event(), threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(handler):
                self.asked.set()
                over.wait()

            do_GET = do_HEAD

            def log_message(handler, *_):
                pass

        self.over = over
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "StallingServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.server.shutdown()


@pytest.fixture
def output(tmp_path):
    """An output that has all titles of the catalog of a folder, so that a run over it needs no Ray."""
    (tmp_path / "videos").mkdir()
    for number, name in enumerate(NAMES):
        put(tmp_path, name, name.encode() * 10, 1e9 + number)
    compute(read_config(BackfillCatalogConfig, [], [f"catalog.uri={tmp_path}/videos", f"output.uri={tmp_path}/out"]))
    return tmp_path / "out"


def start(catalog, output):
    command = [sys.executable, "-m", "jobs.backfill_catalog", f"catalog.uri={catalog}", f"output.uri={output}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def leases(output, ending=""):
    return list((output / "leases").rglob(f"*{ending}.json"))


@contextlib.contextmanager
def stalled(kind, tmp_path, output):
    """A backfill that waits for ever while it holds the lease: with its threads for a server, or with its main thread for a pipe."""
    with StallingServer() as server, contextlib.ExitStack() as stack:
        catalog = tmp_path / "videos"
        if kind == "threads":
            catalog = tmp_path / "catalog.jsonl"
            catalog.write_text("".join(json.dumps({"title_id": name, "video": f"{server.url}/{name}.mp4"}) + "\n" for name in NAMES))
        else:
            os.mkfifo(output / "run-summary.json")
            stack.callback((output / "run-summary.json").unlink)
        process = start(catalog, output)
        stack.callback(process.kill)
        until(lambda: leases(output, ".held"))
        if kind == "threads":
            assert server.asked.wait(60)
        else:
            while "in the catalog" not in process.stdout.readline():
                pass
        time.sleep(0.3)
        yield process


@pytest.mark.parametrize("kind", ["main thread", "threads"])
def test_after_sigterm_the_next_run_may_begin_at_once(kind, tmp_path, output):
    with stalled(kind, tmp_path, output) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 128 + signal.SIGTERM
        assert process.stderr.read().strip() == "ended by SIGTERM: every committed title stays; run the same command again to do the rest"
        assert not leases(output)
    again = start(tmp_path / "videos", output)
    said, wrong = again.communicate(timeout=60)
    assert again.returncode == 0, said + wrong
    assert not leases(output)
    assert len(list((output / "runs").iterdir())) == 2


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["main thread", "threads"])
def test_after_sigint_too(kind, tmp_path, output):
    with stalled(kind, tmp_path, output) as process:
        process.send_signal(signal.SIGINT)
        until(lambda: not leases(output), timeout_s=15)
        if kind == "main thread":  # in the other case it still waits for its threads, as ever
            assert process.wait(15) == 128 + signal.SIGINT
