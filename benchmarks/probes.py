"""Benchmark of probes on labels from names of titles: shots of films of one kind.

    python -m benchmarks.probes OUTPUT --label animated=bbb,sintel,chrome --label speech=atul,friday [key=value ...]

OUTPUT is what jobs.embed_catalog wrote. Every shot is a clip; it has a label where its title's name begins with one of the words. The first
word of a title's name is taken for its film, whose titles are held out together (labels.group). What else stands there goes to
jobs.evaluate_probes, such as contextualiser.checkpoint=ADDRESS; without one, contextual inputs are left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.scenes import film_of
from jobs import evaluate_probes
from mediafm_ray.config.jobs import EvaluateProbesConfig
from mediafm_ray.runs.command import run_job
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage.dataset import EmbeddingDataset


def main() -> int:
    """Label the shots and run the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="output of jobs.embed_catalog")
    parser.add_argument("--version", help="dataset version, where there are several")
    parser.add_argument("--label", action="append", required=True, help="NAME=WORD,WORD,...")
    parser.add_argument("--only", default="", help="take only titles whose id begins so")
    parser.add_argument("overrides", nargs="*", help="key=value of jobs.evaluate_probes")
    options = parser.parse_intermixed_args()
    words = {name: tuple(found.split(",")) for name, _, found in (label.partition("=") for label in options.label)}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "labels.parquet"
        pq.write_table(label_shots(EmbeddingDataset(options.output, options.version), words, options.only), table)
        given = any(override.startswith("contextualiser.checkpoint=") for override in options.overrides)
        inputs = [] if given else [f"labels.inputs=[{','.join([*MODALITIES, 'fused'])}]"]
        version = [f"dataset.version={options.version}"] if options.version else []
        keys = [f"output.uri={options.output}", f"labels.uri={table}", "labels.group=film", *version, *inputs, *options.overrides]
        return run_job(__doc__ or "", EvaluateProbesConfig, evaluate_probes.main, keys)


def label_shots(dataset: EmbeddingDataset, words: dict[str, tuple[str, ...]], only: str) -> pa.Table:
    """Return a clip for each shot of the titles whose ids begin with ``only``, with its film and labels."""
    shots = dataset.dataset().to_table(columns=["title_id", "start_s", "end_s"])
    shots = shots.filter(pc.starts_with(shots["title_id"], only))
    titles = shots["title_id"].to_pylist()
    shots = shots.append_column("film", pa.array([film_of(title) for title in titles]))
    for name, beginnings in words.items():
        shots = shots.append_column(name, pa.array([title.startswith(beginnings) for title in titles]))
    return shots


if __name__ == "__main__":
    sys.exit(main())
