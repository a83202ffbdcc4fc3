"""The lease: never two holders, on a store that is only consistent; a crash, a stopped process and a failing store."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mediafm_ray.storage import lease as leases
from mediafm_ray.storage.lease import CANDIDATE, HELD, Lease, LeaseHeld, LeaseLost, held
from mediafm_ray.storage.store import ObjectInfo, StorageConfig, StorageError, Store

ROOT = Path(__file__).parents[2]
FOLDER = "leases/x"
CONTENDERS = 6
ROUNDS = {"local": 8, "swift": 2}
DEADLINE_S = 60


@pytest.fixture
def uri(tmp_path):
    """A local store, whose modification times are exact."""
    return str(tmp_path / "out")


@pytest.fixture(params=["local", pytest.param("swift", marks=pytest.mark.slow)])
def place(request, uri):
    """A store that several processes reach, on each kind of server: URI and endpoint."""
    if request.param == "local":
        return uri, ""
    server = request.getfixturevalue(request.param)
    request.getfixturevalue("s3_keys")
    return f"s3://{server.bucket()}/out", server.url


def store_at(place):
    return Store(place[0], StorageConfig(endpoint_url=place[1]))


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def acquired(lease):
    try:
        lease.acquire()
    except LeaseHeld:
        return False
    return True


def child(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


CONTEND = """
import sys, time
from pathlib import Path
from mediafm_ray.storage.lease import Lease, LeaseHeld
from mediafm_ray.storage.store import StorageConfig, Store

store = Store(sys.argv[1], StorageConfig(endpoint_url=sys.argv[2]))
meeting, me, rounds = Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])

def wait_for(name):
    deadline = time.monotonic() + 60
    while not (meeting / name).exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)

for number in range(rounds):
    (meeting / f"here-{number}-{me}").touch()
    wait_for(f"go-{number}")
    lease = Lease(store, "leases/x", f"contender {me}", 30.0)
    try:
        lease.acquire()
        print("held", number, flush=True)
    except LeaseHeld:
        print("refused", number, flush=True)
    (meeting / f"tried-{number}-{me}").touch()
    wait_for(f"over-{number}")
    lease.release()
"""


def test_of_many_processes_that_start_at_once_exactly_one_has_the_lease(place, tmp_path):
    rounds = ROUNDS["swift" if place[1] else "local"]
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    processes = [child(CONTEND, *place, meeting, me, rounds) for me in range(CONTENDERS)]
    for number in range(rounds):
        until(lambda number=number: len(list(meeting.glob(f"here-{number}-*"))) == CONTENDERS)
        (meeting / f"go-{number}").touch()
        until(lambda number=number: len(list(meeting.glob(f"tried-{number}-*"))) == CONTENDERS)
        (meeting / f"over-{number}").touch()
    said = [line.split() for process in processes for line in process.communicate(timeout=DEADLINE_S)[0].splitlines()]
    assert [process.returncode for process in processes] == [0] * CONTENDERS
    assert len(said) == CONTENDERS * rounds
    for number in range(rounds):
        assert [word for word, round_ in said if round_ == str(number)].count("held") == 1, number
    assert list(store_at(place).list()) == []


def test_a_refusal_says_who_since_when_until_when_and_what_to_do(place):
    store = store_at(place)
    with held(store, FOLDER, "the nightly job", 30.0) as lease:
        assert lease.is_valid()
        with pytest.raises(LeaseHeld) as caught:
            Lease(store, FOLDER, "another", 30.0).acquire()
        (name,) = [info.name for info in store.list() if info.name.endswith(HELD)]
        message = str(caught.value)
        assert "\n" not in message
        for part in ("the nightly job", "since 20", "until 20", "delete", name, FOLDER):
            assert part in message
        assert len(list(store.list(FOLDER))) == 2, "the refused one leaves nothing"
    assert not lease.is_valid()
    Lease(store, FOLDER, "another", 30.0).acquire()


def test_leases_of_different_folders_have_nothing_to_do_with_each_other(uri):
    store = Store(uri)
    with held(store, "leases/a", "one", 30.0), held(store, "leases/b", "two", 30.0):
        pass


DIE = """
import os, signal, sys
from mediafm_ray.storage.lease import Lease
from mediafm_ray.storage.store import Store
Lease(Store(sys.argv[1]), "leases/x", "the one that dies", float(sys.argv[2])).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_holder_blocks_the_others_for_its_duration_and_no_longer(uri):
    store, duration_s = Store(uri), 2.0
    process = child(DIE, uri, duration_s)
    assert process.wait(DEADLINE_S) == -signal.SIGKILL
    (left,) = [info for info in store.list() if info.name.endswith(HELD)]
    with pytest.raises(LeaseHeld, match="the one that dies"):
        Lease(store, FOLDER, "the next", 30.0, clock_error_s=0.2).acquire()
    lease = Lease(store, FOLDER, "the next", 30.0, clock_error_s=0.2)
    until(lambda: acquired(lease))
    mine = store.info(f"{FOLDER}/{lease.token}{CANDIDATE}")
    tick_s = 0.01  # a file system notes times to a tick of the kernel
    assert duration_s + 0.2 - tick_s <= mine.modified - left.modified < duration_s + 5
    assert {info.name.rsplit("/", 1)[-1] for info in store.list()} == {lease.token + HELD, lease.token + CANDIDATE}


STAND_STILL = """
import os, signal, sys, time
from mediafm_ray.storage.lease import held
from mediafm_ray.storage.store import Store
with held(Store(sys.argv[1]), "leases/x", "the one that is stopped", 2.0) as lease:
    print("before", lease.is_valid(), flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    print("after", lease.is_valid(), flush=True)
    time.sleep(2)  # for its keeper to notice
    print("later", lease.is_valid(), flush=True)
"""


def test_a_holder_that_was_stopped_for_too_long_knows_that_it_has_lost(uri):
    store = Store(uri)
    process = child(STAND_STILL, uri)
    assert process.stdout.readline() == "before True\n"
    os.waitpid(process.pid, os.WUNTRACED)
    other = Lease(store, FOLDER, "the next", 30.0, clock_error_s=0.1)
    until(lambda: acquired(other))
    os.kill(process.pid, signal.SIGCONT)
    assert process.stdout.read() == "after False\nlater False\n"
    assert process.wait(DEADLINE_S) == 0
    assert other.is_valid()
    other.renew()
    assert {info.name.rsplit("/", 1)[-1] for info in store.list()} == {other.token + HELD, other.token + CANDIDATE}


def test_a_holder_that_works_longer_than_the_duration_keeps_the_lease(uri):
    store = Store(uri)
    with held(store, FOLDER, "one", 2.5) as lease:
        for _ in range(8):
            time.sleep(0.7)
            assert lease.is_valid()
            with pytest.raises(LeaseHeld):
                Lease(store, FOLDER, "two", 30.0, clock_error_s=0.1).acquire()


class FarStore:
    """A consistent store as they are: slow, with a clock of its own in coarse steps, and modification times from when a PUT begins."""

    uri = "far://store"

    def __init__(self, seed, delay_s=0.004, step_s=0.02):
        self.random, self.delay_s, self.step_s = random.Random(seed), delay_s, step_s
        self.lock, self.objects, self.fail_until = threading.Lock(), {}, 0.0

    def now(self):
        return time.monotonic() // self.step_s * self.step_s

    def wait(self):
        time.sleep(self.random.random() * self.delay_s)
        if time.monotonic() < self.fail_until:
            raise ConnectionError("the store is away")

    def write(self, name, content):
        modified = self.now()
        self.wait()
        with self.lock:
            self.objects[name] = (content, modified)
        self.wait()

    def read(self, name):
        self.wait()
        with self.lock:
            if name not in self.objects:
                raise FileNotFoundError(name)
            return self.objects[name][0]

    def list(self, prefix):
        self.wait()
        with self.lock:
            found = [ObjectInfo(name, len(content), "", modified) for name, (content, modified) in self.objects.items()]
        self.wait()
        return iter([info for info in found if info.name.startswith(prefix)])

    def delete(self, name):
        self.wait()
        with self.lock:
            self.objects.pop(name, None)


@pytest.mark.parametrize("seed", range(8))
def test_never_two_holders_on_a_slow_store_with_a_coarse_clock(seed, monkeypatch):
    monkeypatch.setattr(leases, "MEAN_POLL_S", 0.005)
    store, inside, most, taken = FarStore(seed), [], [], []

    def contend(number):
        for turn in range(6):
            lease = Lease(store, FOLDER, f"{number}-{turn}", 30.0)
            try:
                lease.acquire()
            except LeaseHeld:
                continue
            inside.append(lease.token)
            most.append(len(inside))
            time.sleep(0.003)
            most.append(len(inside))
            inside.remove(lease.token)
            taken.append(lease.token)
            lease.release()

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken
    assert max(most) == 1
    assert store.objects == {}


def test_a_store_that_is_away_for_a_while_costs_nothing_and_for_too_long_the_lease():
    store = FarStore(0, delay_s=0.0, step_s=0.001)
    with held(store, FOLDER, "one", 2.0) as lease:
        store.fail_until = time.monotonic() + 1.0
        time.sleep(2.5)
        assert lease.is_valid()
        assert store.objects[f"{FOLDER}/{lease.token}{HELD}"][1] > store.fail_until, "renewed since"
        store.fail_until = time.monotonic() + 2.8
        time.sleep(2.3)
        assert not lease.is_valid()
        time.sleep(1.2)
        assert not lease.is_valid(), "lost is lost"


def test_a_late_claim_is_withdrawn():
    """The process stood still between looking and claiming: another may have taken it for dead."""
    store = FarStore(0, delay_s=0.0, step_s=0.001)
    write = store.write

    def slow(name, content):
        if name.endswith(HELD):
            time.sleep(0.3)
        write(name, content)

    store.write = slow
    with pytest.raises(LeaseLost):
        Lease(store, FOLDER, "late", 0.2).acquire()
    assert store.objects == {}


def test_what_is_no_lease_object_counts_as_one_for_a_while(uri):
    store = Store(uri)
    store.write(f"{FOLDER}/abc{HELD}", b"not json")
    with pytest.raises(LeaseHeld, match="unknown run"):
        Lease(store, FOLDER, "one", 0.3, clock_error_s=0.1).acquire()
    time.sleep(0.5)
    Lease(store, FOLDER, "one", 0.3, clock_error_s=0.1).acquire()


def test_a_store_that_does_not_list_what_was_written_is_refused():
    store = FarStore(0)
    store.list = lambda prefix: iter([])
    with pytest.raises(StorageError, match="does not list"):
        Lease(store, FOLDER, "one", 30.0).acquire()


def test_the_objects_are_json_for_people(uri):
    store = Store(uri)
    with held(store, FOLDER, "one", 30.0):
        for info in store.list(FOLDER):
            assert json.loads(store.read(info.name)) == {"holder": "one", "duration_s": 30.0}
