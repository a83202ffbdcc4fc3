"""The options of what is done with embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from mediafm_ray.spec import recipe, resource


@dataclass(frozen=True)
class ScenesConfig:
    """How shots are grouped into scenes."""

    penalty: float = recipe(1.0, "multiplies the price of a boundary that the data suggest: above 1 gives fewer scenes, below 1 more")

    def __post_init__(self) -> None:
        if not 0 < self.penalty < float("inf"):
            raise ValueError(f"scenes.penalty must be a positive number, is {self.penalty}")


@dataclass(frozen=True)
class ProbesConfig:
    """How probes are trained and measured."""

    folds: int = recipe(5, "parts that the titles are divided into; each is predicted from the others")
    repeats: int = recipe(3, "random partitions of the titles that the metrics are averaged over")
    strengths: list[float] = recipe([0.1, 1.0, 10.0, 100.0], "inverse strengths of the regularisation to choose from")
    bootstrap: int = recipe(500, "bootstrap replicates of the titles for the 95 % confidence intervals")
    seed: int = recipe(0, "of the partitions and the bootstrap")
    threads: int = resource(0, "probes that are trained at once; 0 = one for every core")

    def __post_init__(self) -> None:
        if self.folds < 2 or self.repeats < 1 or self.bootstrap < 1:
            raise ValueError("probes.folds must be at least 2, probes.repeats and probes.bootstrap at least 1")
        if self.threads < 0:
            raise ValueError("probes.threads cannot be negative")
        if not self.strengths or not all(0 < strength < float("inf") for strength in self.strengths):
            raise ValueError(f"probes.strengths must be positive numbers, are {list(self.strengths)}")
