"""The rule of the architecture: imports point one way, and each layer runs on a machine that lacks the others' libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mediafm_ray.spec import EXTRAS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mediafm_ray"
MIDDLE = ("media", "models", "storage", "training", "downstream")
FORBIDDEN = {  # layer -> libraries that it must run without
    "spec": ("ray", "torch", "transformers", "av", "pyarrow", "omegaconf", "fsspec"),
    "media": ("ray", "torch", "transformers", "omegaconf", "pyarrow"),
    "models": ("ray", "av", "omegaconf", "pyarrow", "fsspec"),
    "training": ("ray", "av", "omegaconf", "pyarrow", "fsspec", "matplotlib", "tensorboardX"),
    "storage": ("ray", "torch", "transformers", "av", "omegaconf", "lance"),
    "downstream": ("ray", "torch", "av", "omegaconf", "scipy", "sklearn"),
    "cli": ("ray", "torch", "transformers", "av", "omegaconf", "pyarrow", "fsspec", "numpy"),  # --help is quick
}
MAY_IMPORT = {  # layer -> layers of this package that it may import
    "spec": (),
    "media": ("media", "spec"),
    "models": ("models", "spec"),
    "storage": ("storage", "spec"),
    "downstream": ("downstream", "spec"),
    "training": ("training", "models", "spec"),
    "config": ("config", *MIDDLE, "spec"),
    "pipeline": ("pipeline", "config", *MIDDLE, "spec"),
    "cli": ("pipeline",),
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


@pytest.mark.parametrize("layer", layers_there(FORBIDDEN))
def test_layer_imports_without_the_libraries_of_others(layer):
    modules = modules_of(layer)
    assert modules
    code = IMPORT_ALL.format(forbidden=FORBIDDEN[layer], modules=modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_jobs_import_without_the_extras():
    jobs = [f"jobs.{name}" for name in ("embed_catalog", "backfill_catalog", "build_index", "search_shots", "evaluate_probes")]
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
            parts = name.split(".")
            if parts[0] == "mediafm_ray" and len(parts) > 1:
                assert parts[1] in MAY_IMPORT[layer], f"{file} imports {name}"
            assert parts[0] != "jobs", f"{file} imports {name}"


def test_only_pipeline_and_jobs_import_ray():
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] != "pipeline":
            assert "ray" not in {name.split(".")[0] for name in imported_names(file)}, file


def test_init_files_are_empty():
    for file in [*PACKAGE.rglob("__init__.py"), *(ROOT / "jobs").rglob("__init__.py")]:
        assert file.read_text() == "", file


def imported_names(file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            names.append(node.module or "")
    return names
