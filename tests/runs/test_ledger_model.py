"""A model of the ledger: any order of replaced, removed and unknown videos, kills, failures, outages and jobs at once.

The jobs are the real plan, the real preparation of the output and the real writer over the real local store; what stands before the writer
is left out. A job runs in a thread of its own and stops before each of its calls of the store, so that it can be killed there, or another
job can go on. Objects may be of the same second, as they are on object storage, but where jobs meet.

The default run takes half a minute; ``LEDGER_EXAMPLES=10000 pytest -m slow tests/runs/test_ledger_model.py`` as long as it is told to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import queue
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from mediafm_ray.config.jobs import BackfillCatalogConfig, EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.errors import OutageError, TitleError
from mediafm_ray.models.options import FusionConfig
from mediafm_ray.pipeline.rows import FAILED, OK, SKIPPED, TitleRow, failed
from mediafm_ray.pipeline.stages import Fuse
from mediafm_ray.pipeline.write_title import WriteTitle
from mediafm_ray.runs import backfill, plan
from mediafm_ray.storage import catalog, compaction
from mediafm_ray.storage.catalog import CatalogError, read_catalog
from mediafm_ray.storage.compaction import compact_shard, present_shards
from mediafm_ray.storage.dataset import EmbeddingDataset, newest_objects, parse_failure, title_facts
from mediafm_ray.storage.names import FAILURES, SHOTS, encode_title, object_key
from mediafm_ray.storage.store import StorageError, Store
from tests.datasets import MODEL, finished_row

TITLES = ("a", "b/c d")
CHECKPOINT = plan.BUILTIN_DATASET.removeprefix("contextual-")
FAULTS = {
    "own": TitleError("it is bad"),
    "outage": OutageError("the API is down"),
}
LATE = 1e12  # seconds since the epoch: whatever failed is due
EMBED, BACKFILL, DELETING = "embed", "backfill", "backfill that deletes"
COMPACT = "compaction"
MAX_CALLS = 14  # of the store by one job, about

SETTINGS = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
LONG = settings(SETTINGS, max_examples=int(os.environ.get("LEDGER_EXAMPLES", "1000")), stateful_step_count=50, derandomize=False)

MANY = ["backfill.max_attempts=1000000", "backfill.max_delete_fraction=1"]
CONFIGS = {
    EMBED: read_config(EmbedCatalogConfig, [], []),
    BACKFILL: read_config(BackfillCatalogConfig, [], MANY),
    DELETING: read_config(BackfillCatalogConfig, [], [*MANY, "backfill.delete_missing=true"]),
}

titles = st.sampled_from(TITLES)
versions = st.sampled_from([0, 1, 0, 1, 2])  # of a video
changes = st.dictionaries(titles, versions, min_size=1, max_size=2)  # of videos
kinds = st.sampled_from([EMBED, BACKFILL, DELETING])
faults = st.just({}) | st.dictionaries(titles, st.sampled_from(["own", "own", "outage", SKIPPED]), min_size=1, max_size=2)


class OnlyOne:
    """The lease of a compaction where there is no other."""

    def is_valid(self) -> bool:
        return True

    def store_time(self) -> float:
        return LATE


class Killed(BaseException):
    """The process of the job is gone."""


class Job:
    """One job in a thread that stops before each call of the store until it is told to go on."""

    def __init__(self, ledger: Ledger, kind: str, faults: dict[str, str]):
        self.ledger, self.kind, self.faults = ledger, kind, faults
        self.said: queue.Queue[str] = queue.Queue()
        self.told: queue.Queue[str] = queue.Queue()
        self.dead = False
        self.ended = False
        self.error: BaseException | None = None
        self.planned = self.is_calling = False
        self.gone: set[str] = set()  # encoded titles that it may delete
        self.thread = threading.Thread(target=self._run, daemon=True)
        ledger.met |= bool(ledger.jobs)
        self.thread.start()
        assert self.said.get() == "stopped"

    def go_on(self, calls: int, command: str = "go on") -> None:
        """Do so many calls of the store, or all that are left."""
        self.ledger.running = self
        while calls and not self.ended:
            calls -= 1
            self.told.put(command)
            self.ended = self.said.get() == "ended"
        self.ledger.running = None
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        self.go_on(10_000)
        assert self.ended

    def kill(self, after: bool = False) -> None:
        """The process ends before, or just after the call at which it stopped."""
        self.go_on(1, "do it and die" if after else "die")
        assert self.ended

    def stop(self) -> str:
        """Called by whichever thread of the job is about to call the store."""
        if self.dead:
            raise Killed
        self.said.put("stopped")
        command = self.told.get()
        self.dead = command != "go on"
        if command == "die":
            raise Killed
        return command

    def _run(self) -> None:
        try:
            self.stop()
            self.ledger.body(self)
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.said.put("ended")


class Ledger(RuleBasedStateMachine):
    """Videos, one output, and jobs that may be at work at once."""

    current: Ledger

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ledger-"))
        (self.root / "videos").mkdir()
        self.configs = {
            kind: dataclasses.replace(
                config,
                catalog=dataclasses.replace(config.catalog, uri=f"{self.root}/videos"),
                output=dataclasses.replace(config.output, uri=f"{self.root}/out"),
            )
            for kind, config in CONFIGS.items()
        }
        self.out = self.root / "out" / MODEL.dataset_version
        self.running: Job | None = None
        self.jobs: list[Job] = []
        self.met = False  # whether jobs were ever at work at once
        self.clock, self.ticks = 1_000_000_000, True
        self.forgotten: dict[str, tuple[str, bool]] = {}  # title -> why it cannot be looked at, and whether that may pass
        self.committed: set[str] = set()  # encoded titles that had shots and must have some for ever
        self.own_faults: Counter[tuple[str, str]] = Counter()
        self.versions: dict[str, int] = {}  # of the videos
        self.changes = 0
        Ledger.current = self

    def teardown(self) -> None:
        for job in self.jobs:
            with contextlib.suppress(Exception):
                job.kill()
        shutil.rmtree(self.root)

    # ----------------------------------------------------------------------------------------------- what a job does

    def body(self, job: Job) -> None:
        """A job as jobs.embed_catalog and jobs.backfill_catalog order it."""
        if job.kind == COMPACT:
            self.compact(job)
            return
        config, changes = self.configs[job.kind], self.changes
        if job.kind == EMBED:
            made, missing = plan.make_plan(config), None
        else:
            planned = backfill.plan_backfill(config, MODEL, LATE)
            made, missing = planned.plan, planned.missing
            if changes == self.changes:
                assert not set(missing.titles) & {encode_title(title) for title in self.videos()}, "what is there counts as gone"
        job.planned = True
        plan.prepare_output(made, config)
        if job.kind == DELETING:
            job.gone = set(missing.titles)
            backfill.delete_missing(missing, plan.Output(config.output.uri, MODEL.dataset_version, config.storage))
        stages = [Fuse(MODEL.dims["fused"], FusionConfig()), WriteTitle(config.output.uri, MODEL, made.checkpoint, config.storage)]
        for index in range(made.pending.num_rows):
            planned_row = made.pending.slice(index, 1)
            title = TitleRow(planned_row)
            row = finished_row(planned_row, MODEL, [10, 10], made.checkpoint)
            if fault := job.faults.get(title.title_id):
                column = row.column_names.index("outcome"), "outcome", pa.array([SKIPPED])
                row = row.set_column(*column) if fault == SKIPPED else failed(row, "detect_shots", FAULTS[fault])
                self.own_faults[encode_title(title.title_id), title["source"]] += fault == "own"
            for stage in stages:
                row = stage(row)
            outcome = row["outcome"][0].as_py()
            assert outcome == (OK if fault is None else SKIPPED if fault == SKIPPED else FAILED), row["error"]

    def compact(self, job: Job) -> None:
        """A compaction as jobs.compact_dataset orders it. Its lease, which is tested elsewhere, is the rule that there is only one."""
        job.planned = True
        dataset = EmbeddingDataset(f"{self.root}/out")
        for name in dataset.names():
            for shard in present_shards(dataset, name):
                compact_shard(dataset, name, shard, OnlyOne())

    def call(self, method: str, real, store: Store, arguments: tuple) -> object:
        """A call of the store by a job."""
        job = self.running
        if job is None or not str(store.root).startswith(f"{self.root}/out"):
            return real(store, *arguments)
        if job.is_calling or str(arguments[:1]).startswith("('.partial") or (method == "read" and "shard=" not in str(arguments[0])):
            return real(store, *arguments)
        command = job.stop()
        job.is_calling = True  # what the call calls is no call of its own
        try:
            result = real(store, *arguments)
            if method == "list":
                result = iter(list(result))
            name = f"{store.root}/{arguments[0]}" if arguments else ""
            if method == "write":
                self.clock += self.ticks or bool(self.jobs)
                os.utime(name, (self.clock, self.clock))
            if method not in ("list", "read") and Path(name).is_relative_to(self.out) and "shard=" in name:
                try:
                    self.check_call(method, str(Path(name).relative_to(self.out)), job)
                except AssertionError as error:  # what the writer catches is not seen by anybody else
                    job.error = error
        finally:
            job.is_calling = False
        if command != "go on":
            raise Killed
        return result

    def check_call(self, method: str, name: str, job: Job) -> None:
        """No title is lost, and no attempt is counted that was none."""
        listed = Counter(title for title, _ in plan.Output(f"{self.root}/out", MODEL.dataset_version).list(SHOTS))
        for title in self.committed - set(listed):
            assert title in job.gone, f"{title} is lost: the {job.kind} job has done {method} {name}"
            self.committed.discard(title)
        if name.startswith("compacted/"):
            return
        dataset, (title, source) = name.split("/")[0], object_key(name)
        if dataset == SHOTS and method == "write":
            self.committed.add(title)
        if dataset == FAILURES and method == "write":
            assert parse_failure((self.out / name).read_bytes())["attempts"] <= self.own_faults[title, source], name

    # --------------------------------------------------------------------------------------------------------- rules

    def videos(self) -> set[str]:
        return {str(path.relative_to(self.root / "videos").with_suffix("")) for path in (self.root / "videos").rglob("*.mp4")}

    def tree(self) -> dict[str, tuple[bytes, int]]:
        paths = (path for path in (self.root / "out").rglob("*") if path.is_file())
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    def put(self, changes: dict[str, int]) -> None:
        """New videos, others in their place, or earlier ones again."""
        for title, version in changes.items():
            path = self.root / "videos" / f"{title}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"v" * (version + 1))
            os.utime(path, (version, version))
            self.versions[title] = version
            self.changes += 1

    @initialize(committed=st.booleans())
    def start(self, committed: bool) -> None:
        """A catalog, which may be embedded already."""
        self.put(dict.fromkeys(TITLES, 0))
        if committed:
            self.run_whole({}, EMBED, {}, True)

    @precondition(lambda self: len(self.videos()) > 1)
    @rule(title=titles)
    def remove(self, title: str) -> None:
        (self.root / "videos" / f"{title}.mp4").unlink(missing_ok=True)
        self.versions.pop(title, None)
        self.changes += 1

    @precondition(lambda self: not self.forgotten)
    @rule(title=titles, reason=st.sampled_from([("forbidden", False), ("the server answers 503", True)]))
    def forget(self, title: str, reason: tuple[str, bool]) -> None:
        """The source of a title cannot be looked at."""
        self.forgotten[title] = reason
        self.changes += 1

    @precondition(lambda self: self.forgotten)
    @rule()
    def remember(self) -> None:
        """... can be looked at again."""
        self.forgotten.clear()
        self.changes += 1

    @rule(kind=kinds)
    def cannot_list(self, kind: str) -> None:
        """A folder that cannot be read ends the job before it has changed anything."""
        before, real = self.tree(), os.scandir

        def scandir(path: str):
            if str(path).startswith(f"{self.root}/videos"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "scandir", scandir)
            job = Job(self, kind, {})
            with pytest.raises(StorageError, match="permission denied"):
                job.finish()
        assert self.tree() == before

    @rule(changes=changes | st.just({}), kind=kinds, faults=faults, ticks=st.booleans())
    def run_whole(self, changes: dict[str, int], kind: str, faults: dict[str, str], ticks: bool) -> None:
        """One job from its beginning to its end; where it is the only one, all is as it must be."""
        self.put(changes)
        self.ticks = ticks
        before = self.tree()
        job = Job(self, kind, faults)
        if not self.videos():
            with pytest.raises(CatalogError):
                job.finish()
            assert self.tree() == before
            return
        job.finish()
        if not self.jobs:
            self.check_end(job, before)

    @rule(
        changes=changes,
        kind=kinds,
        ticks=st.booleans(),
        calls=st.integers(1, MAX_CALLS),
        after=st.booleans(),
        failed=st.booleans(),
        then=st.sampled_from(["nothing", "the same again", "the videos before"]),
    )
    def run_killed(self, changes: dict[str, int], kind: str, ticks: bool, calls: int, after: bool, failed: bool, then: str) -> None:
        """One job that is killed at some call of the store, perhaps on titles that failed before, and what may come next."""
        earlier = dict(self.versions)
        self.put(changes)
        if failed:
            self.run_whole({}, kind, dict.fromkeys(changes, "own"), ticks)
        self.ticks = ticks
        job = Job(self, kind, {})
        with self.among_others():
            job.go_on(calls)
            job.kill(after)
        if then != "nothing":
            self.run_whole(earlier if then == "the videos before" else {}, kind, {}, ticks)

    @precondition(lambda self: not self.jobs)
    @rule(
        first=changes,
        second=changes,
        ours=kinds,
        theirs=kinds,
        lead=st.integers(0, 8),
        order=st.permutations([0, 0, 0, 1, 1, 1]),
        calls=st.integers(1, 8),
    )
    def run_two(
        self, first: dict[str, int], second: dict[str, int], ours: str, theirs: str, lead: int, order: list[int], calls: int
    ) -> None:
        """Two jobs, each planned for a catalog of its own, the second while the first is at work; then they run by turns."""
        for videos, kind in ((first, ours), (second, theirs)):
            self.put(videos)
            job = Job(self, kind, {})
            self.jobs.append(job)
            while not job.planned:
                job.go_on(1)
            if len(self.jobs) == 1:
                self.go_on(0, lead)
                if not self.jobs:
                    return
        jobs = list(self.jobs)
        for number in [*order, *order[:2]]:
            if jobs[number] in self.jobs:
                self.go_on(-1 - self.jobs.index(jobs[number]), calls)
        self.end_all()
        self.run_whole({}, ours, {}, True)

    @precondition(lambda self: COMPACT not in {job.kind for job in self.jobs})
    @rule(calls=st.integers(1, 60), then=st.sampled_from(["go on later", "kill before", "kill after", "end", "end"]))
    def compact_titles(self, calls: int, then: str) -> None:
        """A compaction, whole, killed, or to be gone on with while jobs run."""
        if not (self.out / "model.json").exists():
            return
        before = {} if self.jobs else self.titles_listed()
        job = Job(self, COMPACT, {})
        with self.among_others():
            job.go_on(10_000 if then == "end" else calls)
            if then.startswith("kill") and not job.ended:
                job.kill(then == "kill after")
        if not job.ended:
            self.jobs.append(job)
        if not self.jobs or self.jobs == [job]:
            assert not before or self.titles_listed() == before, "a compaction has changed what there is"

    def titles_listed(self) -> dict[str, set[tuple[str, str]]]:
        """The titles and sources of every dataset."""
        output = plan.Output(f"{self.root}/out", MODEL.dataset_version)
        return {name: set(output.list(name)) for name in output.datasets()}

    @precondition(lambda self: self.jobs)
    @rule()
    def end_all(self) -> None:
        """The jobs end, the last to begin first."""
        while self.jobs:
            self.go_on(0, 1000)

    @precondition(lambda self: len(self.jobs) < 2)
    @rule(changes=changes, kind=kinds, faults=faults, calls=st.integers(0, MAX_CALLS))
    def begin(self, changes: dict[str, int], kind: str, faults: dict[str, str], calls: int) -> None:
        self.put(changes)
        self.jobs.append(Job(self, kind, faults))
        self.go_on(0, calls)

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 2), calls=st.integers(1, MAX_CALLS))
    def go_on(self, which: int, calls: int) -> None:
        """A job goes on for some calls of the store, or to its end."""
        job = self.jobs[-1 - which % len(self.jobs)]
        with self.among_others():
            job.go_on(calls)
        if job.ended:
            self.jobs.remove(job)

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 2), after=st.booleans())
    def kill(self, which: int, after: bool) -> None:
        job = self.jobs.pop(-1 - which % len(self.jobs))
        with self.among_others():
            job.kill(after)

    @contextlib.contextmanager
    def among_others(self) -> Iterator[None]:
        """What a job may end with where others are at work."""
        try:
            yield
        except CatalogError:
            assert not self.videos()
        except StorageError as error:
            if "another job is at work" not in str(error):
                raise

    # --------------------------------------------------------------------------------------------------------- checks

    def check_end(self, job: Job, before: dict[str, tuple[bytes, int]]) -> None:
        """What holds after a job that nothing has disturbed."""
        entries = {entry.title.title_id: entry for entry in read_catalog(f"{self.root}/videos")}
        assert set(entries) == self.videos()
        dataset = EmbeddingDataset(f"{self.root}/out")
        listed = {name: dataset.output.list(name) for name in dataset.output.datasets()}
        for title_id, entry in entries.items():
            encoded = encode_title(title_id)
            mine = {name: {source for title, source in listing if title == encoded} for name, listing in listed.items()}
            if entry.unknown:
                continue
            committed = entry.source in mine.get(SHOTS, ())
            assert committed or title_id in job.faults, f"{title_id} was neither done nor failed"
            if not committed:
                self.check_failed(encoded, entry.source, job.faults[title_id], before)
                continue
            assert mine.get(FAILURES, set()) == set(), f"failure records of {title_id} stay"
            for name in (SHOTS, plan.BUILTIN_DATASET):
                if name != SHOTS and self.met and not mine.get(name):
                    continue  # a job for another source removed it before the shots came; jobs.contextualise_catalog writes it
                assert mine[name] == {entry.source}, f"{title_id} has in {name} objects of {mine[name]}"
                assert title_facts(dataset.title(title_id, name))["source"] == entry.source
        there = {title for listing in listed.values() for title, _ in listing}
        gone = {title for title in there if title not in set(map(encode_title, entries))}
        if job.kind == DELETING:
            assert not gone, f"{gone} are gone from the catalog and stay"
        else:
            for path, content in before.items():
                name = str(Path(path).relative_to(self.root / "out")).partition("/")[2]
                if "shard=" in name and not name.startswith("compacted/") and object_key(name)[0] not in set(map(encode_title, entries)):
                    assert self.tree()[path] == content, f"{name} is touched, and its title is gone"
        newest = {object_key(info.name)[0] for info in newest_objects(listed.get(SHOTS, {}))}
        assert self.committed <= newest

    def check_failed(self, title: str, source: str, fault: str, before: dict[str, tuple[bytes, int]]) -> None:
        """Only its own faults are attempts of a title, and only the record of its source stays."""

        def attempts_of(records: dict[str, bytes]) -> int:
            return sum(json.loads(content)["attempts"] for path, content in records.items() if path.endswith(f"/{title}@{source}.json"))

        now = {str(path): path.read_bytes() for path in self.out.glob(f"failures/*/{title}@*")}
        assert attempts_of(now) == attempts_of({path: content for path, (content, _) in before.items()}) + (fault == "own")
        if fault != SKIPPED:
            assert len(now) == 1


def patched(patch: pytest.MonkeyPatch) -> None:
    """Jobs stop at the store, sources are forgotten, and no weights are looked for."""
    read_folder = catalog._read_folder

    def read(store, skipped):
        forgotten = Ledger.current.forgotten
        found = []
        for entry in read_folder(store, skipped):
            reason, passes = forgotten.get(entry.title.title_id, ("", False))
            source = catalog.source_digest(entry.title, {}) if reason else entry.source
            found.append(entry._replace(unknown=reason, is_outage=passes, key=(entry.key[0], source)))
        return found

    def stopping(method: str):
        real = getattr(Store, method)
        return lambda store, *arguments: Ledger.current.call(method, real, store, arguments)

    patch.setattr(catalog, "_read_folder", read)
    for method in ("list", "read", "write", "replace", "delete", "delete_unless_newer"):
        patch.setattr(Store, method, stopping(method))
    patch.setattr(plan, "describe_model", lambda config: MODEL)
    patch.setattr(os, "fsync", lambda descriptor: None)  # no disk loses power here
    patch.setattr(backfill, "STORE_THREADS", 1)  # the same order every time
    patch.setattr(compaction, "THREADS", 1)


def test_ledger(monkeypatch):
    patched(monkeypatch)
    run_state_machine_as_test(Ledger, settings=SETTINGS)


@pytest.mark.slow
def test_ledger_for_long(monkeypatch):
    patched(monkeypatch)
    run_state_machine_as_test(Ledger, settings=LONG)
