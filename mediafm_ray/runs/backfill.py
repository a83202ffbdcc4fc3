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

import functools
import itertools
import logging
import operator
import time
import urllib.parse
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from mediafm_ray.config.jobs import BackfillCatalogConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.config.sections import BackfillConfig
from mediafm_ray.pipeline.rows import PLAN_SCHEMA
from mediafm_ray.runs.hours import HOUR, Elsewhere, Hours, Measured, Sized, hours_of, time_span
from mediafm_ray.runs.plan import PENDING_SCHEMA, Compared, Plan, Survey, in_order, pending_table, shots_first, survey
from mediafm_ray.runs.report import SUMMARY, RunResult
from mediafm_ray.spec import parse_json
from mediafm_ray.storage.catalog import Entry
from mediafm_ray.storage.dataset import Model, Output, parse_failure
from mediafm_ray.storage.names import SHOTS, encode_title
from mediafm_ray.storage.store import ObjectInfo, Store
from mediafm_ray.text import counted, public_line

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
STORE_THREADS = 16  # Small reads and deletions at once.
NAMES_SHOWN = 10
ORDERS = {"catalog": [("position", "ascending")], "newest": [("modified", "descending"), ("title_id", "ascending")]}
MAX_DOUBLINGS = 64  # A bound of the delay after failures that is longer than any time.


@dataclass(frozen=True)
class Missing:
    """Titles in the output that the catalog no longer has."""

    titles: Sequence[str]  # Encoded as in the names of their objects.
    objects: Sequence[ObjectInfo]
    of_titles: int  # Number of all titles that have objects.

    @classmethod
    def of(cls, gone: Sequence[tuple[str, Sequence[ObjectInfo]]], of_titles: int) -> Missing:
        """Return titles and their objects in the order of the titles."""
        gone = sorted(gone, key=operator.itemgetter(0))
        return cls([title for title, _ in gone], [info for _, infos in gone for info in infos], of_titles)

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
    planned = (NEW, CHANGED, FAILED, CONTEXTUAL, *([STALE] if wanted.recompute_stale else []))
    now = time.time() if now is None else now
    with survey(config, model, with_others=True) as surveys:
        pending = surveys.pending(*ORDERS[wanted.order])
        measured = Measured(surveys) if config.run.dry_run or wanted.max_video_hours > 0 else None
        protected = {encode_title(row.name) for row in surveys.bad_rows}
        found = Compared(PENDING_SCHEMA.empty_table())
        gone: list[tuple[str, Sequence[ObjectInfo]]] = []
        of_titles = 0
        for part in surveys.each(functools.partial(_compare, wanted, now, planned, protected, measured is not None)):
            pending.add(part.pending)
            found.take(part)
            gone += part.gone
            of_titles += part.of_titles
            if measured:
                measured.add(part.sized)
        missing = Missing.of(gone, of_titles)
        check_missing(missing, config)
        taken = pending.read(slice(wanted.max_titles or None))
        hours = hours_of(taken, measured, config)
    counts = found.counts
    plan = Plan(
        model=surveys.model,
        checkpoint=surveys.checkpoint,
        pending=taken.select(PLAN_SCHEMA.names),
        titles=surveys.catalog.titles,
        done=counts[DONE],
        failed_before=counts[NOT_DUE] + counts[GIVEN_UP],
        left=len(pending) - taken.num_rows,
        only_contextual=pc.sum(taken["has_shots"]).as_py() or 0,
        leftovers=tuple(in_order(found.leftovers)),
        outdone=tuple(in_order(found.outdone)),
        given_up=counts[GIVEN_UP],
        bad_rows=tuple(surveys.bad_rows),
        unknown=tuple(sorted(found.unknown)),
    )
    passed_over = {reason: counts[reason] for reason in MEANING if reason not in planned and counts[reason]}
    return Backfill(plan, {reason: counts[reason] for reason in planned if counts[reason]}, passed_over, missing, hours)


@dataclass
class ComparedWithAll(Compared):
    """The part of a scheduled run's plan that the titles and the objects of a survey give."""

    gone: Sequence[tuple[str, Sequence[ObjectInfo]]] = ()  # Titles that the catalog does not have.
    of_titles: int = 0  # Number of titles that have objects.
    sized: Sized | None = None


def _compare(
    wanted: BackfillConfig, now: float, planned: Sequence[str], protected: Set[str], is_measured: bool, there: Survey
) -> ComparedWithAll:
    """Compare the titles of a survey with all objects. ``protected``: see ``_missing``; ``is_measured``: whether to set ``sized``."""
    elsewhere = _elsewhere(there)
    reasons = _classify(there, elsewhere, wanted, now)
    found = ComparedWithAll(pending_table(there, [entry for entry, reason in reasons if reason in planned], elsewhere))
    found.counts.update(reason for _, reason in reasons)
    for entry, reason in reasons:
        if reason == DONE:
            found.add_done(there, entry)
        elif reason == UNKNOWN:
            found.unknown.append((entry.title.title_id, entry.unknown))
    if is_measured:
        found.sized = Sized.of(there, elsewhere, [entry for entry, reason in reasons if reason == DONE])
    found.gone = _missing(there, protected)
    found.of_titles = len(there.objects_of_title)
    return found


def _elsewhere(there: Survey) -> Elsewhere:
    """Return the shots that are committed under other dataset versions."""
    return {key: f"{version}/{infos[0].name}" for version, listing in there.versions.items() for key, infos in listing.items()}


def _classify(there: Survey, elsewhere: Elsewhere, wanted: BackfillConfig, now: float) -> list[tuple[Entry, str]]:
    """Return each title of a survey with its class (see the module)."""
    titles_elsewhere = {title for title, _ in elsewhere}
    failed = [entry for entry in there.entries if entry.key in there.failures and not there.is_done(entry)]
    attempts = _attempts(there, failed)
    found = []
    for entry in there.entries:
        key = entry.key
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
        name = there.failures[entry.key][0].name
        try:
            return parse_failure(there.output.store.read(name))["attempts"]
        except FileNotFoundError:  # Another job has finished the title meanwhile.
            return 1
        except ValueError as error:
            log.warning("%s is no failure record (%s): the title counts as tried once; mediafm verify can remove it", name, error)
            return 1

    with ThreadPoolExecutor(STORE_THREADS) as pool:
        return {entry.key: tried for entry, tried in zip(failed, pool.map(read, failed), strict=True)}


def _missing(there: Survey, protected: Set[str]) -> list[tuple[str, Sequence[ObjectInfo]]]:
    """Return the titles of a survey that are gone from the catalog, with their objects. ``protected``: titles whose rows are bad."""
    in_catalog = {entry.key[0] for entry in there.entries} | protected
    return [(title, [info for _, info in found]) for title, found in there.objects_of_title.items() if title not in in_catalog]


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
        rows += [
            (
                "gone from the catalog",
                f"{counted(len(backfill.missing.titles), 'title')}, {counted(len(backfill.missing.objects), 'object')}",
            )
        ]
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
        lines.append(f"this run: {counted(plan.pending.num_rows, 'title')}, {backfill.hours}, {first}{within}")
    return "\n".join(lines)


def describe_time(backfill: Backfill, pace: float) -> str:
    """Return the estimated duration of a run on the machines of the last one. ``pace``: its hours of video an hour; 0 = unknown."""
    if not pace:
        return "time: unknown, there is no earlier run in this output to go by"
    if not backfill.hours.known:
        return f"time: unknown; the last run did {pace:.2f} hours of video an hour"
    time_left = time_span(backfill.hours.total_s / pace)
    return f"time: about {time_left} on the machines of the last run, which did {pace:.2f} hours of video an hour"


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


def _pace(video_s: float, seconds: float) -> float:
    return video_s / seconds if seconds > 0 else 0.0
