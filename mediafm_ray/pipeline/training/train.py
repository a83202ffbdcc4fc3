"""Training on Ray: the checks before it begins, the workers (Ray Train), and the progress on the terminal."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mediafm_ray.config.jobs import TrainContextualiserConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.config.sections import ResourcesConfig
from mediafm_ray.models.options import BUILTIN_NEIGHBOURS
from mediafm_ray.pipeline.training.folder import CURVES, EVENTS, FINISHED, PLAN, TrainingFolder
from mediafm_ray.pipeline.training.titles import StoredTitles, TitleList, list_titles
from mediafm_ray.runs.report import Console, clean_logs, clock, reason_of
from mediafm_ray.spec import recipe_of
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.store import StorageConfig, absolute
from mediafm_ray.text import public_line
from mediafm_ray.training.baselines import BASELINES
from mediafm_ray.training.batches import UnusableTitle
from mediafm_ray.training.options import ShapeConfig, TrainingConfig
from mediafm_ray.training.trainer import FIGURES, StateError, Trainer, TrainingError, new_model

GB = 10**9
MIN_WRITE_INTERVAL_S = 5.0  # For the metrics, which are also written with every state.
MIN_CURVES_INTERVAL_S = 30.0
MIN_LINE_INTERVAL_S = 2.0  # For lines on the terminal without an evaluation.
POLL_INTERVAL_S = 0.2  # The driver asks for messages of the workers this often.


@dataclass(frozen=True)
class TrainingPlan:
    """Plan of a training."""

    folder_uri: str
    dataset_uri: str
    titles: TitleList
    train: int  # Number of titles to train on.
    held_out: int  # Number of titles to evaluate on.
    resume_step: int  # Step of the state from which training resumes; 0 = from the start.
    notes: tuple[str, ...]  # Warnings for a person.
    finished: Mapping[str, Any] | None  # The record of why it ended, if it has.


# ------------------------------------------------------------------------------------------------------------- plan


def plan_training(config: TrainContextualiserConfig) -> TrainingPlan:
    """Read the dataset and ``checkpoint.uri``; write plan.json for a training that begins.

    Raises ConfigError, DatasetError or StorageError where training cannot begin or resume.
    """
    for key, uri in (("dataset.uri", config.dataset.uri), ("checkpoint.uri", config.checkpoint.uri)):
        if not uri:
            raise ConfigError(f"{key} is required")
    if config.training.windows_per_step < config.resources.workers:
        raise ConfigError(
            f"training.windows_per_step={config.training.windows_per_step} is less than a window for each of "
            f"resources.workers={config.resources.workers}"
        )
    folder = TrainingFolder(config.checkpoint.uri, config.storage)
    found = folder.read_json(PLAN)
    if found is None and folder.holds_other_checkpoint():
        raise ConfigError(
            f"checkpoint.uri={config.checkpoint.uri} holds a checkpoint that was not trained there: it would be overwritten; choose another"
        )
    dataset = EmbeddingDataset(config.dataset.uri, config.dataset.version or None, config.storage)
    if found is None:
        titles = list_titles(dataset)
        folder.store.check_writable()
        folder.write_json(PLAN, {"recipe": recipe_of_training(config), "titles": titles.to_json()})
        found = {}
    else:
        titles = TitleList.from_json(found["titles"])
        check_same_training(found, dataset, config)
    state, damaged = folder.newest_state()
    train, held_out = titles.split(config.training.held_out_fraction, config.training.held_out_titles)
    return TrainingPlan(
        folder_uri=absolute(config.checkpoint.uri),
        dataset_uri=absolute(config.dataset.uri),
        titles=titles,
        train=len(train),
        held_out=len(held_out),
        resume_step=int(state.name[-21:-12]) if state else 0,
        notes=tuple(f"warning: {one}: the one before it is taken" for one in damaged),
        finished=folder.read_json(FINISHED),
    )


def recipe_of_training(config: TrainContextualiserConfig) -> dict[str, Any]:
    """Return all keys that change the numbers of a training, with their values."""
    sections = {"model": config.model, "training": config.training}
    return {f"{section}.{key}": value for section, options in sections.items() for key, value in recipe_of(options).items()}


def check_same_training(plan: Mapping[str, Any], dataset: EmbeddingDataset, config: TrainContextualiserConfig) -> None:
    """Raise ConfigError where ``checkpoint.uri`` holds a training with another dataset or recipe."""
    another = "use the same values, or another checkpoint.uri for another training"
    before = TitleList.from_json(plan["titles"])
    now = (dataset.version, dataset.model.dims["fused"], dataset.model.dims["text"])
    if now != (before.dataset_version, before.fused_dim, before.metadata_dim):
        raise ConfigError(
            f"the training in checkpoint.uri={config.checkpoint.uri} is on dataset version {before.dataset_version} "
            f"(fused {before.fused_dim}, metadata {before.metadata_dim} dimensions), and dataset.uri={config.dataset.uri} is version "
            f"{now[0]} ({now[1]} and {now[2]}): {another}"
        )
    wanted = recipe_of_training(config)
    changed = [f"{key} was {plan['recipe'].get(key)} and is {value}" for key, value in wanted.items() if plan["recipe"].get(key) != value]
    if changed:
        raise ConfigError(f"the training in checkpoint.uri={config.checkpoint.uri} was begun otherwise: {'; '.join(changed)}: {another}")


# ---------------------------------------------------------------------------------------------------------- workers


@dataclass(frozen=True)
class WorkerTask:
    """Arguments of every worker."""

    folder_uri: str
    dataset_uri: str
    model: ShapeConfig
    training: TrainingConfig
    storage: StorageConfig
    workers: int
    messages: Any  # Handle of the MessageQueue actor.


def train_worker(given: Mapping[str, Any]) -> None:
    """Train in a worker process, from the last state to the end."""
    import ray
    import ray.train
    import torch

    clean_logs()
    task: WorkerTask = given["task"]
    context = ray.train.get_context()
    first = context.get_world_rank() == 0
    torch.set_num_threads(task.training.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    config = task.training
    if config.device != "cpu":
        from ray.train.torch import get_device

        config = dataclasses.replace(config, device=str(get_device()))
    folder = TrainingFolder(task.folder_uri, task.storage)
    plan = folder.read_json(PLAN)
    assert plan is not None, "the driver wrote it"
    titles = StoredTitles(
        task.dataset_uri,
        TitleList.from_json(plan["titles"]),
        config.held_out_fraction,
        config.held_out_titles,
        task.storage,
        int(config.cache_gb * GB),
    )
    try:
        spans = titles.spans if config.objective == "context" else None
        model = new_model(task.model, titles.fused_dim, titles.metadata_dim, plan["titles"]["dataset_version"], config.seed, spans)
        trainer = Trainer(model, titles, config, lambda message: task.messages.post.remote("unusable", message))
        state, _ = folder.newest_state()
        if state is not None:
            trainer.resume(folder.store.read(state.name))
        recorder = StoreRecorder(folder, trainer, task.messages) if first else BarrierRecorder()
        trainer.train(recorder)
        if isinstance(recorder, StoreRecorder):
            recorder.finish()
    except (TrainingError, StateError, UnusableTitle) as error:  # A retry cannot help.
        ray.get(task.messages.post.remote("fatal", str(error)))
        raise


class BarrierRecorder:
    """Recorder of the workers that record nothing; they meet the first worker at ray.train.report."""

    def row(self, row: Mapping[str, float]) -> None:
        if "held_out_cosine" in row:
            import ray.train

            ray.train.report(dict(row))

    def best(self, model: Any) -> None:
        pass

    def save(self, trainer: Trainer) -> None:
        pass


class StoreRecorder(BarrierRecorder):
    """Recorder of the first worker: it writes metrics, the best model and the states to the folder, and posts rows to the driver."""

    def __init__(self, folder: TrainingFolder, trainer: Trainer, messages: Any):
        self.folder, self.trainer, self.messages = folder, trainer, messages
        resumed = trainer.standing.step
        self.rows = folder.read_metrics(resumed) if resumed else []
        self.events = EventFiles(folder, self.rows)
        self.written = self.drawn = self.begun = time.monotonic()
        if resumed:
            messages.post.remote("resumed", resumed)

    def row(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))
        self.events.add(row)
        self.messages.post.remote("row", {**row, "elapsed_s": time.monotonic() - self.begun})
        if time.monotonic() - self.written > MIN_WRITE_INTERVAL_S:
            self._write_metrics()
        super().row(row)

    def best(self, model: Any) -> None:
        self.folder.write_model(model)

    def save(self, trainer: Trainer) -> None:
        self._write_metrics()
        self.events.keep()
        if time.monotonic() - self.drawn > MIN_CURVES_INTERVAL_S:
            self._draw()
        self.folder.write_state(trainer.standing.step, trainer.state())

    def finish(self) -> None:
        """Write what is left at the end of training, then the record that it has ended."""
        standing = self.trainer.standing
        self._write_metrics()
        self.events.keep()
        self._draw()
        evaluated = {row["step"]: row for row in self.rows if "held_out_cosine" in row}
        cosines = {key: value for key, value in evaluated.get(standing.best_step, {}).items() if key.startswith("held_out_")}
        baselines = {key: value for key, value in evaluated.get(0, {}).items() if key.startswith("held_out_") and key != "held_out_cosine"}
        ending = {"step": standing.step, "reason": standing.stopped, "best_step": standing.best_step, **baselines, **cosines}
        self.folder.finish(ending)

    def _write_metrics(self) -> None:
        self.folder.write_metrics(self.rows)
        self.written = time.monotonic()

    def _draw(self) -> None:
        from mediafm_ray.pipeline.training.curves import draw  # Matplotlib takes half a second to import.

        self.folder.store.write(CURVES, draw(self.rows, self.folder.store.uri.rsplit("/", 1)[-1]))
        self.drawn = time.monotonic()


class EventFiles:
    """The rows for TensorBoard, in one file that every training process writes anew, so that no row is missing or doubled."""

    def __init__(self, folder: TrainingFolder, rows: list[dict[str, float]]):
        from tensorboardX import SummaryWriter

        self.store = folder.store
        for info in list(self.store.list(EVENTS)):
            self.store.delete(info.name)
        self.remote = None if self.store.is_local else tempfile.TemporaryDirectory()
        self.folder = Path(self.remote.name if self.remote else self.store.path(EVENTS))
        self.writer = SummaryWriter(str(self.folder), flush_secs=5)
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, float]) -> None:
        """Add every number of a row at its step."""
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(row["step"]))

    def keep(self) -> None:
        """Write all rows so far to the folder."""
        self.writer.flush()
        if self.remote:
            for file in self.folder.iterdir():
                self.store.write(f"{EVENTS}/{file.name}", file.read_bytes())


# ----------------------------------------------------------------------------------------------------------- driver


class MessageQueue:
    """Actor that holds the messages of the workers for the driver."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []

    def post(self, kind: str, content: Any) -> None:
        """Add a message."""
        self.messages.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        """Return the messages since the last call."""
        taken, self.messages = self.messages, []
        return taken


def run_workers(plan: TrainingPlan, config: TrainContextualiserConfig, watch: Watch) -> str:
    """Train on Ray to the end. Return in one line why it ended early; empty if it did not."""
    import ray

    from mediafm_ray.pipeline.cluster import connected

    with connected(ResourcesConfig(ray_address=config.resources.ray_address)), tempfile.TemporaryDirectory() as scratch:
        check_room_for_workers(config)
        actor: Any = ray.remote(num_cpus=0)(MessageQueue)
        messages = actor.remote()
        task = WorkerTask(
            plan.folder_uri, plan.dataset_uri, config.model, config.training, config.storage, config.resources.workers, messages
        )
        fit = threading.Thread(target=_fit, args=(task, config, scratch, messages), daemon=True)
        fit.start()
        while True:
            ended = not fit.is_alive()  # No message is posted after the end, so that the next call takes the last ones.
            for kind, content in ray.get(messages.take.remote()):
                watch.see(kind, content)
            if ended or watch.fatal:
                return watch.fatal
            time.sleep(POLL_INTERVAL_S)


def check_room_for_workers(config: TrainContextualiserConfig) -> None:
    """Raise ConfigError where a local Ray instance has no room for the workers. A cluster may be about to grow, and is not checked."""
    import ray

    if config.resources.ray_address or os.environ.get("RAY_ADDRESS"):
        return
    there, workers = ray.cluster_resources(), config.resources.workers
    for kind, each, key in (("CPU", config.resources.num_cpus, "num_cpus"), ("GPU", float(config.training.device != "cpu"), "workers")):
        if workers * each > there.get(kind, 0):
            raise ConfigError(
                f"resources.workers={workers} want {workers * each:g} {kind}s together, and Ray has {there.get(kind, 0):g} here: "
                f"lower resources.{key}, or set training.device"
            )


def _fit(task: WorkerTask, config: TrainContextualiserConfig, scratch: str, messages: Any) -> None:
    """Run Ray Train in a thread of the driver, so that the main thread can print messages and be interrupted."""
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": config.resources.num_cpus} | ({"GPU": 1.0} if config.training.device != "cpu" else {})
    try:
        TorchTrainer(
            train_worker,
            train_loop_config={"task": task},
            scaling_config=ScalingConfig(
                num_workers=config.resources.workers, use_gpu=config.training.device != "cpu", resources_per_worker=resources
            ),
            run_config=RunConfig(
                name="contextualiser",
                storage_path=scratch,  # For Ray Train's own files; checkpoints are written by the recorder.
                failure_config=FailureConfig(max_failures=config.resources.max_restarts),
                logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]  # Its types are those of the older API.
            ),
        ).fit()
    except Exception as error:  # The driver reports whatever ended it.
        ray.get(messages.post.remote("fatal", reason_of(error)))


class Watch:
    """Progress of a training on the terminal."""

    def __init__(self, config: TrainingConfig, console: Console):
        self.config, self.console, self.begun = config, console, time.monotonic()
        self.fatal = ""
        self.unusable: set[str] = set()
        self.said = 0.0
        self.first: tuple[float, float] | None = None  # Step and time of the first row of the present workers.

    def see(self, kind: str, content: Any) -> None:
        """Handle a message of a worker."""
        if kind == "fatal":
            self.fatal = self.fatal or content
        elif kind == "resumed":
            self.first = (content, 0.0)
            self.console.say(f"workers are up after {time.monotonic() - self.begun:.1f} s, going on from step {content}")
        elif kind == "unusable" and content not in self.unusable:
            self.unusable.add(content)
            self.console.say(public_line(f"warning: {content}; it is left out"))
        elif kind == "row":
            if self.first is None or content["step"] == 0:
                self.first = (content["step"], content["elapsed_s"])
            if content["step"] == 0:
                self.console.say(f"workers are up after {time.monotonic() - self.begun:.1f} s; {describe_cosines(content)}")
            elif "held_out_cosine" in content or content["step"] == self.config.steps or time.monotonic() - self.said > MIN_LINE_INTERVAL_S:
                self.said = time.monotonic()
                self.console.say(self.progress_line(content))

    def progress_line(self, row: Mapping[str, float]) -> str:
        """Return a line with the step, the loss, the held-out cosine and the time left."""
        width = len(str(self.config.steps))
        parts = [f"step {int(row['step']):>{width}}/{self.config.steps}"]
        parts += [f"loss {row['loss']:.4f}"] if "loss" in row else []
        parts += [f"held-out cosine {row['held_out_cosine']:.4f}"] if "held_out_cosine" in row else []
        first_step, first_s = self.first or (0.0, 0.0)
        rate = (row["step"] - first_step) / max(row["elapsed_s"] - first_s, 1e-9)
        left_s = (self.config.steps - row["step"]) / rate if rate else 0.0
        return " | ".join([*parts, f"{rate * self.config.windows_per_step:.1f} titles/s, {clock(left_s)} left"])


def describe_cosines(row: Mapping[str, float]) -> str:
    """Return the cosines of a row at masked shots of held-out titles, in words."""
    model = row.get("held_out_cosine")
    if model is None:
        return "no title is held out"
    guesses = {"builtin:neighbours": "held_out_cosine_neighbours", **{name.replace("_", " "): f"held_out_{name}" for name in BASELINES}}
    others = ", ".join(f"{name} {row[key]:.4f}" for name, key in guesses.items() if key in row)
    return f"held-out cosine {model:.4f}" + (f" ({others})" if others else "")


def advise(ending: Mapping[str, Any], checkpoint_uri: str) -> list[str]:
    """Return the figures of the served vectors beside those of ``builtin:neighbours``, and which of the two to use."""
    names = [name for name in FIGURES if f"held_out_{name}" in ending and f"held_out_{name}_neighbours" in ending]
    if not names:
        return [f"use it with contextualiser.checkpoint={checkpoint_uri}"]
    own, formula = ([ending[f"held_out_{name}{kind}"] for name in names] for kind in ("", "_neighbours"))
    pairs = ", ".join(f"{name} {one:.4f} ({other:.4f})" for name, one, other in zip(names, own, formula, strict=True))
    lines = [f"served vectors on held-out titles, beside {BUILTIN_NEIGHBOURS} in brackets: {pairs}"]
    if sum(own) > sum(formula):
        return [*lines, f"use it with contextualiser.checkpoint={checkpoint_uri}"]
    return [
        *lines,
        f"no better than without training: use contextualiser.checkpoint={BUILTIN_NEIGHBOURS}, or train on more titles",
    ]
