"""The names of Ray's internals that the package needs are there, and a run does without them on another version of Ray."""

import re
import tomllib
from pathlib import Path

import pytest
import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.pipeline import graph, ray_compat
from mediafm_ray.pipeline.cluster import connected
from mediafm_ray.pipeline.stage_list import Pool, Step
from tests.pipeline.test_deaths import plan_of
from tests.pipeline.test_graph import Quick

ROOT = Path(__file__).parents[2]
TITLES = ["one", "two", "three"]


class Canary(ExecutionCallback):
    """Reads at every step what ``ray_compat`` reads, without its allowances for a name that is gone."""

    def __init__(self):
        type(self).actors, type(self).gone = [], []

    def on_execution_step(self, executor):
        try:
            for operator, state in executor._topology.items():
                assert state.output_queue.num_blocks >= 0
                if isinstance(operator, ActorPoolMapOperator):
                    operator._output_blocks_stats.clear()
                    pool = operator._actor_pool
                    assert pool.num_running_actors() >= pool.num_restarting_actors()
                    assert operator._ray_remote_args["num_cpus"] > 0
                    self.actors += [actor._actor_id.hex() for actor in [*pool._pending_actors.values(), *pool._running_actors]]
        except (AttributeError, KeyError) as error:
            self.gone.append(repr(error))


@pytest.fixture(scope="module")
def pools():
    config = EmbedCatalogConfig()
    with connected(config.resources):
        yield [Pool((Step(Quick, config.resources.encode_video),))]


def run(pools, say=None, watch=None):
    titles = graph.embed_titles(plan_of(TITLES), pools, 3)
    titles.context.custom_execution_callback_classes = [watch] if watch else []
    return [block["title_id"].to_pylist() for block in graph.blocks(titles, say)]


@pytest.mark.integration
def test_what_is_needed_of_ray_is_there(pools):
    assert sorted(run(pools, watch=Canary)) == [[title] for title in sorted(TITLES)]
    assert not Canary.gone
    found = ray._private.state.actors(Canary.actors[-1])
    assert re.fullmatch(r"[\d.]+", found["Address"]["IPAddress"])


@pytest.mark.integration
def test_another_version_of_ray_is_named_and_the_titles_are_done(pools, monkeypatch):
    monkeypatch.setattr(ray_compat, "IS_TESTED", False)
    monkeypatch.setattr(ray, "__version__", "2.99.0")
    said = []
    assert sorted(run(pools, said.append)) == [[title] for title in sorted(TITLES)]
    (line,) = said
    assert "this is Ray 2.99.0, tested is 2.60; switched off are" in line
    assert "\n" not in line


def test_the_package_asks_for_the_tested_version():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    major, minor = map(int, ray_compat.TESTED.split("."))
    assert f"ray[data,default]>={ray_compat.TESTED},<{major}.{minor + 1}" in declared


def test_only_one_module_reaches_into_ray():
    inside = re.compile(r"ray\._|\._internal|\b(?:executor|operator|pool|actor)\._[a-z]|iter_internal")
    files = [*(ROOT / "mediafm_ray").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    assert [file.name for file in files if inside.search(file.read_text())] == ["ray_compat.py"]
