"""Write docs/configuration.md from the dataclasses of the configuration: ``python -m docs.configuration``, or ``make docs``."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import typing
from pathlib import Path
from typing import Any

import jobs
from mediafm_ray.cli import COMMANDS
from mediafm_ray.config.loader import Key, default_of, keys_of

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Configuration

This page is generated from the dataclasses of the program by `make docs`; a test compares it with them.

Every job reads `--config PROFILE_OR_FILE ... key=value ...`, merged in that order. `--help` lists the keys of a job with their defaults;
"Read by" names the commands of `mediafm` that read a section.
An unknown key, a wrong type, a value out of bounds or a missing file is an error that names it, before anything starts. A file for
`mediafm embed` may be given to every job: sections that a job does not read are checked and ignored.

A key marked "yes" under "version" changes the numbers. Those of `detector`, `frames`, `media`, `timed_text`, `video`, `audio`, `text` and
`fusion` are part of the dataset version; those of `contextualiser` and `scenes` are part of the name of the dataset that they write; those
of `model` and `training` cannot be changed when a killed training is resumed. All other keys change only the cost, the place or the extent
of a run. The profiles in `conf/` are described in [models.md](models.md), [training.md](training.md) and [cluster.md](cluster.md).

Two environment variables act on every job: `MEDIAFM_DEBUG=1` prints the tracebacks of unexpected errors, and `RAY_ADDRESS` names a Ray
cluster to join where `resources.ray_address` is empty.
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the configuration, common to some jobs."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def job_configs() -> dict[str, type[Any]]:
    """Return the configuration class of every job that has one, by the job's name."""
    found = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(jobs.__path__)):
        hints = typing.get_type_hints(importlib.import_module(f"jobs.{module}").main)
        if dataclasses.is_dataclass(hints.get("config")):
            found[module] = hints["config"]
    return found


def sections_of(kind: type[Any]) -> list[Section]:
    """Return the sections of a job's configuration; keys outside all sections form one without a name."""
    found: list[Section] = []
    alone: list[Key] = []
    for entry in dataclasses.fields(kind):
        default = default_of(entry)
        keys = tuple(keys_of(entry.name, default, entry.metadata))
        if dataclasses.is_dataclass(default):
            found.append(Section(entry.name, (type(default).__doc__ or "").splitlines()[0], keys))
        else:
            alone += keys
    return [*([Section("", "Keys of the job itself.", tuple(alone))] if alone else []), *found]


def render() -> str:
    """Return the page."""
    commands = {module.removeprefix("jobs."): name for name, (module, _) in COMMANDS.items()}
    users: dict[str, dict[Section, list[str]]] = {}
    for job, kind in job_configs().items():
        for section in sections_of(kind):
            users.setdefault(section.name, {}).setdefault(section, []).append(f"`{commands[job]}`")
    lines = [HEAD]
    for name in sorted(users, key=lambda name: (not name, name)):
        lines += [f"## {name or 'Keys without a section'}", ""]
        for section, names in users[name].items():
            lines += [f"{section.meaning} Read by {', '.join(names)}.", ""]
            lines += ["| key | default | bounds | version | meaning |", "| --- | --- | --- | --- | --- |"]
            lines += [*map(_row, section.keys), ""]
    return "\n".join(lines)


def _row(key: Key) -> str:
    meaning = key.meaning.replace("|", "\\|")
    return f"| `{key.name}` | `{key.default}` | {key.bounds} | {'yes' if key.changes_numbers else ''} | {meaning} |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
