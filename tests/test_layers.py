"""The rule of the architecture: imports point one way, and each layer runs on a machine that lacks the others' libraries."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from mediafm_ray.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mediafm_ray"
BASE = ("spec", "errors", "text", "extras")
MIDDLE = ("media", "models", "storage", "training", "downstream")
FORBIDDEN = {  # layer -> libraries that it must run without
    **dict.fromkeys(BASE, ("ray", "torch", "transformers", "av", "pyarrow", "omegaconf", "fsspec")),
    "media": ("ray", "torch", "transformers", "omegaconf", "pyarrow"),
    "models": ("ray", "av", "omegaconf", "pyarrow", "fsspec", "matplotlib", "tensorboardX"),
    "training": ("ray", "av", "omegaconf", "pyarrow", "fsspec", "matplotlib", "tensorboardX"),
    "storage": ("ray", "torch", "transformers", "av", "omegaconf", "lance"),
    "downstream": ("ray", "torch", "av", "omegaconf", "scipy", "sklearn"),
    "runs": ("ray", "torch", "transformers"),
    "derive": ("ray", "torch", "transformers", "av"),
    "explore": ("ray", "torch", "transformers", "lance", "uvicorn"),
    "cli": ("ray", "torch", "transformers", "av", "omegaconf", "pyarrow", "fsspec", "numpy"),  # --help is quick
}
MAY_IMPORT = {  # layer -> layers and modules of this package that it may import
    "text": (),
    "errors": ("text",),
    "extras": ("text",),
    "cli": ("runs",),
    "spec": (),
    "media": ("media", *BASE),
    "models": ("models", *BASE),
    "storage": ("storage", *BASE),
    "downstream": ("downstream", *BASE),
    "training": ("training", "models", *BASE),
    "config": ("config", *MIDDLE, *BASE),
    "runs": ("runs", "pipeline.rows", "pipeline.stages", "config", *MIDDLE, *BASE),
    "derive": ("derive", "runs", "config", *MIDDLE, *BASE),
    "explore": ("explore", "derive", "runs", "config", *MIDDLE, *BASE),
    "pipeline": ("pipeline", "derive", "runs", "config", *MIDDLE, *BASE),
}
IMPORT_ALL = """
import importlib, importlib.machinery, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {forbidden!r}:
            return importlib.machinery.ModuleSpec(name, self)  # there, for who only looks whether it is (lance does)

    def create_module(self, spec):
        raise ImportError(f"{{spec.name}} is blocked")

    def exec_module(self, module):
        raise AssertionError("it is not created")

sys.meta_path.insert(0, Blocked())
for module in {modules!r}:
    importlib.import_module(module)
"""


def modules_of(layer: str) -> list[str]:
    folder = PACKAGE / layer
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{layer}.py"]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def layers_there(names) -> list[str]:
    return [name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()]


def layers_by_forbidden() -> list[list[str]]:
    """Layers that must run without the same libraries share a process, because importing torch takes seconds."""
    there = layers_there(FORBIDDEN)
    return [[layer for layer in there if FORBIDDEN[layer] == forbidden] for forbidden in dict.fromkeys(map(FORBIDDEN.get, there))]


@pytest.mark.parametrize("layers", layers_by_forbidden(), ids="+".join)
def test_layers_import_without_the_libraries_of_others(layers):
    modules = [module for layer in layers for module in modules_of(layer)]
    assert modules
    code = IMPORT_ALL.format(forbidden=FORBIDDEN[layers[0]], modules=modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_jobs_import_without_the_extras():
    names = ("embed_catalog", "backfill_catalog", "build_index", "search_shots", "find_repeats", "explore_catalog", "evaluate_probes")
    jobs = [f"jobs.{name}" for name in names]
    forbidden = [module for modules in EXTRAS.values() for module in modules]
    code = IMPORT_ALL.format(forbidden=forbidden, modules=[*jobs, "mediafm_ray.pipeline.stages", "mediafm_ray.pipeline.allowance"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layer", layers_there(MAY_IMPORT))
def test_layer_imports_only_what_it_may(layer):
    for module in modules_of(layer):
        file = ROOT / Path(*module.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        for name in imported_names(file):
            package, _, rest = name.partition(".")
            if package == "mediafm_ray":
                assert any(f"{rest}.".startswith(f"{allowed}.") for allowed in MAY_IMPORT[layer]), f"{file} imports {name}"
            assert package != "jobs", f"{file} imports {name}"


def test_jobs_import_no_jobs():
    for file in (ROOT / "jobs").glob("*.py"):
        assert "jobs" not in {name.split(".")[0] for name in imported_names(file)}, file


def test_no_module_imports_itself_by_way_of_others():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    imports = {".".join(file.relative_to(ROOT).with_suffix("").parts): imported_names(file) for file in files}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_only_pipeline_and_jobs_import_ray():
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] != "pipeline":
            assert "ray" not in {name.split(".")[0] for name in imported_names(file)}, file


def test_init_files_are_empty():
    for file in [*PACKAGE.rglob("__init__.py"), *(ROOT / "jobs").rglob("__init__.py")]:
        assert file.read_text() == "", file


@functools.cache
def imported_names(file: Path) -> list[str]:
    """The modules that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            module = node.module or ""
            folder = ROOT / Path(*module.split("."))
            names += [f"{module}.{alias.name}" if (folder / f"{alias.name}.py").exists() else module for alias in node.names]
    return names
