"""The logs of a run while it goes: in parts, after a kill, and those of many nights."""

import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from mediafm_ray.runs import run_log
from mediafm_ray.runs.report import Console
from mediafm_ray.runs.run_log import RunLog
from mediafm_ray.storage.store import StorageError, Store
from tests.end_to_end.clips import PROFILE, ROOT


def until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_parts_of_a_log_are_the_whole_of_it_and_full_ones_are_put_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "MAX_PART_BYTES", 1000)
    monkeypatch.setattr(run_log, "LOCAL_INTERVAL_S", 0.01)
    console, store = Console(io.StringIO()), Store(str(tmp_path))
    puts = []
    monkeypatch.setattr(store, "write", lambda name, content: (puts.append(name), Store.write(store, name, content)))
    with RunLog(console, store) as log:
        for number in range(200):
            console.say(f"line {number} é")
            console.say_title(f"title {number}", {"title_id": str(number)})
            time.sleep(0.001)
        log.end({"titles": {}})
    folder = tmp_path / log.folder
    assert re.fullmatch(r"runs/\d{8}T\d{6}Z-[0-9a-f]{8}", log.folder)
    for kept, root in (("run*.log", "run.log"), ("titles*.jsonl", "titles.jsonl")):
        parts = sorted(folder.glob(kept), key=lambda path: (len(path.name), path.name))
        assert len(parts) > 3
        assert b"".join(part.read_bytes() for part in parts) == (tmp_path / root).read_bytes()
        assert all(part.read_bytes().endswith(b"\n") and part.stat().st_size <= 1000 for part in parts)
    text = (tmp_path / "run.log").read_text()
    assert text.count("line ") == text.count("title ") == 200
    assert (folder / "run-summary.json").read_bytes() == (tmp_path / "run-summary.json").read_bytes()
    numbers = [int(match[1] or 1) for name in puts if (match := re.fullmatch(rf"{log.folder}/run(?:-(\d+))?\.log", name))]
    assert numbers == sorted(numbers), "a part is not put again once the next one is there"


def test_what_ends_a_run_has_its_traceback_in_the_log(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLog(Console(io.StringIO()), Store(str(tmp_path))) as log:
        print(1 / 0)
    assert "ZeroDivisionError: division by zero" in (tmp_path / log.folder / "run.log").read_text()


def test_a_store_that_fails_meanwhile_is_tried_again_and_one_that_fails_at_the_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "LOCAL_INTERVAL_S", 0.01)
    console, store = Console(io.StringIO()), Store(str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").write_text("a file where a folder belongs")
    with pytest.raises(StorageError), RunLog(console, store):
        console.say("one")
    with RunLog(console, store) as log:
        time.sleep(0.1)
        (tmp_path / "out" / "runs").unlink()
        until(lambda: (tmp_path / "out" / log.folder / "run.log").exists())


def test_the_newest_runs_stay_and_nothing_else_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "MAX_RUNS", 3)
    strangers = ["runs/notes.txt", "runs/mine/run.log", "run.log", "0123456789ab/shots/shard=00/a@b.parquet"]
    old = [f"runs/2026010{day}T000000Z-0123456{day}/run.log" for day in range(1, 6)]
    store = Store(str(tmp_path))
    for name in [*old, old[0].replace("run.log", "run-0002.log"), *strangers]:
        store.write(name, b"x")
    with RunLog(Console(io.StringIO()), store) as log:
        pass
    left = {info.name for info in store.list()}
    assert left == {*strangers, *old[-2:], f"{log.folder}/run.log"}


def test_a_killed_job_leaves_what_it_said(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"video")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "run-summary.json")  # where the job waits for ever, after it said its plan
    job = [sys.executable, "-m", "jobs.backfill_catalog", *PROFILE, f"catalog.uri={tmp_path}/videos", f"output.uri={tmp_path}/out"]
    process = subprocess.Popen(job, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(2)]
    time.sleep(2 * run_log.LOCAL_INTERVAL_S + 1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (kept,) = (tmp_path / "out").glob("runs/*/run.log")
    text = kept.read_text()
    assert said[0].strip() in text
    assert "in the catalog" in text
    assert "in the catalog" in said[1]
