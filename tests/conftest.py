"""Fixtures that tests of several folders share."""

from tests.servers.fixtures import moto, proxy, punctual_swift, s3_keys, swift  # noqa: F401
