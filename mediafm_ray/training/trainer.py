"""Masked shot modelling: 20 % of the shots are hidden, and the model predicts their fused vectors.

``training.objective=recipe`` is exactly MediaFM's: the loss is the cosine distance to the original vectors at the hidden shots.

``training.objective=context`` trains the vectors that are served, at every shot. Besides the hidden shots, 15 % of a window's shots are
replaced by shots of other titles (cut-aways), whose original shots are known. The model's vectors of a window, damaged or not, must be as
similar to the batch's other shots as those that the formula of models.neighbours computes from the undamaged window:

    loss = mean over hidden shots of 1 - cos(c, x)  -  mean over shots i of  sum_k T_ik (log P_ik + log P'_ik)
    P_ik = softmax_k(c_i . c'_k / 0.1),  P'_ik = softmax_k(c'_i . c'_k / 0.1)
    T_ik = softmax_k(b_i . b_k / 0.1), k over the other shots of the batch

with c of the damaged and c' of the undamaged window, and b the formula's vectors of the undamaged window. Learning relations from a
teacher is from Park et al. 2019 (arXiv:1904.05068) and Tejankar et al. 2021 (arXiv:2010.14713); damaging the student's input is from
data2vec (arXiv:2202.03555). This teacher needs no training and cannot collapse.

Each worker computes its share of a step's windows; sums are over all workers, and DistributedDataParallel averages gradients if
torch.distributed is initialised. With the recipe, only dropout depends on the number of workers (its seed is made from seed, step and
worker); with ``context``, cut-aways and compared shots also come from a worker's own windows.

Shapes as in batches.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mediafm_ray.models.contextualiser import Contextualiser, ContextualiserModelConfig
from mediafm_ray.models.loading import open_device
from mediafm_ray.models.neighbours import NeighbourAttention, NeighbourAttentionConfig, neighbour_context
from mediafm_ray.training.baselines import BASELINES, cosines, guess
from mediafm_ray.training.batches import Batch, Titles, Window, WindowSource, collate, read_ahead
from mediafm_ray.training.losses import context_loss, cosines_at_masked, held_out_figures, loss_of, window_groups
from mediafm_ray.training.optimisers import Optimisers, schedule
from mediafm_ray.training.options import ShapeConfig, TrainingConfig
from mediafm_ray.training.sampling import CUT_AWAYS, DROPOUT, HELD_OUT, random_of

STATE_KEY = "training"  # Key of the TrainerState, as JSON, in the metadata of a state file.
METRIC_DIGITS = 6  # significant digits of a row of metrics
MIN_GAIN = 1e-4  # A smaller gain of the held-out score is no improvement.
COMPILE_OPTIONS: dict[str, Any] = {"triton.coalesce_tiling_analysis": False}  # It fails in torch 2.11 with changing lengths.
TERMS = ("masked", "context")  # terms of the loss
FIGURES = ("cosine", "identity", "context")  # metrics of the served vectors on held-out titles


class TrainingError(Exception):
    """A training that cannot continue; the message says why and what to do."""


class StateError(Exception):
    """A saved state that cannot be read."""


@dataclass
class TrainerState:
    """The state of a training, without tensors."""

    step: int = 0  # steps done
    best_score: float = -math.inf  # held-out score of the best model
    best_step: int = -1  # step of the best model; -1 = none yet
    without_gain: int = 0  # evaluations since the best model
    loss_sums: list[float] = dataclasses.field(default_factory=lambda: [0.0] * len(TERMS))  # sums since the last row of metrics
    loss_counts: list[int] = dataclasses.field(default_factory=lambda: [0] * len(TERMS))  # number of shots in these sums
    stopped: str = ""  # the reason why training ended; empty while it runs


class Recorder(Protocol):
    """The receiver of a training's results. All workers call theirs with the same arguments at the same steps."""

    def row(self, row: Mapping[str, float]) -> None:
        """Record a row of metrics. A training gives the same rows however often it was interrupted."""
        ...

    def best(self, model: Any) -> None:
        """Keep the model, which is better on held-out titles than all before."""
        ...

    def save(self, trainer: Trainer) -> None:
        """Save the state, from which the training can continue (``trainer.standing``, ``trainer.state()``)."""
        ...


def new_model(
    shape: ShapeConfig,
    fused_dim: int,
    metadata_dim: int,
    dataset_version: str,
    seed: int,
    spans: Mapping[str, tuple[int, int]] | None = None,
) -> Any:
    """Make a model with seeded weights whose config names the dataset: neighbour attention if ``spans`` is given, else the recipe's.

    ``spans`` are ``[first, end)`` of each modality in a fused vector.
    """
    common: dict[str, Any] = {
        "fused_dim": fused_dim,
        "metadata_dim": metadata_dim,
        "dataset_version": dataset_version,
        "max_shots": shape.max_shots,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spans is not None:
            listed = {name: list(span) for name, span in spans.items()}
            return NeighbourAttention(NeighbourAttentionConfig(spans=listed, relation_size=shape.relation_size, **common))
        encoder: dict[str, Any] = {
            name: value for name, value in dataclasses.asdict(shape).items() if name not in ("relation_size", "max_shots")
        }
        return Contextualiser(ContextualiserModelConfig(**common, **encoder))


class Trainer:
    """One worker of a training: its part of every step."""

    def __init__(self, model: Any, titles: Titles, config: TrainingConfig, say_unusable: Any = print):
        """Prepare training. ``say_unusable`` is called for each title that is skipped. Raises ValueError for a missing device."""
        self.device = open_device(config.device)
        distributed = torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if distributed else 0
        self.workers = torch.distributed.get_world_size() if distributed else 1
        if config.windows_per_step < self.workers:
            raise ValueError(
                f"training.windows_per_step {config.windows_per_step} is less than one window for each of {self.workers} workers"
            )
        self.model: Any = model.to(self.device)
        self.optimisers = Optimisers(model, config)
        self.network: Any = torch.compile(model, dynamic=True, options=COMPILE_OPTIONS) if config.compile else model
        self.shared_network = DistributedDataParallel(self.network) if self.workers > 1 else self.network
        half = config.precision == "bfloat16" or (config.precision == "auto" and self.device.type == "cuda")
        self.autocast = {"device_type": self.device.type, "dtype": torch.bfloat16, "enabled": half}
        self.config, self.titles, self.standing = config, titles, TrainerState()
        self.source = WindowSource(
            titles, config.seed, config.windows_per_step, int(model.config.max_shots), config.mask_fraction, say_unusable
        )
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.sums = torch.zeros(2, len(TERMS), dtype=torch.float64, device=self.device)  # sums of terms, numbers of shots
        self.norm = torch.zeros(())
        self.is_context = config.objective == "context"
        self.cut_aways = config.cut_away_fraction if self.is_context else 0.0

    def train(self, recorder: Recorder) -> None:
        """Train from the current state to the end and record; ``standing.stopped`` says why it ended.

        Raises TrainingError for NaN or infinity.
        """
        standing, config = self.standing, self.config
        if standing.step == 0:
            self._record_evaluation(recorder, with_baselines=True)
        batches = self.batches(standing.step)
        try:
            while not standing.stopped:
                self.step(next(batches))
                last = standing.step == config.steps
                row: dict[str, float] = {}
                if standing.step % config.log_every == 0 or last:
                    row = self._row()
                if standing.step % config.evaluate_every == 0 or last:
                    self._record_evaluation(recorder, row)
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
        """Yield this worker's batches from a step on, read ahead."""

        def make(step: int) -> Batch:
            windows = self.source.of_step(step, self.rank, self.workers)
            random = random_of(self.config.seed, CUT_AWAYS, step, self.rank)
            batch = collate(windows, self.titles.metadata_dim, self.cut_aways, random)
            return batch.pinned() if self.device.type == "cuda" else batch

        return read_ahead(make, range(first_step, self.config.steps), self.config.read_threads, self.config.read_ahead)

    def step(self, batch: Batch) -> None:
        """Take one step: loss, gradients, update. Nothing waits for the device."""
        step = self.standing.step
        torch.manual_seed(int(random_of(self.config.seed, DROPOUT, step, self.rank).integers(2**62)))
        self.model.train()
        sums_T, counts_T = self._loss_terms(self.shared_network, self._on_device(batch))
        everywhere_T = counts_T.clone()
        if self.workers > 1:
            torch.distributed.all_reduce(everywhere_T)
        # DistributedDataParallel averages gradients over workers, so this gives the mean over all shots.
        (sums_T * (self.workers / everywhere_T.clamp(min=1))).sum().float().backward()
        self.norm = self.optimisers.step(step)
        self.sums += torch.stack([sums_T.detach(), counts_T])
        self.standing.step += 1

    def _on_device(self, batch: Batch) -> Batch:
        """Copy the batch to the device; a GPU copies it while it computes the previous steps."""
        if self.copies is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.copies):
            batch = batch.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.copies)
        for field in vars(batch).values():
            if field is not None:
                field.record_stream(computing)
        return batch

    def _loss_terms(self, network: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (TERMS,) float64 sums of the terms of the loss over shots, and the number of shots of each."""
        contextual_BSD, clean_BSD = self._read(network, batch)
        distances_K = 1 - cosines_at_masked(contextual_BSD, batch)
        sums, counts = [distances_K.sum().double()], [len(distances_K)]
        if self.is_context:
            context_N = [loss_N for group in window_groups(batch) for loss_N in [context_loss(contextual_BSD, clean_BSD, batch, group)]]
            sums.append(torch.stack([loss_N.sum() for loss_N in context_N]).sum().double())
            counts.append(sum(map(len, context_N)))
        else:
            sums.append(torch.zeros_like(sums[0]))
            counts.append(0)
        # The counts are filled on the device: copying a number there would wait for all its work.
        return torch.stack(sums), torch.stack([torch.full((), count, dtype=torch.float64, device=self.device) for count in counts])

    def _read(self, network: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the (B, S, D) output for damaged windows, and for undamaged ones if the objective needs them (else the former again)."""
        fused_BSD, masked_BS, repeat = batch.given_BSD, batch.masked_BS, 1
        if self.is_context:  # One call for both: DistributedDataParallel needs one before every backward pass.
            fused_BSD, repeat = torch.cat([batch.given_BSD, batch.fused_BSD]), 2
            masked_BS = torch.cat([batch.masked_BS, torch.zeros_like(batch.masked_BS)])

        def again(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.repeat(repeat, *[1] * (tensor.ndim - 1))

        with torch.autocast(**self.autocast):  # type: ignore[arg-type]
            output = network(
                fused_BSD,
                again(batch.metadata_BM),
                again(batch.has_metadata_B),
                again(batch.shots_BS),
                masked_BS,
                times_BS2=again(batch.times_BS2),
            )
        parts = output.contextual_BSD.chunk(repeat)
        return parts[0], parts[-1]

    def _row(self) -> dict[str, float]:
        """Return the metrics of all workers since the last row. Raises TrainingError if the loss is NaN or infinite."""
        self._gather_sums()
        standing = self.standing
        loss = loss_of(standing.loss_sums, standing.loss_counts)
        if not math.isfinite(loss) or not math.isfinite(float(self.norm)):
            raise TrainingError(
                f"the loss is {loss} and the gradient's norm {float(self.norm)} at step {standing.step}: lower training.learning_rate, "
                "or set training.precision=float32"
            )
        standing.loss_sums, standing.loss_counts = [0.0] * len(TERMS), [0] * len(TERMS)
        return {
            "step": standing.step,
            "loss": significant(loss),
            "learning_rate": significant(self.config.learning_rate * schedule(standing.step - 1, self.config)),
            "gradient_norm": significant(float(self.norm)),
        }

    def _gather_sums(self) -> None:
        """Add the sums of all workers to the state."""
        if self.workers > 1:
            torch.distributed.all_reduce(self.sums)
        sums, counts = self.sums.tolist()
        self.standing.loss_sums = [before + now for before, now in zip(self.standing.loss_sums, sums, strict=True)]
        self.standing.loss_counts = [before + int(now) for before, now in zip(self.standing.loss_counts, counts, strict=True)]
        self.sums.zero_()

    # --------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, with_baselines: bool = False) -> dict[str, float]:
        """Return metrics of the served vectors on held-out titles; empty without such titles.

        ``held_out_cosine``: mean cosine to the original at hidden shots. ``held_out_identity``: mean cosine to the original at the shots
        that were not changed. ``held_out_context``: mean cosine to the original at shots that were replaced by another title's.
        ``held_out_loss``: the objective (context only). ``with_baselines`` adds the same of ``builtin:neighbours`` (``..._neighbours``)
        and the cosines of the baselines.
        """
        if not len(self.titles.held_out):
            return {}
        names = [*FIGURES, *(f"{term}_loss" for term in TERMS)]
        names += [*(f"{name}_neighbours" for name in FIGURES), *BASELINES] if with_baselines else []
        totals = {
            name: torch.zeros(2, dtype=torch.float64) for name in names
        }  # All workers have the same keys, so that the sums can be added.

        def add(name: str, values: Tensor) -> None:
            totals[name] += torch.tensor([float(values.double().sum()), len(values)])

        for windows, batch in self._held_out_batches():
            batch = batch.to(self.device)
            terms, served = self._held_out(batch)
            for name, values in {**held_out_figures(*served, batch), **terms}.items():
                add(name, values)
            if with_baselines:
                known_BS = (batch.fused_BSD != 0).any(-1)
                formula = neighbour_context(batch.given_BSD, known_BS & ~batch.masked_BS), neighbour_context(batch.given_BSD, known_BS)
                for name, values in held_out_figures(*formula, batch).items():
                    add(f"{name}_neighbours", values)
                for name in BASELINES:
                    for window in windows:
                        fused_SD = window.title.fused_SD[window.shots]
                        guessed_K = cosines(guess(name, fused_SD, window.masked_S), fused_SD[window.masked_S])
                        add(name, torch.from_numpy(guessed_K))
        if self.workers > 1:
            together = torch.stack([totals[name] for name in names]).to(self.device)
            torch.distributed.all_reduce(together)
            totals = dict(zip(names, together.cpu(), strict=True))
        found = {name: float(total / count) for name, (total, count) in totals.items() if count}
        if self.is_context:
            found["loss"] = sum(found.pop(f"{term}_loss", 0.0) for term in TERMS)
        return {f"held_out_{name}": significant(value) for name, value in found.items()}

    @torch.no_grad()
    def _held_out(self, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Return the terms of the loss (context only) and the vectors without dropout, with hidden shots and with all shots visible."""
        self.model.eval()
        terms: dict[str, Tensor] = {}
        hidden_BSD, clean_BSD = self._read(self.network, batch)
        if self.is_context:
            context_N = torch.cat([context_loss(hidden_BSD, clean_BSD, batch, group) for group in window_groups(batch)])
            terms = {"masked_loss": 1 - cosines_at_masked(hidden_BSD, batch), "context_loss": context_N}
        visible_BSD, _ = self._read(self.network, dataclasses.replace(batch, masked_BS=torch.zeros_like(batch.masked_BS)))
        return terms, (hidden_BSD, visible_BSD)

    def _held_out_batches(self) -> Generator[tuple[list[Window], Batch], None, None]:
        """Yield this worker's share of the held-out windows, titles of similar size together."""
        by_size = np.argsort(self.titles.sizes[self.titles.held_out], kind="stable")
        size = self.config.windows_per_step  # It must not depend on the number of workers: cut-aways come from the group.
        groups = [by_size[first : first + size].tolist() for first in range(0, len(by_size), size)][self.rank :: self.workers]

        def make(slots: list[int]) -> tuple[list[Window], Batch]:
            windows = [self.source.of_evaluation(slot) for slot in slots]
            random = random_of(self.config.seed, HELD_OUT, CUT_AWAYS, slots[0])
            return windows, collate(windows, self.titles.metadata_dim, self.config.cut_away_fraction, random)

        return read_ahead(make, groups, self.config.read_threads, self.config.read_ahead)

    def _record_evaluation(self, recorder: Recorder, row: Mapping[str, float] | None = None, with_baselines: bool = False) -> None:
        """Evaluate, add the metrics to the row, keep the model if it is the best, and decide on an early stop."""
        standing = self.standing
        found = self.evaluate(with_baselines)
        if not all(map(math.isfinite, found.values())):
            raise TrainingError(f"the output of the model is NaN or infinite at step {standing.step}: lower training.learning_rate")
        if found or row:
            recorder.row({"step": standing.step, **(row or {}), **found})
        score = -found["held_out_loss"] if "held_out_loss" in found else found.get("held_out_cosine")
        if score is None:  # There are no held-out titles: the last model is kept.
            if standing.step:
                standing.best_step = standing.step
                recorder.best(self.model)
        elif standing.step == 0:
            return
        elif score > standing.best_score + MIN_GAIN:
            standing.best_score, standing.best_step, standing.without_gain = score, standing.step, 0
            recorder.best(self.model)
        else:
            standing.without_gain += 1
            if self.config.patience and standing.without_gain >= self.config.patience:
                standing.stopped = f"early stop: no gain on held-out titles in {standing.without_gain} evaluations"

    # -------------------------------------------------------------------------------------------------------- state

    def state(self) -> bytes:
        """Return all that a resumed training needs as one safetensors file: weights, state of the optimisers, TrainerState."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimiser.{name}": tensor for name, tensor in self.optimisers.state_dict().items()}
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return save_tensors(contiguous, {STATE_KEY: json.dumps(dataclasses.asdict(self.standing))})

    def resume(self, state: bytes) -> None:
        """Restore a state. Raises StateError if it is incomplete or of another model."""
        try:
            tensors = load_tensors(state)
            standing = TrainerState(**json.loads(state_header(state)["__metadata__"][STATE_KEY]))
            self.model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
            self.optimisers.load_state_dict({name[10:]: tensor for name, tensor in tensors.items() if name.startswith("optimiser.")})
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StateError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        self.standing = standing


def state_header(beginning: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file from its first bytes. Raises StateError if they do not contain it."""
    length = int.from_bytes(beginning[:8], "little")
    if len(beginning) < 8 + length or not length:
        raise StateError(f"it ends inside its header: {len(beginning)} of {8 + length} bytes")
    try:
        return json.loads(beginning[8 : 8 + length])
    except ValueError as error:
        raise StateError(f"its header is not JSON ({error})") from error


def state_bytes(header: Mapping[str, Any], header_length: int) -> int:
    """Return the length in bytes of a complete file with this header."""
    return 8 + header_length + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def significant(value: float) -> float:
    """Round a number to METRIC_DIGITS significant digits."""
    return float(f"{value:.{METRIC_DIGITS}g}")
