"""A job submitted to a Ray head as a user starts it: log, status, exit codes, with and without a token."""

import json
import re
import urllib.error
import urllib.request

import pytest

from mediafm_ray.storage.dataset import EmbeddingDataset
from tests.end_to_end.clips import make_clip
from tests.end_to_end.clusters import Head

RAY = "ray.scripts.scripts"  # the command `ray`


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    make_clip(folder / "a.mp4", [30, 20])
    make_clip(folder / "b.mp4", [25], seed=1)
    return folder


@pytest.fixture(scope="module", params=["token", "no token"])
def head(request, tmp_path_factory):
    token_file = None
    if request.param == "token":
        token_file = tmp_path_factory.mktemp("secret") / "token"
        token_file.write_text("0123456789abcdef" * 4)
    with Head(token_file) as head:
        yield head


def embed(*arguments):
    return ["python", "-m", "jobs.embed_catalog", "--config", "conf/offline.yaml", *arguments]


@pytest.mark.slow
def test_a_submitted_job_runs_and_its_exit_code_comes_back(head, videos, tmp_path):
    output = tmp_path / "out"
    job = embed(f"catalog.uri={videos}", f"output.uri={output}", "run.log_format=json")
    done = head.run("jobs.submit", "--submission-id", "first", "--", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    titles = {record["title_id"]: record for record in records if record["event"] == "title"}
    assert {title: record["outcome"] for title, record in titles.items()} == {"a": "ok", "b": "ok"}
    assert titles["a"]["measures"]["frames_decoded"] == 50
    assert titles["a"]["measures"]["bytes_read"] == (videos / "a.mp4").stat().st_size
    assert {"detect_shots", "write"} <= titles["a"]["seconds"].keys()
    assert set(EmbeddingDataset(str(output)).dataset().to_table()["title_id"].to_pylist()) == {"a", "b"}

    status = head.run(RAY, "job", "status", "first")
    assert "succeeded" in (status.stdout + status.stderr)
    logs = head.run(RAY, "job", "logs", "first")
    assert '"title_id": "a"' in logs.stdout

    again = head.run("jobs.submit", "--", *embed(f"catalog.uri={videos}", f"output.uri={output}"))
    assert again.returncode == 0
    assert "2 committed before, 0 to compute" in again.stdout

    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "no film.mp4").write_text("This is not a film.")
    failed = head.run("jobs.submit", "--", *embed(f"catalog.uri={bad}", f"output.uri={output}"))
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "FAILED no film" in failed.stdout
    assert "FAILED" in failed.stdout.splitlines()[-1]

    twice = head.run("jobs.submit", "--submission-id", "first", "--", *job)
    assert twice.returncode == 2, twice.stdout + twice.stderr
    assert "first already exists" in twice.stderr
    assert "Traceback" not in twice.stderr

    wrong = head.run("jobs.submit", "--", *embed(f"catalog.uri={tmp_path}/nothing", f"output.uri={output}"))
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr
    assert re.search(r"exit code 2", wrong.stdout.splitlines()[-1])


@pytest.mark.slow
def test_rays_own_command_submits_it_too(head, videos, tmp_path):
    output = tmp_path / "out"
    excludes = json.dumps({"excludes": [".git", ".venv", "/demo", "/tests"]})
    job = embed(f"catalog.uri={videos}", f"output.uri={output}")
    done = head.run(RAY, "job", "submit", "--working-dir", ".", "--runtime-env-json", excludes, "--", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] ok" in done.stdout
    wrong = head.run(RAY, "job", "submit", "--working-dir", ".", "--runtime-env-json", excludes, "--", *embed("output.uri=x"))
    assert wrong.returncode == 1  # Ray's command knows success and failure only
    assert "failed with exit code 2" in wrong.stdout


@pytest.mark.slow
def test_who_has_no_token_does_not_get_in(head, videos, tmp_path):
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/")
    if not head.token:
        assert urllib.request.urlopen(request, timeout=10).status == 200
        return
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=10)
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    job = embed(f"catalog.uri={videos}", f"output.uri={tmp_path}/out")
    refused = head.run("jobs.submit", "--", *job, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stderr.strip().splitlines()[-1].startswith("error: the cluster at ")
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()


def test_where_no_cluster_answers_one_line_says_so(capsys):
    from jobs import submit

    assert submit.main(["--address", "http://127.0.0.1:9", "--", "true"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no Ray cluster answers at http://127.0.0.1:9" in line
