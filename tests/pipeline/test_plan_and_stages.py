"""The plan against a listing, and the writing of titles, over real stores and without Ray."""

import dataclasses
import json
import os
import re
import threading
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import ConfigError, read_config
from mediafm_ray.errors import TitleError
from mediafm_ray.models.tiny import make_contextualiser
from mediafm_ray.pipeline import loop, write_title
from mediafm_ray.pipeline.rows import FLAGS, SHOTS, TitleRow, failed, plan_table, vectors_cell, vectors_type
from mediafm_ray.pipeline.stages import DetectShots, Fuse, metadata_text
from mediafm_ray.pipeline.write_title import WriteTitle
from mediafm_ray.runs.dry_run import describe_cost
from mediafm_ray.runs.plan import BUILTIN_DATASET, describe_model, make_plan, prepare_output
from mediafm_ray.spec import MODALITIES
from mediafm_ray.storage import catalog
from mediafm_ray.storage.dataset import EmbeddingDataset, Output, read_failures, title_facts
from mediafm_ray.storage.names import object_name
from mediafm_ray.storage.store import StorageError, Store
from tests.datasets import kill_after_one_removal
from tests.videos import make_video

SHOT = {
    "start_frame": 0,
    "end_frame": 25,
    "start_s": 0.0,
    "end_s": 1.0,
    "boundary_kind": "start",
    "boundary_probability": 1.0,
    "transition_start_frame": 0,
    "transition_end_frame": 0,
    "dropped_boundaries": 0,
    "text": "",
    "language": "",
    "thumbnail": b"",
    "audio_levels": [-20] * 10,
}


@pytest.fixture
def config(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(name.encode())
    return read_config(EmbedCatalogConfig, [], [f"catalog.uri={tmp_path}/videos", f"output.uri={tmp_path}/out"])


def encoded(row, model, failing=()):
    """A plan's row as it comes out of the encoders: two shots with vectors that the title's id decides."""
    title_id = row["title_id"][0].as_py()
    random = np.random.default_rng(sum(title_id.encode()))
    shots = [SHOT, {**SHOT, "start_frame": 25, "end_frame": 50, "start_s": 1.0, "end_s": 2.0, "boundary_kind": "cut"}]
    row = row.append_column("shots", pa.array([shots], SHOTS))
    row = row.append_column("media", pa.array([json.dumps({"duration_s": 2.0, "frame_count": 50, "warnings": ["odd"], "facts": {}})]))
    for modality in MODALITIES:
        dim = model.dims[modality]
        vectors = vectors_cell(random.normal(size=(2, dim)).astype(np.float32)).cast(vectors_type(dim))
        row = row.append_column(f"{modality}_embeddings", vectors)
        row = row.append_column(f"has_{modality}", pa.array([[True, True]], FLAGS))
    row = row.append_column("metadata_embedding", pa.array([None], pa.list_(pa.float32())))
    if title_id in failing:
        row = failed(row, "detect_shots", TitleError(f"{title_id} is bad"))
    return row


def compute(config, failing=()):
    """Plan and write what is pending; the titles computed and how they ended."""
    plan = make_plan(config)
    prepare_output(plan, config)
    steps = [Fuse(plan.model.dims["fused"], config.fusion), WriteTitle(config.output.uri, plan.model, "", config.storage)]
    ended = {}
    for index in range(plan.pending.num_rows):
        row = encoded(plan.pending.slice(index, 1), plan.model, failing)
        for step in steps:
            row = step(row)
        ended[row["title_id"][0].as_py()] = row["error"][0].as_py()
    return plan, ended


def test_few_calls_lie_between_the_loop_over_titles_and_the_storage(config, monkeypatch):
    """With the three of the driver (main, run, embed) they are ten, so that a traceback can be read."""
    plan = make_plan(config)
    prepare_output(plan, config)
    package, frames = Path(loop.__file__).parents[1], []
    monkeypatch.setattr(Store, "write", lambda *arguments: frames.append([frame.f_code for frame, _ in traceback.walk_stack(None)]))
    stages = [Fuse(plan.model.dims["fused"], config.fusion), WriteTitle(config.output.uri, plan.model, "", config.storage)]
    list(loop.run(encoded(plan.pending.slice(0, 1), plan.model), stages))
    ours = [code.co_qualname for code in frames[0] if Path(code.co_filename).is_relative_to(package)]
    assert len(ours) <= 6, ours  # and Store.write, whose place is taken here


def test_resume_is_the_catalog_minus_the_listing(config, tmp_path):
    plan, ended = compute(config)
    assert ended == {"a": None, "b": None, "c": None}
    assert compute(config)[1] == {}
    dataset = EmbeddingDataset(config.output.uri)
    assert dataset.version == plan.model.dataset_version
    os.unlink(next((tmp_path / "out").rglob("b@*.parquet")))
    assert set(compute(config)[1]) == {"b"}
    (tmp_path / "videos" / "d.mp4").write_bytes(b"new")
    assert set(compute(config)[1]) == {"d"}


def test_a_changed_source_is_computed_anew_and_its_predecessor_removed(config, tmp_path):
    compute(config)
    (before,) = (tmp_path / "out").rglob("a@*.parquet")
    (tmp_path / "videos" / "a.mp4").write_bytes(b"another film")
    assert set(compute(config)[1]) == {"a"}
    (after,) = (tmp_path / "out").rglob("a@*.parquet")
    assert before.name != after.name


def test_what_a_killed_run_did_not_get_to_remove_is_removed_by_the_next(config, tmp_path):
    """Killed between the commit and the removal of the superseded object and of the failure record."""
    compute(config, failing=["a"])
    (record,) = (tmp_path / "out").rglob("failures/*/a@*.json")
    kept = record.read_bytes()
    compute(config)
    (committed,) = (tmp_path / "out").rglob("shots/*/a@*.parquet")
    old = committed.with_name("a@00000000.parquet")
    old.write_bytes(committed.read_bytes())
    contextual = tmp_path / "out" / make_plan(config).model.dataset_version / "contextual-000000000000" / committed.parent.name / old.name
    for path in (contextual, record):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kept)
    for path in (old, contextual, record):
        os.utime(path, (1, 1))
    assert compute(config)[1] == {}
    assert committed.exists()
    assert not any(path.exists() for path in (old, contextual, record))


def test_a_source_that_was_changed_back_is_the_one_that_readers_get(config, tmp_path):
    """B was committed and its job killed before it removed A; then the video became A again."""
    video = tmp_path / "videos" / "a.mp4"
    first, times = video.read_bytes(), (video.stat().st_atime_ns, video.stat().st_mtime_ns)
    compute(config)
    (of_first,) = (tmp_path / "out").rglob("shots/*/a@*.parquet")
    kept = of_first.read_bytes()
    video.write_bytes(b"another film")
    compute(config)
    (of_second,) = (tmp_path / "out").rglob("shots/*/a@*.parquet")
    of_first.write_bytes(kept)
    os.utime(of_first, (1, 1))
    contextual = of_second.parents[2] / "contextual-000000000000" / of_second.parent.name
    contextual.mkdir(parents=True)
    (contextual / of_second.name).write_bytes(b"of the second source only")
    video.write_bytes(first)
    os.utime(video, ns=times)
    plan = make_plan(config)
    assert (plan.pending.num_rows, plan.done) == (0, 3)
    assert make_plan(config).outdone, "a plan changes nothing"
    compute(config)
    dataset = EmbeddingDataset(config.output.uri)
    assert dataset.title_object("a").endswith(of_first.name)
    assert of_first.read_bytes() == kept
    assert not of_second.exists()
    assert not (contextual / of_second.name).exists()
    assert make_plan(config).leftovers == make_plan(config).outdone == ()


@pytest.mark.parametrize("first_ends", [True, False])
def test_two_jobs_that_take_a_title_for_another_source_leave_one_object(config, tmp_path, first_ends):
    """Of both sources an object is there; one job was planned before the video was changed back, the other after that."""
    video = tmp_path / "videos" / "a.mp4"
    sources = {}
    for content, modified in ((b"the first", 1), (b"the second film", 2)):
        video.write_bytes(content)
        os.utime(video, (modified, modified))
        compute(config)
        (path,) = (tmp_path / "out").rglob("shots/*/a@*.parquet")
        sources[path] = path.read_bytes()
    for second, (path, content) in enumerate(sources.items(), 1):
        path.write_bytes(content)
        os.utime(path, (second, second))
    of_second = make_plan(config)
    video.write_bytes(b"the first")
    os.utime(video, (1, 1))
    of_first = make_plan(config)
    plans = [of_first, of_second] if first_ends else [of_second, of_first]
    prepare_output(plans[0], config)
    with nullcontext() if first_ends else pytest.raises(StorageError, match="another job is at work"):
        prepare_output(plans[1], config)
    assert len(list((tmp_path / "out").rglob("shots/*/a@*.parquet"))) == 1
    compute(config)
    assert EmbeddingDataset(config.output.uri).title_object("a").endswith(next(iter(sources)).name)


def test_a_job_that_commits_while_another_takes_the_title_for_the_source_before_leaves_one_object(config, tmp_path, monkeypatch):
    """The video is changed, committed, and changed back before the job has removed what it supersedes."""
    video = tmp_path / "videos" / "a.mp4"
    video.write_bytes(b"the first")
    os.utime(video, (1, 1))
    compute(config)
    (of_first,) = (tmp_path / "out").rglob("shots/*/a@*.parquet")
    os.utime(of_first, (1, 1))
    video.write_bytes(b"the second film")
    real = write_title.remove_superseded

    def late(*arguments):
        video.write_bytes(b"the first")
        os.utime(video, (1, 1))
        prepare_output(make_plan(config), config)
        return real(*arguments)

    monkeypatch.setattr(write_title, "remove_superseded", late)
    assert set(compute(config)[1]) == {"a"}
    assert list((tmp_path / "out").rglob("shots/*/a@*.parquet")) == [of_first]


def test_a_job_killed_while_it_removes_what_is_superseded_leaves_no_shots_without_their_context(config, tmp_path, monkeypatch):
    """Then the video is changed back: its shots would count as done, and nothing would write their context again."""
    compute(config)
    (of_first,) = (tmp_path / "out").rglob("shots/*/a@*.parquet")
    context = of_first.parents[2] / BUILTIN_DATASET / of_first.parent.name / of_first.name
    context.parent.mkdir(parents=True)
    context.write_bytes(b"of the first source")
    video = tmp_path / "videos" / "a.mp4"
    first, times = video.read_bytes(), (video.stat().st_atime_ns, video.stat().st_mtime_ns)
    video.write_bytes(b"another film")
    removed = kill_after_one_removal(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compute(config)
    assert removed
    video.write_bytes(first)
    os.utime(video, ns=times)
    assert make_plan(config).pending["title_id"].to_pylist() == ["a"] or context.exists()


def test_a_failure_record_of_a_night_that_is_over_does_not_stay(config, tmp_path):
    compute(config)
    (committed,) = (tmp_path / "out").rglob("shots/*/a@*.parquet")
    for source in ("ffffffffffffffff", committed.stem.split("@")[1]):
        record = committed.parents[2] / "failures" / committed.parent.name / f"a@{source}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("{}")
        os.utime(record, (2**33, 2**33))
    compute(config)
    assert not list((tmp_path / "out").rglob("failures/*/a@*.json"))
    assert committed.exists()


@pytest.fixture
def forgetful(monkeypatch):
    """A catalog of the files of a folder whose look-ups fail when told to: a name leads to why, and whether that may pass."""
    failing = {}
    real = catalog._read_folder

    def read(store, skipped):
        found = []
        for entry in real(store, skipped):
            reason, passes = failing.get(entry.title.title_id, ("", False))
            source = "0123456789abcdef" if reason else entry.source
            found.append(entry._replace(unknown=reason, is_outage=passes, key=(entry.key[0], source)))
        return found

    monkeypatch.setattr(catalog, "_read_folder", read)
    return failing


def test_a_title_whose_source_cannot_be_looked_at_is_neither_planned_nor_touched(config, tmp_path, forgetful):
    forgetful |= {"c": ("forbidden", False), "b": ("the server answers 503", True)}
    plan, ended = compute(config)
    assert sorted(ended) == ["a", "c"], "nothing is committed: what is wrong with c will show, b waits for its server"
    assert plan.unknown == (("b", "the server answers 503"),)
    forgetful |= {"a": ("forbidden", False), "b": ("", False)}
    (tmp_path / "videos" / "a.mp4").write_bytes(b"changed, perhaps")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("a@*")}
    plan, ended = compute(config)
    assert (sorted(ended), plan.unknown) == (["b"], (("a", "forbidden"),))
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("a@*")} == before
    forgetful.clear()
    assert sorted(compute(config)[1]) == ["a", "c"]


def test_bad_rows_are_failures_of_their_titles_until_they_are_mended(config, tmp_path):
    table = tmp_path / "videos" / "c.jsonl"
    good = [{"title_id": name, "video": f"{name}.mp4"} for name in ("a", "b")]
    table.write_text("\n".join(map(json.dumps, [*good, {"title_id": "bad", "video": 3}])))
    config = dataclasses.replace(config, catalog=dataclasses.replace(config.catalog, uri=str(table), on_error="skip"))
    plan, ended = compute(config)
    assert ended == {"a": None, "b": None}
    (record,) = read_failures(Output(config.output.uri, plan.model.dataset_version))
    assert (record["title_id"], record["stage"]) == ("bad", "catalog")
    assert "line 3 (bad): video must be a string" in record["message"]
    (written,) = (tmp_path / "out").rglob("failures/*/bad@*.json")
    assert object_name("failures", "bad", record["source"]).endswith(written.name)
    table.write_text("\n".join(map(json.dumps, [*good, {"title_id": "bad", "video": "c.mp4"}])))
    assert compute(config)[1] == {"bad": None}
    assert list(read_failures(Output(config.output.uri, plan.model.dataset_version))) == []


def test_a_superseded_object_that_cannot_be_removed_is_a_warning(config):
    plan = make_plan(config)
    stage = WriteTitle(config.output.uri, plan.model, "", config.storage)
    row = Fuse(plan.model.dims["fused"], config.fusion)(encoded(plan.pending.slice(0, 1), plan.model))

    def forbidden(name):
        raise PermissionError("not yours")

    stage.output.store.delete = forbidden
    (result,) = stage(row).to_pylist()
    assert result["error"] is None
    assert any("not yours" in warning for warning in result["warnings"])


def test_titles_of_a_group_are_written_at_once_and_one_that_cannot_be_fails_alone(config):
    plan = make_plan(config)
    stage = WriteTitle(config.output.uri, plan.model, "", config.storage)
    rows = [encoded(plan.pending.slice(index, 1), plan.model) for index in range(plan.pending.num_rows)]
    titles = Fuse(plan.model.dims["fused"], config.fusion)(pa.concat_tables(rows))
    real, all_here, asked = stage.output.store.write, threading.Barrier(titles.num_rows), []

    def write(name, content):
        asked.append(name)
        if name.startswith("shots/"):
            all_here.wait(timeout=30)  # It breaks where one title waits for another.
            if "/b@" in name:
                raise PermissionError("not this one")
        real(name, content)

    stage.output.store.write = write
    done = {row["title_id"]: row for row in stage(titles).to_pylist()}
    assert {title_id: row["outcome"] for title_id, row in done.items()} == {"a": "ok", "b": "failed", "c": "ok"}
    assert "not this one" in done["b"]["error"]["message"]
    assert [name.split("/")[0] for name in asked].count("shots") == 3
    assert {title for title, _ in Output(config.output.uri, plan.model.dataset_version).list("shots")} == {"a", "c"}


def test_a_title_that_lacks_only_contextual_embeddings_is_counted(config, tmp_path):
    compute(config)
    dims = describe_model(config).dims
    make_contextualiser(tmp_path / "checkpoint", fused_dim=dims["fused"], metadata_dim=dims["text"])
    with_checkpoint = dataclasses.replace(
        config, contextualiser=dataclasses.replace(config.contextualiser, checkpoint=str(tmp_path / "checkpoint"))
    )
    plan = make_plan(with_checkpoint)
    assert (plan.pending.num_rows, plan.only_contextual) == (3, 3)


def test_the_api_without_a_key_is_refused_before_anything_starts(config, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    api = dataclasses.replace(config, text=dataclasses.replace(config.text, encoder="openai"))
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        prepare_output(make_plan(api), api)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    prepare_output(make_plan(api), api)


def test_signed_links_leave_no_trace(config, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "_info", lambda *_: None)  # nobody listens there, and a title of a server that is down is not planned
    table = tmp_path / "catalog.jsonl"
    table.write_text(json.dumps({"title_id": "a", "video": "https://user:pass@127.0.0.1:9/a.mp4?X-Amz-Signature=hunter2"}))
    signed = dataclasses.replace(config, catalog=dataclasses.replace(config.catalog, uri=str(table)))
    compute(signed)
    (path,) = (tmp_path / "out").rglob("a@*.parquet")
    content = path.read_bytes()
    assert b"https://127.0.0.1:9/a.mp4" in content
    assert b"hunter2" not in content
    assert b"pass@" not in content


def test_a_changed_source_that_fails_leaves_the_committed_object(config, tmp_path):
    compute(config)
    before = sorted((tmp_path / "out").rglob("*.parquet"))
    (tmp_path / "videos" / "a.mp4").write_bytes(b"broken")
    assert compute(config, failing=["a"])[1]["a"]["message"] == "a is bad"
    assert sorted((tmp_path / "out").rglob("*.parquet")) == before


def test_failures_are_recorded_counted_and_forgotten_after_success(config):
    output = lambda: EmbeddingDataset(config.output.uri).output  # noqa: E731
    compute(config, failing=["b"])
    compute(config, failing=["b"])
    (record,) = read_failures(output())
    assert (record["title_id"], record["attempts"], record["message"]) == ("b", 2, "b is bad")
    passed_over = dataclasses.replace(config, run=dataclasses.replace(config.run, retry_failed=False))
    plan, ended = compute(passed_over)
    assert (ended, plan.failed_before) == ({}, 1)
    assert compute(config)[1] == {"b": None}
    assert list(read_failures(output())) == []


def test_a_full_store_is_the_titles_error(config, tmp_path, monkeypatch):
    plan = make_plan(config)
    stage = WriteTitle(config.output.uri, plan.model, "", config.storage)
    row = Fuse(plan.model.dims["fused"], config.fusion)(encoded(plan.pending.slice(0, 1), plan.model))

    def full(name, content):
        raise OSError(28, "No space left on device")

    stage.output.store.write = full
    error = stage(row)["error"][0].as_py()
    assert error["stage"] == "write"
    assert "No space left on device" in error["message"]
    assert "failure record could not be written" in error["message"]


def test_max_titles_takes_some_and_says_how_many_are_left(config):
    plan = make_plan(dataclasses.replace(config, run=dataclasses.replace(config.run, max_titles=2)))
    assert (plan.pending.num_rows, plan.left) == (2, 1)


def test_a_plan_writes_nothing(config, tmp_path):
    make_plan(config)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_the_text_would_cost(config, tmp_path):
    (tmp_path / "videos" / "a.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello there\n\n2\n00:00:03,000 --> 00:00:04,000\nBye\n")
    (tmp_path / "videos" / "a.json").write_text('{"synopsis": "A film."}')
    local = describe_cost(make_plan(config), config)
    assert "nothing at the embeddings API" in local
    api = dataclasses.replace(config, text=dataclasses.replace(config.text, encoder="openai", price_per_million_tokens=1e6))
    said = describe_cost(make_plan(api), api)
    assert "3 texts" in said
    assert "1 requests" in said
    dollars = float(re.search(r"\$([0-9.]+)", said).group(1))
    assert 3 <= dollars <= len("Hello thereByeA film.")


def test_a_dry_run_survives_text_that_would_end_or_hold_up_the_run(config, tmp_path):
    """Texts are parsed where videos are, in a process under limits: a pipe that nobody writes to, and numbers without end."""
    os.mkfifo(tmp_path / "videos" / "a.srt")
    (tmp_path / "videos" / "b.srt").write_text(f"1\n{'9' * 400}:00:01,000 --> {'9' * 400}:00:02,000\nmuch later\n")
    text = dataclasses.replace(config.text, encoder="openai", price_per_million_tokens=1e6)
    api = dataclasses.replace(config, text=text, media=dataclasses.replace(config.media, no_progress_timeout_s=3.0))
    started = time.monotonic()
    assert "0 texts" in describe_cost(make_plan(api), api)
    assert time.monotonic() - started < 60


def test_a_dry_run_survives_a_server_that_does_not_give_the_text(config):
    paid = dataclasses.replace(config, text=dataclasses.replace(config.text, encoder="openai"))
    plan = make_plan(paid)
    sidecar = {"uri": "http://127.0.0.1:9/a.srt", "language": "", "kind": ""}  # nobody listens there
    pending = plan_table({**row, "timed_text": [sidecar]} for row in plan.pending.to_pylist())
    assert "3 titles would be computed; 0 texts" in describe_cost(dataclasses.replace(plan, pending=pending), paid)


def test_what_is_written_carries_the_facts(config):
    plan, _ = compute(config)
    dataset = EmbeddingDataset(config.output.uri)
    facts = title_facts(dataset.title("a"))
    assert facts["media"]["warnings"] == ["odd"]
    assert facts["spans"] == {name: list(span) for name, span in plan.model.spans.items()}
    assert facts["dims"]["fused"] == sum(plan.model.dims[name] for name in MODALITIES)


@pytest.mark.parametrize(
    "change",
    ["detector.threshold=0.4", "frames.per_shot=4", "fusion.modality_norm=none", "fusion.weights.text=0.3", "timed_text.languages=[en]"],
)
def test_what_changes_the_numbers_changes_the_version(config, change):
    other = read_config(EmbedCatalogConfig, [], [change])
    assert describe_model(other).dataset_version != describe_model(config).dataset_version


@pytest.mark.parametrize(
    "change",
    ["detector.threads=3", "resources.encode_video.max_actors=4", "media.memory_limit_gb=2", "run.max_titles=1", "media.decoder=cpu"],
)
def test_what_does_not_change_the_numbers_does_not(config, change):
    other = read_config(EmbedCatalogConfig, [], [change])
    assert describe_model(other).dataset_version == describe_model(config).dataset_version


def test_pictures_that_a_card_may_have_made_are_a_version_of_their_own(config):
    versions = {
        name: describe_model(read_config(EmbedCatalogConfig, [], [f"media.decoder={name}"])).dataset_version for name in ("cuda", "auto")
    }
    assert versions["cuda"] == versions["auto"] != describe_model(config).dataset_version  # which titles it makes depends on the machine


def test_a_title_is_read_again_when_its_card_is_lost(tmp_path, monkeypatch):
    """The card is FFmpeg's own decoder under another name; it is lost after 100 packets."""
    made = make_video(tmp_path / "a.mp4", [60, 140], size=(160, 96))

    def read(decoder):
        options = read_config(EmbedCatalogConfig, [], ["detector.threads=1", f"media.decoder={decoder}"])
        stage = DetectShots(options.detector, options.frames, options.timed_text, options.media, options.storage)
        try:
            title = {
                "title_id": "a",
                "source": "s",
                "video": str(made.path),
                "timed_text": [],
                "synopsis": "",
                "tags": [],
                "superseded": [],
            }
            return TitleRow(stage(plan_table([title])))
        finally:
            stage.reader.close()

    expected = read("cpu")
    (tmp_path / "sitecustomize.py").write_text(
        "from mediafm_ray.media import card\n"
        "card.DECODERS, decode, seen = {'h264': 'h264'}, card.CardDecoder.decode, []\n"
        "def lose(self, packet):\n"
        "    seen.append(packet)\n"
        "    if len(seen) > 100:\n"
        "        raise card.CardError('the card is lost')\n"
        "    return decode(self, packet)\n"
        "card.CardDecoder.decode = lose\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = read("cuda")
    facts, expected_facts = json.loads(found["media"]), json.loads(expected["media"])
    (told,) = set(facts["warnings"]) - set(expected_facts["warnings"])
    assert "the card is lost" in told
    facts["warnings"].remove(told)
    assert facts == expected_facts
    assert all(found[name] == expected[name] for name in ("shots", "frames", "audio", "error"))


def test_weights_count_by_content_not_by_place(config, tmp_path):
    from mediafm_ray.models import weights

    copy = tmp_path / weights.resolve(config.detector.weights).name
    copy.write_bytes(weights.resolve(config.detector.weights).read_bytes())
    moved = read_config(EmbedCatalogConfig, [], [f"detector.weights={copy}"])
    assert describe_model(moved).dataset_version == describe_model(config).dataset_version
    with copy.open("ab") as stream:
        stream.write(b"x")
    assert describe_model(moved).dataset_version != describe_model(config).dataset_version


def test_a_checkpoint_of_other_dimensions_is_refused_before_anything_starts(config, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text('{"fused_dim": 2304, "metadata_dim": 768}')
    wrong = dataclasses.replace(config, contextualiser=dataclasses.replace(config.contextualiser, checkpoint=str(tmp_path / "checkpoint")))
    with pytest.raises(ConfigError, match="fused_dim is 2304"):
        make_plan(wrong)


@pytest.mark.parametrize(
    ("synopsis", "tags", "text"),
    [("", [], ""), (" A film. ", [], "A film."), ("", ["x", " y"], "x, y"), ("A film.", ["x"], "A film.\nx")],
)
def test_metadata_text(synopsis, tags, text):
    assert metadata_text(synopsis, tags) == text


def test_a_file_whose_name_is_no_unicode_is_a_bad_row(config, tmp_path):
    (tmp_path / "videos" / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"x")
    (tmp_path / "videos" / os.fsdecode(b"caf\xe9.json")).write_bytes(b"[")
    with pytest.raises(catalog.CatalogError, match=r"caf\\udce9\.mp4: title_id has control characters or is not valid Unicode"):
        make_plan(config)
    skipping = dataclasses.replace(config, catalog=dataclasses.replace(config.catalog, on_error="skip"))
    plan = make_plan(skipping)
    prepare_output(plan, skipping)
    assert plan.pending["title_id"].to_pylist() == ["a", "b", "c"]
    records = list(read_failures(Output(config.output.uri, plan.model.dataset_version)))
    assert all("caf\\udce9" in record["title_id"] for record in records)
    assert records
