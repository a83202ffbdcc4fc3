"""How fast everything that can run on a GPU runs on this one, and whether its numbers are those of the CPU.

    python -m benchmarks.gpu --json gpu.json             # ends within 6 minutes on an H100
    python -m benchmarks.gpu --only clip wav2vec2        # some parts again
    python -m benchmarks.gpu --only training --profile   # and what takes the time in a call
    python -m benchmarks.gpu --device cpu --quick        # tiny shapes: does the program itself work?

Needs torch, transformers and pillow, for decoding PyAV, too, and makes its own inputs; weights are random, in the published
architectures. Parts run in the order of their importance, every row is printed and written as soon as it is measured, and what no time is
left for is named as left out.

Columns
    of matmul   floating-point operations of the network's products and convolutions a second (of training: three forward passes' worth),
                against a large square bfloat16 product measured first
    x plain     speed beside a plain float32 loop on the same device: a shot, a sound, a title or a step at a time
    cosine      the least over embeddings (over gradients, for training), beside float32 on the CPU; of probabilities, which have none,
                1 less the largest difference
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from transformers import Wav2Vec2Config

from benchmarks.encoders import (
    FRAMES_PER_SHOT,
    SHOT_SECONDS,
    VIT_L_14,
    PlainClip,
    PlainWav2Vec2,
    count_flops,
    flops_of_a_second,
    jpegs,
    least_cosine,
    matmul_rate,
    random_sounds,
    save_clip,
    save_wav2vec2,
    shots_of,
    synchronize,
)
from benchmarks.training import FUSED_DIM, METADATA_DIM, plain_step, random_batch, random_title
from mediafm_ray.models.clip import ClipEncoder
from mediafm_ray.models.contextualiser import TitleContextualiser, TitleShots
from mediafm_ray.models.detector import STEP, WINDOW, ShotDetector
from mediafm_ray.models.loading import MicroBatches
from mediafm_ray.models.options import AudioEncoderConfig, ContextualiserConfig, DetectorConfig, VideoEncoderConfig
from mediafm_ray.models.tiny import VISION, make_contextualiser
from mediafm_ray.models.transnet import BLOCKS, DILATIONS, NEIGHBOURS
from mediafm_ray.models.wav2vec2 import Wav2Vec2Encoder
from mediafm_ray.spec import DETECTOR_HEIGHT, DETECTOR_WIDTH, SAMPLE_RATE
from mediafm_ray.training.batches import Batch, TitleVectors
from mediafm_ray.training.optimisers import Optimisers
from mediafm_ray.training.options import ShapeConfig, TrainingConfig
from mediafm_ray.training.trainer import Trainer, new_model

GOALS = {"clip, network": 0.6, "wav2vec2, network": 0.35, "training": 0.4, "inference": 0.5}  # shares of matmul, by a row's beginning
WARM_STEPS = 3
PROFILED = 12  # of the kernels of a call, those that take most
MIN_HALVED_COSINE = 0.999  # embeddings of other micro-batches differ by bfloat16's rounding


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    matmul: int
    clip: Mapping[str, Any]
    frames: int  # of a round of the encoder
    frame_batches: tuple[int, ...]  # of the network alone
    wav2vec2: Mapping[str, Any]  # differs from Wav2Vec2Config's defaults, which are wav2vec2-base
    sounds: int
    sound_batches: tuple[int, ...]
    layers: tuple[int, ...]  # of the contextualisers
    width: int
    shots: int  # of a window
    windows: tuple[int, ...]  # of a training step, and of a call of the network
    titles: int  # contextualised in a round
    detector_windows: int
    detector_frames: int  # compared with the CPU's
    video: tuple[int, int, int]  # width, height, frames
    steps: int  # of training, measured
    most_rounds: int


FULL = Sizes(
    matmul=8192,
    clip=MappingProxyType(VIT_L_14),
    frames=4096,
    frame_batches=(128, 512),
    wav2vec2=MappingProxyType({}),
    sounds=1440,
    sound_batches=(64, 256),
    layers=(3, 12),
    width=768,
    shots=512,
    windows=(32, 128),
    titles=128,
    detector_windows=64,
    detector_frames=2000,  # more than one push
    video=(1920, 1080, 480),
    steps=15,
    most_rounds=5,
)
QUICK = Sizes(
    matmul=128,
    clip=MappingProxyType({**VISION, "projection_dim": 64}),
    frames=16,
    frame_batches=(8,),
    wav2vec2=MappingProxyType({"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 64, "conv_dim": (16,) * 7}),
    sounds=3,
    sound_batches=(2,),
    layers=(1,),
    width=48,
    shots=8,
    windows=(2,),
    titles=2,
    detector_windows=1,
    detector_frames=30,
    video=(640, 360, 30),
    steps=1,
    most_rounds=1,
)


@dataclass
class Row:
    """A line of the table."""

    name: str
    unit: str
    speed: float  # units a second
    share: float | None = None  # of the matmul rate
    times_plain: float | None = None
    cosine: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        def shown(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        goal = next((goal for start, goal in GOALS.items() if self.name.startswith(start)), None)
        told = "" if goal is None or self.share is None else f"goal {goal:.0%}: {'met' if self.share >= goal else 'MISSED'}"
        speed = f"{self.speed:,.1f} {self.unit}"
        parts = [shown(self.share, ".1%"), shown(self.times_plain, ".2f"), shown(self.cosine, ".6f")]
        return [self.name, speed, *parts, "; ".join(part for part in (told, self.note) if part)]


class Bench:
    """A run: what it runs on, and the rows so far."""

    def __init__(self, device: str, sizes: Sizes, folder: Path, minutes: float, target: Path | None, profiling: bool = False) -> None:
        self.device, self.sizes, self.folder, self.target, self.profiling = device, sizes, folder, target, profiling
        self.on_gpu = device != "cpu"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.precision = "bfloat16" if self.on_gpu else "float32"
        self.started = time.perf_counter()
        self.limit_s = minutes * 60
        self.rows: list[Row] = []
        self.failed: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.profiles: dict[str, list[str]] = {}
        self.rate = matmul_rate(device, self.dtype, sizes.matmul)
        self.name = torch.cuda.get_device_name() if self.on_gpu else f"CPU, {torch.get_num_threads()} threads"

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.perf_counter() - self.started)

    def say_head(self) -> None:
        print(f"{time.strftime('%Y-%m-%d')}  {self.name}  torch {torch.__version__}  transformers {transformers.__version__}")
        print(f"{self.precision} matmul of {self.sizes.matmul} x {self.sizes.matmul}: {self.rate / 1e12:.1f} TFLOP/s\n")
        self._line(["", "speed", "of matmul", "x plain", "cosine", ""])

    def row(self, *values: Any, **more: Any) -> None:
        """Print a row, and write all so far."""
        self.rows.append(Row(*values, **more))
        self._line(self.rows[-1].cells())
        self.write()

    def write(self) -> None:
        if self.target is None:
            return
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "device": self.name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "matmul_flops": self.rate,
            "seconds": round(time.perf_counter() - self.started, 1),
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "profiles": self.profiles,
            "left_out": self.left_out,
            "failed": self.failed,
        }
        self.target.write_text(json.dumps(content, indent=1) + "\n")

    def speed(self, call: Callable[[], Any], amount: float, budget_s: float = 4.0) -> float:
        """``amount`` by the median seconds of as many calls as the budget allows, after one to warm up."""
        call()
        synchronize(self.device)
        begin = time.perf_counter()
        taken: list[float] = []
        while not taken or (time.perf_counter() - begin < budget_s and len(taken) < self.sizes.most_rounds):
            start = time.perf_counter()
            call()
            synchronize(self.device)
            taken.append(time.perf_counter() - start)
        return amount / statistics.median(taken)

    def profile(self, name: str, call: Callable[[], Any]) -> None:
        """With --profile: what takes the device's time in one call, how long it is idle, and which lines of the program wait for it."""
        if not self.profiling:
            return
        call()
        synchronize(self.device)
        lines: list[str] = []
        if self.on_gpu:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                call()
                torch.cuda.set_sync_debug_mode("default")
            synchronize(self.device)
            lines = sorted(
                {f"waits at {warning.filename}:{warning.lineno}" for warning in caught if "synchronizing" in str(warning.message)}
            )
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU]) as seen:
            start = time.perf_counter()
            call()
            called_s = time.perf_counter() - start
            synchronize(self.device)
            taken_s = time.perf_counter() - start
        kind, key = (DeviceType.CUDA, "self_device_time_total") if self.on_gpu else (DeviceType.CPU, "self_cpu_time_total")
        kernels = [(getattr(event, key) / 1e6, event.count, event.key) for event in seen.key_averages() if event.device_type == kind]
        busy_s, count = sum(kernel[0] for kernel in kernels), sum(kernel[1] for kernel in kernels)
        head = f"{taken_s * 1e3:.1f} ms, {called_s * 1e3:.1f} ms until it returned; {count} kernels and copies take {busy_s * 1e3:.1f} ms"
        most = [
            f"{seconds / busy_s:6.1%} {seconds * 1e3:9.2f} ms {times:6} x {text:.110}"
            for seconds, times, text in sorted(kernels, reverse=True)[:PROFILED]
        ]
        lines = [head, *lines, *most]
        self.profiles[name] = lines
        print(f"    {name}: " + "\n        ".join(lines), flush=True)

    def _line(self, cells: Sequence[str]) -> None:
        print(f"{cells[0]:46}{cells[1]:>24}{cells[2]:>11}{cells[3]:>9}{cells[4]:>10}  {cells[5]}".rstrip(), flush=True)


# ------------------------------------------------------------------------------------------------------------ encoders


def measure_clip(bench: Bench) -> None:
    """CLIP ViT-L/14: the network, with frames decoded beforehand, and from JPEGs."""
    folder, sizes = bench.folder / "clip", bench.sizes
    save_clip(folder, dict(sizes.clip))
    ours = ClipEncoder(VideoEncoderConfig(encoder="clip", weights=str(folder), device=bench.device, precision=bench.precision))
    reference = ClipEncoder(VideoEncoderConfig(encoder="clip", weights=str(folder)))
    plain = PlainClip(folder, bench.device)
    flops = plain.flops_of_a_frame()
    different = jpegs(min(sizes.frames, 64))
    shots = shots_of(different * (sizes.frames // len(different)))
    few = [shots[0][:4], shots[1][:4]]
    cosine = least_cosine(ours.encode(few).embeddings_SD, reference.encode(few).embeddings_SD)

    for size in sizes.frame_batches:
        pixels = torch.randn(size, 3, sizes.clip["image_size"], sizes.clip["image_size"], device=bench.device, dtype=bench.dtype)
        speed = bench.speed(inferring(ours.tower, pixels), size)
        bench.row(f"clip, network, {size} at once", "frames/s", speed, speed * flops / bench.rate, cosine=cosine)
    bench.profile(f"clip, network, {sizes.frame_batches[-1]} at once", inferring(ours.tower, pixels))
    decoded = [ours._decode(jpeg, 0) for jpeg in different] * max(1, sizes.frame_batches[-1] // len(different))
    ours.micro_batches.compute(ours._embed_frames, decoded)
    speed = bench.speed(lambda: ours.micro_batches.compute(ours._embed_frames, decoded), len(decoded))
    at_once = f"{ours.micro_batches.size} at once"
    bench.row("clip, frames decoded beforehand", "frames/s", speed, speed * flops / bench.rate, note=at_once)
    bench.profile("clip, frames decoded beforehand", lambda: ours.micro_batches.compute(ours._embed_frames, decoded))

    plain_shots = shots[: max(1, len(shots) // 32)]
    plain_speed = bench.speed(lambda: plain(plain_shots), len(plain_shots) * FRAMES_PER_SHOT)
    speed = bench.speed(lambda: ours.encode(shots), sizes.frames)
    note = f"plain {plain_speed:,.0f}; {speed * SHOT_SECONDS / FRAMES_PER_SHOT:,.0f} hours of video an hour"
    bench.row("clip, from JPEGs", "frames/s", speed, speed * flops / bench.rate, speed / plain_speed, cosine, note)
    speed = bench.speed(lambda: ours.workers.map(lambda jpeg: ours._decode(jpeg, 0), different * 8), len(different) * 8)
    bench.row("clip, decoding JPEGs alone", "frames/s", speed, note=f"on the CPU, {ours.workers.threads} threads")


def measure_wav2vec2(bench: Bench) -> None:
    """wav2vec2-base: the network over sounds of 5 s, and the encoder over sounds of 1 to 9 s."""
    folder, sizes = bench.folder / "wav2vec2", bench.sizes
    save_wav2vec2(folder, Wav2Vec2Config(**sizes.wav2vec2))
    ours = Wav2Vec2Encoder(AudioEncoderConfig(encoder="wav2vec2", weights=str(folder), device=bench.device, precision=bench.precision))
    reference = Wav2Vec2Encoder(AudioEncoderConfig(encoder="wav2vec2", weights=str(folder)))
    plain = PlainWav2Vec2(folder, bench.device)
    flops = flops_of_a_second(folder, bench.device)
    different = random_sounds(min(sizes.sounds, 96))
    sounds = different * (sizes.sounds // len(different))
    shots = [sound.tobytes() for sound in sounds]
    seconds = sum(map(len, sounds)) / SAMPLE_RATE
    cosine = least_cosine(ours.encode(shots[:3]).embeddings_SD, reference.encode(shots[:3]).embeddings_SD)

    if ours.norm is not None:
        ours.norm.lengths_B = None  # nothing is padded below
    for size in sizes.sound_batches:
        samples = torch.randn(size, round(SHOT_SECONDS * SAMPLE_RATE), device=bench.device, dtype=bench.dtype)
        speed = bench.speed(inferring(ours.model, samples), size * SHOT_SECONDS)
        bench.row(f"wav2vec2, network, {size} x 5 s at once", "seconds/s", speed, speed * flops / bench.rate, cosine=cosine)
    bench.profile(f"wav2vec2, network, {sizes.sound_batches[-1]} x 5 s at once", inferring(ours.model, samples))
    some = sounds[: max(1, len(sounds) // 24)]
    plain_speed = bench.speed(lambda: plain(some), sum(map(len, some)) / SAMPLE_RATE)
    speed = bench.speed(lambda: ours.encode(shots), seconds)
    note = f"plain {plain_speed:,.0f}; {ours.micro_batches.size} at once"
    bench.row("wav2vec2, samples to embeddings", "seconds/s", speed, speed * flops / bench.rate, speed / plain_speed, cosine, note)


def inferring(network: Any, *inputs: torch.Tensor) -> Callable[[], Any]:
    """A call of the network without gradients, to be timed."""
    return torch.inference_mode()(functools.partial(network, *inputs))


# ------------------------------------------------------------------------------------------------------ contextualiser


class Repeated:
    """One title for all: the GPU's own speed, without reading (training.batches.Titles)."""

    fused_dim, metadata_dim = FUSED_DIM, METADATA_DIM
    spans: Mapping[str, tuple[int, int]] = MappingProxyType({})

    def __init__(self, shots: int) -> None:
        self.title = random_title(shots, 0)
        self.sizes, self.train, self.held_out = np.array([shots]), np.array([0]), np.array([], np.int64)

    def read(self, index: int) -> TitleVectors:
        return self.title


def _shape(sizes: Sizes, layers: int, **changes: Any) -> ShapeConfig:
    heads = sizes.width // 64 or 1
    return ShapeConfig(
        hidden_size=sizes.width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * sizes.width,
        max_shots=sizes.shots,
        **changes,
    )


def _model(shape: ShapeConfig) -> Any:
    return new_model(shape, FUSED_DIM, METADATA_DIM, "", 0)


def _flops_of_a_window(shape: ShapeConfig, device: str) -> float:
    model = _model(shape).eval().to(device)
    one = random_batch(1, shape.max_shots, 0).to(torch.device(device))
    return count_flops(lambda: model(one.fused_BSD, one.metadata_BM))


def _trainer(bench: Bench, shape: ShapeConfig, windows: int, device: str, **options: Any) -> Trainer:
    config = TrainingConfig(objective="recipe", windows_per_step=windows, device=device, held_out_fraction=0.0, **options)
    return Trainer(_model(shape), Repeated(shape.max_shots), config)


def measure_training(bench: Bench, compiled: bool = False) -> None:
    """Steps of the trainer with the recipe's objective, a batch from page-locked memory every time."""
    sizes = bench.sizes
    for layers in sizes.layers:
        shape = _shape(sizes, layers)
        flops = 3 * _flops_of_a_window(shape, bench.device)
        cosine = None if compiled else _cosine_of_gradients(bench, layers)
        plain_speed = None if compiled else _plain_training(bench, shape)
        for windows in sizes.windows[-1:] if compiled else sizes.windows:
            trainer = _trainer(bench, shape, windows, bench.device, compile=compiled)
            batch = random_batch(windows, shape.max_shots, 1)
            batch = batch.pinned() if bench.on_gpu else batch
            how = _made_to_work(trainer, batch) if compiled else ""
            speed = _steps_speed(bench, functools.partial(trainer.step, batch)) * windows
            name = f"training{' compiled' if compiled else ''}, {layers} x {sizes.width}, {windows} windows"
            times_plain = None if plain_speed is None else speed / plain_speed
            bench.row(name, "windows/s", speed, speed * flops / bench.rate, times_plain, cosine, how)
            bench.profile(name, functools.partial(trainer.step, batch))
            del trainer


def _made_to_work(trainer: Trainer, batch: Batch) -> str:
    """The first step of a compiled network, which compiles it; where that fails, for one length of windows. Returns which it was."""
    try:
        trainer.step(batch)
    except Exception as error:
        print(f"compiled for all lengths: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        torch.compiler.reset()
        trainer.network = trainer.shared_network = torch.compile(trainer.model, dynamic=False)
        return "for one length"
    return "for all lengths"


def _steps_speed(bench: Bench, step: Callable[[], Any]) -> float:
    """Steps a second, none waited for but the last."""
    for _ in range(WARM_STEPS):
        step()

    def several() -> None:
        for _ in range(bench.sizes.steps):
            step()

    return bench.speed(several, bench.sizes.steps)


def _plain_training(bench: Bench, shape: ShapeConfig) -> float:
    """Windows a second of a bare loop in float32, 16 windows a step."""
    windows = min(16, bench.sizes.windows[-1])
    model = _model(shape).train().to(bench.device)
    optimisers = Optimisers(model, TrainingConfig(objective="recipe", optimiser="adamw"))
    batch = random_batch(windows, shape.max_shots, 1).to(torch.device(bench.device))
    return bench.speed(lambda: plain_step(model, optimisers, batch, 0), windows)


def _cosine_of_gradients(bench: Bench, layers: int) -> float:
    """The least cosine of a weight's gradients on the device beside float32 on the CPU, without dropout."""
    shape = dataclasses.replace(_shape(bench.sizes, layers, dropout=0.0), max_shots=min(128, bench.sizes.shots))
    batch = random_batch(2, shape.max_shots, 1)
    first, second = (_gradients(_trainer(bench, shape, 2, device), batch) for device in (bench.device, "cpu"))
    return min(least_cosine(first[name][None], second[name][None]) for name in second if np.abs(second[name]).max() > 0)


def _gradients(trainer: Trainer, batch: Batch) -> dict[str, np.ndarray]:
    sums_T, counts_T = trainer._loss_terms(trainer.network, batch.to(trainer.device))
    (sums_T / counts_T.clamp(min=1)).sum().backward()
    named = trainer.model.named_parameters()
    return {name: tensor.grad.float().flatten().cpu().numpy() for name, tensor in named if tensor.grad is not None and tensor.ndim == 2}


def measure_inference(bench: Bench, compiled: bool = False) -> None:
    """The network with inputs on the device, and whole titles as the job contextualises them."""
    sizes = bench.sizes
    for layers in sizes.layers:
        shape = _shape(sizes, layers)
        flops = _flops_of_a_window(shape, bench.device)
        model: Any = _model(shape).eval().to(device=bench.device, dtype=bench.dtype)
        network: Any = torch.compile(model) if compiled else model
        cosine, titles_row = (None, None) if compiled else _measure_titles(bench, shape, flops)
        for windows in sizes.windows[-1:] if compiled else sizes.windows:
            batch = random_batch(windows, shape.max_shots, 1).to(torch.device(bench.device))
            fused_BSD, metadata_BM = batch.fused_BSD.to(bench.dtype), batch.metadata_BM.to(bench.dtype)
            speed = _steps_speed(bench, inferring(network, fused_BSD, metadata_BM)) * windows
            name = f"inference{' compiled' if compiled else ''}, {layers} x {sizes.width}, {windows} windows"
            bench.row(name, "windows/s", speed, speed * flops / bench.rate, cosine=cosine)
        bench.profile(name, inferring(network, fused_BSD, metadata_BM))
        if titles_row is not None:
            bench.row(**titles_row)


def _measure_titles(bench: Bench, shape: ShapeConfig, flops: float) -> tuple[float, dict[str, Any]]:
    """The least cosine beside the CPU, and the row for whole titles."""
    folder = bench.folder / f"contextualiser-{shape.num_hidden_layers}"
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_shots")
    make_contextualiser(folder, FUSED_DIM, METADATA_DIM, **{name: getattr(shape, name) for name in names})
    ours, plain = (
        TitleContextualiser(ContextualiserConfig(checkpoint=str(folder), device=bench.device, precision=precision))
        for precision in (bench.precision, "float32")
    )
    reference = TitleContextualiser(ContextualiserConfig(checkpoint=str(folder)))
    different = [random_title(shape.max_shots, seed) for seed in range(min(bench.sizes.titles, 8))]
    shots = [TitleShots(title.fused_SD, title.metadata_M, title.times_S2) for title in different]
    cosine = least_cosine(ours.contextualise_together(shots[:1])[0][0], reference.contextualise_together(shots[:1])[0][0])
    titles = shots * (bench.sizes.titles // len(shots))
    plain_speed = bench.speed(lambda: [plain.contextualise_together([title]) for title in shots], len(shots))
    speed = bench.speed(lambda: ours.contextualise_together(titles), len(titles))
    name = f"contextualised titles, {shape.num_hidden_layers} x {shape.hidden_size}"
    note = f"of {shape.max_shots} shots, from and to host memory; {ours.micro_batches.size} tokens at once"
    row = {"name": name, "unit": "titles/s", "speed": speed, "share": speed * flops / bench.rate}
    return cosine, {**row, "times_plain": speed / plain_speed, "cosine": cosine, "note": note}


def measure_compiled_clip(bench: Bench) -> None:
    """The network of CLIP ViT-L/14 through torch.compile, which the encoder does not use: what it would bring."""
    folder, sizes = bench.folder / "clip", bench.sizes
    if not folder.exists():
        save_clip(folder, dict(sizes.clip))
    ours = ClipEncoder(VideoEncoderConfig(encoder="clip", weights=str(folder), device=bench.device, precision=bench.precision))
    flops = PlainClip(folder, bench.device).flops_of_a_frame()
    size, side = sizes.frame_batches[-1], sizes.clip["image_size"]
    pixels = torch.randn(size, 3, side, side, device=bench.device, dtype=bench.dtype)
    speed = bench.speed(inferring(torch.compile(ours.tower, dynamic=False), pixels), size)
    bench.row(f"clip compiled, network, {size} at once", "frames/s", speed, speed * flops / bench.rate)


# ----------------------------------------------------------------------------------------------------------- detection


def random_transnet(path: Path) -> None:
    """Weights of TransNet V2's architecture, random: its arithmetic and its speed."""
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        fan_in = int(np.prod(shape[1:]))
        return torch.randn(shape, generator=random) * (2 / fan_in) ** 0.5

    state: dict[str, torch.Tensor] = {}
    channels = 3
    for block in range(BLOCKS):
        filters = 16 << block
        for layer in (0, 1):
            prefix = f"SDDCNN.{block}.DDCNN.{layer}"
            for dilation in DILATIONS:
                state[f"{prefix}.Conv3D_{dilation}.layers.0.weight"] = drawn(2 * filters, channels, 1, 3, 3)
                state[f"{prefix}.Conv3D_{dilation}.layers.1.weight"] = drawn(filters, 2 * filters, 3, 1, 1)
            channels = len(DILATIONS) * filters
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                state[f"{prefix}.bn.{name}"] = torch.full((channels,), value)
    means = sum(len(DILATIONS) * (16 << block) for block in range(BLOCKS))
    inputs = channels * (DETECTOR_HEIGHT >> BLOCKS) * (DETECTOR_WIDTH >> BLOCKS) + 2 * 128
    layers = {
        "frame_sim_layer.projection": (128, means),
        "frame_sim_layer.fc": (128, NEIGHBOURS),
        "color_hist_layer.fc": (128, NEIGHBOURS),
        "fc1": (1024, inputs),
        "cls_layer1": (1, 1024),
        "cls_layer2": (1, 1024),
    }
    for name, (outputs, width) in layers.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = drawn(outputs, width), torch.zeros(outputs)
    for name in ("cls_layer1.weight", "cls_layer2.weight"):
        state[name] *= 0.1  # so that probabilities are neither 0 nor 1, where no difference shows
    torch.save(state, path)


def moving_pictures(frames: int) -> np.ndarray:
    """(T, 27, 48, 3) uint8: a new noisy picture every two seconds, drifting."""
    random = np.random.default_rng(0)
    drawn = random.integers(0, 256, (frames // 48 + 1, DETECTOR_HEIGHT, DETECTOR_WIDTH, 3), dtype=np.uint8)
    return np.stack([np.roll(drawn[frame // 48], frame // 4, axis=1) for frame in range(frames)])


def measure_detection(bench: Bench) -> None:
    """TransNet V2, exact and fast: windows to probabilities, and frames to shots."""
    path = bench.folder / "transnet.pth"
    random_transnet(path)
    for exact in (False, True):
        for batch in (DetectorConfig.batch, 4 * DetectorConfig.batch):
            detector = ShotDetector(DetectorConfig(weights=str(path), exact=exact, device=bench.device, batch=batch))
            _measure_detector(
                bench, f"detection, exact, {batch} windows at once" if exact else f"detection, {batch} chunks at once", detector
            )
        frames_THWC = moving_pictures(bench.sizes.detector_windows * WINDOW)
        speed = bench.speed(functools.partial(detector.detect, frames_THWC), len(frames_THWC))
        bench.row(
            f"detection, {'exact' if exact else 'fast'}, frames to shots", "frames/s", speed, note="with the rules, on one CPU thread"
        )


def _measure_detector(bench: Bench, name: str, detector: ShotDetector) -> None:
    on_cpu = ShotDetector(dataclasses.replace(detector.config, exact=True, device="cpu"))
    window = torch.from_numpy(moving_pictures(WINDOW)[None])
    flops = count_flops(functools.partial(on_cpu.network, window)) / (STEP if detector.config.exact else WINDOW)  # of a frame
    if not detector.config.exact:  # float32 over the same frames
        network, on_cpu = on_cpu.network, ShotDetector(dataclasses.replace(detector.config, device="cpu"))
        on_cpu.network = network
    frames_THWC, many_THWC = (moving_pictures(count) for count in (bench.sizes.detector_frames, bench.sizes.detector_windows * WINDOW))
    expected_2T = np.stack(on_cpu.predict_frames(frames_THWC))
    agreement = 1 - float(np.abs(np.stack(detector.predict_frames(frames_THWC)) - expected_2T).max())
    speed = bench.speed(functools.partial(detector.predict_frames, many_THWC), len(many_THWC))
    bench.row(name, "frames/s", speed, speed * flops / bench.rate, cosine=agreement)


# -------------------------------------------------------------------------------------------------------------- memory


def measure_memory(bench: Bench) -> None:
    """Micro-batches halve when other work has taken the card's memory, and embeddings stay what they were."""
    sizes = bench.sizes
    clip_folder, audio_folder = bench.folder / "clip", bench.folder / "wav2vec2"
    if not clip_folder.exists():
        save_clip(clip_folder, dict(sizes.clip))
    if not audio_folder.exists():
        save_wav2vec2(audio_folder, Wav2Vec2Config(**sizes.wav2vec2))
    clip = ClipEncoder(VideoEncoderConfig(encoder="clip", weights=str(clip_folder), device=bench.device, precision=bench.precision))
    audio = Wav2Vec2Encoder(
        AudioEncoderConfig(encoder="wav2vec2", weights=str(audio_folder), device=bench.device, precision=bench.precision)
    )
    shots = shots_of(jpegs(min(256, sizes.frames)))
    sounds = [sound.tobytes() for sound in random_sounds(min(128, sizes.sounds))]
    for name, encoder, items in (("clip", clip, shots), ("wav2vec2", audio, sounds)):
        _measure_halving(bench, name, encoder, items)


def _measure_halving(bench: Bench, name: str, encoder: Any, items: Sequence[Any]) -> None:
    device = torch.device(bench.device)
    count = sum(map(len, items)) if name == "clip" else len(items)
    encoder.micro_batches = MicroBatches(device, 8)
    expected_SD = encoder.encode(items).embeddings_SD
    encoder.micro_batches = MicroBatches(device, count)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    encoder.encode(items)
    taken = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    filler = torch.empty(max(0, torch.cuda.mem_get_info()[0] - taken // 3), dtype=torch.uint8, device=device)
    left = torch.cuda.mem_get_info()[0]
    start = time.perf_counter()
    found_SD = encoder.encode(items).embeddings_SD
    speed = count / (time.perf_counter() - start)
    size, cosine = encoder.micro_batches.size, least_cosine(found_SD, expected_SD)
    note = f"{taken / 1e9:.2f} GB needed, {left / 1e9:.2f} GB left: {count} at once became {size}; beside 8 at once"
    bench.row(f"out of memory, {name}", "items/s", speed, cosine=cosine, note=note)
    del filler
    torch.cuda.empty_cache()
    if size >= count or cosine < MIN_HALVED_COSINE:
        raise RuntimeError(f"{name}: micro-batches of {count} became {size}, least cosine {cosine:.6f}")


# ------------------------------------------------------------------------------------------------------------ decoding

PARALLEL = 4  # titles decoded at once


def make_video(path: Path, width: int, height: int, frames: int) -> None:
    """H.264 of a drifting noisy picture with a cut every two seconds, 24 frames a second, at film's bit rate."""
    import av

    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast", "b": "7M", "g": "48"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            if number % 48 == 0:
                coarse = random.integers(30, 220, (height // 12, width // 16), dtype=np.uint8)
                scene = np.kron(coarse, np.ones((18, 16), np.uint8))[: height * 3 // 2]
                scene = np.clip(scene.astype(np.int16) + random.integers(-6, 7, scene.shape), 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(scene, 2 * number, axis=1)), format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def decoded(path: Path, card_scale: int = 0, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The detector's pictures and the luma of the first kept ones, as the reader makes them of a whole title. On the card where
    ``card_scale`` says to how many times the kept size it scales."""
    import av

    from mediafm_ray.media.card import CardDecoder
    from mediafm_ray.media.options import FramesConfig
    from mediafm_ray.media.picture import FrameConverter

    size = FramesConfig().size
    painter = FrameConverter(size, Fraction(1))
    tiny: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        packets = list(container.demux(stream)) if card_scale else []
        taken = 0
        first: list[Any] = []
        while card_scale and not first:
            first = stream.decode(packets[taken])
            taken += 1
        card = CardDecoder(stream, packets[:taken], first[0], Fraction(1), size, card_scale) if card_scale else None
        if card is None:
            frames: Any = container.decode(stream)
        else:
            painter.expect(first[0], card.kept)
            frames = itertools.chain(card.frames, (frame for packet in packets[taken:] for frame in card.decode(packet)))
        for frame in frames:
            picture_HWC, working = painter.pictures(frame)
            tiny.append(picture_HWC)
            if len(kept) < 100:
                kept.append(working.planes[: working.width * working.height].copy())
            painter.discard(working)
        if card is not None:
            card.check_end()
    return np.stack(tiny), np.stack(kept)


def measure_decoding(bench: Bench) -> None:
    """H.264 to the pictures that the reader makes, by the CPU and by the card, at several sizes that leave the card."""
    from mediafm_ray.errors import CardError

    path, frames = bench.folder / "film.mp4", bench.sizes.video[2]
    make_video(path, *bench.sizes.video)
    expected, expected_kept = decoded(path)
    bench.row("decoding, CPU, 1 thread", "frames/s", bench.speed(lambda: decoded(path), frames))
    bench.row("decoding, CPU, all threads", "frames/s", bench.speed(lambda: decoded(path, threads=0), frames))
    for scale in (1, 2, 100):  # 100: nothing is scaled on the card
        try:
            found, found_kept = decoded(path, scale)
        except CardError as error:
            bench.left_out["decoding on the card"] = str(error)
            print(f"decoding on the card: left out ({error})", flush=True)
            return
        speed = bench.speed(functools.partial(decoded, path, scale), frames)
        several = bench.speed(functools.partial(_decode_several, path, scale), PARALLEL * frames)
        note = f"{PARALLEL} titles at once {several:,.0f}; {len(found)} of {len(expected)} pictures"
        if len(found) == len(expected):
            note += f"; the detector's differ by {_difference(found, expected)}, kept luma by {_difference(found_kept, expected_kept)}"
        bench.row(f"decoding, card, scaled to {scale} x kept size", "frames/s", speed, note=note)


def _decode_several(path: Path, scale: int) -> None:
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda _: decoded(path, scale), range(PARALLEL)))


def _difference(found: np.ndarray, expected: np.ndarray) -> str:
    levels = np.abs(found.astype(np.int16) - expected)
    return f"{levels.mean():.2f} of 255 on average, {levels.max()} at most"


def measure_reader(bench: Bench) -> None:
    """Whole titles through the reading process, by the CPU and by the card."""
    from benchmarks.reading import EvenShots
    from mediafm_ray.errors import CardError
    from mediafm_ray.media.isolation import IsolatedReader
    from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
    from mediafm_ray.spec import Title

    path = bench.folder / "film.mp4"
    if not path.exists():
        make_video(path, *bench.sizes.video)
    for decoder in ("cpu", "cuda"):
        reader = IsolatedReader(FramesConfig(), TimedTextConfig(), MediaConfig(decoder=decoder))
        try:
            media = reader.read(Title("film", str(path)), EvenShots(48))
            speed = bench.speed(lambda reader=reader: reader.read(Title("film", str(path)), EvenShots(48)), media.frame_count)  # type: ignore[misc]
        except CardError as error:
            bench.row(f"reading process, {decoder}", "frames/s", 0.0, note=f"gave up: {error}")
            continue
        finally:
            reader.close()
        note = f"by {media.facts.get('decoder', 'the CPU')}; {media.frame_count} pictures; {'; '.join(media.warnings) or 'no warning'}"
        bench.row(f"reading process, {decoder}", "frames/s", speed, note=note)


# ---------------------------------------------------------------------------------------------------------------- main


@dataclass(frozen=True)
class Part:
    measure: Callable[[Bench], None]
    seconds: float  # that it takes on an H100, about: it is not begun with less left
    needs_gpu: bool = False
    modules: tuple[str, ...] = ()  # that it needs, besides those of all


PARTS = {  # the most important first
    "clip": Part(measure_clip, 45),
    "wav2vec2": Part(measure_wav2vec2, 35),
    "inference": Part(measure_inference, 40),
    "training": Part(measure_training, 60),
    "memory": Part(measure_memory, 25, needs_gpu=True),
    "detection": Part(measure_detection, 25),
    "decoding": Part(measure_decoding, 50, modules=("av",)),
    "reader": Part(measure_reader, 25, modules=("av", "fsspec", "pysubs2", "ttconv")),
    "compiled-inference": Part(functools.partial(measure_inference, compiled=True), 50, needs_gpu=True),
    "compiled-training": Part(functools.partial(measure_training, compiled=True), 60, needs_gpu=True),
    "compiled-clip": Part(measure_compiled_clip, 60, needs_gpu=True),
}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the program")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: the figures mean nothing")
    parser.add_argument("--minutes", type=float, default=6.0, help="a part that would end later is left out")
    parser.add_argument("--profile", action="store_true", help="print what takes the time in a call of each network")
    parser.add_argument("--json", type=Path, help="write the table here, too, after every row")
    arguments = parser.parse_args(given)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("this process sees no CUDA device: run it where there is one, or try the program with --device cpu --quick")
    if arguments.quick and arguments.device == "cpu":
        torch.set_num_threads(1)  # tiny operations are not worth sharing
    with tempfile.TemporaryDirectory() as folder:
        sizes = QUICK if arguments.quick else FULL
        bench = Bench(arguments.device, sizes, Path(folder), arguments.minutes, arguments.json, arguments.profile)
        bench.say_head()
        for name, part in PARTS.items():
            if name in (arguments.only or PARTS):
                run(bench, name, part)
    print(f"\n{time.perf_counter() - bench.started:.0f} s in all")
    bench.write()
    return 1 if bench.failed else 0


def run(bench: Bench, name: str, part: Part) -> None:
    """One part; one that fails is told, and the others go on, for time on such a machine is dear."""
    if part.needs_gpu and not bench.on_gpu:
        bench.left_out[name] = "needs a GPU"
    elif missing := [module for module in part.modules if sys.modules.get(module, ...) is None or importlib.util.find_spec(module) is None]:
        bench.left_out[name] = f"{', '.join(missing)} not installed"
    elif bench.left_s < part.seconds:
        bench.left_out[name] = f"{bench.left_s:.0f} s left, takes {part.seconds:.0f} s"
    if name in bench.left_out:
        print(f"{name}: left out ({bench.left_out[name]})", flush=True)
        return
    start = time.perf_counter()
    try:
        part.measure(bench)
    except Exception as error:
        traceback.print_exc()
        bench.failed[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: FAILED ({bench.failed[name]})", flush=True)
        bench.write()
    if bench.on_gpu:
        torch.cuda.empty_cache()
    print(f"  ({name}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
