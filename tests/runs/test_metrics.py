"""Metrics as a scraper sees them: on a real Ray's metrics endpoint; and that they cost nothing without one."""

import socket
import time
import urllib.request
from functools import partial

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from mediafm_ray.pipeline.cluster import metric_series
from mediafm_ray.runs.metrics import COUNTER, METRICS, Metrics

REPORT_EVERY_MS = 500
OK = {
    "title_id": "a",
    "outcome": "ok",
    "error": None,
    "shot_count": 4,
    "duration_s": 60.0,
    "bytes_written": 1000,
    "seconds": [{"stage": "detect_shots", "seconds": 2.0}, {"stage": "write", "seconds": 0.5}],
    "measures": [
        {"name": "frames_decoded", "value": 1500.0},
        {"name": "bytes_read", "value": 9000.0},
        {"name": "api_requests", "value": 3.0},
        {"name": "api_retries", "value": 1.0},
        {"name": "text_tokens", "value": 77.0},
    ],
}
FAILED = {
    "title_id": "b",
    "outcome": "failed",
    "error": {"stage": "encode_text", "type": "ApiError", "message": "no"},
    "shot_count": None,
    "duration_s": None,
    "bytes_written": None,
    "seconds": [{"stage": "detect_shots", "seconds": 20.0}],
    "measures": [{"name": "frames_decoded", "value": 500.0}, {"name": "process_deaths", "value": 1.0}],
}


def exported_name(name: str) -> str:
    """The name at the metrics endpoint: of a histogram, the common beginning of its _bucket, _sum and _count."""
    return f"ray_{name}{'_total' if METRICS[name].kind == COUNTER else ''}"


@pytest.fixture(scope="module")
def endpoint():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": REPORT_EVERY_MS},
    )
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()


def scrape(url):
    """Every sample of ours at an endpoint: (name, labels that we set) -> value."""
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_mediafm_"):
                labels = {key: value for key, value in sample.labels.items() if key in ("dataset", "outcome", "stage", "le")}
                found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


@pytest.mark.integration
def test_what_titles_leave_is_at_the_metrics_endpoint(endpoint):
    metrics = Metrics(partial(metric_series, dataset="0123456789ab"))
    metrics.planned(3)
    metrics.title(OK)
    metrics.title(FAILED)
    dataset = ("dataset", "0123456789ab")
    expected = {
        ("ray_mediafm_titles_total", (dataset, ("outcome", "ok"), ("stage", ""))): 1,
        ("ray_mediafm_titles_total", (dataset, ("outcome", "failed"), ("stage", "encode_text"))): 1,
        ("ray_mediafm_titles_planned_total", (dataset,)): 3,
        ("ray_mediafm_shots_total", (dataset,)): 4,
        ("ray_mediafm_video_seconds_total", (dataset,)): 60,
        ("ray_mediafm_bytes_written_total", (dataset,)): 1000,
        ("ray_mediafm_bytes_read_total", (dataset,)): 9000,
        ("ray_mediafm_frames_decoded_total", (dataset,)): 2000,
        ("ray_mediafm_api_requests_total", (dataset,)): 3,
        ("ray_mediafm_api_retries_total", (dataset,)): 1,
        ("ray_mediafm_text_tokens_total", (dataset,)): 77,
        ("ray_mediafm_process_deaths_total", (dataset,)): 1,
        ("ray_mediafm_stage_seconds_total", (dataset, ("stage", "detect_shots"))): 22,
        ("ray_mediafm_stage_seconds_total", (dataset, ("stage", "write"))): 0.5,
        ("ray_mediafm_title_seconds_count", (dataset, ("stage", "detect_shots"))): 2,
        ("ray_mediafm_title_seconds_bucket", (dataset, ("le", "5.0"), ("stage", "detect_shots"))): 1,
    }
    deadline = time.monotonic() + 60
    while not expected.items() <= (found := scrape(endpoint)).items():
        assert time.monotonic() < deadline, {key: (value, found.get(key)) for key, value in expected.items() if found.get(key) != value}
        time.sleep(0.2)
    shown = {name for name, _ in found}
    for name, metric in METRICS.items():
        assert exported_name(name) + ("_count" if metric.kind == "histogram" else "") in shown


@pytest.mark.integration
def test_a_title_costs_the_driver_next_to_nothing(endpoint):
    metrics = Metrics(partial(metric_series, dataset="cost"))
    metrics.title(OK)
    start = time.process_time()
    for _ in range(500):
        metrics.title(OK)
    assert (time.process_time() - start) / 500 < 2e-3


def test_without_a_ray_nothing_is_made():
    metrics = Metrics()
    metrics.title(OK)
    assert metrics.series == {}
