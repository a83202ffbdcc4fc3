"""What the pages are told of a dataset: the newest objects, made of the same source; failures and damage as lines with a reason."""

import json

import pyarrow.parquet as pq
import pytest

from benchmarks.pages import SOURCE, commit_title
from jobs import report_catalog
from mediafm_ray.config.jobs import ReportCatalogConfig
from mediafm_ray.derive.pages import catalog_content, title_content, title_page_name, titles_to_write, write_title_page
from mediafm_ray.downstream.catalog_pages import catalog_page
from mediafm_ray.runs.command import EXIT_FAILED_TITLES, EXIT_OK, run_job
from mediafm_ray.storage.dataset import EmbeddingDataset, Output
from mediafm_ray.storage.names import FAILURES, SCENES, SHOTS, contextual, derived, object_name
from mediafm_ray.storage.schemas import encode_parquet, read_facts
from mediafm_ray.storage.store import Store

SCENES_NAME, CONTEXTUAL = derived(SCENES, SHOTS, {}), contextual("0123456789ab")


@pytest.fixture
def dataset(tmp_path):
    for seed, title_id in enumerate(("a", "b/é", "x" * 400)):
        commit_title(str(tmp_path / "out"), title_id, 5, seed, warnings=("odd",) if title_id == "a" else ())
    return EmbeddingDataset(str(tmp_path / "out"))


def fail(dataset, title_id, source):
    record = {"title_id": title_id, "source": source, "stage": "detect_shots", "type": "TitleError", "message": "empty", "attempts": 1}
    dataset.output.write(FAILURES, title_id, source, json.dumps(record).encode())


def test_a_title_comes_with_what_was_made_from_its_shots(dataset):
    content = title_content(dataset, "b/é")
    assert list(content.vectors) == ["fused", "contextual", "video", "audio", "text"]
    assert content.scenes["last_shot"].to_pylist() == [4]
    assert content.notes == []


def test_what_was_made_from_an_older_source_is_left_out_and_said(dataset):
    shots = dataset.output.store.read(object_name(SHOTS, "a", SOURCE))
    table = pq.read_table(dataset.output.store.path(object_name(SHOTS, "a", SOURCE)), partitioning=None)
    facts = {**read_facts(table.schema), "source": "newer"}
    dataset.output.write(SHOTS, "a", "newer", encode_parquet(table, facts))
    assert shots != dataset.output.store.read(object_name(SHOTS, "a", "newer"))
    content = title_content(dataset, "a")
    assert content.facts["source"] == "newer"
    assert "contextual" not in content.vectors
    assert content.scenes is None
    assert [("another version" in note) for note in content.notes] == [True, True]
    for name in (SCENES_NAME, CONTEXTUAL):
        dataset.output.store.delete(object_name(name, "a", SOURCE))
    assert title_content(dataset, "a").notes == [
        "No contextual embeddings of this title are stored.",
        "No scenes of this title are stored.",
    ]


def test_a_catalog_has_a_line_for_every_title_whatever_became_of_it(dataset):
    pages = Store(dataset.output.store.uri + "/pages")
    write_title_page(dataset, "b/é", pages)
    fail(dataset, "never", "00")
    fail(dataset, "b/é", "newer")
    fail(dataset, "a", SOURCE)  # of the source that is committed: a later attempt did it
    damaged = object_name(SHOTS, "x" * 400, SOURCE)
    dataset.output.store.write(damaged, dataset.output.store.read(damaged)[:-100])
    lines = {title.title_id: title for title in catalog_content(dataset, "out", pages).titles}
    assert {title.status for title in lines.values()} == {"ok", "failed", "outdated"}
    assert (lines["a"].status, lines["a"].shots, lines["a"].warnings, lines["a"].page) == ("ok", 5, ["odd"], "")
    assert (lines["b/é"].status, lines["b/é"].page) == ("outdated", "titles/b%252F%25C3%25A9.html")
    assert lines["b/é"].picture.startswith(b"\xff\xd8")
    assert lines["never"].status == "failed"
    (broken,) = (title for title in lines.values() if title.title_id.startswith("xxx"))
    assert broken.status == "failed"
    assert damaged in broken.failure["message"]
    assert titles_to_write(dataset, pages) == ["a"]  # The page of "b/é" is newer than its objects, and the third title is damaged.


def test_a_large_catalog_reads_only_new_objects_for_its_page(dataset, monkeypatch):
    pages = Store(dataset.output.store.uri + "/pages")
    monkeypatch.setattr("mediafm_ray.derive.pages.MAX_PICTURES", 0)
    damaged = object_name(SHOTS, "x" * 400, SOURCE)
    dataset.output.store.write(damaged, dataset.output.store.read(damaged)[:-100])
    read, real = [], Output.table
    monkeypatch.setattr(Output, "table", lambda output, name, columns: read.append(name) or real(output, name, columns))

    def listed():
        read.clear()
        return catalog_content(EmbeddingDataset(dataset.output.store.uri.rpartition("/")[0]), "out", pages).titles

    first = listed()
    assert sorted(read) == sorted([damaged, *(object_name(SHOTS, title_id, SOURCE) for title_id in ("a", "b/é"))])
    assert listed() == first
    assert read == [damaged]
    write_title_page(dataset, "a", pages)
    again = object_name(SHOTS, "b/é", SOURCE)
    dataset.output.store.write(again, dataset.output.store.read(again))
    fail(dataset, "b/é", "newer")
    found = {title.title_id: title for title in listed()}
    assert sorted(read) == sorted([damaged, again])
    assert (found["a"].page, found["b/é"].status) == ("titles/a.html", "outdated")
    pages.write("titles.parquet", b"damaged")
    assert {title.title_id: title for title in listed()} == found
    assert len(read) == 3


def test_pages_of_titles_are_written_where_something_has_changed(dataset, tmp_path):
    pages = Store(dataset.output.store.uri + "/pages")
    everything = titles_to_write(dataset, pages)
    assert len(everything) == 3
    for title_id in everything:
        write_title_page(dataset, title_id, pages)
    assert titles_to_write(dataset, pages) == []
    scenes = object_name(SCENES_NAME, "b/é", SOURCE)
    dataset.output.store.write(scenes, dataset.output.store.read(scenes))
    pages.delete(title_page_name("a"))
    assert titles_to_write(dataset, pages) == ["a", "b/é"]
    elsewhere = Store(str(tmp_path / "elsewhere"))  # Another place may have another clock.
    for title_id in everything:
        write_title_page(dataset, title_id, elsewhere)
    assert titles_to_write(dataset, elsewhere) == everything


def test_the_last_run_shown_is_the_last_that_computed_something(dataset):
    root, pages = dataset.output.store.uri.rsplit("/", 1)[0], Store(dataset.output.store.uri + "/pages")
    store = Store(root)

    def run(name, **titles):
        content = json.dumps({"titles": titles, "wall_s": len(name)}).encode()
        for place in (f"runs/{name}/", ""):
            store.write(f"{place}run-summary.json", content)
        return catalog_content(dataset, root, pages).run

    assert run("20260101T000000Z-00000000", ok=0)["titles"] == {"ok": 0}  # no run has computed anything
    assert "idle_runs_since" not in run("20260102T000000Z-00000000", ok=3, failed=1)
    run("20260103T000000Z-00000000", ok=0, failed=0, planned=0)
    store.write("runs/20260104T000000Z-00000000/run-summary.json", b"damaged")
    shown = run("20260105T000000Z-00000000", ok=0, planned=0)
    assert (shown["titles"], shown["idle_runs_since"]) == ({"ok": 3, "failed": 1}, 3)
    assert "3, which found nothing to do" in catalog_page(catalog_content(dataset, root, pages))
    assert run("20260106T000000Z-00000000", ok=0, failed=2)["titles"] == {"ok": 0, "failed": 2}


def test_one_title_without_a_page_does_not_keep_the_others_from_theirs(dataset, capsys):
    arguments = [f"output.uri={dataset.output.store.uri.rsplit('/', 1)[0]}", "report.title_pages=true"]
    assert run_job("", ReportCatalogConfig, report_catalog.main, arguments) == EXIT_OK
    dataset.output.store.write(object_name(CONTEXTUAL, "a", SOURCE), b"damaged")
    dataset.output.store.delete(f"pages/{title_page_name('b/é')}")
    capsys.readouterr()
    assert run_job("", ReportCatalogConfig, report_catalog.main, arguments) == EXIT_FAILED_TITLES
    said = capsys.readouterr().out
    assert "FAILED a: ArrowInvalid" in said
    assert dataset.output.store.info(f"pages/{title_page_name('b/é')}") is not None
