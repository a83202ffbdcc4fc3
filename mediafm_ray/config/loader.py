"""Read a job's configuration from YAML files and the command line, with OmegaConf, and describe its keys.

``--config a.yaml [b.yaml ...] key=value ...`` are merged in that order; an unknown key, a wrong type or a missing file is a
ConfigError that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as resources_of
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.models.weights import with_endpoint
from mediafm_ray.text import PublicError

HELP_WIDTH = 118  # columns
CONF = Path(str(resources_of("mediafm_ray"))) / "conf"  # the profiles that come with the package
NULLS = ("null", "~")  # how YAML writes that there is no value
ADDRESSES = ("weights", "temporal_weights", "checkpoint")  # keys of any section whose values are addresses of weights
Job = TypeVar("Job")


class ConfigError(PublicError):
    """A configuration that cannot be used; the message names the key or the file."""


def read_config(kind: type[Job], files: Sequence[str], overrides: Sequence[str]) -> Job:
    """A job's configuration from YAML files and ``key=value`` overrides, later ones over earlier ones. Raises ConfigError."""
    merged = OmegaConf.structured(kind)
    for file in files:
        path = profile_path(file)
        try:
            merged = OmegaConf.merge(merged, _without_sections_of_others(kind, OmegaConf.load(path)))
        except (OmegaConfBaseException, OSError, ValueError) as error:
            raise ConfigError(f"--config {file}: {_first_line(error)}") from error
        except Exception as error:  # PyYAML's errors have no common base that OmegaConf exports
            raise ConfigError(f"--config {file}: not readable as YAML: {' '.join(str(error).split())}") from error
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r}: expected key=value (try --help)")
        try:
            is_text = _type_of(kind, key) is str
            given = _parsed(override, is_text)
            if is_text and (OmegaConf.select(given, key) is not None or value.strip().lower() not in NULLS):
                OmegaConf.update(given, key, _as_text(OmegaConf.select(given, key), value))
            merged = OmegaConf.merge(merged, given)
        except Exception as error:
            raise ConfigError(f"{key}=...: {_first_line(error)}") from error  # the value may be a secret
    try:
        return _with_endpoint(OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    except ValueError as error:  # a dataclass's own check
        raise ConfigError(str(error)) from error


def profiles() -> list[str]:
    """Return the names of the profiles that come with the package, such as offline and training/small."""
    found = [*CONF.glob("*.yaml"), *CONF.glob("training/*.yaml"), CONF / "cluster" / "gpu.yaml"]
    return sorted(str(path.relative_to(CONF).with_suffix("")) for path in found)


def profile_path(given: str) -> Path:
    """Return the file behind a value of ``--config``: a path to a YAML file, or the name of a profile. Raises ConfigError."""
    if given in (names := profiles()):
        return CONF / f"{given}.yaml"
    if given.endswith((".yaml", ".yml")) and os.path.isfile(given):
        return Path(given)
    spellings = (given.removeprefix("conf/").removesuffix(".yaml"), Path(given).stem)
    likely = [name for spelling in spellings for name in difflib.get_close_matches(spelling, names, n=1)]
    meant = f" (did you mean {likely[0]}?)" if likely else ""
    raise ConfigError(f"--config {given}: there is no such file or profile{meant}; the profiles are: {', '.join(names)}")


def _parsed(override: str, is_text: bool) -> Any:
    """An override as YAML reads it; text that is no YAML, such as a sentence that begins with a quotation, is left for ``_as_text``."""
    try:
        return OmegaConf.from_dotlist([override])
    except YAMLError:
        if not is_text:
            raise
        return OmegaConf.from_dotlist([f"{override.partition('=')[0]}=0"])


def _type_of(kind: Any, key: str) -> Any:
    """The type of a field, by its full key; None where there is none."""
    for name in key.split("."):
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


def _as_text(parsed: Any, given: str) -> str:
    """The value of a text field: as YAML reads it (which takes quotes off), or as it was given where that is none (012 is not 12)."""
    return parsed if isinstance(parsed, str) else given


def _without_sections_of_others(kind: type[Any], loaded: Any) -> Any:
    """What a file says to this job: one file may serve several, so the sections of jobs.embed_catalog are checked and left aside."""
    own, shared = ({entry.name for entry in dataclasses.fields(job)} for job in (kind, EmbedCatalogConfig))
    others = [key for key in loaded if key in shared - own] if OmegaConf.is_dict(loaded) else []
    if not others:
        return loaded
    OmegaConf.merge(OmegaConf.structured(EmbedCatalogConfig), OmegaConf.masked_copy(loaded, others))  # raises for unknown keys
    return OmegaConf.masked_copy(loaded, [key for key in loaded if key not in others])


def _with_endpoint(config: Any) -> Any:
    """Weights and checkpoints on s3:// are on the server that storage.endpoint_url names, where they name no other."""
    endpoint = config.storage.endpoint_url if hasattr(config, "storage") else ""
    if not endpoint:
        return config
    changed = {}
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [
                entry.name for entry in dataclasses.fields(value) if entry.name in ADDRESSES and isinstance(getattr(value, entry.name), str)
            ]
            found = {name: with_endpoint(getattr(value, name), endpoint) for name in names}
            changed[section.name] = dataclasses.replace(value, **found)
    return dataclasses.replace(config, **changed)


def describe(kind: type[Any]) -> str:
    """Every key of a job's configuration with its default and meaning, for --help."""
    lines = []
    for section in dataclasses.fields(kind):
        default = default_of(section)
        if dataclasses.is_dataclass(default):
            lines += ["", f"{section.name}: {(type(default).__doc__ or '').splitlines()[0]}"]
        for key in keys_of(section.name, default, section.metadata):
            lines.append(f"  {key.name}={key.default}")
            lines += textwrap.wrap(key.meaning, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def default_of(entry: dataclasses.Field[Any]) -> Any:
    """Return the default of a dataclass field, made anew where a factory makes it."""
    return entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default


@dataclass(frozen=True)
class Key:
    """A key of a configuration as people read about it."""

    name: str  # in full, such as media.max_pixels
    default: str  # as YAML
    meaning: str
    changes_numbers: bool


def keys_of(name: str, default: Any, metadata: Mapping[str, Any]) -> Iterator[Key]:
    """The key ``name``, or those of the section that it is, in order. ``metadata``: of its dataclass field."""
    if not dataclasses.is_dataclass(default):
        yield Key(name, _yaml(default), metadata.get("help", ""), metadata.get("changes_numbers", False))
        return
    for entry in dataclasses.fields(default):
        yield from keys_of(f"{name}.{entry.name}", getattr(default, entry.name), entry.metadata)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(str, value)) + "]"
    if value is None:
        return "null"
    return '""' if value == "" else str(value)


def _first_line(error: Exception) -> str:
    """What OmegaConf says, in one line with the full key."""
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {message}" if key else message
