"""The contextualiser, against transformers' BERT with the same weights; windows by their invariants; whole and damaged checkpoints."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from mediafm_ray.models import weights
from mediafm_ray.models.contextualiser import (
    Contextualiser,
    ContextualiserModelConfig,
    TitleContextualiser,
    TitleShots,
    encode_times,
    shot_times,
    window_of_shots,
    window_starts,
)
from mediafm_ray.models.loading import MicroBatches
from mediafm_ray.models.options import ContextualiserConfig

REPOSITORY = Path(__file__).parents[2]
FUSED_DIM, METADATA_DIM = 48, 12
SHAPE = {
    "fused_dim": FUSED_DIM,
    "metadata_dim": METADATA_DIM,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,  # large enough that context shows in untrained weights
}


def make_checkpoint(folder: Path, **changes: object) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        Contextualiser(ContextualiserModelConfig(**{**SHAPE, **changes})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> TitleContextualiser:
    return TitleContextualiser(ContextualiserConfig(checkpoint=str(folder), threads=2))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> TitleContextualiser:
    """Only 8 shots a window, so that short sequences are long titles."""
    folder = make_checkpoint(tmp_path_factory.mktemp("windowed"), max_shots=8)
    return TitleContextualiser(ContextualiserConfig(checkpoint=str(folder), threads=2))


def unit_rows(shots: int, seed: int = 0, dim: int = FUSED_DIM) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(shots, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


METADATA = unit_rows(1, 99, METADATA_DIM)[0]


# ------------------------------------------------------------------------------------------------------------ model


def test_agrees_with_transformers_bert(whole: TitleContextualiser) -> None:
    model = whole.model
    bert = BertModel(
        BertConfig(
            vocab_size=1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=model.config.max_shots + 2,
            layer_norm_eps=model.config.layer_norm_eps,
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        bert.embeddings.token_type_embeddings.weight.zero_()
        bert.embeddings.position_embeddings.load_state_dict(model.positions.state_dict())
        bert.embeddings.LayerNorm.load_state_dict(model.input_norm.state_dict())
        for theirs, ours in zip(bert.encoder.layer, model.layers, strict=True):
            attention = theirs.attention.self
            for index, linear in enumerate((attention.query, attention.key, attention.value)):
                linear.weight.copy_(ours.query_key_value.weight.chunk(3)[index])
                linear.bias.copy_(ours.query_key_value.bias.chunk(3)[index])
            theirs.attention.output.dense.load_state_dict(ours.attention_output.state_dict())
            theirs.attention.output.LayerNorm.load_state_dict(ours.attention_norm.state_dict())
            theirs.intermediate.dense.load_state_dict(ours.widen.state_dict())
            theirs.output.dense.load_state_dict(ours.narrow.state_dict())
            theirs.output.LayerNorm.load_state_dict(ours.output_norm.state_dict())
        fused, metadata = torch.tensor(unit_rows(9))[None], torch.tensor(METADATA)[None]
        tokens = [model.cls_token[None, None], model.metadata_input(metadata)[:, None], model.shot_input(fused)]
        expected = bert(inputs_embeds=torch.cat(tokens, dim=1)).last_hidden_state
        output = model(fused, metadata)
    torch.testing.assert_close(output.hidden_BLH, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.contextual_BSD, model.shot_output(expected[:, 2:]), rtol=0, atol=1e-5)


def test_padding_and_batch_neighbours_do_not_change_a_window(whole: TitleContextualiser) -> None:
    long, short = torch.tensor(unit_rows(9, 1)), torch.tensor(unit_rows(4, 2))
    padded = torch.stack([long, torch.cat([short, torch.full((5, FUSED_DIM), 7.0)])])
    shots = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    metadata = torch.tensor(np.stack([METADATA, -METADATA]))
    with torch.no_grad():
        together = whole.model(padded, metadata, torch.tensor([False, True]), shots)
        alone_long, alone_short = whole.model(long[None]), whole.model(short[None], metadata[1:])
    torch.testing.assert_close(together.contextual_BSD[0], alone_long.contextual_BSD[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(together.contextual_BSD[1, :4], alone_short.contextual_BSD[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(together.cls_BD[1], alone_short.cls_BD[0], rtol=0, atol=1e-5)


def test_a_masked_shot_is_invisible(whole: TitleContextualiser) -> None:
    fused, other = torch.tensor(unit_rows(6))[None], torch.tensor(unit_rows(6))[None]
    other[0, 3] = torch.tensor(unit_rows(1, 7))
    masked = torch.zeros(1, 6, dtype=torch.bool)
    masked[0, 3] = True
    with torch.no_grad():
        hidden, hidden_other = (whole.model(rows, masked_BS=masked).contextual_BSD for rows in (fused, other))
        seen = whole.model(fused).contextual_BSD
    assert torch.equal(hidden, hidden_other)
    assert not torch.allclose(hidden, seen, atol=1e-3)


def test_too_long_a_window_is_refused(windowed: TitleContextualiser) -> None:
    with pytest.raises(ValueError, match="9 shots is longer than the model's 8"):
        windowed.model(torch.tensor(unit_rows(9))[None])


# ------------------------------------------------------------------------------------------------------------ times


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> TitleContextualiser:
    """With time features, and only 8 shots a window."""
    folder = make_checkpoint(tmp_path_factory.mktemp("timed"), max_shots=8, time_features=True)
    return TitleContextualiser(ContextualiserConfig(checkpoint=str(folder), threads=2))


def test_times_of_shots() -> None:
    times = shot_times(np.array([0.0, 2.0, 2.5]), np.array([2.0, 2.5, 7.0]))
    assert times.dtype == np.float32
    np.testing.assert_array_equal(times, [[2.0, 0.0], [0.5, 2.0], [4.5, 0.5]])
    assert shot_times(np.array([3.0]), np.array([4.0])).tolist() == [[1.0, 0.0]]


def test_times_differ_by_their_ratio() -> None:
    """Twice as long is about the same step anywhere on the scale, from frames to hours; nothing is infinite at its ends."""
    seconds = torch.tensor([0.0, 0.04, 0.5, 1.0, 60.0, 3600.0, 24 * 3600.0])
    codes = encode_times(torch.stack([seconds, torch.zeros(7)], dim=-1)[None])[0]
    doubled = encode_times(torch.stack([2 * seconds, torch.zeros(7)], dim=-1)[None])[0]
    assert codes.isfinite().all()
    steps = (codes - doubled).norm(dim=-1)
    assert steps[0] == 0
    assert (steps[2:] / steps[-1] - 1).abs().max() < 0.1
    distances = torch.cdist(codes, codes) + torch.eye(7) * 9
    assert distances.min() > 0.3  # no two of these times look alike


def test_a_model_with_time_features_sees_them_also_behind_the_mask(timed: TitleContextualiser, windowed: TitleContextualiser) -> None:
    fused, masked = torch.tensor(unit_rows(6))[None], torch.ones(1, 6, dtype=torch.bool)
    times = torch.rand(1, 6, 2) * 10
    other = times.clone()
    other[0, 3, 0] *= 2
    with torch.no_grad():
        seen, changed = (timed.model(fused, masked_BS=masked, times_BS2=seconds).contextual_BSD for seconds in (times, other))
        with pytest.raises(ValueError, match="needs times_BS2"):
            timed.model(fused)
        without = windowed.model(fused, times_BS2=times).contextual_BSD
        assert torch.equal(without, windowed.model(fused).contextual_BSD)
    assert (seen - changed).abs().amax(dim=-1).min() > 1e-4


def test_a_window_of_a_long_title_keeps_the_titles_times(timed: TitleContextualiser) -> None:
    fused, end = unit_rows(13), np.cumsum(np.random.default_rng(3).uniform(0.5, 9, 13))
    times = shot_times(np.concatenate([[0.0], end[:-1]]), end)
    contextual, _ = timed.contextualise(fused, METADATA, times)
    last, _ = timed.contextualise(fused[5:], METADATA, times[5:])
    assert contextual[-1].tobytes() == last[-1].tobytes()
    other, _ = timed.contextualise(fused, METADATA, times[::-1])
    assert np.abs(other - contextual).max() > 1e-3
    for wrong in (None, times[:5]):
        with pytest.raises(ValueError, match="trained with the times"):
            timed.contextualise(fused, METADATA, wrong)
    with pytest.raises(ValueError, match="times of shot 2 are not finite"):
        timed.contextualise(fused[:3], METADATA, np.array([[1, 0], [1, 1], [np.nan, 1]], np.float32))


def test_a_checkpoint_from_before_time_features_loads_as_it_was(folder: Path, whole: TitleContextualiser, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    old = {key: value for key, value in config.items() if key not in ("time_features", "dataset_version")}
    assert len(old) == len(config) - 2
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    before = TitleContextualiser(ContextualiserConfig(checkpoint=str(tmp_path)))
    assert before.contextualise(unit_rows(5), METADATA)[0].tobytes() == whole.contextualise(unit_rows(5), METADATA)[0].tobytes()


# ----------------------------------------------------------------------------------------------------------- titles


def test_shapes_types_and_units(whole: TitleContextualiser) -> None:
    contextual, cls = whole.contextualise(unit_rows(30), METADATA)
    assert contextual.shape == (30, FUSED_DIM)
    assert cls.shape == (FUSED_DIM,)
    assert contextual.dtype == cls.dtype == np.float32


def test_a_shot_is_read_in_its_context(whole: TitleContextualiser) -> None:
    """The same shot among others, in another place, and under another synopsis, is another contextual embedding."""
    fused = unit_rows(20)
    base, base_cls = whole.contextualise(fused, METADATA)
    changed = fused.copy()
    changed[15] = unit_rows(1, 8)
    for other, other_cls in (
        whole.contextualise(changed, METADATA),
        whole.contextualise(fused, -METADATA),
        whole.contextualise(fused, None),
    ):
        assert np.abs(other[2] - base[2]).max() > 1e-3
        assert np.abs(other_cls - base_cls).max() > 1e-3
    backwards, _ = whole.contextualise(fused[::-1], METADATA)
    assert np.abs(backwards[::-1][2] - base[2]).max() > 1e-3


@pytest.mark.parametrize("window", [2, 3, 8, 512])
def test_windows_cover_a_title_and_every_shot_has_company(window: int) -> None:
    for shots in [1, window - 1, window, window + 1, window + window // 2, 2 * window, 3 * window + 1, 7 * window - 2]:
        starts, owners = window_starts(shots, window), window_of_shots(shots, window)
        assert starts[0] == 0
        assert starts[-1] == max(0, shots - window)
        steps = np.diff(starts)
        assert ((steps > 0) & (steps <= max(1, window // 2))).all()
        assert (np.diff(owners) >= 0).all()
        assert set(owners) == set(range(len(starts)))
        for shot, owner in enumerate(owners):
            before, after = shot - starts[owner], min(starts[owner] + window, shots) - shot - 1
            assert before >= 0
            assert after >= 0
            # a quarter of a window on both sides, unless the title itself ends there
            assert before >= min(shot, window // 4 - 1)
            assert after >= min(shots - shot - 1, window // 4 - 1)


def test_a_title_that_fits_is_one_window() -> None:
    assert window_starts(512, 512) == [0]
    assert window_starts(513, 512) == [0, 1]


def test_a_long_title_is_made_of_its_windows(windowed: TitleContextualiser) -> None:
    fused = unit_rows(21)
    contextual, cls = windowed.contextualise(fused, METADATA)
    starts, owners = window_starts(21, 8), window_of_shots(21, 8)
    assert starts == [0, 3, 6, 9, 13]
    expected_cls = np.zeros(FUSED_DIM)
    for index, start in enumerate(starts):
        alone, alone_cls = windowed.contextualise(fused[start : start + 8], METADATA)
        for shot in np.flatnonzero(owners == index):
            assert contextual[shot].tobytes() == alone[shot - start].tobytes()
        expected_cls += alone_cls * np.mean(owners == index)
    np.testing.assert_allclose(cls, expected_cls, atol=1e-6)


# ------------------------------------------------------------------------------------------------- several titles at once

LENGTHS = (1, 30, 8, 13, 2, 9)


@pytest.fixture(scope="module")
def several() -> list[TitleShots]:
    """Titles of all lengths about a window of 8, some with metadata, all with times."""
    titles = []
    for seed, shots in enumerate(LENGTHS):
        end = np.cumsum(np.random.default_rng(seed).uniform(0.2, 20, shots))
        times = shot_times(np.concatenate([[0.0], end[:-1]]), end)
        titles.append(TitleShots(unit_rows(shots, seed), METADATA if seed % 2 else None, times))
    return titles


def alone(contextualiser: TitleContextualiser, titles: list[TitleShots]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [contextualiser.contextualise(title.fused_SD, title.metadata_M, title.times_S2) for title in titles]


@pytest.mark.parametrize("kind", ["windowed", "timed"])
def test_on_a_cpu_neighbours_do_not_change_a_byte(kind: str, several: list[TitleShots], request: pytest.FixtureRequest) -> None:
    contextualiser: TitleContextualiser = request.getfixturevalue(kind)
    expected = alone(contextualiser, several)
    for order in (slice(None), slice(None, None, -1), slice(1, 4)):
        together = contextualiser.contextualise_together(several[order])
        for (found, found_cls), (one, one_cls) in zip(together, expected[order], strict=True):
            assert found.tobytes() == one.tobytes()
            assert found_cls.tobytes() == one_cls.tobytes()
    assert contextualiser.contextualise_together([]) == []


def padded(contextualiser: TitleContextualiser, micro_batch: int) -> TitleContextualiser:
    """The same model, computing as it does on a GPU: in padded batches of at most so many tokens."""
    built = copy.copy(contextualiser)
    built.alone = False
    built.micro_batches = MicroBatches(built.device, micro_batch)
    return built


@pytest.mark.parametrize("kind", ["windowed", "timed"])
@pytest.mark.parametrize("micro_batch", [1, 25, 10_000])
def test_padded_batches_give_the_same_but_for_rounding(
    kind: str, micro_batch: int, several: list[TitleShots], request: pytest.FixtureRequest
) -> None:
    contextualiser: TitleContextualiser = request.getfixturevalue(kind)
    together = padded(contextualiser, micro_batch).contextualise_together(several)
    for (found, found_cls), (one, one_cls) in zip(together, alone(contextualiser, several), strict=True):
        np.testing.assert_allclose(found, one, rtol=0, atol=2e-5)
        np.testing.assert_allclose(found_cls, one_cls, rtol=0, atol=2e-5)


def test_batches_hold_windows_of_like_length_within_the_budget(
    windowed: TitleContextualiser, several: list[TitleShots], monkeypatch: pytest.MonkeyPatch
) -> None:
    built, seen = padded(windowed, 30), []
    inner = built._read_batch
    monkeypatch.setattr(built, "_read_batch", lambda windows: seen.append([len(window) for window in windows]) or inner(windows))
    built.contextualise_together(several)
    assert sorted(length for batch in seen for length in batch) == sorted(
        min(8, shots - start) for shots in LENGTHS for start in window_starts(shots, 8)
    )
    assert all(len(batch) * (max(batch) + 2) <= 30 for batch in seen)
    assert [length for batch in seen for length in batch] == sorted((length for batch in seen for length in batch), reverse=True)
    assert len(seen[0]) == 3


@pytest.mark.parametrize("kind", ["windowed", "timed"])
def test_bfloat16_is_close_and_does_not_depend_on_the_batch(kind: str, several: list[TitleShots], request: pytest.FixtureRequest) -> None:
    exact: TitleContextualiser = request.getfixturevalue(kind)
    built = TitleContextualiser(ContextualiserConfig(checkpoint=exact.checkpoint, precision="bfloat16"))
    results = [alone(exact, several), alone(built, several), padded(built, 10_000).contextualise_together(several)]
    for one, half, batched in zip(*results, strict=True):
        assert half[0].dtype == np.float32
        assert cosine_distance(half[0], one[0]).max() < 5e-3
        assert cosine_distance(batched[0], half[0]).max() < 1e-3
        assert cosine_distance(batched[1], half[1]) < 1e-3


def cosine_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return 1 - (one * other).sum(axis=-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


CONTEXTUALISE_ELSEWHERE = """
import hashlib, sys
import numpy as np
from mediafm_ray.models.contextualiser import TitleContextualiser
from mediafm_ray.models.options import ContextualiserConfig
given = np.load(sys.argv[2])
contextualiser = TitleContextualiser(ContextualiserConfig(checkpoint=sys.argv[1], threads=1))
contextual, cls = contextualiser.contextualise(given["fused"], given["metadata"])
print(hashlib.sha256(contextual.tobytes() + cls.tobytes()).hexdigest())
"""


def test_another_process_with_other_threads_gives_the_same_bytes(folder: Path, whole: TitleContextualiser, tmp_path: Path) -> None:
    fused = unit_rows(1200, 4)
    whole.contextualise(unit_rows(700, 6), None)  # another title before it leaves no trace
    contextual, cls = whole.contextualise(fused, METADATA)
    np.savez(tmp_path / "given.npz", fused=fused, metadata=METADATA)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", CONTEXTUALISE_ELSEWHERE, str(folder), str(tmp_path / "given.npz")]
    elsewhere = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert elsewhere.stdout.strip() == hashlib.sha256(contextual.tobytes() + cls.tobytes()).hexdigest()
    assert elsewhere.stderr == ""


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_round_trip_of_a_checkpoint(folder: Path, whole: TitleContextualiser, tmp_path: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    whole.model.save_pretrained(tmp_path)
    again = TitleContextualiser(ContextualiserConfig(checkpoint=str(tmp_path)))
    assert again.contextualise(unit_rows(5), None)[0].tobytes() == whole.contextualise(unit_rows(5), None)[0].tobytes()
    assert weights.checkpoint_digest(str(tmp_path)) == weights.checkpoint_digest(str(folder))
    (tmp_path / "trainer_state.json").write_text("{}")
    assert weights.checkpoint_digest(str(tmp_path)) == weights.checkpoint_digest(str(folder))


def test_the_digest_changes_with_the_weights(folder: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path, initializer_range=0.1)
    assert weights.checkpoint_digest(str(other)) != weights.checkpoint_digest(str(folder))


def test_missing_and_damaged_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(weights.WeightsError, match="does not exist on this machine"):
        TitleContextualiser(ContextualiserConfig(checkpoint=str(tmp_path / "nowhere")))
    with pytest.raises(weights.WeightsError, match=r"config\.json and model\.safetensors"):
        weights.checkpoint_digest(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(weights.WeightsError, match=r"no config\.json"):
        TitleContextualiser(ContextualiserConfig(checkpoint=str(tmp_path / "empty")))
    truncated = make_checkpoint(tmp_path / "truncated")
    tensors = truncated / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(weights.WeightsError, match="truncated cannot be loaded"):
        TitleContextualiser(ContextualiserConfig(checkpoint=str(truncated)))
    reshaped = make_checkpoint(tmp_path / "reshaped")
    config = json.loads((reshaped / "config.json").read_text())
    (reshaped / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(weights.WeightsError, match=r"incomplete for Contextualiser.*layers\.2\."):
        TitleContextualiser(ContextualiserConfig(checkpoint=str(reshaped)))
    (reshaped / "config.json").write_text(json.dumps({**config, "fused_dim": 50}))
    with pytest.raises(weights.WeightsError, match="reshaped"):
        TitleContextualiser(ContextualiserConfig(checkpoint=str(reshaped)))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_checkpoint_whose_training_went_astray_is_refused(tmp_path: Path, number: float) -> None:
    astray = make_checkpoint(tmp_path)
    model = Contextualiser.from_pretrained(astray)
    with torch.no_grad():
        model.layers[1].widen.weight[3, 4] = number
    model.save_pretrained(astray)
    with pytest.raises(weights.WeightsError, match=r"not finite \(layers\.1\.widen\.weight\)"):
        TitleContextualiser(ContextualiserConfig(checkpoint=str(astray)))


def test_output_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    huge = make_checkpoint(tmp_path)
    model = Contextualiser.from_pretrained(huge)
    with torch.no_grad():
        model.shot_output.weight.fill_(1e38)
    model.save_pretrained(huge)
    with pytest.raises(ValueError, match="is not finite: is it trained"):
        TitleContextualiser(ContextualiserConfig(checkpoint=str(huge))).contextualise(unit_rows(3), None)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    bert = BertModel(BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    bert.save_pretrained(tmp_path)
    with pytest.raises(weights.WeightsError):
        TitleContextualiser(ContextualiserConfig(checkpoint=str(tmp_path)))


def test_input_that_does_not_fit_is_named(whole: TitleContextualiser) -> None:
    with pytest.raises(ValueError, match=r"48 dimensions.*\(5, 47\)"):
        whole.contextualise(unit_rows(5, dim=47), METADATA)
    with pytest.raises(ValueError, match=r"metadata embeddings of 12 dimensions.*\(13,\)"):
        whole.contextualise(unit_rows(5), np.zeros(13, np.float32))
    with pytest.raises(ValueError, match="without shots"):
        whole.contextualise(unit_rows(0), METADATA)
    broken = unit_rows(5)
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="shot 3 is not finite"):
        whole.contextualise(broken, METADATA)
    with pytest.raises(ValueError, match="metadata embedding is not finite"):
        whole.contextualise(unit_rows(5), np.full(METADATA_DIM, np.inf, np.float32))
