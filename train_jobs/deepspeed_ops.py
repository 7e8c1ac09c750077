"""DeepSpeed's compiled CPU op, built once before workers need it.

DeepSpeed compiles its shared-memory collective at the first initialisation. Two workers that compile at once,
or a run killed while it compiles, leave a lock that later runs wait on for ever; so the driver builds it in a
folder of our own, alone, and clears what an interrupted build left.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from mmllm_core.artifact import build_once, is_built
from mmllm_core.errors import EnvironmentLack
from mmllm_core.models.home import home

_BUILD = "from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)"


def compiler() -> str | None:
    """Path of the C++ compiler: `$CXX`, else `c++`; None if there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def worker_environment(gpu: bool) -> dict[str, str]:
    """Environment variables that DeepSpeed needs before it is imported."""
    if gpu:
        return {}
    ninja = str(Path(sys.executable).parent)  # pip installs ninja beside python
    return {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(_extensions_folder()),
        "PATH": f"{ninja}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def build_ops() -> None:
    """Compile the op unless it is there already.

    Raises:
        EnvironmentLack: there is no C++ compiler, or it failed.
    """
    folder = _extensions_folder()
    if is_built(folder, _inputs()):
        for lock in folder.rglob("lock"):  # torch's, left by a worker that was killed while it loaded the op
            lock.unlink(missing_ok=True)
        return
    if compiler() is None:
        raise EnvironmentLack(
            "no C++ compiler is on PATH (or where CXX says), which DeepSpeed needs: install g++ "
            "(Debian and Ubuntu: 'apt install g++', macOS: 'xcode-select --install')"
        )
    build_once(folder, _inputs(), _compile)


def _compile(folder: Path) -> None:
    environment = os.environ | worker_environment(gpu=False) | {"TORCH_EXTENSIONS_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", _BUILD], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line.lower()), done.stderr[-200:])
        raise EnvironmentLack(f"DeepSpeed's CPU op does not compile with '{compiler()}': {reason.strip()}")


def _inputs() -> dict[str, str]:
    from importlib.metadata import version

    return {"torch": version("torch"), "deepspeed": version("deepspeed"), "python": sys.version.split()[0]}


def _extensions_folder() -> Path:
    return home() / "torch_extensions"
