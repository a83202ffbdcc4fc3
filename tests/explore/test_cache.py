"""The bounded cache of the server's threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mediafm_ray.explore.cache import BoundedCache


def test_the_least_recently_used_values_are_dropped():
    cache, made = BoundedCache(10, len), []

    def get(key):
        return cache.get(key, lambda: made.append(key) or key * 4)

    for key in "abacab":
        assert get(key) == key * 4
    assert made == ["a", "b", "c", "b"]  # c took the place of b, which was used before a
    assert cache.total <= 10
    assert cache.peek("c") is None


def test_several_threads_share_one_making():
    cache, made, begun = BoundedCache(100, len), [], threading.Event()

    def make():
        made.append(1)
        begun.wait(5)
        return "value"

    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(cache.get, "key", make) for _ in range(8)]
        begun.set()
        assert {one.result() for one in found} == {"value"}
    assert made == [1]


def test_an_error_is_not_kept():
    cache = BoundedCache(100, len)
    with pytest.raises(OSError, match="gone"):
        cache.get("key", lambda: (_ for _ in ()).throw(OSError("gone")))
    assert cache.get("key", lambda: "back") == "back"
