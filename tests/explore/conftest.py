"""The made catalog, once for all tests of this folder."""

import pytest

from tests.explore.made import client_of, config_of, make_indexes, make_output


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with videos/, out/ and index/."""
    folder = tmp_path_factory.mktemp("explore")
    make_output(folder)
    make_indexes(folder)
    return folder


@pytest.fixture(scope="session")
def client(root):
    return client_of(config_of(root))
