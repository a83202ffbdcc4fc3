"""The package as it is installed: its wheel in an environment of its own, with what it declares to need and nothing else."""

import ast
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from collections import deque
from pathlib import Path

import pytest
from fsspec.registry import known_implementations
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mediafm_ray.cli import COMMANDS, main
from mediafm_ray.config.loader import profiles
from mediafm_ray.extras import EXTRAS, need
from mediafm_ray.runs.command import EXIT_BAD_INPUT, guarded
from tests.end_to_end.clips import make_clip

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = ("mediafm_ray", "jobs", "examples")
PLUGINS = {"s3fs": "s3"}  # declared and never imported: fsspec opens the scheme with it
IN_A_WHEEL = ("pyproject.toml", "README.md", "LICENSE", "conf", *OWN)
MAX_HELP_S = 1.5


def declared(requirements):
    """The names of distributions, without this one's extras and without Ray, of which several extras take parts."""
    names = {canonicalize_name(Requirement(requirement).name) for requirement in requirements}
    return names - {"mediafm-ray", "ray"}


PROVIDERS = functools.cache(importlib.metadata.packages_distributions)


def distributions(modules):
    names = PROVIDERS()
    return {canonicalize_name(name) for module in modules for name in set(names[module])}


def imported():
    """The first parts of the names of all modules that the package's files import, wherever in a file, and that others provide."""
    found = set()
    for file in (path for folder in OWN for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - set(OWN)


def test_what_is_declared_is_what_is_imported():
    optional = {module for modules in EXTRAS.values() for module in modules}
    core = distributions(imported() - optional - {"ray"})
    assert declared(PROJECT["dependencies"]) - set(PLUGINS) == core
    assert all(known_implementations[scheme]["class"].startswith(name) for name, scheme in PLUGINS.items())
    declared_extras = PROJECT["optional-dependencies"]
    assert {extra: distributions(modules) for extra, modules in EXTRAS.items()} == {
        extra: declared(declared_extras[extra]) for extra in declared_extras.keys() - {"all", "dev"}
    }


def test_all_installs_every_extra():
    extras = PROJECT["optional-dependencies"]
    wanted, found = deque(extras["all"]), set()
    while wanted:
        for extra in Requirement(wanted.popleft()).extras - found:
            found.add(extra)
            wanted += [requirement for requirement in extras[extra] if requirement.startswith(PROJECT["name"])]
    assert found == extras.keys() - {"all", "dev"}


def test_every_job_has_a_command():
    jobs = {f"{folder}.{file.stem}" for folder in ("jobs", "examples") for file in (ROOT / folder).glob("[a-z]*.py")}
    assert {module for module, _ in COMMANDS.values()} == jobs
    assert len(COMMANDS) == len(jobs)


def test_an_unknown_command_lists_those_that_there_are(capsys):
    assert main(["serch"]) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert all(word in said for word in ("did you mean search?", *COMMANDS))
    assert main(["embed_catalogue"]) == EXIT_BAD_INPUT
    assert "did you mean embed?" in capsys.readouterr().err
    assert main(["x"]) == EXIT_BAD_INPUT
    assert "did you mean" not in capsys.readouterr().err


def test_a_missing_extra_is_bad_input(monkeypatch, capsys):
    monkeypatch.setitem(EXTRAS, "search", ("json", "not_installed_anywhere"))
    assert guarded(lambda: need("search", "searching") or 0) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said == "error: searching needs the extra search (not_installed_anywhere not installed): pip install 'mediafm_ray[search]'\n"


def needed(*requirements):
    """The distributions of this environment that a fresh one gets where pip is asked for these requirements."""
    wanted = deque(map(Requirement, requirements))
    found, seen = {}, set()
    while wanted:
        requirement = wanted.popleft()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            if name == "mediafm-ray":
                texts = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
            else:
                found[name] = importlib.metadata.distribution(name)
                texts = found[name].requires or []
            for parsed in map(Requirement, texts):
                if parsed.marker is None or parsed.marker.evaluate({"extra": extra}):
                    try:
                        importlib.metadata.distribution(parsed.name)
                    except importlib.metadata.PackageNotFoundError:
                        continue  # another platform's build of a library, such as torch's for CUDA
                    wanted.append(parsed)
    return found.values()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves files beside its source."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in IN_A_WHEEL:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name, **({"symlinks": True} if copy is shutil.copytree else {}))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a command of an environment that has the wheel, with extras or not, in a folder that has nothing."""

    @functools.cache
    def environment(requirement):
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=False)
        site = next((folder / "lib").glob("python*/site-packages"))
        for distribution in needed(requirement):
            for name in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
                if not (site / name).exists():
                    (site / name).symlink_to(distribution.locate_file(name))
        python = folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel], check=True)
        return folder

    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(program, *arguments, requirement="mediafm_ray"):
        command = [str(environment(requirement) / "bin" / program), *map(str, arguments)]
        return subprocess.run(command, cwd=elsewhere, env=variables, capture_output=True, text=True, timeout=600)

    return run


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {*OWN, f"{PROJECT['name']}-{PROJECT['version']}.dist-info"}
    code = {str(path.relative_to(ROOT)) for folder in OWN for path in (ROOT / folder).rglob("*.py")}
    assert {"mediafm_ray/py.typed", *code, *(f"mediafm_ray/conf/{name}.yaml" for name in profiles())} <= set(names)


@pytest.mark.slow
def test_the_command_runs_outside_the_checkout(installed):
    assert installed("mediafm", "--version").stdout == f"mediafm_ray {PROJECT['version']}\n"
    begun = time.monotonic()
    shown = installed("mediafm", "--help")
    assert time.monotonic() - begun < MAX_HELP_S
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.findall(r"^  ([a-z]+) ", shown.stdout, re.MULTILINE) == list(COMMANDS)
    code = "import mediafm_ray, sys; print(mediafm_ray.__file__)"
    assert str(ROOT) not in installed("python", "-c", code).stdout
    there = installed("python", "-c", "from mediafm_ray.config.loader import profiles; print(*profiles())").stdout.split()
    assert there == profiles()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serch"], ["serch", "did you mean search?", *COMMANDS]),
        (["embed_catalogue"], ["did you mean embed?"]),
        (["embed", "--config", "offlin", "catalog.uri=a"], ["offlin", "did you mean offline?", *profiles()]),
        (["embed", "--config", "conf/offline.yaml", "catalog.uri=a"], ["conf/offline.yaml", "did you mean offline?"]),
        (["embed", "--config", "offline", "catalog.url=a"], ["catalog.url"]),
    ],
)
def test_a_wrong_name_lists_those_that_there_are(installed, arguments, said):
    done = installed("mediafm", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert all(word in done.stderr for word in said), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "job", "arguments"),
    [
        ("demo", "demo", []),
        ("openai", "embed", ["text.encoder=openai", "catalog.uri=.", "output.uri=out"]),
        ("probes", "probes", ["output.uri=out"]),
        ("search", "index", ["output.uri=out", "index.uri=index"]),
        ("search", "search", ["index.uri=index", "shot=a:1"]),
        ("explore", "explore", ["output.uri=out"]),
        ("train", "train", ["dataset.uri=out", "checkpoint.uri=trained"]),
    ],
)
def test_a_job_without_its_extra_names_it(installed, extra, job, arguments):
    by_command = installed("mediafm", job, *arguments)
    assert (by_command.returncode, by_command.stdout, by_command.stderr.count("\n")) == (2, "", 1), by_command.stderr
    assert f"pip install 'mediafm_ray[{extra}]'" in by_command.stderr
    by_module = installed("python", "-m", COMMANDS[job][0], *arguments)
    assert (by_module.returncode, by_module.stderr) == (by_command.returncode, by_command.stderr)


@pytest.mark.slow
def test_a_catalog_is_embedded_without_the_other_extras(installed, tmp_path):
    make_clip(tmp_path / "videos" / "clip.mp4", [30, 40])
    output = f"output.uri={tmp_path}/embeddings"
    for command in (
        ["embed", "--config", "offline", f"catalog.uri={tmp_path}/videos", output],
        ["scenes", output],
        ["titles", output],
        ["report", output, "report.title_pages=true"],
        ["verify", output],
    ):
        done = installed("mediafm", *command, requirement="mediafm_ray[offline]")
        assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("embeddings/*/shots/*/*.parquet"))
    assert list(tmp_path.glob("embeddings/*/pages/titles/clip.html"))
