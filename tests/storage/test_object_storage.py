"""Object storage: one suite over moto and a real server, and faults on the way to the latter."""

import threading
import time
import uuid

import numpy as np
import pytest

from mediafm_ray.errors import TitleError
from mediafm_ray.media import source
from mediafm_ray.media.options import MediaConfig
from mediafm_ray.models import weights
from mediafm_ray.storage import s3
from mediafm_ray.storage.base import StorageConfig
from mediafm_ray.storage.catalog import read_catalog
from mediafm_ray.storage.errors import StorageError
from mediafm_ray.storage.s3 import S3Objects
from mediafm_ray.storage.store import Store, fsspec_options
from tests.servers.proxy import Fault

pytestmark = pytest.mark.integration

ODD_NAMES = ["a b/c", "50%/%41", "plus+plus", "été ☃ 影片", "x=1&y=2", "a#b?c", "q'\"<>", "~tilde", "two::colons", "semi;colon,comma"]


@pytest.fixture(params=["moto", "swift"])
def server(request, s3_keys):
    return request.getfixturevalue(request.param)


def store_at(server, bucket, **options):
    return Store(f"s3://{bucket}/some/root", StorageConfig(endpoint_url=server.url, **options))


def faulty(proxy, bucket, **options):
    """A store that is reached through the proxy, and tries again without long pauses."""
    return Store(f"s3://{bucket}/root", StorageConfig(endpoint_url=proxy.url, **{"read_timeout_s": 3.0, **options}))


@pytest.fixture
def quick_pauses(monkeypatch):
    monkeypatch.setattr("mediafm_ray.storage.errors.FIRST_PAUSE_S", 0.02)


def test_what_is_put_is_read_listed_and_removed_under_any_name(server):
    bucket = server.bucket()
    store = store_at(server, bucket)
    store.check_writable()
    assert not store.check_readable()
    assert list(store.list()) == []
    for name in ODD_NAMES:
        store.write(name, name.encode())
    assert {info.name: info.size for info in store.list()} == {name: len(name.encode()) for name in ODD_NAMES}
    assert server.objects(bucket, "some/root/") == {name: name.encode() for name in ODD_NAMES}
    for name in ODD_NAMES:
        assert store.read(name) == name.encode()
        assert store.info(name).size == len(name.encode())
        assert store.check_readable(name)
    assert store.check_readable()
    assert store.folders() == ["50%", "a b"]
    assert set(store.children()) == {name for name in ODD_NAMES if "/" not in name}
    assert [info.name for info in store.list("50%")] == ["50%/%41"]
    listed = {info.name: info.version for info in store.list()}
    assert {name: store.info(name).version for name in ODD_NAMES} == listed
    store.write("plus+plus", b"another")
    assert store.info("plus+plus").version != listed["plus+plus"]
    for name in ODD_NAMES:
        store.delete(name)
        store.delete(name)
    assert list(store.list()) == []
    assert store.info("plus+plus") is None
    with pytest.raises(FileNotFoundError):
        store.read("plus+plus")


def test_a_large_object_is_put_in_parts(server):
    bucket = server.bucket()
    store = store_at(server, bucket, part_mb=5)
    content = np.random.default_rng(0).bytes(11 << 20)
    store.write("large", content)
    assert store.read("large") == content
    assert store.info("large").version.endswith("-3")
    assert server.uploads(bucket) == []


def test_listings_are_paged_and_objects_are_found_by_few_of_them(server, monkeypatch):
    monkeypatch.setattr(s3, "PAGE_KEYS", 20)
    bucket = server.bucket()
    client = server.client()
    names = [f"title-{number:04d}/{part}" for number in range(30) for part in ("poster.jpg", "video.mp4")]
    for name in names:
        client.put_object(Bucket=bucket, Key=f"films/{name}", Body=name.encode())
    config = StorageConfig(endpoint_url=server.url)
    asked = []
    s3._client(config).meta.events.register("before-send.s3", lambda request, **_: asked.append(request.method) or None)
    assert {info.name for info in Store(f"s3://{bucket}/films", config).list()} == set(names)
    assert asked == ["GET"] * 3
    asked.clear()
    wanted = [name for name in names if name.endswith("video.mp4")][3:]
    absent = ["title-0003/absent.mp4", "title-9999/video.mp4", "aaa", "title-0020/video.mp"]
    found = S3Objects(f"s3://{bucket}/films", config).find([*wanted, *absent])
    assert {name: info.size for name, info in found.items()} == {name: len(name) for name in wanted}
    assert asked == ["GET"] * len(asked)
    assert len(asked) <= 5
    asked.clear()
    assert list(S3Objects(f"s3://{bucket}/films", config).find(["title-0029/video.mp4", "absent"])) == ["title-0029/video.mp4"]
    assert asked == ["HEAD"] * 2


def test_objects_are_found_on_a_server_that_begins_every_listing_at_the_start(server, monkeypatch):
    monkeypatch.setattr(s3, "PAGE_KEYS", 7)
    bucket = server.bucket()
    names = [f"title-{number:02d}/video.mp4" for number in range(25)]
    objects = S3Objects(f"s3://{bucket}/films", StorageConfig(endpoint_url=server.url))
    for name in names:
        objects.write(name, name.encode())
    request = S3Objects._request

    def without_start_after(self, operation, **parameters):
        parameters.pop("StartAfter", None)
        return request(self, operation, **parameters)

    monkeypatch.setattr(S3Objects, "_request", without_start_after)
    wanted = [*names[3::4], "absent", "title-12/absent", "title-99/video.mp4"]
    assert sorted(objects.find(wanted)) == names[3::4]


def test_many_objects_are_removed_by_few_requests_but_not_newer_ones(server):
    bucket = server.bucket()
    store = store_at(server, bucket)
    names = [*ODD_NAMES, *(f"shard/{number:02d}" for number in range(30))]
    for name in names:
        store.write(name, name.encode())
    listed = list(store.list())
    store.delete("shard/07")
    time.sleep(1.1)  # Times of objects are whole seconds.
    store.write("shard/08", b"newer")
    asked = []
    s3._client(store.config).meta.events.register("before-send.s3", lambda request, **_: asked.append(request.method) or None)
    assert store.delete_all_unless_newer(listed) == len(names) - 2
    assert asked.count("GET") <= 3
    assert len(asked) - asked.count("GET") <= 1 + (len(names) if "DELETE" in asked else 0)
    assert server.objects(bucket, "some/root/") == {"shard/08": b"newer"}
    assert store.delete_all_unless_newer([]) == 0


@pytest.mark.usefixtures("s3_keys", "quick_pauses")
@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "MissingContentMD5")])
def test_objects_are_removed_one_by_one_where_a_server_takes_no_more(proxy, swift, status, code):
    bucket = swift.bucket()
    store = faulty(proxy, bucket)
    for number in range(5):
        store.write(f"shard/{number}", b"x")
    proxy.faults = [Fault("status", match="^POST", status=status, code=code)]
    assert store.delete_all_unless_newer(list(store.list())) == 5
    assert proxy.faults[0].hits == 1
    assert swift.objects(bucket) == {}


def test_a_catalog_on_object_storage(server):
    bucket = server.bucket()
    store = Store(f"s3://{bucket}/videos", StorageConfig(endpoint_url=server.url))
    for name in ("a film +%20é.mp4", "a film +%20é.en.srt", "sub/b.mkv", ".hidden/c.mp4"):
        store.write(name, name.encode())
    store.write("a film +%20é.json", b'{"synopsis": "S", "tags": ["t"]}')
    by_folder = {entry.title.title_id: entry for entry in read_catalog(store.uri, store.config)}
    assert set(by_folder) == {"a film +%20é", "sub/b"}
    film = by_folder["a film +%20é"]
    assert (film.title.video, film.title.synopsis) == (f"{store.uri}/a film +%20é.mp4", "S")
    rows = "title_id,video,timed_text\none,videos/a film +%20é.mp4,videos/a film +%20é.en.srt\ntwo,videos/gone.mp4,\n"
    tables = Store(f"s3://{bucket}", store.config)
    tables.write("tables.csv", rows.encode())
    one, two = read_catalog(f"s3://{bucket}/tables.csv", store.config)
    assert one.source == film.source
    assert two.title.video == f"s3://{bucket}/videos/gone.mp4"
    store.write("a film +%20é.en.srt", b"changed")
    assert read_catalog(f"s3://{bucket}/tables.csv", store.config)[0].source != film.source
    for uri in (f"s3://{bucket}/nothing", f"s3://{bucket}/nothing.csv"):
        with pytest.raises(Exception, match="there is nothing at this location"):
            read_catalog(uri, store.config)
    with pytest.raises(Exception, match=r"not a folder, and the ending \.srt"):
        read_catalog(f"{store.uri}/a film +%20é.en.srt", store.config)


def test_weights_on_object_storage_are_fetched_once_and_checked(server, tmp_path, monkeypatch):
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    bucket = server.bucket()
    store = Store(f"s3://{bucket}/models", StorageConfig(endpoint_url=server.url))
    for name, content in (("config.json", b"{}"), ("model.safetensors", b"tensors"), ("README.md", b"words")):
        store.write(f"clip base/{name}", content)
        (tmp_path / "local").mkdir(exist_ok=True)
        (tmp_path / "local" / name).write_bytes(content)
    digest = weights.digest(str(tmp_path / "local"))
    address = weights.with_endpoint(f"s3://{bucket}/models/clip base#sha256={digest}", server.url)
    assert weights.digest(address) == digest
    folder = weights.resolve(address)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert weights.resolve(address) == folder
    store.write("clip base/model.safetensors", b"changed")
    with pytest.raises(weights.WeightsError, match="they were changed or damaged"):
        weights.resolve(address)
    file = weights.with_endpoint(f"s3://{bucket}/models/clip base/config.json", server.url)
    assert weights.resolve(file).read_bytes() == b"{}"
    assert weights.with_endpoint("package:a/b", server.url) == "package:a/b"
    with pytest.raises(weights.WeightsError, match="could not be listed"):
        weights.resolve(weights.with_endpoint(f"s3://no-{uuid.uuid4().hex[:8]}/x", server.url))


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.usefixtures("s3_keys")
@pytest.mark.parametrize(
    "fault",
    [
        {"action": "status", "status": 503, "code": "ServiceUnavailable"},
        {"action": "status", "status": 500, "code": "InternalError"},
        {"action": "reset_before"},
        {"action": "stall", "seconds": 0.5},
    ],
)
def test_weights_are_fetched_from_a_server_that_fails_now_and_then(proxy, swift, tmp_path, monkeypatch, fault):
    monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "MAX_LISTING_PAUSES_S", (0.01,) * 4)
    bucket = swift.bucket()
    Store(f"s3://{bucket}", StorageConfig(endpoint_url=swift.url)).write("detector.pth", b"tensors")
    requests = ("^HEAD", "^GET .*list-type", r"^GET [^?]*\.pth$")
    proxy.faults = [Fault(**fault, match=match, times=2) for match in requests]
    file = weights.resolve(weights.with_endpoint(f"s3://{bucket}/detector.pth", proxy.url))
    assert file.read_bytes() == b"tensors"
    assert proxy.injected().total() == 6


@pytest.mark.usefixtures("s3_keys", "quick_pauses")
@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", times=2),
        pytest.param(Fault("status", times=2, status=500, code="InternalError"), marks=pytest.mark.slow),
        Fault("status", times=2, status=429, code="TooManyRequests"),
        Fault("status", times=2, status=400, code="RequestTimeout"),
        pytest.param(Fault("reset_before", times=2), marks=pytest.mark.slow),
        Fault("reset_middle", times=2, size=1000),
        Fault("reset_after", times=2),
        Fault("stall", times=1, seconds=3),
        pytest.param(Fault("throttle", kilobytes_per_s=400), marks=pytest.mark.slow),
    ],
    ids=lambda fault: f"{fault.action}-{fault.status}",
)
def test_faults_that_pass_change_nothing(proxy, swift, fault):
    bucket = swift.bucket()
    store = faulty(proxy, bucket, read_timeout_s=1.0 if fault.action == "stall" else 10.0)
    content = np.random.default_rng(1).bytes(300_000)
    for operation in ("PUT", "GET", "DELETE"):
        if operation == "DELETE":
            store.write("gone", content)
        proxy.faults = [Fault(**{name: getattr(fault, name) for name in fault.__match_args__} | {"match": f"^{operation} .*root"})]
        if operation == "PUT":
            store.write("object", content)
        elif operation == "GET":
            assert store.read("object") == content
            assert [info.name for info in store.list()] == ["object"]
        else:
            store.delete("gone")
        struck, proxy.faults = proxy.injected()[fault.action], []
        assert struck or fault.action == "reset_middle"  # which needs a body
        proxy.requests.clear()
    assert swift.objects(bucket, "root/") == {"object": content}


@pytest.mark.usefixtures("s3_keys", "quick_pauses")
def test_an_answer_that_ends_early_is_noticed_and_asked_for_again(proxy, swift):
    bucket = swift.bucket()
    store = faulty(proxy, bucket)
    content = np.random.default_rng(2).bytes(500_000)
    store.write("object", content)
    proxy.faults = [Fault("truncate", match="^GET", size=200_000, times=3)]
    assert store.read("object") == content
    assert proxy.injected() == {"truncate": 3}
    proxy.faults = [Fault("truncate", match="^GET", size=200_000)]
    with pytest.raises(StorageError, match=r"cannot connect to .*(read|total)"):
        faulty(proxy, bucket, retries=2).read("object")


@pytest.mark.usefixtures("s3_keys", "quick_pauses")
@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (404, "NoSuchBucket"), (501, "NotImplemented"), (400, "InvalidArgument")]
)
def test_errors_that_stay_are_not_tried_again(proxy, swift, status, code):
    store = faulty(proxy, swift.bucket())
    proxy.faults = [Fault("status", status=status, code=code)]
    with pytest.raises(StorageError, match=code) as caught:
        store.write("object", b"x")
    assert len(proxy.requests) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("s3_keys", "quick_pauses")
def test_the_first_contact_survives_a_server_that_fails_several_times(proxy, swift):
    """A run over a bad network was not even begun: with a fault on every fourth request, one of several first contacts met two."""
    store = Store(f"s3://{swift.bucket()}/root", StorageConfig(endpoint_url=proxy.url))
    proxy.faults = [Fault("status", match=f"^{method}", times=3) for method in ("GET", "PUT", "DELETE")]
    store.check_writable()
    assert store.check_readable() is False
    assert sum(proxy.injected().values()) == 9


@pytest.mark.usefixtures("s3_keys")
def test_the_first_contact_gives_up_soon(proxy, swift, monkeypatch):
    monkeypatch.setattr(s3.FirstContactConfig, "patience_s", 1.0)
    store = Store(f"s3://{swift.bucket()}/root", StorageConfig(endpoint_url=proxy.url, retries=100))  # half an hour of pauses
    proxy.faults = [Fault("status")]
    begun = time.monotonic()
    with pytest.raises(StorageError, match="overloaded or failing"):
        store.check_readable()
    assert time.monotonic() - begun < 20  # on a busy machine


@pytest.mark.usefixtures("s3_keys", "quick_pauses")
def test_a_lasting_failure_ends_after_the_configured_attempts(proxy, swift):
    store = faulty(proxy, swift.bucket(), retries=4)
    proxy.faults = [Fault("status")]
    with pytest.raises(StorageError, match=r"overloaded or failing \(503.*run the same command again later"):
        store.write("object", b"x")
    assert len(proxy.requests) == 4


@pytest.mark.usefixtures("s3_keys", "quick_pauses")
@pytest.mark.parametrize(
    "faults",
    [
        [Fault("reset_after", match=r"POST .*\?uploads", times=1)],  # begun twice, one upload unknown to us
        pytest.param(
            [
                Fault("status", match="PUT .*partNumber=2", times=3),
                Fault("reset_middle", match="PUT .*partNumber=3", times=1, size=100_000),
            ],
            marks=pytest.mark.slow,
        ),
        [Fault("reset_after", match="POST .*uploadId=", times=1)],  # done, and the answer lost
        pytest.param([Fault("reset_after", match="PUT .*partNumber=1", times=2)], marks=pytest.mark.slow),
    ],
    ids=["begin", "parts", "complete", "part answer"],
)
def test_an_upload_in_parts_survives_faults_and_leaves_nothing_open(proxy, swift, faults):
    bucket = swift.bucket()
    store = faulty(proxy, bucket, part_mb=5, read_timeout_s=10.0)
    content = np.random.default_rng(3).bytes(11 << 20)
    proxy.faults = faults
    store.write("large", content)
    assert sum(proxy.injected().values()) == sum(fault.times for fault in faults)
    assert swift.objects(bucket, "root/") == {"large": content}
    assert swift.uploads(bucket) == []


@pytest.mark.usefixtures("s3_keys", "quick_pauses")
@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (400, "InvalidPart")])
def test_an_upload_counts_as_done_only_where_the_object_is_there(proxy, swift, status, code):
    """The answer to a completion is lost, and the server refuses the second in its own way."""
    bucket = swift.bucket()
    content = np.random.default_rng(3).bytes(6 << 20)
    lost = Fault("reset_after", match="POST .*uploadId=", times=1)
    refused = Fault("status", match="POST .*uploadId=", status=status, code=code)
    proxy.faults = [lost, refused]
    faulty(proxy, bucket, part_mb=5, retries=3, read_timeout_s=10.0).write("large", content)
    assert lost.hits == 1 <= refused.hits
    assert swift.objects(bucket, "root/") == {"large": content}
    proxy.faults = [refused]
    with pytest.raises(StorageError, match=code if status == 400 else "500"):
        faulty(proxy, bucket, part_mb=5, retries=2).write("another", content)
    assert swift.objects(bucket, "root/") == {"large": content}
    assert swift.uploads(bucket) == []


@pytest.mark.usefixtures("s3_keys", "quick_pauses")
def test_an_upload_that_fails_is_aborted(proxy, swift):
    bucket = swift.bucket()
    proxy.faults = [Fault("status", match="PUT .*partNumber=2")]
    with pytest.raises(StorageError, match="503"):
        faulty(proxy, bucket, part_mb=5, retries=2).write("large", bytes(11 << 20))
    assert proxy.count("DELETE .*uploadId") == 1
    assert swift.uploads(bucket) == []
    assert swift.objects(bucket) == {}


@pytest.mark.usefixtures("s3_keys")
def test_what_killed_uploads_left_is_aborted_after_a_day(swift, monkeypatch):
    bucket = swift.bucket()
    store = store_at(swift, bucket)
    swift.client().create_multipart_upload(Bucket=bucket, Key="some/root/large")
    swift.client().create_multipart_upload(Bucket=bucket, Key="elsewhere")
    assert store.remove_partial() == 0
    assert len(swift.uploads(bucket)) == 2
    later = time.time() + s3.ABANDONED_AFTER_S + 60
    monkeypatch.setattr(s3.time, "time", lambda: later)
    assert store.remove_partial() == 1
    monkeypatch.undo()
    assert swift.uploads(bucket) == ["elsewhere"]


@pytest.mark.usefixtures("s3_keys")
def test_a_video_is_read_on_where_the_network_broke(proxy, swift, monkeypatch):
    monkeypatch.setattr(source, "READ_PAUSE_S", 0.02)
    bucket = swift.bucket()
    store = faulty(proxy, bucket, retries=2)
    content = np.random.default_rng(4).bytes(7_000_000)  # more than the reader keeps
    store.write("a film +%20::é.mp4", content)
    options = MediaConfig(read_ahead_mb=1, storage_options=fsspec_options(store.uri, store.config))
    proxy.faults = [Fault("truncate", match="^GET", share=0.4, size=300_000), Fault("reset_after", match="^GET", share=0.2)]
    with source.open_bytes(f"{store.uri}/a film +%20::é.mp4", options) as stream:
        pieces = []
        while piece := stream.read(200_000):
            pieces.append(piece)
        assert b"".join(pieces) == content
        assert stream.seek(-10, 2) == len(content) - 10
        assert stream.read() == content[-10:]
        assert sum(proxy.injected().values()) > 0
        store.write("a film +%20::é.mp4", content[::-1])  # as large, but another
        proxy.faults = []
        stream.seek(0)
        with pytest.raises(TitleError, match="was replaced while it was read"):
            stream.read(100)


@pytest.mark.usefixtures("s3_keys", "quick_pauses")
def test_many_writers_and_readers_through_a_bad_network(proxy, swift):
    bucket = swift.bucket()
    store = faulty(proxy, bucket, retries=10)
    proxy.faults = [Fault("status", share=0.1), Fault("reset_before", share=0.1), Fault("reset_after", share=0.1)]
    proxy.faults += [Fault("truncate", match="^GET", share=0.1, size=10)]
    contents = {f"object-{number}": np.random.default_rng(number).bytes(20_000) for number in range(12)}
    problems = []

    def work(names):
        try:
            for name in names:
                store.write(name, contents[name])
                assert store.read(name) == contents[name]
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(list(contents)[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert sum(proxy.injected().values()) > 0
    assert {info.name for info in store.list()} == set(contents)
    proxy.faults = []
    assert swift.objects(bucket, "root/") == contents
