"""Titles that end the process that works on them: bounded here, for Ray would give them to the next process for ever.

Every process says which titles it takes in hand before a stage begins. A title that was in hand when ``max_deaths_per_title``
processes ended becomes that title's failure; nothing is asked of processes that end, so it does not matter how they do: killed
for memory, crashed in native code, lost with their node.
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
    """Not even the record of a title's failure could be written without ending the process."""


class GuardedStage(Protocol):
    """The side of a stage that the guard needs to know."""

    name: ClassVar[str]

    def measure(self, name: str, value: float) -> None:
        """Count something of the title at hand."""
        ...


class DeathGuard:
    """Runs stages, and fails the titles that too many processes ended with.

    A run has one; its copies in the actors share its register. Ray ends the register with the last copy, so it has no name by which
    another run could find it while it ends.
    """

    def __init__(self, max_deaths: int):
        self.max_deaths = max_deaths
        self.register: Any = ray.remote(num_cpus=0)(DeathRegister).options(scheduling_strategy=on_this_node()).remote()

    def parts(self, stage: GuardedStage, table: pa.Table) -> Iterator[pa.Table]:
        """The titles at once or, when a process has ended with one of them, each alone; one that too many ended with has its failure.

        A part is in hand until the next one is asked for. Raises TooManyDeaths, which ends the job.
        """
        titles = [TitleRow(table.slice(index, 1)) for index in range(table.num_rows)] if table.num_columns else []
        if not any(self._take(stage, [row.title_id for row in titles])):
            yield table
            return
        for row in titles:
            yield self._judged(stage, row)

    def _judged(self, stage: GuardedStage, row: TitleRow) -> pa.Table:
        (deaths,) = self._take(stage, [row.title_id])
        if deaths > 2 * self.max_deaths:
            raise TooManyDeaths(
                f"title {row.title_id}: {deaths} processes ended at stage {stage.name}, the last ones while its failure was recorded"
            )
        if deaths:
            stage.measure("process_deaths", deaths)
        if deaths < self.max_deaths or row["outcome"] != OK:
            return row.table
        if ray.get(self.register.alone_with.remote(stage.name, row.title_id)) == 1:  # this one: the others may have ended of another title
            return row.table
        reason = (
            f"{deaths} processes ended while stage {stage.name} worked on it (resources.max_deaths_per_title={self.max_deaths}): "
            "does it need more memory than a node has? Ray's logs of the workers say how they ended"
        )
        return failed(row.table, stage.name, TitleError(reason))

    def _take(self, stage: GuardedStage, titles: Sequence[str]) -> list[int]:
        process = ray.get_runtime_context().get_worker_id()
        return ray.get(self.register.take.remote(process, stage.name, titles)) if titles else []
