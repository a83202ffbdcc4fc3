"""The purpose of context, on films of generated places: a shot keeps its content and gains its surroundings, also after training."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.film_making import MOMENTS, VIEWS, Takes, make_films
from benchmarks.films import CONTEXT, average_precision, contextual, train, unit
from mediafm_ray.models.neighbours import builtin_model
from mediafm_ray.models.options import FusionConfig
from mediafm_ray.training.options import ShapeConfig, TrainingConfig

PLACES, DIMS = 40, {"video": 48, "audio": 16}


@pytest.fixture(scope="module")
def takes() -> Takes:
    """Random places; views of a place differ more than moments of a view."""
    random = np.random.default_rng(5)
    place_N = np.repeat(np.arange(PLACES), len(VIEWS) * MOMENTS)
    view_N = np.tile(np.repeat(np.arange(len(VIEWS)), MOMENTS), PLACES)
    parts = {}
    for name, dim in DIMS.items():
        places, views = random.normal(size=(PLACES, dim)), 1.2 * random.normal(size=(PLACES, len(VIEWS), dim))
        parts[name] = (places[place_N] + views[place_N, view_N] + 0.4 * random.normal(size=(len(place_N), dim))).astype(np.float32)
    lines = random.normal(size=(10, 8, 12)).astype(np.float32)
    return Takes(parts, place_N, view_N, tuple(f"film {place // 4}" for place in range(PLACES)), lines)


def figures(films, vectors) -> dict[str, float]:
    """Mean average precision of the scene's place within films, and mean cosine to its own fused vector of a shot that is no cut-away."""
    precision, identity = [], []
    for film, vectors_SD in zip(films, vectors, strict=True):
        unit_SD = unit(vectors_SD)
        same_SS = film.scene_place_S[:, None] == film.scene_place_S[None]
        precision.append(average_precision(unit_SD @ unit_SD.T, same_SS, ~np.eye(len(same_SS), dtype=bool)))
        identity.append(np.sum(unit_SD * unit(film.fused_SD), axis=1)[~film.cut_away_S])
    return {"context": float(np.nanmean(np.concatenate(precision))), "identity": float(np.concatenate(identity).mean())}


def test_context_finds_the_scene_and_keeps_the_shot(takes):
    films = make_films(takes, np.arange(20, PLACES), 24, 1, 0.15, FusionConfig())
    fused, untrained = figures(films, [film.fused_SD for film in films]), figures(films, contextual(builtin_model(), films))
    assert untrained["context"] > fused["context"] + 0.03
    assert untrained["identity"] > 0.75


def test_training_learns_its_objective_on_unseen_films_and_stays_near_the_formula(takes):
    config = TrainingConfig(**{**vars(CONTEXT), "steps": 60, "windows_per_step": 8, "evaluate_every": 20, "warmup_steps": 5, "threads": 1})
    model, rows = train(make_films(takes, np.arange(20), 60, 2, 0.15, FusionConfig()), ShapeConfig(max_shots=128), config)
    assert min(row["held_out_loss"] for row in rows if "held_out_loss" in row) < rows[0]["held_out_loss"] - 0.01
    films = make_films(takes, np.arange(20, PLACES), 24, 3, 0.15, FusionConfig())
    untrained, trained = figures(films, contextual(builtin_model(), films)), figures(films, contextual(model, films))
    assert trained["context"] > untrained["context"] - 0.01
    assert trained["identity"] > untrained["identity"] - 0.05
