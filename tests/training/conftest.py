"""Fixtures of the tests that train."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks on a busy machine: several threads would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
