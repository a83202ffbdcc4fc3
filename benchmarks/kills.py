"""Seeded SIGKILLs at a running job: titles lost, titles doubled, bytes that differ from those of an undisturbed run.

    python -m benchmarks.kills [--kills 50] [--seed 0] [--titles 24] [--kills-a-round 10]

The job is the real one, with the offline profile, over copies of a short clip. In turn it runs on a Ray of its own and on a cluster of
three simulated nodes. Killed are: the process that decodes, an actor, a whole node (with all its processes), and the driver. A job
whose driver is killed, or that ends with failed titles (whoever kills the decoding process fails its title), is run again, as its
user would; then its output is compared, object by object, with that of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.overhead import PROFILE, ROOT, shipped_footage
from mediafm_ray.runs.run_log import RUNS

MARK = "MEDIAFM_KILLS_MARK"  # an environment variable by which the processes of a run are told from all others
CLIP = "carphone_pristine.mp4"  # 4 s
KINDS = ("child", "actor", "node", "driver")
VICTIMS = {"child": "mediafm_ray.media.child", "actor": "ray::MapWorker"}  # what their command lines hold
GAP_S = (0.3, 3.0)  # between kills
MAX_RUNS = 8  # of one output after the last kill, until it is complete
GONE_WITHIN_S = (
    180.0  # for what a killed driver leaves: on a busy machine Ray's agents took more than a minute to see that their raylet is gone
)


@dataclass
class Outcome:
    """What a number of kills did."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    orphans: list[str] = field(default_factory=list)  # processes and partial files that were left


class Disturbed:
    """A job at which processes are killed, and its reruns, into one output."""

    def __init__(self, catalog: Path, output: Path, nodes: int, overrides: Sequence[str] = ()):
        """``nodes``: of the simulated cluster; 0 for a Ray of the job's own."""
        self.command = [sys.executable, "-m", "jobs.embed_catalog", "--config", str(PROFILE)]
        self.command += [f"catalog.uri={catalog}", f"output.uri={output}", *overrides]
        self.output, self.mark = output, secrets.token_hex(8)
        self.environment = {**os.environ, MARK: self.mark}
        self.environment.pop("RAY_ADDRESS", None)
        self.cluster: Any = None
        self.nodes: list[Any] = []
        if nodes:
            self._start_cluster(nodes)

    def _start_cluster(self, nodes: int) -> None:
        from ray.cluster_utils import Cluster

        os.environ[MARK] = self.mark  # its processes inherit it
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 150 << 20})
        self.nodes = [self._add_node() for _ in range(nodes)]
        self.environment["RAY_ADDRESS"] = self.cluster.address
        self.own = set(marked(self.mark))

    def _add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=2, object_store_memory=150 << 20)

    def run(self, kills: int, dice: random.Random, outcome: Outcome) -> None:
        """The job, so many kills, and reruns until it ends well."""
        wanted, attempts = kills, 0
        while attempts < MAX_RUNS:
            outcome.runs += 1
            attempts += not wanted
            with tempfile.TemporaryFile("w+") as log:
                process = subprocess.Popen(self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
                while wanted:
                    kind = dice.choice(KINDS)
                    until = (
                        kind if kind in VICTIMS else dice.choice(list(VICTIMS))
                    )  # some come while models load, some while titles are read
                    if not self._wait(process, until, dice.uniform(*GAP_S)):
                        break
                    if self._kill(kind, process, dice):
                        outcome.kills[kind] += 1
                        wanted -= 1
                code = process.wait()
                if code == -signal.SIGKILL and not self.cluster:
                    outcome.orphans += self._left()
                elif code not in (0, 1, 3, -signal.SIGKILL):  # 3: the job says to run the same command again
                    log.seek(0)
                    raise SystemExit(f"the job ended with {code}:\n{log.read()[-3000:]}")
            if code == 0 and not wanted:
                return
            if code == 0:  # all is done before the kills are: begin anew
                shutil.rmtree(self.output)
        raise SystemExit(f"the output is not complete after {MAX_RUNS} runs without a kill")

    def _wait(self, process: subprocess.Popen[bytes], kind: str, seconds: float) -> bool:
        """Wait while the job runs, first until it has processes of a kind; whether it still does."""
        while process.poll() is None and not self._victims(kind):
            time.sleep(0.1)
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return process.poll() is None

    def _victims(self, kind: str) -> list[int]:
        return sorted(pid for pid, command in marked(self.mark).items() if VICTIMS[kind] in command)

    def _kill(self, kind: str, process: subprocess.Popen[bytes], dice: random.Random) -> bool:
        """Kill one; whether there was one."""
        if kind == "driver":
            process.kill()
            process.wait()
            return True
        if kind == "node":
            if not self.nodes:
                return False
            node = self.nodes.pop(dice.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self._add_node())
            self.own |= {pid for pid, command in marked(self.mark).items() if "ray::" not in command}
            return True
        victims = self._victims(kind)
        if not victims:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(victims), signal.SIGKILL)
            return True
        return False

    def _left(self) -> list[str]:
        """Processes that a killed driver left, other than those of the cluster itself."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while left := marked(self.mark):
            if time.monotonic() > deadline:
                return list(left.values())
            time.sleep(0.2)
        return []

    def close(self) -> list[str]:
        """End the cluster; the processes that are left after it."""
        if self.cluster:
            self.cluster.shutdown()
            del os.environ[MARK]
        return self._left()


def marked(mark: str) -> dict[int, str]:
    """The living processes that inherited a mark, and their children (the decoding process gets no such variable), with command lines."""
    commands, parents, found = {}, {}, set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # not a process, not ours, or it ended meanwhile
            pid = int(folder.name)
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if pid != os.getpid() and command:  # a process that ended and was not waited for has none
                commands[pid] = command
                parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(pid)
    return {pid: command for pid, command in commands.items() if pid in found or parents.get(pid) in found}


def objects(output: Path) -> dict[str, bytes]:
    """Every object of the datasets below an output."""
    paths = [path for path in output.rglob("*") if path.is_file() and path.parent != output]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths if path.relative_to(output).parts[0] != RUNS}


def make_catalog(folder: Path, titles: int) -> Path:
    """So many copies of a short clip."""
    folder.mkdir(parents=True)
    for number in range(titles):
        shutil.copyfile(shipped_footage() / CLIP, folder / f"title{number:03d}.mp4")
    return folder


def compare(output: Path, expected: dict[str, bytes], outcome: Outcome) -> None:
    """Count what differs from the output of the undisturbed run."""
    found = objects(output)
    titles = Counter(Path(name).name.split("@")[0] for name in found if "/shots/" in name)
    outcome.lost += sum("/shots/" in name for name in expected) - len(titles)
    outcome.doubled += sum(count - 1 for count in titles.values())
    outcome.different += sum(found.get(name) != content for name, content in expected.items())
    outcome.orphans += sorted(set(found) - set(expected))


def main() -> None:
    """Kill, rerun, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--titles", type=int, default=24)
    parser.add_argument("--kills-a-round", type=int, default=10)
    arguments, overrides = parser.parse_known_args()
    dice, outcome = random.Random(arguments.seed), Outcome()
    with tempfile.TemporaryDirectory() as folder:
        catalog, undisturbed = make_catalog(Path(folder) / "videos", arguments.titles), Path(folder) / "undisturbed"
        calm = Disturbed(catalog, undisturbed, nodes=0, overrides=overrides)
        calm.run(0, dice, Outcome())
        expected = objects(undisturbed)
        number = 0
        while (left := arguments.kills - outcome.kills.total()) > 0:
            output = Path(folder) / f"disturbed{number}"
            disturbed = Disturbed(catalog, output, nodes=3 * (number % 2), overrides=overrides)
            try:
                disturbed.run(min(left, arguments.kills_a_round), dice, outcome)
            finally:
                outcome.orphans += disturbed.close()
            compare(output, expected, outcome)
            number += 1
            print(f"round {number}: {dict(outcome.kills)}, {outcome.runs} runs, lost {outcome.lost}, doubled {outcome.doubled}", flush=True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, seed {arguments.seed}, {arguments.titles} titles a round, {number} rounds")
    print(
        f"kills                  {outcome.kills.total()}: {', '.join(f'{count} {kind}' for kind, count in sorted(outcome.kills.items()))}"
    )
    print(f"runs until all is done {outcome.runs}")
    print(f"titles lost            {outcome.lost}")
    print(f"titles doubled         {outcome.doubled}")
    print(f"objects that differ    {outcome.different}")
    print(f"left behind            {len(outcome.orphans)} {outcome.orphans[:5] or ''}")
    if outcome.lost or outcome.doubled or outcome.different or outcome.orphans:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
