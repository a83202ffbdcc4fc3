"""A lease with one holder at a time, kept as objects in a store that offers only PUT, GET, LIST and DELETE.

    <folder>/<token>.candidate.json     written by every contender for the lease, before it lists the others
    <folder>/<token>.held.json          written by the holder, and written again with every renewal

Conditional PUTs would be shorter, but some stores refuse them or implement them with races. The protocol of a contender, which has
a token of its own:

    1. Write the candidate, then list. Without a living object of another contender, write the held object: the lease is taken.
    2. If another one holds the lease, or is an earlier candidate (by the store's time, then by token), withdraw: the lease is refused.
    3. If there are only later candidates, list again: each of them either sees this one and withdraws, or did not see it and holds.

Two contenders never both hold the lease: each wrote its candidate before it listed and saw nobody. The one whose PUT ended later
listed after both PUTs had ended, so it saw the other. This needs read-after-write consistency of PUT and LIST, but no clock.

An object is dead once it is older than its own duration plus ``CLOCK_ERROR_S``. Ages are differences of modification times that
the *store* gave, so the clocks of the contenders' machines do not matter. A holder measures its duration on its own steady
clock, from before the PUT that began it, and regards its lease as over before another may regard it as dead. A holder that was late
(stopped, suspended, disconnected) has lost the lease and raises LeaseLost.

Guaranteed: at most one holder, as long as the store is consistent, the modification times of one store agree within
``CLOCK_ERROR_S``, and clocks run at the same speed. A crashed holder blocks the others for its duration and no longer. Not guaranteed:
a holder that is stopped between two of its instructions acts on an outdated check. The datasets do not depend on it: objects are
named by their content, so at worst two jobs write the same bytes twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from mediafm_ray.spec import parse_json
from mediafm_ray.storage.store import ObjectInfo, StorageError, Store

log = logging.getLogger(__name__)

CANDIDATE = ".candidate.json"
HELD = ".held.json"
CLOCK_ERROR_S = 5.0  # A store may have several machines, and modification times in whole seconds.
MAX_CONTENTION_S = 20.0  # wait for later candidates, which neither hold the lease nor withdraw
MEAN_POLL_S = 0.2
RENEWALS_PER_DURATION = 3
RETRIES_PER_RENEWAL = 10


class LeaseHeld(StorageError):
    """Raised when another run has the lease. The message says which, since and until when, and what to do."""


class LeaseLost(StorageError):
    """Raised when the lease could not be renewed in time: another run may have it."""


_LEASES: set[Lease] = set()  # the leases that this process has or is about to take


def release_all() -> None:
    """Release every lease of this process before it exits. A signal may come before or after the block that would release one."""
    for lease in tuple(_LEASES):
        lease.release()


@dataclass(frozen=True)
class Rival:
    """Another contender according to the listing."""

    token: str
    holds: bool
    since: float  # modification time of its candidate, or of its only object, seconds since the epoch
    seen: float  # modification time of its newest object
    duration_s: float
    holder: str
    names: tuple[str, ...]

    def is_alive(self, now: float, clock_error_s: float) -> bool:
        """Return True if the contender may still be running at ``now``, a time of the store."""
        return now <= self.seen + self.duration_s + clock_error_s


class Lease:
    """One contender for the lease on a folder of a store. ``duration_s``: the time for which a crashed holder blocks others.

    Use it through ``held``. ``clock_error_s`` may be smaller only on a store with exact modification times.
    """

    def __init__(self, store: Store, folder: str, holder: str, duration_s: float, clock_error_s: float = CLOCK_ERROR_S):
        self.store, self.folder, self.duration_s, self.clock_error_s = store, folder.rstrip("/"), duration_s, clock_error_s
        self.token = secrets.token_hex(8)
        self.content = (json.dumps({"holder": holder, "duration_s": duration_s}) + "\n").encode()
        self.valid_until = float("-inf")  # a time of steady_clock()
        self.store_ahead_s = 0.0  # the store's time minus steady_clock()
        self.lost = False

    def acquire(self) -> None:
        """Take the lease. Raises LeaseHeld where another has it or is about to take it, and errors of the store."""
        begun = steady_clock()
        _LEASES.add(self)
        try:
            self.store.write(self._name(CANDIDATE), self.content)
            dead = self._wait_for_rivals(put_at=steady_clock())
            self.valid_until = begun + self.duration_s
            self._write_held()
            for name in [name for rival in dead for name in rival.names]:
                self.store.delete(name)
        except BaseException:
            self.release()
            raise

    def renew(self) -> None:
        """Start the duration again. Raises LeaseLost where it is over already, and errors of the store."""
        begun = steady_clock()
        self._write_held()
        self.valid_until = begun + self.duration_s

    def release(self) -> None:
        """Give the lease back, so that the next run need not wait until it expires."""
        self.valid_until = float("-inf")
        self._withdraw()
        _LEASES.discard(self)

    def is_valid(self) -> bool:
        """Return True if no other run can have the lease."""
        return not self.lost and steady_clock() < self.valid_until

    def store_time(self) -> float:
        """Return the store's present time, in seconds since its epoch, by this machine's steady clock since the lease was taken."""
        return steady_clock() + self.store_ahead_s

    def _wait_for_rivals(self, put_at: float) -> list[Rival]:
        """Wait until no rival is alive; return the dead ones. Raises LeaseHeld."""
        while True:
            mine, rivals = self._list_contenders()
            self.store_ahead_s = mine.modified - put_at
            waited_s = steady_clock() - put_at
            living = [rival for rival in rivals if rival.is_alive(mine.modified + waited_s, self.clock_error_s)]
            if not living:
                return rivals
            first = min(living, key=lambda rival: (not rival.holds, rival.since, rival.token))
            if first.holds or (first.since, first.token) < (mine.modified, self.token) or waited_s > MAX_CONTENTION_S:
                raise LeaseHeld(self._refusal(first))
            time.sleep(MEAN_POLL_S * 2 * random.random())

    def _list_contenders(self) -> tuple[ObjectInfo, list[Rival]]:
        """Return this contender's candidate and all rivals, dead or alive."""
        found: dict[str, dict[str, ObjectInfo]] = {}
        for info in self.store.list(self.folder):
            name = info.name.rsplit("/", 1)[-1]
            for kind in (CANDIDATE, HELD):
                if name.endswith(kind):
                    found.setdefault(name.removesuffix(kind), {})[kind] = info
        mine = found.pop(self.token, {})
        if CANDIDATE not in mine:
            raise StorageError(
                f"{self.store.uri} does not list {self._name(CANDIDATE)}, which was just written: without that no lease can be kept "
                "(check that the store is consistent and that this user may list it)"
            )
        return mine[CANDIDATE], [rival for token, objects in found.items() if (rival := self._rival(token, objects))]

    def _rival(self, token: str, objects: dict[str, ObjectInfo]) -> Rival | None:
        newest = max(objects.values(), key=lambda info: info.modified)
        holder, duration_s = "an unknown run", self.duration_s
        try:
            content = parse_json(self.store.read(newest.name))
            holder, duration_s = str(content["holder"]), float(content["duration_s"])
        except FileNotFoundError:  # The rival has withdrawn meanwhile.
            return None
        except (ValueError, KeyError, TypeError, OverflowError):
            log.warning("%s is not a lease object; it is taken for one of this run's duration", newest.name)
        since = objects.get(CANDIDATE, newest).modified
        names = tuple(info.name for info in objects.values())
        return Rival(token, HELD in objects, since, newest.modified, duration_s, holder, names)

    def _refusal(self, rival: Rival) -> str:
        doing = "holds" if rival.holds else "is taking"
        return (
            f"{rival.holder} {doing} the lease {self.store.uri}/{self.folder}, since {_utc(rival.since)}, until "
            f"{_utc(rival.seen + rival.duration_s)} unless it is renewed: wait for that run to end; if it is dead, wait until "
            f"then, or delete {', '.join(rival.names)}"
        )

    def _write_held(self) -> None:
        """Write the held object, while no rival can regard this contender as dead. Raises LeaseLost after that."""
        if steady_clock() < self.valid_until:
            self.store.write(self._name(HELD), self.content)
            if steady_clock() < self.valid_until:
                return
        self.lost = True
        self._withdraw()
        raise LeaseLost(f"the lease {self.store.uri}/{self.folder} could not be kept: the store or this process was stopped for too long")

    def _withdraw(self) -> None:
        for kind in (HELD, CANDIDATE):
            try:
                self.store.delete(self._name(kind))
            except Exception as error:  # The object expires.
                log.warning("%s could not be removed (%s); it expires", self._name(kind), error)

    def _name(self, kind: str) -> str:
        return f"{self.folder}/{self.token}{kind}"


@contextlib.contextmanager
def held(store: Store, folder: str, holder: str, duration_s: float) -> Iterator[Lease]:
    """Hold the lease on a folder, which a thread renews until the end of the block. Raises LeaseHeld."""
    lease = Lease(store, folder, holder, duration_s)
    lease.acquire()
    over = threading.Event()
    keeper = threading.Thread(target=_keep, args=(lease, over), name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        over.set()
        keeper.join()  # A renewal after the release would leave an object behind.
        lease.release()


def _keep(lease: Lease, over: threading.Event) -> None:
    """Renew a lease until it is over or lost."""
    between_s = lease.duration_s / RENEWALS_PER_DURATION
    wait_s = between_s
    while not over.wait(wait_s):
        try:
            lease.renew()
            wait_s = between_s
        except LeaseLost as error:
            log.error("%s", error)
            return
        except Exception as error:  # fsspec's implementations raise many types, and there is time to retry.
            log.warning("the lease %s could not be renewed, trying again: %s: %s", lease.folder, type(error).__name__, error)
            wait_s = between_s / RETRIES_PER_RENEWAL


def steady_clock() -> float:
    """Return seconds of a clock that is never set and, where the system has one, runs while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
