"""Benchmark of the difference between a clip in context and the same clip alone, by length of the clip.

    python -m benchmarks.clips OUTPUT CHECKPOINT [--clips 50] [--version VERSION]

OUTPUT is that of jobs.embed_catalog, CHECKPOINT a contextualiser's folder. Clips are runs of 1, 2, 4, ... shots at random places of random
titles; a row gives the median cosine between both vectors of a clip and its 5th and 95th percentile. A model without context, or a clip
of a whole title, gives 1.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyarrow as pa

from mediafm_ray.derive.clips import ClipEmbedder
from mediafm_ray.storage.names import SHOTS

SEED = 0


def main() -> None:
    """Draw the clips, embed each in both ways, print a row for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("checkpoint")
    parser.add_argument("--clips", type=int, default=50, help="of each length, at most")
    parser.add_argument("--version", default="", help="dataset version, where the output has several")
    arguments = parser.parse_args()
    embedder = ClipEmbedder(arguments.output, arguments.checkpoint, arguments.version)
    shots = embedder.dataset.dataset(SHOTS).to_table(columns=["title_id", "shot_index", "start_s", "end_s"])
    shots = shots.sort_by([("title_id", "ascending"), ("shot_index", "ascending")])
    titles = shots.group_by("title_id", use_threads=False).aggregate([("start_s", "list"), ("end_s", "list")]).to_pylist()
    times = [(title["title_id"], np.array(title["start_s_list"]), np.array(title["end_s_list"])) for title in titles]
    longest = max(len(start_S) for _, start_S, _ in times)
    print(f"{len(times)} titles, the longest of {longest} shots\n")
    print("shots in the clip   clips   cosine of in context and alone: median (5 % to 95 %)")
    for length in 2 ** np.arange(int(np.log2(longest)) + 1):
        clips = draw(times, int(length), arguments.clips)
        cosines_N = (embedder.clip_embeddings(clips) * embedder.clip_embeddings(clips, context=False)).sum(axis=1)
        low, median, high = np.percentile(cosines_N, [5, 50, 95])
        print(f"{length:>17}   {len(clips):>5}   {median:.3f} ({low:.3f} to {high:.3f})")


def draw(times: list[tuple[str, np.ndarray, np.ndarray]], length: int, count: int) -> pa.Table:
    """Draw at most ``count`` different runs of a number of shots."""
    places = [(title, first) for title, (_, start_S, _) in enumerate(times) for first in range(len(start_S) - length + 1)]
    chosen = np.random.default_rng(SEED).permutation(len(places))[:count]
    rows = []
    for title, first in (places[index] for index in sorted(chosen)):
        title_id, start_S, end_S = times[title]
        rows.append({"title_id": title_id, "start_s": float(start_S[first]), "end_s": float(end_S[first + length - 1])})
    return pa.Table.from_pylist(rows)


if __name__ == "__main__":
    main()
