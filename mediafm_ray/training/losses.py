"""The two terms of the training loss, and the metrics of held-out titles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from mediafm_ray.models.neighbours import neighbour_context
from mediafm_ray.training.batches import Batch

TEMPERATURE = 0.1  # temperature of both softmaxes over cosines
MAX_COMPARED = 4096  # Shots that are compared with one another; more windows are divided into groups.


def cosines_at_masked(contextual_BSD: Tensor, batch: Batch) -> Tensor:
    """Return (K,) float32 cosines between the vectors of hidden shots and the original vectors."""
    found_KD, wanted_KD = (vectors_BSD.flatten(0, 1).index_select(0, batch.masked_K) for vectors_BSD in (contextual_BSD, batch.fused_BSD))
    return F.cosine_similarity(found_KD.float(), wanted_KD, dim=1)


def window_groups(batch: Batch) -> list[slice]:
    """Return groups of windows that are compared with one another, each of at most MAX_COMPARED shots."""
    windows, shots = batch.masked_BS.shape
    size = max(1, MAX_COMPARED // shots)
    return [slice(first, first + size) for first in range(0, windows, size)]


def context_loss(damaged_BSD: Tensor, clean_BSD: Tensor, batch: Batch, group: slice) -> Tensor:
    """Return (N,) float32 cross-entropies at the shots with a vector of a group of windows, damaged plus undamaged; see trainer."""
    fused_BSD = batch.fused_BSD[group]
    known_BS = (fused_BSD != 0).any(-1)
    with torch.no_grad():
        teacher_ND = neighbour_context(fused_BSD, known_BS)[known_BS]
    damaged_ND, clean_ND = (F.normalize(vectors_BSD[group][known_BS].float(), dim=-1) for vectors_BSD in (damaged_BSD, clean_BSD))
    if len(teacher_ND) < 2:  # There is nothing to compare with.
        return damaged_ND.sum(1) * 0
    self_NN = torch.eye(len(teacher_ND), dtype=torch.bool, device=teacher_ND.device)
    wanted_NN = (teacher_ND @ teacher_ND.T / TEMPERATURE).masked_fill(self_NN, -math.inf).softmax(1)
    loss_N = torch.zeros(len(teacher_ND), device=teacher_ND.device)
    for student_ND in (damaged_ND, clean_ND):
        found_NN = (student_ND @ clean_ND.T / TEMPERATURE).masked_fill(self_NN, -math.inf).log_softmax(1)
        loss_N = loss_N - (wanted_NN * found_NN.masked_fill(self_NN, 0)).sum(1)
    return loss_N


def held_out_figures(hidden_BSD: Tensor, visible_BSD: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return one number per shot for each metric of the served vectors; see Trainer.evaluate."""
    known_BS = (batch.fused_BSD != 0).any(-1)
    to_original_BS = F.cosine_similarity(visible_BSD.float(), batch.fused_BSD, dim=-1)
    return {
        "cosine": cosines_at_masked(hidden_BSD, batch),
        "identity": to_original_BS[known_BS & ~batch.replaced_BS],
        "context": to_original_BS[batch.replaced_BS],
    }


def loss_of(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Return the sum of the means of the terms."""
    return sum(total / max(1, count) for total, count in zip(sums, counts, strict=True))
