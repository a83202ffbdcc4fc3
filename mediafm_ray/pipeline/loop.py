"""The same stages in a plain loop, one title after the other in one process: for debugging, tests, and as the measure of Ray's overhead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from mediafm_ray.config import EmbedCatalogConfig
from mediafm_ray.pipeline import stages
from mediafm_ray.pipeline.plan import Plan
from mediafm_ray.pipeline.rows import Stage
from mediafm_ray.pipeline.stages import with_threads


def build_stages(plan: Plan, config: EmbedCatalogConfig) -> list[Stage]:
    """Every stage of the graph, with its models loaded, in order."""
    resources = config.resources
    found: list[Stage] = [
        stages.DetectShots(
            with_threads(config.detector, resources.detect_shots), config.frames, config.timed_text, config.media, config.storage
        ),
        stages.EncodeVideo(with_threads(config.video, resources.encode_video)),
        stages.EncodeAudio(with_threads(config.audio, resources.encode_audio)),
        stages.EncodeText(with_threads(config.text, resources.encode_text)),
        stages.Fuse(plan.model.dims["fused"], config.fusion),
    ]
    if plan.checkpoint:
        contextualiser = with_threads(config.contextualiser, resources.contextualise)
        found.append(stages.Contextualise(contextualiser, plan.model.dims["fused"]))
    return [*found, stages.WriteTitle(config.output.uri, plan.model, plan.checkpoint, config.storage)]


def run(pending: pa.Table, steps: Sequence[Stage]) -> Iterator[pa.Table]:
    """Each pending title through every stage; the rows that the last one leaves."""
    for index in range(pending.num_rows):
        title = pending.slice(index, 1)
        for stage in steps:
            title = stage(title)
        yield title
