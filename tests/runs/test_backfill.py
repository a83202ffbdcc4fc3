"""The plan of a scheduled run over real listings, and the budget of its actors as a plain object, without Ray."""

import dataclasses
import errno
import json
import os
import time

import pyarrow as pa
import pytest

from jobs import backfill_catalog
from mediafm_ray.config.jobs import BackfillCatalogConfig
from mediafm_ray.config.loader import ConfigError, read_config
from mediafm_ray.errors import OutageError, TitleError
from mediafm_ray.models import text_api
from mediafm_ray.models.options import TextEncoderConfig
from mediafm_ray.models.tiny import make_contextualiser
from mediafm_ray.pipeline.coordination import Budget
from mediafm_ray.pipeline.rows import SHOTS, SKIPPED, TitleRow, failed, plan_table
from mediafm_ray.pipeline.stages import DetectShots, EncodeText, Fuse
from mediafm_ray.pipeline.write_title import WriteTitle
from mediafm_ray.runs.backfill import delete_missing, describe, describe_time, last_pace, plan_backfill, summary_part
from mediafm_ray.runs.command import EXIT_FAILED_TITLES, EXIT_OK
from mediafm_ray.runs.hours import HOUR, Hours
from mediafm_ray.runs.limits import Limits
from mediafm_ray.runs.plan import describe_model, prepare_output
from mediafm_ray.runs.report import RunResult, write_summary
from mediafm_ray.storage.catalog import CatalogError, read_catalog
from mediafm_ray.storage.dataset import Output
from mediafm_ray.storage.lease import LeaseHeld, held
from mediafm_ray.storage.names import lease_folder
from mediafm_ray.storage.store import StorageError, Store
from tests.datasets import finished_row, kill_after_one_removal

NAMES = ("a", "b", "c", "d")
BAD = TitleError("it is bad")


@pytest.fixture
def config(tmp_path):
    """A catalog of four files, the last by name the newest."""
    (tmp_path / "videos").mkdir()
    for number, name in enumerate(NAMES):
        put(tmp_path, name, name.encode() * 10, 1e9 + number)
    return read_config(BackfillCatalogConfig, [], [f"catalog.uri={tmp_path}/videos", f"output.uri={tmp_path}/out"])


def put(folder, name, content, modified):
    path = folder / "videos" / f"{name}.mp4"
    path.write_bytes(content)
    os.utime(path, (modified, modified))


def changed(config, **sections):
    """The configuration with fields of its sections replaced."""
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()})


def planned(backfill):
    return backfill.plan.pending["title_id"].to_pylist()


def compute(config, failing=(), now=None, failure=BAD):
    """Plan and write what is pending, each title of a second for every two bytes."""
    backfill = plan_backfill(config, now=now)
    prepare_output(backfill.plan, config)
    model = backfill.plan.model
    steps = [Fuse(model.dims["fused"], config.fusion), WriteTitle(config.output.uri, model, "", config.storage)]
    for index in range(backfill.plan.pending.num_rows):
        row = backfill.plan.pending.slice(index, 1)
        title = TitleRow(row).title()
        row = finished_row(row, model, [25, 25 * (os.path.getsize(title.video) // 2 - 1)])
        row = failed(row, "detect_shots", failure) if title.title_id in failing else row
        for step in steps:
            row = step(row)
    return backfill


def test_a_second_backfill_finds_nothing_to_do(config):
    first = compute(config)
    assert (dict(first.reasons), first.plan.pending.num_rows) == ({"new": 4}, 4)
    second = plan_backfill(config)
    assert (dict(second.reasons), dict(second.passed_over), second.plan.pending.num_rows, second.plan.done) == ({}, {}, 0, 4)
    assert not second.missing.titles


def test_new_changed_failed_and_contextual_titles_are_told_apart(config, tmp_path):
    compute(config, failing=["b"])
    put(tmp_path, "a", b"another film", 2e9)
    put(tmp_path, "e", b"new", 2e9)
    late = time.time() + 2 * HOUR
    backfill = plan_backfill(config, now=late)
    assert dict(backfill.reasons) == {"new": 1, "changed": 1, "failed": 1}
    assert sorted(planned(backfill)) == ["a", "b", "e"]
    dims = describe_model(config).dims
    make_contextualiser(tmp_path / "checkpoint", fused_dim=dims["fused"], metadata_dim=dims["text"])
    with_checkpoint = changed(config, contextualiser={"checkpoint": str(tmp_path / "checkpoint")})
    assert dict(plan_backfill(with_checkpoint, now=late).reasons) == {"new": 1, "changed": 1, "failed": 1, "contextual": 2}


def test_a_failed_source_that_was_replaced_is_a_changed_title(config, tmp_path):
    compute(config, failing=["b"])
    put(tmp_path, "b", b"repaired", 2e9)
    assert dict(plan_backfill(config).reasons) == {"changed": 1}


def test_another_dataset_version_makes_titles_stale_which_is_computed_by_choice_only(config, tmp_path):
    compute(config)
    other = changed(config, frames={"per_shot": 3})
    left_alone = plan_backfill(other)
    assert (dict(left_alone.reasons), dict(left_alone.passed_over)) == ({}, {"stale": 4})
    assert "recompute_stale=true" in describe(left_alone, other)
    put(tmp_path, "a", b"another film", 2e9)
    put(tmp_path, "e", b"new", 2e9)
    assert dict(plan_backfill(other).reasons) == {"new": 1, "changed": 1}
    by_choice = changed(other, backfill={"recompute_stale": True})
    assert dict(plan_backfill(by_choice).reasons) == {"new": 1, "changed": 1, "stale": 3}
    compute(by_choice, failing=["c"])
    assert dict(plan_backfill(by_choice).passed_over) == {"not_due": 1}
    assert dict(plan_backfill(other).passed_over) == {"stale": 1}
    assert plan_backfill(config).plan.done == 3, "the other version keeps what it has"


def test_a_failed_title_waits_twice_as_long_each_time_and_is_given_up(config):
    config = changed(config, backfill={"max_attempts": 3, "retry_delay_hours": 2.0})
    compute(config, failing=["b"])
    for attempt, delay_h in ((1, 2), (2, 4)):
        tried = time.time()
        early = plan_backfill(config, now=tried + (delay_h - 0.1) * HOUR)
        assert (dict(early.reasons), dict(early.passed_over)) == ({}, {"not_due": 1}), attempt
        backfill = compute(config, failing=["b"], now=tried + (delay_h + 0.1) * HOUR)
        assert planned(backfill) == ["b"], attempt
    assert dict(plan_backfill(config, now=time.time() + 1000 * HOUR).passed_over) == {"given_up": 1}
    more = changed(config, backfill={"max_attempts": 4})
    assert dict(plan_backfill(more, now=time.time() + 1000 * HOUR).reasons) == {"failed": 1}
    compute(more, now=time.time() + 1000 * HOUR)
    assert plan_backfill(config).plan.done == 4, "success forgets the failures"


@pytest.mark.parametrize(
    "outage",
    [OutageError("the API is down"), StorageError("s3://b: 503"), OSError(errno.ENOSPC, "no space left"), ConnectionResetError("gone")],
)
def test_an_outage_is_no_attempt_of_the_titles(config, outage):
    """Four nights of an outage, then one with a title that is bad: it has one attempt behind it, and three left."""
    for _ in range(4):
        assert planned(compute(config, failing=["b"], failure=outage)) in (["d", "c", "b", "a"], ["b"])
    assert planned(plan_backfill(config)) == ["b"], "and is due at once"
    compute(config, failing=["b"])
    now = time.time()
    assert dict(plan_backfill(config, now=now).passed_over) == {"not_due": 1}
    compute(config, failing=["b"], failure=outage, now=now + 1000 * HOUR)
    assert dict(plan_backfill(config, now=time.time() + 1000 * HOUR).reasons) == {"failed": 1}


def test_given_up_titles_are_in_the_summary_and_in_the_exit_code(config, tmp_path, capsys):
    config = changed(config, backfill={"max_attempts": 1})
    compute(config, failing=["b"])
    assert backfill_catalog.main(config) == EXIT_FAILED_TITLES
    assert json.loads((tmp_path / "out" / "run-summary.json").read_bytes())["titles"]["given_up"] == 1
    assert "of them given up" in capsys.readouterr().out
    assert backfill_catalog.main(changed(config, run={"max_failed_fraction": 0.5})) == EXIT_OK


def test_a_folder_that_cannot_be_read_deletes_nothing(config, tmp_path, monkeypatch):
    """Titles in a folder whose rights were lost are not gone."""
    compute(config)
    (tmp_path / "videos" / "more").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    (tmp_path / "videos" / "a.mp4").rename(tmp_path / "videos" / "more" / "a.mp4")
    with pytest.raises(StorageError, match="permission denied"):
        backfill_catalog.main(changed(config, backfill={"delete_missing": True, "max_delete_fraction": 1.0}))
    assert len(list((tmp_path / "out").rglob("*.parquet"))) == 4


def test_what_may_be_spent_ends_the_run_and_leaves_the_title():
    budget = Budget(0.0, float("inf"), {"a": 60.0})
    assert budget.take("a") == budget.take("b") == ""
    budget.was_read("b", 30.0)
    budget.give_back("b", "max_cost_usd")
    assert budget.state() == ("max_cost_usd", 1)
    assert budget.video_s == 60.0
    assert budget.take("c") == "max_cost_usd"


def test_with_log_format_json_every_line_is_an_object(config, capsys):
    assert backfill_catalog.main(changed(config, run={"dry_run": True, "log_format": "json"})) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(json.loads(line)["event"] == "message" for line in lines)


@pytest.mark.parametrize(
    "content", ["{", "[1]", "[" * 100_000, '{"title_id": "b", "attempts": -5}', '{"title_id": "b", "attempts": 1e400}', '{"title_id": "b"}']
)
def test_a_failure_record_that_is_none_counts_as_one_attempt(config, tmp_path, content):
    compute(config, failing=["b"])
    (record,) = (tmp_path / "out").rglob("failures/*/b@*.json")
    record.write_text(content)
    assert dict(plan_backfill(config).passed_over) == {"not_due": 1}
    assert dict(plan_backfill(config, now=time.time() + 2 * HOUR).reasons) == {"failed": 1}


@pytest.mark.parametrize("attempts", [1_025, 10**300])
def test_a_title_that_failed_very_often_waits_for_ever_where_it_is_not_given_up(config, tmp_path, attempts):
    compute(config, failing=["b"])
    (record,) = (tmp_path / "out").rglob("failures/*/b@*.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "attempts": attempts}))
    assert dict(plan_backfill(config).passed_over) == {"given_up": 1}
    patient = changed(config, backfill={"max_attempts": 10**301})
    assert dict(plan_backfill(patient, now=time.time() + 1e9 * HOUR).passed_over) == {"not_due": 1}


def test_what_stands_in_place_of_a_failure_record_is_replaced_by_the_next_failure(config, tmp_path):
    compute(config, failing=["b"])
    (record,) = (tmp_path / "out").rglob("failures/*/b@*.json")
    record.write_text('{"title_id": "b", "attempts": "many"}')
    compute(config, failing=["b"], now=time.time() + 2 * HOUR)
    assert json.loads(record.read_text())["attempts"] == 1


def test_the_newest_videos_go_first_or_the_catalogs_order(config, tmp_path):
    assert planned(plan_backfill(config)) == ["d", "c", "b", "a"]
    put(tmp_path, "b", b"x", 3e9)
    assert planned(plan_backfill(config)) == ["b", "d", "c", "a"]
    table = tmp_path / "catalog.csv"
    table.write_text("title_id,video\n" + "".join(f"{name},videos/{name}.mp4\n" for name in "cadb"))
    chosen = changed(config, catalog={"uri": str(table)}, backfill={"order": "catalog"})
    assert planned(plan_backfill(chosen)) == list("cadb")
    assert planned(plan_backfill(changed(chosen, backfill={"max_titles": 2}))) == list("ca")
    assert planned(plan_backfill(changed(chosen, backfill={"order": "newest", "max_titles": 2}))) == list("bd")


def test_what_max_titles_leaves_is_neither_done_nor_failed(config):
    few = changed(config, backfill={"max_titles": 3})
    backfill = compute(few, failing=["c"])
    result = RunResult.of(backfill.plan)
    result.ok, result.failed = 2, 1
    part = summary_part(backfill, result, 60.0, 0, 0.0)
    assert part["ok"] + part["failed"] + part["left"] == part["planned"] == 4
    assert (part["left"], part["lost"], part["ended_by"]) == (1, 0, "max_titles")
    after = plan_backfill(config)
    assert (planned(after), dict(after.passed_over)) == (["a"], {"not_due": 1})


# -------------------------------------------------------------------------------------------------------------- missing


def test_titles_gone_from_the_catalog_are_named_and_stay(config, tmp_path):
    compute(config, failing=["b"])
    for name in ("a", "b"):
        (tmp_path / "videos" / f"{name}.mp4").unlink()
    backfill = plan_backfill(config)
    assert list(backfill.missing.titles) == ["a", "b"]
    assert len(backfill.missing.objects) == 2
    said = describe(backfill, config)
    assert "2 titles, 2 objects" in said
    assert "stay (backfill.delete_missing=true deletes them): a, b" in said
    compute(config)
    assert list((tmp_path / "out").rglob("a@*.parquet"))


def test_titles_gone_are_deleted_by_choice_in_every_dataset_of_the_version_only(config, tmp_path):
    compute(config)
    compute(changed(config, frames={"per_shot": 3}, backfill={"recompute_stale": True}))
    (shots,) = (tmp_path / "out" / describe_model(config).dataset_version).rglob("a@*.parquet")
    contextual = shots.parents[2] / "contextual-0123456789ab" / shots.parent.name / shots.name
    contextual.parent.mkdir(parents=True)
    contextual.write_bytes(shots.read_bytes())
    (tmp_path / "videos" / "a.mp4").unlink()
    wanted = changed(config, backfill={"delete_missing": True, "max_delete_fraction": 0.3})
    backfill = plan_backfill(wanted)
    assert delete_missing(backfill.missing, Output(config.output.uri, backfill.plan.model.dataset_version)) == 2
    assert not shots.exists()
    assert not contextual.exists()
    assert len(list((tmp_path / "out").rglob("*.parquet"))) == 3 + 4
    assert not plan_backfill(wanted).missing.titles


def test_a_job_killed_while_it_deletes_titles_leaves_no_shots_without_their_context(config, tmp_path, monkeypatch):
    compute(config)
    (shots,) = (tmp_path / "out").rglob("shots/*/a@*.parquet")
    contextual = shots.parents[2] / "contextual-0123456789ab" / shots.parent.name / shots.name
    contextual.parent.mkdir(parents=True)
    contextual.write_bytes(shots.read_bytes())
    (tmp_path / "videos" / "a.mp4").unlink()
    missing = plan_backfill(config).missing
    kill_after_one_removal(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        delete_missing(missing, Output(config.output.uri, describe_model(config).dataset_version))
    assert (shots.exists(), contextual.exists()) == (False, True)


def test_a_title_that_came_back_while_titles_gone_were_deleted_stays(config, tmp_path):
    compute(config)
    video = tmp_path / "videos" / "a.mp4"
    video.rename(tmp_path / "a.mp4")
    missing = plan_backfill(config).missing
    (shots,) = (tmp_path / "out").rglob("shots/*/a@*.parquet")
    shots.unlink()
    (tmp_path / "a.mp4").rename(video)
    compute(config)
    assert delete_missing(missing, Output(config.output.uri, describe_model(config).dataset_version)) == 0
    assert plan_backfill(config).plan.done == 4


def test_a_catalog_that_lost_too_many_titles_deletes_nothing(config, tmp_path):
    compute(config)
    for name in ("a", "b"):
        (tmp_path / "videos" / f"{name}.mp4").unlink()
    with pytest.raises(ConfigError, match=r"2 of 4 titles .*max_delete_fraction=0\.4 allows; nothing was started or deleted"):
        backfill_catalog.main(changed(config, backfill={"delete_missing": True, "max_delete_fraction": 0.4}))
    assert len(list((tmp_path / "out").rglob("*.parquet"))) == 4
    for path in (tmp_path / "videos").iterdir():
        path.unlink()
    with pytest.raises(CatalogError, match="no video"):
        backfill_catalog.main(changed(config, backfill={"delete_missing": True, "max_delete_fraction": 1.0}))
    assert len(list((tmp_path / "out").rglob("*.parquet"))) == 4
    assert list(Store(config.output.uri).list("leases")) == []


# ---------------------------------------------------------------------------------------------------------------- hours


def test_hours_come_from_the_catalog_then_from_stored_facts_then_from_bytes(config, tmp_path):
    dry = changed(config, run={"dry_run": True})
    assert "unknown hours" in str(plan_backfill(dry).hours)
    compute(config)  # 10 bytes and 5 s of video each
    put(tmp_path, "a", b"x" * 3600, 2e9)
    put(tmp_path, "e", b"x" * 1800, 2e9)
    hours = plan_backfill(dry).hours
    assert hours.expected_s == pytest.approx({"a": 1800, "e": 900})
    assert hours.estimated == 2
    assert "45.0 min of video (of 2 titles estimated from bytes)" in describe(plan_backfill(dry), dry)
    other = changed(dry, frames={"per_shot": 3}, backfill={"recompute_stale": True})
    hours = plan_backfill(other).hours
    assert hours.expected_s == pytest.approx({"a": 1800, "e": 900, "b": 5, "c": 5, "d": 5})
    assert hours.estimated == 2, "of the stale ones the facts are there"
    table = tmp_path / "catalog.jsonl"
    rows = [{"title_id": name, "video": f"videos/{name}.mp4"} for name in "aef"]
    table.write_text("\n".join(json.dumps(row | ({"duration_s": 7200} if row["title_id"] == "a" else {})) for row in rows))
    tabled = changed(dry, catalog={"uri": str(table)})
    hours = plan_backfill(tabled).hours
    assert hours.expected_s == pytest.approx({"a": 7200, "e": 3600}), "the catalog's own seconds a byte"
    assert "3.0 h of video (of 1 title estimated from bytes, of 1 title unknown)" in str(hours)


@pytest.mark.parametrize("value", ["soon", -1, float("nan"), [3], 10**400])
def test_a_duration_that_is_none_is_a_problem_of_the_catalog(tmp_path, value):
    table = tmp_path / "catalog.jsonl"
    table.write_text(json.dumps({"title_id": "a", "video": "a.mp4", "duration_s": value}))
    with pytest.raises(CatalogError, match=r"line 1 .*duration_s must be a number of seconds"):
        read_catalog(str(table))


def test_durations_of_each_kind_of_table(tmp_path):
    (tmp_path / "c.csv").write_text("title_id,video,duration_s\na,a.mp4,12.5\nb,b.mp4,\n")
    (tmp_path / "c.jsonl").write_text('{"title_id": "a", "video": "a.mp4", "duration_s": 12.5}\n{"title_id": "b", "video": "b.mp4"}')
    pa.parquet.write_table(pa.table({"title_id": ["a", "b"], "video": ["a", "b"], "duration_s": [12.5, None]}), tmp_path / "c.parquet")
    for ending in ("csv", "jsonl", "parquet"):
        assert [entry.duration_s for entry in read_catalog(str(tmp_path / f"c.{ending}"))] == [12.5, None]


def test_the_pace_of_the_last_run_that_did_something_is_carried_on(config):
    store = Store(config.output.uri)
    assert last_pace(store) == 0
    backfill = plan_backfill(config)
    assert "no earlier run" in describe_time(backfill, last_pace(store))
    write_summary(store, {"video_hours": 6.0, "wall_s": 7300.0, "startup_s": 100.0})
    assert last_pace(store) == pytest.approx(3.0)
    part = summary_part(backfill, RunResult.of(backfill.plan), 5.0, 0, last_pace(store))
    write_summary(store, {"video_hours": 0.0, "wall_s": 5.0, "startup_s": 0.0, "backfill": part})
    assert last_pace(store) == pytest.approx(3.0)
    known = dataclasses.replace(backfill, hours=Hours(backfill.hours.title_ids, pa.array([6 * HOUR, None, None, None])))
    assert "about 2.0 h" in describe_time(known, last_pace(store))
    store.write("run-summary.json", b"[]")
    assert last_pace(store) == 0


# --------------------------------------------------------------------------------------------------------------- budget


def test_a_budget_of_hours_ends_with_the_title_that_passes_it():
    budget = Budget(100.0, float("inf"), {"a": 30.0})
    assert budget.take("a") == ""
    assert budget.video_s == 30.0, "what is expected counts until it is known"
    budget.was_read("a", 90.0)
    assert budget.take("b") == ""
    budget.was_read("b", 50.0)
    assert budget.take("c") == "max_video_hours"
    assert budget.take("b") == "", "its actor died: it was begun"
    assert budget.state() == ("max_video_hours", 2)
    assert budget.video_s == 140.0


def test_a_budget_of_time_ends_at_its_time_and_a_title_begun_may_end():
    now = [0.0]
    budget = Budget(0.0, 60.0, {}, clock=lambda: now[0])
    assert budget.take("a") == ""
    now[0] = 59.9
    assert budget.take("b") == ""
    now[0] = 60.0
    assert budget.take("c") == "max_wall_minutes"
    budget.end("something else")
    assert budget.state() == ("max_wall_minutes", 2)


def test_a_title_that_is_not_taken_is_left_without_a_record(config, tmp_path):
    """The real first stage and the real writer, with a budget that is spent."""
    backfill = plan_backfill(config)
    prepare_output(backfill.plan, config)

    class Spent:
        def take(self, title_id):
            return False

        def was_read(self, title_id, duration_s):
            raise AssertionError("nothing was read")

    detect = DetectShots(config.detector, config.frames, config.timed_text, config.media, config.storage, Spent())
    model = backfill.plan.model
    row = detect(backfill.plan.pending.slice(0, 1))
    for modality in ("video", "audio", "text"):
        row = row.append_column(f"has_{modality}", pa.nulls(1)).append_column(f"{modality}_embeddings", pa.nulls(1))
    for step in (Fuse(model.dims["fused"], config.fusion), WriteTitle(config.output.uri, model, "", config.storage)):
        row = step(row)
    assert (row["outcome"][0].as_py(), row["error"][0].as_py()) == (SKIPPED, None)
    assert not list((tmp_path / "out").rglob("failures/*/*"))
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_title_beyond_the_cost_cap_is_skipped_and_ends_the_budget(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    monkeypatch.setattr(text_api, "_load_vocabulary", lambda: None)  # it would be downloaded
    budget = Budget(0.0, float("inf"), {})
    budget.take("a")
    title = {"title_id": "a", "source": "s", "video": "v", "timed_text": [], "synopsis": "a film", "tags": [], "superseded": []}
    row = plan_table([title]).append_column("shots", pa.array([[]], SHOTS))
    options = {"encoder": "openai", "base_url": "http://127.0.0.1:9/v1", "max_cost_usd": 1e-6, "price_per_million_tokens": 1.0}
    row = EncodeText(TextEncoderConfig(**options), budget=budget)(row)
    assert (row["outcome"][0].as_py(), row["error"][0].as_py()) == (SKIPPED, None)
    assert budget.state() == ("max_cost_usd", 0)


# ------------------------------------------------------------------------------------------------------------------ job


def test_a_held_lease_is_one_line_and_nothing_is_read(config, capsys):
    store = Store(config.output.uri)
    missing = changed(config, catalog={"uri": "/nowhere"})
    with (
        held(store, lease_folder(describe_model(config).dataset_version), "the other night's job", 60.0),
        pytest.raises(LeaseHeld, match="the other night's job holds the lease"),
    ):
        backfill_catalog.main(missing)
    assert "nowhere" not in capsys.readouterr().out


def test_a_dry_run_writes_nothing_and_needs_no_lease(config, tmp_path, capsys):
    assert backfill_catalog.main(changed(config, run={"dry_run": True})) == 0
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "new" in said
    assert "this run: 4 titles" in said


def test_nothing_to_do_is_done_without_ray_and_reported(config, tmp_path, monkeypatch):
    compute(config)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert backfill_catalog.main(config) == 0
    summary = json.loads((tmp_path / "out" / "run-summary.json").read_text())
    assert summary["titles"]["skipped"] == 4
    assert summary["backfill"]["planned"] == 0
    first = (tmp_path / "out" / summary["run"] / "run.log").read_bytes()
    assert backfill_catalog.main(config) == 0
    runs = sorted(path.name for path in (tmp_path / "out" / "runs").iterdir())
    assert len(runs) == 2, "a run of its own each"
    assert (tmp_path / "out" / summary["run"] / "run.log").read_bytes() == first
    assert json.loads((tmp_path / "out" / "run-summary.json").read_text())["run"] != summary["run"]
    assert all((tmp_path / "out" / "runs" / run / "run-summary.json").exists() for run in runs)


@pytest.mark.parametrize(
    "override",
    [
        "run.max_titles=3",
        "run.retry_failed=false",
        "backfill.order=oldest",
        "backfill.max_titles=-1",
        "backfill.max_attempts=0",
        "backfill.lease_minutes=0",
        "backfill.max_delete_fraction=2",
    ],
)
def test_options_that_make_no_sense_are_refused(override):
    with pytest.raises(ConfigError, match=override.split("=")[0].split(".")[1]):
        read_config(BackfillCatalogConfig, [], [override])


def test_limits_are_what_the_configuration_says(config):
    class Valid:
        valid = True

        def is_valid(self):
            return self.valid

    lease = Valid()
    made = backfill_catalog.limits(plan_backfill(config), changed(config, backfill={"max_video_hours": 2.0}), 0.0, lease)
    assert isinstance(made, Limits)
    assert (made.max_video_s, made.wall_until, made.interrupted()) == (7200.0, float("inf"), "")
    lease.valid = False
    assert made.interrupted()
    assert (
        backfill_catalog.limits(plan_backfill(config), changed(config, backfill={"max_wall_minutes": 2.0}), 5.0, lease).wall_until == 125.0
    )
