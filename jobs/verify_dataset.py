"""Check every object of an output: its format, its columns, finite vectors of unit norm, and shots that tile their title.

    mediafm verify output.uri=embeddings/
    mediafm verify output.uri=embeddings/ verify.repair=true

Prints broken objects with the reasons; with verify.repair=true it deletes them, so that the next run computes those titles again.
Broken rows in a merged file are marked as deleted, which has the same effect. Run it while no job writes there; a repair takes the leases
of mediafm backfill and mediafm compact. Exit code 0: success; 1: something is, or was, broken; 2: the output cannot be read; 3: reading
failed before the end, and some of the broken objects may be deleted.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Sequence

from mediafm_ray.config.jobs import VerifyDatasetConfig
from mediafm_ray.derive.runner import ordered_map
from mediafm_ray.runs.command import EXIT_FAILED_TITLES, EXIT_OK, holder_of_lease, run_job, working
from mediafm_ray.runs.report import Console
from mediafm_ray.storage.dataset import DatasetError, Output, dataset_versions
from mediafm_ray.storage.lease import Lease, held
from mediafm_ray.storage.names import compaction_lease_folder, lease_folder
from mediafm_ray.storage.store import StorageError, Store
from mediafm_ray.storage.verify import Finding, check_model, check_title, list_titles
from mediafm_ray.text import counted, public_line

LEASE_S = 600
PROGRESS_S = 10  # seconds between progress lines
MAX_REFUSED = 20  # If more objects cannot be read, the store is at fault and not they.


def main(config: VerifyDatasetConfig) -> int:
    """Check each dataset version, and repair it if configured."""
    console = Console()
    there = dataset_versions(config.output.uri, config.storage)
    versions = [config.verify.version] if config.verify.version else there
    if not versions or not set(versions) <= set(there):
        raise DatasetError(f"{config.output.uri} has no dataset version {config.verify.version}: there are: {', '.join(there) or 'none'}")
    broken = sum(verify(version, config, console) for version in versions)
    return EXIT_FAILED_TITLES if broken else EXIT_OK


def verify(version: str, config: VerifyDatasetConfig, console: Console) -> int:
    """Check one dataset version; return the number of broken objects."""
    output = Output(config.output.uri, version, config.storage)
    with contextlib.ExitStack() as stack:
        lease = None
        if config.verify.repair:
            store = Store(config.output.uri, config.storage)
            holder = holder_of_lease("mediafm verify")
            stack.enter_context(held(store, compaction_lease_folder(version), holder, LEASE_S))
            lease = stack.enter_context(held(store, lease_folder(version), holder, LEASE_S))
            stack.enter_context(working())
        model, findings = check_model(output)
        count: Counter[str] = Counter()
        settle(findings, output, lease, count, console)
        titles, strangers = list_titles(output)
        settle(strangers, output, lease, count, console)
        objects = sum(map(len, titles))
        begun = said = time.monotonic()
        for checked in ordered_map(functools.partial(check_title, output, model), titles, config.verify.threads):
            count["objects"] += checked.objects
            count["bytes"] += checked.size
            count["refused"] += sum(finding.refused for finding in checked.findings)
            settle(checked.findings, output, lease, count, console)
            if count["refused"] > MAX_REFUSED:
                raise StorageError(f"{output.store.uri}: {count['refused']} objects could not be read: check the store first")
            if time.monotonic() - said > PROGRESS_S:
                said = time.monotonic()
                console.say(progress(count, objects, said - begun))
    seconds = time.monotonic() - begun
    console.say(
        f"dataset version {version}: {counted(count['objects'], 'object')} checked, {count['bytes'] / 1e6:.1f} MB in {seconds:.1f} s, "
        f"{count['broken']} broken, {count['deleted']} deleted"
    )
    return count["broken"]


def settle(findings: Sequence[Finding], output: Output, lease: Lease | None, count: Counter[str], console: Console) -> None:
    """Log broken objects, and delete them if there is a valid lease."""
    for finding in findings:
        count["broken"] += 1
        console.say(public_line(f"BROKEN {output.dataset_version}/{finding.name}: {finding.reason}"))
        if finding.removable and lease is not None and lease.is_valid():
            if finding.is_merged:
                output.mark_deleted(finding.name)
            else:
                output.store.delete(finding.name)
            count["deleted"] += 1


def progress(count: Counter[str], objects: int, seconds: float) -> str:
    """Format the progress line."""
    pace = count["objects"] / seconds
    left_s = (objects - count["objects"]) / pace
    return f"{count['objects']} of {objects} objects, {count['broken']} broken | {pace:.0f} a second, {left_s:.0f} s left"


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", VerifyDatasetConfig, main))
