"""A Ray of our own starts where little can be written."""

import os
import subprocess
import sys
from pathlib import Path

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
