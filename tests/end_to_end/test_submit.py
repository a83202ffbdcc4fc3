"""jobs.submit against a server that speaks Ray's REST interface of jobs, and breaks off: the job's own result comes back all the same."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import ray
from aiohttp import web

from jobs import submit
from tests.end_to_end.clips import ROOT

LOG = [f"line {number}\n" for number in range(6)]
JOB = "night1"


class JobServer:
    """A job that writes LOG and ends when it has been read, on a server that drops the connections it is told to drop.

    ``drops``: after how many lines each of the first connections is reset; ``silent``: the first connection says nothing, and stays open.
    """

    def __init__(self, drops=(), exit_code=0, silent=False, failing_answers=0):
        self.drops, self.exit_code, self.silent, self.failing_answers = list(drops), exit_code, silent, failing_answers
        self.connections, self.ended = 0, False
        self.ready, self.loop = threading.Event(), asyncio.new_event_loop()
        threading.Thread(target=self.serve, daemon=True).start()
        assert self.ready.wait(10)

    def serve(self):
        asyncio.set_event_loop(self.loop)
        app = web.Application()
        app.router.add_get("/api/version", self.version)
        app.router.add_get("/api/packages/{protocol}/{name}", self.package)
        app.router.add_post("/api/jobs/", self.submit)
        app.router.add_get("/api/jobs/{job}", self.details)
        app.router.add_get("/api/jobs/{job}/logs/tail", self.tail)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.loop.run_until_complete(self.runner.setup())
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self.ready.set()
        self.loop.run_forever()

    def close(self):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def version(self, request):
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})

    async def package(self, request):
        return web.json_response({})

    async def submit(self, request):
        return web.json_response({"job_id": JOB, "submission_id": JOB})

    async def details(self, request):
        if self.connections and self.failing_answers:
            self.failing_answers -= 1
            return web.Response(status=500, text="Traceback\nthe dashboard begins anew")
        ended = {"status": "FAILED" if self.exit_code else "SUCCEEDED", "driver_exit_code": self.exit_code, "message": "it has ended"}
        return web.json_response(
            {"type": "SUBMISSION", "entrypoint": "true", "submission_id": JOB, **(ended if self.ended else {"status": "RUNNING"})}
        )

    async def tail(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.connections += 1
        if self.silent and self.connections == 1:
            self.ended = True
            await asyncio.sleep(60)
        drop_after = self.drops.pop(0) if self.drops else None
        for line in LOG[:drop_after]:
            await socket.send_str(line)
        if drop_after is not None:
            await asyncio.sleep(0.2)  # what was sent arrives
            request.transport.abort()
        else:
            self.ended = True
        return socket


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Follow a job of a server in this process: the exit code, and what was said."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(submit, "FIRST_PAUSE_S", 0.05)
    servers = []

    def run(*arguments, **server):
        servers.append(JobServer(**server))
        code = submit.main([*command(servers[-1], tmp_path), *arguments, "--", "true"])
        return code, *capfd.readouterr()

    yield run
    for server in servers:
        server.close()


def command(server, folder):
    (folder / "runtime_env.yaml").write_text("{}")
    (folder / "job").mkdir()
    return ["--address", server.url, "--working-dir", f"{folder}/job", "--runtime-env", f"{folder}/runtime_env.yaml"]


@pytest.mark.parametrize("exit_code", [0, 1, 2])
def test_after_dropped_connections_the_log_is_whole_and_the_exit_code_is_the_jobs(run, exit_code):
    code, said, wrong = run(drops=[2, 1, 4], exit_code=exit_code, failing_answers=2)
    assert code == exit_code
    assert [line for line in said.splitlines(keepends=True) if line.startswith("line")] == LOG
    lines = wrong.strip().splitlines()
    assert len(lines) == 2, wrong  # the second connection brought nothing new
    assert all("the connection to the job's log broke" in line and "the job continues" in line for line in lines)


def test_a_connection_that_is_dead_without_a_word_does_not_outlast_the_job(run, monkeypatch):
    monkeypatch.setattr(submit, "SILENCE_S", 0.3)
    code, said, _ = run(silent=True)
    assert code == 0
    assert [line for line in said.splitlines(keepends=True) if line.startswith("line")] == LOG


def test_a_cluster_that_is_gone_is_one_line_and_the_command_that_looks(tmp_path):
    server = JobServer(silent=False, drops=[2] * 1000)
    job = [sys.executable, "-m", "jobs.submit", *command(server, tmp_path), "--patience", "1", "--", "true"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(job, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.stdout.readline() != LOG[1]:
        assert process.poll() is None
    server.close()
    assert process.wait(60) == 3
    wrong = process.stderr.read()
    assert "Traceback" not in wrong
    assert f"the cluster at {server.url} does not answer any more" in wrong.splitlines()[-1]
    assert f"to see its state: ray job status {JOB} --address {server.url}" in wrong.splitlines()[-1]


def test_interrupting_it_says_that_the_job_goes_on(tmp_path):
    server = JobServer(silent=True)
    job = [sys.executable, "-m", "jobs.submit", *command(server, tmp_path), "--", "true"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(job, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert f"submitted {JOB}" in process.stdout.readline()
    deadline = time.monotonic() + 30
    while not server.connections:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    (line,) = process.stderr.read().strip().splitlines()
    assert line.startswith("interrupted: the job continues; to see its state: ray job status")
    server.close()
