"""Prints which vectors know what stands around a shot: scenes, places and titles, in films with known truth, from held-out sources.

    python -m benchmarks.films FOLDER [FOLDER ...] [--same tears,tos] [--seeds 3] [--takes takes.npz]
    python -m benchmarks.films FOLDER [FOLDER ...] --growth 50 500 5000 [--steps 150 600]

The films are those of benchmarks.film_making, once without cut-aways and once with 15 % of them. For each seed the sources are split by
film into those to train on and those held out; 400 films are made of the former and two contextualisers trained on them, the default
objective and the recipe. On the films of the held-out sources each kind of vector is measured:

    in film     average precision of the shots whose scene shows the same place, in the same film
    elsewhere   ... in other films
    scenes      F1 of scene boundaries within one shot, as jobs.segment_scenes finds them; "true count": told how many scenes there are
    ordinary    share of the shots whose scene's place a linear probe names, trained on other films of the same places: ordinary shots
    cut-aways   ... and cut-aways, whose scene shows another place than they do
    own place   ... and the place that cut-aways themselves show: what a vector gives up for its context
    title       share of clips (3 to 6 shots) whose title is the nearest, the clip's own shots left out of it
    masked      cosine to the original at hidden shots (contextualisers, and the mean of the four nearest visible shots)

With --growth it trains the default objective on so many films (a tenth of them held out) for so many steps, and prints what that gains
over context without training, on films with cut-aways.

Intervals of 95 % are a bootstrap over films and over sources (a shot counts as often as its film and its source are both drawn), of all
seeds together; scenes and titles over films only. Differences are on the same shots.

Shapes
    S  shots of a film
    N  shots of all films
    D  dimension of a vector
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from benchmarks.film_making import Film, Takes, embed_takes, make_films, split_films
from benchmarks.scenes import matched, optimum_of_count
from mediafm_ray.downstream.clips import mean_of_neighbours
from mediafm_ray.downstream.scenes import find_scenes
from mediafm_ray.models.contextualiser import shot_times
from mediafm_ray.models.fusion import spans
from mediafm_ray.models.neighbours import builtin_model
from mediafm_ray.models.options import FusionConfig
from mediafm_ray.training.batches import TitleVectors, Window, collate
from mediafm_ray.training.options import ShapeConfig, TrainingConfig
from mediafm_ray.training.trainer import Trainer, new_model

CUT_AWAYS = (0.0, 0.15)
TRAIN_FILMS, PROBE_FILMS, TEST_FILMS, HELD_OUT_FILMS = 400, 144, 96, 40
MASKED = 0.2
CLIP_SHOTS = (3, 6)
RIDGE = 1e-2  # of the probe's Gram matrix's mean diagonal
QUERIES = 3  # every so many-th shot asks for its like in other films
BOOTSTRAPS = 500
CONTEXT = TrainingConfig(
    steps=150, windows_per_step=16, learning_rate=0.003, warmup_steps=30, evaluate_every=100, log_every=100, cache_gb=0, patience=0
)
RECIPE_SHAPE = ShapeConfig(hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=1024, max_shots=128)
RECIPE = replace(CONTEXT, objective="recipe", optimiser="adamw", learning_rate=0.001)  # Muon computes in bfloat16: slow on many CPUs
FUSION = FusionConfig()
GROWTH_FIGURES = ("in film", "elsewhere", "scenes", "ordinary", "cut-aways", "title")
FIGURES = ("in film", "elsewhere", "scenes", "true count", "ordinary", "cut-aways", "own place", "title", "masked")
Vectors = list[np.ndarray]  # (S, D) of each film


@dataclass(frozen=True, eq=False)
class Scores:
    """Numbers whose weighted mean is a figure (or hits, found and true boundaries for F1), with the film and source of each."""

    values_NV: np.ndarray  # (N, 1), or (N, 3) for F1
    film_N: np.ndarray
    source_N: np.ndarray  # 0 where a figure belongs to no source

    def figure(self, weight_N: np.ndarray | None = None) -> float:
        """The figure, with each number counted ``weight_N`` times."""
        sums = (self.values_NV * (np.ones(len(self.values_NV)) if weight_N is None else weight_N)[:, None]).sum(0)
        if self.values_NV.shape[1] == 3:
            return float(2 * sums[0] / max(sums[1] + sums[2], 1e-9))
        return float(sums[0] / max(len(self.values_NV) if weight_N is None else weight_N.sum(), 1e-9))


class FilmTitles:
    """Films as training sees them (training.batches.Titles)."""

    def __init__(self, films: Sequence[Film]):
        self.titles = [TitleVectors(film.title_id, film.fused_SD, shot_times(film.start_S, film.end_S), None) for film in films]
        self.sizes = np.array([len(film.start_S) for film in films])
        held_out = min(HELD_OUT_FILMS, max(1, len(films) // 10))
        self.train, self.held_out = np.arange(held_out, len(films)), np.arange(held_out)
        self.spans = MappingProxyType(spans({name: part.shape[1] for name, part in films[0].parts.items()}))
        self.fused_dim, self.metadata_dim = films[0].fused_SD.shape[1], films[0].parts["text"].shape[1]

    def read(self, index: int) -> TitleVectors:
        return self.titles[index]


class BestModel:
    """A recorder that keeps the best model's weights and the rows of held-out figures."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.rows: list[dict[str, float]] = []

    def row(self, row: Any) -> None:
        self.rows.append(dict(row))

    def best(self, model: Any) -> None:
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def save(self, trainer: Trainer) -> None: ...


def train(films: Sequence[Film], shape: ShapeConfig, config: TrainingConfig) -> tuple[Any, list[dict[str, float]]]:
    """The model that did best on films held out of the training sources, and the held-out figures of the training."""
    titles = FilmTitles(films)
    model = new_model(
        shape, titles.fused_dim, titles.metadata_dim, "", config.seed, titles.spans if config.objective == "context" else None
    )
    recorder = BestModel()
    Trainer(model, titles, config).train(recorder)
    model.load_state_dict(recorder.state)
    return model.eval(), recorder.rows


@torch.no_grad()
def contextual(model: Any, films: Sequence[Film]) -> Vectors:
    """What a model serves for every film."""
    return [model(torch.from_numpy(film.fused_SD)[None]).contextual_BSD[0].numpy() for film in films]


# ---------------------------------------------------------------------------------------------------------- figures


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit norm; zero rows stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def average_precision(score_QN: np.ndarray, relevant_QN: np.ndarray, allowed_QN: np.ndarray) -> np.ndarray:
    """(Q,) average precision of each query; NaN where nothing is relevant."""
    order_QN = np.argsort(-np.where(allowed_QN, score_QN, -np.inf), axis=1, kind="stable")
    hit_QN = np.take_along_axis(relevant_QN & allowed_QN, order_QN, 1)
    precision_QN = np.cumsum(hit_QN, 1) / np.arange(1, hit_QN.shape[1] + 1)
    count_Q = hit_QN.sum(1)
    return np.where(count_Q > 0, (precision_QN * hit_QN).sum(1) / np.maximum(count_Q, 1), np.nan)


def measure(
    films: Sequence[Film], vectors: Vectors, probe_films: Sequence[Film], probe_vectors: Vectors, sources: Sequence[int], seed: int
) -> dict[str, Scores]:
    """Every figure of one kind of vectors but the masked one. ``sources``: the source of every place, as a number."""
    scene_place_N = np.concatenate([film.scene_place_S for film in films])
    place_N = np.concatenate([film.place_S for film in films])
    away_N = np.concatenate([film.cut_away_S for film in films])
    film_N = np.concatenate([np.full(len(film.start_S), index) for index, film in enumerate(films)])
    source_N = np.array(sources)[scene_place_N]
    vectors_ND = unit(np.concatenate(vectors).astype(np.float32))
    found: dict[str, Scores] = {}

    def keep(name: str, values_N: np.ndarray, chosen_N: np.ndarray) -> None:
        there = chosen_N & np.isfinite(values_N)
        found[name] = Scores(values_N[there].astype(np.float64)[:, None], film_N[there], source_N[there])

    in_film = []
    for film, of_film in zip(films, np.split(vectors_ND, np.cumsum([len(film.start_S) for film in films])[:-1]), strict=True):
        same_SS = film.scene_place_S[:, None] == film.scene_place_S[None]
        in_film.append(average_precision(of_film @ of_film.T, same_SS, ~np.eye(len(same_SS), dtype=bool)))
    everywhere_N = np.ones(len(film_N), bool)
    keep("in film", np.concatenate(in_film), everywhere_N)
    asking = np.arange(0, len(film_N), QUERIES)
    elsewhere_N = np.full(len(film_N), np.nan)
    elsewhere_N[asking] = average_precision(
        vectors_ND[asking] @ vectors_ND.T, scene_place_N[asking, None] == scene_place_N[None], film_N[asking, None] != film_N[None]
    )
    keep("elsewhere", elsewhere_N, everywhere_N)
    ways: dict[str, Callable[[np.ndarray, int], Sequence[int]]] = {
        "scenes": lambda vectors_SD, count: find_scenes(vectors_SD).first_K[1:].tolist(),
        "true count": optimum_of_count,
    }
    for name, way in ways.items():
        counts = []
        for film, vectors_SD in zip(films, vectors, strict=True):
            boundaries = way(vectors_SD, len(film.boundaries) + 1)
            counts.append([matched(film.boundaries, boundaries, 1), len(boundaries), len(film.boundaries)])
        found[name] = Scores(np.array(counts, np.float64), np.arange(len(films)), np.zeros(len(films), np.int64))
    named_N = probe(probe_vectors, [film.scene_place_S for film in probe_films], vectors_ND)
    keep("ordinary", named_N == scene_place_N, ~away_N)
    if away_N.any():
        keep("cut-aways", named_N == scene_place_N, away_N)
        own_N = probe(probe_vectors, [film.place_S for film in probe_films], vectors_ND)
        keep("own place", own_N == place_N, away_N)
    found["title"] = _titles_found(films, vectors, seed)
    return found


def measure_model(model: Any, films: Sequence[Film], probe_films: Sequence[Film], sources: Sequence[int], seed: int) -> dict[str, Scores]:
    """Every figure of what a model serves, as ``measure`` gives them."""
    return measure(films, contextual(model, films), probe_films, contextual(model, probe_films), sources, seed)


def probe(train_vectors: Vectors, labels: Sequence[np.ndarray], vectors_ND: np.ndarray) -> np.ndarray:
    """(N,) label that ridge regression on the labels gives each vector; a closed form, so that dozens of probes take seconds."""
    train_MD, label_M = unit(np.concatenate(train_vectors).astype(np.float64)), np.concatenate(labels)
    kinds = np.unique(label_M)
    mean_D = train_MD.mean(0)
    target_MK = (label_M[:, None] == kinds[None]).astype(np.float64)
    centred_MD = train_MD - mean_D
    gram_DD = centred_MD.T @ centred_MD
    gram_DD[np.diag_indices_from(gram_DD)] += RIDGE * np.trace(gram_DD) / len(gram_DD) * 1.0
    weight_DK = np.linalg.solve(gram_DD, centred_MD.T @ (target_MK - target_MK.mean(0)))
    return kinds[np.argmax((vectors_ND - mean_D) @ weight_DK + target_MK.mean(0), axis=1)]


def _titles_found(films: Sequence[Film], vectors: Vectors, seed: int) -> Scores:
    """Of one clip a film, whether its title is the nearest; the title's vector is the mean of its other shots."""
    random = np.random.default_rng([47, seed])
    spans_F = []
    for film in films:
        length = int(random.integers(*CLIP_SHOTS, endpoint=True))
        first = int(random.integers(len(film.start_S) - length))
        spans_F.append(slice(first, first + length))
    units = [unit(vectors_SD) for vectors_SD in vectors]
    clip_FD = unit(np.stack([vectors_SD[span].mean(0) for vectors_SD, span in zip(units, spans_F, strict=True)]))
    title_FD = unit(np.stack([np.delete(vectors_SD, span, 0).mean(0) for vectors_SD, span in zip(units, spans_F, strict=True)]))
    hit_F = np.argmax(clip_FD @ title_FD.T, axis=1) == np.arange(len(films))
    return Scores(hit_F.astype(np.float64)[:, None], np.arange(len(films)), np.zeros(len(films), np.int64))


@torch.no_grad()
def masked_cosines(films: Sequence[Film], model: Any | None, sources: Sequence[int], seed: int) -> Scores:
    """Cosine to the original at hidden shots; without a model, of the mean of the four nearest visible shots."""
    values, film_of, source_of = [], [], []
    for index, film in enumerate(films):
        shots = len(film.start_S)
        masked_S = np.zeros(shots, bool)
        masked_S[np.random.default_rng([53, seed, index]).choice(shots, max(1, round(MASKED * shots)), replace=False)] = True
        title = TitleVectors(film.title_id, film.fused_SD, shot_times(film.start_S, film.end_S), None)
        if model is None:
            visible = np.flatnonzero(~masked_S)
            near = [visible[np.argsort(np.abs(visible - shot), kind="stable")[:4]] for shot in np.flatnonzero(masked_S)]
            guess_KD = np.stack([film.fused_SD[rows].mean(0) for rows in near])
        else:
            batch = collate([Window(title, 0, masked_S)], film.parts["text"].shape[1])
            output = model(batch.fused_BSD, batch.metadata_BM, batch.has_metadata_B, None, batch.masked_BS, times_BS2=batch.times_BS2)
            guess_KD = output.contextual_BSD[0].numpy()[masked_S]
        values.append(np.sum(unit(guess_KD) * unit(film.fused_SD[masked_S]), axis=1))
        film_of.append(np.full(len(guess_KD), index))
        source_of.append(np.array(sources)[film.scene_place_S[masked_S]])
    return Scores(np.concatenate(values)[:, None], np.concatenate(film_of), np.concatenate(source_of))


# ------------------------------------------------------------------------------------------------------------ table


def test_films(takes: Takes, seed: int, cut_aways: float) -> tuple[np.ndarray, list[Film], list[Film], list[int]]:
    """Places to train on, films of the others to measure on and to train probes on, and the source of every place."""
    to_train, held_out = split_films(takes, seed)
    names = sorted(set(takes.film_of_place))
    films = make_films(takes, held_out, TEST_FILMS, 1000 + seed, cut_aways, FUSION)
    others = make_films(takes, held_out, PROBE_FILMS, 2000 + seed, cut_aways, FUSION)
    return to_train, films, others, [names.index(film) for film in takes.film_of_place]


def run_seed(takes: Takes, seed: int, cut_aways: float) -> dict[str, dict[str, Scores]]:
    """All figures of all kinds of vectors on one split."""
    begun = time.perf_counter()
    to_train, films, others, sources = test_films(takes, seed, cut_aways)
    training = make_films(takes, to_train, TRAIN_FILMS, 3000 + seed, cut_aways, FUSION)
    models: dict[str, Any] = {"untrained context": builtin_model()}
    models["trained context"], rows = train(training, ShapeConfig(max_shots=128), replace(CONTEXT, seed=seed))
    models["recipe"], _ = train(training, RECIPE_SHAPE, replace(RECIPE, seed=seed))
    print(
        f"seed {seed}, cut-aways {cut_aways:g}: trained after {time.perf_counter() - begun:.0f} s; held out {held_out_line(rows)}",
        flush=True,
    )
    raw = [replace(film, fused_SD=film_none) for film, film_none in zip(films, _fused_raw(films), strict=True)]
    raw_others = [replace(film, fused_SD=film_none) for film, film_none in zip(others, _fused_raw(others), strict=True)]
    kinds: dict[str, tuple[Vectors, Vectors]] = {
        **{name: ([film.parts[name] for film in films], [film.parts[name] for film in others]) for name in films[0].parts},
        "fused, modality_norm none": ([film.fused_SD for film in raw], [film.fused_SD for film in raw_others]),
        "fused": ([film.fused_SD for film in films], [film.fused_SD for film in others]),
        "mean of neighbours": _in_each(films, others, mean_of_neighbours),
        **{name: (contextual(model, films), contextual(model, others)) for name, model in models.items()},
    }
    found = {name: measure(films, here, others, there, sources, seed) for name, (here, there) in kinds.items()}
    found["mean of neighbours"]["masked"] = masked_cosines(films, None, sources, seed)
    for name, model in models.items():
        found[name]["masked"] = masked_cosines(films, model, sources, seed)
    print(f"    measured after {time.perf_counter() - begun:.0f} s", flush=True)
    return found


def _in_each(films: Sequence[Film], others: Sequence[Film], work: Callable[[np.ndarray], np.ndarray]) -> tuple[Vectors, Vectors]:
    return [work(film.fused_SD) for film in films], [work(film.fused_SD) for film in others]


def _fused_raw(films: Sequence[Film]) -> Vectors:
    from mediafm_ray.models.fusion import fuse

    return [fuse(film.parts, FusionConfig("none"))[0] for film in films]


def held_out_line(rows: Sequence[dict[str, float]]) -> str:
    """Identity and context on the films held out of training, of the last model and of the formula."""
    first, last = rows[0], rows[-1]
    return ", ".join(
        f"{name} {last[f'held_out_{name}']:.3f} (formula {first[f'held_out_{name}_neighbours']:.3f})"
        for name in ("cosine", "identity", "context")
    )


def bootstrap_weights(scores: Sequence[Scores], random: np.random.Generator) -> list[np.ndarray]:
    """How often each number of each seed counts when films and sources are drawn anew."""
    found = []
    for of_seed in scores:
        weight_N = _draw(of_seed.film_N, random)
        found.append(weight_N * _draw(of_seed.source_N, random) if of_seed.source_N.any() else weight_N)
    return found


def _draw(group_N: np.ndarray, random: np.random.Generator) -> np.ndarray:
    groups, index_N = np.unique(group_N, return_inverse=True)
    return random.multinomial(len(groups), np.full(len(groups), 1 / len(groups)))[index_N].astype(np.float64)


def interval(scores: Sequence[Scores], baseline: Sequence[Scores] | None = None) -> tuple[float, float, float]:
    """Mean over seeds of a figure, or of its difference to a baseline's on the same shots, with its 95 % interval."""

    def value(weights: Sequence[np.ndarray | None]) -> float:
        own = [one.figure(weight) for one, weight in zip(scores, weights, strict=True)]
        base = [0.0] * len(own) if baseline is None else [one.figure(weight) for one, weight in zip(baseline, weights, strict=True)]
        return float(np.mean(own) - np.mean(base))

    random = np.random.default_rng(0)
    drawn = [value(bootstrap_weights(scores, random)) for _ in range(BOOTSTRAPS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return value([None] * len(scores)), float(low), float(high)


def print_table(found: Sequence[dict[str, dict[str, Scores]]]) -> None:
    """A row a kind of vectors, then the differences of the trained context."""
    names = [name for name in FIGURES if any(name in of_kind for of_kind in found[0].values())]
    print("| vectors | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for kind, figures in found[0].items():
        cells = []
        for name in names:
            mean, low, high = interval([seed[kind][name] for seed in found]) if name in figures else (np.nan, 0, 0)
            cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]" if name in figures else "")
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)
    for kind, base in (("untrained context", "fused"), ("trained context", "untrained context")):
        cells = []
        for name in names:
            there = name in found[0][kind] and name in found[0][base]
            mean, low, high = interval([seed[kind][name] for seed in found], [seed[base][name] for seed in found]) if there else (0, 0, 0)
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if there else "")
        print(f"| {kind} minus {base} | " + " | ".join(cells) + " |", flush=True)


def print_growth(takes: Takes, seeds: int, sizes: Sequence[int], steps: Sequence[int]) -> None:
    """A row a number of films and of steps: what training gains, and what it says of itself on the films it holds out."""
    cut_aways = CUT_AWAYS[1]
    found: dict[tuple[int, int], list[dict[str, Scores]]] = {(size, count): [] for size in sizes for count in steps}
    base: list[dict[str, Scores]] = []
    taken = dict.fromkeys(found, 0.0)
    for seed in range(seeds):
        to_train, films, others, sources = test_films(takes, seed, cut_aways)
        base.append(measure_model(builtin_model(), films, others, sources, seed))
        training = make_films(takes, to_train, max(sizes), 3000 + seed, cut_aways, FUSION)
        for size, count in found:
            begun = time.perf_counter()
            model, rows = train(training[:size], ShapeConfig(max_shots=128), replace(CONTEXT, seed=seed, steps=count))
            taken[size, count] += (time.perf_counter() - begun) / seeds
            found[size, count].append(measure_model(model, films, others, sources, seed))
            print(f"seed {seed}, {size} films, {count} steps: held out {held_out_line(rows)}", flush=True)
    print("\n| films | steps | seconds | " + " | ".join(GROWTH_FIGURES) + " |\n" + "|---" * (len(GROWTH_FIGURES) + 3) + "|")
    for (size, count), figures in found.items():
        cells = []
        for name in GROWTH_FIGURES:
            mean, low, high = interval([of_seed[name] for of_seed in figures], [of_seed[name] for of_seed in base])
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        print(f"| {size} | {count} | {taken[size, count]:.0f} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Embed the takes, or read them back; make films, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of videos")
    parser.add_argument("--same", action="append", default=[], help="first words of names that mean one film, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--takes", default="", help="file to keep the embedded takes in, and to read them from when it is there")
    parser.add_argument("--growth", type=int, nargs="+", default=[], metavar="FILMS", help="numbers of films to train on")
    parser.add_argument("--steps", type=int, nargs="+", default=[150], help="of training, with --growth")
    options = parser.parse_args()
    if options.takes and Path(options.takes).exists():
        takes = Takes.load(options.takes)
    else:
        takes = embed_takes(options.folders, [words.split(",") for words in options.same])
        if options.takes:
            takes.save(options.takes)
    films = sorted(set(takes.film_of_place))
    size = f"{len(takes.place_N)} takes of {len(takes.film_of_place)} places in {len(films)} films"
    print(f"{time.strftime('%Y-%m-%d')}  {size}: {', '.join(films)}")
    if options.growth:
        print_growth(takes, options.seeds, options.growth, options.steps)
        return
    for cut_aways in CUT_AWAYS:
        found = [run_seed(takes, seed, cut_aways) for seed in range(options.seeds)]
        print(f"\ncut-aways: {cut_aways:.0%} of the shots\n")
        print_table(found)
        print()


if __name__ == "__main__":
    main()
