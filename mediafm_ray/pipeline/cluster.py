"""The Ray cluster that a job runs on: the one that it was submitted to, or a local Ray instance."""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.data import DataContext
from ray.util.metrics import Counter, Histogram
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mediafm_ray.config.loader import ConfigError
from mediafm_ray.config.sections import ResourcesConfig
from mediafm_ray.pipeline.stage_list import Pool
from mediafm_ray.runs.metrics import COUNTER, METRICS, TITLE_SECONDS

GB = 10**9
IDLE_WORKER_MS = 60_000  # A process for tasks takes 2 s of a core to start, and by default Ray ends it after one idle second.
STARVED_S = 60.0  # A stage without a working actor for this long is reported with the resources that it waits for.
MAX_SILENCE_S = 3600.0  # The pauses between two such reports double up to this length.
MIN_CPUS = 2  # Logical CPUs of a local Ray instance, also on one core, where the stages have to take turns.
CONFIG_FAULT = re.compile(rf"^{ConfigError.__module__}\.{ConfigError.__name__}: (.+)$", re.MULTILINE)  # The end of a traceback.


@contextmanager
def connected(resources: ResourcesConfig) -> Iterator[None]:
    """Connect to the configured cluster, or start and stop a local Ray instance, and prepare Ray Data for the graph."""
    address = resources.ray_address or os.environ.get("RAY_ADDRESS", "")
    logging.getLogger("ray").setLevel(logging.ERROR)  # Ray's notes about itself are left out, its errors are not.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # What it logs as an error, it raises as well.
    os.environ.setdefault("RAY_enable_output_error_log_if_still_retry", "0")  # Ray would print a traceback for every call that it repeats.
    if address:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    else:
        _have_token()
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray would hide the GPUs from actors that ask for none.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(IDLE_WORKER_MS))
        ray.init(
            address="local",
            num_cpus=max(MIN_CPUS, os.cpu_count() or 1),
            object_store_memory=int(resources.object_store_gb * GB) or None,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    try:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.wait_for_min_actors_s = -1  # The detector begins with the first titles while the encoders are loading.
        context.execution_no_progress_timeout_s = resources.no_progress_timeout_s or -1
        yield
    finally:
        ray.shutdown()


def _have_token() -> None:
    """Give this process and its children a token where Ray cannot write one into the home folder, as in many containers."""
    if "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # A RuntimeError says that there is no home folder.
        writable = False
    if not writable:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def check_room(resources: ResourcesConfig, pools: Sequence[Pool]) -> None:
    """Raise ConfigError where a local Ray instance has no room for the smallest pools: the graph would starve silently.

    A cluster is not checked, because it may be about to grow.
    """
    if resources.ray_address or os.environ.get("RAY_ADDRESS"):
        return
    available = ray.cluster_resources()
    sizes = {pool.name: pool.resources for pool in pools}
    for name, pool in sizes.items():
        if pool.node_resource and pool.node_resource not in available:
            raise ConfigError(f"resources.{name}.node_resource={pool.node_resource}: a local Ray has no such resource; leave it empty")
    cpus = sum(pool.min_actors * pool.num_cpus for pool in sizes.values())
    gpus = sum(pool.min_actors * pool.num_gpus for pool in sizes.values())
    if cpus > available.get("CPU", 0) or gpus > available.get("GPU", 0):
        wanted = ", ".join(f"{name} {pool.min_actors} x {pool.num_cpus:g} CPU {pool.num_gpus:g} GPU" for name, pool in sizes.items())
        raise ConfigError(
            f"the stages want {cpus:g} CPUs and {gpus:g} GPUs at least ({wanted}), and Ray has {available.get('CPU', 0):g} and "
            f"{available.get('GPU', 0):g}: "
            "lower resources.*.min_actors, num_cpus or num_gpus"
        )


def actors_at_once(pools: Sequence[Pool], most: int) -> int:
    """Return the number of actors with which the first pool begins: on a single node as many as fit beside the others, up to ``most``.

    Ray Data adds actors to a pool only while an equal share of the free CPUs is enough for one more, which leaves CPUs idle.
    """
    first, *others = (pool.resources for pool in pools)
    wanted = min(first.max_actors, most) if runs_alone() else 0
    available = ray.cluster_resources()
    for name, each in (("CPU", first.num_cpus), ("GPU", first.num_gpus)):
        if each:
            taken = sum(pool.min_actors * (pool.num_cpus if name == "CPU" else pool.num_gpus) for pool in others)
            wanted = min(wanted, int((available.get(name, 0) - taken) / each + 1e-6))
    return max(first.min_actors, wanted)


def configuration_fault(error: BaseException) -> ConfigError | None:
    """Return the ConfigError of an actor that Ray carried to the driver, or None where the error has another cause.

    Ray keeps the exception of a call as ``cause``, and of a constructor's exception the text of its traceback alone.
    """
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, ray.exceptions.ActorDiedError):
            said = CONFIG_FAULT.findall(str(at)) if at.actor_init_failed else []
            return ConfigError(said[-1]) if said else None
        if isinstance(at, ConfigError) and not isinstance(at, ray.exceptions.RayError):
            return at
        at = getattr(at, "cause", None) or at.__cause__
    return None


class StarvationClock:
    """Timer for reports about a stage that waits for resources: after STARVED_S, then at doubling intervals while it waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.since = self.next = float("inf")

    def is_due(self, waits: bool) -> bool:
        """Note whether the stage waits now; return whether a report is due."""
        now = self.clock()
        if not waits:
            self.since = float("inf")
        elif self.since == float("inf"):
            self.since, self.next = now, now + STARVED_S
        if not waits or now < self.next:
            return False
        self.next = now + min(now - self.since, MAX_SILENCE_S)
        return True

    def describe(self, name: str, wanted: Mapping[str, float]) -> str:
        """Return a report: the resources that the stage waits for, and those that the cluster has."""
        minutes = (self.clock() - self.since) / 60
        return f"{name} has waited for resources for {minutes:.0f} min: {room_for(wanted, ray.nodes(), ray.available_resources())}"


def room_for(wanted: Mapping[str, float], nodes: Iterable[Mapping[str, Any]], free: Mapping[str, float]) -> str:
    """Return the reason why an actor with these resources has no room. ``nodes``: the value of ray.nodes()."""
    sizes = [node["Resources"] for node in nodes if node["Alive"]]
    each = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    if not any(all(size.get(name, 0) >= amount for name, amount in wanted.items()) for size in sizes):
        largest = ", ".join(f"{max((size.get(name, 0) for size in sizes), default=0):g} {name}" for name in wanted)
        return (
            f"an actor needs {each}, and no node of the cluster has that (at most {largest} on one): "
            "unless the cluster is growing, lower what the stage asks for (resources.*)"
        )
    there = ", ".join(f"{free.get(name, 0):g} of {sum(size.get(name, 0) for size in sizes):g} {name}" for name in wanted)
    return f"an actor needs {each}, and free are {there}: other jobs or stages hold the rest (see ray status)"


def metric_series(name: str, dataset: str) -> Counter | Histogram:
    """Open a series of METRICS at the metrics endpoint of this node, labelled with the dataset version."""
    metric = METRICS[name]
    labels = ("dataset", *metric.labels)
    made: Counter | Histogram
    if metric.kind == COUNTER:
        made = Counter(name, metric.description, labels)
    else:
        made = Histogram(name, metric.description, list(TITLE_SECONDS), labels)
    made.set_default_tags({"dataset": dataset})
    return made


def runs_alone() -> bool:
    """Return whether the connected Ray cluster has one node."""
    return len(ray.nodes()) == 1


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy of actors that the whole job needs: the node of the driver, without which the job ends anyway."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
