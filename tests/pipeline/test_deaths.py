"""Titles that end the process that works on them: only they fail, and the job ends."""

import os
import signal

import pyarrow as pa
import pytest
from ray.data._internal.execution.execution_callback import ExecutionCallback

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.pipeline import graph
from mediafm_ray.pipeline.cluster import connected
from mediafm_ray.pipeline.coordination import DeathRegister
from mediafm_ray.pipeline.rows import Stage, plan_table
from mediafm_ray.pipeline.stage_list import Pool, Step
from mediafm_ray.runs.plan import Plan
from mediafm_ray.storage.dataset import Model

DEADLY = ("deadly",)
TITLES = ["a", "deadly", "b", "c", "d"]


class Deadly(Stage):
    """A stage that some titles kill, as memory or native code would."""

    name = "deadly"
    takes = ("title_id",)

    def __init__(self):
        self.done = []

    @property
    def adds(self):
        return {"process": pa.int64()}

    def process(self, row):
        if row.title_id in DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"process": os.getpid()}


class Kept(ExecutionCallback):
    """How many blocks' statistics Ray Data's operators hold, step by step."""

    def __init__(self):
        type(self).numbers = []

    def on_execution_step(self, executor):
        held = [operator._output_blocks_stats for operator in executor._topology if hasattr(operator, "_output_blocks_stats")]
        assert held
        self.numbers.append(sum(map(len, held)))


def plan_of(titles, size=0, duration_s=None):
    row = {"source": "s", "video": "v", "timed_text": [], "synopsis": "", "tags": [], "superseded": []}
    rows = [{"title_id": title, **row, "expected_bytes": size, "expected_s": duration_s} for title in titles]
    return Plan(Model("0" * 12, {}, {"fused": 1}, {}), "", plan_table(rows), len(rows), 0, 0, 0, 0, ())


@pytest.mark.integration
@pytest.mark.parametrize(
    ("titles_per_call", "titles", "size"),
    [
        pytest.param(1, TITLES, 0, marks=pytest.mark.slow),
        pytest.param(3, TITLES, 0, marks=pytest.mark.slow),
        pytest.param(2, [*TITLES, *(f"short-{number}" for number in range(27))], 1, id="groups of four"),
    ],
)
def test_deadly_titles_fail_and_the_others_are_done(titles_per_call, titles, size, monkeypatch):
    monkeypatch.setattr(graph, "GROUPS_PER_PART", 2)  # the plan is large: a first operator divides it
    overrides = [f"resources.encode_video.titles_per_call={titles_per_call}", "resources.max_deaths_per_title=2"]
    config = read_config(EmbedCatalogConfig, [], overrides)
    with connected(config.resources):
        pool = Pool((Step(Deadly, config.resources.encode_video),))
        dataset = graph.embed_titles(plan_of(titles, size), [pool], config.resources.max_deaths_per_title)
        dataset.context.custom_execution_callback_classes.append(Kept)
        blocks = list(graph.blocks(dataset))
    assert sum(Kept.numbers) == 2 * len(blocks)  # of two operators, each held for one step: memory does not grow with titles
    found = {row["title_id"]: row for block in blocks for row in block.to_pylist()}
    assert sorted(found) == sorted(titles)
    assert len(blocks) == (len(titles) / 4 if size else len(titles))
    for title, row in found.items():
        deaths = {measure["name"]: measure["value"] for measure in row["measures"]}.get("process_deaths", 0)
        if title in DEADLY:
            assert row["error"]["stage"] == "deadly"
            assert "2 processes ended" in row["error"]["message"]
            assert "max_deaths_per_title=2" in row["error"]["message"]
            assert deaths == 2
        else:
            assert row["error"] is None, title
            assert row["process"] > 0
            assert deaths <= 1


def test_the_register_counts_processes_that_never_went_on():
    register = DeathRegister()
    assert register.take("p1", "s", ["a", "b"]) == [0, 0]
    assert register.take("p2", "s", ["a"]) == [1]  # p1 ended with it
    assert register.take("p3", "s", ["a", "c"]) == [2, 0]
    assert register.take("p3", "s", ["c"]) == [0]  # p3 lives and went on
    assert register.take("p4", "s", ["a"]) == [2]  # p3 gave it back
    assert register.take("p5", "another stage", ["a"]) == [0]
    assert register.alone_with("s", "a") == 2  # p2 and p4; p1 had another title, too


def test_the_register_does_not_grow_with_titles():
    register = DeathRegister()
    for number in range(1000):
        assert register.take(f"p{number % 4}", "s", [f"title {number}"]) == [0]
    assert len(register.in_hand) == 4
    assert len(register.processes_with) == 4
