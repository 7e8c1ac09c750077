"""`mmllm import` and `mmllm export` as commands: a checkpoint in, a bundle, and the checkpoint out again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm_core.bundle import Bundle
from tests.cluster.test_cli import run
from tests.mmllm_core.interop.conftest import checkpoint, profile  # noqa: F401, fixtures


def assert_one_line(done: Any, named: str) -> None:
    assert done.returncode == 1
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.lengthy
def test_what_is_imported_serves_as_a_bundle_and_exports_as_the_same_model(checkpoint: Any, tmp_path: Path) -> None:  # noqa: F811
    from transformers import AutoModelForImageTextToText

    original, folder = checkpoint()
    home = tmp_path / "home"
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}")
    imported = run("import", "llava", str(folder), "--name", "mine", "--chat-template", str(template), home=home)
    assert imported.returncode == 0, imported.stderr
    bundle = Bundle.open(home / "bundles" / "mine")
    assert bundle.info.profile.name == "phi"
    assert (home / "bundles" / "latest").read_text() == "mine"
    assert imported.stdout.strip().endswith("mine")

    out = tmp_path / "out"
    exported = run("export", "--format", "llava-hf", "--out", str(out), "--dtype", "float32", home=home)
    assert exported.returncode == 0, exported.stderr
    assert (out / "README.md").read_text().startswith("---\n")
    state = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).state_dict()
    expected = original.state_dict()
    connector = [name for name in expected if "projector" in name or "vision_tower" in name]
    assert connector
    assert all(torch.equal(state[name], expected[name]) for name in connector)

    again = run("import", "llava", str(folder), "--name", "mine", home=home)
    assert_one_line(again, "--replace")


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("import", "llava", "/nowhere/at/all"), "/nowhere/at/all"),
        (("import", "llava", ".", "--revision", "main"), "--revision"),
        (("import", "llava", ".", "--name", "../out"), "--name"),
        (("import", "llava", ".", "--profile", "no-such"), "no-such"),
        (("import", "llava", ".", "--name", "a", "--chat-template", "/nowhere.jinja"), "/nowhere.jinja"),
        (("import", "llava", "some/repository"), "some/repository"),
        (("export", "--format", "llava-hf"), "--out"),
        (("export", "--format", "merged-bundle", "--out", "x"), "--out"),
        (("export", "--format", "merged-lm", "--out", "x"), "no bundle yet"),
        (("export", "--format", "merged-lm", "--out", "x", "--bundle", "/nowhere"), "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments: tuple[str, ...], named: str, tmp_path: Path) -> None:
    assert_one_line(run(*arguments, home=tmp_path), named)
