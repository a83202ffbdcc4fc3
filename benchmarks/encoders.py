"""How fast the MediaFM encoders are, beside the plain transformers loop on the same machine. Imports no ray and no av.

    python -m benchmarks.encoders                      # on a GPU where there is one, else on the CPU
    python -m benchmarks.encoders --device cpu --frames 8 --audio-seconds 60

Weights are random, in the full architectures of CLIP ViT-L/14 and wav2vec2-base: the arithmetic is that of the published ones. A
"plain loop" calls the checkpoint's own processor and the float32 model, one shot after the other. Rounds of both alternate, and
the median round counts. Share of matmul: the network's multiply-adds a second against a large square product in the same precision.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=0, help="frames a round; 0 = 4096 on a GPU, 8 on a CPU")
    parser.add_argument("--audio-seconds", type=float, default=0, help="seconds of sound a round; 0 = 7200 on a GPU, 40 on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    on_gpu = arguments.device != "cpu"
    precision = "bfloat16" if on_gpu else "float32"
    frames = arguments.frames or (4096 if on_gpu else 8)
    seconds = arguments.audio_seconds or (7200 if on_gpu else 40)
    rate = matmul_rate(arguments.device, precision)
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}  {name}  torch {torch.__version__}  {precision} matmul {rate / 1e12:.2f} TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        measure_video(Path(folder) / "clip", arguments.device, precision, frames, arguments.rounds, rate)
        measure_audio(Path(folder) / "wav2vec2", arguments.device, precision, seconds, arguments.rounds, rate)


def measure_video(folder: Path, device: str, precision: str, frames: int, rounds: int, rate: float) -> None:
    save_seeded(folder, lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_L_14)))
    write_json(folder / "preprocessor_config.json", {**CLIP_PIXELS, "size": 224, "crop_size": 224})
    shots = [[jpeg(seed) for seed in range(first, first + FRAMES_PER_SHOT)] for first in range(0, frames, FRAMES_PER_SHOT)]
    ours = ClipEncoder(VideoEncoderConfig(encoder="clip", weights=str(folder), device=device, precision=precision))
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with quiet_transformers():
        plain = CLIPVisionModelWithProjection.from_pretrained(folder).eval().to(device)

    def plain_loop() -> np.ndarray:
        rows = []
        for shot in shots:
            pixels = processor([Image.open(io.BytesIO(frame)) for frame in shot], return_tensors="pt")["pixel_values"].float()
            with torch.inference_mode():
                rows.append(plain(pixels.to(device)).image_embeds.mean(dim=0).cpu().numpy())
        return np.stack(rows)

    decoded = [np.asarray(Image.open(io.BytesIO(frame))) for frame in shots[0]] * max(1, min(frames, 512) // FRAMES_PER_SHOT)
    flops = count_flops(lambda: plain(torch.zeros(1, 3, 224, 224, device=device)))
    report(
        "CLIP ViT-L/14",
        "frames",
        frames,
        timed(lambda: ours.encode(shots).embeddings_SD, plain_loop, rounds),
        flops,
        rate,
        hours=SHOT_SECONDS / FRAMES_PER_SHOT,
    )
    if device != "cpu":  # the network without decoding and resizing: what the device itself reaches
        ours.micro_batches.compute(ours._embed_frames, decoded)
        start = time.perf_counter()
        ours.micro_batches.compute(ours._embed_frames, decoded)
        alone = len(decoded) / (time.perf_counter() - start)
        print(
            f"    frames decoded beforehand: {alone:.0f} frames/s, {alone * flops / rate:.0%} of matmul, {ours.micro_batches.size} at once"
        )


def measure_audio(folder: Path, device: str, precision: str, seconds: float, rounds: int, rate: float) -> None:
    save_seeded(folder, lambda: Wav2Vec2Model(Wav2Vec2Config()))
    write_json(folder / "preprocessor_config.json", WAV2VEC2_SAMPLES)
    lengths = np.random.default_rng(0).uniform(1, 2 * SHOT_SECONDS - 1, size=max(1, round(seconds / SHOT_SECONDS)))
    sounds = [
        (np.random.default_rng(seed).normal(size=round(length * SAMPLE_RATE)) * 3000).astype("<i2") for seed, length in enumerate(lengths)
    ]
    total = sum(len(sound) for sound in sounds) / SAMPLE_RATE
    ours = Wav2Vec2Encoder(AudioEncoderConfig(encoder="wav2vec2", weights=str(folder), device=device, precision=precision))
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    with quiet_transformers():
        plain = Wav2Vec2Model.from_pretrained(folder).eval().to(device)
        counted = Wav2Vec2Model.from_pretrained(folder).eval().to(device)
    remove_parametrizations(counted.encoder.pos_conv_embed.conv, "weight")  # the counter cannot look through them

    def plain_loop() -> np.ndarray:
        rows = []
        for sound in sounds:
            inputs = extractor(sound / 32768, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_values"].float()
            with torch.inference_mode():
                rows.append(plain(inputs.to(device)).last_hidden_state[0].mean(dim=0).cpu().numpy())
        return np.stack(rows)

    flops = count_flops(lambda: counted(torch.zeros(1, round(SHOT_SECONDS * SAMPLE_RATE), device=device))) / SHOT_SECONDS
    shots = [sound.tobytes() for sound in sounds]
    times = timed(lambda: ours.encode(shots).embeddings_SD, plain_loop, rounds)
    report("wav2vec2-base", "seconds", total, times, flops, rate, hours=1.0)


def report(name: str, unit: str, amount: float, measured: tuple[float, float, float], flops: float, rate: float, hours: float) -> None:
    """``flops`` are of one unit; ``hours`` is the length of video that one unit stands for, in seconds."""
    ours_s, plain_s, cosine = measured
    speed = amount / ours_s
    print(
        f"{name}: {speed:.1f} {unit}/s, {plain_s / ours_s:.2f} times the plain float32 loop, {speed * flops / rate:.0%} of matmul, "
        f"{speed * hours:.1f} hours of video an hour; least cosine with the plain loop {cosine:.6f}"
    )


def timed(ours: Callable[[], np.ndarray], plain: Callable[[], np.ndarray], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, alternating after one round to warm up, and the least cosine between their embeddings."""
    first, second = ours(), plain()
    cosine = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for times, function in zip(taken, (ours, plain), strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return statistics.median(taken[0]), statistics.median(taken[1]), float(cosine.min())


def matmul_rate(device: str, precision: str) -> float:
    """Floating-point operations a second of a large square product: the best of several."""
    size = 8192 if device != "cpu" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    best = 0.0
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5 if device != "cpu" else 1):
            left @ right
        synchronize(device)
        best = max(best, 2 * size**3 * (5 if device != "cpu" else 1) / (time.perf_counter() - start))
    return best


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def count_flops(call: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products and convolutions of one call."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def jpeg(seed: int) -> bytes:
    height, width = FRAME_SIZE
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
