"""A cache with a bound on its memory, for the threads of a server. Standard library only."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any


class BoundedCache:
    """Values by key, the least recently used of which are dropped once their sizes exceed ``limit`` together.

    A value that several threads ask for at once is made once. An error is raised to all of them and not kept.
    """

    def __init__(self, limit: int, size: Callable[[Any], int]):
        self.limit, self.size, self.total = limit, size, 0
        self.lock = threading.Lock()
        self.futures: OrderedDict[Hashable, Future[Any]] = OrderedDict()
        self.sizes: dict[Hashable, int] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value of a key, made by ``make`` where it is not there."""
        with self.lock:
            found = self.futures.get(key)
            if found is not None:
                self.futures.move_to_end(key)
            else:
                own: Future[Any] = Future()
                self.futures[key] = own
        if found is not None:
            return found.result()
        try:
            value = make()
        except BaseException as error:
            with self.lock:
                del self.futures[key]
            own.set_exception(error)
            raise
        own.set_result(value)
        with self.lock:
            self.sizes[key] = self.size(value)
            self.total += self.sizes[key]
            for oldest in list(self.futures):
                if self.total <= self.limit:
                    break
                if oldest in self.sizes:  # Others are still being made.
                    del self.futures[oldest]
                    self.total -= self.sizes.pop(oldest)
        return value

    def peek(self, key: Hashable) -> Any:
        """Return the value of a key, or None where it is not there."""
        with self.lock:
            found = self.futures.get(key)
            if found is not None:
                self.futures.move_to_end(key)
        return None if found is None else found.result()
