"""The tutorials as they are written: their files are written, their commands run in order, in a home of their own."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmllm_core.data import easy_vqa
from mmllm_core.models.home import home
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from tests.docs.markdown import ROOT, Block, blocks
from tests.mmllm_core.interop.conftest import checkpoint  # noqa: F401, fixture

pytestmark = pytest.mark.slow

TUTORIALS = ROOT / "docs" / "tutorials"
_MARK = re.compile(
    r'run(?:: (?:(?P<checkout>checkout)|(?P<how>prints|until) "(?P<text>[^"]+)"|where (?P<where>.+) is))?'
)


@dataclass(frozen=True)
class Reader:
    """Somebody who follows a tutorial in a folder, with nothing but what it says.

    What pip installs goes to a folder of theirs.
    """

    folder: Path
    environment: dict[str, str]

    def follow(self, page: str) -> None:
        """Write the files and run the blocks that are marked, and end what is left running."""
        done = 0
        with ExitStack() as running:
            for block in blocks(TUTORIALS / page):
                if block.title is not None:
                    path = self.folder / block.title
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(block.text, encoding="utf-8")
                elif block.mark is not None:
                    self._try(block, f"{page}, line {block.line}", running)
                    done += 1
        assert done, f"{page} has nothing to run"

    def _try(self, block: Block, where: str, running: ExitStack) -> None:
        mark = _MARK.fullmatch(block.mark or "")
        assert mark, f"{where}: the mark '{block.mark}' is not understood"
        if mark["where"] and self._run(f"{mark['where']} --help", self.folder).returncode:
            pytest.skip(f"{where}: no {mark['where']}")
        if mark["how"] == "until":
            running.enter_context(self._staying(block.text, mark["text"], where))
            return
        done = self._run(block.text, ROOT if mark["checkout"] else self.folder)
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{where}:\n{block.text}\n{said[-4000:]}"
        if mark["how"]:
            assert mark["text"] in said, f"{where}: '{mark['text']}' is not in\n{said[-4000:]}"

    def _run(self, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-euo", "pipefail", "-c", text]
        return subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True, check=False)

    @contextmanager
    def _staying(self, text: str, wanted: str, where: str) -> Iterator[None]:
        said: list[str] = []
        with subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", f"exec {text}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    said.append(line)
                    if wanted in line:
                        break
                else:
                    pytest.fail(f"{where}: it ended before it said '{wanted}':\n{''.join(said)[-4000:]}")
                yield
            finally:
                process.send_signal(signal.SIGTERM)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A reader with an empty home, but for packages that were fetched before."""
    monkeypatch.delenv("MMLLM_HOME")
    easy_vqa.fetch()
    for part in (load_profile("embedded").language, load_profile("embedded").audio):
        resolve(part.source)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "packages").symlink_to(home() / "packages")
    folder, site = tmp_path / "work", tmp_path / "site"
    folder.mkdir()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "MMLLM_HOME": str(tmp_path / "home"),
        "PIP_TARGET": str(site),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONPATH": f"{site}:{ROOT}",
        "COLUMNS": "200",
    }
    return Reader(folder, environment)


@pytest.mark.timeout(1200)  # six commands that each start Ray, one after another
def test_own_data(reader: Reader) -> None:
    reader.follow("own-data.md")


def test_llava_phi(reader: Reader, checkpoint: Callable[..., Any]) -> None:  # noqa: F811
    _, folder = checkpoint()
    (reader.folder / "xtuner").mkdir()
    shutil.move(folder, reader.folder / "xtuner" / "llava-phi-3-mini-hf")
    reader.follow("llava-phi.md")


@pytest.mark.parametrize("page", ["connector.md", "engine.md", "kuberay.md"])
def test_tutorial(page: str, reader: Reader) -> None:
    reader.follow(page)


def test_every_tutorial_is_followed() -> None:
    followed = {"own-data.md", "llava-phi.md", "connector.md", "engine.md", "kuberay.md"}
    assert {page.name for page in TUTORIALS.glob("*.md")} == {*followed, "index.md"}
