"""Benchmark of the MediaFM encoders on a CPU, compared with a plain transformers loop. Imports no ray and no av.

    python -m benchmarks.encoders [--frames 8] [--audio-seconds 40]

Weights are random, in the full architectures of CLIP ViT-L/14 and wav2vec2-base: the arithmetic is that of the published ones. A
"plain loop" calls the checkpoint's own processor and the float32 model, one shot after the other. Rounds of both alternate, and the
median round counts. Share of matmul: multiply-adds per second of the network, over those of a large square product in that precision.
For a GPU see benchmarks.gpu.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from mediafm_ray.models.clip import ClipEncoder
from mediafm_ray.models.loading import quiet_transformers
from mediafm_ray.models.options import AudioEncoderConfig, VideoEncoderConfig
from mediafm_ray.models.tiny import CLIP_PIXELS, WAV2VEC2_SAMPLES, save_seeded, write_json
from mediafm_ray.models.wav2vec2 import Wav2Vec2Encoder
from mediafm_ray.spec import SAMPLE_RATE

FRAMES_PER_SHOT = 8
SHOT_SECONDS = 5.0  # of an average shot, for hours of video an hour
FRAME_SIZE = (256, 455)  # height, width of a sampled frame
VIT_L_14: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 768,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=8, help="frames a round")
    parser.add_argument("--audio-seconds", type=float, default=40, help="seconds of sound a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rate = matmul_rate("cpu", torch.float32, 2048)
    name = f"CPU, {torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}  {name}  torch {torch.__version__}  float32 matmul {rate / 1e12:.2f} TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        measure_video(Path(folder) / "clip", arguments.frames, arguments.rounds, rate)
        measure_audio(Path(folder) / "wav2vec2", arguments.audio_seconds, arguments.rounds, rate)


def measure_video(folder: Path, frames: int, rounds: int, rate: float) -> None:
    save_clip(folder, VIT_L_14)
    shots = shots_of(jpegs(frames))
    ours = ClipEncoder(VideoEncoderConfig(encoder="clip", weights=str(folder)))
    plain = PlainClip(folder, "cpu")
    times = timed(lambda: ours.encode(shots).embeddings_SD, lambda: plain(shots), rounds)
    report("CLIP ViT-L/14", "frames", frames, times, plain.flops_of_a_frame(), rate, hours=SHOT_SECONDS / FRAMES_PER_SHOT)


def measure_audio(folder: Path, seconds: float, rounds: int, rate: float) -> None:
    save_wav2vec2(folder, Wav2Vec2Config())
    sounds = random_sounds(max(1, round(seconds / SHOT_SECONDS)))
    total = sum(len(sound) for sound in sounds) / SAMPLE_RATE
    ours = Wav2Vec2Encoder(AudioEncoderConfig(encoder="wav2vec2", weights=str(folder)))
    plain = PlainWav2Vec2(folder, "cpu")
    shots = [sound.tobytes() for sound in sounds]
    times = timed(lambda: ours.encode(shots).embeddings_SD, lambda: plain(sounds), rounds)
    report("wav2vec2-base", "seconds", total, times, flops_of_a_second(folder, "cpu"), rate, hours=1.0)


# ------------------------------------------------------------------------------------------------- models and inputs


def save_clip(folder: Path, shape: dict[str, Any]) -> None:
    """Write a CLIP image tower with random weights, and its preprocessor config."""
    save_seeded(folder, lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**shape)))
    write_json(folder / "preprocessor_config.json", {**CLIP_PIXELS, "size": shape["image_size"], "crop_size": shape["image_size"]})


def save_wav2vec2(folder: Path, shape: Wav2Vec2Config) -> None:
    save_seeded(folder, lambda: Wav2Vec2Model(shape))
    write_json(folder / "preprocessor_config.json", WAV2VEC2_SAMPLES)


class PlainClip:
    """Run the plain loop: Pillow, the checkpoint's processor and the float32 model, shot by shot."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        with quiet_transformers():
            self.model = CLIPVisionModelWithProjection.from_pretrained(folder).eval().to(device)

    @torch.inference_mode()
    def __call__(self, shots: Sequence[Sequence[bytes]]) -> np.ndarray:
        rows = []
        for shot in shots:
            pixels = self.processor([Image.open(io.BytesIO(frame)) for frame in shot], return_tensors="pt")["pixel_values"].float()
            rows.append(self.model(pixels.to(self.device)).image_embeds.mean(dim=0).cpu().numpy())
        return np.stack(rows)

    def flops_of_a_frame(self) -> float:
        size = self.model.config.image_size
        return count_flops(lambda: self.model(torch.zeros(1, 3, size, size, device=self.device)))


class PlainWav2Vec2:
    """Run the plain loop: the checkpoint's feature extractor and the float32 model, sound by sound."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        self.extractor = AutoFeatureExtractor.from_pretrained(folder)
        with quiet_transformers():
            self.model = Wav2Vec2Model.from_pretrained(folder).eval().to(device)

    @torch.inference_mode()
    def __call__(self, sounds: Sequence[np.ndarray]) -> np.ndarray:
        rows = []
        for sound in sounds:
            inputs = self.extractor(sound / 32768, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_values"].float()
            rows.append(self.model(inputs.to(self.device)).last_hidden_state[0].mean(dim=0).cpu().numpy())
        return np.stack(rows)


def flops_of_a_second(folder: Path, device: str) -> float:
    """Return the floating-point operations of a wav2vec2 checkpoint per second of an average shot."""
    with quiet_transformers():
        counted = Wav2Vec2Model.from_pretrained(folder).eval().to(device)
    remove_parametrizations(counted.encoder.pos_conv_embed.conv, "weight")  # the counter cannot look through them
    return count_flops(lambda: counted(torch.zeros(1, round(SHOT_SECONDS * SAMPLE_RATE), device=device))) / SHOT_SECONDS


def jpegs(count: int) -> list[bytes]:
    """Return different pictures of the size of a sampled frame."""
    height, width = FRAME_SIZE
    encoded = []
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def shots_of(frames: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [frames[first : first + FRAMES_PER_SHOT] for first in range(0, len(frames), FRAMES_PER_SHOT)]


def random_sounds(count: int) -> list[np.ndarray]:
    """Return noise of 1 s to 9 s, 5 s on average, as int16 samples."""
    lengths = np.random.default_rng(0).uniform(1, 2 * SHOT_SECONDS - 1, size=count)
    return [
        (np.random.default_rng(seed).normal(size=round(length * SAMPLE_RATE)) * 3000).astype("<i2") for seed, length in enumerate(lengths)
    ]


# --------------------------------------------------------------------------------------------------------- measuring


def report(name: str, unit: str, amount: float, measured: tuple[float, float, float], flops: float, rate: float, hours: float) -> None:
    """Print a row. ``flops`` are of one unit; ``hours`` is the length of video per unit, in seconds."""
    ours_s, plain_s, cosine = measured
    speed = amount / ours_s
    print(
        f"{name}: {speed:.1f} {unit}/s, {plain_s / ours_s:.2f} times the plain float32 loop, {speed * flops / rate:.0%} of matmul, "
        f"{speed * hours:.1f} hours of video an hour; least cosine with the plain loop {cosine:.6f}"
    )


def timed(ours: Callable[[], np.ndarray], plain: Callable[[], np.ndarray], rounds: int) -> tuple[float, float, float]:
    """Return the median seconds of both, alternating after a warm-up round, and the minimum cosine of their embeddings."""
    cosine = least_cosine(ours(), plain())
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for times, function in zip(taken, (ours, plain), strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return statistics.median(taken[0]), statistics.median(taken[1]), cosine


def least_cosine(first_SD: np.ndarray, second_SD: np.ndarray) -> float:
    """Return the cosines of rows, summed in float64."""
    first_SD, second_SD = first_SD.astype(np.float64), second_SD.astype(np.float64)
    lengths_S = np.linalg.norm(first_SD, axis=1) * np.linalg.norm(second_SD, axis=1)
    return float(((first_SD * second_SD).sum(axis=1) / lengths_S).min())


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Return the floating-point operations per second of a square product, the best of several."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products = 1 if device == "cpu" else 5
    best = 0.0
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            left @ right
        synchronize(device)
        best = max(best, 2 * size**3 * products / (time.perf_counter() - start))
    return best


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def count_flops(call: Callable[[], Any]) -> float:
    """Return the floating-point operations of the matrix products and convolutions of one call."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
