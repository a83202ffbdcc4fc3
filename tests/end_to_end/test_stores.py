"""The main job over every kind of store: catalog, videos, text, weights and output in a local folder, on moto, and on a real S3 server."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pytest
import s3fs

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.models import weights
from mediafm_ray.runs.plan import describe_model, make_plan
from mediafm_ray.storage.base import StorageConfig
from mediafm_ray.storage.dataset import EmbeddingDataset, Output, read_failures
from mediafm_ray.storage.store import Store
from tests.end_to_end.clips import PROFILE, ROOT, command, make_clip
from tests.servers.fixtures import S3Server
from tests.servers.proxy import Fault, FaultProxy

TITLES = {"a film +%20é": [30, 35], "series/two": [40]}  # frames of their shots
SRT = "1\n00:00:00,100 --> 00:00:01,000\nHello\n"


@dataclass
class Place:
    """Where everything lies, and how it is reached."""

    root: str  # URI
    server: S3Server | None = None
    bucket: str = ""
    folder: Path = field(default_factory=Path)
    url: str = ""  # of a proxy, where one stands in front of the server

    @property
    def storage(self) -> StorageConfig:
        """The configuration that reaches it."""
        return StorageConfig(endpoint_url=self.url or (self.server.url if self.server else ""))

    def put(self, name: str, file: Path) -> None:
        """Copy a file there, as another program does."""
        if self.server:
            self.server.client().put_object(Bucket=self.bucket, Key=name, Body=file.read_bytes())
        else:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, self.folder / name)

    def objects(self, prefix: str) -> dict[str, bytes]:
        """What is there below a prefix."""
        if self.server:
            return self.server.objects(self.bucket, prefix)
        files = [path for path in (self.folder / prefix).rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder / prefix)): path.read_bytes() for path in files}

    def embed(self, cache: Path, *overrides: str, output: str = "out") -> subprocess.CompletedProcess:
        """Run the main job, weights and all from there."""
        checkpoint, detector = f"{self.root}/models/checkpoint", f"{self.root}/models/detector.pth"
        given = [
            f"contextualiser.checkpoint={checkpoint}",
            f"detector.weights={detector}",
            f"storage.endpoint_url={self.storage.endpoint_url}",
        ]
        line = command(f"{self.root}/videos", f"{self.root}/{output}", *given, *overrides, profile=PROFILE)
        environment = {**(self.server.environment() if self.server else {}), weights.CACHE_VARIABLE: str(cache)}
        return subprocess.run(line, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The catalog and the models as local files."""
    import torch

    from mediafm_ray.models.contextualiser import Contextualiser, ContextualiserModelConfig

    folder = tmp_path_factory.mktemp("files")
    for seed, (name, frames) in enumerate(TITLES.items()):
        make_clip(folder / "videos" / f"{name}.mp4", frames, seed)
    (folder / "videos" / "a film +%20é.en.srt").write_text(SRT)
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    (folder / "models").mkdir()
    shutil.copy(weights.resolve(EmbedCatalogConfig().detector.weights), folder / "models" / "detector.pth")
    dims = describe_model(EmbedCatalogConfig()).dims
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = Contextualiser(ContextualiserModelConfig(fused_dim=dims["fused"], metadata_dim=dims["text"], **shape))
    model.save_pretrained(folder / "models" / "checkpoint")
    return folder


def place_of(request, kind: str, files: Path, folder: Path) -> Place:
    if kind == "local":
        place = Place(str(folder), folder=folder)
    else:
        server = request.getfixturevalue(kind)
        bucket = server.bucket()
        place = Place(f"s3://{bucket}", server, bucket)
    for file in files.rglob("*"):
        if file.is_file():
            place.put(str(file.relative_to(files)), file)
    return place


@pytest.fixture(
    scope="module", params=[pytest.param("local", marks=pytest.mark.slow), pytest.param("moto", marks=pytest.mark.slow), "swift"]
)
def embedded(request, files, tmp_path_factory):
    """A place where the job ran once, with what it said."""
    folder = tmp_path_factory.mktemp("place")
    place = place_of(request, request.param, files, folder)
    return place, place.embed(folder / "cache"), folder / "cache"


def keys(monkeypatch, place: Place) -> None:
    """This process reaches the place, too."""
    for name, value in (place.server.environment() if place.server else {}).items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)


def titles_of(place: Place, output: str = "out") -> dict[str, str]:
    """The committed objects of shots: title by name."""
    names = [name for name in place.objects(f"{output}/") if "/shots/" in name]
    return {name: name.rsplit("/", 1)[1].partition("@")[0] for name in names}


@pytest.mark.integration
def test_what_is_written_is_read_back(embedded, monkeypatch):
    place, done, cache = embedded
    assert done.returncode == 1, done.stdout + done.stderr  # of three titles one is broken
    keys(monkeypatch, place)
    dataset = EmbeddingDataset(f"{place.root}/out", config=place.storage)
    table = dataset.dataset().to_table().sort_by([("title_id", "ascending"), ("shot_index", "ascending")])
    assert sorted(set(table["title_id"].to_pylist())) == sorted(TITLES)
    for title_id, frames in TITLES.items():
        assert dataset.title(title_id)["end_frame"].to_pylist() == np.cumsum(frames).tolist()
    np.testing.assert_allclose(np.linalg.norm(dataset.embeddings(table), axis=1), 1, atol=1e-5)
    assert dataset.title("a film +%20é")["text"].to_pylist()[0] == "Hello"
    (contextual,) = (name for name in dataset.names() if name.startswith("contextual-"))
    assert dataset.dataset(contextual).count_rows() == table.num_rows
    (failure,) = read_failures(dataset.output)
    assert (failure["title_id"], failure["stage"]) == ("broken", "detect_shots")
    filesystem = (
        s3fs.S3FileSystem(endpoint_url=place.server.url, config_kwargs={"s3": {"addressing_style": "path"}}) if place.server else None
    )
    folder = f"{place.root.removeprefix('s3://')}/out/{dataset.version}/shots"
    plain = pads.dataset(folder, format="parquet", partitioning="hive", filesystem=filesystem).to_table()
    assert plain.num_rows == table.num_rows
    names = place.objects("out/")
    assert not [name for name in names if ".partial" in name]
    assert json.loads(names["run-summary.json"])["titles"]["ok"] == len(TITLES)
    assert len(list((cache).glob("[0-9a-f]*[0-9a-f]"))) == (2 if place.server else 0)  # detector and checkpoint, fetched once each
    if place.server:
        assert place.server.uploads(place.bucket) == []


@pytest.mark.slow
def test_a_rerun_skips_and_a_changed_source_is_computed_anew(embedded, files, monkeypatch, tmp_path):
    place, _, cache = embedded
    keys(monkeypatch, place)
    before = titles_of(place)
    again = place.embed(cache, "run.retry_failed=false")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 committed before, 0 to compute" in again.stdout
    assert titles_of(place) == before
    place.put("videos/series/two.mp4", make_clip(tmp_path / "two.mp4", [25, 50], seed=7))
    changed = place.embed(cache, "run.retry_failed=false")
    assert "2 committed before, 1 to compute" in changed.stdout or "1 committed before, 1 to compute" in changed.stdout
    after = titles_of(place)
    assert sorted(after.values()) == sorted(before.values())
    assert len(set(after) & set(before)) == 1
    dataset = EmbeddingDataset(f"{place.root}/out", config=place.storage)
    assert dataset.title("series/two")["end_frame"].to_pylist() == [25, 75]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "share"), [(1, 0.04), (2, 0.04), (3, 0.04), (1, 0.08), (6, 0.08)])
def test_a_run_over_a_bad_network_ends_as_an_undisturbed_one(request, files, tmp_path, monkeypatch, swift, seed, share):
    place = place_of(request, "swift", files, tmp_path)
    undisturbed = place.embed(tmp_path / "cache", output="undisturbed")
    assert undisturbed.returncode == 1, undisturbed.stdout + undisturbed.stderr
    with FaultProxy(swift.url, seed=seed) as proxy:
        place.url = proxy.url
        proxy.faults = [Fault(action, share=share) for action in ("status", "reset_before", "reset_after")]
        proxy.faults += [
            Fault("truncate", match="^GET .*mp4", share=0.2, size=3000),
            Fault("reset_middle", match="^PUT", share=0.1, size=5000),
        ]
        proxy.faults += [Fault("stall", share=0.01, seconds=3), Fault("throttle", match="^GET .*mp4", share=0.2, kilobytes_per_s=200)]
        for _ in range(3):
            done = place.embed(tmp_path / "cache", "storage.read_timeout_s=5", output="disturbed")
            if done.returncode == 1 and json.loads(place.objects("disturbed/")["run-summary.json"])["titles"]["failed"] == 1:
                break
        assert sum(proxy.injected().values()) > 2
    keys(monkeypatch, place)
    whole, found = place.objects("undisturbed/"), place.objects("disturbed/")
    committed = {name: content for name, content in whole.items() if name.endswith((".parquet", "model.json"))}
    assert {name: content for name, content in found.items() if name.endswith((".parquet", "model.json"))} == committed
    assert {name for name in found if "/failures/" in name} == {name for name in whole if "/failures/" in name}
    assert swift.uploads(place.bucket) == []


def test_planning_lists_once_and_asks_for_no_object_by_itself(swift, s3_keys):
    """The requests of a plan, counted: they do not grow with the titles."""
    place = Place(f"s3://{swift.bucket()}", swift)
    store = Store(place.root, place.storage)
    rows = ["title_id,video,timed_text"]
    for number in range(12):  # a folder for each title
        store.write(f"videos/t{number:02d}/main.mp4", b"video")
        store.write(f"videos/t{number:02d}/main.en.srt", b"text")
        rows.append(f"t{number:02d},videos/t{number:02d}/main.mp4,videos/t{number:02d}/main.en.srt")
    store.write("catalog.csv", "\n".join(rows).encode())
    with FaultProxy(swift.url) as proxy:
        given = [f"output.uri={place.root}/out", f"storage.endpoint_url={proxy.url}"]
        config = read_config(EmbedCatalogConfig, [], [f"catalog.uri={place.root}/catalog.csv", *given])
        first = make_plan(config)
        output = Output(config.output.uri, first.model.dataset_version, place.storage)
        for row in first.pending.to_pylist()[:10]:
            output.write("shots", row["title_id"], row["source"], b"committed")
        output.write("failures", "t11", first.pending.to_pylist()[11]["source"], b"{}")
        proxy.requests.clear()
        plan = make_plan(config)
        assert (plan.done, plan.pending.num_rows) == (10, 2)
        lists = [line for line, _ in proxy.requests if "list-type=2" in line]
        others = [line for line, _ in proxy.requests if "list-type=2" not in line]
    assert len(others) == 2, others  # whether the catalog is there, and the catalog
    assert all(line.startswith("GET ") and "catalog.csv" in line for line in others)
    # the videos and texts; of the output: is it there, which datasets has it; of each of the two which shards have objects and merged
    # files, and the objects; the merged files of shots
    assert len(lists) == 1 + 2 + 2 * 3 + 1, lists
