"""The place of one training: the checkpoint that other jobs take, and beside it all that is needed to go on after a kill.

    <checkpoint.uri>/config.json, model.safetensors      the best model so far: contextualiser.checkpoint=<checkpoint.uri> takes it as it is
    <checkpoint.uri>/metrics.jsonl, training.png         the curves
    <checkpoint.uri>/training/plan.json                  what is trained on, and how: fixed when training begins
    <checkpoint.uri>/training/state-<step>.safetensors   the last two states
    <checkpoint.uri>/training/finished.json              why training ended; the states are gone then
    <checkpoint.uri>/tensorboard/                        the metrics for TensorBoard

Every object is put whole (storage.store); nothing in them is a pickle.
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
STATES_KEPT = 2
LONGEST_HEADER = 100 << 20  # bytes of a safetensors header; what claims more is none


class TrainingFolder:
    """The objects below ``checkpoint.uri``."""

    def __init__(self, uri: str, config: StorageConfig):
        self.store = Store(uri, config)

    # ---------------------------------------------------------------------------------------------- plan and ending

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object, or None when it is not there. Raises StorageError where it is not JSON."""
        try:
            return parse_json(self.store.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StorageError(f"{self.store.uri}/{name} is not JSON ({error}): choose another checkpoint.uri, or remove it") from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Put a JSON object; the same bytes for the same value."""
        self.store.write(name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def holds_other_checkpoint(self) -> bool:
        """Whether there is a checkpoint that no training of this program put here."""
        return self.store.info(PLAN) is None and any(self.store.info(name) is not None for name in (CONFIG, MODEL))

    def finish(self, ending: Mapping[str, Any]) -> None:
        """Record why training ended; nothing is left to go on from."""
        self.write_json(FINISHED, ending)
        self.remove_states(0)

    # ------------------------------------------------------------------------------------------------------- states

    def states(self) -> list[ObjectInfo]:
        """The saved states, the newest first."""
        found = [info for info in self.store.list("training") if STATE_PATTERN.fullmatch(info.name)]
        return sorted(found, key=lambda info: info.name, reverse=True)

    def newest_state(self) -> tuple[ObjectInfo | None, list[str]]:
        """The newest state that is whole, by its length, and what is wrong with newer ones.

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
        """Put a state, then remove all but the last two."""
        self.store.write(f"training/state-{step:09d}.safetensors", state)
        self.remove_states(STATES_KEPT)

    def remove_states(self, kept: int) -> None:
        """Remove all but the newest states."""
        for info in self.states()[kept:]:
            self.store.delete(info.name)

    def _damage(self, info: ObjectInfo) -> str:
        """What is wrong with a state's length; empty when nothing is."""
        try:
            length = int.from_bytes(self._beginning(info.name, 8), "little")
            if 8 + length > min(info.size, LONGEST_HEADER):
                return f"{info.size} bytes"
            whole = state_bytes(state_header(self._beginning(info.name, 8 + length)), length)
        except StateError as error:
            return str(error)
        return "" if info.size == whole else f"{info.size} of {whole} bytes"

    def _beginning(self, name: str, count: int) -> bytes:
        return self.store.filesystem.cat_file(self.store.path(name), start=0, end=count)

    # ----------------------------------------------------------------------------------------------------- the rest

    def write_model(self, model: Any) -> None:
        """Put config.json and model.safetensors as save_pretrained writes them."""
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            model.save_pretrained(folder)
            for name in (CONFIG, MODEL):
                self.store.write(name, Path(folder, name).read_bytes())

    def read_metrics(self, up_to_step: int) -> list[dict[str, float]]:
        """The rows of metrics up to a step: what a resumed training has behind it."""
        try:
            lines = self.store.read(METRICS).decode().splitlines()
        except FileNotFoundError:
            return []
        return [row for row in map(json.loads, lines) if row["step"] <= up_to_step]

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Put all rows, a line each."""
        self.store.write(METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())
