"""Training from outside: a real command over stored shots, killed in the middle, run again; and what it refuses to begin with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import train_contextualiser
from mediafm_ray.config.jobs import TrainContextualiserConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.models.contextualiser import TitleContextualiser
from mediafm_ray.models.options import ContextualiserConfig
from mediafm_ray.pipeline.training.folder import TrainingFolder
from mediafm_ray.pipeline.training.titles import StoredTitles, list_titles
from mediafm_ray.pipeline.training.train import plan_training
from mediafm_ray.runs.command import EXIT_BAD_INPUT, EXIT_OK, run_job
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.training.trainer import Trainer, new_model
from tests.end_to_end.clips import ROOT
from tests.training.stored import VERSION, write_dataset
from tests.training.test_trainer import Memory
from tests.training.titles import FUSED_DIM, METADATA_DIM, make_title

SHOTS = [4 + 3 * index for index in range(16)]
OPTIONS = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.intermediate_size": 64,
    "model.max_shots": 24,
    "training.steps": 120,
    "training.windows_per_step": 4,
    "training.warmup_steps": 10,
    "training.evaluate_every": 20,
    "training.log_every": 5,
    "training.save_every": 10,
    "training.held_out_fraction": 0.2,
    "training.patience": 0,
    "training.threads": 1,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks on a busy machine: several threads would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("embeddings"), SHOTS)


def arguments(dataset: Path, checkpoint: Path, **changes: object) -> list[str]:
    options = {**OPTIONS, **{key.replace("__", "."): value for key, value in changes.items()}}
    places = {"dataset.uri": dataset, "checkpoint.uri": checkpoint}
    return [f"{key}={value}" for key, value in {**places, **options}.items() if value != ""]


def command(*given: object, **changes: object) -> list[str]:
    return [sys.executable, "-m", "jobs.train_contextualiser", *arguments(*given, **changes)]  # type: ignore[arg-type]


def train(*given: object, **changes: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*given, **changes), cwd=ROOT, capture_output=True, text=True, timeout=600)


def refused(capsys: pytest.CaptureFixture, *given: object, **changes: object) -> str:
    """What the command says on stderr when it refuses to begin: one line."""
    capsys.readouterr()
    code = run_job("", TrainContextualiserConfig, train_contextualiser.main, arguments(*given, **changes))  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert code == EXIT_BAD_INPUT, said
    assert said.count("\n") == 1, said
    return said


def config_of(dataset: Path, checkpoint: Path, **changes: object) -> TrainContextualiserConfig:
    return read_config(TrainContextualiserConfig, [], arguments(dataset, checkpoint, **changes))


def undisturbed(dataset: Path, checkpoint: Path, **changes: object) -> Memory:
    """The same training in this process, without Ray, without an interruption."""
    config = config_of(dataset, checkpoint, **changes)
    stored = stored_titles(dataset, config)
    memory = Memory()
    model = new_model(config.model, stored.fused_dim, stored.metadata_dim, VERSION, config.training.seed)
    Trainer(model, stored, config.training).train(memory)
    return memory


def stored_titles(dataset: Path, config: TrainContextualiserConfig, cache_bytes: int = 0) -> StoredTitles:
    titles = list_titles(EmbeddingDataset(str(dataset)))
    return StoredTitles(
        str(dataset), titles, config.training.held_out_fraction, config.training.held_out_titles, StorageConfig(), cache_bytes
    )


def metrics(checkpoint: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]


def wait_for_state(process: subprocess.Popen, checkpoint: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not any(int(path.stem[-9:]) >= step for path in checkpoint.glob("training/state-*")):
        assert process.poll() is None, "training ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:  # gone meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


# ------------------------------------------------------------------------------------------------------ interrupted


@pytest.mark.slow
def test_a_killed_training_is_finished_by_the_same_command(dataset, tmp_path):
    """The driver is killed with SIGKILL in the middle; the metrics and the model are those of a training that nothing disturbed."""
    checkpoint = tmp_path / "contextualiser"
    process = subprocess.Popen(command(dataset, checkpoint), cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for_state(process, checkpoint, 20)  # two states are there then
    workers = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in workers:  # Ray ends them, too, in its own time
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    newest = sorted(path.name for path in checkpoint.glob("training/state-*"))[-1]
    assert newest < "state-000000120"
    (checkpoint / "training" / newest).write_bytes((checkpoint / "training" / newest).read_bytes()[:-100])  # and its disk was full

    again = train(dataset, checkpoint)
    assert again.returncode == EXIT_OK, again.stdout + again.stderr
    assert f"{newest} is cut short" in again.stdout
    assert "going on from step" in again.stdout
    memory = undisturbed(dataset, tmp_path / "elsewhere")
    assert metrics(checkpoint) == memory.rows
    assert [row["step"] for row in memory.rows] == [0, *range(5, 121, 5)]

    contextualiser = TitleContextualiser(ContextualiserConfig(checkpoint=str(checkpoint)))
    assert contextualiser.model.config.dataset_version == VERSION
    for name, tensor in memory.models[-1].items():
        assert torch.equal(tensor, contextualiser.model.state_dict()[name]), name
    contextual, _ = contextualiser.contextualise(make_title(3, 40).fused_SD, make_title(3, 40).metadata_M)
    assert np.isfinite(contextual).all()

    assert (checkpoint / "training.png").read_bytes().startswith(b"\x89PNG")
    scalars = [path.read_bytes() for path in checkpoint.glob("tensorboard/events.out.tfevents.*")]
    assert [content.count(b"held_out_cosine") for content in scalars] == [7]
    assert [content.count(b"loss") for content in scalars] == [24]
    assert not list(checkpoint.glob("training/state-*"))
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    third = train(dataset, checkpoint)
    assert third.returncode == EXIT_OK
    assert "training is finished: there is nothing to do" in third.stdout
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_killed_workers_are_replaced_and_two_do_what_one_does(dataset, tmp_path):
    checkpoint = tmp_path / "contextualiser"
    changes = {"resources__workers": 2, "resources__num_cpus": 0.5, "model__dropout": 0.0}
    process = subprocess.Popen(command(dataset, checkpoint, **changes), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for_state(process, checkpoint, 10)
    named = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(process.pid) if Path(f"/proc/{pid}/cmdline").exists()}
    workers = [pid for pid, name in named.items() if "TrainWorker" in name]
    assert len(workers) == 2, named
    os.kill(workers[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == EXIT_OK, said
    assert "going on from step" in said
    memory = undisturbed(dataset, tmp_path / "elsewhere", **changes)
    for together, alone in zip(metrics(checkpoint), memory.rows, strict=True):
        assert together == {name: pytest.approx(value, rel=0.02, abs=0.01) for name, value in alone.items()}


# -------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_begin_is_one_line(dataset, tmp_path, capsys):
    checkpoint = tmp_path / "contextualiser"
    assert "dataset.uri is required" in refused(capsys, "", checkpoint)
    assert "checkpoint.uri is required" in refused(capsys, dataset, "")
    assert "has no dataset version" in refused(capsys, tmp_path / "nowhere", checkpoint)
    assert "ffffffffffff" in refused(capsys, dataset, checkpoint, dataset__version="ffffffffffff")
    assert "no committed shots" in refused(capsys, write_dataset(tmp_path / "empty", []), checkpoint)
    assert "resources.workers=9" in refused(capsys, dataset, checkpoint, resources__workers=9)
    assert "model.hidden_size 32 is not a multiple" in refused(capsys, dataset, checkpoint, model__num_attention_heads=5)
    assert "training.optimiser" in refused(capsys, dataset, checkpoint, training__optimiser="sgd")
    assert "training.device must be cpu or cuda" in refused(capsys, dataset, checkpoint, training__device="gpu")
    assert "training.no_such_key" in refused(capsys, dataset, checkpoint, training__no_such_key=1)
    assert not checkpoint.exists()
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file" / "below") in refused(capsys, dataset, tmp_path / "file" / "below")


@pytest.mark.parametrize("profile", sorted((ROOT / "conf" / "training").glob("*.yaml")), ids=lambda path: path.stem)
def test_profiles_of_training_parse(profile):
    assert isinstance(read_config(TrainContextualiserConfig, [str(profile)], []), TrainContextualiserConfig)


def test_another_training_is_not_continued(dataset, tmp_path, capsys):
    checkpoint = tmp_path / "contextualiser"
    plan_training(config_of(dataset, checkpoint))
    assert "training.seed was 0 and is 1" in refused(capsys, dataset, checkpoint, training__seed=1)
    assert "model.max_shots was 24 and is 25" in refused(capsys, dataset, checkpoint, model__max_shots=25)
    other = write_dataset(tmp_path / "other", SHOTS[:3], version="ffffffffffff")
    said = refused(capsys, other, checkpoint)
    assert f"dataset version {VERSION}" in said
    assert "version ffffffffffff" in said
    plan_training(config_of(dataset, checkpoint, training__save_every=7))  # changes no number
    foreign = tmp_path / "foreign"
    new_model(config_of(dataset, foreign).model, FUSED_DIM, METADATA_DIM, "", 0).save_pretrained(foreign)
    assert "would be overwritten" in refused(capsys, dataset, foreign)


def test_states_that_are_cut_short(dataset, tmp_path, capsys):
    checkpoint = tmp_path / "contextualiser"
    config = config_of(dataset, checkpoint, training__steps=9)
    plan_training(config)
    memory = undisturbed(dataset, checkpoint, training__steps=9)
    folder = TrainingFolder(str(checkpoint), StorageConfig())
    state = memory.states[-1]
    for step in (3, 6, 9):
        folder.write_state(step, state)
    assert [info.name[-21:-12] for info in folder.states()] == ["000000009", "000000006"]  # two are kept
    assert plan_training(config).resume_step == 9
    newest = checkpoint / "training" / "state-000000009.safetensors"
    for part in (state[:-1], state[:200], state[:4], b""):
        newest.write_bytes(part)
        plan = plan_training(config)
        assert plan.resume_step == 6
        assert "state-000000009.safetensors is cut short" in plan.notes[0]
    (checkpoint / "training" / "state-000000006.safetensors").write_bytes(state[:-1])
    assert "no saved state is whole" in refused(capsys, dataset, checkpoint, training__steps=9)


def test_a_training_on_object_storage_keeps_the_same_objects(dataset):
    """fsspec's store in memory stands for one: what is put there is found again, a state of other length is not whole."""
    folder = TrainingFolder("memory://trainings/one", StorageConfig())
    assert folder.newest_state() == (None, [])
    assert folder.read_metrics(10) == []
    assert folder.read_json("training/plan.json") is None
    assert not folder.holds_other_checkpoint()
    state = undisturbed(dataset, Path("unused"), training__steps=4).states[-1]
    for step in (2, 4):
        folder.write_state(step, state)
    folder.write_metrics([{"step": 1, "loss": 0.5}, {"step": 4, "loss": 0.25}])
    assert folder.read_metrics(3) == [{"step": 1, "loss": 0.5}]
    newest, damaged = folder.newest_state()
    assert (newest.name, damaged) == ("training/state-000000004.safetensors", [])
    folder.store.write(newest.name, state + b"more")
    older, damaged = folder.newest_state()
    assert older.name == "training/state-000000002.safetensors"
    assert len(damaged) == 1
    folder.write_model(new_model(config_of(dataset, Path("unused")).model, FUSED_DIM, METADATA_DIM, VERSION, 0))
    assert folder.holds_other_checkpoint()
    folder.finish({"step": 4})
    assert folder.states() == []
    assert folder.read_json("training/finished.json") == {"step": 4}


def test_the_list_of_titles_is_fixed_when_training_begins(tmp_path):
    dataset, checkpoint = write_dataset(tmp_path / "embeddings", SHOTS[:5]), tmp_path / "contextualiser"
    before = plan_training(config_of(dataset, checkpoint))
    write_dataset(dataset, SHOTS[:9])  # a backfill comes by
    assert plan_training(config_of(dataset, checkpoint)).titles == before.titles
    assert len(before.titles.objects) == 5


# ---------------------------------------------------------------------------------------------------- stored titles


def test_stored_titles_are_what_was_written(dataset):
    config = config_of(dataset, Path("unused"))
    stored = stored_titles(dataset, config, cache_bytes=20_000)
    assert sorted([*stored.train, *stored.held_out]) == list(range(16))
    for index in [*range(16), *range(16)]:
        title = stored.read(index)
        number = int(title.title_id.removeprefix("title-"))
        expected = make_title(number, SHOTS[number])
        np.testing.assert_array_equal(title.fused_SD, expected.fused_SD)
        np.testing.assert_allclose(title.times_S2, expected.times_S2, rtol=1e-5)
        np.testing.assert_array_equal(title.metadata_M, expected.metadata_M)
        assert stored.cached_bytes == sum(title.bytes for title in stored.cache.values()) <= 20_000
    assert 1 < len(stored.cache) < 16


def test_titles_that_cannot_be_used_are_named_and_passed_over(tmp_path):
    """Not finite, cut short, gone: training goes on without them, and its numbers are those of no title at all."""
    dataset = write_dataset(tmp_path / "embeddings", SHOTS, nan_in=[4])
    objects = {path.name.split("@")[0]: path for path in dataset.glob(f"{VERSION}/shots/*/*.parquet")}
    content = objects["title-6"].read_bytes()
    objects["title-6"].write_bytes(content[: len(content) // 2])
    config = config_of(dataset, tmp_path / "unused", training__steps=20, training__held_out_fraction=0.0)
    stored = stored_titles(dataset, config)
    objects["title-9"].unlink()
    said: list[str] = []
    model = new_model(config.model, FUSED_DIM, METADATA_DIM, VERSION, 0)
    memory = Memory()
    Trainer(model, stored, config.training, said.append).train(memory)
    reasons = {line.split()[1].rstrip(":"): line for line in said}
    assert set(reasons) == {"title-4", "title-6", "title-9"}
    assert "shot 8 is not finite" in reasons["title-4"]
    assert "not a readable Parquet file" in reasons["title-6"]
    assert "is gone" in reasons["title-9"]
    assert all(np.isfinite(list(row.values())).all() for row in memory.rows)
    assert all(tensor.isfinite().all() for tensor in memory.models[-1].values())
