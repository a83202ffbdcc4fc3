"""Poison-title guard: fails titles that end the process that works on them, which Ray would otherwise repeat without limit.

Every process registers the titles that it begins before a stage runs. A title on which ``max_deaths_per_title`` processes ended
fails. The processes need to do nothing when they end, so that the cause does not matter: killed for memory, crashed in native code,
lost with their node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import ray

from mediafm_ray.errors import TitleError
from mediafm_ray.pipeline.cluster import on_this_node
from mediafm_ray.pipeline.coordination import DeathRegister
from mediafm_ray.pipeline.rows import OK, TitleRow, failed


class TooManyDeaths(RuntimeError):
    """Even recording the failure of a title ends the process."""


class GuardedStage(Protocol):
    """The part of a stage that the guard uses."""

    name: ClassVar[str]

    def measure(self, name: str, value: float) -> None:
        """Add to a measure of the title that is being processed."""
        ...


class DeathGuard:
    """Guard of a run; its copies in the actors share one register.

    Ray ends the register with the last copy. It has no name, by which another run could find it while it is ending.
    """

    def __init__(self, max_deaths: int):
        self.max_deaths = max_deaths
        self.register: Any = ray.remote(num_cpus=0)(DeathRegister).options(scheduling_strategy=on_this_node()).remote()

    def parts(self, stage: GuardedStage, table: pa.Table) -> Iterator[pa.Table]:
        """Yield all titles at once or, where a process has ended on one of them, each alone, with its failure where too many have.

        A part counts as being processed until the next one is requested. Raises TooManyDeaths, which ends the job.
        """
        if not any(self._take(stage, table["title_id"].to_pylist() if table.num_columns else [])):
            yield table
            return
        for index in range(table.num_rows):
            yield self._judged(stage, table.slice(index, 1))

    def _judged(self, stage: GuardedStage, title: pa.Table) -> pa.Table:
        row = TitleRow(title)
        (deaths,) = self._take(stage, [row.title_id])
        if deaths > 2 * self.max_deaths:
            raise TooManyDeaths(
                f"title {row.title_id}: {deaths} processes ended at stage {stage.name}, the last ones while its failure was recorded"
            )
        if deaths:
            stage.measure("process_deaths", deaths)
        if deaths < self.max_deaths or row["outcome"] != OK:
            return title
        if ray.get(self.register.alone_with.remote(stage.name, row.title_id)) == 1:  # The others may have ended on another title.
            return title
        reason = (
            f"{deaths} processes ended while stage {stage.name} worked on it (resources.max_deaths_per_title={self.max_deaths}): "
            "does it need more memory than a node has? Ray's logs of the workers say how they ended"
        )
        return failed(title, stage.name, TitleError(reason))

    def _take(self, stage: GuardedStage, titles: Sequence[str]) -> list[int]:
        process = ray.get_runtime_context().get_worker_id()
        return ray.get(self.register.take.remote(process, stage.name, titles)) if titles else []
