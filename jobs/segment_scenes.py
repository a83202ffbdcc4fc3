"""Group the shots of committed titles into scenes. No video is opened and no model is loaded.

    mediafm scenes output.uri=embeddings/
    mediafm scenes output.uri=embeddings/ vectors.kind=fused

Writes scenes-<fused|contextual>-<options>/ beside the shots: first and last shot, times and score of each scene (the docstring of
mediafm_ray/downstream/scenes.py explains the method and the score). Committed titles are skipped: to finish a killed run, run the same
command again.
Exit code 0: success; 1: more titles failed than run.max_failed_fraction allows; 2: a bad configuration or dataset, nothing was started;
3: the run ended before all titles were done.
"""

from __future__ import annotations

import sys

from mediafm_ray.config.jobs import SegmentScenesConfig
from mediafm_ray.derive.reader import vectors_dataset
from mediafm_ray.derive.runner import derive_titles, finish, make_derived_plan
from mediafm_ray.derive.scenes import scenes_dataset, segment_title
from mediafm_ray.runs.command import run_job, working
from mediafm_ray.runs.report import Console
from mediafm_ray.runs.stored import open_dataset


def main(config: SegmentScenesConfig) -> int:
    """Plan, segment the pending titles, report."""
    console = Console()
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    vectors = vectors_dataset(dataset, config.vectors)
    plan = make_derived_plan(dataset, scenes_dataset(vectors, config.scenes), config.run)
    console.say(plan.describe(vectors))
    with working():
        tally = derive_titles(plan, lambda title: segment_title(dataset, vectors, title, config.scenes), config.run, console)
        return finish(plan, tally, "scene", config.run, console)


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", SegmentScenesConfig, main))
