"""Muon for the hidden matrices, AdamW for the rest, and the schedule of the learning rate.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes every update of a matrix orthogonal. It is meant for the matrices
inside the network; embeddings, input and output projections, norms and biases use AdamW. The singular values of an update are
learning rate x sqrt(max(1, rows / columns)) for every width of the network, so one learning rate fits small and large ones. Query, key
and value are three matrices in one tensor: Muon treats each separately, as its author advises.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from mediafm_ray.models.contextualiser import Contextualiser
from mediafm_ray.training.options import TrainingConfig

ADAMW_BETAS = (0.9, 0.98)  # The second moment averages over 50 steps, which suits BERT-like models and few steps.
MUON_MOMENTUM = 0.95
ORTHOGONAL_ABC = (3.4445, -4.775, 2.0315)  # Coefficients of the Newton-Schulz iteration, as in torch.optim.Muon.
ORTHOGONAL_ITERATIONS = 5
MIN_UPDATE_NORM = 1e-7
STACKED = {"query_key_value": 3}  # Tensor -> number of matrices in it, as blocks of rows.


class Optimisers:
    """All optimisers of a model, with a common ``step`` and state."""

    def __init__(self, model: nn.Module, config: TrainingConfig):
        """Make the optimisers once the model is on its device, because they keep references to its tensors."""
        hidden = {name: tensor for name, tensor in model.named_parameters() if name.startswith("layers.") and tensor.ndim == 2}
        if config.optimiser == "adamw" or not isinstance(model, Contextualiser):  # Other models have no such hidden matrices.
            hidden = {}
        self.blocks = [block for name, tensor in hidden.items() for block in _blocks(name, tensor)]
        rest = {name: tensor for name, tensor in model.named_parameters() if name not in hidden}
        groups = [
            {
                "params": [tensor for name, tensor in rest.items() if _decays(name, tensor) == decays],
                "weight_decay": decays * config.weight_decay,
            }
            for decays in (True, False)
        ]
        on_gpu = next(model.parameters()).is_cuda
        adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=ADAMW_BETAS, fused=on_gpu or None)
        self.all: dict[str, torch.optim.Optimizer] = {"adamw": adamw}
        if self.blocks:
            self.all["muon"] = (BatchedMuon if on_gpu else torch.optim.Muon)(
                [block for block, _, _ in self.blocks],
                lr=config.muon_learning_rate,
                momentum=MUON_MOMENTUM,
                weight_decay=config.weight_decay,
                adjust_lr_fn="original",
            )
        self.parameters = list(model.parameters())
        self.config = config

    def step(self, step: int) -> Tensor:
        """Clip the gradients, take a step at the learning rate of ``step``, drop the gradients; return their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_norm or math.inf)
        for block, tensor, rows in self.blocks:
            assert tensor.grad is not None
            block.grad = tensor.grad[rows]
        for name, optimiser in self.all.items():
            peak = self.config.muon_learning_rate if name == "muon" else self.config.learning_rate
            for group in optimiser.param_groups:
                group["lr"] = peak * schedule(step, self.config)
            optimiser.step()
        for tensor in self.parameters:
            tensor.grad = None
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors for ``load_state_dict``, by optimiser, index of the parameter and name."""
        return {
            f"{name}.{index}.{key}": tensor
            for name, optimiser in self.all.items()
            for index, entry in optimiser.state_dict()["state"].items()
            for key, tensor in entry.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors of ``state_dict``."""
        for name, optimiser in self.all.items():
            entries: dict[int, dict[str, Any]] = {}
            for place, tensor in state.items():
                owner, _, rest = place.partition(".")
                index, _, key = rest.partition(".")
                if owner == name:
                    entries.setdefault(int(index), {})[key] = tensor
            optimiser.load_state_dict({"state": entries, "param_groups": optimiser.state_dict()["param_groups"]})


class BatchedMuon(torch.optim.Muon):
    """Muon for a GPU with the state of torch.optim.Muon: matrices of one shape are computed together, in a tenth of the calls.

    Numbers differ from torch's by rounding. The learning rate is adjusted as with ``adjust_lr_fn="original"``.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices, which must have gradients; ``closure`` is ignored."""
        for group in self.param_groups:
            of_shape = defaultdict(list)
            for matrix in group["params"]:
                of_shape[matrix.shape].append(matrix)
                if "momentum_buffer" not in self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            for (rows, columns), matrices in of_shape.items():
                gradients = [matrix.grad for matrix in matrices]
                buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                updates_NRC = _orthogonal(torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates_NRC.float().unbind(), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def _orthogonal(matrices_NRC: Tensor) -> Tensor:
    """Return (N, R, C) bfloat16, roughly the nearest orthogonal matrices, by the Newton-Schulz iteration of torch.optim.Muon."""
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    found_NRC = (matrices_NRC.mT if is_tall else matrices_NRC).bfloat16()
    found_NRC = found_NRC / found_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=MIN_UPDATE_NORM)
    first, second, third = ORTHOGONAL_ABC
    for _ in range(ORTHOGONAL_ITERATIONS):
        gram_NRR = found_NRC @ found_NRC.mT
        gram_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=second, alpha=third)
        found_NRC = torch.baddbmm(found_NRC, gram_NRR, found_NRC, beta=first)
    return found_NRC.mT if is_tall else found_NRC


def schedule(step: int, config: TrainingConfig) -> float:
    """Return the share of the peak learning rate: a linear rise over ``warmup_steps``, then half a cosine down to 0."""
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def _blocks(name: str, tensor: nn.Parameter) -> list[tuple[nn.Parameter, nn.Parameter, slice]]:
    """Return the matrices in a tensor, each as a parameter in the same memory, with the tensor and its rows."""
    count = next((count for part, count in STACKED.items() if part in name.split(".")), 1)
    rows = len(tensor) // count
    places = [slice(index * rows, (index + 1) * rows) for index in range(count)]
    return [(nn.Parameter(tensor.detach()[place]), tensor, place) for place in places]


def _decays(name: str, tensor: Tensor) -> bool:
    """Return True for parameters with weight decay: matrices, but not norms, biases, tokens and position embeddings."""
    return tensor.ndim == 2 and not name.startswith("positions.")
