"""Benchmark of repeats: precision and recall on made films that share runs of shots, and time and memory for many titles.

    python -m benchmarks.repeats FOLDER ... [--seeds 3] [--keep FOLDER] [-- video.encoder=clip video.weights=...]
    python -m benchmarks.repeats --titles 10000

Films are put together from the footage of the folders and from drawn shots (benchmarks/repeat_making.py), embedded with the offline profile
(or with the keys after --) and indexed; jobs.find_repeats looks for what they share. A found run is right if it overlaps a shared one by at
least half of their union in time, in both titles; every run counts once. Precision, recall and F1 are of runs. A repeat of an unrelated
film, or of two films that share nothing, is listed apart too.

The baseline joins pairs of shots of different titles whose cosine is at least a threshold to runs by their numbers (shot i + 1 with j + 1
after i with j); its threshold is the one that is best for these very films.

--titles makes an index of so many titles, 100 shots each, whose vectors are random clusters; every tenth shares a run of 5 shots with the
title before it, and every title has two shots that all titles have.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.repeat_making import Found, SharedRun, make_films, plan_films
from benchmarks.search import World, rows_of
from jobs import build_index, find_repeats
from mediafm_ray.config.jobs import BuildIndexConfig, EmbedCatalogConfig, FindRepeatsConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.derive.repeats import COLUMN, read_catalog, repeats_table
from mediafm_ray.derive.repeats import find_repeats as find_runs
from mediafm_ray.downstream.similarity import unit_vectors
from mediafm_ray.pipeline.loop import build_stages, run
from mediafm_ray.runs.plan import make_plan, prepare_output
from mediafm_ray.runs.report import Console
from mediafm_ray.storage.index import IndexFacts, open_index
from mediafm_ray.storage.index_writer import IndexWriter
from mediafm_ray.storage.store import StorageConfig

RUNS, COPIES, UNRELATED = 12, 3, 3  # runs of a catalog, disturbed films that have each, unrelated films
MIN_OVERLAP = 0.5  # of the union
THRESHOLDS = np.arange(0.5, 1.0, 0.01)
SHOTS, DIMS, SHARED, EVERY = 100, 1280, 5, 10  # of the made index: shots of a title, shots of a shared run, titles that share one


@dataclasses.dataclass
class Score:
    """Counts of runs."""

    right: int = 0
    found: int = 0
    true: int = 0
    unrelated: int = 0  # runs of films that share nothing
    labels: dict[str, list[bool]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))

    def add(self, found: Sequence[Found], truth: Sequence[SharedRun]) -> Score:
        """Compare what was found in a catalog with the truth."""
        pairs = [(overlap(one, true), k, t) for k, one in enumerate(found) for t, true in enumerate(truth)]
        used_found, used_true = set(), set()
        for share, k, t in sorted(pairs, reverse=True):
            if share >= MIN_OVERLAP and k not in used_found and t not in used_true:
                used_found.add(k)
                used_true.add(t)
        sharing = {(true.title_a, true.title_b) for true in truth}
        self.right, self.found, self.true = self.right + len(used_true), self.found + len(found), self.true + len(truth)
        self.unrelated += sum((one.title_a, one.title_b) not in sharing for one in found)
        for t, true in enumerate(truth):
            self.labels[true.label].append(t in used_true)
        return self

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        return 2 * self.right / max(self.found + self.true, 1)

    def row(self, name: str) -> str:
        """Return a row of a table."""
        precision, recall = self.right / max(self.found, 1), self.right / max(self.true, 1)
        return f"| {name} | {precision:.3f} | {recall:.3f} | {self.f1:.3f} | {self.found} | {self.true} | {self.unrelated} |"


def overlap(one: Found, true: SharedRun) -> float:
    """Return the smaller of the overlaps in both titles, each as a share of the union; 0 for other titles."""
    if (one.title_a, one.title_b) != (true.title_a, true.title_b):
        return 0.0
    shares = []
    for k in "ab":
        (start, end), (from_, to) = ((getattr(x, f"start_{k}_s"), getattr(x, f"end_{k}_s")) for x in (one, true))
        shares.append(max(min(end, to) - max(start, from_), 0.0) / (max(end, to) - min(start, from_)))
    return min(shares)


def main() -> None:
    """Measure quality or scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="folders of videos")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="folder for films, vectors and truth, which a second run finds there")
    parser.add_argument("--set", nargs="*", default=[], help="further keys of the embedding, such as video.encoder=clip")
    parser.add_argument("--titles", type=int, help="measure time and memory for so many titles instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        if arguments.titles:
            measure_scale(folder / f"titles-{arguments.titles}", arguments.titles)
        else:
            measure_quality(folder, arguments.folders, arguments.seeds, arguments.set)


# ----------------------------------------------------------------------------------------------------------------- quality


def measure_quality(folder: Path, footage: Sequence[str], seeds: Sequence[int], keys: Sequence[str]) -> None:
    """Make, embed and search the films of every seed; print the tables."""
    ours, everything = Score(), []
    for seed in seeds:
        root = folder / f"seed-{seed}"
        if not (root / "truth.json").exists():
            make_catalog(root, footage, seed, keys)
        truth = [SharedRun(**fields) for fields in json.loads((root / "truth.json").read_text())]
        places = [f"output.uri={root / 'out'}", f"index.uri={root / 'index'}", f"repeats.uri={root / 'repeats.parquet'}"]
        find_repeats.main(read_config(FindRepeatsConfig, [], places))
        names = [field.name for field in dataclasses.fields(Found)]
        found = [Found(**{name: row[name] for name in names}) for row in pq.read_table(root / "repeats.parquet").to_pylist()]
        print(Score().add(found, truth).row(f"seed {seed}"), flush=True)
        ours.add(found, truth)
        everything.append((root, truth))
    scores = {threshold: Score() for threshold in THRESHOLDS}
    for root, truth in everything:
        for threshold, score in scores.items():
            score.add(baseline(root, float(threshold)), truth)
    best, baseline_score = max(scores.items(), key=lambda item: item[1].f1)
    print("\n| method | precision | recall | F1 | found | shared | of films that share nothing |\n" + "|---" * 7 + "|")
    print(ours.row("runs") + "\n" + baseline_score.row(f"single shots from cosine {best:.2f}"))
    print("\n| what was done to the copy | shared runs | found | by single shots |\n|---|---|---|---|")
    for label in sorted(ours.labels):
        counts = (score.labels[label] for score in (ours, baseline_score))
        print(f"| {label} | {len(ours.labels[label])} | " + " | ".join(f"{np.mean(hits):.0%}" for hits in counts) + " |")


def make_catalog(root: Path, footage: Sequence[str], seed: int, keys: Sequence[str]) -> None:
    """Make the films of a seed, embed and index them; the truth is written last."""
    if root.exists():
        shutil.rmtree(root)
    truth = make_films(plan_films(footage, seed, RUNS, COPIES, UNRELATED), root / "videos")
    uris = [f"catalog.uri={root / 'videos'}", f"output.uri={root / 'out'}", "contextualiser.checkpoint="]
    config = read_config(EmbedCatalogConfig, ["offline"], [*uris, *keys])
    plan = make_plan(config)
    prepare_output(plan, config)
    for row in run(plan.pending, build_stages(plan, config)):
        if error := row["error"][0].as_py():
            raise SystemExit(f"a film failed: {error}")
    keys = [f"output.uri={root / 'out'}", f"index.uri={root / 'index'}", "vectors.kind=fused", "index.parts=[video]"]
    build_index.main(read_config(BuildIndexConfig, [], keys))
    (root / "truth.json").write_text(json.dumps([dataclasses.asdict(one) for one in truth]))


def baseline(root: Path, threshold: float) -> list[Found]:
    """Join pairs of near shots to runs by their numbers."""
    index = open_index(str(root / "index"), StorageConfig())
    catalog = read_catalog(index)
    unit_ND = unit_vectors(index.vectors(COLUMN, np.arange(len(catalog.title_N))))[0]
    rows = [catalog.rows_of(title) for title in range(len(catalog.titles))]
    found = []
    for a in range(len(rows)):
        for b in range(a + 1, len(rows)):
            near = unit_ND[rows[a]] @ unit_ND[rows[b]].T >= threshold
            for i, j in zip(*np.nonzero(near), strict=True):
                if i and j and near[i - 1, j - 1]:
                    continue
                n = 0
                while i + n + 1 < near.shape[0] and j + n + 1 < near.shape[1] and near[i + n + 1, j + n + 1]:
                    n += 1
                times = [
                    catalog.start_N[rows[a][i]],
                    catalog.end_N[rows[a][i + n]],
                    catalog.start_N[rows[b][j]],
                    catalog.end_N[rows[b][j + n]],
                ]
                found.append(Found(catalog.titles[a], catalog.titles[b], *map(float, times)))
    return found


# ------------------------------------------------------------------------------------------------------------------- scale


def measure_scale(uri: Path, titles: int) -> None:
    """Make an index of many titles, find their repeats; print what was found, seconds and memory."""
    if not uri.exists():
        writer = IndexWriter(str(uri), StorageConfig())
        writer.create(IndexFacts("0123456789ab", "shots", {COLUMN: DIMS}, {}))
        writer.add(made_titles(titles, writer.latest().facts))
        writer.publish()
        print(f"index of {titles} titles made, {writer.size() / 1e9:.2f} GB", flush=True)
    index, begun, processor = open_index(str(uri), StorageConfig()), time.monotonic(), time.process_time()
    catalog = read_catalog(index)
    table = repeats_table(index, *find_runs(index, catalog, 2.0, Console()))
    seconds, processor = time.monotonic() - begun, time.process_time() - processor
    gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    found = collections.Counter(
        abs(int(a[6:]) - int(b[6:])) == 1 for a, b in zip(*(table[f"title_{k}"].to_pylist() for k in "ab"), strict=True)
    )
    shared = len(range(EVERY, titles, EVERY))
    print(f"{titles} titles of {SHOTS} shots: {found[True]} of {shared} shared runs, {found[False]} others")
    print(f"{seconds:.0f} s, {processor:.0f} s of processor time, peak memory {gb:.2f} GB")


def made_titles(titles: int, facts: IndexFacts) -> Iterator[pa.Table]:
    """Yield the rows of titles."""
    world = World(titles * SHOTS, DIMS, 100, 1.0, 0)
    centres_CD = world.centres()
    hubs = centres_CD[:2]
    last: tuple[np.ndarray, np.ndarray] | None = None
    for title in range(titles):
        random = np.random.default_rng([5, title])
        unit_SD = world.members(centres_CD, random.integers(len(centres_CD), size=SHOTS), seed=title + 1)
        seconds_S = random.lognormal(1.2, 0.5, SHOTS)
        unit_SD[[0, 50]] = unit_vectors(hubs + random.normal(0, 0.002, hubs.shape).astype(np.float32))[0]
        if title % EVERY == 0 and last is not None:
            noise_SD = random.normal(0, 0.3 / np.sqrt(DIMS), (SHARED, DIMS)).astype(np.float32)
            unit_SD[70 : 70 + SHARED] = unit_vectors(last[0][20 : 20 + SHARED] + noise_SD)[0]
            seconds_S[70 : 70 + SHARED] = last[1][20 : 20 + SHARED]
        last = unit_SD, seconds_S
        rows, end_S = rows_of(title, {COLUMN: unit_SD}, facts), np.cumsum(seconds_S)
        for name, values in (("start_s", end_S - seconds_S), ("end_s", end_S)):
            rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
        yield rows


if __name__ == "__main__":
    main()
