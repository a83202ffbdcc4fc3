"""Masked shot modelling: 20 % of the shots are hidden behind [MASK], and the model has to say what their fused vectors were.

The loss is the cosine distance to the original vectors, at the hidden shots only (MediaFM, training). A step is the same for any number
of workers: each takes its share of the windows, the sums are those of all, and gradients are averaged by DistributedDataParallel
where torch.distributed is initialised. Only dropout differs then: its numbers belong to (seed, step, worker).

Shapes as in batches.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mediafm_ray.models.contextualiser import Contextualiser, ContextualiserModelConfig
from mediafm_ray.models.loading import open_device
from mediafm_ray.training.baselines import BASELINES, cosines, guess
from mediafm_ray.training.batches import Batch, Titles, Window, WindowSource, collate, read_ahead
from mediafm_ray.training.optimisers import Optimisers, schedule
from mediafm_ray.training.options import ShapeConfig, TrainingConfig
from mediafm_ray.training.sampling import DROPOUT, random_of

STATE_KEY = "training"  # in the metadata of a state's file: where the training stands, as JSON
METRIC_DIGITS = 6  # significant digits of a row of metrics
LEAST_GAIN = 1e-4  # of the held-out cosine: less is no better model


class TrainingError(Exception):
    """A training that cannot go on; the message says why and what to do."""


class StateError(Exception):
    """A saved state that cannot be read."""


@dataclass
class Standing:
    """Where a training stands: all that is not a tensor."""

    step: int = 0  # steps done
    best_cosine: float = -math.inf  # held-out, of the model that was kept
    best_step: int = -1  # -1: none was kept yet
    without_gain: int = 0  # evaluations since
    distance_sum: float = 0.0  # cosine distances since the last row of metrics
    masked: int = 0  # shots that they belong to
    stopped: str = ""  # why no more steps are taken


class Recorder(Protocol):
    """Whoever keeps what a training gives. Every worker calls its own, with the same, at the same steps."""

    def row(self, row: Mapping[str, float]) -> None:
        """A row of metrics. The same rows come of the same training, however often it was interrupted."""
        ...

    def best(self, model: Contextualiser) -> None:
        """The model is better on held-out titles than any before."""
        ...

    def save(self, trainer: Trainer) -> None:
        """The training can go on from where it stands (``trainer.standing``, ``trainer.state()``)."""
        ...


def new_model(shape: ShapeConfig, fused_dim: int, metadata_dim: int, dataset_version: str, seed: int) -> Contextualiser:
    """A contextualiser with seeded random weights that knows what it will be trained on."""
    config = ContextualiserModelConfig(
        fused_dim=fused_dim, metadata_dim=metadata_dim, dataset_version=dataset_version, **dataclasses.asdict(shape)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Contextualiser(config)


class Trainer:
    """A model in training: one worker's part of every step."""

    def __init__(self, model: Contextualiser, titles: Titles, config: TrainingConfig, say_unusable: Any = print):
        """``say_unusable`` is told of each title that has to be passed over. Raises ValueError for a device that is not there."""
        self.device = open_device(config.device)
        distributed = torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if distributed else 0
        self.workers = torch.distributed.get_world_size() if distributed else 1
        if config.windows_per_step < self.workers:
            raise ValueError(
                f"training.windows_per_step {config.windows_per_step} is less than one window for each of {self.workers} workers"
            )
        untyped: Any = model  # transformers' wrapper of `to` has lost its self
        self.model: Contextualiser = untyped.to(self.device)
        self.optimisers = Optimisers(model, config)
        self.network: Any = torch.compile(model, dynamic=True) if config.compile else model
        self.shared_network = DistributedDataParallel(self.network) if self.workers > 1 else self.network
        half = config.precision == "bfloat16" or (config.precision == "auto" and self.device.type == "cuda")
        self.autocast = {"device_type": self.device.type, "dtype": torch.bfloat16, "enabled": half}
        self.config, self.titles, self.standing = config, titles, Standing()
        self.source = WindowSource(
            titles, config.seed, config.windows_per_step, int(model.config.max_shots), config.mask_fraction, say_unusable
        )
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # distances and masked shots since the last row, of this worker
        self.norm = torch.zeros(())

    def train(self, recorder: Recorder) -> None:
        """Train to the end from where it stands, and record; what ended it is ``standing.stopped`` afterwards.

        Raises TrainingError where numbers stop being numbers.
        """
        standing, config = self.standing, self.config
        if standing.step == 0:
            self._record_evaluation(recorder, BASELINES)
        batches = self.batches(standing.step)
        try:
            while not standing.stopped:
                self.step(next(batches))
                last = standing.step == config.steps
                row: dict[str, float] = {}
                if standing.step % config.log_every == 0 or last:
                    row = self._row()
                if standing.step % config.evaluate_every == 0 or last:
                    self._record_evaluation(recorder, (), row)
                elif row:
                    recorder.row(row)
                if last and not standing.stopped:
                    standing.stopped = f"all {config.steps} steps are done"
                if standing.step % config.save_every == 0 or standing.stopped:
                    self._gather_sums()
                    recorder.save(self)
        finally:
            batches.close()

    # ------------------------------------------------------------------------------------------------------- a step

    def batches(self, first_step: int) -> Generator[Batch, None, None]:
        """This worker's batches from a step on, read ahead."""

        def make(step: int) -> Batch:
            batch = collate(self.source.of_step(step, self.rank, self.workers), self.titles.metadata_dim)
            return batch.pinned() if self.device.type == "cuda" else batch

        return read_ahead(make, range(first_step, self.config.steps), self.config.read_threads, self.config.read_ahead)

    def step(self, batch: Batch) -> None:
        """One step: loss, gradients, update. Nothing waits for the device."""
        step = self.standing.step
        torch.manual_seed(int(random_of(self.config.seed, DROPOUT, step, self.rank).integers(2**62)))
        self.model.train()
        distances_K = 1 - self._cosines(self.shared_network, batch)
        own = torch.full((), len(distances_K), dtype=torch.float64, device=self.device)
        masked = own.clone()
        if self.workers > 1:
            torch.distributed.all_reduce(masked)
        (
            distances_K.sum() * (self.workers / masked).float()
        ).backward()  # gradients are averaged over workers: of all distances this is the mean
        self.norm = self.optimisers.step(step)
        self.sums += torch.stack([distances_K.detach().sum().double(), own])
        self.standing.step += 1

    def _cosines(self, network: Any, batch: Batch) -> Tensor:
        """(K,) float32 cosines between the model's vectors and the original ones at the masked shots."""
        batch = batch.to(self.device)
        with torch.autocast(**self.autocast):  # type: ignore[arg-type]
            output = network(
                batch.fused_BSD, batch.metadata_BM, batch.has_metadata_B, batch.shots_BS, batch.masked_BS, times_BS2=batch.times_BS2
            )
        predicted_KD = output.contextual_BSD.flatten(0, 1)[batch.masked_K].float()
        return F.cosine_similarity(predicted_KD, batch.fused_BSD.flatten(0, 1)[batch.masked_K], dim=1)

    def _row(self) -> dict[str, float]:
        """The metrics since the last row, of all workers. Raises TrainingError where the loss is no number."""
        self._gather_sums()
        standing = self.standing
        loss = standing.distance_sum / max(1, standing.masked)
        if not math.isfinite(loss) or not math.isfinite(float(self.norm)):
            raise TrainingError(
                f"the loss is {loss} and the gradient's norm {float(self.norm)} at step {standing.step}: lower training.learning_rate, "
                "or set training.precision=float32"
            )
        standing.distance_sum, standing.masked = 0.0, 0
        return {
            "step": standing.step,
            "loss": significant(loss),
            "learning_rate": significant(self.config.learning_rate * schedule(standing.step - 1, self.config)),
            "gradient_norm": significant(float(self.norm)),
        }

    def _gather_sums(self) -> None:
        """Take the sums of all workers over into the standing."""
        if self.workers > 1:
            torch.distributed.all_reduce(self.sums)
        distance_sum, masked = self.sums.tolist()
        self.standing.distance_sum += distance_sum
        self.standing.masked += int(masked)
        self.sums.zero_()

    # --------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, baselines: Iterable[str] = ()) -> dict[str, float]:
        """Mean cosine at the masked shots of the held-out titles, of the model and of baselines; empty without held-out titles."""
        if not len(self.titles.held_out):
            return {}
        names = ["cosine", *baselines]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        for windows, batch in self._held_out_batches():
            sums[0] += len(batch.masked_K)
            sums[1] += float(self.held_out_cosines(batch).double().sum())
            for place, name in enumerate(names[1:], start=2):
                for window in windows:
                    fused_SD = window.title.fused_SD[window.shots]
                    sums[place] += float(cosines(guess(name, fused_SD, window.masked_S), fused_SD[window.masked_S]).sum())
        sums = sums.to(self.device)
        if self.workers > 1:
            torch.distributed.all_reduce(sums)
        masked, *totals = sums.tolist()
        return {f"held_out_{name}": significant(total / masked) for name, total in zip(names, totals, strict=True)}

    @torch.no_grad()
    def held_out_cosines(self, batch: Batch) -> Tensor:
        """(K,) float32 cosines of the model at work, without dropout."""
        self.model.eval()
        return self._cosines(self.network, batch)

    def _held_out_batches(self) -> Generator[tuple[list[Window], Batch], None, None]:
        """This worker's share of the held-out windows, titles of like size together."""
        by_size = np.argsort(self.titles.sizes[self.titles.held_out], kind="stable")
        mine = by_size[self.rank :: self.workers].tolist()
        share = max(1, self.config.windows_per_step // self.workers)
        groups = [mine[first : first + share] for first in range(0, len(mine), share)]

        def make(slots: list[int]) -> tuple[list[Window], Batch]:
            windows = [self.source.of_evaluation(slot) for slot in slots]
            return windows, collate(windows, self.titles.metadata_dim)

        return read_ahead(make, groups, self.config.read_threads, self.config.read_ahead)

    def _record_evaluation(self, recorder: Recorder, baselines: Iterable[str], row: Mapping[str, float] | None = None) -> None:
        """Evaluate, add it to the row, keep the model when it is the best, and decide whether to stop early."""
        standing = self.standing
        found = self.evaluate(baselines)
        if not all(map(math.isfinite, found.values())):
            raise TrainingError(f"the model gives numbers that are none at step {standing.step}: lower training.learning_rate")
        if found or row:
            recorder.row({"step": standing.step, **(row or {}), **found})
        cosine = found.get("held_out_cosine")
        if cosine is None:  # nothing to compare with: the last model is the one to keep
            if standing.step:
                standing.best_step = standing.step
                recorder.best(self.model)
        elif standing.step == 0:
            return
        elif cosine > standing.best_cosine + LEAST_GAIN:
            standing.best_cosine, standing.best_step, standing.without_gain = cosine, standing.step, 0
            recorder.best(self.model)
        else:
            standing.without_gain += 1
            if self.config.patience and standing.without_gain >= self.config.patience:
                standing.stopped = f"early stop: no gain on held-out titles in {standing.without_gain} evaluations"

    # -------------------------------------------------------------------------------------------------------- state

    def state(self) -> bytes:
        """All that a resumed training needs, as one safetensors file: weights, the optimisers' state, where it stands."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimiser.{name}": tensor for name, tensor in self.optimisers.state_dict().items()}
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return save_tensors(contiguous, {STATE_KEY: json.dumps(dataclasses.asdict(self.standing))})

    def resume(self, state: bytes) -> None:
        """Go on from a state. Raises StateError where it is not whole or not of this model."""
        try:
            tensors = load_tensors(state)
            standing = Standing(**json.loads(state_header(state)["__metadata__"][STATE_KEY]))
            self.model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
            self.optimisers.load_state_dict({name[10:]: tensor for name, tensor in tensors.items() if name.startswith("optimiser.")})
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StateError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        self.standing = standing


def state_header(beginning: bytes) -> dict[str, Any]:
    """The header of a safetensors file from its first bytes. Raises StateError where they do not hold it."""
    length = int.from_bytes(beginning[:8], "little")
    if len(beginning) < 8 + length or not length:
        raise StateError(f"it ends inside its header: {len(beginning)} of {8 + length} bytes")
    try:
        return json.loads(beginning[8 : 8 + length])
    except ValueError as error:
        raise StateError(f"its header is not JSON ({error})") from error


def state_bytes(header: Mapping[str, Any], header_length: int) -> int:
    """How long a whole file with this header is."""
    return 8 + header_length + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def significant(value: float) -> float:
    """A number rounded to METRIC_DIGITS significant digits."""
    return float(f"{value:.{METRIC_DIGITS}g}")
