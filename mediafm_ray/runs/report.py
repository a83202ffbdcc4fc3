"""Progress, summary and logs of a run: a line for each title, and a table and ``run-summary.json`` at the end."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import platform
import re
import sys
import tempfile
import textwrap
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TextIO, cast

import pyarrow as pa

from mediafm_ray.pipeline.rows import FAILED
from mediafm_ray.runs.metrics import Metrics
from mediafm_ray.runs.plan import IN_CATALOG, WITH_SHOTS, Plan
from mediafm_ray.storage.store import Store
from mediafm_ray.text import counted, escape_controls_in_json, public_line, public_lines, public_uri

SUMMARY = "run-summary.json"
LOG = "run.log"
TITLES_LOG = "titles.jsonl"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
MAX_FAILURES_SHOWN = 20
SECRET = re.compile("secret|password|token$|credential|api_key$|access_key|^key$", re.IGNORECASE)
HARMLESS_OPTIONS = ("anon", "endpoint_url", "region", "use_ssl")
REDACTED = "(redacted)"
RAISED = re.compile(r"[\w.]+(Error|Exception|Exceeded)\w*: ")  # The beginning of the last line of a traceback.
VERSIONS_OF = ("mediafm_ray", "ray", "torch", "transformers", "pyarrow", "av", "numpy")


@functools.cache  # It has an effect once in a process.
def clean_logs() -> None:
    """Remove secrets in addresses and control characters from all log records of this process, those of libraries included.

    A record becomes one line, and the lines of its traceback are indented, so that none can be mistaken for a record.
    """
    make = logging.getLogRecordFactory()

    def make_public(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        with contextlib.suppress(TypeError, ValueError, KeyError):  # Logging itself reports arguments that do not fit the message.
            record.msg, record.args = public_line(record.getMessage()), ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = textwrap.indent(public_lines("".join(traceback.format_exception(*record.exc_info)).rstrip()), "  ")
        return record

    logging.setLogRecordFactory(make_public)


class Console:
    """Output of a run as lines of text or of JSON. All of it is also kept on disk for the run's logs."""

    def __init__(self, stream: TextIO | None = None, log_format: str = "text"):
        self.stream = stream or sys.stdout
        self.log_format = log_format
        self.lines, self.titles = _kept_lines(), _kept_lines()

    def say(self, text: str = "") -> None:
        """Print a text of one or more lines, and keep it with a time stamp for the log. Pass foreign text through public_line."""
        text = public_lines(text)
        self._print(text, {"event": "message", "message": text})
        stamp = time.strftime(TIME_FORMAT)
        self.lines.writelines(f"{stamp} {part}\n" for part in text.split("\n"))

    def say_title(self, line: str, record: Mapping[str, Any]) -> None:
        """Print how a title ended: the line, or the record where the log format is JSON."""
        line = public_line(line)
        self._print(line, record)
        stamp = time.strftime(TIME_FORMAT)
        self.lines.write(f"{stamp} {line}\n")
        self.titles.write(_json_line(record))

    def keep(self, lines: str, shown: bool = False) -> None:
        """Put lines such as a traceback into the log, and on the terminal only if ``shown``."""
        lines, stamp = public_lines(lines), time.strftime(TIME_FORMAT)
        self.lines.writelines(f"{stamp} {line}\n" for line in lines.splitlines())
        if shown:
            print(lines, file=sys.stderr)

    def write_log(self, store: Store, names: tuple[str, str] = (LOG, TITLES_LOG)) -> None:
        """Write the logs of this run to the output: the printed lines, and a JSON line for each title that ended."""
        for name, kept in zip(names, (self.lines, self.titles), strict=True):
            kept.seek(0)
            store.write(name, kept.read().encode())

    def _print(self, line: str, record: Mapping[str, Any]) -> None:
        if self.log_format == "text":
            print(line, file=self.stream, flush=True)
        elif line.strip():
            print(_json_line(record), end="", file=self.stream, flush=True)


def _kept_lines() -> TextIO:
    """Return a temporary file of the run, which has every line on disk as soon as it is written."""
    return cast(TextIO, tempfile.TemporaryFile("w+", buffering=1, encoding="utf-8", errors="backslashreplace"))


@dataclass
class RunResult:
    """Counts of the titles that a run finished, and how the run ended."""

    planned: int
    left: int = 0  # Planned titles beyond the limits of the run.
    ok: int = 0
    failed: int = 0
    shots: int = 0
    video_s: float = 0.0
    bytes_written: int = 0
    ended_by: str = ""  # The limit because of which titles are left.
    aborted: str = ""  # The reason why the run ended early.
    retry_helps: bool = True  # Whether the same command may succeed after a run that was aborted.
    startup_s: float = 0.0  # Until the first title could have begun: Ray, its actors, their models.
    seconds_by_stage: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    measures: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failures: list[dict[str, str]] = field(default_factory=list)
    warned: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, plan: Plan) -> RunResult:
        """Return the result of a run that has done nothing yet; what the plan leaves to later runs is left."""
        return cls(plan.pending.num_rows + plan.left, plan.left, ended_by="max_titles" if plan.left else "")

    @property
    def finished(self) -> int:
        """The number of titles that are done or failed."""
        return self.ok + self.failed

    @property
    def lost(self) -> int:
        """The number of titles without a result: a defect of the job, not of a title."""
        return self.planned - self.left - self.finished

    def add(self, title: Mapping[str, Any]) -> None:
        """Count a title that ended: a row that the last stage left."""
        for spent in title["seconds"]:
            self.seconds_by_stage[spent["stage"]] += spent["seconds"]
        for measure in title.get("measures", ()):
            self.measures[measure["name"]] += measure["value"]
        error = title["error"]
        if title["outcome"] == FAILED:
            self.failed += 1
            self.failures.append({"title_id": title["title_id"], **{key: value for key, value in error.items() if key != "traceback"}})
            return
        self.ok += 1
        self.shots += title["shot_count"]
        self.video_s += title["duration_s"]
        self.bytes_written += title["bytes_written"]
        if title["warnings"]:
            self.warned.append({"title_id": title["title_id"], "warnings": title["warnings"]})


def follow(ended: Iterator[pa.Table], result: RunResult, begun: float, console: Console, metrics: Metrics | None = None) -> None:
    """Count titles as they end, and print a line for each. ``begun``: time.monotonic() when Ray's start began."""
    metrics = metrics or Metrics()
    metrics.planned(result.planned - result.left)
    for table in ended:
        for title in table.to_pylist() if table.num_columns else []:
            result.add(title)
            elapsed_s = time.monotonic() - begun
            if result.finished == 1:
                result.startup_s = elapsed_s - sum(result.seconds_by_stage.values())
            metrics.title(title)
            console.say_title(progress_line(title, result, elapsed_s - result.startup_s), title_record(title, result))
            for warning in title["warnings"] or []:
                console.say(public_line(f"        warning: {title['title_id']}: {warning}"))


def progress_line(title: Mapping[str, Any], result: RunResult, elapsed_s: float) -> str:
    """Return a line with the result of a title and the progress of the run."""
    expected = result.planned - result.left
    width = len(str(expected))
    count = f"[{result.finished:>{width}}/{expected}]"
    left_s = elapsed_s / result.finished * (expected - result.finished)
    pace = f"{result.video_s / max(elapsed_s, 1e-9):.2f} video-h/h, {clock(left_s)} left, {result.failed} failed"
    if title["outcome"] == FAILED:
        return f"{count} FAILED {title['title_id']}: {title['error']['stage']}: {title['error']['message']} | {pace}"
    return f"{count} ok     {title['title_id']}: {counted(title['shot_count'], 'shot')}, {title['duration_s']:.1f} s of video | {pace}"


def title_record(title: Mapping[str, Any], result: RunResult) -> dict[str, Any]:
    """Return the result of a title for a JSON line of titles.jsonl (and of the log, where run.log_format=json)."""
    error = title["error"] or {}
    return {
        "event": "title",
        "title_id": title["title_id"],
        "outcome": title["outcome"],
        **({"stage": error["stage"], "reason": error["message"], "error": error["type"]} if error else {}),
        **({"traceback": error["traceback"]} if error.get("traceback") else {}),
        "shots": title["shot_count"],
        "video_s": title["duration_s"],
        "bytes_written": title["bytes_written"],
        "seconds": {spent["stage"]: round(spent["seconds"], 3) for spent in title["seconds"]},
        "measures": {measure["name"]: measure["value"] for measure in title.get("measures", ())},
        "warnings": title["warnings"] or [],
        "finished": result.finished,
        "planned": result.planned,
    }


def _json_line(record: Mapping[str, Any]) -> str:
    level = "error" if record.get("outcome") == FAILED else "info"
    return _json({"time": time.strftime(TIME_FORMAT), "level": level, **record}) + "\n"


def _json(content: Mapping[str, Any], indent: int | None = None) -> str:
    return escape_controls_in_json(json.dumps(content, indent=indent, ensure_ascii=False))


def summary(plan: Plan, result: RunResult, wall_s: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of run-summary.json, without values of the configuration that look like secrets."""
    return {
        "titles": {
            plan.titles_are: plan.titles,
            "planned": result.planned,
            "ok": result.ok,
            "failed": result.failed,
            "lost": result.lost,
            "skipped": plan.done,
            "skipped_failed_before": plan.failed_before,
            "given_up": plan.given_up,
            "skipped_unknown": len(plan.unknown),
            "skipped_bad_rows": len(plan.bad_titles),
            "left": result.left,
        },
        "left_because_of": result.ended_by or None,
        "aborted": result.aborted or None,
        "failures": result.failures,
        "warnings": result.warned,
        "shots": result.shots,
        "video_hours": result.video_s / 3600,
        "bytes_written": result.bytes_written,
        "wall_s": wall_s,
        "startup_s": result.startup_s,
        "video_hours_per_hour": result.video_s / wall_s if wall_s else 0.0,
        "seconds_by_stage": dict(result.seconds_by_stage),
        "measures": dict(result.measures),
        "dataset_version": plan.model.dataset_version,
        "checkpoint": plan.checkpoint or None,
        "dims": dict(plan.model.dims),
        "versions": {"python": platform.python_version(), **_versions()},
        "config": redacted(config),
    }


def reason_of(error: BaseException) -> str:
    """Return an error in one line; for one that Ray carried over, whose text is a traceback, the original error."""
    lines = [line for line in str(error).splitlines() if RAISED.match(line)]
    return public_line(f"{type(error).__name__}: {lines[-1] if lines else ' '.join(str(error).split()) or repr(error)}")


def redacted(config: Any) -> Any:
    """Return a configuration without values that look like secrets, and with only those storage options that are known to be harmless."""
    if isinstance(config, Mapping):
        return {key: _redacted_value(key, value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [redacted(value) for value in config]
    return public_uri(config) if isinstance(config, str) else config


def _redacted_value(key: str, value: Any) -> Any:
    if key == "storage_options" and isinstance(value, Mapping):
        return {name: redacted(option) if name in HARMLESS_OPTIONS else REDACTED for name, option in value.items()}
    return REDACTED if value and SECRET.search(key) else redacted(value)


def summary_table(content: Mapping[str, Any], output_uri: str, name: str = SUMMARY) -> str:
    """Return the summary as a table for the terminal. ``name``: the name of the summary's object."""
    titles = content["titles"]
    rows = [(f"titles {key.replace('_', ' ')}", f"{titles[key]}") for key in (IN_CATALOG, WITH_SHOTS) if key in titles]
    rows += [("skipped, committed before", f"{titles['skipped']}")]
    rows += [("skipped, failed before", f"{titles['skipped_failed_before']}")] if titles["skipped_failed_before"] else []
    rows += [("  of them given up", f"{titles['given_up']}")] if titles["given_up"] else []
    rows += [("skipped, source cannot be looked at", f"{titles['skipped_unknown']}")] if titles["skipped_unknown"] else []
    rows += [("skipped, bad rows of the catalog", f"{titles['skipped_bad_rows']}")] if titles["skipped_bad_rows"] else []
    rows += [("planned", f"{titles['planned']}")]
    if titles["planned"]:
        rows += [("  ok", f"{titles['ok']}"), ("  failed", f"{titles['failed']}")]
        rows += [("  LOST", f"{titles['lost']}")] if titles["lost"] else []
        rows += [("  left for later runs", f"{titles['left']} ({content['left_because_of']})")] if titles["left"] else []
        rows += [("shots", f"{content['shots']}"), ("video", f"{content['video_hours']:.4f} h")]
        rows += [("wall time", f"{content['wall_s']:.1f} s, of which {content['startup_s']:.1f} s until Ray and its actors were up")]
        rows += [(f"seconds in {stage}", f"{seconds:.1f}") for stage, seconds in content["seconds_by_stage"].items()]
    rows += [("dataset", f"{output_uri.rstrip('/')}/{content['dataset_version']}")]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    failures = content["failures"]
    if failures:
        lines += ["", "failures:"]
        lines += [public_line(f"  {one['title_id']}: {one['stage']}: {one['message']}") for one in failures[:MAX_FAILURES_SHOWN]]
        if len(failures) > MAX_FAILURES_SHOWN:
            lines.append(f"  ... and {len(failures) - MAX_FAILURES_SHOWN} more, see {name} and the failure records")
    if content["warnings"]:
        lines += ["", f"{len(content['warnings'])} titles with warnings, see {name}"]
    return "\n".join(lines)


def write_summary(store: Store, content: Mapping[str, Any], name: str = SUMMARY) -> None:
    """Write the summary of a run to the output."""
    store.write(name, (_json(content, indent=2) + "\n").encode())


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS_OF:
        with contextlib.suppress(metadata.PackageNotFoundError):  # A checkout need not be installed.
            found[name] = metadata.version(name)
    return found


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
