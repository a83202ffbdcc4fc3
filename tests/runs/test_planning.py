"""The plan, shard by shard, against a plan written from the definitions that holds everything at once, over random catalogs and outputs."""

import dataclasses
import functools
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pytest

from benchmarks import planning
from mediafm_ray.config.jobs import BackfillCatalogConfig, ContextualiseCatalogConfig, EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.pipeline.rows import PLAN_SCHEMA
from mediafm_ray.runs import hours, plan, stored
from mediafm_ray.runs.backfill import plan_backfill
from mediafm_ray.runs.hours import HOUR
from mediafm_ray.runs.plan import make_plan
from mediafm_ray.runs.stored import make_stored_plan
from mediafm_ray.storage import catalog, listing, partitions, workers
from mediafm_ray.storage.base import Unknown
from mediafm_ray.storage.catalog import CatalogError
from mediafm_ray.storage.dataset import Output
from mediafm_ray.storage.errors import StorageError
from mediafm_ray.storage.names import encode_title, object_name
from mediafm_ray.storage.partitions import Partitions, SortedTables, scratch_folder
from mediafm_ray.storage.workers import Workers
from tests.datasets import MODEL

CHECKPOINT, CONTEXT = "0123456789ab", "contextual-0123456789ab"
OTHERS = ("aaaaaaaaaaaa", "fedcba987654")  # dataset versions
NAMES = [*(f"t{number}" for number in range(14)), "ü/x y", "long " * 60, "gone", "also gone"]
NOW = 1_000_000_000.0
PASSED_OVER = ("stale", "not_due", "given_up", "unknown")
SEEDS = range(8)
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")  # Some test before may have loaded it; no plan uses it.


# ---------------------------------------------------------------------------------------------------------------- worlds


@pytest.fixture(params=["in memory", "spilled", "processes"])
def spilled(request, monkeypatch):
    """Everything in memory and at once, or all of it in files and every shard alone, or that in several processes."""
    if request.param == "processes":
        for module in (workers, listing):
            monkeypatch.setattr(module, "MIN_ROWS", 0)
        monkeypatch.setattr(workers, "START_METHOD", "fork")  # So that the processes have the functions of made_up.
        monkeypatch.setattr(workers.log, "info", pytest.fail)  # Nothing is done again in this process.
    if request.param != "in memory":
        monkeypatch.setattr(partitions, "MAX_ROWS_IN_MEMORY", 2)
        monkeypatch.setattr(partitions, "ROWS_PER_TABLE", 3)
        monkeypatch.setattr(listing, "MIN_SHARDS", 1)
        monkeypatch.setattr(plan, "ROWS_AT_ONCE", 0)
    return request.param != "in memory"


@pytest.fixture
def made_up(monkeypatch):
    """A model without weights, sources that cannot be looked up, and durations that the names of objects decide."""
    monkeypatch.setattr(plan, "describe_model", lambda config: MODEL)
    monkeypatch.setattr(plan, "checkpoint_name", lambda config, model: CHECKPOINT)
    monkeypatch.setattr(stored, "checkpoint_name", lambda config, model: CHECKPOINT)
    monkeypatch.setattr(Output, "facts", lambda output, name: {"media": {"duration_s": duration_of(f"{output.dataset_version}/{name}")}})
    monkeypatch.setattr(hours, "SAMPLED_TITLES", 4)
    monkeypatch.setattr(hours, "MAX_FACTS_READ", 5)
    real = catalog._info
    monkeypatch.setattr(catalog, "_info", lambda uri, *others: unknown_of(uri) or real(uri, *others))


def duration_of(name):
    return 1.0 + hashlib.sha256(name.encode()).digest()[0]


def unknown_of(uri):
    return Unknown("down", True) if "outage" in uri else Unknown("forbidden", False) if "forbidden" in uri else None


def make_world(root, chance):
    """Videos, a catalog of JSON lines with bad rows, and an output; the rows as they were written."""
    rows, lines = [], []
    has_durations = chance.random() < 0.5
    for name in chance.choices(NAMES[:-2], k=chance.randrange(1, 30)):
        place = chance.choice(["", "", "", "", "outage-", "forbidden-", "absent-"])
        video = root / "videos" / f"{place}{NAMES.index(name)}.mp4"
        video.parent.mkdir(exist_ok=True)
        if not place:
            video.write_bytes(b"v" * chance.choice([0, 1, 5, 9]))
            os.utime(video, (seconds := chance.choice([1e9, 1e9, 1.1e9]), seconds))
        row = {"title_id": name, "video": str(video), "synopsis": chance.choice(["", "A film."]), "tags": chance.choice([[], ["x", "y"]])}
        row |= {"duration_s": chance.choice([0, 60, 90.5])} if has_durations and chance.random() < 0.5 else {}
        row |= {"timed_text": [f"{video}.en.srt"]} if chance.random() < 0.2 else {}
        rows.append(chance.choice([row] * 12 + [{**row, "video": 3}, {**row, "tags": "x"}, {"video": "v.mp4"}, "{not json"]))
        lines.append(rows[-1] if isinstance(rows[-1], str) else json.dumps(rows[-1]))
    (root / "c.jsonl").write_text("\n".join(lines) + "\n")
    sources = {entry["title_id"]: entry["source"] for entry in entries_of(rows)[0]}
    for version in (MODEL.dataset_version, *OTHERS):
        for name in NAMES:
            for dataset in ("shots", CONTEXT, "contextual-ffffffffffff", "failures"):
                for source in ("0" * 16, "1" * 16, sources.get(name, "2" * 16)):
                    if chance.random() < (0.6 if source == sources.get(name) else 0.2) * (0.5 if dataset == "failures" else 1):
                        path = root / "out" / version / object_name(dataset, name, source)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(json.dumps({"title_id": name, "attempts": chance.randrange(4)}))
                        os.utime(path, (when := NOW - chance.choice([0, 1, 30, 100]) * HOUR, when))
    (root / "out" / MODEL.dataset_version).mkdir(parents=True, exist_ok=True)
    (root / "out" / MODEL.dataset_version / "model.json").write_bytes(MODEL.to_json())
    return rows


# ------------------------------------------------------------------------------------- the plan, all at once and plainly


def entries_of(rows):
    """The titles of the catalog in the order of their ids, and its problems in the order of the report."""
    entries, unread, problems, seen = [], [], [], {}
    for number, row in enumerate(rows, start=1):
        where = f"line {number}"
        if isinstance(row, str):
            unread.append((where, "not valid JSON", ""))
            continue
        title_id = row.get("title_id", "")
        if title_id in seen:
            problems.append((where, f"title_id {title_id!r} is already that of {seen[title_id]}", ""))
        wrong = [] if "title_id" in row else ["the column title_id is missing"]
        wrong += [] if isinstance(row["video"], str) else ["video must be a string, is int (3)"]
        wrong += ["tags must be a list of strings, is str ('x')"] if row.get("tags") == "x" else []
        problems += [(where, problem, title_id if title_id not in seen else "") for problem in wrong]
        if not wrong and title_id not in seen:
            entries.append(entry_of(row, number))
        if title_id:
            seen.setdefault(title_id, where)
    return sorted(entries, key=lambda entry: entry["title_id"]), unread + problems


def entry_of(row, position):
    uris = [row["video"], *row.get("timed_text", [])]
    states = [os.stat(uri) if os.path.exists(uri) else None for uri in uris]
    identity = [
        [uri, *((state.st_size, str(state.st_mtime_ns)) if state else (None, None))] for uri, state in zip(uris, states, strict=True)
    ]
    digest = hashlib.sha256(json.dumps(identity, separators=(",", ":")).encode()).hexdigest()[:16]
    size, modified = (states[0].st_size, states[0].st_mtime) if states[0] else (0, 0.0)
    why = next(filter(None, map(unknown_of, uris)), None)
    known = {"size": size, "modified": modified, "position": position, "duration_s": row.get("duration_s") or None}
    return {**row, "source": digest, "key": (encode_title(row["title_id"]), digest), "unknown": why, **known}


def listings_of(root, version):
    """Names, modification times and sizes of objects by title and source, by dataset."""
    found = {}
    for path in sorted((root / "out" / version).glob("*/shard=*/*")):
        title, _, source = path.name.rpartition(".")[0].partition("@")
        name = str(path.relative_to(root / "out" / version))
        found.setdefault(name.split("/")[0], {})[title, source] = (name, path.stat().st_mtime, path.stat().st_size)
    return found


class Whole:
    """The whole catalog and all listings in memory."""

    def __init__(self, root, rows):
        self.entries, self.problems = entries_of(rows)
        self.listed = listings_of(root, MODEL.dataset_version)
        self.shots, self.failures = self.listed.get("shots", {}), self.listed.get("failures", {})
        self.elsewhere = {}
        for version in OTHERS:
            shots = listings_of(root, version).get("shots", {})
            self.elsewhere |= {key: f"{version}/{name}" for key, (name, *_) in shots.items()}
        self.objects = {}
        for found in self.listed.values():
            for (title, source), (name, modified, _) in found.items():
                self.objects.setdefault(title, []).append((source, name, modified))

    def is_done(self, entry):
        return entry["key"] in self.shots and entry["key"] in self.listed.get(CONTEXT, {})

    def is_unknown(self, entry):
        has_shots = any(title == entry["key"][0] for title, _ in self.shots)
        return entry["unknown"] and not self.is_done(entry) and (entry["unknown"].is_transient or has_shots)

    def others(self, entry):
        names = [name for source, name, _ in self.objects.get(entry["key"][0], []) if source != entry["source"]]
        return sorted(names, key=lambda name: not name.startswith("shots/"))

    def leftovers(self, entry):
        return (
            [] if entry["unknown"] else [*self.others(entry), *([self.failures[entry["key"]][0]] if entry["key"] in self.failures else [])]
        )

    def outdone(self, entry):
        newest = {}
        for source, name, modified in [] if entry["unknown"] else self.objects.get(entry["key"][0], []):
            if source != entry["source"]:
                dataset = name.split("/")[0]
                newest[dataset] = max(newest.get(dataset, modified), modified)
        own = {dataset: self.listed[dataset].get(entry["key"]) for dataset in newest}
        return sorted(found[0] for dataset, found in own.items() if found and found[1] <= newest[dataset])

    def row(self, entry):
        return {
            **{name: entry[name] for name in ("title_id", "source", "video", "synopsis", "tags")},
            "timed_text": [{"uri": uri, "language": "en", "kind": ""} for uri in entry.get("timed_text", [])],
            "superseded": self.others(entry),
            "expected_bytes": entry["size"],
            "expected_s": entry["duration_s"],
        }

    def expected(self, pending, done, taken, **counts):
        return {
            "titles": len(self.entries),
            "done": len(done),
            "left": len(pending) - len(taken),
            "pending": [self.row(entry) for entry in taken],
            "leftovers": [name for entry in done for name in self.leftovers(entry)],
            "outdone": [self.outdone(entry) for entry in done if self.outdone(entry)],
            "bad_rows": self.problems,
            "unknown": [(entry["title_id"], entry["unknown"].reason) for entry in self.entries if self.is_unknown(entry)],
            **counts,
        }

    def plan(self, config):
        done = [entry for entry in self.entries if self.is_done(entry)]
        rest = [entry for entry in self.entries if not self.is_done(entry) and not self.is_unknown(entry)]
        failed = [entry for entry in rest if entry["key"] in self.failures and not config.run.retry_failed]
        pending = [entry for entry in rest if entry not in failed]
        taken = pending[: config.run.max_titles or None]
        only_contextual = sum(entry["key"] in self.shots for entry in pending)
        return self.expected(pending, done, taken, failed_before=len(failed), only_contextual=only_contextual, given_up=0)

    def reason(self, entry, wanted):
        key = entry["key"]
        if self.is_done(entry):
            return "done"
        if self.is_unknown(entry):
            return "unknown"
        if key in self.elsewhere and key not in self.shots and not (wanted.recompute_stale and key in self.failures):
            return "stale"
        if key in self.failures:
            name, modified, _ = self.failures[key]
            tried = self.attempts[name]
            due = modified + (wanted.retry_delay_hours * HOUR * 2 ** (tried - 1) if tried else 0)
            return "given_up" if tried >= wanted.max_attempts else "failed" if due <= NOW else "not_due"
        if key in self.shots:
            return "contextual"
        is_known = key[0] in self.objects or key[0] in {title for title, _ in self.elsewhere}
        return "changed" if is_known else "new"

    def backfill(self, config):
        wanted = config.backfill
        out = Path(config.output.uri) / MODEL.dataset_version
        self.attempts = {name: json.loads((out / name).read_text())["attempts"] for name, *_ in self.failures.values()}
        reasons = [(entry, self.reason(entry, wanted)) for entry in self.entries]
        counts = Counter(reason for _, reason in reasons)
        planned = ["new", "changed", "failed", "contextual", *(["stale"] if wanted.recompute_stale else [])]
        pending = [entry for entry, reason in reasons if reason in planned]
        pending.sort(key=lambda entry: entry["position"] if wanted.order == "catalog" else (-entry["modified"], entry["title_id"]))
        taken = pending[: wanted.max_titles or None]
        done = [entry for entry, reason in reasons if reason == "done"]
        bad = {encode_title(title_id or f"({where})") for where, _, title_id in self.problems}
        gone = sorted(set(self.objects) - {entry["key"][0] for entry in self.entries} - bad)
        found = self.expected(
            pending,
            done,
            taken,
            failed_before=counts["not_due"] + counts["given_up"],
            given_up=counts["given_up"],
            only_contextual=sum(entry["key"] in self.shots for entry in taken),
        )
        return {
            **found,
            "reasons": {reason: counts[reason] for reason in planned if counts[reason]},
            "passed_over": {reason: counts[reason] for reason in PASSED_OVER if reason not in planned and counts[reason]},
            "missing": [(title, [name for _, name, _ in self.objects[title]]) for title in gone],
            "of_titles": len(self.objects),
            "hours": self.hours(taken, done, config.run.dry_run or wanted.max_video_hours > 0),
        }

    def hours(self, taken, done, exact):
        """Seconds by title, and how many are estimated."""
        known = {entry["title_id"]: entry["duration_s"] for entry in taken if entry["duration_s"]}
        rest = [entry for entry in taken if not entry["duration_s"]]
        if not exact or not rest:
            return known, 0
        stored = [entry for entry in rest if self.stored(entry)][: hours.MAX_FACTS_READ]
        known |= {entry["title_id"]: duration_of(self.stored(entry)) for entry in stored}
        measured = [(entry["size"], entry["duration_s"]) for entry in self.entries if entry["duration_s"]]
        if not measured:
            candidates = [entry for entry in [*done, *(entry for entry in self.entries if entry["key"] in self.elsewhere)] if entry["size"]]
            sample = candidates[:: max(1, len(candidates) // hours.SAMPLED_TITLES)][: hours.SAMPLED_TITLES]
            measured = [(entry["size"], duration_of(self.stored(entry))) for entry in sample]
        size = sum(size for size, _ in measured)
        rate = sum(seconds for size, seconds in measured if size) / size if size else 0
        guessed = {entry["title_id"]: entry["size"] * rate for entry in rest if entry["title_id"] not in known and entry["size"] and rate}
        return known | guessed, len(guessed)

    def stored(self, entry):
        here = self.shots.get(entry["key"])
        return f"{MODEL.dataset_version}/{here[0]}" if here else self.elsewhere.get(entry["key"])


# ------------------------------------------------------------------------------------------------------------- comparison


def found_in(made):
    """What a plan has, as the plain one says it."""
    columns = ("title_id", "source", "video", "synopsis", "tags", "timed_text", "superseded", "expected_bytes", "expected_s")
    outdone = {}
    for name in made.outdone:
        outdone.setdefault(name.rsplit("/", 1)[1].partition("@")[0], []).append(name)
    return {
        **{name: getattr(made, name) for name in ("titles", "done", "left", "failed_before", "only_contextual", "given_up")},
        "pending": [{name: row[name] for name in columns} for row in made.pending.to_pylist()],
        "leftovers": [info.name for info in made.leftovers],
        "outdone": [sorted(names) for names in outdone.values()],
        "bad_rows": [(row.where, "not valid JSON" if "JSON" in row.problem else row.problem, row.title_id) for row in made.bad_rows],
        "unknown": list(made.unknown),
    }


def configured(kind, root, *overrides):
    places = [f"catalog.uri={root}/c.jsonl", f"output.uri={root}/out"]
    return read_config(kind, [], [*places, *overrides])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_is_the_catalog_minus_the_listing(made_up, spilled, tmp_path, seed):
    chance = random.Random(seed)
    rows = make_world(tmp_path, chance)
    options = [f"run.retry_failed={chance.choice(['true', 'false'])}", f"run.max_titles={chance.choice([0, 0, 1, 4])}"]
    config = configured(EmbedCatalogConfig, tmp_path, "catalog.on_error=skip", *options)
    made = make_plan(config)
    assert made.pending.schema == PLAN_SCHEMA
    assert found_in(made) == Whole(tmp_path, rows).plan(config)
    problems = entries_of(rows)[1]
    if problems:
        with pytest.raises(CatalogError) as caught:
            make_plan(dataclasses.replace(config, catalog=dataclasses.replace(config.catalog, on_error="fail")))
        assert [problem.partition(": ")[0].partition(" (")[0] for problem in caught.value.problems] == [where for where, *_ in problems]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_backfill_is_every_title_against_every_object(made_up, spilled, tmp_path, seed):
    chance = random.Random(seed)
    rows = make_world(tmp_path, chance)
    options = {"recompute_stale": ["true", "false"], "order": ["catalog", "newest"], "max_titles": [0, 0, 1, 4], "max_attempts": [2, 3]}
    chosen = [f"backfill.{name}={chance.choice(values)}" for name, values in options.items()]
    chosen += ["catalog.on_error=skip", f"run.dry_run={chance.choice(['true', 'false'])}"]
    config = configured(BackfillCatalogConfig, tmp_path, *chosen)
    made = plan_backfill(config, now=NOW)
    expected = Whole(tmp_path, rows).backfill(config)
    seconds, estimated = expected.pop("hours")
    assert (made.hours.expected_s, made.hours.estimated) == (pytest.approx(seconds), estimated)
    missing = expected.pop("missing")
    assert (list(made.missing.titles), made.missing.of_titles) == ([title for title, _ in missing], expected.pop("of_titles"))
    assert Counter(info.name for info in made.missing.objects) == Counter(name for _, names in missing for name in names)
    assert {**found_in(made.plan), "reasons": made.reasons, "passed_over": made.passed_over} == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_over_committed_titles_is_one_listing_minus_another(made_up, spilled, tmp_path, seed):
    chance = random.Random(seed)
    make_world(tmp_path, chance)
    listed = listings_of(tmp_path, MODEL.dataset_version)
    retried = chance.choice(["true", "false"])
    newest = {}
    for (title, source), (name, modified, _) in sorted(listed["shots"].items(), key=lambda item: item[1][0]):
        if title not in newest or modified >= newest[title][2]:
            newest[title] = (source, name, modified)
    places = [f"output.uri={tmp_path}/out", f"dataset.version={MODEL.dataset_version}", f"run.retry_failed={retried}"]
    made = make_stored_plan(read_config(ContextualiseCatalogConfig, [], [*places, "contextualiser.checkpoint=builtin:neighbours"]))
    done = {title for title, (source, *_) in newest.items() if (title, source) in listed.get(CONTEXT, {})}
    failed = {title for title, (source, *_) in newest.items() if title not in done and (title, source) in listed.get("failures", {})}
    pending = sorted(name for title, (_, name, _) in newest.items() if title not in done and (title not in failed or retried == "true"))
    assert (made.titles, made.done, made.failed_before) == (len(newest), len(done), len(failed) if retried == "false" else 0)
    assert made.pending["shots"].to_pylist() == pending
    assert made.pending["title_id"].to_pylist() == [unquote(name.rsplit("/", 1)[1].partition("@")[0]) for name in pending]


def test_runs_with_shards_of_their_own_divide_a_catalog(made_up, tmp_path):
    make_world(tmp_path, random.Random(1))

    def pending(shards):
        embed = make_plan(configured(EmbedCatalogConfig, tmp_path, "catalog.on_error=skip", f"run.shards={shards}"))
        places = [f"output.uri={tmp_path}/out", f"dataset.version={MODEL.dataset_version}", f"run.shards={shards}"]
        context = make_stored_plan(read_config(ContextualiseCatalogConfig, [], [*places, "contextualiser.checkpoint=builtin:neighbours"]))
        return Counter(embed.pending["title_id"].to_pylist()), Counter(context.pending["title_id"].to_pylist())

    parts = [pending(shards) for shards in ("0-99", "100-100", "101-255")]
    whole = pending("0-255")
    assert all(sum((part[kind] for part in parts), Counter()) == whole[kind] for kind in (0, 1))
    assert all(0 < len(part[0]) < len(whole[0]) for part in (parts[0], parts[2]))


# ------------------------------------------------------------------------------------------------------------------ parts


def test_a_shard_that_cannot_be_listed_ends_the_plan_with_its_name(made_up, tmp_path, monkeypatch):
    make_world(tmp_path, random.Random(1))
    monkeypatch.setattr(listing, "MIN_SHARDS", 1)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("shots/shard=1c"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    (tmp_path / "out" / MODEL.dataset_version / "shots" / "shard=1c").mkdir(exist_ok=True)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StorageError, match=r"shots/shard=1c cannot be listed: .*permission denied"):
        make_plan(configured(EmbedCatalogConfig, tmp_path, "catalog.on_error=skip"))


def test_a_full_temporary_folder_ends_the_plan_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "MAX_ROWS_IN_MEMORY", 2)
    (tmp_path / "rows-7").mkdir()
    rows = Partitions(tmp_path, "rows")
    rows.add(7, "a")
    rows.add(7, "b")
    with pytest.raises(StorageError, match="set TMPDIR to a folder with room"):
        rows.add(7, "c")


def test_a_temporary_folder_that_is_full_when_processes_begin_ends_the_plan(tmp_path):
    rows = Partitions(tmp_path, "rows")
    rows.add(7, "a")
    (tmp_path / "rows-7").mkdir()
    with Workers() as pool, pytest.raises(StorageError, match="set TMPDIR to a folder with room"):
        list(pool.map(functools.partial(first_of, rows), [7], workers.MIN_ROWS))


def first_of(rows, partition):
    return next(rows.read(partition))


@pytest.mark.parametrize("chosen", [slice(None), slice(7), slice(None, None, 5), slice(0)])
def test_sorted_tables_are_the_rows_in_order(tmp_path, spilled, chosen):
    chance = random.Random(0)
    rows = [{"a": chance.randrange(5), "b": chance.choice("xyzü"), "number": number} for number in range(50)]
    schema = pa.schema([("a", pa.int64()), ("b", pa.string()), ("number", pa.int64())])
    tables = SortedTables(tmp_path, "rows", schema, [("a", "descending"), ("b", "ascending")])
    for start in range(0, 50, 10):
        tables.add(pa.Table.from_pylist(rows[start : start + 10], schema))
    assert len(tables) == 50
    found = tables.read(chosen)
    for path in tmp_path.iterdir():
        path.unlink()
    assert found.to_pylist() == sorted(rows, key=lambda row: (-row["a"], row["b"]))[chosen]


def test_videos_in_a_bucket_are_looked_up_with_few_requests(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setattr(catalog, "KEYS_AT_ONCE", 150)
    monkeypatch.setattr(partitions, "MAX_ROWS_IN_MEMORY", 100)
    requests = []
    real = planning.Listing.page
    monkeypatch.setattr(planning.Listing, "page", lambda server, query: requests.append(query) or real(server, query))
    titles = 400
    with planning.bucket(tmp_path, titles, MODEL.dataset_version) as given:
        monkeypatch.setattr(plan, "describe_model", lambda config: MODEL)
        made = make_plan(read_config(EmbedCatalogConfig, [], given))
    assert (made.titles, made.done, made.pending.num_rows) == (titles, titles // 2, titles // 2)
    assert made.pending["title_id"].to_pylist() == [f"tt{number:07d}" for number in range(titles // 2, titles)]
    assert set(made.pending["expected_bytes"].to_pylist()) == {1}
    of_videos = [query for query in requests if query.get("prefix", "").startswith("videos/")]
    assert len(of_videos) <= 12, "not one for each shard"


def test_temporary_folders_of_killed_processes_are_removed_and_those_in_use_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = "import time\nfrom mediafm_ray.storage.partitions import scratch_folder\nwith scratch_folder('plan') as folder:\n"
    program += "    (folder / 'rows-0').write_bytes(b'x')\n    print(folder, flush=True)\n    time.sleep(60)"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = [Path(process.stdout.readline().strip()) for process in processes]
    processes[0].kill()
    processes[0].wait()
    with scratch_folder("plan") as own:  # The folders are young: a process may be about to lock its own.
        assert all(folder.is_dir() for folder in [own, *folders])
    for folder in folders:
        os.utime(folder, (NOW, NOW))
    with scratch_folder("plan") as own:
        assert [folder.is_dir() for folder in folders] == [False, True]
    processes[1].kill()
    processes[1].wait()
    assert not own.exists()
