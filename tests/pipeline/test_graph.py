"""How titles travel through the graph: in the order of the plan, long ones each in a block of its own, few of them at a time."""

import json
import re
import time

import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster

from benchmarks import scale
from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.pipeline import cluster, graph, ray_compat
from mediafm_ray.pipeline.cluster import connected
from mediafm_ray.pipeline.rows import Stage
from mediafm_ray.pipeline.stage_list import Pool, Step
from tests.pipeline.test_deaths import plan_of

TITLES = [f"title-{number:02d}" for number in range(60)]
WAITING = 5


class Quick(Stage):
    """Says when it had a title."""

    name = "quick"
    takes = ("title_id",)

    @property
    def adds(self):
        return {"quick_at": pa.float64()}

    def process(self, row):
        return {"quick_at": time.time()}


class Holder:
    """An actor that holds resources, as another job's does."""

    def well(self):
        return True


class Slow(Quick):
    """Says when it was done with a title, which takes a while."""

    name = "slow"

    @property
    def adds(self):
        return {"slow_at": pa.float64()}

    def process(self, row):
        time.sleep(0.1)
        return {"slow_at": time.time()}


@pytest.mark.parametrize(
    ("size", "duration_s", "titles", "actors", "expected"),
    [
        (0, None, 3, 1, [1, 1, 1]),  # of unknown length
        (1 << 30, 7200.0, 3, 1, [1, 1, 1]),
        (1, 10.0, 192, 1, [12] * 16),  # two minutes
        (8 << 20, None, 64, 1, [4] * 16),  # 32 MB
        (1, None, 256, 1, [32] * 8),
        (1, None, 256, 4, [8] * 32),  # eight for each of four detectors
        (1, None, 20, 1, [2] * 10),
        (1, None, 0, 1, []),
    ],
)
def test_short_titles_travel_in_groups(size, duration_s, titles, actors, expected):
    bounds = list(graph.title_groups(plan_of(map(str, range(titles)), size, duration_s).pending, actors))
    assert [end - start for start, end in bounds] == expected
    assert [position for start, end in bounds for position in range(start, end)] == list(range(titles))


def test_a_long_title_among_short_ones_is_alone():
    pending = pa.concat_tables([plan_of(names, 1, duration_s).pending for names, duration_s in (("ab", 50.0), ("c", 500.0), ("de", 50.0))])
    pending = pa.concat_tables([pending, plan_of(map(str, range(100)), 0).pending])
    assert list(graph.title_groups(pending, 1))[:4] == [(0, 2), (2, 3), (3, 5), (5, 6)]


@pytest.mark.integration
def test_a_quick_stage_does_not_run_far_ahead_of_a_slow_one(monkeypatch):
    monkeypatch.setattr(ray_compat, "MAX_QUEUED_TITLES", WAITING)
    monkeypatch.setattr(graph, "GROUPS_PER_PART", 4)
    config = read_config(EmbedCatalogConfig, [], ["resources.encode_audio.titles_per_call=3"])
    with connected(config.resources):
        pools = [Pool((Step(Quick, config.resources.encode_video),)), Pool((Step(Slow, config.resources.encode_audio),))]
        blocks = list(graph.blocks(graph.embed_titles(plan_of(TITLES), pools, 3)))
    assert [block.num_rows for block in blocks] == [1] * len(TITLES)
    rows = [block.to_pylist()[0] for block in blocks]
    begun = [TITLES.index(row["title_id"]) for row in sorted(rows, key=lambda row: row["quick_at"])]
    assert [position // 4 for position in begun] == [number // 4 for number in range(len(TITLES))]  # within a part Ray may swap two
    moments = [row["quick_at"] for row in rows]
    ahead = [sum((row["quick_at"] <= moment) - (row["slow_at"] <= moment) for row in rows) for moment in moments]
    in_flight = graph.TASKS_IN_FLIGHT_PER_ACTOR * (1 + 3)
    assert WAITING <= max(ahead) <= WAITING + in_flight + 3  # three in a bundle that is being filled


@pytest.mark.slow
def test_a_stage_for_which_another_job_leaves_no_room_is_named_until_it_has_some(monkeypatch):
    monkeypatch.setattr(cluster, "STARVED_S", 4.0)  # a third message would come as long after the room as a process may take to start
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"big": 2}, "object_store_memory": 150 << 20})
    said = []
    try:
        config = read_config(EmbedCatalogConfig, [], [f"resources.ray_address={machines.address}", "resources.encode_audio.num_cpus=1.5"])
        with connected(config.resources):
            holder = ray.remote(Holder).options(num_cpus=1).remote()
            ray.get(holder.well.remote())

            def say(line):
                said.append(line)
                if len(said) == 2:
                    ray.kill(holder)

            pools = [Pool((Step(Quick, config.resources.encode_video),)), Pool((Step(Slow, config.resources.encode_audio),))]
            blocks = list(graph.blocks(graph.embed_titles(plan_of(["one"]), pools, 3), say))
    finally:
        machines.shutdown()
    assert [block["title_id"].to_pylist() for block in blocks] == [["one"]]
    assert len(said) == 2
    for line in said:  # the other stage has its quarter of a CPU, or is done and gave it back
        assert re.match(r"stage slow has waited for resources for 0 min: an actor needs 1.5 CPU, and free are (0.75|1) of 2 CPU", line)


@pytest.mark.slow
def test_titles_are_committed_while_others_are_read_where_actors_hold_every_cpu(tmp_path, monkeypatch, capfd):
    """Ray Data gives tasks what is left when every actor has its share, and none is: what commits titles must not be a task."""
    monkeypatch.setenv("BENCHMARK_NAPS", json.dumps(scale.NAPS))
    monkeypatch.setattr("mediafm_ray.pipeline.cluster.os.cpu_count", lambda: 2)
    catalog = scale.make_catalog(tmp_path, 12, scale.FILM_BYTES)  # Titles that travel alone.
    shares = {"detect_shots": 0.9, "encode_video": 0.3, "encode_audio": 0.3, "encode_text": 0.3, "write": 0.2}  # of two
    pools = ["resources.pools=[detect_shots]"]  # each stage has actors of its own
    pools += [f"resources.{stage}.{given}" for stage, share in shares.items() for given in (f"num_cpus={share}", "max_actors=1")]
    scale.run_job(str(catalog), str(tmp_path / "out"), pools)
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith('{"moments_s"')]
    moments = said[0]["moments_s"]
    assert len(moments) == 12
    assert moments[-1] - moments[0] > 10 * scale.NAPS["detect_shots"]  # one after another, as they are read
