"""Fusion: the modalities of a shot concatenated to one vector of unit norm (MediaFM, step 3). Numpy only.

``modality_norm: none`` concatenates the embeddings of the encoders unchanged, exactly as in the recipe. The norms of encoders differ
by an order of magnitude and more, and the largest dominates similarity: with the offline encoders they are about 15
(video), 0.6 (audio) and 1 (text), and audio contributes 0.2 % of a cosine. ``modality_norm: l2``, the default, gives every present modality
the norm of its weight first. The share of an absent modality goes to the others: with the default weights (1, 0.5, 0.5), two shots that
differ only in that one has a caption have the cosine 0.91 if the other two modalities are present; with equal weights it is 0.82. Equal
weights find fewer shots of the same place and split scenes where captions or music begin (docs/benchmarks.md, "Fusion").

Shapes
    S    shots
    D_m  dimension of modality m
    D    sum of the D_m, in the order of spec.MODALITIES
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mediafm_ray.models.options import FusionConfig
from mediafm_ray.spec import MODALITIES, recipe_of


def spans(dims: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return the half-open span of each modality in a fused vector, ``{"video": (0, 1280), ...}``, in the order of spec.MODALITIES.

    Raises ValueError for a modality that is not in spec.MODALITIES, or a dimension below 1.
    """
    if unknown := sorted(set(dims) - set(MODALITIES)):
        raise ValueError(f"unknown modalities {unknown}; there are {list(MODALITIES)}")
    found, start = {}, 0
    for modality in MODALITIES:
        if modality in dims:
            if dims[modality] < 1:
                raise ValueError(f"the dimension of {modality} must be at least 1, not {dims[modality]}")
            found[modality] = (start, start + dims[modality])
            start += dims[modality]
    return found


def fusion_recipe(config: FusionConfig) -> dict[str, Any]:
    """Return the options that change the numbers: the weights apply to l2 only."""
    return recipe_of(config) if config.modality_norm == "l2" else {"modality_norm": config.modality_norm}


def fuse(parts: Mapping[str, np.ndarray], config: FusionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the (S, D_m) float32 embeddings of the modalities and scale every shot to unit norm.

    Returns the fused (S, D) float32 and its (S,) float32 norm before scaling, from which ``split`` recovers the parts. A shot without any
    modality (all zeros) stays zero and has norm 0. With ``modality_norm: l2`` the recovered parts have the norm of their weight, or are
    zero.
    Raises ValueError for an unknown modality, unequal numbers of shots, or values that are not finite.
    """
    counts = {modality: len(part) for modality, part in parts.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"every modality must have one embedding per shot; there are {counts}")
    columns = []
    for modality in spans({modality: part.shape[1] for modality, part in parts.items()}):
        part_SD = parts[modality].astype(np.float64)
        if not np.isfinite(part_SD).all():
            raise ValueError(f"the {modality} embedding of shot {int(np.argmin(np.isfinite(part_SD).all(axis=1)))} is not finite")
        columns.append(_unit(part_SD)[0] * config.weights[modality] if config.modality_norm == "l2" else part_SD)
    fused_SD, norm_S = _unit(np.concatenate(columns, axis=1))
    return fused_SD.astype(np.float32), norm_S.astype(np.float32)


def split(fused_SD: np.ndarray, fused_norm_S: np.ndarray, spans: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Return the (S, D_m) float32 embeddings of each modality from the result of ``fuse``, equal up to float32 rounding."""
    raw_SD = fused_SD.astype(np.float64) * fused_norm_S.astype(np.float64)[:, None]
    return {modality: raw_SD[:, start:end].astype(np.float32) for modality, (start, end) in spans.items()}


def _unit(rows_SD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 rows scaled to unit norm (all-zero rows unchanged) and their norms."""
    norm_S = np.linalg.norm(rows_SD, axis=1)
    return rows_SD / np.where(norm_S > 0, norm_S, 1)[:, None], norm_S
