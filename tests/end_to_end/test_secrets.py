"""A whole run over signed addresses, one of which fails: no file, no line and no log of Ray's processes holds the signature."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.end_to_end.clips import PROFILE, ROOT, make_clip
from tests.servers.web import QuietHandler, serving

SECRET = "SeCrEt0123"
HOSTILE = "%1b%5d0;owned%07%0aFORGED%e2%80%ae"  # in the name of a file, as an address writes it


@pytest.fixture
def server(tmp_path):
    """The address of a server that gives whole.mp4, and fails to give anything else."""
    content = make_clip(tmp_path / "whole.mp4", [30, 30]).read_bytes()

    class Handler(QuietHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()

        def do_GET(self):
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            there = content[int(first) : int(last or len(content)) + 1] if self.path.startswith("/whole.mp4") else b""
            self.send_response(206 if there else 503)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(there) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(there)))
            self.end_headers()
            self.wfile.write(there)

    with serving(Handler) as address:
        yield address


@pytest.fixture
def short_path():
    """A folder for Ray, whose sockets allow no long paths."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_run_over_signed_addresses_shows_and_keeps_no_signature(server, short_path, tmp_path):
    catalog, output, logs = tmp_path / "catalog.csv", tmp_path / "out", short_path
    names = {"whole": "whole.mp4", "failing": "failing.mp4", "hostile": f"{HOSTILE}.mp4"}
    rows = [f"{title},{server}/{name}?X-Amz-Signature={SECRET}" for title, name in names.items()]
    catalog.write_text("\n".join(["title_id,video", *rows]) + "\n")
    environment = {**os.environ, "RAY_TMPDIR": str(logs)}
    locations = [f"catalog.uri={catalog}", f"output.uri={output}", f"storage.endpoint_url=http://user:{SECRET}@127.0.0.1:1"]
    jobs = [
        ["jobs.embed_catalog", *PROFILE, *locations],
        ["jobs.report_catalog", f"output.uri={output}", "report.title_pages=true"],
    ]
    said = b""
    for job in jobs:
        done = subprocess.run([sys.executable, "-m", *job], cwd=ROOT, env=environment, capture_output=True, timeout=600)
        said += done.stdout + done.stderr
    assert b"ok     whole: 2 shots" in said
    written = [path for path in output.rglob("*") if path.is_file()]
    assert {"run-summary.json", "run.log", "titles.jsonl", "index.html", "whole.html"} <= {path.name for path in written}
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
    for text in (said, *(path.read_bytes() for path in written if path.suffix in (".log", ".json", ".jsonl"))):
        assert SECRET.encode() not in text
        assert not [character for character in text.decode() if not character.isprintable() and character != "\n"]
    workers = [path for path in logs.rglob("worker-*") if path.is_file() and path.stat().st_size]
    assert workers
    for path in workers:
        assert SECRET.encode() not in path.read_bytes(), path
