"""Ray for a job: the cluster that it was submitted to, or one of its own on this machine."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mediafm_ray.config import ConfigError, ResourcesConfig, StageConfig

GB = 10**9
START_TIMEOUT_S = 600  # for the actors of a Ray of our own to load their models
IDLE_WORKER_MS = 60_000  # a task's process takes 2 s of a core to start, and Ray ends it after one idle second
LEAST_CPUS = 2  # logical CPUs of a Ray of our own: on one core the stages still have to take turns
CONFIG_FAULT = re.compile(rf"^{ConfigError.__module__}\.{ConfigError.__name__}: (.+)$", re.MULTILINE)  # at the end of a traceback


@contextmanager
def connected(resources: ResourcesConfig) -> Iterator[None]:
    """Join the configured cluster, or start and stop a Ray of our own, and prepare Ray Data for the graph."""
    address = resources.ray_address or os.environ.get("RAY_ADDRESS", "")
    logging.getLogger("ray").setLevel(logging.ERROR)  # no notes of Ray about itself; its errors still come through
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error, it raises as well
    os.environ.setdefault("RAY_enable_output_error_log_if_still_retry", "0")  # else Ray prints a traceback for every call it repeats
    if address:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    else:
        _have_token()
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave CUDA_VISIBLE_DEVICES alone where no GPU is asked for
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(IDLE_WORKER_MS))
        ray.init(
            address="local",
            num_cpus=max(LEAST_CPUS, os.cpu_count() or 1),
            object_store_memory=int(resources.object_store_gb * GB) or None,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    try:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        if not address:  # actors that still import torch would take the cores from the first titles; a cluster has others, or grows
            context.wait_for_min_actors_s = START_TIMEOUT_S
        context.execution_no_progress_timeout_s = resources.no_progress_timeout_s or -1
        yield
    finally:
        ray.shutdown()


def _have_token() -> None:
    """Ray writes the token of a cluster of its own into the home folder. Where that cannot be written, as in many containers, it is given
    to this process and its children only."""
    if "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # RuntimeError: there is no home at all
        writable = False
    if not writable:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def check_room(resources: ResourcesConfig, pools: dict[str, StageConfig]) -> None:
    """Raise ConfigError when there is no room for the smallest pools: the graph would starve silently.

    Only of a Ray of our own: a cluster may be about to grow.
    """
    if resources.ray_address or os.environ.get("RAY_ADDRESS"):
        return
    available = ray.cluster_resources()
    cpus = sum(pool.min_actors * pool.num_cpus for pool in pools.values())
    gpus = sum(pool.min_actors * pool.num_gpus for pool in pools.values())
    if cpus > available.get("CPU", 0) or gpus > available.get("GPU", 0):
        wanted = ", ".join(f"{name} {pool.min_actors} x {pool.num_cpus:g} CPU {pool.num_gpus:g} GPU" for name, pool in pools.items())
        raise ConfigError(
            f"the stages want {cpus:g} CPUs and {gpus:g} GPUs at least ({wanted}), and Ray has {available.get('CPU', 0):g} and "
            f"{available.get('GPU', 0):g}: "
            "lower resources.*.min_actors, num_cpus or num_gpus"
        )


def configuration_fault(error: BaseException) -> ConfigError | None:
    """Return the ConfigError that an actor raised and Ray carried to the driver, or None where the error began otherwise.

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


def runs_alone() -> bool:
    """Whether the Ray that this process is connected to is one machine: ours, or a cluster of one node."""
    return len(ray.nodes()) == 1


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Where actors belong that hold what the whole job needs: on the node of the driver, with which the job lives and dies."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
