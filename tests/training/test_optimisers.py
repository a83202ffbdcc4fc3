"""The parameters of each optimiser, a step of Muon, and the learning rate."""

import numpy as np
import pytest
import torch

from mediafm_ray.training.optimisers import BatchedMuon, Optimisers, schedule
from mediafm_ray.training.options import ShapeConfig, TrainingConfig
from mediafm_ray.training.trainer import new_model

SHAPE = ShapeConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, max_shots=12, dropout=0.0, time_features=True
)
HIDDEN = {f"layers.{layer}.{name}.weight" for layer in range(2) for name in ("query_key_value", "attention_output", "widen", "narrow")}


def storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte in memory and number of values."""
    return tensor.data_ptr(), tensor.numel()


def bytes_of(tensors) -> set[int]:
    return {pointer for tensor in tensors for pointer in range(tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel(), 4)}


@pytest.fixture
def model():
    return new_model(SHAPE, 24, 6, "", 0)


def test_muon_has_exactly_the_hidden_matrices(model):
    optimisers = Optimisers(model, TrainingConfig())
    parameters = dict(model.named_parameters())
    muon = [tensor for group in optimisers.all["muon"].param_groups for tensor in group["params"]]
    adamw = [tensor for group in optimisers.all["adamw"].param_groups for tensor in group["params"]]
    assert bytes_of(muon) == bytes_of(parameters[name] for name in HIDDEN)
    assert bytes_of(adamw) == bytes_of(tensor for name, tensor in parameters.items() if name not in HIDDEN)
    assert sum(tensor.numel() for tensor in muon + adamw) == sum(tensor.numel() for tensor in parameters.values())  # none twice
    assert sorted(tuple(tensor.shape) for tensor in muon) == sorted([(16, 16)] * 8 + [(40, 16)] * 2 + [(16, 40)] * 2)  # Q, K and V apart
    decays = {group["weight_decay"]: bytes_of(group["params"]) for group in optimisers.all["adamw"].param_groups}
    matrices = ("shot_input.weight", "metadata_input.weight", "shot_output.weight", "time_input.weight")
    assert decays[0.01] == bytes_of(parameters[name] for name in matrices)
    assert set(decays) == {0.0, 0.01}


def test_adamw_alone_has_everything(model):
    optimisers = Optimisers(model, TrainingConfig(optimiser="adamw"))
    assert set(optimisers.all) == {"adamw"}
    adamw = [tensor for group in optimisers.all["adamw"].param_groups for tensor in group["params"]]
    assert {storage_of(tensor) for tensor in adamw} == {storage_of(tensor) for tensor in model.parameters()}


def test_a_step_of_muon_is_orthogonal_and_one_of_adamw_is_not(model):
    """All singular values of an update are about the learning rate, scaled by the shape: Muon's iteration leaves 0.6 to 1.3 of it."""
    config = TrainingConfig(weight_decay=0.0, warmup_steps=0, learning_rate=1e-2, muon_learning_rate=0.05)
    optimisers = Optimisers(model, config)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    random = torch.Generator().manual_seed(1)
    for tensor in model.parameters():
        tensor.grad = torch.randn(tensor.shape, generator=random)
    optimisers.step(0)
    for name, tensor in model.named_parameters():
        change = tensor.detach() - before[name]
        assert tensor.grad is None
        if name not in HIDDEN:
            np.testing.assert_allclose(change.abs().numpy(), 1e-2, rtol=1e-2)  # AdamW's first step: the sign of the gradient
            continue
        for block in change.chunk(3) if "query_key_value" in name else [change]:
            values = torch.linalg.svdvals(block) / max(1, block.shape[0] / block.shape[1]) ** 0.5
            assert 0.05 * 0.6 < values.min() <= values.max() < 0.05 * 1.3, name


def test_muon_in_batches_takes_the_steps_of_torchs_and_goes_on_from_its_state():
    """Updates agree to bfloat16's rounding, where gradients have singular values of like size: the iteration multiplies small ones."""
    random = torch.Generator().manual_seed(3)
    shapes = [(16, 16), (40, 16), (16, 40), (16, 16), (40, 16)]
    drawn = [torch.nn.init.orthogonal_(torch.empty(shape), generator=random) for shape in shapes]
    ours, torchs = ([torch.nn.Parameter(matrix.clone()) for matrix in drawn] for _ in range(2))
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "original"}
    expected, found = torch.optim.Muon(torchs, **options), BatchedMuon(ours, **options)
    for step in range(4):
        if step == 2:  # from here on with the other's state
            found.load_state_dict(expected.state_dict())
        for before, first, second in zip(drawn, ours, torchs, strict=True):
            first.data.copy_(second.data)
            first.grad = second.grad = before + 0.02 * torch.randn(first.shape, generator=random)
        found.step()
        expected.step()
        for before, first, second in zip(drawn, ours, torchs, strict=True):
            assert (first - before).norm() > 0.04 * (step + 1) * min(before.shape) ** 0.5 * 0.6
            assert (first - second).norm() < 0.05 * 0.05 * before.shape[0] ** 0.5
    for first, second in zip(ours, torchs, strict=True):
        torch.testing.assert_close(found.state[first]["momentum_buffer"], expected.state[second]["momentum_buffer"])


def test_gradients_are_clipped_together(model):
    optimisers = Optimisers(model, TrainingConfig(gradient_norm=1.0))
    for tensor in model.parameters():
        tensor.grad = torch.ones_like(tensor)
    count = sum(tensor.numel() for tensor in model.parameters())
    assert optimisers.step(0).item() == pytest.approx(count**0.5, rel=1e-5)
    state = optimisers.state_dict()
    first_moments = torch.cat([tensor.flatten() for name, tensor in state.items() if name.endswith("exp_avg")])
    np.testing.assert_allclose(first_moments.numpy(), 0.1 / count**0.5, rtol=1e-4)


def test_the_learning_rate_rises_then_falls_to_zero():
    config = TrainingConfig(steps=1000, warmup_steps=100)
    shares = np.array([schedule(step, config) for step in range(1000)])
    assert shares[0] == pytest.approx(0.01)
    np.testing.assert_allclose(np.diff(shares[:100]), 0.01)
    assert shares.max() == shares[100] == 1.0
    assert (np.diff(shares[100:]) < 0).all()
    assert shares[550] == pytest.approx(0.5)
    assert 0 < shares[-1] < 1e-5
    assert schedule(0, TrainingConfig(steps=10, warmup_steps=100)) == pytest.approx(0.1)  # more warm-up than steps


def test_the_state_goes_on_as_if_nothing_had_been():
    def gradients(model, step):
        random = torch.Generator().manual_seed(step)
        for tensor in model.parameters():
            tensor.grad = torch.randn(tensor.shape, generator=random)

    models = [new_model(SHAPE, 24, 6, "", 0) for _ in range(2)]
    whole, first = (Optimisers(model, TrainingConfig()) for model in models)
    for step in range(6):
        gradients(models[0], step)
        whole.step(step)
    for step in range(3):
        gradients(models[1], step)
        first.step(step)
    resumed = new_model(SHAPE, 24, 6, "", 9)
    resumed.load_state_dict(models[1].state_dict())
    second = Optimisers(resumed, TrainingConfig())
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for step in range(3, 6):
        gradients(resumed, step)
        second.step(step)
    for name, tensor in models[0].named_parameters():
        assert torch.equal(tensor, resumed.get_parameter(name)), name
