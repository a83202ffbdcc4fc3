"""Benchmark of the index's half-precision columns for modalities: recall of a search with and without them, on real shots.

    python -m benchmarks.search_columns OUTPUT [--version VERSION]

OUTPUT is that of jobs.embed_catalog. A modality's own vector stands in the fused one, scaled by the norm of the whole, so a query that is
zero elsewhere could be searched in fused vectors: its cosine with a shot is then that of the modality times the modality's share of
the shot. The first row of each modality says how many of a shot's 10 nearest by that modality are found so (recall@10, all shots
that have the modality as queries, themselves left out); the second, how many the column of half precision finds, and what it costs.
"""

from __future__ import annotations

import argparse

import numpy as np

from mediafm_ray.downstream.retrieval import ExactSearch, recall
from mediafm_ray.downstream.similarity import unit_vectors
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage.store import StorageConfig

RESULTS = 10


def main() -> None:
    """Read the fused vectors, search each modality three ways, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--version", default="", help="dataset version, where the output has several")
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.output, arguments.version, StorageConfig())
    shots = dataset.dataset().to_table(columns=["fused_embedding", "fused_norm"])
    fused_SD = dataset.embeddings(shots)
    print(f"{len(fused_SD)} shots\n\n{'searched in':<32}  {f'recall@{RESULTS}':>9}  {'bytes a shot':>12}")
    for modality in MODALITIES:
        start, end = dataset.model.spans[modality]
        own_SD, present_S = unit_vectors(fused_SD[:, start:end])
        own_SD, whole_SD = own_SD[present_S], fused_SD[present_S]
        padded_SD = np.zeros_like(whole_SD)
        padded_SD[:, start:end] = own_SD
        half_SD = own_SD.astype(np.float16)
        say(f"fused vectors, {modality} alone", found(own_SD, padded_SD, whole_SD), 0)
        say(f"{modality}'s own, half precision", found(own_SD, half_SD, half_SD), half_SD.itemsize * (end - start))
    half_SD = fused_SD.astype(np.float16)
    say("fused vectors, half precision", found(fused_SD, half_SD, half_SD), half_SD.itemsize * fused_SD.shape[1])


def say(what: str, reached: float, more_bytes: int) -> None:
    """Print a row of the table."""
    print(f"{what:<32}  {reached:>9.3f}  {more_bytes:>12}")


def found(true_SD: np.ndarray, queries_SE: np.ndarray, searched_SE: np.ndarray) -> float:
    """Return recall@10 of a search for every shot in ``searched_SE`` against ``true_SD``, without the shot itself."""
    rows_QK = np.full((len(true_SD), RESULTS), -1, np.int64)
    cosine_QK = np.full((len(true_SD), RESULTS), -np.inf, np.float32)
    true_QK = np.full((len(true_SD), RESULTS), -np.inf, np.float32)
    for shot in range(len(true_SD)):
        others = np.delete(np.arange(len(true_SD)), shot)
        truth = ExactSearch(true_SD[[shot]], RESULTS)
        truth.add(others, true_SD[others])
        search = ExactSearch(queries_SE[[shot]], RESULTS)
        search.add(others, searched_SE[others])
        rows_QK[shot], true_QK[shot] = search.rows_QK[0], truth.cosine_QK[0]
        cosine_QK[shot] = unit_vectors(true_SD[rows_QK[shot]])[0] @ unit_vectors(true_SD[[shot]])[0][0]
    return recall(rows_QK, cosine_QK, true_QK)


if __name__ == "__main__":
    main()
