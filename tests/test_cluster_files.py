"""The files that a cluster is made of, checked by those who read them: Ray's launcher and autoscaler, Kubernetes' schemas, our options."""

import json
import os
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.embed_catalog import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.runs.metrics import METRICS
from tests.runs.test_metrics import exported_name

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "conf" / "kubernetes"
KUBERNETES_VERSION = "1.34"
WORK = {"decode", "gpu"}


def documents(file):
    return list(yaml.safe_load_all((KUBERNETES / file).read_text()))


def launcher():
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    return config


def kuberay():
    """What Ray's autoscaler makes of the RayJob's cluster; it validates it by the same schema."""
    (job,) = documents("rayjob.yaml")
    return _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "c", "namespace": "n"}, "spec": job["spec"]["rayClusterSpec"]})


@pytest.mark.parametrize("read", [launcher, kuberay])
def test_the_head_does_no_work_and_workers_scale_from_zero(read):
    config = read()
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert head["max_workers"] == 0
    assert set(types) == WORK
    for node in types.values():
        assert node["min_workers"] == 0
        assert node["max_workers"] >= 1
    assert sum(node["max_workers"] for node in types.values()) <= config["max_workers"]
    assert config["idle_timeout_minutes"] > 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert "decode" not in types["gpu"]["resources"]
    assert "GPU" not in types["decode"]["resources"]


@pytest.mark.parametrize("read", [launcher, kuberay])
def test_the_sizes_fit_the_nodes(read):
    """Every stage's actor fits on one of the nodes, shot detection on decode nodes only, and each node keeps cores for writing."""
    types = read()["available_node_types"]
    resources = read_config(
        EmbedCatalogConfig, [str(ROOT / "conf" / "mediafm.yaml"), str(ROOT / "conf" / "cluster" / "gpu.yaml")], []
    ).resources
    encoders = [resources.encode_video, resources.encode_audio, resources.contextualise]
    assert sum(stage.num_gpus for stage in encoders) == types["gpu"]["resources"]["GPU"]  # one of each shares a GPU
    assert sum(stage.num_cpus for stage in encoders) + 1 <= types["gpu"]["resources"]["CPU"]
    assert {stage.max_actors for stage in encoders} == {types["gpu"]["max_workers"]}
    assert resources.detect_shots.node_resource in types["decode"]["resources"]
    cores = types["decode"]["resources"]["CPU"]
    detectors = cores // resources.detect_shots.num_cpus
    assert resources.detect_shots.max_actors == detectors * types["decode"]["max_workers"]
    assert cores - detectors * resources.detect_shots.num_cpus >= resources.encode_text.num_cpus + resources.write.num_cpus


@pytest.mark.parametrize("file", ["cronjob.yaml", "rayjob.yaml"])
def test_manifests_fit_the_schemas_of_kubernetes(file):
    """Also the pods in the RayJob; of the RayJob's own fields, whose schema is in no package, see the next test."""
    for document in documents(file):
        if document["kind"] != "RayJob":
            kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
            continue
        cluster = document["spec"]["rayClusterSpec"]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            template = group["template"]
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", **template["metadata"]}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
            mounted = {mount["name"] for container in template["spec"]["containers"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}


def test_the_ray_job_has_the_fields_of_its_operator():
    """Names and types as in KubeRay's API (ray.io/v1); that the operator takes it was not tried."""
    (job,) = documents("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = {
        "entrypoint": str,
        "submissionMode": str,
        "backoffLimit": int,
        "submitterConfig": dict,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": dict,
    }
    cluster = {
        "rayVersion": str,
        "authOptions": dict,
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": dict,
        "headGroupSpec": dict,
        "workerGroupSpecs": list,
    }
    group = {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "rayStartParams": dict, "template": dict}
    of_cluster = job["spec"]["rayClusterSpec"]
    for found, known in [(job["spec"], spec), (of_cluster, cluster), *((one, group) for one in of_cluster["workerGroupSpecs"])]:
        assert {name: type(value) for name, value in found.items()}.items() <= known.items()
    for one in [of_cluster["headGroupSpec"], *of_cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in one["rayStartParams"].values())  # the operator takes strings only


def test_ray_is_of_one_version_everywhere():
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    (job,) = documents("rayjob.yaml")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned


@pytest.mark.parametrize("command", ["rayjob.yaml", "cluster.yaml", "submit.py"])
def test_the_commands_that_are_shown_configure_a_job(command):
    """The --config files exist and every key is known."""
    text = {
        "rayjob.yaml": lambda: documents("rayjob.yaml")[0]["spec"]["entrypoint"].replace("/home/ray/mediafm_ray/", ""),
        "cluster.yaml": lambda: re.search(r"-- (python -m jobs.embed_catalog .*)", (ROOT / "cluster.yaml").read_text())[1],
        "submit.py": lambda: re.search(r"^ +(python -m jobs.embed_catalog .*)", (ROOT / "jobs" / "submit.py").read_text(), re.MULTILINE)[1],
    }[command]()
    words = text.split()
    assert words[:3] == ["python", "-m", "jobs.embed_catalog"]
    files = [str(ROOT / word) for word in words if word.endswith(".yaml")]
    config = read_config(EmbedCatalogConfig, files, [word for word in words if "=" in word])
    assert config.output.uri.startswith("s3://")


@pytest.mark.parametrize(
    ("state", "submitted"), [(None, True), ("Complete", True), ("Failed", True), ("Running", False), ("", False), ("Initializing", False)]
)
def test_the_cron_job_submits_unless_the_last_run_is_at_it(tmp_path, state, submitted):
    """Its script, run by a shell, against a kubectl that keeps the one object in a file."""
    cron_job = documents("cronjob.yaml")[-1]
    container = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    kept = tmp_path / "rayjob"
    if state is not None:
        kept.write_text(state)
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f"""#!/bin/sh
case "$1 $2" in
"get rayjob") [ -f {kept} ] || exit 0; case "$*" in *jsonpath*) cat {kept};; *) echo rayjob.ray.io/mediafm-embed;; esac;;
"delete rayjob") rm -f {kept};;
"create --filename") [ ! -f {kept} ] || {{ echo already exists >&2; exit 1; }}; printf New > {kept};;
*) exit 64;;
esac
"""
    )
    kubectl.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([*container["command"], *container["args"]], env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert kept.read_text() == ("New" if submitted else state)


def test_the_dashboard_asks_for_metrics_that_are_there():
    dashboard = json.loads((ROOT / "conf" / "grafana-dashboard.json").read_text())
    exported = {
        exported_name(name) + ending
        for name, metric in METRICS.items()
        for ending in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
    }
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    used = {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)}
    assert used <= exported
    shown = {name for name in METRICS if any(one.startswith(exported_name(name)) for one in used)}
    assert shown == set(METRICS)
    for expression in expressions:  # every label that is asked for is one that the metric has
        for (
            name,
            selector,
        ) in re.findall(r"(ray_mediafm_\w+)\{([^}]*)\}", expression):
            metric = next(METRICS[one] for one in METRICS if name.startswith(exported_name(one)))
            assert set(re.findall(r"(\w+)=", selector)) <= {"dataset", *metric.labels}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


def test_a_submitted_job_takes_along_what_it_needs_and_no_more(tmp_path):
    """As Ray packs a working directory: what .gitignore and conf/cluster/runtime_env.yaml name stays at home."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    excludes = yaml.safe_load((ROOT / "conf" / "cluster" / "runtime_env.yaml").read_text())["excludes"]
    tree = tmp_path / "tree"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    for name in [*filter(None, tracked), ".git/HEAD", ".venv/bin/python", "demo/videos/big.mp4", "build/tiny/weights.bin"]:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        target.write_bytes(source.read_bytes() if source.is_file() else b"x")
    package = tmp_path / "package.zip"
    create_package(str(tree), package, include_gitignore=True, excludes=excludes)
    packed = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    top = {name.split("/")[0] for name in packed}
    assert {"mediafm_ray", "jobs", "conf"} <= top
    assert not top & {".git", ".venv", "demo", "build", "docs", "tests", "benchmarks", "examples"}
    assert package.stat().st_size < 2 << 20, "Ray packs the sources as they are: a video or weights would be larger"
