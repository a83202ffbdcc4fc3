"""The GPU benchmark, with tiny shapes on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main, random_transnet
from mediafm_ray.media.card import is_visible
from mediafm_ray.models import weights
from mediafm_ray.models.loading import load_state
from mediafm_ray.models.options import DetectorConfig

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "av", "omegaconf", "pyarrow", "fsspec", "openai", "lance")  # a GPU machine may lack them
PROGRAM = "import runpy, sys; sys.modules.update(dict.fromkeys({absent!r})); runpy.run_module('benchmarks.gpu', run_name='__main__')"


@pytest.mark.slow
def test_it_runs_with_torch_and_transformers_alone_and_writes_what_it_prints(tmp_path):
    parts = ["clip", "wav2vec2", "inference", "training", "memory"]
    command = [sys.executable, "-c", PROGRAM.format(absent=ABSENT), "--device", "cpu", "--quick", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(
        [*command, "--profile", "--only", *parts],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["failed"] == {}
    assert {name.split(",")[0] for name in written["profiles"]} == {"clip", "wav2vec2", "inference", "training"}
    assert all("kernels and copies take" in lines[0] and len(lines) > 1 for lines in written["profiles"].values())
    assert written["left_out"] == {"memory": "needs a GPU"}
    assert {row["name"].split(",")[0] for row in written["rows"]} == {"clip", "wav2vec2", "inference", "contextualised titles", "training"}
    for row in written["rows"]:
        assert row["name"] in done.stdout
        assert row["speed"] > 0
        assert row["cosine"] is None or row["cosine"] > 0.9999  # one and the same arithmetic: any difference is the program's


def test_the_random_detector_has_the_shapes_of_the_published_one(tmp_path):
    random_transnet(tmp_path / "random.pth")
    random, published = (load_state(path) for path in (tmp_path / "random.pth", weights.resolve(DetectorConfig.weights)))
    assert {name: tensor.shape for name, tensor in random.items()} == {
        name: tensor.shape for name, tensor in published.items() if not name.endswith("num_batches_tracked")
    }
    assert all(torch.isfinite(tensor).all() for tensor in random.values())


def test_decoding_is_measured_where_pyav_is(capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["--device", "cpu", "--quick", "--only", "decoding", "reader"]) == 0
    finally:
        torch.set_num_threads(threads)
    told = capsys.readouterr().out
    assert "decoding, CPU, 1 thread" in told
    assert "reading process, cuda" in told
    if not is_visible():
        assert "decoding on the card: left out (h264_cuvid cannot be opened" in told
        assert "by the CPU; 30 pictures; decoded on the CPU" in told
