"""Odd files and unforeseen errors, met by real jobs: one line for a person, a documented exit code, no traceback on the terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.clips import PROFILE, ROOT, run_job

DEEP = "[" * 100_000


def embed_dry(catalog: Path, output: Path) -> subprocess.CompletedProcess:
    return run_job("embed_catalog", *PROFILE, f"catalog.uri={catalog}", f"output.uri={output}", "--dry-run")


def test_every_odd_file_of_a_folder_is_a_problem_with_its_name(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("one", "two"):
        (videos / f"{name}.mp4").write_bytes(b"video")
    (Path(os.fsdecode(os.fsencode(videos) + b"/one.caf\xe9.srt"))).write_text("")
    (videos / "two.json").write_text(DEEP)
    done = embed_dry(videos, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "2 problems; nothing was started" in done.stderr
    assert "one.caf\\udce9.srt: the name has control characters or is not valid Unicode" in done.stderr
    assert "two.json: not valid JSON: it is nested too deeply" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_odd_row_of_a_table_is_a_problem_with_its_line(tmp_path):
    table = tmp_path / "catalog.jsonl"
    row = json.dumps({"title_id": "a", "video": "a.mp4", "duration_s": 0})
    table.write_text("\n".join([row.replace(": 0}", f": {'9' * 400}}}"), DEEP]))
    done = embed_dry(table, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "line 1 (a): duration_s must be a number of seconds" in done.stderr
    assert "line 2: not valid JSON: it is nested too deeply" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------- errors that nobody foresaw


UNFORESEEN = """
import sys
from jobs import {job} as job
from mediafm_ray.config import jobs as configs
from mediafm_ray.runs.command import run_job

def fails(*_, **__):
    raise RecursionError("it goes\\nround and round")

job.{step} = fails
sys.exit(run_job("", configs.{kind}, job.main))
"""


def run_unforeseen(job: str, kind: str, step: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A job one of whose steps has a defect."""
    code = UNFORESEEN.format(job=job, kind=kind, step=step)
    command = [sys.executable, "-c", code, *PROFILE, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


@pytest.fixture
def places(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"video")
    return f"catalog.uri={tmp_path}/videos", f"output.uri={tmp_path}/out"


def test_an_unforeseen_error_while_planning_is_one_line_and_its_traceback_a_file(places, tmp_path):
    done = run_unforeseen("backfill_catalog", "BackfillCatalogConfig", "plan_backfill", *places, TMPDIR=str(tmp_path))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    (kept,) = tmp_path.glob("mediafm-*.log")
    assert line.startswith("error: unexpected RecursionError: it goes round and round; nothing was started; ")
    assert str(kept) in line
    assert "Traceback (most recent call last)" in kept.read_text()
    assert "in main" in kept.read_text()
    assert not list((tmp_path / "out" / "leases").rglob("*.json"))


def test_an_unforeseen_error_while_working_ends_with_3(places, tmp_path):
    done = run_unforeseen("backfill_catalog", "BackfillCatalogConfig", "delete", *places, TMPDIR=str(tmp_path))
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "what was committed stays" in line


def test_the_traceback_goes_to_the_terminal_where_that_is_asked_for(places, tmp_path):
    done = run_unforeseen("embed_catalog", "EmbedCatalogConfig", "make_plan", *places, TMPDIR=str(tmp_path), MEDIAFM_DEBUG="1")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert not list(tmp_path.glob("mediafm-*.log"))


def test_what_ends_the_work_early_is_in_the_log_and_not_on_the_terminal(places, tmp_path):
    done = run_unforeseen("embed_catalog", "EmbedCatalogConfig", "embed", *places)
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""
    assert "the run ended early, 1 title not done: RecursionError: it goes round and round" in done.stdout
    assert "Traceback (most recent call last)" in (tmp_path / "out" / "run.log").read_text()
