"""CLIP and SigLIP towers: against the checkpoint's own image processor, the plain transformers loop, and CLIP's own transformer block."""

from __future__ import annotations

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, CLIPTextConfig
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from mediafm_ray.models import encoder, tiny, weights
from mediafm_ray.models.clip import ClipEncoder, fold_quick_gelu
from mediafm_ray.models.loading import MicroBatches, Workers, fitting_size
from mediafm_ray.models.options import VideoEncoderConfig
from mediafm_ray.models.pixels import decode_jpeg, prepare, read_pixel_recipe

SIZES = [
    (180, 320),
    (256, 455),
    (455, 256),
    (64, 64),
    (480, 640),
    (61, 97),
    (33, 40),
    (1080, 1920),
    (140, 90),
    (141, 90),
    (30, 300),
    (300, 30),
    (192, 128),
    (193, 128),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    made = {"clip": tiny.make_clip, "siglip": tiny.make_siglip, "temporal": tiny.make_temporal}
    for name, make in made.items():
        make(root / name)
    return {name: root / name for name in made}


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Coarse colours under fine noise: something for the filter at every scale."""
    generator = np.random.default_rng(seed)
    coarse = np.asarray(Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height)))
    return (coarse.astype(int) + generator.integers(-40, 40, coarse.shape)).clip(0, 255).astype(np.uint8)


def jpeg(seed: int, height: int = 90, width: int = 160) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, height, width)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def build(folder: Path, temporal: str = "", **options: str) -> ClipEncoder:
    return ClipEncoder(VideoEncoderConfig(encoder="clip", weights=str(folder), temporal_weights=temporal, threads=2, **options))


# ----------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("resample", [2, 3])
def test_pixels_agree_with_the_checkpoints_image_processor(
    folders: dict[str, Path], tmp_path: Path, name: str, height: int, width: int, resample: int
) -> None:
    config = {**json.loads((folders[name] / "preprocessor_config.json").read_text()), "resample": resample}
    if name == "clip":
        config.update(size=48, crop_size=40)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    frames = [picture(seed, height, width) for seed in (1, 2)]
    expected = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(
        [Image.fromarray(frame) for frame in frames], return_tensors="pt"
    )
    ours = prepare(torch.from_numpy(np.stack(frames)), read_pixel_recipe(tmp_path))
    torch.testing.assert_close(ours, expected["pixel_values"].float(), rtol=0, atol=1e-5)  # a byte off would be 0.014


def test_preprocessing_that_is_not_known_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    good = json.loads((folders["clip"] / "preprocessor_config.json").read_text())
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(weights.WeightsError, match=r"no preprocessor_config\.json"):
        read_pixel_recipe(tmp_path)
    bad = (
        {"resample": 1},
        {"crop_size": 80},
        {"do_normalize": False},
        {"image_mean": [0.5]},
        {"do_center_crop": False},
        {"size": {"max_height": 9}},
    )
    for change in bad:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(weights.WeightsError, match="cannot be followed"):
            read_pixel_recipe(tmp_path)


# ----------------------------------------------------------------------------------------------------------- towers


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_embeddings_agree_with_the_plain_transformers_loop(folders: dict[str, Path], name: str) -> None:
    shots = [[jpeg(1), jpeg(2), jpeg(3)], [jpeg(4, 200, 90)]]
    processor, model = AutoImageProcessor.from_pretrained(folders[name], backend="pil"), AutoModel.from_pretrained(folders[name]).eval()
    expected = []
    for frames in shots:
        pixels = processor([Image.open(io.BytesIO(frame)).convert("RGB") for frame in frames], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = model.get_image_features(pixel_values=pixels.float())
        expected.append(getattr(features, "pooler_output", features).mean(dim=0).numpy())
    built = build(folders[name])
    assert built.dim == encoder.encoder_dim(VideoEncoderConfig(encoder="clip", weights=str(folders[name]))) == 768
    ours = built.encode(shots).embeddings_SD
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_frames_that_share_a_batch_have_the_numbers_they_have_alone(folders: dict[str, Path]) -> None:
    """The way of a GPU: frames of different sizes and shots in common micro-batches."""
    shots = [[jpeg(1), jpeg(2)], [], [jpeg(3, 200, 90)], [jpeg(4), jpeg(5, 64, 64), jpeg(6)], [jpeg(7), jpeg(8)]]
    built = build(folders["clip"], str(folders["temporal"]))
    alone = built.encode(shots)
    built.alone = False
    built.micro_batches = MicroBatches(built.device, 3)
    together = built.encode(shots)
    assert together.present_S.tolist() == alone.present_S.tolist()
    np.testing.assert_allclose(together.embeddings_SD, alone.embeddings_SD, rtol=1e-4, atol=1e-4)


def test_the_activation_that_a_gpu_computes_in_one_pass_gives_the_same(folders: dict[str, Path]) -> None:
    shots = [[jpeg(1), jpeg(2, 200, 90)], [jpeg(3)]]
    built = build(folders["clip"])
    expected = built.encode(shots).embeddings_SD
    fold_quick_gelu(built.tower)
    assert not any(isinstance(module, QuickGELUActivation) for module in built.tower.modules())
    found = built.encode(shots).embeddings_SD
    assert (found != expected).any()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32(folders: dict[str, Path]) -> None:
    shots = [[jpeg(seed)] for seed in range(4)]
    exact, coarse = (build(folders["clip"], precision=precision).encode(shots).embeddings_SD for precision in ("float32", "bfloat16"))
    cosine = (exact * coarse).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(coarse, axis=1)
    assert (cosine > 0.995).all()
    assert (exact != coarse).any()


# ------------------------------------------------------------------------------------------------------------- time


def test_the_temporal_transformer_is_clips_block_with_a_residual(folders: dict[str, Path]) -> None:
    built = build(folders["clip"], str(folders["temporal"]))
    temporal = built.temporal
    config = CLIPTextConfig(hidden_size=768, intermediate_size=4 * 768, num_attention_heads=12, hidden_act="quick_gelu")
    config._attn_implementation = "eager"
    reference = CLIPEncoderLayer(config).eval()
    block = temporal.transformerClip["resblocks"][0]
    with torch.no_grad():
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            getattr(reference.self_attn, name).weight.copy_(block.attn.in_proj_weight.chunk(3)[index])
            getattr(reference.self_attn, name).bias.copy_(block.attn.in_proj_bias.chunk(3)[index])
        reference.self_attn.out_proj.load_state_dict(block.attn.out_proj.state_dict())
        reference.layer_norm1.load_state_dict(block.ln_1.state_dict())
        reference.layer_norm2.load_state_dict(block.ln_2.state_dict())
        reference.mlp.fc1.load_state_dict(block.mlp.c_fc.state_dict())
        reference.mlp.fc2.load_state_dict(block.mlp.c_proj.state_dict())
        frames = torch.tensor(np.random.default_rng(0).normal(size=(2, 5, 768)), dtype=torch.float32)
        hidden = reference(frames + temporal.frame_position_embeddings.weight[:5], attention_mask=None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        torch.testing.assert_close(temporal(frames), (hidden + frames).mean(dim=1), rtol=0, atol=1e-4)


def test_order_matters_to_the_temporal_transformer_and_not_to_the_mean(folders: dict[str, Path]) -> None:
    frames = [jpeg(seed) for seed in range(4)]
    for temporal, differs in (("", False), (str(folders["temporal"]), True)):
        forth, back = build(folders["clip"], temporal).encode([frames, frames[::-1]]).embeddings_SD
        assert (np.abs(forth - back).max() > 1e-3) == differs


def test_the_temporal_weights_are_part_of_the_digest(folders: dict[str, Path]) -> None:
    mean = VideoEncoderConfig(encoder="clip", weights=str(folders["clip"]))
    temporal = VideoEncoderConfig(encoder="clip", weights=str(folders["clip"]), temporal_weights=str(folders["temporal"]))
    assert encoder.weights_digest(mean) == weights.digest(str(folders["clip"]))
    assert encoder.weights_digest(temporal) != encoder.weights_digest(mean)


def test_more_frames_than_positions(folders: dict[str, Path]) -> None:
    built = build(folders["clip"], str(folders["temporal"]))
    with pytest.raises(ValueError, match=r"65 frames is longer.*64.*frames\.per_shot"):
        built.encode([[jpeg(0, 8, 8)] * 65])


# ----------------------------------------------------------------------------------------------------------- errors


def test_wrong_weights_and_options_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny.make_bert(tmp_path / "bert")
    with pytest.raises(weights.WeightsError, match="'bert' checkpoint; the clip encoder takes clip, "):
        build(tmp_path / "bert")
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, is 'half'"):
        build(folders["clip"], precision="half")
    with pytest.raises(weights.WeightsError, match="gives no"):
        encoder.encoder_dim(VideoEncoderConfig(encoder="clip", weights=str(tmp_path / "bert")))
    with pytest.raises(ValueError, match=r"frame of shot 1 .*is not a JPEG"):
        build(folders["clip"]).encode([[jpeg(0)], [b"no picture"]])


# ---------------------------------------------------------------------------------------------------- micro-batches


class Device:
    """A device that holds so many items at once, and counts what it was asked to compute."""

    def __init__(self, holds: int) -> None:
        self.holds = holds
        self.asked: list[int] = []

    def __call__(self, items: list[int]) -> list[int]:
        self.asked.append(len(items))
        if len(items) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [item * item for item in items]


def test_out_of_memory_halves_the_micro_batch_and_nothing_is_lost() -> None:
    device, batches = Device(holds=5), MicroBatches(torch.device("cpu"), 16)
    assert batches.compute(device, list(range(30))) == [item * item for item in range(30)]
    assert device.asked == [16, 8, 4, 4, 4, 4, 4, 4, 4, 2]
    assert batches.size == 4  # remembered for the next title


def test_items_that_count_for_more_fill_a_micro_batch_sooner() -> None:
    device, batches = Device(holds=3), MicroBatches(torch.device("cpu"), 60)
    lengths = [20] * 4 + [10] * 8 + [1]
    assert batches.compute(device, lengths, counts=lambda length: length) == [length**2 for length in lengths]
    assert device.asked == [
        3,
        3,
        6,
        3,
        3,
        1,
    ]  # the second is padded to 20; six are too many: 30 from then on


def test_an_item_that_does_not_fit_alone_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        MicroBatches(torch.device("cpu"), 4).compute(Device(holds=0), [1, 2, 3])


def test_other_errors_are_not_retried() -> None:
    def fails(items: list[int]) -> list[int]:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        MicroBatches(torch.device("cpu"), 4).compute(fails, [1, 2, 3])


def test_the_measured_size_fits() -> None:
    gigabyte = 10**9
    assert fitting_size(taken=gigabyte, items=8, free=80 * gigabyte, share=0.6, most=1024) == 256  # 384 fit
    assert fitting_size(taken=gigabyte, items=8, free=gigabyte // 10, share=0.6, most=1024) == 1
    assert fitting_size(taken=0, items=8, free=gigabyte, share=0.6, most=512) == 512


def test_calls_at_once_leave_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    seen = []
    with ThreadPoolExecutor(4) as pool:
        for workers in (Workers(1), Workers(3)) * 3:
            pool.submit(workers.map, lambda item: (time.sleep(0.01 * item), seen.append(torch.get_num_threads())), [1, 2, 3])
    assert seen == [1] * 18
    assert torch.get_num_threads() == before


def test_a_device_is_fed_in_order_and_no_thread_is_at_work_meanwhile() -> None:
    workers = Workers(2)
    at_work: set[int] = set()
    groups: list[list[int]] = []

    def prepare(item: int) -> int:
        at_work.add(item)
        time.sleep(0.002)
        at_work.discard(item)
        return item + 1

    def launch(prepared: list[int]) -> list[int]:
        time.sleep(0.005)
        assert not at_work
        groups.append(prepared)
        return [10 * item for item in prepared]

    assert workers.feed(prepare, list(range(10)), 4, launch) == [10 * item for item in range(1, 11)]
    assert groups == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert workers.feed(prepare, [], 4, launch) == []
    with pytest.raises(ZeroDivisionError):
        workers.feed(lambda item: 1 // item, [2, 1, 0, 1], 2, list)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_decoded_frame_is_pillows_own_whatever_was_decoded_before(mode: str) -> None:
    for seed, (height, width) in enumerate([(90, 160), (64, 64), (480, 640), (90, 160)]):
        buffer = io.BytesIO()
        Image.fromarray(picture(seed, height, width)).convert(mode).save(buffer, "JPEG")
        np.testing.assert_array_equal(decode_jpeg(buffer.getvalue(), 0), np.array(Image.open(buffer).convert("RGB")))
