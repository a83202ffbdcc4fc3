"""What a run writes and says about addresses with secrets and names with control characters, over a real server and real processes."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pyarrow as pa
import pytest

from mediafm_ray.config.jobs import BackfillCatalogConfig, EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.derive.runner import log_failures
from mediafm_ray.derive.titles import describe_titles
from mediafm_ray.errors import OutageError, TitleError
from mediafm_ray.media.options import MediaConfig
from mediafm_ray.media.source import open_bytes, read_whole
from mediafm_ray.pipeline.rows import TitleRow, error_value, plan_table
from mediafm_ray.pipeline.stages import DetectShots
from mediafm_ray.runs.backfill import Backfill, Missing, describe
from mediafm_ray.runs.command import guarded
from mediafm_ray.runs.hours import Hours
from mediafm_ray.runs.plan import Plan
from mediafm_ray.runs.report import SUMMARY, TITLES_LOG, Console, RunResult, follow, reason_of, summary, write_summary
from mediafm_ray.storage.dataset import Model, Output, record_failure
from mediafm_ray.storage.store import Store
from tests.servers.web import QuietHandler, serving

ROOT = Path(__file__).parents[2]
SECRET = "SeCrEt0123"
SIGNED = f"X-Amz-Credential=AK&X-Amz-Signature={SECRET}"
MODEL = Model("0123456789ab", {}, {"video": 1, "audio": 1, "text": 1, "fused": 3}, {"video": (0, 1), "audio": (1, 2), "text": (2, 3)})


@pytest.fixture(scope="module")
def failing():
    """The address of a server that says what an object is, and then fails to give it; /moved leads to a signed address."""

    class Handler(QuietHandler):
        def do_HEAD(self):
            self.answer(200, 1_000_000)

        def do_GET(self):
            self.answer(503, 0)

        def answer(self, status, length):
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", f"/signed.mp4?{SIGNED}")
                length = 0
            else:
                self.send_response(status)
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(length))
            self.end_headers()

    with serving(Handler) as address:
        yield address.removeprefix("http://")


def addresses(server):
    return [f"http://{server}/a.mp4?{SIGNED}", f"http://user:{SECRET}@{server}/a.mp4", f"http://{server}/moved.mp4"]


def test_a_read_that_fails_says_no_secret(failing, monkeypatch):
    monkeypatch.setattr("mediafm_ray.media.source.READ_PAUSE_S", 0.0)
    for uri in addresses(failing):
        for read in (lambda uri: open_bytes(uri, MediaConfig()).read(10), lambda uri: read_whole(uri, MediaConfig(), 1 << 20)):
            with pytest.raises((TitleError, OutageError), match=r"\.mp4 cannot be read on at byte 0: .*503") as caught:
                read(uri)
            assert SECRET not in str(caught.value)


@pytest.mark.slow  # reading is tried again, with pauses
def test_the_media_stage_and_its_failure_records_hold_no_secret(failing, tmp_path, caplog):
    config = read_config(EmbedCatalogConfig, [], [])
    stage = DetectShots(config.detector, config.frames, config.timed_text, config.media, config.storage)
    try:
        title = {"title_id": "a", "source": "s", "timed_text": [], "synopsis": "", "tags": [], "superseded": []}
        row = TitleRow(stage(plan_table([{**title, "video": f"http://{failing}/a.mp4?{SIGNED}"}])))
        assert "503" in row["error"]["message"]
        assert SECRET not in str(row["error"])
        output = Output(str(tmp_path), MODEL.dataset_version)
        record_failure(output, "failures/a.json", {"title_id": "a"}, row["error"])
        assert SECRET not in output.store.read("failures/a.json").decode()
    finally:
        stage.reader.close()
    assert SECRET not in caplog.text


def test_what_other_libraries_raise_holds_no_secret_as_a_value_and_as_the_end_of_a_run():
    try:
        try:
            raise OSError(f"GET https://user:{SECRET}@host/a?{SIGNED}")
        except OSError as cause:
            raise RuntimeError(f"no: https%3A%2F%2Fhost%2Fa%3FX-Amz-Signature%3D{SECRET}\nFORGED") from cause
    except RuntimeError as error:
        value, reason = error_value("detect_shots", error), reason_of(error)
    assert value["message"] == r"RuntimeError: no: https%3A%2F%2Fhost%2Fa\nFORGED"
    assert "OSError: GET https://host/a" in value["traceback"]
    assert SECRET not in str(value) + reason


def test_logs_of_a_job_are_records_of_a_line_without_secrets():
    code = f"""
import logging, sys
from mediafm_ray.runs.command import run_job
from mediafm_ray.config.jobs import ReportTitleConfig

def job(config):
    log = logging.getLogger("a.library")
    log.warning("retrying %s", "https://user:{SECRET}@host/a?{SIGNED}")
    log.warning("title %s failed", "x\\n2026-01-01 ERROR forged\\x1b[2J\\x9b\\u202e")
    try:
        raise OSError("at https://host/a?{SIGNED}\\n2026-01-01 ERROR forged")
    except OSError:
        log.exception("it failed")
    log.warning("one argument too few: %s %s", "https://host/a?{SIGNED}")
    return 0

sys.exit(run_job("", ReportTitleConfig, job, []))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines, _, report = done.stderr.partition("--- Logging error ---")
    assert SECRET not in lines
    assert "retrying https://host/a" in lines
    assert r"title x\n2026-01-01 ERROR forged\x1b[2J\x9b\u202e failed" in lines
    assert "  OSError: at https://host/a\n  2026-01-01 ERROR forged" in lines
    assert not [line for line in lines.splitlines() if line.startswith("2026-01-01 ERROR forged")]
    assert "TypeError" in report  # logging's own report of a call that is a defect


def test_the_summary_holds_no_secret_of_the_configuration_and_the_configuration_stays(tmp_path):
    given = {
        "catalog.uri": f"https://user:{SECRET}@host/catalog of all.csv?sig=a {SECRET}",
        "output.uri": f"gs://out/put?token={SECRET}",
        "storage.endpoint_url": f"http://user:{SECRET}@host:9000",
        "video.weights": "s3://bucket/weights#sha256=ab",  # to which the endpoint is added
        "contextualiser.checkpoint": f"s3://key:{SECRET}@bucket/checkpoint",
        "text.base_url": f"https://user:{SECRET}@host/v1?key={SECRET}",
        "media.storage_options": f"{{endpoint_url: 'http://user:{SECRET}@host:9000', secret: {SECRET}, anon: true}}",
        "timed_text.languages": f"['https://user:{SECRET}@host']",
    }
    config = read_config(EmbedCatalogConfig, [], [f"{key}={value}" for key, value in given.items()])
    assert config.catalog.uri == given["catalog.uri"]
    assert SECRET in config.video.weights
    plan = Plan(MODEL, "", plan_table([]), titles=0, done=0, failed_before=0, left=0, only_contextual=0, leftovers=())
    before = dataclasses.asdict(config)
    store = Store(str(tmp_path))
    write_summary(store, summary(plan, RunResult(0), 1.0, before))
    written = store.read(SUMMARY).decode()
    assert SECRET not in written
    shown = json.loads(written)["config"]
    assert shown["storage"]["endpoint_url"] == shown["media"]["storage_options"]["endpoint_url"] == "http://host:9000"
    assert shown["video"]["weights"] == "s3://bucket/weights#sha256=ab&endpoint_url=http://host:9000"
    assert before == dataclasses.asdict(config)


@pytest.mark.parametrize(
    "arguments",
    [
        ["catalog.uri=s3://bucket/videos", f"storage.endpoint_url=http://user:{SECRET}@127.0.0.1:1", "output.uri=out", "storage.retries=1"],
        [f"storage.endpoint_url=user:{SECRET}@127.0.0.1:1"],
        [f"catalog.uri=http://user:{SECRET}@127.0.0.1:1/catalog.csv?sig={SECRET}", "output.uri=out", "storage.retries=1"],
        [f"catalog.uri=ftps://user:{SECRET}@host/catalog.csv", "output.uri=out"],
        ["catalog.uri=catalog.csv", "output.uri=out", f"video.weights=https://user:{SECRET}@127.0.0.1:1/weights?sig={SECRET}"],
        ["catalog.uri=wrong.csv", "output.uri=out"],
    ],
    ids=["endpoint", "no endpoint", "catalog", "scheme", "weights", "rows"],
)
def test_a_job_that_cannot_start_says_no_secret(arguments, tmp_path):
    (tmp_path / "catalog.csv").write_text(f"title_id,video\na,https://host/a.mp4?{SIGNED}\n")
    (tmp_path / "wrong.csv").write_text(
        f"title_id,video\na,https://user:{SECRET}@host/a\x7f.mp4?{SIGNED}\na,ssh://u:{SECRET}@h/\x9b\u202e\n"
    )
    credentials = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "none", "AWS_EC2_METADATA_DISABLED": "true"}
    command = [sys.executable, "-m", "jobs.embed_catalog", *arguments]
    environment = {**os.environ, **credentials, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: " in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert not [character for character in done.stdout + done.stderr if not character.isprintable() and character != "\n"]


@pytest.mark.parametrize("debug", ["", "1"])
def test_the_traceback_of_an_unexpected_error_holds_no_secret(debug, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MEDIAFM_DEBUG", debug)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    console = Console(io.StringIO())

    def job():
        try:
            raise OSError(f"GET https://user:{SECRET}@host/a?{SIGNED}")
        except OSError as cause:
            error = RuntimeError(f"at https://host/b?{SIGNED}")
            error.__cause__ = cause
            console.keep("".join(traceback.format_exception(error)), shown=bool(debug))
            raise error from cause

    assert guarded(job) == 2
    console.write_log(Store(str(tmp_path)))
    written = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    said = capsys.readouterr().err
    assert "GET https://host/a" in written
    assert "RuntimeError: at https://host/b; nothing was started" in said
    assert SECRET not in written + said


HOSTILE = "x\x1b]0;owned\x07\x9b\u202e\u2066\x7f\u2028\x0b"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_control_characters_reach_neither_terminal_nor_log_and_ids_stay(log_format, tmp_path):
    title_id = f"{HOSTILE}\n[2/2] ok     forged: 1 shots\r"
    error = {"stage": "detect_shots", "type": "TitleError", "message": f"{HOSTILE}\nforged", "traceback": ""}
    result = {"title_id": title_id, "source": "s", "seconds": [], "measures": [], "shot_count": 1, "duration_s": 1.0, "bytes_written": 1}
    ok = {**result, "outcome": "ok", "warnings": [f"{HOSTILE}\nforged"], "error": None}
    rows = [ok, {**result, "outcome": "failed", "warnings": None, "error": error}]
    stream = io.StringIO()
    console, result = Console(stream, log_format), RunResult(2)
    follow(iter([pa.Table.from_pylist([row]) for row in rows]), result, 0.0, console)
    console.say(f"two\nlines {HOSTILE} \ud800")
    store = Store(str(tmp_path))
    console.write_log(store)
    plan = Plan(MODEL, "", plan_table([]), titles=2, done=0, failed_before=0, left=0, only_contextual=0, leftovers=())
    write_summary(store, summary(plan, result, 1.0, {}))
    for text in (stream.getvalue(), *(store.read(name).decode() for name in ("run.log", TITLES_LOG, SUMMARY))):
        assert not [character for character in text if not character.isprintable() and character != "\n"]
    lines = stream.getvalue().splitlines()
    assert len(lines) == (5 if log_format == "text" else 4)  # of the two titles, the warning, and the text of two lines
    assert not [line for line in lines if line.lstrip().startswith(("forged", "[2/2] ok"))]
    assert len(store.read("run.log").decode().splitlines()) == 5
    records = [json.loads(line) for line in store.read(TITLES_LOG).decode().splitlines()]
    assert [record["title_id"] for record in records] == [title_id, title_id]
    assert json.loads(store.read(SUMMARY))["failures"][0]["title_id"] == title_id
    if log_format == "json":
        assert [json.loads(line)["title_id"] for line in lines if json.loads(line)["event"] == "title"] == [title_id, title_id]


def test_titles_and_reasons_inside_longer_texts_stay_in_their_line():
    stream, forged = io.StringIO(), "x\nforged"
    log_failures([(forged, f"ValueError: {forged} https://host/a?{SIGNED}")], Console(stream))
    row = {"title_id": forged, "duration_s": 1.0, "shots": 1, "scenes": 1, "shots_per_minute": 1.0, "text_share": 0.0, "speech_share": 0.0}
    titles = [{**row, "nearest_title_id": [forged], "nearest_cosine": [1.0], "pooled_embedding": [], "cls_embedding": []}]
    Console(stream).say(describe_titles(pa.Table.from_pylist(titles)))
    pending = plan_table([])
    plan = Plan(MODEL, "", pending, titles=1, done=0, failed_before=0, left=0, only_contextual=0, leftovers=())
    backfill = Backfill(plan, {}, {}, Missing(["x%0Aforged"], ["a"], 1), Hours(pending["title_id"], pa.array([], pa.float64())))
    Console(stream).say(describe(backfill, read_config(BackfillCatalogConfig, [], [])))
    lines = stream.getvalue().splitlines()
    assert sum(r"x\nforged" in line for line in lines) == 3
    assert not [line for line in lines if line.startswith("forged")]
    assert SECRET not in stream.getvalue()
