"""The core is light, and so is the command's help; that imports point one way is import-linter's to say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
