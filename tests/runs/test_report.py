"""What a person sees: counts that add up, lost titles said aloud, secrets left out."""

import io
import json

import pyarrow as pa
import pytest

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import ConfigError, read_config
from mediafm_ray.pipeline.rows import plan_table
from mediafm_ray.runs.catalog_run import report, run
from mediafm_ray.runs.command import EXIT_ABORTED
from mediafm_ray.runs.plan import Plan
from mediafm_ray.runs.report import SUMMARY, Console, RunResult, follow, reason_of, redacted, summary, summary_table, write_summary
from mediafm_ray.runs.run_log import RunLog
from mediafm_ray.storage.dataset import Model
from mediafm_ray.storage.store import Store

MODEL = Model("0123456789ab", {}, {"video": 1, "audio": 1, "text": 1, "fused": 3}, {"video": (0, 1), "audio": (1, 2), "text": (2, 3)})


def title(title_id, error=None, warnings=()):
    return {
        "title_id": title_id,
        "source": "s",
        "seconds": [{"stage": "detect_shots", "seconds": 2.0}, {"stage": "write", "seconds": 0.5}],
        "measures": [{"name": "frames_decoded", "value": 1500.0}],
        "shot_count": None if error else 4,
        "duration_s": None if error else 60.0,
        "warnings": None if error else list(warnings),
        "bytes_written": None if error else 100,
        "outcome": "failed" if error else "ok",
        "error": {"stage": "detect_shots", "type": "TitleError", "message": error} if error else None,
    }


def test_every_title_has_a_line_and_the_counts_add_up(tmp_path):
    rows = [title("one"), title("two", error="it is empty"), title("three", warnings=["lost 3 frames"])]
    stream = io.StringIO()
    console = Console(stream)
    result = RunResult(4)
    follow(iter([pa.Table.from_pylist([row]) for row in rows]), result, begun=0.0, console=console)
    assert (result.ok, result.failed, result.lost, result.shots, result.video_s) == (2, 1, 1, 8, 120.0)
    assert result.seconds_by_stage == {"detect_shots": 6.0, "write": 1.5}
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("[1/4] ok     one: 4 shots, 60.0 s of video | ")
    assert lines[1].startswith("[2/4] FAILED two: detect_shots: it is empty | ")
    assert lines[3].strip() == "warning: three: lost 3 frames"
    plan = Plan(MODEL, "", plan_table([]), titles=9, done=5, failed_before=0, left=0, only_contextual=0, leftovers=())
    content = summary(plan, result, wall_s=30.0, config={"storage": {"secret_key": "hunter2", "retries": 3}})
    text = summary_table(content, "out/")
    assert "LOST" in text
    assert "two: detect_shots: it is empty" in text
    store = Store(str(tmp_path))
    write_summary(store, content)
    console.write_log(store)
    written = json.loads(store.read(SUMMARY))
    assert written["titles"]["lost"] == 1
    assert written["video_hours_per_hour"] == pytest.approx(4.0)
    assert written["warnings"] == [{"title_id": "three", "warnings": ["lost 3 frames"]}]
    assert "hunter2" not in store.read(SUMMARY).decode()
    assert "[2/4] FAILED two" in store.read("run.log").decode()


def test_an_empty_block_is_no_title():
    result = RunResult(0)
    follow(iter([pa.table({})]), result, begun=0.0, console=Console(io.StringIO()))
    assert (result.finished, result.lost) == (0, 0)


def test_redaction_keeps_what_is_no_secret():
    options = {"secret": "s", "account_key": "k", "headers": {"Authorization": "Bearer x"}, "anon": True}
    config = {
        "text": {"api_key": "k", "max_tokens": 5, "weights": "w", "base_url": "https://user:pass@host/v1", "api_key_variable": "NAME"},
        "media": {"storage_options": options},
    }
    assert redacted(config) == {
        "text": {"api_key": "(redacted)", "max_tokens": 5, "weights": "w", "base_url": "https://host/v1", "api_key_variable": "NAME"},
        "media": {"storage_options": dict.fromkeys(options, "(redacted)") | {"anon": True}},
    }


def test_the_reason_of_an_early_end_is_the_error_that_began_it():
    carried = RuntimeError(
        "Traceback (most recent call last):\n  File x\nmediafm_ray.models.weights.WeightsError: no weights at y\nplease\ncheck"
    )
    assert reason_of(carried) == "RuntimeError: mediafm_ray.models.weights.WeightsError: no weights at y"
    assert reason_of(ValueError("two\nlines")) == "ValueError: two lines"
    assert reason_of(MemoryError()) == "MemoryError: MemoryError()"


def test_a_configuration_fault_in_the_middle_of_a_run_gets_a_summary_and_no_advice_to_repeat_it(tmp_path):
    """Before any title ended it is the command's error; later, what was done is reported all the same."""
    pending = [{"title_id": f"t{number}", "source": "s", "video": "v", "timed_text": [], "superseded": []} for number in range(3)]
    plan = Plan(MODEL, "", plan_table(pending), titles=3, done=0, failed_before=0, left=0, only_contextual=0, leftovers=())

    def work(result, titles):
        follow(iter([pa.Table.from_pylist([row]) for row in titles]), result, begun=0.0, console=Console(io.StringIO()))
        raise ConfigError("stage encode_video: device 'cuda': this process sees 0 CUDA devices")

    with pytest.raises(ConfigError):
        run(plan, Console(io.StringIO()), lambda result: work(result, []))
    stream = io.StringIO()
    console = Console(stream)
    result = run(plan, console, lambda result: work(result, [title("t0")]))
    config = read_config(EmbedCatalogConfig, [], [f"output.uri={tmp_path}"])
    with RunLog(console, Store(str(tmp_path))) as log:
        assert report(plan, result, 1.0, config, console, log) == EXIT_ABORTED
    assert stream.getvalue().splitlines()[-1] == (
        "error: the run ended early, 2 titles not done: stage encode_video: device 'cuda': this process sees 0 CUDA devices"
    )
