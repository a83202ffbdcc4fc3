"""One at a time: a lease on a name, kept in objects of a store that knows only PUT, GET, LIST and DELETE.

    <folder>/<token>.candidate.json     put by everyone who wants the lease, before it looks who else does
    <folder>/<token>.held.json          put by the one who has it, and put again and again while it has

Conditional PUTs would be shorter, and are racy or refused on some stores. The protocol, for a contender with a token of its own:

    1. Put the candidate. List. No living object of anyone else: put the held object; the lease is ours.
    2. Somebody holds it, or is an earlier candidate (by the store's time, then by token): withdraw; the lease is refused.
    3. Only later candidates are there: they see us and withdraw, or did not see us and hold. Look again until one of the two is so.

Why two never hold it: each put its candidate before it listed and saw nobody. The one whose PUT ended later listed after both
PUTs had ended, so it saw the other. This needs read-after-write consistency of PUT and LIST, and no clock.

An object is dead once it is older than its own duration plus ``CLOCK_ERROR_S``. Ages are differences of modification times that
the *store* gave, so the clocks of the contenders' machines do not matter. A holder measures its duration on its own steady
clock, from before the PUT that began it, and stops believing before any other may call it dead; if it then finds that it
was late (stopped, suspended, cut off), it has lost the lease and says so.

What that guarantees: at most one holder, as long as the store is consistent, the modification times of one store agree within
``CLOCK_ERROR_S``, and clocks run at the same speed. A crashed holder blocks the others for its duration and no longer. What it
does not: a holder that is stopped between two of its instructions acts on what it believed before. The datasets do not depend
on it: objects are named by what they hold, so two jobs at once write the same bytes twice, at worst.
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
CLOCK_ERROR_S = 5.0  # stores of several machines; modification times in whole seconds
CONTEND_S = 20.0  # the longest that others may be in the way without holding the lease
LOOK_AGAIN_S = 0.2  # on average
RENEWALS = 3  # of a duration
RETRIES = 10  # of a renewal, in the time between two renewals


class LeaseHeld(StorageError):
    """Someone else has the lease; the message says who, since and until when, and what to do."""


class LeaseLost(StorageError):
    """The lease could not be renewed in time: another may have it."""


_TAKEN: set[Lease] = set()  # the leases that this process has, or is taking


def release_all() -> None:
    """Give back every lease of this process, for its end: where a signal came too soon or too late for the block that holds one."""
    for lease in tuple(_TAKEN):
        lease.release()


@dataclass(frozen=True)
class Rival:
    """Another contender, as the listing shows it."""

    token: str
    holds: bool
    since: float  # the store's time of its candidate (or first known) object, seconds since the epoch
    seen: float  # the store's time of its last object
    duration_s: float
    holder: str
    names: tuple[str, ...]

    def lives(self, now: float, clock_error_s: float) -> bool:
        """Whether it may still be at work at a time of the store."""
        return now <= self.seen + self.duration_s + clock_error_s


class Lease:
    """One contender for the lease on a folder of a store. ``duration_s``: how long it outlives a crash.

    ``held`` is the usual way to use it. ``clock_error_s`` is smaller only on stores known to be exact.
    """

    def __init__(self, store: Store, folder: str, holder: str, duration_s: float, clock_error_s: float = CLOCK_ERROR_S):
        self.store, self.folder, self.duration_s, self.clock_error_s = store, folder.rstrip("/"), duration_s, clock_error_s
        self.token = secrets.token_hex(8)
        self.content = (json.dumps({"holder": holder, "duration_s": duration_s}) + "\n").encode()
        self.valid_until = float("-inf")  # of steady_clock()
        self.lost = False

    def acquire(self) -> None:
        """Take the lease. Raises LeaseHeld when someone else has it or is about to, and what the store raises."""
        begun = steady_clock()
        _TAKEN.add(self)
        try:
            self.store.write(self._name(CANDIDATE), self.content)
            dead = self._stand_alone(put_at=steady_clock())
            self.valid_until = begun + self.duration_s
            self._claim()
            for name in [name for rival in dead for name in rival.names]:
                self.store.delete(name)
        except BaseException:
            self.release()
            raise

    def renew(self) -> None:
        """Begin the duration anew. Raises LeaseLost when it is over already, and what the store raises."""
        begun = steady_clock()
        self._claim()
        self.valid_until = begun + self.duration_s

    def release(self) -> None:
        """Give the lease back, so that the next one need not wait."""
        self.valid_until = float("-inf")
        self._withdraw()
        _TAKEN.discard(self)

    def is_valid(self) -> bool:
        """Whether nobody else can have the lease."""
        return not self.lost and steady_clock() < self.valid_until

    def _stand_alone(self, put_at: float) -> list[Rival]:
        """Wait until no living rival is left; the dead ones. Raises LeaseHeld."""
        while True:
            mine, rivals = self._look()
            waited_s = steady_clock() - put_at
            living = [rival for rival in rivals if rival.lives(mine.modified + waited_s, self.clock_error_s)]
            if not living:
                return rivals
            first = min(living, key=lambda rival: (not rival.holds, rival.since, rival.token))
            if first.holds or (first.since, first.token) < (mine.modified, self.token) or waited_s > CONTEND_S:
                raise LeaseHeld(self._refusal(first))
            time.sleep(LOOK_AGAIN_S * 2 * random.random())

    def _look(self) -> tuple[ObjectInfo, list[Rival]]:
        """This contender's candidate, and everyone else's objects, dead or alive."""
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
                "(is the store consistent, and may this user list it?)"
            )
        return mine[CANDIDATE], [rival for token, objects in found.items() if (rival := self._rival(token, objects))]

    def _rival(self, token: str, objects: dict[str, ObjectInfo]) -> Rival | None:
        newest = max(objects.values(), key=lambda info: info.modified)
        holder, duration_s = "an unknown run", self.duration_s
        try:
            content = parse_json(self.store.read(newest.name))
            holder, duration_s = str(content["holder"]), float(content["duration_s"])
        except FileNotFoundError:  # withdrawn meanwhile
            return None
        except (ValueError, KeyError, TypeError, OverflowError):
            log.warning("%s is no lease object; it counts as one of this run's duration", newest.name)
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

    def _claim(self) -> None:
        """Put the held object, while nobody can yet have taken this contender for dead."""
        if steady_clock() < self.valid_until:
            self.store.write(self._name(HELD), self.content)
            if steady_clock() < self.valid_until:
                return
        self.lost = True
        self._withdraw()
        raise LeaseLost(f"the lease {self.store.uri}/{self.folder} could not be kept: the store, or this process, stood still for too long")

    def _withdraw(self) -> None:
        for kind in (HELD, CANDIDATE):
            try:
                self.store.delete(self._name(kind))
            except Exception as error:  # what is left dies of age
                log.warning("%s could not be removed (%s); it expires by itself", self._name(kind), error)

    def _name(self, kind: str) -> str:
        return f"{self.folder}/{self.token}{kind}"


@contextlib.contextmanager
def held(store: Store, folder: str, holder: str, duration_s: float) -> Iterator[Lease]:
    """The lease on a folder, renewed by a thread until the end of the block. Raises LeaseHeld."""
    lease = Lease(store, folder, holder, duration_s)
    lease.acquire()
    over = threading.Event()
    keeper = threading.Thread(target=_keep, args=(lease, over), name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        over.set()
        keeper.join()  # a renewal after the release would leave an object behind
        lease.release()


def _keep(lease: Lease, over: threading.Event) -> None:
    """Renew a lease until it is over or lost."""
    between_s = lease.duration_s / RENEWALS
    wait_s = between_s
    while not over.wait(wait_s):
        try:
            lease.renew()
            wait_s = between_s
        except LeaseLost as error:
            log.error("%s", error)
            return
        except Exception as error:  # fsspec implementations raise many kinds; there is time to try again
            log.warning("the lease %s could not be renewed, trying again: %s: %s", lease.folder, type(error).__name__, error)
            wait_s = between_s / RETRIES


def steady_clock() -> float:
    """Seconds on a clock that nobody sets, and that goes on while the machine sleeps, where the system has one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
