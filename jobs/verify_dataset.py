"""Check every object of an output: readable, of the right columns, vectors finite and of unit norm, shots that tile their title.

    mediafm verify output.uri=embeddings/
    mediafm verify output.uri=embeddings/ verify.repair=true

Prints what is broken, and why; with verify.repair=true deletes it, so that the next run computes those titles anew. Run it while no
job writes there; a repair takes the lease of jobs.backfill_catalog. Exit code 0: all is well; 1: something is, or was, broken; 2: the
output cannot be read; 3: it could not be read to its end, and some of what is broken may be deleted.
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
from mediafm_ray.storage.dataset import DatasetError, Output, dataset_versions, lease_folder
from mediafm_ray.storage.lease import Lease, held
from mediafm_ray.storage.store import StorageError, Store
from mediafm_ray.storage.verify import Finding, check_model, check_title, list_titles
from mediafm_ray.text import public_line

LEASE_S = 600
PROGRESS_S = 10  # between two lines of progress
MAX_REFUSED = 20  # objects that the store does not give: then it is in trouble, not they


def main(config: VerifyDatasetConfig) -> int:
    """Check, and where wanted repair, each dataset version."""
    console = Console()
    there = dataset_versions(config.output.uri, config.storage)
    versions = [config.verify.version] if config.verify.version else there
    if not versions or not set(versions) <= set(there):
        raise DatasetError(f"{config.output.uri} has no dataset version {config.verify.version}: there are: {', '.join(there) or 'none'}")
    broken = sum(verify(version, config, console) for version in versions)
    return EXIT_FAILED_TITLES if broken else EXIT_OK


def verify(version: str, config: VerifyDatasetConfig, console: Console) -> int:
    """Check one dataset version; how many objects are broken."""
    output = Output(config.output.uri, version, config.storage)
    with contextlib.ExitStack() as stack:
        lease = None
        if config.verify.repair:
            store = Store(config.output.uri, config.storage)
            lease = stack.enter_context(held(store, lease_folder(version), holder_of_lease("jobs.verify_dataset"), LEASE_S))
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
                raise StorageError(f"{output.store.uri}: {count['refused']} objects could not be read: look at the store first")
            if time.monotonic() - said > PROGRESS_S:
                said = time.monotonic()
                console.say(progress(count, objects, said - begun))
    seconds = time.monotonic() - begun
    console.say(
        f"dataset version {version}: {count['objects']} objects checked, {count['bytes'] / 1e6:.1f} MB in {seconds:.1f} s, "
        f"{count['broken']} broken, {count['deleted']} deleted"
    )
    return count["broken"]


def settle(findings: Sequence[Finding], output: Output, lease: Lease | None, count: Counter[str], console: Console) -> None:
    """Say what is broken, and delete it under a lease that is still good."""
    for finding in findings:
        count["broken"] += 1
        console.say(public_line(f"BROKEN {output.dataset_version}/{finding.name}: {finding.reason}"))
        if finding.removable and lease is not None and lease.is_valid():
            output.store.delete(finding.name)
            count["deleted"] += 1


def progress(count: Counter[str], objects: int, seconds: float) -> str:
    """How far the check is."""
    pace = count["objects"] / seconds
    left_s = (objects - count["objects"]) / pace
    return f"{count['objects']} of {objects} objects, {count['broken']} broken | {pace:.0f} a second, {left_s:.0f} s left"


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", VerifyDatasetConfig, main))
