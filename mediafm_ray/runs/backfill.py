"""Plan of a scheduled run: every title of the catalog against every object in the output. Runs on the driver, without ray.

A title is, in this order of precedence,

    done          committed under this dataset version from its present source
    unknown       its source cannot be looked up and compared with the committed one: passed over and reported
    stale         the same source is committed under another dataset version only; computed by choice
    failed        has a failure record: tried again after a delay, given up after max_attempts failures of its own fault
    contextual    its shots are committed, but not this checkpoint's contextual embeddings
    changed       committed (or failed) from another source
    new           none of these

and objects of titles that the catalog does not have are *missing* ones: listed, and deleted by choice.
"""

from __future__ import annotations

import itertools
import logging
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mediafm_ray.config.jobs import BackfillCatalogConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.config.sections import BackfillConfig
from mediafm_ray.pipeline.rows import plan_table
from mediafm_ray.runs.plan import Plan, Survey, key_of, shots_first, survey
from mediafm_ray.runs.report import SUMMARY, RunResult
from mediafm_ray.spec import parse_json
from mediafm_ray.storage.catalog import Entry
from mediafm_ray.storage.dataset import SHOTS, Model, Output, dataset_versions, encode_title, parse_failure
from mediafm_ray.storage.store import ObjectInfo, Store
from mediafm_ray.text import public_line

log = logging.getLogger(__name__)

NEW, CHANGED, STALE, FAILED, CONTEXTUAL = "new", "changed", "stale", "failed", "contextual"
NOT_DUE, GIVEN_UP, UNKNOWN, DONE = "not_due", "given_up", "unknown", "done"
MEANING = {  # Descriptions for people.
    NEW: "new",
    CHANGED: "changed source",
    STALE: "stale: committed under another dataset version only",
    FAILED: "failed before, due again",
    CONTEXTUAL: "lack only this checkpoint's contextual embeddings",
    NOT_DUE: "failed before, not due yet",
    GIVEN_UP: "failed too often, given up",
    UNKNOWN: "source cannot be looked at",
}
HOUR = 3600  # Seconds.
STORE_THREADS = 16  # Small reads and deletions at once.
SAMPLED_TITLES = 32  # Committed titles whose duration is read to estimate seconds per byte.
MAX_FACTS_READ = 1000  # Pending titles whose duration is read from a committed object.
NAMES_SHOWN = 10
MAX_DOUBLINGS = 64  # A bound of the delay after failures that is longer than any time.
Elsewhere = Mapping[tuple[str, str], tuple[Output, str]]  # Dataset version and object's name, by encoded title and source.


@dataclass(frozen=True)
class Hours:
    """Known and estimated seconds of video of the titles that a run takes."""

    expected_s: Mapping[str, float]  # Seconds by title id.
    estimated: int  # Number of titles of expected_s that are estimated from bytes.
    titles: int

    @property
    def total_s(self) -> float:
        """The sum over the titles in expected_s."""
        return sum(self.expected_s.values())

    def __str__(self) -> str:
        unknown = self.titles - len(self.expected_s)
        how = [f"of {self.estimated} titles estimated from bytes"] if self.estimated else []
        how += [f"of {unknown} titles unknown"] if unknown else []
        if unknown == self.titles:
            return "unknown hours of video"
        return f"{_span(self.total_s)} of video" + (f" ({', '.join(how)})" if how else "")


@dataclass(frozen=True)
class Missing:
    """Titles in the output that the catalog no longer has."""

    titles: Sequence[str]  # Encoded as in the names of their objects.
    objects: Sequence[ObjectInfo]
    of_titles: int  # Number of all titles that have objects.

    def first_names(self) -> list[str]:
        """Return the first few titles, for people."""
        return [urllib.parse.unquote(title) for title in self.titles[:NAMES_SHOWN]]


@dataclass(frozen=True)
class Backfill:
    """Plan of a scheduled run."""

    plan: Plan  # Its pending titles are in the order of processing, cut at max_titles.
    reasons: Mapping[str, int]  # Titles by the reason why they are planned, with those beyond max_titles.
    passed_over: Mapping[str, int]  # Titles by the reason why they are neither done nor planned.
    missing: Missing
    hours: Hours  # Durations of the pending titles.


def plan_backfill(config: BackfillCatalogConfig, model: Model | None = None, now: float | None = None) -> Backfill:
    """Compare the catalog with the listings of all dataset versions. Writes nothing.

    ``now``: seconds since the epoch; by default from the clock of this machine. Raises what ``survey`` raises, and ConfigError where
    more titles are gone than may be deleted.
    """
    wanted = config.backfill
    there = survey(config, model)
    elsewhere = _elsewhere(config, there.model.dataset_version)
    reasons = _classify(there, elsewhere, wanted, time.time() if now is None else now)
    planned = (NEW, CHANGED, FAILED, CONTEXTUAL, *([STALE] if wanted.recompute_stale else []))
    pending = _in_order([entry for entry, reason in reasons if reason in planned], wanted.order)
    taken = pending[: wanted.max_titles] if wanted.max_titles else pending
    done = [entry for entry, reason in reasons if reason == DONE]
    counts = Counter(reason for _, reason in reasons)
    missing = _missing(there)
    check_missing(missing, config)
    plan = Plan(
        model=there.model,
        checkpoint=there.checkpoint,
        pending=plan_table(there.row(entry) for entry in taken),
        titles=len(there.entries),
        done=len(done),
        failed_before=counts[NOT_DUE] + counts[GIVEN_UP],
        left=len(pending) - len(taken),
        only_contextual=sum(key_of(entry) in there.wanted[0] for entry in taken),
        leftovers=tuple(leftover for entry in done for leftover in there.leftovers(entry)),
        outdone=tuple(name for entry in done for name in there.outdone(entry)),
        given_up=counts[GIVEN_UP],
        bad_rows=tuple(there.bad_rows),
        unknown=tuple((entry.title.title_id, entry.unknown) for entry, reason in reasons if reason == UNKNOWN),
    )
    passed_over = {reason: counts[reason] for reason in MEANING if reason not in planned and counts[reason]}
    exact = config.run.dry_run or wanted.max_video_hours > 0
    hours = _hours(there, taken, done, elsewhere, exact)
    return Backfill(plan, {reason: counts[reason] for reason in planned if counts[reason]}, passed_over, missing, hours)


def _elsewhere(config: BackfillCatalogConfig, version: str) -> Elsewhere:
    """Return the shots that are committed under other dataset versions."""
    found = {}
    for other in dataset_versions(config.output.uri, config.storage):
        if other != version:
            output = Output(config.output.uri, other, config.storage)
            found.update({key: (output, infos[0].name) for key, infos in output.list(SHOTS).items()})
    return found


def _classify(there: Survey, elsewhere: Elsewhere, wanted: BackfillConfig, now: float) -> list[tuple[Entry, str]]:
    """Return each title of the catalog with its class (see the module)."""
    titles_elsewhere = {title for title, _ in elsewhere}
    failed = [entry for entry in there.entries if key_of(entry) in there.failures and not there.is_done(entry)]
    attempts = _attempts(there, failed)
    found = []
    for entry in there.entries:
        key = key_of(entry)
        if there.is_done(entry):
            reason = DONE
        elif there.is_unknown(entry):
            reason = UNKNOWN
        elif key in elsewhere and key not in there.wanted[0] and not (wanted.recompute_stale and key in there.failures):
            reason = STALE
        elif key in there.failures:
            tried = attempts[key]
            # After an outage, which is no attempt, there is no delay.
            delay_s = wanted.retry_delay_hours * HOUR * 2.0 ** min(tried - 1, MAX_DOUBLINGS) if tried else 0.0
            last = max(info.modified for info in there.failures[key])
            reason = GIVEN_UP if tried >= wanted.max_attempts else FAILED if now >= last + delay_s else NOT_DUE
        elif key in there.wanted[0]:
            reason = CONTEXTUAL
        elif key[0] in there.objects_of_title or key[0] in titles_elsewhere:
            reason = CHANGED
        else:
            reason = NEW
        found.append((entry, reason))
    return found


def _attempts(there: Survey, failed: Sequence[Entry]) -> Mapping[tuple[str, str], int]:
    """Return the number of failures of each title's own fault from its failure record."""

    def read(entry: Entry) -> int:
        name = there.failures[key_of(entry)][0].name
        try:
            return parse_failure(there.output.store.read(name))["attempts"]
        except FileNotFoundError:  # Another job has finished the title meanwhile.
            return 1
        except ValueError as error:
            log.warning("%s is no failure record (%s): the title counts as tried once; mediafm verify can remove it", name, error)
            return 1

    with ThreadPoolExecutor(STORE_THREADS) as pool:
        return dict(zip(map(key_of, failed), pool.map(read, failed), strict=True))


def _in_order(entries: Iterable[Entry], order: str) -> list[Entry]:
    if order == "catalog":
        return sorted(entries, key=lambda entry: entry.position)
    return sorted(entries, key=lambda entry: (-entry.modified, entry.title.title_id))


def _missing(there: Survey) -> Missing:
    in_catalog = {key_of(entry)[0] for entry in there.entries} | {encode_title(row.name) for row in there.bad_rows}
    titles = sorted(set(there.objects_of_title) - in_catalog)
    objects = [info for title in titles for _, info in there.objects_of_title[title]]
    return Missing(titles, objects, len(there.objects_of_title))


def check_missing(missing: Missing, config: BackfillCatalogConfig) -> None:
    """Raise ConfigError where titles are to be deleted and so many are gone that the catalog is probably incomplete."""
    gone, most = len(missing.titles), config.backfill.max_delete_fraction
    if config.backfill.delete_missing and gone > most * missing.of_titles:
        raise ConfigError(
            f"backfill.delete_missing: {gone} of {missing.of_titles} titles that have objects are gone from {config.catalog.uri}, "
            f"more than backfill.max_delete_fraction={most:g} allows; nothing was started or deleted: check that the catalog is whole, "
            "or allow a larger share"
        )


def delete_missing(missing: Missing, output: Output) -> int:
    """Delete the objects of titles that the catalog no longer has; return their number. Raises what the store raises.

    An object that was written again after the listing stays, because its title is back.
    """
    groups = itertools.groupby(shots_first(missing.objects), key=lambda info: info.name.startswith(f"{SHOTS}/"))

    def delete(info: ObjectInfo) -> bool:
        return output.remove(info.name, info.modified)

    with ThreadPoolExecutor(STORE_THREADS) as pool:
        return sum(removed for _, infos in groups for removed in list(pool.map(delete, infos)))


# ------------------------------------------------------------------------------------------------------------- hours


def _hours(there: Survey, taken: Sequence[Entry], done: Sequence[Entry], elsewhere: Elsewhere, exact: bool) -> Hours:
    """Return the durations of the videos: from the catalog, from facts of stored objects, else estimated from bytes.

    Objects are read only if ``exact``, because each costs a request.
    """
    known = {entry.title.title_id: entry.duration_s for entry in taken if entry.duration_s}
    rest = [entry for entry in taken if not entry.duration_s]
    if not exact or not rest:
        return Hours(known, 0, len(taken))
    stored = [entry for entry in rest if key_of(entry) in there.wanted[0] or key_of(entry) in elsewhere][:MAX_FACTS_READ]
    known |= {entry.title.title_id: seconds for entry, seconds in _durations(there, elsewhere, stored)}
    measured = [(entry, entry.duration_s) for entry in there.entries if entry.duration_s]
    if not measured:
        candidates = [entry for entry in [*done, *(entry for entry in there.entries if key_of(entry) in elsewhere)] if entry.size]
        sample = candidates[:: max(1, len(candidates) // SAMPLED_TITLES)][:SAMPLED_TITLES]
        measured = _durations(there, elsewhere, sample)
    size = sum(entry.size for entry, _ in measured)
    if not size:
        return Hours(known, 0, len(taken))
    seconds_per_byte = sum(seconds for entry, seconds in measured if entry.size) / size
    estimated = {entry.title.title_id: entry.size * seconds_per_byte for entry in rest if entry.title.title_id not in known and entry.size}
    return Hours(known | estimated, len(estimated), len(taken))


def _durations(there: Survey, elsewhere: Elsewhere, entries: Sequence[Entry]) -> list[tuple[Entry, float]]:
    """Return the durations of committed titles from the facts of their objects; titles with unreadable objects are left out."""

    def read(entry: Entry) -> float | None:
        key = key_of(entry)
        here = there.wanted[0].get(key)
        output, name = (there.output, here[0].name) if here else elsewhere[key]
        try:
            return float(output.facts(name)["media"]["duration_s"])
        except Exception as error:  # An estimate can do without a broken object.
            log.warning("the duration of %s is not known: %s: %s", entry.title.title_id, type(error).__name__, error)
            return None

    with ThreadPoolExecutor(STORE_THREADS) as pool:
        found = zip(entries, pool.map(read, entries), strict=True)
        return [(entry, seconds) for entry, seconds in found if seconds is not None]


# ----------------------------------------------------------------------------------------------------------- for people


def describe(backfill: Backfill, config: BackfillCatalogConfig) -> str:
    """Return the plan as a table: titles by reason, titles passed over, titles that are gone, and the titles of this run."""
    plan, wanted = backfill.plan, config.backfill
    rows: list[tuple[str, Any]] = [("titles in the catalog", plan.titles), ("committed before", plan.done)]
    rows += [("to compute", sum(backfill.reasons.values()))]
    rows += [(f"  {MEANING[reason]}", count) for reason, count in backfill.reasons.items()]
    if backfill.passed_over:
        rows += [("passed over", sum(backfill.passed_over.values()))]
        rows += [(f"  {MEANING[reason]}", count) for reason, count in backfill.passed_over.items()]
    if backfill.missing.titles:
        rows += [("gone from the catalog", f"{len(backfill.missing.titles)} titles, {len(backfill.missing.objects)} objects")]
    width = max(len(name) for name, _ in rows)
    lines = [f"dataset version {plan.model.dataset_version}", *(f"  {name:<{width}}  {value}" for name, value in rows)]
    if STALE in backfill.passed_over:
        lines.append("backfill.recompute_stale=true computes the stale titles, too")
    if backfill.missing.titles:
        shown = backfill.missing.first_names()
        more = f" and {len(backfill.missing.titles) - len(shown)} more" if len(backfill.missing.titles) > len(shown) else ""
        fate = "are deleted" if wanted.delete_missing else "stay (backfill.delete_missing=true deletes them)"
        lines.append(f"gone from the catalog, their objects {fate}: {public_line(', '.join(shown))}{more}")
    if plan.pending.num_rows:
        first = "newest first" if wanted.order == "newest" else "in the catalog's order"
        limits = [f"backfill.max_titles={wanted.max_titles}"] if plan.left else []
        limits += [f"backfill.max_video_hours={wanted.max_video_hours:g}"] if wanted.max_video_hours else []
        limits += [f"backfill.max_wall_minutes={wanted.max_wall_minutes:g}"] if wanted.max_wall_minutes else []
        within = f"; within {', '.join(limits)}" if limits else ""
        lines.append(f"this run: {plan.pending.num_rows} titles, {backfill.hours}, {first}{within}")
    return "\n".join(lines)


def describe_time(backfill: Backfill, pace: float) -> str:
    """Return the estimated duration of a run on the machines of the last one. ``pace``: its hours of video an hour; 0 = unknown."""
    if not pace:
        return "time: unknown, there is no earlier run in this output to go by"
    if not backfill.hours.expected_s:
        return f"time: unknown; the last run did {pace:.2f} hours of video an hour"
    return (
        f"time: about {_span(backfill.hours.total_s / pace)} on the machines of the last run, which did {pace:.2f} hours of video an hour"
    )


def last_pace(store: Store) -> float:
    """Return the hours of video an hour, after start-up, of the last run that computed something; 0 where none is known."""
    try:
        content = parse_json(store.read(SUMMARY))
        carried = content.get("backfill", {}).get("pace_video_hours_per_hour") or 0.0
        return float(carried or _pace(content["video_hours"] * HOUR, content["wall_s"] - content["startup_s"]))
    except FileNotFoundError:
        return 0.0
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        log.warning("%s of the last run cannot be read: %s", SUMMARY, error)
        return 0.0


def summary_part(backfill: Backfill, result: RunResult, wall_s: float, deleted: int, pace_before: float) -> dict[str, Any]:
    """Return the part of run-summary.json about the backfill; ok + failed + left + lost == planned."""
    return {
        "planned": result.planned,
        "ok": result.ok,
        "failed": result.failed,
        "left": result.left,
        "lost": result.lost,
        "ended_by": result.ended_by or None,
        "reasons": dict(backfill.reasons),
        "passed_over": dict(backfill.passed_over),
        "missing": {
            "titles": len(backfill.missing.titles),
            "objects": len(backfill.missing.objects),
            "first": backfill.missing.first_names(),
            "objects_deleted": deleted,
        },
        "pace_video_hours_per_hour": _pace(result.video_s, wall_s - result.startup_s) or pace_before,
    }


def _span(seconds: float) -> str:
    """Return a duration for people."""
    return f"{seconds / HOUR:.1f} h" if seconds >= HOUR else f"{seconds / 60:.1f} min"


def _pace(video_s: float, seconds: float) -> float:
    return video_s / seconds if seconds > 0 else 0.0
