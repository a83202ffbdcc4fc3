"""Folder of a training: the checkpoint that other jobs use, and beside it all that is needed to resume after a kill.

    <checkpoint.uri>/config.json, model.safetensors      the best model so far, for contextualiser.checkpoint=<checkpoint.uri>
    <checkpoint.uri>/metrics.jsonl, training.png         the curves
    <checkpoint.uri>/training/plan.json                  the titles and the recipe, fixed when training begins
    <checkpoint.uri>/training/state-<step>.safetensors   the last two states
    <checkpoint.uri>/training/finished.json              the reason why training ended; the states are removed then
    <checkpoint.uri>/tensorboard/                        the metrics for TensorBoard

Every object is written atomically (storage.store); none is a pickle.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mediafm_ray.models.loading import quiet_transformers
from mediafm_ray.spec import parse_json
from mediafm_ray.storage.store import ObjectInfo, StorageConfig, StorageError, Store
from mediafm_ray.training.trainer import StateError, state_bytes, state_header

CONFIG, MODEL, METRICS, CURVES = "config.json", "model.safetensors", "metrics.jsonl", "training.png"
PLAN, FINISHED, EVENTS = "training/plan.json", "training/finished.json", "tensorboard"
STATE_PATTERN = re.compile(r"training/state-(?P<step>\d{9})\.safetensors")
MAX_STATES = 2
MAX_HEADER_BYTES = 100 << 20  # A file that claims a longer safetensors header is damaged.


class TrainingFolder:
    """The objects below ``checkpoint.uri``."""

    def __init__(self, uri: str, config: StorageConfig):
        self.store = Store(uri, config)

    # ---------------------------------------------------------------------------------------------- plan and ending

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object, or None where there is none. Raises StorageError where it is not JSON."""
        try:
            return parse_json(self.store.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StorageError(f"{self.store.uri}/{name} is not JSON ({error}): choose another checkpoint.uri, or remove it") from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object; equal values give equal bytes."""
        self.store.write(name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def holds_other_checkpoint(self) -> bool:
        """Return whether the folder holds a checkpoint that no training of this program wrote."""
        return self.store.info(PLAN) is None and any(self.store.info(name) is not None for name in (CONFIG, MODEL))

    def finish(self, ending: Mapping[str, Any]) -> None:
        """Record why training ended, and remove the states."""
        self.write_json(FINISHED, ending)
        self.remove_states(0)

    # ------------------------------------------------------------------------------------------------------- states

    def states(self) -> list[ObjectInfo]:
        """Return the saved states, the newest first."""
        found = [info for info in self.store.list("training") if STATE_PATTERN.fullmatch(info.name)]
        return sorted(found, key=lambda info: info.name, reverse=True)

    def newest_state(self) -> tuple[ObjectInfo | None, list[str]]:
        """Return the newest state whose length is right, and the damage of newer ones.

        Raises StorageError where there are states and none is whole.
        """
        states = self.states()
        damaged: list[str] = []
        for info in states:
            wrong = self._damage(info)
            if not wrong:
                return info, damaged
            damaged.append(f"{self.store.uri}/{info.name} is cut short: {wrong}")
        if states:
            raise StorageError(
                f"no saved state is whole ({'; '.join(damaged)}): remove {self.store.uri}/training to train anew, "
                "or choose another checkpoint.uri"
            )
        return None, damaged

    def write_state(self, step: int, state: bytes) -> None:
        """Write a state, then remove all but the last two."""
        self.store.write(f"training/state-{step:09d}.safetensors", state)
        self.remove_states(MAX_STATES)

    def remove_states(self, kept: int) -> None:
        """Remove all but the newest states."""
        for info in self.states()[kept:]:
            self.store.delete(info.name)

    def _damage(self, info: ObjectInfo) -> str:
        """Return what is wrong with the length of a state; empty if it is right."""
        try:
            length = int.from_bytes(self._beginning(info.name, 8), "little")
            if 8 + length > min(info.size, MAX_HEADER_BYTES):
                return f"{info.size} bytes"
            whole = state_bytes(state_header(self._beginning(info.name, 8 + length)), length)
        except StateError as error:
            return str(error)
        return "" if info.size == whole else f"{info.size} of {whole} bytes"

    def _beginning(self, name: str, count: int) -> bytes:
        return self.store.filesystem.cat_file(self.store.path(name), start=0, end=count)

    # ----------------------------------------------------------------------------------------------------- the rest

    def write_model(self, model: Any) -> None:
        """Write config.json and model.safetensors in the format of save_pretrained."""
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            model.save_pretrained(folder)
            for name in (CONFIG, MODEL):
                self.store.write(name, Path(folder, name).read_bytes())

    def read_metrics(self, up_to_step: int) -> list[dict[str, float]]:
        """Return the rows of metrics up to the step from which a training resumes."""
        try:
            lines = self.store.read(METRICS).decode().splitlines()
        except FileNotFoundError:
            return []
        return [row for row in map(json.loads, lines) if row["step"] <= up_to_step]

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write all rows, one on each line."""
        self.store.write(METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())
