"""A local Ray starts where little can be written, and what its actors cannot work with reaches the driver."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mediafm_ray.pipeline.cluster import MAX_SILENCE_S, StarvationClock, room_for
from mediafm_ray.runs.command import EXIT_BAD_INPUT
from tests.end_to_end.clips import embed, make_clip

ROOT = Path(__file__).parents[2]
PROGRAM = """
import ray
from mediafm_ray.config.sections import ResourcesConfig
from mediafm_ray.pipeline.cluster import connected

with connected(ResourcesConfig()):
    print(ray.get(ray.remote(lambda: "well").remote()))
"""


@pytest.mark.integration
def test_without_a_home_that_can_be_written(tmp_path):
    home = tmp_path / "a file"
    home.write_text("no folder can be made below it, whoever asks")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env={**environment, "HOME": str(home)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["well"]


@pytest.mark.integration
@pytest.mark.parametrize("fault", ["device", pytest.param("weights", marks=pytest.mark.slow)])
def test_what_an_actor_cannot_work_with_ends_the_job_in_one_line_without_advice_to_repeat_it(tmp_path, fault):
    video = make_clip(tmp_path / "videos" / "one.mp4", [30])
    if fault == "device":
        override, reason = "detector.device=cuda:99", "device 'cuda:99': this process sees "
    else:
        torch.save({"conv": torch.zeros(3)}, tmp_path / "other.pth")
        override, reason = f"video.weights={tmp_path}/other.pth", f"{tmp_path}/other.pth does not hold the weights of EfficientNet-Lite0"
    done = embed(video.parent, tmp_path / "out", override)
    assert done.returncode == EXIT_BAD_INPUT, done.stdout + done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "core_worker.cc" not in line]  # that is in every run
    assert len(said) == 2, said
    assert said[0].startswith("dataset version")
    assert said[1].startswith(f"error: stage {'detect_shots' if fault == 'device' else 'encode_video'}: {reason}")
    assert "again" not in said[1]
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_waiting_is_said_after_a_minute_then_at_doubling_intervals_and_anew_after_progress():
    now = [0.0]
    clock = StarvationClock(lambda: now[0])
    said = []
    for second in range(4 * 3600):
        now[0] = float(second)
        if clock.is_due(waits=second != 700):
            said.append(second)
    assert said[:6] == [60, 120, 240, 480, 761, 821]
    assert max(later - earlier for earlier, later in itertools.pairwise(said)) <= MAX_SILENCE_S


def test_the_reason_of_waiting_names_the_resource():
    def node(alive=True, **resources):
        return {"Alive": alive, "Resources": resources}

    wanted = {"CPU": 4, "GPU": 1}
    apart = room_for(wanted, [node(CPU=8), node(CPU=2, GPU=1), node(alive=False, CPU=8, GPU=8)], {"CPU": 10, "GPU": 1})
    assert "an actor needs 4 CPU and 1 GPU, and no node of the cluster has that (at most 8 CPU, 1 GPU on one)" in apart
    assert "lower what the stage asks for" in apart
    taken = room_for(wanted, [node(CPU=8, GPU=2), node(CPU=8, GPU=2)], {"CPU": 15})
    assert "free are 15 of 16 CPU, 0 of 4 GPU: other jobs or stages hold the rest" in taken
    assert "at most 0 CPU" in room_for({"CPU": 1}, [], {})


@pytest.mark.slow
def test_a_local_ray_without_the_nodes_that_a_stage_is_kept_to_refuses_at_once(tmp_path):
    video = make_clip(tmp_path / "videos" / "one.mp4", [30])
    done = embed(video.parent, tmp_path / "out", "resources.encode_video.node_resource=decoder")
    assert done.returncode == EXIT_BAD_INPUT, done.stdout + done.stderr
    assert "error: resources.encode_video.node_resource=decoder: a local Ray has no such resource; leave it empty" in done.stderr
