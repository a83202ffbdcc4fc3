"""Benchmark of training with Ray Train on a CPU, compared with a bare PyTorch loop. For a GPU see benchmarks.gpu.

    python -m benchmarks.training [--steps 40] [--rounds 3] [--threads 2]

The bare loop has the same model, optimisers and batch shapes, in tensors that were made beforehand: forward, loss, backward, update,
nothing else. The job reads titles from storage, samples windows and masks, clips, reports and logs. Speeds are of steps, after
warm-up; starting Ray does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mediafm_ray.models.contextualiser import shot_times
from mediafm_ray.training.batches import Batch, TitleVectors, Window, collate
from mediafm_ray.training.optimisers import Optimisers
from mediafm_ray.training.options import ShapeConfig, TrainingConfig
from mediafm_ray.training.sampling import masked_shots
from mediafm_ray.training.trainer import new_model

FUSED_DIM, METADATA_DIM = 2304, 768
CPU_SHAPE = ShapeConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
CPU_SHOTS, CPU_TITLES, CPU_WINDOWS = 128, 48, 8
WARM_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="measured steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    beside_bare_loop(arguments.steps, arguments.rounds, arguments.threads)


def beside_bare_loop(steps: int, rounds: int, threads: int) -> None:
    """Run interleaved rounds of both; print the ratio of the medians."""
    torch.set_num_threads(threads)
    # Ray's workers yield to others (nice 15): on a shared machine both shall be treated alike
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    config = TrainingConfig(
        objective="recipe",
        steps=WARM_STEPS + steps + 1,  # of the last the state is written, too
        windows_per_step=CPU_WINDOWS,
        held_out_fraction=0.0,
        evaluate_every=10**6,
        save_every=10**6,
        log_every=WARM_STEPS,
        threads=threads,
    )
    print(
        f"{time.strftime('%Y-%m-%d')}  CPU, {threads} threads, torch {torch.__version__}; {CPU_SHAPE.num_hidden_layers} layers x ", end=""
    )
    print(f"{CPU_SHAPE.hidden_size}, {CPU_WINDOWS} windows of {CPU_SHOTS} shots x {FUSED_DIM}")
    job_s: list[float] = []
    bare_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        write_titles(Path(folder) / "embeddings")
        for number in range(rounds):
            bare_s.append(bare_loop(config, steps))
            job_s.append(job(Path(folder), number, config))
            print(f"round {number + 1}: bare loop {1 / bare_s[-1]:.2f} steps/s, job {1 / job_s[-1]:.2f} steps/s", flush=True)
    ratio = statistics.median(bare_s) / statistics.median(job_s)
    print(f"training through Ray Train has {ratio:.2f} times the speed of the bare loop")


def bare_loop(config: TrainingConfig, steps: int) -> float:
    """Return seconds per step."""
    model = new_model(CPU_SHAPE, FUSED_DIM, METADATA_DIM, "", 0).train()
    optimisers = Optimisers(model, config)
    batches = [random_batch(CPU_WINDOWS, CPU_SHOTS, seed) for seed in range(4)]
    for step in range(WARM_STEPS + steps):
        if step == WARM_STEPS:
            start = time.perf_counter()
        plain_step(model, optimisers, batches[step % 4], step)
    return (time.perf_counter() - start) / steps


def plain_step(model: Any, optimisers: Optimisers, batch: Batch, step: int) -> None:
    output = model(batch.fused_BSD, batch.metadata_BM, batch.has_metadata_B, None, batch.masked_BS)
    truth_KD = batch.fused_BSD.flatten(0, 1)[batch.masked_K]
    loss = 1 - F.cosine_similarity(output.contextual_BSD.flatten(0, 1)[batch.masked_K].float(), truth_KD, dim=1).mean()
    loss.backward()
    optimisers.step(step)


def job(folder: Path, number: int, config: TrainingConfig) -> float:
    """Return seconds per step of the job, between its rows of metrics."""
    from mediafm_ray.config.jobs import TrainContextualiserConfig
    from mediafm_ray.config.loader import read_config
    from mediafm_ray.pipeline.training.train import Watch, plan_training, run_workers
    from mediafm_ray.runs.report import Console

    rows: list[tuple[float, float]] = []

    class Timer(Watch):
        def see(self, kind: str, content: Any) -> None:
            if kind == "row":
                rows.append((content["step"], content["elapsed_s"]))
            if kind == "fatal":
                super().see(kind, content)

    keys = ("steps", "windows_per_step", "held_out_fraction", "evaluate_every", "save_every", "log_every", "threads")
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    overrides = [f"dataset.uri={folder / 'embeddings'}", f"checkpoint.uri={folder / f'checkpoint-{number}'}"]
    overrides += [f"training.{key}={getattr(config, key)}" for key in keys] + [f"model.{key}={getattr(CPU_SHAPE, key)}" for key in shape]
    full = read_config(TrainContextualiserConfig, [], overrides)
    aborted = run_workers(plan_training(full), full, Timer(full.training, Console()))
    if aborted:
        raise SystemExit(aborted)
    measured = [(step, elapsed_s) for step, elapsed_s in rows if step % WARM_STEPS == 0]
    return (measured[-1][1] - measured[0][1]) / (measured[-1][0] - measured[0][0])


def write_titles(folder: Path) -> None:
    """Commit titles of CPU_SHOTS random shots, as embed_catalog does."""
    import base64

    import pyarrow as pa

    from mediafm_ray.storage.dataset import Model, Output
    from mediafm_ray.storage.names import SHOTS
    from mediafm_ray.storage.schemas import embedding_array, encode_parquet, shots_schema

    version = "0" * 12
    output = Output(str(folder), version)
    dims = {"video": 768, "audio": 768, "text": METADATA_DIM}
    output.write_model(Model(version, {}, {**dims, "fused": FUSED_DIM}, {"video": (0, 768), "audio": (768, 1536), "text": (1536, 2304)}))
    schema = shots_schema(FUSED_DIM)
    for index in range(CPU_TITLES):
        title = random_title(CPU_SHOTS, index)
        assert title.metadata_M is not None
        given = {
            "title_id": pa.array([title.title_id] * CPU_SHOTS),
            "shot_index": pa.array(range(CPU_SHOTS), pa.int32()),
            "start_s": pa.array(np.arange(CPU_SHOTS) * 3.0),
            "end_s": pa.array(np.arange(1, CPU_SHOTS + 1) * 3.0),
            "fused_embedding": embedding_array(title.fused_SD),
        }
        table = pa.table([given.get(field.name, pa.nulls(CPU_SHOTS, field.type)) for field in schema], names=schema.names)
        facts = {"title_id": title.title_id, "source": "0", "video": "", "dataset_version": version, "dims": {}, "spans": {}, "media": {}}
        encoded = base64.b64encode(title.metadata_M.tobytes()).decode()
        output.write(SHOTS, title.title_id, "0", encode_parquet(table, {**facts, "metadata_embedding": encoded}))


def random_title(shots: int, seed: int) -> TitleVectors:
    random = np.random.default_rng(seed)
    fused_SD = random.normal(size=(shots, FUSED_DIM)).astype(np.float32)
    fused_SD /= np.linalg.norm(fused_SD, axis=1, keepdims=True)
    starts_S = np.arange(shots) * 3.0
    return TitleVectors(
        f"title-{seed}", fused_SD, shot_times(starts_S, starts_S + 3.0), random.normal(size=METADATA_DIM).astype(np.float32)
    )


def random_batch(windows: int, shots: int, seed: int) -> Batch:
    random = np.random.default_rng(seed)
    usable_S = np.ones(shots, bool)
    titles = [random_title(shots, seed * 1000 + index) for index in range(min(windows, CPU_WINDOWS))]
    windows_of = [Window(titles[index % len(titles)], 0, masked_shots(random, usable_S, 0.2)) for index in range(windows)]
    return collate(windows_of, METADATA_DIM)


if __name__ == "__main__":
    main()
