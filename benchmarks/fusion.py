"""Benchmark of fusion in retrieval: the influence of each modality on a shot's nearest neighbours.

    python -m benchmarks.fusion OUTPUT [--version V]

OUTPUT was written by jobs.embed_catalog, with any profile. The encoders' own vectors are recovered from it, fused again with each
``fusion.modality_norm``, and compared: the norms of the encoders, the share of each modality in a fused vector's squared norm, and the
overlap of a shot's nearest neighbours in the fused space with those of a single modality. Neighbours are other
titles' shots, and only shots that have the modality count.
"""

from __future__ import annotations

import argparse

import numpy as np

from mediafm_ray.models.fusion import fuse
from mediafm_ray.models.options import MODALITY_NORMS, FusionConfig
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage.dataset import EmbeddingDataset

NEIGHBOURS = 10


def main() -> None:
    """Read the vectors, fuse them in each way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="output of jobs.embed_catalog")
    parser.add_argument("--version", help="dataset version, where there are several")
    options = parser.parse_args()
    dataset = EmbeddingDataset(options.output, options.version)
    shots = dataset.dataset().to_table()
    titles_S = np.unique(shots["title_id"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    parts = {modality: dataset.embeddings(shots, modality) for modality in MODALITIES}
    present = {modality: np.asarray(shots[f"has_{modality}"]) for modality in MODALITIES}
    print(f"{len(shots)} shots of {titles_S.max() + 1} titles; present: {', '.join(f'{m} {present[m].mean():.0%}' for m in MODALITIES)}")
    print("norms of the encoders (median): " + ", ".join(f"{m} {np.median(_norms(parts[m][present[m]])):.2f}" for m in MODALITIES))
    print(f"\n{'modality_norm':<14}{'modality':<10}{'squared norm':>14}{f'overlap of {NEIGHBOURS} neighbours':>28}{'by chance':>12}")
    for name in MODALITY_NORMS:
        fused_SD, _ = fuse(parts, FusionConfig(modality_norm=name))
        for modality in MODALITIES:
            start, end = dataset.model.spans[modality]
            kept = present[modality]
            overlap, chance = _overlap(fused_SD[kept], parts[modality][kept], titles_S[kept])
            share = np.mean(_norms(fused_SD[kept, start:end]) ** 2)
            print(f"{name:<14}{modality:<10}{share:>14.1%}{overlap:>28.1%}{chance:>12.1%}")


def _overlap(one_SD: np.ndarray, other_SD: np.ndarray, titles_S: np.ndarray) -> tuple[float, float]:
    """Return the mean share of a shot's nearest neighbours that two spaces have in common, and that of random neighbours."""
    if len(titles_S) <= NEIGHBOURS:
        return float("nan"), float("nan")
    nearest = [_neighbours(vectors_SD, titles_S) for vectors_SD in (one_SD, other_SD)]
    common_S = [len(np.intersect1d(one, other)) for one, other in zip(*nearest, strict=True)]
    others_S = (titles_S[:, None] != titles_S[None]).sum(1)
    return float(np.mean(common_S) / NEIGHBOURS), float(np.mean(NEIGHBOURS / np.maximum(others_S, NEIGHBOURS)))


def _neighbours(vectors_SD: np.ndarray, titles_S: np.ndarray) -> np.ndarray:
    """Return (S, NEIGHBOURS), the shots of other titles with the largest cosine."""
    unit_SD = vectors_SD / np.maximum(_norms(vectors_SD), 1e-12)[:, None]
    cosine_SS = unit_SD @ unit_SD.T
    cosine_SS[titles_S[:, None] == titles_S[None]] = -np.inf
    return np.argpartition(-cosine_SS, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]


def _norms(vectors_SD: np.ndarray) -> np.ndarray:
    return np.linalg.norm(vectors_SD, axis=1)


if __name__ == "__main__":
    main()
