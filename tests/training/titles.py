"""Generated titles for the tests of training: two places alternate, so that a hidden shot can be predicted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mediafm_ray.models.contextualiser import shot_times
from mediafm_ray.training.batches import TitleVectors, UnusableTitle

FUSED_DIM, METADATA_DIM = 24, 6
SPANS = {"video": (0, 12), "audio": (12, 18), "text": (18, 24)}


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def make_title(index: int, shots: int, noise: float = 0.05, metadata: bool = True) -> TitleVectors:
    """Places A and B of the title's own take turns, A B A B ..."""
    random = np.random.default_rng([7, index])
    places = unit(random.normal(size=(2, FUSED_DIM)))
    fused_SD = unit(places[np.arange(shots) % 2] + noise * random.normal(size=(shots, FUSED_DIM)))
    ends_S = np.cumsum(random.uniform(1, 5, shots))
    times_S2 = shot_times(np.concatenate([[0.0], ends_S[:-1]]), ends_S)
    return TitleVectors(f"title-{index}", fused_SD, times_S2, places[0, :METADATA_DIM] if metadata else None)


class MadeTitles:
    """Titles in memory. ``broken`` ones cannot be used."""

    fused_dim, metadata_dim = FUSED_DIM, METADATA_DIM
    spans = SPANS

    def __init__(self, shots: Sequence[int], held_out: Sequence[int] = (), broken: Sequence[int] = ()):
        self.titles = [make_title(index, count) for index, count in enumerate(shots)]
        self.sizes = np.array(shots)
        self.held_out = np.array(held_out, np.int64)
        self.train = np.array([index for index in range(len(shots)) if index not in held_out], np.int64)
        self.broken = set(broken)
        self.reads: list[int] = []

    def read(self, index: int) -> TitleVectors:
        self.reads.append(index)
        if index in self.broken:
            raise UnusableTitle(f"title title-{index} is broken")
        return self.titles[index]
