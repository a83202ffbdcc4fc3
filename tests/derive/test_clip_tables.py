"""Tables of clips, as vectors and as labelled examples for probes: over committed titles, as a user runs the jobs."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from benchmarks.stored_titles import commit_title, make_model
from jobs import embed_clips, evaluate_probes
from mediafm_ray.config.jobs import ContextualiseCatalogConfig, EmbedClipsConfig, EvaluateProbesConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.derive.clip_tables import KINDS
from mediafm_ray.derive.clips import ClipEmbedder
from mediafm_ray.downstream.clips import pool_clip
from mediafm_ray.models.tiny import make_contextualiser
from mediafm_ray.pipeline.contextualise_stored import ContextualiseStored
from mediafm_ray.runs.command import run_job
from mediafm_ray.runs.stored import make_stored_plan
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.schemas import embedding_values
from mediafm_ray.storage.tables import TableError, read_table

MODEL = make_model("0123456789ab", video=20, audio=12, text=16)
TITLES, SHOTS, SHOT_S = 12, 10, 2.0


def vectors_of(title):
    """(S, D) fused vectors: in the video part of every other shot, at random, stands the label; the text part of title 0 is absent."""
    random = np.random.default_rng(title)
    vectors = random.normal(size=(SHOTS, 48)).astype(np.float32)
    vectors[:, 0] += 6 * has_label(title)
    if title == 0:
        vectors[:, 32:] = 0
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def has_label(title):
    return np.random.default_rng(1000 + title).random(SHOTS) < 0.4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An output of twelve titles with contextual embeddings, its checkpoint, and a table of labelled clips, one a shot."""
    output, checkpoint = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("checkpoint")
    for title in range(TITLES):
        commit_title(str(output), MODEL, f"00{title}", vectors_of(title), np.full(SHOTS, SHOT_S))
    make_contextualiser(checkpoint, fused_dim=48, metadata_dim=16, initializer_range=0.2)
    config = read_config(ContextualiseCatalogConfig, [], [f"output.uri={output}", f"contextualiser.checkpoint={checkpoint}"])
    plan = make_stored_plan(config)
    stage = ContextualiseStored(config.contextualiser, str(output), plan.model, plan.checkpoint, config.storage)
    assert [table["error"][0].as_py() for table in stage(plan.pending)] == [None] * TITLES
    rows = [
        (f"00{title}", SHOT_S * shot, SHOT_S * (shot + 1), bool(has_label(title)[shot])) for title in range(TITLES) for shot in range(SHOTS)
    ]
    labels = pa.table(dict(zip(("title_id", "start_s", "end_s", "label"), map(list, zip(*rows, strict=True)), strict=True)))
    labels = labels.append_column("score", pa.array(np.arange(len(rows)) % 7 + 0.5))
    pa.csv.write_csv(labels, output.parent / "labels.csv")
    return output, checkpoint, output.parent / "labels.csv"


def embed(folders, *overrides):
    return run_job("", EmbedClipsConfig, embed_clips.main, [f"output.uri={folders[0]}", *overrides])


def probe(folders, *overrides):
    quick = ["probes.folds=3", "probes.repeats=1", "probes.bootstrap=50", "probes.strengths=[1,100]", "labels.columns=[label]"]
    arguments = [f"output.uri={folders[0]}", f"labels.uri={folders[2]}", *quick, *overrides]
    return run_job("", EvaluateProbesConfig, evaluate_probes.main, arguments)


def write_clips(path, **columns):
    table = pa.table(columns)
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), encoding="utf-8")
    return path


CLIPS = {"title_id": ["003", "000", "003"], "start_s": [1.0, 0.0, 4.0], "end_s": [7.0, 20.0, 5.0], "clip_id": ["x", "y", "z"]}


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_clips_of_every_kind_are_what_their_shots_are(folders, tmp_path, ending, capsys):
    output, checkpoint, _ = folders
    clips = write_clips(tmp_path / f"clips.{ending}", **CLIPS)
    end = SHOT_S * np.arange(1, SHOTS + 1)
    embedder = ClipEmbedder(str(output), str(checkpoint))
    for kind in KINDS:
        table_uri = tmp_path / f"{kind}.parquet"
        overrides = [f"contextualiser.checkpoint={checkpoint}"] if kind == "contextual_alone" else []
        assert embed(folders, f"clips.uri={clips}", f"clips.kind={kind}", f"table.uri={table_uri}", *overrides) == 0
        table = pq.read_table(table_uri)
        assert table.drop_columns(["embedding"]).to_pydict() == CLIPS
        for row, vector in zip(table.to_pylist(), embedding_values(table["embedding"]), strict=True):
            span = (row["start_s"], row["end_s"])
            if kind.startswith("contextual"):
                expected = embedder.clip_embedding(row["title_id"], *span, context=kind == "contextual")
            elif kind == "text" and row["title_id"] == "000":
                expected = np.zeros(16, np.float32)
            else:
                vectors_SD = vectors_of(int(row["title_id"]))
                if kind == "neighbours":
                    vectors_SD = np.stack([vectors_SD[max(0, shot - 2) : shot + 3].mean(0) for shot in range(SHOTS)])
                else:
                    vectors_SD = vectors_SD[:, slice(*{**MODEL.spans, "fused": (0, 48)}[kind])]
                expected = pool_clip(end - SHOT_S, end, vectors_SD, *span)
            np.testing.assert_allclose(vector, expected, atol=1e-6)
    assert "3 clips of 2 titles" in capsys.readouterr().out


def test_stored_embeddings_of_one_of_several_checkpoints_are_chosen_by_name(folders, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(folders[0], output)
    (first,) = [name for name in EmbeddingDataset(str(output)).names() if name.startswith("contextual-")]
    version = output / MODEL.dataset_version
    shutil.copytree(version / first, version / "contextual-ffffffffffff")
    clips = write_clips(tmp_path / "clips.csv", **CLIPS)
    arguments = [f"output.uri={output}", f"clips.uri={clips}", f"table.uri={tmp_path}/out.parquet"]
    assert embed(folders, *arguments) == 2
    assert f"set clips.contextual to one of {first[11:]}, ffffffffffff" in capsys.readouterr().err
    assert embed(folders, *arguments, "clips.contextual=000000000000") == 2
    assert f"no contextual-000000000000; there are: {first}, contextual-ffffffffffff, shots" in capsys.readouterr().err
    assert embed(folders, *arguments, f"clips.contextual={first[11:]}") == 0


def test_all_that_is_wrong_with_a_table_is_said_at_once(folders, tmp_path, capsys):
    clips = write_clips(
        tmp_path / "clips.csv",
        title_id=["001", "03", "nothing like it", "001", "001", "002"],
        start_s=[0.0, 0.0, 1.0, 5.0, 90.0, 1.0],
        end_s=[1.0, 1.0, 2.0, 5.0, 99.0, 2.0],
    )
    assert embed(folders, f"clips.uri={clips}", "clips.kind=fused", f"table.uri={tmp_path}/out.parquet") == 2
    error = capsys.readouterr().err
    assert "4 problems" in error
    lines = (
        "row 2 (03): no such title is committed; similar: 003",
        "row 3 (nothing like it): no such title is committed; there are 12 others",
        "row 4 (001): the clip [5, 5) s is empty",
        "row 5 (001): the clip [90, 99) s is outside the title, which is [0, 20) s",
    )
    places = [error.index(line) for line in lines]
    assert places == sorted(places)
    assert not (tmp_path / "out.parquet").exists()


def test_tables_that_cannot_be_read_say_why(tmp_path):
    required = {"title_id": pa.string(), "start_s": pa.float64()}
    good = write_clips(tmp_path / "good.csv", title_id=["007", "8"], start_s=[1, 2])
    assert read_table(str(good), required).to_pydict() == {"title_id": ["007", "8"], "start_s": [1.0, 2.0]}
    for name, content, reason in (
        ("missing.csv", "title_id,x\na,1\n", r"start_s is missing \(there are: title_id, x\)"),
        ("empty.csv", "title_id,start_s\n", "no rows"),
        ("words.csv", "title_id,start_s\na,soon\n", "soon"),
        (
            "nulls.jsonl",
            '{"title_id": "a", "start_s": 1}\n{"title_id": "", "start_s": null}\n',
            "row 2: title_id is empty\n.*row 2: start_s is empty",
        ),
        ("broken.jsonl", '{"title_id": \n', "not readable as jsonl"),
        ("no.parquet", "no Parquet", "not readable as parquet"),
        ("table.xlsx", "", "ending .xlsx is not one of"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(TableError, match=reason):
            read_table(str(tmp_path / name), required)
    with pytest.raises(TableError, match="nothing at this location"):
        read_table(str(tmp_path / "absent.csv"), required)


def test_probes_of_every_kind_find_what_is_planted(folders, tmp_path, capsys):
    report = tmp_path / "probes.json"
    assert probe(folders, f"contextualiser.checkpoint={folders[1]}", f"report.uri={report}") == 0
    printed = capsys.readouterr().out
    content = json.loads(report.read_text(encoding="utf-8"))
    assert list(content["inputs"]) == list(KINDS)
    reached = {kind: content["inputs"][kind]["metrics"]["macro_average_precision"]["value"] for kind in KINDS}
    assert reached["video"] > 0.95
    assert reached["fused"] > 0.9
    assert max(reached["audio"], reached["text"]) < 0.65
    assert content["chance"]["macro_average_precision"] == pytest.approx(np.mean([has_label(title) for title in range(TITLES)]))
    assert content["baseline"] == "fused"
    assert content["inputs"]["audio"]["against_baseline"]["macro_average_precision"]["interval"][1] < 0
    for kind in KINDS:
        assert f"{kind} " in printed
        assert f"{reached[kind]:.3f}" in printed
    assert "(chance)" in printed


def test_titles_that_belong_together_are_held_out_together(folders, tmp_path, capsys):
    """A label that is known by the film, and every film is there twice: it is learned where the other cut of the film may be seen."""
    output = tmp_path / "cuts"
    rows = []
    for title in range(TITLES):
        film = title // 2
        vectors = np.random.default_rng(film).normal(size=48) + 0.1 * np.random.default_rng(100 + title).normal(size=(SHOTS, 48))
        commit_title(str(output), MODEL, f"film{film}-cut{title % 2}", vectors.astype(np.float32), np.full(SHOTS, SHOT_S))
        rows += [(f"film{film}-cut{title % 2}", SHOT_S * shot, SHOT_S * (shot + 1), film % 2, f"film{film}") for shot in range(SHOTS)]
    names = ("title_id", "start_s", "end_s", "label", "film")
    labels = write_clips(tmp_path / "cuts.csv", **dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    reached = []
    for overrides in ([], ["labels.group=film"]):
        report = tmp_path / "report.json"
        arguments = [f"output.uri={output}", f"labels.uri={labels}", "labels.inputs=[fused]", f"report.uri={report}", *overrides]
        assert probe(folders, *arguments) == 0
        reached.append(json.loads(report.read_text(encoding="utf-8"))["inputs"]["fused"]["metrics"]["macro_average_precision"]["value"])
    assert reached[0] > 0.9 > reached[1] + 0.2
    assert "120 clips of 6 groups by film" in capsys.readouterr().out


def test_probes_rank_clips_by_a_score(folders, capsys):
    assert probe(folders, "labels.columns=[score]", "labels.inputs=[fused,audio]") == 0
    assert "Kendall's tau" in capsys.readouterr().out


def test_what_probes_cannot_do_is_said_before_anything_starts(folders, tmp_path, capsys):
    bare = tmp_path / "bare"
    for title in range(2):
        commit_title(str(bare), MODEL, f"00{title}", vectors_of(title), np.full(SHOTS, SHOT_S))
    one_class = write_clips(tmp_path / "one.csv", title_id=["000", "001"], start_s=[0.0, 0.0], end_s=[1.0, 1.0], label=[1, 1])
    one_title = write_clips(tmp_path / "title.csv", title_id=["001", "001"], start_s=[0.0, 2.0], end_s=[1.0, 4.0], label=[1, 0])
    for overrides, reason in (
        ([], "set contextualiser.checkpoint"),
        ([f"output.uri={bare}", "labels.inputs=[fused,contextual]"], "no contextual embeddings; there are: shots"),
        (
            ["labels.inputs=[smell]"],
            "unknown kind of clip vectors: smell; there are video, audio, text, fused, neighbours, contextual_alone, contextual",
        ),
        (["labels.inputs=[]"], "none given"),
        (["labels.inputs=[fused]", "labels.columns=[genre]"], "has no genre; there are: title_id, start_s, end_s, label, score"),
        (["labels.inputs=[fused]", "labels.columns=[label,score]"], "one column of scores; these are: label"),
        (["labels.inputs=[fused]", f"labels.uri={one_class}"], "one class only, every clip has it"),
        (["labels.inputs=[fused]", f"labels.uri={one_title}"], "all 2 clips are of one title"),
        (["labels.inputs=[fused]", "probes.folds=1"], "probes.folds"),
        (["labels.inputs=[fused]", "labels.group=series"], "has no series; there are: title_id"),
        (["labels.inputs=[fused]", "labels.group=score"], "clips of one title are in several groups"),
    ):
        assert probe(folders, *overrides) == 2, reason
        assert reason in capsys.readouterr().err
    assert probe(folders, f"output.uri={bare}", "labels.inputs=[video,fused]", f"labels.uri={write_labels_of_two(tmp_path)}") == 0


def write_labels_of_two(folder):
    """Clips of the first two titles, which are all that the bare output has."""
    spans = [(title, shot) for title in range(2) for shot in range(SHOTS)]
    return write_clips(
        folder / "two.csv",
        title_id=[f"00{title}" for title, _ in spans],
        start_s=[SHOT_S * shot for _, shot in spans],
        end_s=[SHOT_S * (shot + 1) for _, shot in spans],
        label=[int(has_label(title)[shot]) for title, shot in spans],
    )
