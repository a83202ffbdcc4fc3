"""Checks of README.md and docs/: links lead somewhere, commands and keys exist, columns are those that are written, code runs."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from docs import configuration
from mediafm_ray.cli import COMMANDS
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.runs.command import parse
from mediafm_ray.storage.schemas import contextual_schema, repeats_schema, scenes_schema, shots_schema, titles_schema
from tests.datasets import write_dataset

ROOT = Path(__file__).parents[1]
HISTORY = "CHANGELOG.md"  # names what is gone
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", HISTORY)), *sorted((ROOT / "docs").glob("*.md"))]
PRESENT = [page for page in PAGES if page.name != HISTORY]
README_LINES = 150
MAX_IMAGE_BYTES = 300_000

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.*)$", re.MULTILINE)
PROGRAM = (
    r"(?:python -m (?=jobs|benchmarks|mediafm_ray|docs)|(?<![\w.\[/-])(?<!--config )mediafm (?=[a-z]))"  # and then a module or a command
)
COMMAND = re.compile(rf"{PROGRAM}([\w.]+)((?:(?!{PROGRAM}).)*)", re.DOTALL)
MODULE = re.compile(r"\b((?:jobs|benchmarks|examples)\.[a-z]\w*)")
KEY = re.compile(r"^([a-z_]+(?:\.[a-z_<>]+)+)(?:=.*)?$")
PATH = re.compile(r"^(?:mediafm_ray|jobs|conf|tests|benchmarks|docs|examples|\.ci)/[\w./-]*$")
FILE = re.compile(r"\.(?:md|png|html|json|jsonl|log|py|yaml|csv|srt|parquet|safetensors|toml|txt)$")
JOBS = configuration.job_configs()
KEYS = {key.name for kind in JOBS.values() for section in configuration.sections_of(kind) for key in section.keys}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
STAGES = {key.split(".")[1] for key in KEYS if key.startswith("resources.") and key.count(".") == 2}


def name_of(page):
    return str(page.relative_to(ROOT))


def fences(page, language):
    return [code for found, code in FENCE.findall(page.read_text()) if found == language]


def prose(page):
    return FENCE.sub("", page.read_text())


def inline_code(page):
    return [" ".join(code.split()) for code in INLINE.findall(prose(page))]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    texts = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(prose(page))]
    assert len(set(texts)) == len(texts), f"{page}: two headings have one anchor"
    return texts


def commands(page):
    """Module and words of every ``python -m MODULE WORDS`` and ``mediafm COMMAND WORDS`` of a page's shell code, output and inline code."""
    shell = [re.sub(r"\\\n", " ", code) for code in fences(page, "sh")]
    lines = [line for code in shell for line in code.split("\n")]
    lines += [line[2:] for code in fences(page, "text") for line in code.split("\n") if line.startswith("$ ")]
    for line in [*lines, *inline_code(page)]:
        for module, rest in COMMAND.findall(line):
            assert "." in module or module in COMMANDS, f"{page.name}: mediafm {module}"
            yield (
                COMMANDS[module][0] if module in COMMANDS else module,
                [word for word in shlex.split(rest, comments=True) if word not in ("...", "--", "--help")],
            )


def added_by(page):
    """The modules, and the last parts of the keys, that the diffs of a page add."""
    diffs = "\n".join(fences(page, "diff"))
    files = re.findall(r"^\+\+\+ b/(.*)$", diffs, re.MULTILINE)
    fields = re.findall(r"^\+    (\w+): \w+ = (?:recipe|resource)\(", diffs, re.MULTILINE)
    return {path.removesuffix(".py").replace("/", ".") for path in files}, set(fields)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_reference_of_the_configuration_is_that_of_the_program():
    assert configuration.PAGE.read_text() == configuration.render(), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"
        assert file.suffix != ".png" or file.stat().st_size < MAX_IMAGE_BYTES


def test_every_page_is_linked_from_the_readme():
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "README.md").read_text())}
    assert {name_of(page) for page in PAGES} - {"README.md"} <= linked


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_commands_exist_and_take_what_they_are_given(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for module, words in commands(page):
        assert importlib.util.find_spec(module), f"{page.name}: python -m {module}"
        if kind := JOBS.get(module.removeprefix("jobs.")):
            parse("", kind, words)


def test_every_command_is_in_the_table():
    rows = re.findall(r"^\| `mediafm (\w+)` \| `(.*?)` \| (.*) \|$", (ROOT / "docs" / "quickstart.md").read_text(), re.MULTILINE)
    assert rows == [(name, module, help) for name, (module, help) in COMMANDS.items()]


def test_a_command_with_a_mistake_is_found():
    with pytest.raises(ConfigError):
        parse("", JOBS["embed_catalog"], ["catalog.url=a"])


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_named_keys_modules_and_files_exist(page):
    modules, fields = added_by(page)
    for code in inline_code(page):
        for word in code.split():
            key = KEY.match(word)
            if key and key[1].partition(".")[0] in SECTIONS and not FILE.search(key[1]):
                named = {key[1].replace("<stage>", stage) for stage in STAGES}
                assert named <= KEYS or key[1].rpartition(".")[2] in fields, f"{page.name}: {word}"
            if PATH.match(word):
                assert (ROOT / word).exists(), f"{page.name}: {word}"
        for module in set(MODULE.findall(code)) - modules:
            assert importlib.util.find_spec(module), f"{page.name}: {module}"


def test_the_columns_are_those_that_are_written():
    dim = 12
    schemas = {"shots": shots_schema(dim), "contextual": contextual_schema(dim), "scenes": scenes_schema(), "titles": titles_schema(dim)}
    schemas["repeats"] = repeats_schema()
    parts = re.split(r"^## `(\w+).*$", (ROOT / "docs" / "schema.md").read_text(), flags=re.MULTILINE)[1:]
    described = dict(zip(parts[::2], parts[1::2], strict=True))
    assert set(described) == set(schemas)
    for name, schema in schemas.items():
        rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", described[name], re.MULTILINE)
        types = [re.sub(r"element: | not null", "", str(field.type)).replace(f"[{dim}]", "[D]") for field in schema]
        assert rows == list(zip(schema.names, types, strict=True))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with demo/embeddings, as the examples want it."""
    folder = tmp_path_factory.mktemp("documentation")
    write_dataset(str(folder / "demo" / "embeddings"), {"bikes": [30, 46, 61, 50, 55, 8], "reels/reel-0": [25] * 4})
    return folder


@pytest.mark.parametrize(
    ("page", "code"), [pytest.param(page, code, id=f"{page.stem}-{n}") for page in PRESENT for n, code in enumerate(fences(page, "python"))]
)
def test_python_code_runs(page, code, demo, monkeypatch, capsys):
    monkeypatch.chdir(demo)
    found = {}
    exec(compile(code, page.name, "exec"), found)  # what the reader is told to type
    if "duckdb.sql" in code:
        assert "bikes" in capsys.readouterr().out
    if "within" in found:
        assert abs(found["within"] @ found["within"] - 1) < 1e-5


@pytest.mark.parametrize("diff", fences(ROOT / "docs" / "maintaining.md", "diff"))
def test_worked_examples_still_apply(diff):
    done = subprocess.run(["git", "apply", "--check", "-"], input=diff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"refresh this example of docs/maintaining.md: {done.stderr}\n{diff}"
