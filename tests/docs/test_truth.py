"""Documentation against what there is: every command parses, every link resolves, every benchmark exists."""

import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cluster.cli import app
from mmllm_core.config import DataConfig, Recipe, StrictModel, parse_config
from serve_apps.config import ServeConfig
from tests.docs.markdown import PAGES, ROOT, blocks, commands, links

CONFIGS: dict[frozenset[str], type[StrictModel]] = {
    frozenset({"clip", "whisper", "phi"}): ServeConfig,
    frozenset({"stage", "steps"}): Recipe,
}
"""Which config a block of YAML is, by keys that it has."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def invocations(line: str) -> list[list[str]]:
    """The arguments of each `mmllm` in a command line."""
    words = shlex.split(line.replace("`", ""), comments=True)
    found: list[list[str]] = []
    inside, begins = False, True
    for word in words:
        if word in ("|", ">", "<", "&&", "&", "--"):
            inside, begins = False, word != ">"
        elif begins and word == "mmllm":
            found.append([])
            inside, begins = True, False
        elif inside:
            found[-1].append(word)
        else:
            begins = begins and re.fullmatch(r"[A-Z_]+=.*", word) is not None
    return found


def problem(arguments: list[str]) -> str | None:
    """What is wrong with the arguments of `mmllm`: a command or an option that is not there."""
    command: Any = typer.main.get_command(app)
    words = list(arguments)
    while hasattr(command, "commands") and words:
        if words[0] not in command.commands and (default := getattr(command, "default", None)):
            words.insert(0, default)
        if not re.fullmatch(r"[a-z][a-z0-9-]*", words[0]):
            break
        if words[0] not in command.commands:
            return f"no command '{words[0]}' in '{command.name or 'mmllm'}'"
        command = command.commands[words.pop(0)]
    sent = (
        [typer.main.get_command(app).commands[command.name]]
        if command.context_settings.get("ignore_unknown_options")
        else []
    )  # as a job
    options = {name for c in (command, *sent) for p in c.params for name in [*p.opts, *p.secondary_opts]} | {"--help"}
    wrong = [w for w in words if w.startswith("--") and w.partition("=")[0] not in options]
    return f"no option {', '.join(wrong)} of '{command.name}'" if wrong else None


@every_page
def test_every_command_parses(page: Path) -> None:
    wrong = []
    for line in commands(page):
        try:
            found = invocations(line)
        except ValueError:  # a quotation that is no shell's
            continue
        wrong += [f"{line}: {said}" for arguments in found if (said := problem(arguments))]
    assert not wrong


def test_what_does_not_parse_is_found() -> None:
    assert invocations("RAY_ADDRESS=a mmllm train x --workers 8 | tee log") == [["train", "x", "--workers", "8"]]
    assert invocations("ray job submit -- mmllm train x  # there") == [["train", "x"]]
    assert invocations("kubectl -n mmllm get pods") == []
    assert problem(["train", "x", "--workers", "8"]) is None
    assert problem(["features", "gc", "--dry-run"]) is None
    assert problem(["trian", "x"]) == "no command 'trian' in 'mmllm'"
    assert problem(["keys", "make"]) == "no command 'make' in 'keys'"
    assert problem(["train", "x", "--wrokers", "8"]) == "no option --wrokers of 'train'"


@every_page
def test_every_link_resolves(page: Path) -> None:
    relative = [link for link in links(page) if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in relative if link[0] != "#" and not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


@every_page
def test_every_module_that_is_run_exists(page: Path) -> None:
    said = re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8"))
    assert not [name for name in said if name.startswith("tests.") and find_spec(name) is None]


@every_page
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    said = {name for line in commands(page) for name in re.findall(r"(?:^|&& )make ([a-z][a-z-]*)", line)}
    assert said <= targets


def test_the_page_of_commands_names_all() -> None:
    def names(command: Any, path: str) -> list[str]:
        inner = getattr(command, "commands", None)
        return [path] if inner is None else [n for k, c in inner.items() for n in names(c, f"{path} {k}")]

    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert not [name for name in names(typer.main.get_command(app), "mmllm") if f"`{name}" not in text]


@every_page
def test_every_block_of_code_can_be_read(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, f"{page}, line {block.line}", "exec")
        elif block.language == "yaml":
            values = yaml.safe_load(block.text)
            for keys, config in CONFIGS.items():
                if keys <= set(values) and values.get("phi", {}).get("engine") != "plain":  # its package is not here
                    parse_config(config, values, f"{page}, line {block.line}")
            if set(values) == {"data"}:
                parse_config(DataConfig, values["data"], f"{page}, line {block.line}")
        elif block.language == "toml":
            tomllib.loads(block.text)
