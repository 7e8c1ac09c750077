"""Imports point one way, and the core is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "mmllm_core": {"mmllm_core"},
    "train_jobs": {"train_jobs", "mmllm_core"},
    "serve_apps": {"serve_apps", "mmllm_core"},
    "cluster": {"cluster", "serve_apps", "train_jobs", "mmllm_core"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert imported(path) & set(ALLOWED) <= ALLOWED[package], path


def test_the_core_never_imports_ray() -> None:
    for path in (ROOT / "mmllm_core").rglob("*.py"):
        assert "ray" not in imported(path), path


def test_importing_the_core_loads_no_torch() -> None:
    code = "import sys, mmllm_core, mmllm_core.config, mmllm_core.conversation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_module_of_the_core_can_be_imported_without_ray() -> None:
    code = (
        "import importlib, pkgutil, sys, mmllm_core\n"
        "found = [m.name for m in pkgutil.walk_packages(mmllm_core.__path__, 'mmllm_core.')]\n"
        "for name in found: importlib.import_module(name)\n"
        "assert len(found) > 20 and 'ray' not in sys.modules, found"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
