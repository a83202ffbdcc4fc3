"""Searching an index of shots, as a user runs the jobs, on made titles whose neighbours are known."""

import numpy as np
import pytest

from mediafm_ray.config.jobs import ContextualiseCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.downstream.clips import pool_clip
from mediafm_ray.models.tiny import make_contextualiser
from mediafm_ray.pipeline.contextualise_stored import ContextualiseStored
from mediafm_ray.runs.stored import make_stored_plan
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.names import contextual
from mediafm_ray.storage.schemas import embedding_values
from tests.searchable import PARTS, SHOT_S, TITLES, build, commit, expected, found, search, vectors_of


@pytest.fixture
def output(tmp_path):
    for title_id, count in TITLES.items():
        commit(tmp_path / "out", title_id, count)
    return tmp_path / "out"


@pytest.mark.parametrize("by", ["all", "video", "audio", "text"])
def test_shots_like_a_shot_are_those_of_a_search_by_hand(output, tmp_path, capsys, by):
    index = tmp_path / "index"
    assert build(output, index) == 0
    part = PARTS.get(by, slice(None))
    query = vectors_of("film", 12)[4, part]
    places, cosines = expected(query, part, without=[("film", 4)])
    got, values = found(capsys, index, "shot=film:4", f"by={by}", "count=20")
    assert got == places[:20]
    np.testing.assert_allclose(values, cosines[:20], atol=1e-3)
    elsewhere = [place for place in places if place[0] != "film"]
    assert found(capsys, index, "shot=film:4", f"by={by}", "filter.other_titles=true", "count=5")[0] == elsewhere[:5]
    assert found(capsys, index, "shot=film:4", f"by={by}", "index.exact=true")[0] == places[:10]


def test_shots_like_a_clip_are_near_its_pooled_vector(output, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(output, index) == 0
    end = SHOT_S * np.arange(1, 13)
    pooled = pool_clip(end - SHOT_S, end, vectors_of("film", 12), 3.0, 9.5)  # half of shot 1, 2, 3, most of 4
    places, cosines = expected(pooled, without=[("film", shot) for shot in (1, 2, 3, 4)])
    got, values = found(capsys, index, "clip=film:3-9.5", "count=12")
    assert got == places[:12]
    np.testing.assert_allclose(values, cosines[:12], atol=1e-3)


def test_titles_with_any_characters_can_be_asked_for(output, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(output, index) == 0
    for title_id in ("series/s01e01", "it's: ☃"):
        query = vectors_of(title_id, TITLES[title_id])[2]
        places, _ = expected(query, without=[(title_id, 2)])
        assert found(capsys, index, f"shot={title_id}:2")[0] == places[:10]
    places, _ = expected(vectors_of("film", 12)[0], titles={"it's: ☃": 5})
    assert found(capsys, index, "shot=film:0", 'filter.titles=["it\'s: ☃"]')[0] == places


def test_filters_keep_titles_times_and_languages(output, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(output, index) == 0
    places, _ = expected(vectors_of("film", 12)[0], without=[("film", 0)])
    for overrides, holds in (
        (["filter.titles=[film,series/s01e02]"], lambda title_id, shot: title_id in ("film", "series/s01e02")),
        (["filter.without_titles=[film]"], lambda title_id, shot: title_id != "film"),
        (["filter.start_s=5", "filter.end_s=8"], lambda title_id, shot: shot in (2, 3)),
        (["filter.languages=[en]"], lambda title_id, shot: shot % 4 in (0, 2)),
        (["filter.languages=[de]", "filter.titles=[film]"], lambda title_id, shot: shot % 4 == 3 and title_id == "film"),
        (["filter.languages=[fr]"], lambda title_id, shot: False),
        (["filter.min_length_s=2"], lambda title_id, shot: True),
        (["filter.min_length_s=2.01"], lambda title_id, shot: False),
    ):
        assert found(capsys, index, "shot=film:0", "count=50", *overrides)[0] == [place for place in places if holds(*place)], overrides
    assert search(index, "shot=film:0", "filter.languages=[fr]") == 0
    assert "no shot was found" in capsys.readouterr().out


def test_a_table_for_people(output, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(output, index) == 0
    capsys.readouterr()
    assert search(index, "shot=film:4", "count=3") == 0
    printed = capsys.readouterr().out.splitlines()
    assert "shot=film:4, by=all, in 34 shots (fused vectors of dataset version 0123456789ab, parts: video, audio, text)" in printed[0]
    (title_id, shot), cosine = (one[0] for one in expected(vectors_of("film", 12)[4], without=[("film", 4)]))
    assert printed[3].split()[0] == f"{cosine:.3f}"
    assert title_id in printed[3]
    assert f"{shot * SHOT_S:.2f}" in printed[3]
    assert len(printed) == 6


def test_what_a_catalog_says_does_not_reach_the_terminal_raw(tmp_path, capsys):
    hostile = "evil\x1b[31m\ntitle"
    commit(tmp_path / "out", hostile, 5)
    commit(tmp_path / "out", "film", 5)
    assert build(tmp_path / "out", tmp_path / "index") == 0
    assert search(tmp_path / "index", "shot=film:0") == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "evil?[31m title" in printed


def test_contextual_vectors_are_searched_with_the_parts_of_the_fused(output, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    make_contextualiser(checkpoint, fused_dim=48, metadata_dim=16, initializer_range=0.2)
    config = read_config(ContextualiseCatalogConfig, [], [f"output.uri={output}", f"contextualiser.checkpoint={checkpoint}"])
    plan = make_stored_plan(config)
    stage = ContextualiseStored(config.contextualiser, str(output), plan.model, plan.checkpoint, config.storage)
    assert [table["error"][0].as_py() for table in stage(plan.pending)] == [None] * len(TITLES)
    index = tmp_path / "index"
    assert build(output, index, "vectors.kind=contextual") == 0
    dataset = EmbeddingDataset(str(output))
    stored = {
        title_id: embedding_values(dataset.title(title_id, contextual(plan.checkpoint))["contextual_embedding"]) for title_id in TITLES
    }
    query = stored["film"][4]
    cosines = {
        (title_id, shot): float(vector @ query / np.linalg.norm(vector) / np.linalg.norm(query))
        for title_id, vectors in stored.items()
        for shot, vector in enumerate(vectors)
        if (title_id, shot) != ("film", 4)
    }
    got, values = found(capsys, index, "shot=film:4", "count=33")
    np.testing.assert_allclose(values, sorted(cosines.values(), reverse=True), atol=1e-3)
    np.testing.assert_allclose(values, [cosines[place] for place in got], atol=1e-3)
    part = PARTS["audio"]
    assert (
        found(capsys, index, "shot=film:4", "by=audio")[0] == expected(vectors_of("film", 12)[4, part], part, without=[("film", 4)])[0][:10]
    )
    assert search(index, "shot=film:4", "index.vectors=fused") == 2
    assert f"has no fused vectors: it holds contextual-{plan.checkpoint} of dataset version" in capsys.readouterr().err
    assert build(output, index) == 2
    assert "is another index: it holds contextual-" in capsys.readouterr().err


def test_what_cannot_be_searched_is_said(output, tmp_path, capsys):
    index = tmp_path / "index"
    assert build(output, index, "index.parts=[text]") == 0
    for overrides, reason in (
        ([], "one of shot=TITLE:INDEX, clip=TITLE:START-END and query=WORDS is required; none is given"),
        (["shot=film:1", "clip=film:1-2"], "given are shot and clip"),
        (["shot=film"], "expected TITLE:INDEX"),
        (["shot=flim:3"], "the index has no title 'flim'; similar: film"),
        (["shot=xyzzy:3"], "the index has no title 'xyzzy'; there are 4 others"),
        (["shot=film:12"], "'film' has no shot 12: it has 12, from 0 to 11"),
        (["shot=film:1", "by=text"], "shot 1 of 'film' has no text vector"),
        (["shot=film:1", "by=video"], "the index has no video vectors, there are: all, text; build it with index.parts"),
        (["shot=film:1", "by=smell"], "by must be one of all, video, audio, text"),
        (["clip=film:5-3"], "the clip [5, 3) s is empty"),
        (["clip=film:90-99"], "is outside the title, which is [0, 24) s"),
        (["clip=film:soon"], "expected TITLE:START-END in seconds"),
        (
            ["shot=film:1", "filter.titles=[series/s01e1]"],
            "filter.titles: the index has no title 'series/s01e1'; similar: series/s01e01",
        ),
        (["shot=film:1", "filter.start_s=9", "filter.end_s=3"], "filter.end_s (3) must be greater than start_s (9)"),
        (["query=hello", "filter.other_titles=true"], "the index does not record the encoder of its text vectors"),
        (["query=hello", "by=all"], "words are compared with the text of shots"),
        (["query=hello", "by=audio"], "the index has no audio vectors, there are: all, text"),
        (["shot=film:1", "index.version=ffffffffffff"], "is of dataset version 0123456789ab, not ffffffffffff"),
        (["shot=film:1", "index.uri="], "index.uri is required"),
        (["shot=film:1", f"index.uri={tmp_path}/nowhere"], "has no index of shots; there is nothing: run mediafm index"),
        (["shot=film:1", f"index.uri={output}"], "has no index of shots; there is: 0123456789ab"),
        (["shot=film:1", "count=0"], "count must be at least 1 and at most 1000"),
        (["shot=film:1", "format=xml"], "format must be one of table, json"),
    ):
        assert search(index, *overrides) == 2, overrides
        error = capsys.readouterr().err
        assert reason in error, error
        assert error.count("\n") == 1
