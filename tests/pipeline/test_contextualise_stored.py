"""Contextualising committed shots, without Ray: the plan against the listing, equal bytes, damaged objects and checkpoints."""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.stored_titles import commit_title, fused_row, make_model
from mediafm_ray.config.jobs import ContextualiseCatalogConfig
from mediafm_ray.config.loader import ConfigError, read_config
from mediafm_ray.models.contextualiser import TitleContextualiser, shot_times
from mediafm_ray.models.tiny import make_contextualiser
from mediafm_ray.models.weights import WeightsError
from mediafm_ray.pipeline import graph
from mediafm_ray.pipeline.cluster import connected
from mediafm_ray.pipeline.contextualise_stored import ContextualiseStored
from mediafm_ray.pipeline.stage_list import stored_pool
from mediafm_ray.pipeline.stages import Contextualise
from mediafm_ray.pipeline.write_title import WriteTitle
from mediafm_ray.runs.stored import make_stored_plan, prepare_stored_output
from mediafm_ray.storage.dataset import DatasetError, EmbeddingDataset, Output, read_failures, title_facts
from mediafm_ray.storage.schemas import METADATA_KEY, embedding_values

MODEL = make_model("0123456789ab", video=20, audio=12, text=16)
SHAPE = {"max_shots": 8, "initializer_range": 0.2}
TITLES = {"one shot": 1, "fits": 8, "long": 30, "series/épisode 1": 5, "x" * 300: 3}
METADATA = np.linspace(-1, 1, 16, dtype=np.float32)


def unit_rows(shots, seed):
    rows = np.random.default_rng(seed).normal(size=(shots, MODEL.dims["fused"])).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_checkpoint(folder, **changes):
    make_contextualiser(folder, fused_dim=MODEL.dims["fused"], metadata_dim=MODEL.dims["text"], **{**SHAPE, **changes})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), time_features=True)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """An output with the shots of a few titles."""
    folder = tmp_path_factory.mktemp("committed") / "out"
    for seed, (title_id, shots) in enumerate(TITLES.items()):
        durations = np.random.default_rng(seed).uniform(0.5, 9, shots)
        commit_title(str(folder), MODEL, title_id, unit_rows(shots, seed), durations, METADATA if seed % 2 else None)
    return folder


@pytest.fixture
def output(committed, tmp_path):
    return shutil.copytree(committed, tmp_path / "out")


def configured(output, checkpoint, *overrides):
    given = [f"output.uri={output}", f"contextualiser.checkpoint={checkpoint}", *overrides]
    return read_config(ContextualiseCatalogConfig, [], given)


def compute(config):
    """Plan and do what is pending in one call of the stage; the plan, and the results by title."""
    plan = make_stored_plan(config)
    prepare_stored_output(plan, config)
    stage = ContextualiseStored(config.contextualiser, config.output.uri, plan.model, plan.checkpoint, config.storage)
    results = [row for table in stage(plan.pending) for row in table.to_pylist()]
    return plan, {row["title_id"]: row for row in results}


def objects(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Deadly(ContextualiseStored):
    """The stage, whose process the reading of one title kills, as memory or native code would."""

    def _read(self, row):
        if row["title_id"] == "fits" and row["error"] is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._read(row)


def errors(results):
    return {title_id: row["error"]["message"] for title_id, row in results.items() if row["error"]}


# --------------------------------------------------------------------------------------------------- what is written


def test_every_title_gets_what_the_model_gives_for_its_shots(output, checkpoint):
    plan, results = compute(configured(output, checkpoint))
    assert set(results) == set(TITLES)
    assert not errors(results)
    dataset = EmbeddingDataset(str(output))
    name = f"contextual-{plan.checkpoint}"
    model = TitleContextualiser(configured(output, checkpoint).contextualiser)
    for seed, (title_id, shots) in enumerate(TITLES.items()):
        stored, table = dataset.title(title_id), dataset.title(title_id, name)
        for column in ("title_id", "shot_index", "start_s", "end_s"):
            assert table[column].equals(stored[column])
        times = shot_times(stored["start_s"].to_numpy(), stored["end_s"].to_numpy())
        expected, _ = model.contextualise(unit_rows(shots, seed), METADATA if seed % 2 else None, times)
        assert embedding_values(table["contextual_embedding"]).tobytes() == expected.tobytes()
        assert title_facts(table)["checkpoint"] == plan.checkpoint
        assert (results[title_id]["shot_count"], results[title_id]["duration_s"]) == (shots, title_facts(stored)["media"]["duration_s"])
        assert [spent["stage"] for spent in results[title_id]["seconds"]] == ["read_shots", "contextualise", "write"]
        assert results[title_id]["bytes_written"] > 0


def test_the_objects_are_those_that_the_embedding_job_writes(output, checkpoint, tmp_path):
    """Its last two stages over the fused titles, against the stored ones; with time features, metadata and long titles."""
    config = configured(output, checkpoint)
    plan, _ = compute(config)
    together = []
    for seed, (title_id, shots) in enumerate(TITLES.items()):
        durations = np.random.default_rng(seed).uniform(0.5, 9, shots)
        together.append(fused_row(title_id, unit_rows(shots, seed), durations, METADATA if seed % 2 else None))
    contextualised = Contextualise(config.contextualiser, MODEL.dims["fused"])(pa.concat_tables(together))
    ended = WriteTitle(str(tmp_path / "embedded"), MODEL, plan.checkpoint, config.storage)(contextualised)
    assert ended["error"].to_pylist() == [None] * len(TITLES)
    written = objects(tmp_path / "embedded")
    assert len(written) == 2 * len(TITLES)
    assert written == {name: content for name, content in objects(output).items() if not name.endswith("model.json")}


def test_bytes_do_not_depend_on_the_size_of_groups_threads_or_what_was_there(output, checkpoint, tmp_path):
    compute(configured(output, checkpoint, "contextualiser.threads=2"))
    everything = objects(output)
    (gone,) = output.rglob("contextual-*/*/long@*")
    gone.unlink()
    config = configured(output, checkpoint, "contextualiser.threads=1")
    assert set(compute(config)[1]) == {"long"}
    assert objects(output) == everything
    shutil.rmtree(next(output.glob("*/contextual-*")))
    plan = make_stored_plan(config)
    stage = ContextualiseStored(config.contextualiser, str(output), plan.model, plan.checkpoint, config.storage)
    stage.group_bytes = 1  # every title a group
    assert [table["error"][0].as_py() for table in stage(plan.pending)] == [None] * len(TITLES)
    assert objects(output) == everything


def test_a_rerun_has_nothing_to_do_and_a_new_checkpoint_everything(output, checkpoint, tmp_path):
    compute(configured(output, checkpoint))
    plan = make_stored_plan(configured(output, checkpoint))
    assert (plan.titles, plan.done, plan.pending.num_rows) == (len(TITLES), len(TITLES), 0)
    other = make_checkpoint(tmp_path / "other", num_hidden_layers=1)
    assert make_stored_plan(configured(output, other)).pending.num_rows == len(TITLES)
    bfloat16 = make_stored_plan(configured(output, checkpoint, "contextualiser.precision=bfloat16"))
    assert bfloat16.pending.num_rows == len(TITLES)
    assert bfloat16.checkpoint != plan.checkpoint
    some = make_stored_plan(configured(output, other, "run.max_titles=2"))
    assert (some.pending.num_rows, some.left) == (2, len(TITLES) - 2)


# --------------------------------------------------------------------------------------------------- changed sources


def test_a_title_that_was_embedded_anew_is_contextualised_anew_and_its_old_object_removed(output, checkpoint):
    plan, _ = compute(configured(output, checkpoint))
    (old,) = output.rglob("contextual-*/*/fits@*")
    (shots,) = output.rglob("shots/*/fits@*")
    shots.unlink()
    commit_title(str(output), MODEL, "fits", unit_rows(6, 77), source="f" * 16)
    _, results = compute(configured(output, checkpoint))
    assert {title: row["source"] for title, row in results.items()} == {"fits": "f" * 16}
    assert not old.exists()
    assert len(EmbeddingDataset(str(output)).title("fits", f"contextual-{plan.checkpoint}")) == 6


def test_a_removal_that_a_killed_run_did_not_get_to_is_made_up_for_but_newer_objects_stay(output, checkpoint):
    compute(configured(output, checkpoint))
    (current,) = output.rglob("contextual-*/*/fits@*")
    older, newer = current.with_name("fits@00000000.parquet"), current.with_name("fits@ffffffff.parquet")
    for path, modified in ((older, 1), (newer, 2**33)):
        path.write_bytes(current.read_bytes())
        os.utime(path, (modified, modified))
    assert compute(configured(output, checkpoint))[1] == {}
    assert current.exists()
    assert not older.exists()
    assert newer.exists()  # of a source that another job is just committing


# ----------------------------------------------------------------------------------------------------- damaged shots


def rewrite(path, change, **facts):
    """The object with its table changed, and facts replaced."""
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"mediafm_ray"]) | facts
    pq.write_table(change(table).replace_schema_metadata({b"mediafm_ray": json.dumps(metadata)}), path)


def with_nan(table):
    vectors = embedding_values(table["fused_embedding"]).copy()
    vectors[2, 1] = np.nan
    field = table.schema.field("fused_embedding")
    array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=field.type)
    return table.set_column(table.column_names.index("fused_embedding"), field, array)


def shorter(table):
    narrow = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(len(table) * 5, np.float32)), 5)
    return table.set_column(table.column_names.index("fused_embedding"), "fused_embedding", narrow)


def with_times(times):
    def change(table):
        return table.set_column(table.column_names.index("start_s"), "start_s", pa.array(times * len(table))[: len(table)])

    return change


def as_text(column):
    return lambda table: table.set_column(table.column_names.index(column), column, pa.array(["x"] * len(table)))


def with_raw_facts(path, facts):
    pq.write_table(pq.read_table(path).replace_schema_metadata({METADATA_KEY: facts}), path)


DAMAGE = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a readable Parquet"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable Parquet"),
    "garbled": (lambda path: path.write_bytes(garbled(path.read_bytes())), "not a readable Parquet"),
    "NaN": (lambda path: rewrite(path, with_nan), "fused embedding of shot 2 is not finite"),
    "other dimensions": (lambda path: rewrite(path, shorter), "not of 48 dimensions"),
    "no vectors": (lambda path: rewrite(path, lambda table: table.drop_columns(["fused_embedding"])), "has no fused_embedding"),
    "no rows": (lambda path: rewrite(path, lambda table: table.slice(0, 0)), "has no shots"),
    "out of order": (lambda path: rewrite(path, lambda table: table.take([1, 0, *range(2, len(table))])), "not in order"),
    "times": (lambda path: rewrite(path, with_times([0.0])), "do not rise"),
    "NaN time": (lambda path: rewrite(path, with_times([float("nan")])), "do not rise"),
    "another title": (lambda path: rewrite(path, lambda table: table, title_id="other"), "holds the title 'other'"),
    "another version": (lambda path: rewrite(path, lambda table: table, dataset_version="f" * 12), "dataset version ffffffffffff"),
    "metadata": (lambda path: rewrite(path, lambda table: table, metadata_embedding="AAAAAA=="), "metadata embeddings of 16 dimensions"),
    "facts are null": (lambda path: with_raw_facts(path, b"null"), "facts are not a JSON object"),
    "facts nest": (lambda path: with_raw_facts(path, b"[" * 100_000), "nested too deeply"),
    "title is null": (lambda path: rewrite(path, lambda table: table, title_id=None), "facts are damaged"),
    "title is no Unicode": (lambda path: rewrite(path, lambda table: table, title_id="\ud800"), "facts are damaged"),
    "media is null": (lambda path: rewrite(path, lambda table: table, media=None), "facts are damaged"),
    "metadata is no base64": (
        lambda path: rewrite(path, lambda table: table, metadata_embedding="A"),
        "facts are damaged",
    ),
    "vectors are text": (lambda path: rewrite(path, as_text("fused_embedding")), "have other types"),
    "times are text": (lambda path: rewrite(path, as_text("start_s")), "have other types"),
    "no facts": (lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata(None), path), "facts of its title"),
}


def garbled(content):
    middle = len(content) // 3
    return content[:middle] + bytes(byte ^ 0x5A for byte in content[middle : middle + 200]) + content[middle + 200 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_object_is_that_titles_failure_and_the_others_are_done(output, checkpoint, damage):
    spoil, said = DAMAGE[damage]
    (path,) = output.rglob("shots/*/long@*")
    modified = path.stat().st_mtime
    good = path.read_bytes()
    spoil(path)
    os.utime(path, (modified, modified))
    plan, results = compute(configured(output, checkpoint))
    assert set(errors(results)) == {"long"}
    assert said in errors(results)["long"]
    (record,) = read_failures(EmbeddingDataset(str(output)).output)
    assert (record["title_id"], record["attempts"], record["checkpoint"]) == ("long", 1, plan.checkpoint)
    assert said in record["message"]
    assert len(list(output.rglob("contextual-*/*/*.parquet"))) == len(TITLES) - 1
    for written in output.rglob("contextual-*/*/*.parquet"):
        assert np.isfinite(embedding_values(pq.read_table(written)["contextual_embedding"])).all()
    passed_over = make_stored_plan(configured(output, checkpoint, "run.retry_failed=false"))
    assert (passed_over.pending.num_rows, passed_over.failed_before) == (0, 1)
    path.write_bytes(good)
    assert not errors(compute(configured(output, checkpoint))[1])
    assert list(read_failures(EmbeddingDataset(str(output)).output)) == []


def test_a_full_store_is_the_titles_error_and_heard_of(output, checkpoint, monkeypatch):
    config = configured(output, checkpoint)
    plan = make_stored_plan(config)
    stage = ContextualiseStored(config.contextualiser, str(output), plan.model, plan.checkpoint, config.storage)

    def full(name, content):
        raise OSError(28, "No space left on device")

    stage.output.store.write = full
    for table in stage(plan.pending):
        message = table["error"][0].as_py()["message"]
        assert "No space left" in message
        assert "failure record could not be written" in message


def test_an_object_that_another_job_removed_says_so(output, checkpoint):
    config = configured(output, checkpoint)
    plan = make_stored_plan(config)
    next(output.rglob("shots/*/fits@*")).unlink()
    stage = ContextualiseStored(config.contextualiser, str(output), plan.model, plan.checkpoint, config.storage)
    results = {row["title_id"]: row for table in stage(plan.pending) for row in table.to_pylist()}
    assert "gone" in errors(results)["fits"]
    assert len(errors(results)) == 1


# -------------------------------------------------------------------------------- refused before anything is started


def test_an_output_without_shots_is_refused(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"output\.uri is required"):
        make_stored_plan(read_config(ContextualiseCatalogConfig, [], [f"contextualiser.checkpoint={checkpoint}"]))
    with pytest.raises(DatasetError, match="has no dataset version"):
        make_stored_plan(configured(tmp_path, checkpoint))
    name = commit_title(str(tmp_path / "out"), MODEL, "only", unit_rows(2, 0))
    (tmp_path / "out" / MODEL.dataset_version / name).unlink()
    with pytest.raises(DatasetError, match=r"no committed shots: run mediafm embed"):
        make_stored_plan(configured(tmp_path / "out", checkpoint))
    (tmp_path / "out" / MODEL.dataset_version / "model.json").write_text('{"dims"')
    with pytest.raises(DatasetError, match=r"model\.json cannot be read"):
        make_stored_plan(configured(tmp_path / "out", checkpoint))


def test_of_several_dataset_versions_one_must_be_chosen(output, checkpoint):
    other = dataclasses.replace(MODEL, dataset_version="ba9876543210")
    commit_title(str(output), other, "only", unit_rows(2, 0))
    with pytest.raises(ConfigError, match=r"set dataset\.version to one of 0123456789ab, ba9876543210"):
        make_stored_plan(configured(output, checkpoint))
    assert make_stored_plan(configured(output, checkpoint, "dataset.version=ba9876543210")).titles == 1
    with pytest.raises(DatasetError, match="no dataset version 000000000000"):
        make_stored_plan(configured(output, checkpoint, "dataset.version=000000000000"))


def test_checkpoints_that_do_not_fit_are_refused(output, tmp_path):
    with pytest.raises(ConfigError, match=r"contextualiser\.checkpoint is required"):
        make_stored_plan(read_config(ContextualiseCatalogConfig, [], [f"output.uri={output}", "contextualiser.checkpoint="]))
    make_contextualiser(tmp_path / "wide", fused_dim=50, metadata_dim=16)
    with pytest.raises(ConfigError, match="fused_dim is 50, and the encoders of this dataset give 48"):
        make_stored_plan(configured(output, tmp_path / "wide"))
    make_contextualiser(tmp_path / "text", fused_dim=48, metadata_dim=5)
    with pytest.raises(ConfigError, match="metadata_dim is 5"):
        make_stored_plan(configured(output, tmp_path / "text"))
    elsewhere = make_checkpoint(tmp_path / "elsewhere", dataset_version="ba9876543210")
    with pytest.raises(ConfigError, match=r"trained on dataset version ba9876543210, and this is 0123456789ab.*any_dataset=true"):
        make_stored_plan(configured(output, elsewhere))
    assert make_stored_plan(configured(output, elsewhere, "contextualiser.any_dataset=true")).pending.num_rows == len(TITLES)
    same = make_checkpoint(tmp_path / "same", dataset_version=MODEL.dataset_version)
    assert make_stored_plan(configured(output, same)).pending.num_rows == len(TITLES)


@pytest.mark.parametrize("length", [0, 4, 1000, -1])
def test_a_checkpoint_that_was_cut_short_is_refused(output, checkpoint, tmp_path, length):
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    tensors = damaged / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:length])
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or truncated"):
        make_stored_plan(configured(output, damaged))


def test_another_models_or_no_config_is_refused(output, checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for content, said in ((json.dumps(config | {"model_type": "bert"}), "'bert' checkpoint, no contextualiser"), ("{", "not JSON")):
        (copy / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=said):
            make_stored_plan(configured(output, copy))
    with pytest.raises(WeightsError, match="nowhere"):
        make_stored_plan(configured(output, tmp_path / "nowhere"))


@pytest.mark.parametrize("override", ["contextualiser.precision=float16", "contextualiser.micro_batch=-1", "contextualiser.read_mb=0"])
def test_options_that_make_no_sense_are_named(override):
    with pytest.raises(ConfigError, match=override.split("=")[0].split(".")[1]):
        read_config(ContextualiseCatalogConfig, [], [override])


def test_files_for_the_embedding_job_serve_here_too(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("catalog: {uri: videos}\noutput: {uri: here}\nvideo: {device: cuda}\nresources: {detect_shots: {num_cpus: 2}}\n")
    assert read_config(ContextualiseCatalogConfig, [str(file)], []).output.uri == "here"
    file.write_text("video: {devise: cuda}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*video\.devise"):
        read_config(ContextualiseCatalogConfig, [str(file)], [])
    file.write_text("vidoe: {device: cuda}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*vidoe"):
        read_config(ContextualiseCatalogConfig, [str(file)], [])
    with pytest.raises(ConfigError, match="video"):
        read_config(ContextualiseCatalogConfig, [], ["video.device=cuda"])


@pytest.mark.slow
def test_a_title_that_kills_its_process_fails_alone(output, checkpoint, monkeypatch):
    monkeypatch.setattr(graph, "MIN_CALLS_PER_ACTOR", 1)  # all titles at once
    config = configured(output, checkpoint, "resources.max_deaths_per_title=1")
    plan = make_stored_plan(config)
    with connected(config.resources):
        calls = graph.contextualise_stored(plan, stored_pool(plan, config, Deadly), config.resources.max_deaths_per_title)
        results = {row["title_id"]: row for block in graph.blocks(calls) for row in block.to_pylist()}
    assert sorted(results) == sorted(TITLES)
    assert list(errors(results)) == ["fits"]
    assert "2 processes ended while stage contextualise_stored worked on it" in errors(results)["fits"]
    assert {"name": "process_deaths", "value": 2.0} in results["fits"]["measures"]
    (failure,) = read_failures(Output(str(output), plan.model.dataset_version))
    assert (failure["title_id"], failure["stage"]) == ("fits", "contextualise_stored")
    assert make_stored_plan(config).pending["title_id"].to_pylist() == ["fits"]
