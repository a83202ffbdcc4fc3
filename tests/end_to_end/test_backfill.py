"""Scheduled backfills from outside: killed, refused by the lease that the killed one left, run within a budget, finished, and run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.pipeline import loop
from mediafm_ray.runs.plan import make_plan, prepare_output
from tests.end_to_end.clips import PROFILE, ROOT, kill_after, make_clip, objects

TITLES = {"oldest": [30], "older": [25, 30], "middle": [40], "newer": [30, 25], "newest": [35]}
LONG_AGO_S = 3600  # longer than a lease lasts


def command(videos, output, *overrides):
    return [sys.executable, "-m", "jobs.backfill_catalog", *PROFILE, f"catalog.uri={videos}", f"output.uri={output}", *overrides]


def backfill(videos, output, *overrides):
    """Run the job as a scheduler does."""
    return subprocess.run(command(videos, output, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number, (name, frames) in enumerate(TITLES.items()):
        os.utime(make_clip(folder / f"{name}.mp4", frames, number), (1e9 + number, 1e9 + number))
    return folder


@pytest.fixture(scope="module")
def night(videos, tmp_path_factory):
    """A first run that is killed, a second that comes too early, a third within a budget: what was committed, and what they said."""
    output = tmp_path_factory.mktemp("night") / "out"
    assert kill_after(command(videos, output), output, after_objects=1) == -9
    committed = objects(output)
    refused = backfill(videos, output)
    after_refusal = objects(output)
    for path in (output / "leases").rglob("*.json"):  # time goes by
        os.utime(path, (time.time() - LONG_AGO_S,) * 2)
    limited = backfill(videos, output, "backfill.max_video_hours=0.0001")
    return output, committed, refused, after_refusal, limited


@pytest.mark.slow
def test_the_lease_of_a_killed_run_refuses_the_next_in_one_line_until_it_expires(night):
    _, committed, refused, after_refusal, limited = night
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    for part in ("holds the lease", "process", "since", "until", "delete"):
        assert part in refused.stderr
    assert [name for name in after_refusal if not name.startswith("leases/")] == [
        name for name in committed if not name.startswith("leases/")
    ]
    assert limited.returncode == 0, limited.stdout + limited.stderr


@pytest.mark.slow
def test_what_the_budget_leaves_is_left_and_nothing_else(night):
    output, committed, _, _, limited = night
    summary = json.loads((output / "run-summary.json").read_text())
    part, titles = summary["backfill"], summary["titles"]
    before = len([name for name in committed if "/shots/" in name])
    assert part["planned"] == len(TITLES) - before
    assert part["ended_by"] == "max_video_hours"
    assert part["ok"] >= 1
    assert part["left"] >= 1
    assert (part["failed"], part["lost"]) == (0, 0)
    assert part["ok"] + part["left"] == part["planned"]
    assert titles == {**titles, "planned": part["planned"], "ok": part["ok"], "left": part["left"], "skipped": before}
    shots = [path.name.split("@")[0] for path in output.glob("*/shots/*/*.parquet")]
    assert len(shots) == before + part["ok"]
    assert not list(output.glob("*/failures/*/*"))
    assert f"{part['left']} (max_video_hours)" in limited.stdout
    assert not [name for name in objects(output) if name.startswith("leases/")], "the lease is given back"


@pytest.mark.slow
def test_the_next_nights_finish_it_with_the_bytes_of_an_undisturbed_run(night, videos, tmp_path):
    output = night[0]
    finished = backfill(videos, output)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    plain = read_config(EmbedCatalogConfig, PROFILE[1:], [f"catalog.uri={videos}", f"output.uri={tmp_path}/loop"])
    plan = make_plan(plain)
    prepare_output(plan, plain)
    assert len(list(loop.run(plan.pending, loop.build_stages(plan, plain)))) == len(TITLES)
    assert objects(output) == objects(tmp_path / "loop")
    again = backfill(videos, output)
    assert again.returncode == 0, again.stdout + again.stderr
    assert objects(output) == objects(tmp_path / "loop")
    summary = json.loads((output / "run-summary.json").read_text())
    assert (summary["backfill"]["planned"], summary["titles"]["skipped"]) == (0, len(TITLES))
    assert summary["backfill"]["pace_video_hours_per_hour"] > 0
    checked = subprocess.run(
        [sys.executable, "-m", "jobs.verify_dataset", f"output.uri={output}"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(objects(output))} objects checked" in checked.stdout


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_finishes_what_is_begun_and_takes_no_more(videos, tmp_path):
    many, output = tmp_path / "videos", tmp_path / "out"
    many.mkdir()
    for number in range(20):
        shutil.copy(videos / "newest.mp4", many / f"{number:02d}.mp4")
    assert kill_after(command(many, output), output, after_objects=1, number=signal.SIGTERM) == 0
    part = json.loads((output / "run-summary.json").read_text())["backfill"]
    assert part["ended_by"] == "SIGTERM"
    assert part["ok"] >= 1
    assert part["left"] >= 1
    assert part["ok"] + part["left"] == part["planned"] == 20
    assert len(list(output.glob("*/shots/*/*.parquet"))) == part["ok"]
    assert not list(output.glob("*/failures/*/*"))
    assert not [name for name in objects(output) if name.startswith("leases/")], "the lease is given back"
