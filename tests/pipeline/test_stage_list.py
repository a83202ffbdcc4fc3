"""The pools of stages, which do not change the results, and the imports of the processes that a run starts."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scale import NoDetection
from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.pipeline.rows import plan_table
from mediafm_ray.pipeline.stage_list import CORES_PER_ACTOR, CORES_PER_DETECTOR, make_pools, recipe_steps
from mediafm_ray.runs.plan import Plan
from mediafm_ray.storage.dataset import Model

CONF = Path(__file__).parents[2] / "conf"


def pools(*overrides, files=(), checkpoint="abc"):
    config = read_config(EmbedCatalogConfig, [str(CONF / file) for file in files], ["output.uri=out", *overrides])
    plan = Plan(Model("0" * 12, {}, {"fused": 1}, {}), checkpoint, plan_table([]), 0, 0, 0, 0, 0, ())
    return make_pools(recipe_steps(plan, config), config.resources)


def names(*overrides, **more):
    return [[step.stage.name for step in pool.steps] for pool in pools(*overrides, **more)]


def test_without_a_gpu_all_but_the_detector_share_a_process():
    everything = ["encode_video", "encode_audio", "encode_text", "fuse", "contextualise", "write"]
    assert names() == [["detect_shots"], everything]
    assert names(checkpoint="") == [["detect_shots"], [name for name in everything if name != "contextualise"]]


def test_what_asks_for_a_gpu_or_for_other_nodes_stands_alone():
    gpu = names(files=["mediafm.yaml", "cluster/gpu.yaml"])
    assert gpu == [["detect_shots"], ["encode_video"], ["encode_audio"], ["encode_text"], ["fuse", "contextualise"], ["write"]]
    decoder = names("resources.encode_text.node_resource=api")
    assert decoder == [["detect_shots"], ["encode_video", "encode_audio"], ["encode_text"], ["fuse", "contextualise", "write"]]


def test_what_stands_in_for_the_detector_has_actors_of_its_own_too():
    config = read_config(EmbedCatalogConfig, [], ["output.uri=out"])
    plan = Plan(Model("0" * 12, {}, {"fused": 1}, {}), "", plan_table([]), 0, 0, 0, 0, 0, ())
    steps = [replace(step, stage=NoDetection, model=None, others=()) if step.detects else step for step in recipe_steps(plan, config)]
    assert len(make_pools(steps, config.resources)[0].steps) == 1


def test_pools_are_what_the_configuration_says():
    chosen = names("resources.pools=[detect_shots+encode_video,encode_text+contextualise+write]")
    assert chosen == [["detect_shots", "encode_video"], ["encode_audio"], ["encode_text", "fuse", "contextualise", "write"]]
    assert names("resources.pools=[encode_text+contextualise]", checkpoint="")[-2:] == [["encode_text"], ["fuse", "write"]]
    each = names("resources.pools=[detect_shots]")
    assert each == [["detect_shots"], ["encode_video"], ["encode_audio"], ["encode_text"], ["fuse", "contextualise"], ["write"]]


def test_a_pool_asks_for_what_its_largest_stage_does():
    _, shared = pools("resources.encode_audio.num_cpus=2", "resources.write.max_actors=3", "resources.encode_text.titles_per_call=4")
    assert (shared.resources.num_cpus, shared.resources.max_actors, shared.resources.titles_per_call) == (2, 3, 4)
    assert [step.model.threads for step in shared.steps if step.model] == [2, 2, 2, 2]
    assert shared.name == "encode_video+encode_audio+encode_text+contextualise+write"


@pytest.mark.parametrize("cores", [1, 2, 8, 64])
def test_actors_and_threads_follow_the_cores_of_the_machine(monkeypatch, cores):
    monkeypatch.setattr("mediafm_ray.pipeline.stage_list.os.cpu_count", lambda: cores)
    detect, shared = pools()
    assert detect.resources.max_actors == max(1, cores // CORES_PER_DETECTOR)
    assert shared.resources.max_actors == max(1, cores // CORES_PER_ACTOR)
    for pool in (detect, shared):
        assert all(1 <= pool.resources.max_actors * step.model.threads <= max(cores, 1) for step in pool.steps if step.model)


def loaded(module, *others):
    """Those of some libraries that a process has loaded after it imported a module."""
    code = f"import sys, {module}; print(*[name for name in {others!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_processes_import_what_they_need_only():
    """A run starts them together, and the first title waits for them."""
    assert not loaded("mediafm_ray.pipeline.coordination", "ray", "numpy", "pyarrow", "pandas", "omegaconf")
    assert loaded("mediafm_ray.models.transnet", "torch", "transformers") == ["torch"]


def test_jobs_do_not_import_models_or_pandas_before_they_need_them():
    jobs = ", ".join(f"jobs.{path.stem}" for path in (CONF.parent / "jobs").glob("[a-z]*.py"))
    assert not loaded(jobs, "torch", "transformers", "pandas", "sklearn", "scipy", "matplotlib", "lance", "s3fs")
