"""Work in several processes, with errors, warnings and kills."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from mediafm_ray.storage.errors import StorageError
from mediafm_ray.storage.workers import MIN_ROWS, Workers

PARENT = """
import sys
from mediafm_ray.storage.workers import MIN_ROWS, Workers
from tests.storage.test_workers import sleep

if __name__ == "__main__":
    with Workers() as workers:
        print(*workers.map(sleep, [0.0, 60.0], MIN_ROWS))
"""


def square(number):
    return number * number, os.getpid()


def fail(number):
    if number == 3:
        try:
            raise PermissionError(13, "no")
        except PermissionError as error:
            raise StorageError("shard 3 cannot be listed") from error
    return number


def warn(number):
    logging.getLogger("mediafm_ray.storage").warning("number %d of %s", number, {"of": 4})
    return number


def die(pair):
    number, parent = pair
    if number == 3 and os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep(seconds):
    time.sleep(seconds)
    print(os.getpid(), flush=True)


def test_results_come_in_order_from_several_processes_and_few_rows_stay_here():
    with Workers() as workers:
        found = list(workers.map(square, range(40), MIN_ROWS))
        few = list(workers.map(square, range(3), MIN_ROWS - 1))
    assert [number for number, _ in found] == [number * number for number in range(40)]
    assert os.getpid() not in {process for _, process in found}
    assert few == [(0, os.getpid()), (1, os.getpid()), (4, os.getpid())]


def test_an_error_is_raised_here_with_its_cause():
    with Workers() as workers:
        found = workers.map(fail, range(6), MIN_ROWS)
        assert [next(found) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(StorageError, match="shard 3") as caught:
            next(found)
    assert isinstance(caught.value.__cause__, PermissionError)


def test_warnings_are_logged_here(caplog):
    with Workers() as workers:
        assert list(workers.map(warn, range(4), MIN_ROWS)) == [0, 1, 2, 3]
    assert [record.getMessage() for record in caplog.records] == [f"number {number} of {{'of': 4}}" for number in range(4)]


def test_what_a_killed_process_had_to_do_is_done_here():
    with Workers() as workers:
        assert list(workers.map(die, [(number, os.getpid()) for number in range(8)], MIN_ROWS)) == list(range(8))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_parent(tmp_path, sent):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline()
    parent.send_signal(sent)
    _, errors = parent.communicate(timeout=30)  # Until all processes have ended, because they have the same output; one sleeps for 60 s.
    assert errors.count("Traceback") == (sent == signal.SIGINT)
