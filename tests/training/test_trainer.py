"""Training from outside: the inputs of the loss, learning, resuming, and several workers against one."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

from mediafm_ray.training.batches import UnusableTitle, collate
from mediafm_ray.training.options import ShapeConfig, TrainingConfig
from mediafm_ray.training.trainer import StateError, Trainer, TrainingError, new_model
from tests.training.titles import FUSED_DIM, METADATA_DIM, SPANS, MadeTitles

SHAPE = ShapeConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_shots=16)
SHORT = TrainingConfig(
    objective="recipe",
    steps=12,
    windows_per_step=4,
    warmup_steps=3,
    evaluate_every=4,
    log_every=3,
    save_every=5,
    learning_rate=3e-3,
    threads=1,
)
CONTEXT = TrainingConfig(**{**vars(SHORT), "objective": "context"})
EVALUATED = ("held_out_cosine", "held_out_identity", "held_out_context")


class Memory:
    """A recorder that keeps everything, and can stop a training as a kill would: after the n-th save."""

    class Killed(Exception):
        pass

    def __init__(self, die_after_saves: int = 10**9):
        self.rows: list[dict[str, float]] = []
        self.models: list[dict[str, torch.Tensor]] = []
        self.states: list[bytes] = []
        self.die_after_saves = die_after_saves

    def row(self, row):
        self.rows.append(dict(row))

    def best(self, model):
        self.models.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def save(self, trainer):
        self.states.append(trainer.state())
        if len(self.states) >= self.die_after_saves:
            raise self.Killed


def titles_of(count: int = 12, held_out: tuple[int, ...] = (2, 7)) -> MadeTitles:
    return MadeTitles([6 + 3 * index for index in range(count)], held_out)


def trainer_of(titles: MadeTitles, config: TrainingConfig = SHORT, shape: ShapeConfig = SHAPE) -> Trainer:
    return Trainer(model_of(config, shape), titles, config)


def model_of(config: TrainingConfig, shape: ShapeConfig = SHAPE, seed: int | None = None):
    spans = SPANS if config.objective == "context" else None
    return new_model(shape, FUSED_DIM, METADATA_DIM, "0123456789ab", config.seed if seed is None else seed, spans)


def changed(config, **changes):
    return type(config)(**{**vars(config), **changes})


# ------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_cosine_distance_at_masked_shots_only():
    trainer = trainer_of(titles_of(), shape=changed(SHAPE, dropout=0.0))
    batch = next(trainer.batches(0))
    model = trainer.model
    outputs = {}

    def keep(module, inputs, output):
        output.retain_grad()
        outputs["BSD"] = output

    model.shot_output.register_forward_hook(lambda *given: keep(*given) if given[2].ndim == 3 else None)
    trainer.optimisers.step = lambda step: torch.zeros(())
    trainer.step(batch)
    gradients_BS = outputs["BSD"].grad.abs().sum(dim=-1)
    assert (gradients_BS[batch.masked_BS] > 0).all()
    assert not gradients_BS[~batch.masked_BS].any()
    predicted = outputs["BSD"].detach().numpy().astype(np.float64)[batch.masked_BS.numpy()]
    truth = batch.fused_BSD.numpy()[batch.masked_BS.numpy()]
    cosines = (predicted * truth).sum(axis=1) / np.linalg.norm(predicted, axis=1) / np.linalg.norm(truth, axis=1)
    trainer._gather_sums()
    assert trainer.standing.loss_sums[0] / trainer.standing.loss_counts[0] == pytest.approx(1 - cosines.mean(), rel=1e-5)


def test_what_is_hidden_cannot_be_seen():
    """Other vectors behind [MASK] change the truth, never the prediction; other metadata and visible shots change the prediction."""
    trainer = trainer_of(titles_of())
    windows = trainer.source.of_step(0, 0, 1)
    batch = collate(windows, METADATA_DIM)
    trainer.model.eval()
    with torch.no_grad():
        given = (batch.metadata_BM, batch.has_metadata_B, batch.shots_BS, batch.masked_BS)
        before = trainer.model(batch.fused_BSD, *given).contextual_BSD
        other = torch.where(batch.masked_BS[:, :, None], 7.0, batch.fused_BSD)
        assert torch.equal(trainer.model(other, *given).contextual_BSD, before)


# --------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_it_learns_what_neighbours_cannot_tell(optimiser):
    """Places alternate A B A B: the neighbours of a hidden shot show the other place, and a mean shows both. Dropout off, one catalog."""
    titles = MadeTitles([16] * 8, held_out=[3])
    titles.train = np.arange(8)  # to learn by heart: the held-out title is trained on, too
    config = TrainingConfig(
        objective="recipe",
        steps=150,
        windows_per_step=8,
        warmup_steps=10,
        evaluate_every=150,
        log_every=50,
        learning_rate=1e-2,
        optimiser=optimiser,
    )
    memory = Memory()
    trainer_of(titles, config, changed(SHAPE, dropout=0.0)).train(memory)
    first, last = memory.rows[0], memory.rows[-1]
    assert abs(first["held_out_cosine"]) < 0.5
    assert first["held_out_nearest_shot"] < 0.7
    assert last["held_out_cosine"] > 0.9
    assert last["loss"] < 0.1


def test_rows_of_metrics_say_what_happened():
    memory = Memory()
    trainer = trainer_of(titles_of())
    trainer.train(memory)
    assert [row["step"] for row in memory.rows] == [0, 3, 4, 6, 8, 9, 12]
    assert set(memory.rows[0]) == {
        "step",
        *EVALUATED,
        *(f"{name}_neighbours" for name in EVALUATED),
        "held_out_title_mean",
        "held_out_nearest_shot",
        "held_out_interpolation",
    }
    assert set(memory.rows[1]) == {"step", "loss", "learning_rate", "gradient_norm"}
    assert set(memory.rows[-1]) == {*memory.rows[1], *EVALUATED}
    assert all(math.isfinite(value) for row in memory.rows for value in row.values())
    assert trainer.standing.stopped == "all 12 steps are done"
    evaluated = [row for row in memory.rows[1:] if "held_out_cosine" in row]
    assert trainer.standing.best_score == max(row["held_out_cosine"] for row in evaluated)
    assert len(memory.states) == 3  # steps 5, 10 and the last


def test_no_gain_on_held_out_titles_ends_training_with_the_best_model():
    config = changed(SHORT, steps=400, patience=3, evaluate_every=2, learning_rate=1e-9, muon_learning_rate=1e-9)  # it learns nothing
    memory = Memory()
    trainer = trainer_of(titles_of(), config)
    trainer.train(memory)
    assert trainer.standing.step == 8
    assert "no gain on held-out titles in 3 evaluations" in trainer.standing.stopped
    assert (trainer.standing.best_step, len(memory.models)) == (2, 1)


# ------------------------------------------------------------------------------------------------------ interrupted


@pytest.mark.parametrize(("config", "saves"), [(SHORT, 1), (SHORT, 2), (CONTEXT, 1)])
def test_a_killed_training_goes_on_with_the_same_numbers(config, saves):
    undisturbed = Memory()
    trainer_of(titles_of(), config).train(undisturbed)
    killed = Memory(die_after_saves=saves)
    with pytest.raises(Memory.Killed):
        trainer_of(titles_of(), config).train(killed)
    again = Memory()
    trainer = Trainer(model_of(config, seed=99), titles_of(), config)
    trainer.resume(killed.states[-1])
    assert trainer.standing.step == 5 * saves
    trainer.train(again)
    kept = [row for row in killed.rows if row["step"] <= 5 * saves]
    assert kept + again.rows == undisturbed.rows
    assert again.states[-1] == undisturbed.states[-1]


def test_a_finished_training_takes_no_more_steps():
    memory, nothing = Memory(), Memory()
    trainer_of(titles_of()).train(memory)
    trainer = trainer_of(titles_of())
    trainer.resume(memory.states[-1])
    trainer.train(nothing)
    assert (nothing.rows, nothing.states) == ([], [])


def test_a_state_that_is_cut_short_or_of_another_model_is_refused():
    memory = Memory()
    trainer_of(titles_of()).train(memory)
    state = memory.states[-1]
    for part in (b"", state[:5], state[:100], state[: len(state) // 2], state[:-1], b"\xff" * 64):
        with pytest.raises(StateError):
            trainer_of(titles_of()).resume(part)
    with pytest.raises(StateError):
        trainer_of(titles_of(), shape=changed(SHAPE, hidden_size=16)).resume(state)


# -------------------------------------------------------------------------------------------------------- odd input


def test_one_title_has_no_held_out_side_and_the_last_model_is_kept():
    memory = Memory()
    trainer = trainer_of(MadeTitles([20]))
    trainer.train(memory)
    assert not any("held_out_cosine" in row for row in memory.rows)
    assert trainer.standing.best_step == 12
    assert all(torch.equal(memory.models[-1][name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_titles_of_one_shot_are_predicted_from_their_metadata():
    memory = Memory()
    trainer_of(MadeTitles([1] * 6, held_out=[0])).train(memory)
    assert memory.rows[0]["held_out_interpolation"] == 0.0
    assert all(math.isfinite(value) for row in memory.rows for value in row.values())


def test_numbers_that_run_away_end_training_before_anything_is_kept():
    memory = Memory()
    trainer = trainer_of(titles_of())
    with torch.no_grad():
        trainer.model.shot_input.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match="lower training"):
        trainer.train(memory)
    assert (memory.states, memory.models) == ([], [])


def test_a_catalog_without_a_usable_title_is_an_error():
    with pytest.raises(UnusableTitle, match="none of the 3"):
        trainer_of(MadeTitles([8, 8, 8, 8], held_out=[0], broken=[1, 2, 3])).train(Memory())


def test_bfloat16_is_close_to_float32():
    rows = []
    for precision in ("float32", "bfloat16"):
        memory = Memory()
        trainer_of(titles_of(), changed(SHORT, precision=precision), changed(SHAPE, dropout=0.0)).train(memory)
        rows.append(memory.rows)
    for exact, rounded in zip(*rows, strict=True):
        assert {name: pytest.approx(value, abs=0.05) for name, value in exact.items() if name != "gradient_norm"}.items() <= rounded.items()
    assert rows[0] != rows[1]


# ---------------------------------------------------------------------------------------------------------- workers


def work(rank: int, workers: int, port: int, folder: str) -> None:
    """A worker of a process group, without Ray."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)
    memory = Memory()
    trainer_of(titles_of(), changed(SHORT, windows_per_step=5), changed(SHAPE, dropout=0.0)).train(memory)
    torch.save({"rows": memory.rows, "model": memory.models[-1]}, Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.integration
def test_two_workers_do_what_one_does(tmp_path):
    """Five windows: three for one worker, two for the other. Without dropout loss and gradients' norm are the same, to rounding."""
    memory = Memory()
    trainer_of(titles_of(), changed(SHORT, windows_per_step=5), changed(SHAPE, dropout=0.0)).train(memory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (2, port, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert parts[0]["rows"] == parts[1]["rows"]
    for alone, together in zip(memory.rows, parts[0]["rows"], strict=True):
        assert together == {name: pytest.approx(value, rel=1e-3, abs=1e-3) for name, value in alone.items()}
    for name, tensor in parts[0]["model"].items():
        assert torch.equal(tensor, parts[1]["model"][name])
        assert (tensor - memory.models[-1][name]).norm() < 0.1 * tensor.norm(), name  # Muon gives directions of rounding full steps


def test_fewer_windows_than_workers_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 5)
    with pytest.raises(ValueError, match="4 is less than one window for each of 5 workers"):
        trainer_of(titles_of())
