"""The page of a catalog: its titles, failures and last run."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mediafm_ray.downstream.pages import (
    FAILED,
    MAX_ID_LENGTH,
    MAX_MESSAGE_LENGTH,
    OK,
    OUTDATED,
    clock,
    cut_to,
    render,
    rounded,
    thousands,
    visible,
    with_unit,
)

MAX_LISTED = 100_000  # titles in the list of a page; a browser opens so many within seconds


@dataclass(frozen=True)
class CatalogTitle:
    """One line of a catalog's page."""

    title_id: str
    duration_s: float = 0.0
    shots: int = 0
    warnings: Sequence[str] = ()
    failure: Mapping[str, Any] | None = None  # stage, type, message, attempts of a failure record
    page: str = ""  # relative address of the title's page; empty = none
    picture: bytes = b""  # a small JPEG

    @property
    def status(self) -> str:
        """Return ok, failed (no shots), or outdated (shots of an earlier source, whose successor failed)."""
        if self.failure is None:
            return OK
        return OUTDATED if self.shots else FAILED


@dataclass(frozen=True)
class CatalogContent:
    """The content of a catalog's page."""

    name: str  # location of the dataset
    dataset_version: str
    titles: Sequence[CatalogTitle]
    run: Mapping[str, Any] | None = None  # run-summary.json of the last run that computed something; None if there is none
    dims: Mapping[str, int] = field(default_factory=dict)


def catalog_page(content: CatalogContent) -> str:
    """Return the HTML file that lists a catalog's titles. Of more than MAX_LISTED titles it lists those with failures or warnings first."""
    titles = sorted(content.titles, key=lambda title: title.title_id)
    listed = sorted(titles, key=lambda title: title.failure is None and not title.warnings)[:MAX_LISTED]
    listed.sort(key=lambda title: title.title_id)
    data = {
        "id": [visible(cut_to(title.title_id, MAX_ID_LENGTH)) for title in listed],
        "duration": [round(title.duration_s, 2) for title in listed],
        "shots": [title.shots for title in listed],
        "status": [title.status for title in listed],
        "page": [title.page for title in listed],
        "warnings": [[visible(cut_to(warning, MAX_MESSAGE_LENGTH)) for warning in title.warnings] for title in listed],
        "failure": [_failure_shown(title.failure) for title in listed],
        "picture": [base64.b64encode(title.picture).decode() for title in listed] if any(title.picture for title in listed) else [],
    }
    hours = sum(title.duration_s for title in titles) / 3600
    shots = sum(title.shots for title in titles)
    figures = [
        ("Titles", f"{len(titles):,}"),
        ("Failed", f"{sum(title.status == FAILED for title in titles):,}"),
        ("With warnings", f"{sum(bool(title.warnings) for title in titles):,}"),
        ("Hours of video", f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"),
        ("Shots", f"{shots:,}"),
        ("Shots a minute", f"{shots / hours / 60:.1f}" if hours else "0"),
    ]
    return render(
        "catalog",
        data,
        title=visible(content.name),
        figures=figures,
        version=visible(content.dataset_version),
        dims=[(name, f"{size:,}") for name, size in content.dims.items()],
        failures=_failure_groups(titles),
        run=_run_shown(content.run, content.dataset_version),
        stages=_stages_shown((content.run or {}).get("seconds_by_stage", {})),
        count=len(titles),
        listed=len(listed),
        some_outdated=any(title.status == OUTDATED for title in titles),
    )


def _failure_shown(failure: Mapping[str, Any] | None) -> str:
    if failure is None:
        return ""
    attempts = failure.get("attempts")
    tried = f" (tried {attempts} times)" if isinstance(attempts, int) and attempts > 1 else ""
    return visible(f"{failure.get('stage', '')}: {cut_to(str(failure.get('message', '')), MAX_MESSAGE_LENGTH)}{tried}")


def _failure_groups(titles: Iterable[CatalogTitle]) -> list[dict[str, Any]]:
    """Group failures by stage and type, the most frequent first, each with an example."""
    groups: dict[tuple[str, str], list[CatalogTitle]] = {}
    for title in titles:
        if title.failure is not None:
            key = (visible(str(title.failure.get("stage", ""))), visible(str(title.failure.get("type", ""))))
            groups.setdefault(key, []).append(title)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        {"stage": stage, "type": type_, "count": len(members), "example": _failure_shown(members[0].failure)}
        for (stage, type_), members in ordered
    ]


def _run_shown(run: Mapping[str, Any] | None, dataset_version: str) -> list[tuple[str, str]]:
    """Return the last run as labels and values; empty without a summary."""
    if not run:
        return []
    titles = run.get("titles", {})
    other = run.get("dataset_version")
    versions = run.get("versions", {})
    rows = [
        ("Planned", thousands(titles.get("planned"))),
        ("Done", thousands(titles.get("ok"))),
        ("Failed", thousands(titles.get("failed"))),
        ("Never came back", thousands(titles.get("lost") or None)),
        ("Committed before", thousands(titles.get("skipped"))),
        ("Ended early", run.get("aborted")),
        ("Runs since then", f"{run['idle_runs_since']}, which found nothing to do" if run.get("idle_runs_since") else None),
        ("Wall time", clock(run["wall_s"]) if run.get("wall_s") is not None else None),
        ("Video read", with_unit(rounded(run.get("video_hours") or None, 3), "h")),
        ("Throughput", with_unit(rounded(run.get("video_hours_per_hour") or None, 2), "hours of video an hour")),
        ("Written", f"{run['bytes_written'] / 1e6:,.1f} MB" if run.get("bytes_written") else None),
        ("Checkpoint", run.get("checkpoint")),
        ("Of dataset version", f"{other}: not the one of this page" if other and other != dataset_version else None),
        ("Software", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
    ]
    return [(label, visible(str(value))) for label, value in rows if value not in (None, "")]


def _stages_shown(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    longest = max([*seconds.values(), 1e-9])
    return [{"name": visible(name), "seconds": f"{value:,.1f} s", "share": 100 * value / longest} for name, value in seconds.items()]
