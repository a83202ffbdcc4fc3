"""Benchmark of masked shot modelling: the cosine at masked shots of held-out titles, compared with baselines. Imports no ray.

    python -m benchmarks.msm                                           # titles made from random places and voices
    python -m jobs.embed_catalog --config conf/offline.yaml catalog.uri=CLIPS output.uri=EMBEDDINGS
    python -m benchmarks.msm --embeddings EMBEDDINGS                    # places and voices drawn around those of real shots

A made title has scenes. A scene plays at one of the title's places and shows it from two sides that take turns (shot and reverse
shot), each with a voice and a usual length of its own; places come back, and two of them may take turns (cross-cutting). The parts of a
shot's vector are drawn around those of its side, voice and topic, with noise; a title's metadata vector is a noisy image of its
places. Held-out titles have places, voices and topics of their own: nothing in them was seen in training.

oracle: a prediction from the side, voice and topic of the hidden shot, without the noise: an upper bound that no model can reach.
mean vector: the mean of all training shots. title mean, nearest shot, interpolation: from the visible shots of the window.
AdamW alone has the learning rate 1e-3, the best of 1e-3, 2e-3 and 5e-3 on random titles.
Figures are means over the masked shots of a title, then over titles; intervals are 95 % of a bootstrap over held-out titles, of the mean
over seeds. Real titles, where there are any, are never trained on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mediafm_ray.models.contextualiser import Contextualiser, shot_times
from mediafm_ray.models.fusion import fuse, spans
from mediafm_ray.models.options import FusionConfig
from mediafm_ray.spec import MODALITIES
from mediafm_ray.training.baselines import BASELINES, cosines, guess
from mediafm_ray.training.batches import TitleVectors, Window, WindowSource, collate
from mediafm_ray.training.options import ShapeConfig, TrainingConfig
from mediafm_ray.training.trainer import Trainer, new_model

TRAIN_TITLES, HELD_OUT_TITLES = 400, 100
RANDOM_DIMS = {"video": 48, "audio": 24, "text": 24}  # where no real shots are given
RANDOM_METADATA_DIM = 24
SPECTRUM = 12  # directions in which places (voices, topics) differ, at most
SHOTS = (16, 65)  # of a title, from and below
SCENE_SHOTS = 8.0  # mean
PLACES = (3, 7)
SHARED_BY_TITLE, SHARED_BY_PLACE = 0.3, 0.6  # shares of variance: of places of one title, of two sides of one place
TURN = 0.75  # probability that the next shot shows the other side
CROSS_CUT = 0.3  # probability that a scene jumps between two places
NOISE = 0.6  # of a shot around its side, in standard deviations between places
TEXT, AUDIO = 0.6, 0.9  # probability that a shot has words, a sound
BOOTSTRAPS = 2000
SHAPE = ShapeConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384, max_shots=64, dropout=0.0)
TRAINING = TrainingConfig(
    objective="recipe", windows_per_step=16, warmup_steps=100, evaluate_every=10**6, log_every=50, learning_rate=1e-3, cache_gb=0
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", default="", help="what embed_catalog wrote of real clips; empty = random places and voices")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2, help="1 on a machine that is busy: threads would mostly wait for one another")
    parser.add_argument("--save", default="", help="folder for the first model with Muon + AdamW and [GLOBAL], as a checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    world = World.of_real_shots(arguments.embeddings) if arguments.embeddings else World.random()
    catalog = Catalog(world)
    training = replace(TRAINING, steps=arguments.steps)
    print(f"{time.strftime('%Y-%m-%d')}  {world.name}: {', '.join(f'{name} {dim}' for name, dim in world.dims.items())} dimensions")
    print(f"{TRAIN_TITLES} titles to train on, {HELD_OUT_TITLES} made and {len(catalog.real)} real ones held out; {arguments.steps} steps")
    print(f"of {training.windows_per_step} windows, {arguments.seeds} seeds, {SHAPE.num_hidden_layers} layers x {SHAPE.hidden_size}\n")
    report_baselines(catalog)
    variants: dict[str, tuple[ShapeConfig, TrainingConfig, bool]] = {
        "Muon + AdamW": (SHAPE, training, True),
        "AdamW alone": (SHAPE, replace(training, optimiser="adamw"), True),
        "without [GLOBAL]": (SHAPE, training, False),
        "with time features": (replace(SHAPE, time_features=True), training, True),
    }
    found: dict[str, np.ndarray] = {}
    for name, (shape, config, with_metadata) in variants.items():
        start = time.perf_counter()
        models = [train(catalog, shape, replace(config, seed=seed), with_metadata) for seed in range(arguments.seeds)]
        taken_s = (time.perf_counter() - start) / arguments.seeds
        scores = [catalog.scores(catalog.made, predictions(model, catalog.made, with_metadata)) for model in models]
        found[name] = np.mean(scores, axis=0)
        by_seed = ", ".join(f"{score.mean():.4f}" for score in scores)
        print(f"{name:24} {interval(found[name])}   seeds {by_seed}   {taken_s:.0f} s a training", flush=True)
        if name == "Muon + AdamW" and arguments.save:
            models[0].save_pretrained(arguments.save)
        if name == "Muon + AdamW" and catalog.real:
            found["real"] = np.mean([catalog.scores(catalog.real, predictions(model, catalog.real, True)) for model in models], axis=0)
    report_differences(catalog, found)


def report_baselines(catalog: Catalog) -> None:
    """The baselines and the oracle."""
    for name, scores in catalog.baselines(catalog.made).items():
        print(f"{name:24} {interval(scores)}")


def report_differences(catalog: Catalog, found: Mapping[str, np.ndarray]) -> None:
    """Return the difference of the model from each other row, for each title."""
    model = found["Muon + AdamW"]
    print("\nMuon + AdamW, minus, on the same masked shots of made titles:")
    for name, scores in {**catalog.baselines(catalog.made), **found}.items():
        if name not in ("Muon + AdamW", "real"):
            print(f"  {name:22} {interval(model - scores, sign='+')}")
    if "real" in found:
        print("\nreal titles: their sequences were never seen; the made ones were drawn from the spread of their shots")
        print(f"  {'Muon + AdamW':22} {interval(found['real'])}")
        for name, scores in catalog.baselines(catalog.real).items():
            print(f"  {name:22} {interval(scores)}   model minus it {interval(found['real'] - scores, sign='+')}")


def interval(scores: np.ndarray, sign: str = "") -> str:
    """Return the mean over titles with its 95 % bootstrap interval."""
    random = np.random.default_rng(0)
    means = scores[random.integers(0, len(scores), (BOOTSTRAPS, len(scores)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{scores.mean():{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


# ------------------------------------------------------------------------------------------------------------ world


@dataclass(frozen=True, eq=False)
class Population:
    """The distribution of the vectors of one modality: normal, in the directions of largest variance."""

    mean_D: np.ndarray
    directions_RD: np.ndarray  # rows scaled by the standard deviation along them

    @classmethod
    def of(cls, vectors_SD: np.ndarray) -> Population:
        """Fit the distribution to vectors."""
        mean_D = vectors_SD.mean(axis=0)
        _, values_R, rows_RD = np.linalg.svd(vectors_SD - mean_D, full_matrices=False)
        scaled_RD = rows_RD * (values_R / np.sqrt(max(1, len(vectors_SD) - 1)))[:, None]
        return cls(mean_D, scaled_RD[:SPECTRUM])

    def vectors(self, latent_SR: np.ndarray) -> np.ndarray:
        """Map latents of unit variance to vectors."""
        return self.mean_D + latent_SR[..., : len(self.directions_RD)] @ self.directions_RD


@dataclass(frozen=True, eq=False)
class World:
    """The distribution of titles."""

    name: str
    populations: Mapping[str, Population]
    dims: Mapping[str, int]
    metadata_dim: int
    real: tuple[TitleVectors, ...]

    @classmethod
    def random(cls) -> World:
        """Return a distribution of places and voices in random directions of decreasing weight."""
        random = np.random.default_rng(11)
        populations = {}
        for name, dim in RANDOM_DIMS.items():
            directions_RD = np.linalg.qr(random.normal(size=(dim, SPECTRUM)))[0].T / np.sqrt(np.arange(1, SPECTRUM + 1))[:, None]
            mean_D = random.normal(size=dim)
            populations[name] = Population(mean_D / np.linalg.norm(mean_D), directions_RD)
        return cls("random places and voices", populations, RANDOM_DIMS, RANDOM_METADATA_DIM, ())

    @classmethod
    def of_real_shots(cls, uri: str) -> World:
        """Return a distribution of places and voices with the variance of real shots."""
        from mediafm_ray.pipeline.training.titles import StoredTitles, list_titles
        from mediafm_ray.storage.dataset import EmbeddingDataset
        from mediafm_ray.storage.store import StorageConfig

        dataset = EmbeddingDataset(uri)
        shots = dataset.dataset().to_table()
        populations = {}
        for name in MODALITIES:
            parts_SD = dataset.embeddings(shots, name)
            populations[name] = Population.of(parts_SD[parts_SD.any(axis=1)].astype(np.float64))
        stored = StoredTitles(uri, list_titles(dataset), 0.0, 1, StorageConfig(), 0)
        titles = (stored.read(index) for index in range(len(stored.objects)))
        real = tuple(title for title in titles if len(title.fused_SD) > 2)  # of fewer shots nothing can be said
        name = f"around {shots.num_rows} real shots"
        return cls(name, populations, {name: dataset.model.dims[name] for name in MODALITIES}, dataset.model.dims["text"], real)


def make_title(world: World, index: int) -> tuple[TitleVectors, np.ndarray]:
    """Draw a title, and its (S, D) shots without noise for the oracle."""
    random = np.random.default_rng([23, index])

    def latents(*shape: int) -> np.ndarray:
        return random.normal(size=(*shape, SPECTRUM))

    def mix(shared: np.ndarray, share: float, own: np.ndarray) -> np.ndarray:
        return np.sqrt(share) * shared + np.sqrt(1 - share) * own

    places = int(random.integers(*PLACES))
    place_PR = mix(latents(), SHARED_BY_TITLE, latents(places))
    side_P2R = mix(place_PR[:, None], SHARED_BY_PLACE, latents(places, 2))
    voice_P2R, topic_PR = latents(places, 2), latents(places)
    usual_s_P2 = 3.0 * np.exp(random.normal(0, 0.6, (places, 2)))
    count = int(random.integers(*SHOTS))
    place_S, side_S = _scenes(random, places, count)
    has = {"video": np.ones(count, bool), "audio": random.random(count) < AUDIO, "text": random.random(count) < TEXT}
    pure = {"video": side_P2R[place_S, side_S], "audio": voice_P2R[place_S, side_S], "text": topic_PR[place_S]}
    vectors = {}
    for noise in (0.0, NOISE):
        parts = {
            name: (world.populations[name].vectors(latent_SR + noise * latents(count)) * has[name][:, None]).astype(np.float32)
            for name, latent_SR in pure.items()
        }
        vectors[noise] = fuse(parts, FusionConfig())[0]
    ends_S = np.cumsum(usual_s_P2[place_S, side_S] * np.exp(random.normal(0, 0.3, count)))
    image_RM = np.random.default_rng(29).normal(size=(SPECTRUM, world.metadata_dim)) / np.sqrt(SPECTRUM)
    metadata_M = (place_PR[place_S].mean(axis=0) + 0.3 * latents()) @ image_RM
    times_S2 = shot_times(np.concatenate([[0.0], ends_S[:-1]]), ends_S)
    title = TitleVectors(f"made-{index}", vectors[NOISE], times_S2, (metadata_M / np.linalg.norm(metadata_M)).astype(np.float32))
    return title, vectors[0.0]


def _scenes(random: np.random.Generator, places: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the (S,) place and the (S,) side of every shot."""
    place_of: list[int] = []
    side_of: list[int] = []
    here = int(random.integers(places))
    while len(place_of) < count:
        before, here = here, int((here + random.integers(1, places)) % places)
        crossing, side = random.random() < CROSS_CUT, int(random.integers(2))
        for shot in range(2 + random.poisson(SCENE_SHOTS - 2)):
            place_of.append(before if crossing and shot % 2 else here)
            side_of.append(side)
            side = 1 - side if random.random() < TURN else side
    return np.array(place_of[:count]), np.array(side_of[:count])


# ---------------------------------------------------------------------------------------------------------- catalog


class Catalog:
    """Made titles to train on (training.batches.Titles); made and real ones held out, each with one window and one mask."""

    def __init__(self, world: World):
        made = [make_title(world, index) for index in range(TRAIN_TITLES + HELD_OUT_TITLES)]
        self.titles = [title for title, _ in made] + list(world.real)
        self.pure = {title.title_id: pure_SD for title, pure_SD in made}
        self.sizes = np.array([len(title.fused_SD) for title in self.titles])
        self.train = np.arange(TRAIN_TITLES)
        self.held_out = np.arange(TRAIN_TITLES, len(self.titles))
        self.fused_dim, self.metadata_dim, self.spans = sum(world.dims.values()), world.metadata_dim, spans(world.dims)
        source = WindowSource(self, 0, 1, SHAPE.max_shots, TRAINING.mask_fraction, print)
        windows = [source.of_evaluation(slot) for slot in range(len(self.held_out))]
        self.made, self.real = windows[:HELD_OUT_TITLES], windows[HELD_OUT_TITLES:]
        self.mean_D = np.concatenate([title.fused_SD for title in self.titles[:TRAIN_TITLES]]).mean(axis=0)

    def read(self, index: int) -> TitleVectors:
        return self.titles[index]

    def scores(self, windows: Sequence[Window], predicted: Iterable[np.ndarray]) -> np.ndarray:
        """Return the (titles,) mean cosines at masked shots, from (K, D) predictions of each title."""
        pairs = zip(windows, predicted, strict=True)
        return np.array(
            [cosines(predicted_KD, window.title.fused_SD[window.shots][window.masked_S]).mean() for window, predicted_KD in pairs]
        )

    def baselines(self, windows: list[Window]) -> dict[str, np.ndarray]:
        """Return the scores of the baselines, and of the oracle for generated titles."""
        found = {"mean vector": self.scores(windows, (np.tile(self.mean_D, (window.masked_S.sum(), 1)) for window in windows))}
        for name in BASELINES:
            guesses = [guess(name, window.title.fused_SD[window.shots], window.masked_S) for window in windows]
            found[name.replace("_", " ")] = self.scores(windows, guesses)
        if windows is self.made:
            known = [self.pure[window.title.title_id][window.shots][window.masked_S] for window in windows]
            found["oracle"] = self.scores(windows, known)
        return found


class WithoutMetadata:
    """Return the same titles without metadata embeddings: [GLOBAL] is the learned vector."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.sizes, self.train, self.held_out = catalog.sizes, catalog.train, catalog.held_out
        self.fused_dim, self.metadata_dim, self.spans = catalog.fused_dim, catalog.metadata_dim, catalog.spans

    def read(self, index: int) -> TitleVectors:
        return replace(self.catalog.read(index), metadata_M=None)


class Nobody:
    """A recorder that keeps nothing, because only the model of the last step is evaluated."""

    def row(self, row: Mapping[str, float]) -> None: ...

    def best(self, model: Contextualiser) -> None: ...

    def save(self, trainer: Trainer) -> None: ...


def train(catalog: Catalog, shape: ShapeConfig, config: TrainingConfig, with_metadata: bool) -> Contextualiser:
    """Train and return the model of the last step."""
    titles: Any = catalog if with_metadata else WithoutMetadata(catalog)
    model = new_model(shape, catalog.fused_dim, catalog.metadata_dim, "", config.seed)
    Trainer(model, titles, config).train(Nobody())
    return model.eval()


@torch.no_grad()
def predictions(model: Contextualiser, windows: Sequence[Window], with_metadata: bool) -> list[np.ndarray]:
    """Return (K, D) predictions of each window's masked shots."""
    found = []
    for window in windows:
        batch = collate([window], model.config.metadata_dim)
        has_metadata_B = batch.has_metadata_B if with_metadata else torch.zeros_like(batch.has_metadata_B)
        output = model(batch.fused_BSD, batch.metadata_BM, has_metadata_B, masked_BS=batch.masked_BS, times_BS2=batch.times_BS2)
        found.append(output.contextual_BSD[batch.masked_BS].numpy())
    return found


if __name__ == "__main__":
    main()
