"""One suite over every kind of store."""

import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mediafm_ray.storage.local import PARTIAL_FOLDER
from mediafm_ray.storage.store import StorageError, Store, absolute, percent_encode


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}/root")


def test_what_is_put_is_read_and_listed(store):
    store.check_writable()
    assert list(store.list()) == []
    store.write("a/b/one.bin", b"1")
    store.write("a/two.bin", b"22")
    store.write("three.bin", b"")
    assert store.read("a/b/one.bin") == b"1"
    assert {info.name: info.size for info in store.list()} == {"a/b/one.bin": 1, "a/two.bin": 2, "three.bin": 0}
    assert {info.name for info in store.list("a")} == {"a/b/one.bin", "a/two.bin"}
    assert {info.name for info in store.list("a/")} == {"a/b/one.bin", "a/two.bin"}
    assert list(store.list("absent")) == []
    assert set(store.children()) == {"three.bin"}


def test_overwrite_delete_and_info(store):
    store.write("x", b"old")
    store.write("x", b"new!")
    assert store.read("x") == b"new!"
    assert store.info("x").size == 4
    store.delete("x")
    store.delete("x")
    assert store.info("x") is None
    with pytest.raises(FileNotFoundError):
        store.read("x")


def test_a_local_object_is_never_seen_half_written(tmp_path):
    store = Store(str(tmp_path))
    contents = [bytes([value]) * 3_000_000 for value in range(4)]
    store.write("x", contents[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for content in contents:
                store.write("x", content)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(200):
            assert store.read("x") in contents
            assert [info.name for info in store.list()] == ["x"]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert not (tmp_path / PARTIAL_FOLDER).exists()


def test_what_a_killed_writer_left_is_removed_and_a_living_one_is_left_alone(tmp_path):
    store = Store(str(tmp_path))
    folder = tmp_path / PARTIAL_FOLDER
    child = os.fork()
    if child == 0:  # a writer that dies between creating its file and renaming it
        folder.mkdir()
        (folder / "1-dead").write_bytes(b"half")
        os._exit(0)
    os.waitpid(child, 0)
    assert list(store.list()) == []
    import fcntl

    living = folder / "2-living"
    with living.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert store.remove_partial() == 1
        assert living.exists()
    assert store.remove_partial() == 1
    assert not folder.exists()


def test_a_location_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(StorageError, match="file/inside"):
        Store(str(blocked / "inside")).check_writable()


@pytest.mark.parametrize("uri", ["ftp://host/x", "gopher://x", "pipe://x", "reference://x"])
def test_only_known_schemes_are_opened(uri):
    with pytest.raises(StorageError, match="not allowed"):
        Store(uri)


def test_absolute():
    assert absolute("videos") == f"{os.getcwd()}/videos"
    assert absolute("file:///a/../b") == "/b"
    assert absolute("~/v") == str(Path.home() / "v")
    assert absolute("s3://bucket/key") == "s3://bucket/key"


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("a/b c", "a%2Fb%20c"),
        ("../x", "%2E.%2Fx"),
        ("_hidden", "%5Fhidden"),
        ("été@1", "%C3%A9t%C3%A9%401"),
        ("a~b", "a%7Eb"),
        ("-ok.", "-ok."),
    ],
)
def test_percent_encoding(text, encoded):
    assert percent_encode(text) == encoded


def test_threads_that_write_at_once_do_not_trip_over_each_other(tmp_path):
    """Each removes the folder of partial files when it finds it empty, while others are about to use it."""
    store = Store(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.write(f"object{number}", str(number).encode()), range(600)))
    assert {info.name: store.read(info.name) for info in store.list()} == {f"object{number}": str(number).encode() for number in range(600)}


def test_a_location_that_is_no_path_is_refused():
    with pytest.raises(StorageError, match="is not a path"):
        Store("~nobody\0/out")
