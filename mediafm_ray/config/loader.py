"""Read a job's configuration from YAML files and the command line with OmegaConf, and describe its keys.

``--config a.yaml [b.yaml ...] key=value ...`` are merged in that order. An unknown key, a wrong type, a value out of bounds or a missing
file is a ConfigError that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as resources_of
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.models.weights import with_endpoint
from mediafm_ray.spec import describe_bounds
from mediafm_ray.text import PublicError

HELP_WIDTH = 118  # characters
CONF = Path(str(resources_of("mediafm_ray"))) / "conf"  # The profiles of the package.
NULLS = ("null", "~")  # YAML spells a missing value in these ways.
WEIGHTS_KEYS = ("weights", "temporal_weights", "checkpoint")  # These keys hold addresses of weights in every section.
Job = TypeVar("Job")


class ConfigError(PublicError):
    """An invalid configuration; the message names the key or the file."""


def read_config(kind: type[Job], files: Sequence[str], overrides: Sequence[str]) -> Job:
    """Return a job's configuration from YAML files and ``key=value`` overrides; later ones win. Raises ConfigError."""
    merged = OmegaConf.structured(kind)
    for file in files:
        path = profile_path(file)
        try:
            merged = OmegaConf.merge(merged, _without_sections_of_others(kind, OmegaConf.load(path)))
        except (OmegaConfBaseException, OSError, ValueError) as error:
            raise ConfigError(f"--config {file}: {_first_line(error)}") from error
        except Exception as error:  # OmegaConf does not export a common base of PyYAML's errors.
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
            message = _first_line(error)  # Without the value, which may be a secret.
            raise ConfigError(message if key in message else f"{key}=...: {message}") from error
    return _with_endpoint(_to_object(merged))


def _to_object(node: Any, prefix: str = "") -> Any:
    """Return the dataclass of a node, after its sections were checked one by one, so that errors name the full key."""
    try:
        for key, value in node.items():
            if dataclasses.is_dataclass(OmegaConf.get_type(value)):
                _to_object(value, f"{prefix}{key}.")
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    except ValueError as error:  # A section's own checks raise it.
        raise ConfigError(f"{prefix}{error}") from error


def profiles() -> list[str]:
    """Return the names of the package's profiles, such as offline and training/small."""
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
    raise ConfigError(f"--config {given}: no such file or profile{meant}; the profiles are: {', '.join(names)}")


def _parsed(override: str, is_text: bool) -> Any:
    """Return an override parsed as YAML. A value that is not valid YAML (text that begins with a quotation) is left to ``_as_text``."""
    try:
        return OmegaConf.from_dotlist([override])
    except YAMLError:
        if not is_text:
            raise
        return OmegaConf.from_dotlist([f"{override.partition('=')[0]}=0"])


def _type_of(kind: Any, key: str) -> Any:
    """Return the type of a field by its full key; None if there is no such field."""
    for name in key.split("."):
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


def _as_text(parsed: Any, given: str) -> str:
    """Return the value of a text field: what YAML reads (without quotes) if it is text, otherwise the value as given (012 is not 12)."""
    return parsed if isinstance(parsed, str) else given


def _without_sections_of_others(kind: type[Any], loaded: Any) -> Any:
    """Return a file's sections for this job. One file may serve several jobs: other sections of embed_catalog are checked and removed."""
    own, shared = ({entry.name for entry in dataclasses.fields(job)} for job in (kind, EmbedCatalogConfig))
    others = [key for key in loaded if key in shared - own] if OmegaConf.is_dict(loaded) else []
    if not others:
        return loaded
    OmegaConf.merge(OmegaConf.structured(EmbedCatalogConfig), OmegaConf.masked_copy(loaded, others))  # This raises for unknown keys.
    return OmegaConf.masked_copy(loaded, [key for key in loaded if key not in others])


def _with_endpoint(config: Any) -> Any:
    """Add storage.endpoint_url to the addresses of weights and checkpoints on s3:// that name no server."""
    endpoint = config.storage.endpoint_url if hasattr(config, "storage") else ""
    if not endpoint:
        return config
    changed = {}
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [
                entry.name
                for entry in dataclasses.fields(value)
                if entry.name in WEIGHTS_KEYS and isinstance(getattr(value, entry.name), str)
            ]
            found = {name: with_endpoint(getattr(value, name), endpoint) for name in names}
            changed[section.name] = dataclasses.replace(value, **found)
    return dataclasses.replace(config, **changed)


def describe(kind: type[Any]) -> str:
    """Return every key of a job's configuration with its default, bounds and meaning, for --help."""
    lines = []
    for section in dataclasses.fields(kind):
        default = default_of(section)
        if dataclasses.is_dataclass(default):
            lines += ["", f"{section.name}: {(type(default).__doc__ or '').splitlines()[0]}"]
        for key in keys_of(section.name, default, section.metadata):
            lines.append(f"  {key.name}={key.default}" + (f"  ({key.bounds})" if key.bounds else ""))
            lines += textwrap.wrap(key.meaning, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def default_of(entry: dataclasses.Field[Any]) -> Any:
    """Return the default of a dataclass field; call its factory if it has one."""
    return entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default


@dataclass(frozen=True)
class Key:
    """A key of a configuration as --help and the documentation show it."""

    name: str  # full name, such as media.max_pixels
    default: str  # as YAML
    bounds: str
    meaning: str
    changes_numbers: bool


def keys_of(name: str, default: Any, metadata: Mapping[str, Any]) -> Iterator[Key]:
    """Yield the key ``name``, or the keys of the section ``name`` in order. ``metadata`` belongs to its dataclass field."""
    if not dataclasses.is_dataclass(default):
        yield Key(name, _yaml(default), describe_bounds(metadata["bounds"]), metadata["help"], metadata["changes_numbers"])
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
    """Return the message of an OmegaConf error in one line with the full key."""
    message, key = str(error).splitlines()[0], getattr(error, "full_key", None)
    if isinstance(error, ConfigKeyError):  # OmegaConf names the class of the section.
        suggestion = re.search(r"Did you mean(?: one of)?: (.+)\?", str(error))
        names = suggestion[1].replace("'", "") if suggestion else ""
        return f"there is no key {key}" + (f"; did you mean {names}?" if names else "")
    if "ListConfig" in message:
        return f"{key}: expected a list, such as {key}=[one,other]"
    return f"{key}: {message}" if key else message
