"""A local Ray starts where little can be written, and what its actors cannot work with reaches the driver."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mediafm_ray.pipeline.command import EXIT_BAD_INPUT
from tests.end_to_end.clips import embed, make_clip

ROOT = Path(__file__).parents[2]
PROGRAM = """
import ray
from mediafm_ray.config import ResourcesConfig
from mediafm_ray.pipeline.cluster import connected

with connected(ResourcesConfig()):
    print(ray.get(ray.remote(lambda: "well").remote()))
"""


def test_without_a_home_that_can_be_written(tmp_path):
    home = tmp_path / "a file"
    home.write_text("no folder can be made below it, whoever asks")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env={**environment, "HOME": str(home)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["well"]


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
