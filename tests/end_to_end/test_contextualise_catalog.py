"""Contextualising a stored catalog, killed in the middle and run again."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.stored_titles import commit_title, make_model
from mediafm_ray.models.tiny import make_contextualiser
from tests.end_to_end.clips import ROOT, objects, run_job

MODEL = make_model("0123456789ab", video=192, audio=192, text=192)
TITLES = 40


@pytest.mark.slow
def test_a_killed_driver_and_a_rerun_give_the_same_bytes(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    make_contextualiser(checkpoint, fused_dim=MODEL.dims["fused"], metadata_dim=192, hidden_size=384, num_hidden_layers=6)
    outputs = [tmp_path / "undisturbed", tmp_path / "killed"]
    for number in range(TITLES):
        vectors = np.random.default_rng(number).normal(size=(300, MODEL.dims["fused"])).astype(np.float32)
        for output in outputs:
            commit_title(str(output), MODEL, f"title {number}", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    arguments = [[f"output.uri={output}", f"contextualiser.checkpoint={checkpoint}", "contextualiser.read_mb=1"] for output in outputs]
    whole = run_job("contextualise_catalog", *arguments[0])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    command = [sys.executable, "-m", "jobs.contextualise_catalog", *arguments[1]]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(outputs[1].glob("*/contextual-*/*/*.parquet")):
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    rerun = run_job("contextualise_catalog", *arguments[1])
    assert rerun.returncode == 0, rerun.stdout + rerun.stderr
    assert "0 contextualised before" not in rerun.stdout
    assert objects(outputs[1]) == objects(outputs[0])
