"""Fixtures that tests of several folders share, and one torch thread a process: the tests' processes have more than the cores together."""

import os

from tests.servers.fixtures import moto, proxy, punctual_swift, s3_keys, swift  # noqa: F401

os.environ.setdefault("OMP_NUM_THREADS", "1")  # Before torch is imported; tests of threads set their own number.
