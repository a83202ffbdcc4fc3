"""Prometheus metrics of a run. Ray shows them at the metrics endpoint of each node as ``ray_<name>``.

All are counted on the driver from the rows of finished titles, so that a title counts once, however often Ray repeated parts of it.
No ray here: ``pipeline.cluster.metric_series`` opens the series; without it (a plain loop, a dry run), nothing is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

COUNTER, HISTOGRAM = "counter", "histogram"  # Ray shows a gauge only for some 20 s after it was set.
TITLE_SECONDS = (0.01, 0.1, 1, 5, 15, 60, 300, 900, 3600, 10800)  # From a clip of a second to a film of three hours.


@dataclass(frozen=True)
class Definition:
    """One metric."""

    kind: str
    description: str
    labels: tuple[str, ...] = ()  # Labels in addition to ``dataset``, which all have.


METRICS = {
    "mediafm_titles": Definition(COUNTER, "titles that ended; stage: where a failed one failed", ("outcome", "stage")),
    "mediafm_titles_planned": Definition(COUNTER, "titles that runs set out to do"),
    "mediafm_shots": Definition(COUNTER, "shots of the titles that are committed"),
    "mediafm_video_seconds": Definition(COUNTER, "length of the titles that are committed, in seconds"),
    "mediafm_bytes_written": Definition(COUNTER, "bytes of the objects that were committed"),
    "mediafm_stage_seconds": Definition(COUNTER, "seconds that a stage spent on the titles that ended", ("stage",)),
    # It serves quantiles only: Ray computes the sum of a histogram from the middles of its buckets.
    "mediafm_title_seconds": Definition(HISTOGRAM, "seconds that a stage spent on a title", ("stage",)),
    "mediafm_frames_decoded": Definition(COUNTER, "video frames decoded"),
    "mediafm_bytes_read": Definition(COUNTER, "bytes of the videos that were read"),
    "mediafm_api_requests": Definition(COUNTER, "requests sent to the embeddings API, repeated ones too"),
    "mediafm_api_retries": Definition(COUNTER, "requests to the embeddings API that were sent again after a failure"),
    "mediafm_text_tokens": Definition(COUNTER, "tokens in the requests that the embeddings API answered"),
    "mediafm_process_deaths": Definition(COUNTER, "processes that ended while they worked on a title"),
}


class Metrics:
    """The metrics of one run."""

    def __init__(self, open_series: Callable[[str], Any] | None = None):
        """``open_series`` takes a name of METRICS and returns a series with ``inc`` or ``observe``."""
        self.open_series = open_series
        self.series: dict[str, Any] = {}

    def planned(self, titles: int) -> None:
        """Count the planned titles of a run."""
        self._add("mediafm_titles_planned", titles)

    def title(self, result: Mapping[str, Any]) -> None:
        """Count a title that ended: a row that the last stage returned."""
        if self.open_series is None:
            return
        error = result["error"]
        self._add("mediafm_titles", 1, outcome=result["outcome"], stage="" if error is None else error["stage"])
        self._add("mediafm_shots", result["shot_count"])
        self._add("mediafm_video_seconds", result["duration_s"])
        self._add("mediafm_bytes_written", result["bytes_written"])
        for measure in result.get("measures", ()):
            self._add(f"mediafm_{measure['name']}", measure["value"])
        for spent in result["seconds"]:
            self._add("mediafm_stage_seconds", spent["seconds"], stage=spent["stage"])
            self._series("mediafm_title_seconds").observe(spent["seconds"], tags={"stage": spent["stage"]})

    def _add(self, name: str, amount: float | None, **labels: str) -> None:
        if amount and self.open_series:  # Ray refuses zeros, and a failed title lacks most amounts.
            self._series(name).inc(amount, tags=labels)

    def _series(self, name: str) -> Any:
        if name not in self.series:
            assert self.open_series is not None
            self.series[name] = self.open_series(name)
        return self.series[name]
