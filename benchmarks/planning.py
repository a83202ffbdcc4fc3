"""Benchmark of planning on the driver: a catalog of 100,000 titles against a listing of 100,000 objects.

    python -m benchmarks.planning [--titles 100000] [--kinds local s3]
    python -m benchmarks.planning --titles 10000000 --kinds s3       the server takes 4 GB, and TMPDIR needs 8 GB

local: a Parquet catalog, a file for each video, a committed object for each title, in a local folder.
s3: the same in a bucket, through a server of this program's own on loopback that does one thing: it answers ListObjectsV2 in pages of 1000
keys, as XML, from sorted keys, and GET of the catalog. (A mock like moto sorts all keys anew for every page; putting 200,000 objects into
a real server takes half an hour.) So the client's part is real and the server's is small.
Each plan runs in a process of its own; its peak memory is that process's (VmHWM: ru_maxrss has also the memory of the process that
started it) and, for each of the processes that it started, the largest ru_maxrss of them.
"""

from __future__ import annotations

import argparse
import bisect
import gc
import http.server
import io
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

import pyarrow as pa
import pyarrow.parquet as pq

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.runs.plan import describe_model, make_plan
from mediafm_ray.spec import Title
from mediafm_ray.storage.base import ObjectInfo
from mediafm_ray.storage.catalog import source_digest
from mediafm_ray.storage.names import SHOTS, object_name
from mediafm_ray.storage.workers import Workers

ROOT = Path(__file__).parents[1]
PAGE_KEYS = 1000
MODIFIED = "2026-01-01T00:00:00.000Z"
ETAG = "0123456789abcdef0123456789abcdef"
COMMITTED = 0.5  # of the titles, so that half is skipped and half is pending; the other half of the listing are objects of old sources
GOALS = {100_000: (30, 1000), 10_000_000: (900, 2000)}  # Seconds and MB by titles.
ROWS_AT_ONCE = 100_000


def main() -> None:
    """Make the catalog and the listing, plan in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titles", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", default=["local", "s3"])
    parser.add_argument("--plan", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        print(json.dumps(measure(arguments.plan)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores: {arguments.titles} titles, {arguments.titles} objects listed")
    version = describe_model(EmbedCatalogConfig()).dataset_version
    for kind in arguments.kinds:
        with (
            tempfile.TemporaryDirectory() as folder,
            {"local": local, "s3": bucket}[kind](Path(folder), arguments.titles, version) as given,
        ):
            command = [sys.executable, "-m", "benchmarks.planning", "--plan", *given]
            keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, **keys}, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["done"] == int(arguments.titles * COMMITTED), found
        assert found["done"] + found["pending"] == arguments.titles, found
        goal_s, goal_mb = GOALS.get(arguments.titles, ("none", "none"))
        print(
            f"{kind:<6}{found['seconds']:7.1f} s (goal {goal_s}), of which {found['cpu_seconds']:.1f} s of a core; "
            f"{found['peak_mb']:.0f} MB at most (goal {goal_mb}), {found['before_mb']:.0f} before; "
            f"{found['done']} committed, {found['pending']} pending; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


def measure(overrides: list[str]) -> dict[str, float]:
    """Return the seconds and peak memory of one plan, of all its processes."""
    config = read_config(EmbedCatalogConfig, [], overrides)
    before_mb = peak_mb()
    start, start_cpu = time.perf_counter(), time.process_time()
    plan = make_plan(config)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    children_mb = Workers().count * children.ru_maxrss / 1024
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - start_cpu + children.ru_utime + children.ru_stime,
        "peak_mb": peak_mb() + children_mb,
        "before_mb": before_mb,
        "done": plan.done,
        "pending": plan.pending.num_rows,
    }


def peak_mb() -> float:
    """Return the most memory that this process has had."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def rows(titles: int) -> Iterator[dict[str, object]]:
    """Yield the rows of a catalog with a folder for each title."""
    return (
        {"title_id": f"tt{number:07d}", "video": f"videos/tt{number:07d}/main.mp4", "synopsis": "A night in the city.", "tags": ["drama"]}
        for number in range(titles)
    )


def table(titles: int) -> bytes:
    """Write the catalog as Parquet."""
    sink, left = io.BytesIO(), rows(titles)
    first = pa.Table.from_pylist(list(itertools.islice(left, ROWS_AT_ONCE)))
    with pq.ParquetWriter(sink, first.schema) as writer:
        writer.write_table(first)
        while part := list(itertools.islice(left, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(part, first.schema))
    return sink.getvalue()


def committed(number: int, titles: int, title_id: str, source: str) -> str:
    """Return the name of a title's object in the output, of its source or of an older one."""
    return object_name(SHOTS, title_id, source if number < titles * COMMITTED else "f" * 16)


@contextmanager
def local(folder: Path, titles: int, version: str) -> Iterator[list[str]]:
    """Write everything as files."""
    (folder / "catalog.parquet").write_bytes(table(titles))
    for number, row in enumerate(rows(titles)):
        video = folder / str(row["video"])
        video.parent.mkdir(parents=True)
        video.touch()
        status = video.stat()
        info = ObjectInfo("", 0, str(status.st_mtime_ns), status.st_mtime)
        title_id = str(row["title_id"])
        source = source_digest(Title(title_id, str(video)), {str(video): info})
        target = folder / "out" / version / committed(number, titles, title_id, source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    yield [f"catalog.uri={folder}/catalog.parquet", f"output.uri={folder}/out"]


@contextmanager
def bucket(folder: Path, titles: int, version: str) -> Iterator[list[str]]:
    """Return everything as keys of a listing."""
    gc.freeze()  # The server makes millions of objects before the plan begins.
    gc.disable()
    keys = ["catalog.parquet"]
    for number, row in enumerate(rows(titles)):
        uri, title_id = f"s3://bucket/{row['video']}", str(row["title_id"])
        source = source_digest(Title(title_id, uri), {uri: ObjectInfo("", 1, ETAG, 0.0)})
        keys += [str(row["video"]), f"out/{version}/{committed(number, titles, title_id, source)}"]
    keys.sort()
    Listing.keys, Listing.catalog = keys, table(titles)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"storage.endpoint_url=http://127.0.0.1:{server.server_port}"
        yield ["catalog.uri=s3://bucket/catalog.parquet", "output.uri=s3://bucket/out", endpoint]
        server.shutdown()


class Listing(http.server.BaseHTTPRequestHandler):
    """A bucket with one object and paged listings with prefix, delimiter, start and continuation."""

    protocol_version = "HTTP/1.1"
    keys: list[str]
    catalog: bytes

    def do_GET(self) -> None:
        """Answer a listing or the catalog."""
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        if "list-type" in query:
            self.answer(200, self.page(query))
        elif self.headers.get("Range"):
            self.answer(206, self.catalog[:1])
        else:
            self.answer(200, self.catalog)

    def page(self, query: dict[str, str]) -> bytes:
        """One page of a listing."""
        prefix, delimiter, most = query.get("prefix", ""), query.get("delimiter", ""), int(query.get("max-keys", PAGE_KEYS))
        after = query.get("continuation-token") or query.get("start-after", "")
        position = max(bisect.bisect_left(self.keys, prefix), bisect.bisect_right(self.keys, after))
        found: list[str] = []
        last, more = "", False
        while position < len(self.keys) and self.keys[position].startswith(prefix):
            if len(found) == most:
                more = True
                break
            last = self.keys[position]
            cut = last.find(delimiter, len(prefix)) + 1 if delimiter else 0
            if cut:
                found.append(f"<CommonPrefixes><Prefix>{escape(last[:cut])}</Prefix></CommonPrefixes>")
                last = last[:cut] + "\U0010ffff"
                position = bisect.bisect_left(self.keys, last)
            else:
                entry = f"<Key>{escape(last)}</Key><LastModified>{MODIFIED}</LastModified><ETag>&quot;{ETAG}&quot;</ETag><Size>1</Size>"
                found.append(f"<Contents>{entry}<StorageClass>STANDARD</StorageClass></Contents>")
                position += 1
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else ""
        head = f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(found)}</KeyCount>{token}"
        return f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>{head}{"".join(found)}</ListBucketResult>'.encode()

    def answer(self, status: int, content: bytes) -> None:
        """Send it."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing to say."""


if __name__ == "__main__":
    main()
