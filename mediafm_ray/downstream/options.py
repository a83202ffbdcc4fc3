"""Configuration of the downstream layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mediafm_ray.spec import ConfigSection, recipe, resource


@dataclass(frozen=True)
class ScenesConfig(ConfigSection):
    """The grouping of shots into scenes."""

    penalty: float = recipe(
        1.0,
        "factor on the penalty of a boundary that is derived from the data: above 1 gives fewer scenes, below 1 more",
        above=0,
        below=math.inf,
    )


@dataclass(frozen=True)
class ProbesConfig(ConfigSection):
    """Training and evaluation of probes."""

    folds: int = recipe(5, "cross-validation folds over the titles", min=2)
    repeats: int = recipe(3, "random partitions of the titles into folds; metrics are averaged over them", min=1)
    strengths: list[float] = recipe(
        [0.1, 1.0, 10.0, 100.0], "inverse strengths of the regularisation to choose from", above=0, below=math.inf
    )
    bootstrap: int = recipe(500, "bootstrap samples of the titles for the 95 % confidence intervals", min=1)
    seed: int = recipe(0, "seed of the partitions and the bootstrap")
    threads: int = resource(0, "probes that are trained at once; 0 = one for each core", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strengths:
            raise ValueError("strengths must have at least one number")
