"""Benchmark of scene boundaries on titles that are joined from different sources, whose boundaries are known.

    python -m jobs.embed_catalog --config conf/offline.yaml catalog.uri=FOLDER output.uri=OUTPUT
    python -m benchmarks.scenes OUTPUT [--checkpoint ADDRESS] [--titles 60] [--least-shots 4]

A title is a random sequence of sources (3 to 8 where there are so many), each whole: the vectors of its shots, as OUTPUT has them, one
after another; a contextualiser reads the joined sequence. Sources whose names begin with the same word are taken for parts of one film
and are never in one title together. Only the joins count as true: scenes within a source are not known, and to find one is an error
here, for every method alike. Sources of a single shot are scenes of a single shot; --least-shots leaves short ones out.

A boundary is found when one is within a shot of it, each matched once ("F1 exact": at its very place); F1 is over all boundaries of all
titles.

    ours          mediafm_ray.downstream.scenes with its defaults: nothing is chosen on these titles
    true count    its optimum for the true number of scenes: what its choice of the number costs
    uniform       scenes of equal numbers of shots, of the true number or of the number that ours finds
    threshold     a boundary wherever the cosine distance of neighbours exceeds the value that does best on the titles that hold none of
                  this title's sources; "best here": the value that does best on the very titles it is measured on

Shapes
    S  shots of a title
    D  dimension of an embedding
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mediafm_ray.downstream.scenes import centred_directions, find_scenes, optimal_segmentation
from mediafm_ray.models.options import ContextualiserConfig
from mediafm_ray.storage.dataset import EmbeddingDataset

FEWEST, MOST = 3, 8  # sources in a title
HALVINGS = 60  # of the interval in which the price for a number of scenes is searched
TOLERANCES = (1, 0)  # shots


@dataclass(frozen=True, eq=False)
class JoinedTitle:
    """A title with known joins."""

    sources: frozenset[str]
    joins: tuple[int, ...]  # first shots of all sources but the first
    vectors: Mapping[str, np.ndarray]  # (S, D) by kind


def main() -> None:
    """Read the sources, join them, find the joins with every method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="output of jobs.embed_catalog")
    parser.add_argument("--version", help="dataset version, where there are several")
    parser.add_argument("--checkpoint", help="contextualiser for these vectors, as contextualiser.checkpoint takes it")
    parser.add_argument("--titles", type=int, default=60)
    parser.add_argument("--least-shots", type=int, default=1, help="of a source")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sources = read_sources(EmbeddingDataset(options.output, options.version), options.least_shots)
    titles = join_sources(sources, options.titles, options.seed)
    if options.checkpoint:
        titles = contextualise(titles, options.checkpoint)
    shots, scenes = [len(title.vectors["fused"]) for title in titles], [len(title.joins) + 1 for title in titles]
    size = f"{np.mean(shots):.1f} shots and {np.mean(scenes):.1f} scenes each"
    print(f"{len(titles)} titles from {len(sources)} sources: {size}, seed {options.seed}")
    print(f"\n{'vectors':<12}{'method':<26}{'F1':>7}{'precision':>11}{'recall':>8}{'F1 exact':>10}{'scenes found':>14}")
    for kind in titles[0].vectors:
        for method, found in segmentations(titles, kind).items():
            f1, precision, recall = score(titles, found, TOLERANCES[0])
            exact, _, _ = score(titles, found, TOLERANCES[1])
            count = np.mean([len(boundaries) + 1 for boundaries in found])
            print(f"{kind:<12}{method:<26}{f1:>7.3f}{precision:>11.3f}{recall:>8.3f}{exact:>10.3f}{count:>14.1f}")


def read_sources(dataset: EmbeddingDataset, least_shots: int) -> dict[str, dict[str, np.ndarray]]:
    """Return the fused vectors of every title, and those of its video part."""
    sources = {}
    shots = dataset.dataset().to_table(columns=["title_id", "shot_index", "fused_embedding", "fused_norm"])
    shots = shots.sort_by([("title_id", "ascending"), ("shot_index", "ascending")]).combine_chunks()
    ids = np.array(shots["title_id"].to_pylist())
    fused_SD, video_SD = dataset.embeddings(shots), dataset.embeddings(shots, "video")
    for title_id in np.unique(ids):
        rows = ids == title_id
        if rows.sum() >= least_shots:
            sources[str(title_id)] = {"fused": fused_SD[rows], "video": video_SD[rows]}
    return sources


def film_of(source: str) -> str:
    """Return the first word of a source's name."""
    return re.split(r"[^a-z]", source.lower().rsplit("/", 1)[-1])[0]


def join_sources(sources: Mapping[str, Mapping[str, np.ndarray]], count: int, seed: int) -> list[JoinedTitle]:
    """Draw random sequences of sources, at most one of each film."""
    films = defaultdict(list)
    for source in sources:
        films[film_of(source)].append(source)
    random = np.random.default_rng(seed)
    most = min(MOST, len(films))
    if most < FEWEST:
        raise SystemExit(f"{len(films)} films are too few: a title is joined from at least {FEWEST}")
    titles = []
    for _ in range(count):
        chosen = random.permutation(sorted(films))[: random.integers(FEWEST, most + 1)]
        picked = [str(random.choice(films[film])) for film in chosen]
        joins = np.cumsum([len(sources[source]["fused"]) for source in picked])[:-1]
        vectors = {kind: np.concatenate([sources[source][kind] for source in picked]) for kind in ("fused", "video")}
        titles.append(JoinedTitle(frozenset(picked), tuple(joins.tolist()), vectors))
    return titles


def contextualise(titles: Sequence[JoinedTitle], checkpoint: str) -> list[JoinedTitle]:
    """Return the titles with contextual vectors of their joined sequences, without metadata, with two seconds per shot."""
    from mediafm_ray.models.contextualiser import TitleContextualiser, shot_times

    model = TitleContextualiser(ContextualiserConfig(checkpoint=checkpoint, any_dataset=True))
    found = []
    for title in titles:
        end_S = 2.0 * np.arange(1, len(title.vectors["fused"]) + 1)
        contextual_SD, _ = model.contextualise(title.vectors["fused"], None, shot_times(end_S - 2.0, end_S))
        found.append(JoinedTitle(title.sources, title.joins, {**title.vectors, "contextual": contextual_SD}))
    return found


# ------------------------------------------------------------------------------------------------------------- methods


def segmentations(titles: Sequence[JoinedTitle], kind: str) -> dict[str, list[Sequence[int]]]:
    """Return the boundaries that each method finds in each title."""
    vectors = [title.vectors[kind] for title in titles]
    ours = [find_scenes(vectors_SD).first_K[1:].tolist() for vectors_SD in vectors]
    counts = [len(title.joins) + 1 for title in titles]
    distances = [neighbour_distances(vectors_SD) for vectors_SD in vectors]
    best = best_threshold(titles, distances)
    return {
        "ours": ours,
        "true count, optimum": [optimum_of_count(vectors_SD, count) for vectors_SD, count in zip(vectors, counts, strict=True)],
        "uniform, true count": [uniform(len(vectors_SD), count) for vectors_SD, count in zip(vectors, counts, strict=True)],
        "uniform, our count": [uniform(len(vectors_SD), len(found) + 1) for vectors_SD, found in zip(vectors, ours, strict=True)],
        "threshold, other titles": [
            above(distance_S, threshold_for(title, titles, distances)) for title, distance_S in zip(titles, distances, strict=True)
        ],
        "threshold, best here": [above(distance_S, best) for distance_S in distances],
    }


def optimum_of_count(vectors_SD: np.ndarray, count: int) -> list[int]:
    """Return the optimum for a number of scenes by a search for its price, or for the next smaller number if no price gives it."""
    centred_SD = centred_directions(vectors_SD)
    low, high = 0.0, float(np.sum(centred_SD**2)) + 1.0  # at the higher price there is one scene
    found = optimal_segmentation(centred_SD, high)[0]
    for _ in range(HALVINGS):
        price = (low + high) / 2
        firsts = optimal_segmentation(centred_SD, price)[0]
        if len(firsts) > count:
            low = price
        else:
            high, found = price, firsts
        if len(firsts) == count:
            break
    return found[1:].tolist()


def uniform(shots: int, count: int) -> list[int]:
    """Return the first shots of a number of scenes of equal length, except the first scene."""
    return sorted({round(index * shots / count) for index in range(1, count)} - {0, shots})


def neighbour_distances(vectors_SD: np.ndarray) -> np.ndarray:
    """Return the (S - 1,) cosine distances of each shot to the previous one."""
    unit_SD = vectors_SD / np.maximum(np.linalg.norm(vectors_SD, axis=1, keepdims=True), 1e-12)
    return 1 - np.sum(unit_SD[1:] * unit_SD[:-1], axis=1)


def above(distance_S: np.ndarray, threshold: float) -> list[int]:
    """Return the shots that are farther than the threshold from the previous one."""
    return (np.flatnonzero(distance_S > threshold) + 1).tolist()


def threshold_for(title: JoinedTitle, titles: Sequence[JoinedTitle], distances: Sequence[np.ndarray]) -> float:
    """Return the best threshold on titles that share no film with this one, or on all others if every title shares one."""
    films = {film_of(source) for source in title.sources}
    apart = [index for index, other in enumerate(titles) if not films & {film_of(source) for source in other.sources}]
    used = apart or [index for index, other in enumerate(titles) if other is not title]
    return best_threshold([titles[index] for index in used], [distances[index] for index in used])


def best_threshold(titles: Sequence[JoinedTitle], distances: Sequence[np.ndarray]) -> float:
    """Return the distance that is the threshold with the best F1."""
    values = np.unique(np.quantile(np.concatenate(distances), np.linspace(0, 1, 101)))

    def reached(value: float) -> float:
        return score(titles, [above(distance_S, value) for distance_S in distances], TOLERANCES[0])[0]

    return float(max(values, key=reached))


# --------------------------------------------------------------------------------------------------------------- score


def score(titles: Sequence[JoinedTitle], found: Sequence[Sequence[int]], tolerance: int) -> tuple[float, float, float]:
    """Return F1, precision and recall of boundaries over all titles."""
    hits = sum(matched(title.joins, boundaries, tolerance) for title, boundaries in zip(titles, found, strict=True))
    precision = hits / max(1, sum(map(len, found)))
    recall = hits / max(1, sum(len(title.joins) for title in titles))
    return (2 * precision * recall / (precision + recall) if hits else 0.0), precision, recall


def matched(true: Sequence[int], found: Sequence[int], tolerance: int) -> int:
    """Return the maximum number of boundaries that match one to one, in order, within the tolerance."""
    hits = index = 0
    for boundary in true:
        while index < len(found) and found[index] < boundary - tolerance:
            index += 1
        if index < len(found) and found[index] <= boundary + tolerance:
            hits += 1
            index += 1
    return hits


if __name__ == "__main__":
    main()
