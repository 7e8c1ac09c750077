"""`mmllm plan serve` from the shell, beside `mmllm plan RECIPE`."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.capacity.service_times import load_service_times
from cluster.cli import app
from cluster.plan_serve_command import parse_slo
from mmllm_core.errors import ConfigError

SHORT = ("--trace", "steady", "--hours", "0.02")


def run(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", *arguments])
    if done.exception:
        raise done.exception
    return done.output


def told(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("serve", "--json", *SHORT, *arguments))
    return found


def test_a_load_is_answered_in_a_table_and_a_plot(tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    output = run("serve", "--rps", "3", "--cpu-price", "0.04", "--plot", str(file), *SHORT)
    for word in ("text replicas", "one deployment scaled whole", "first token, p95", "saves", "measured: bundle"):
        assert word in output
    assert "$" in output
    assert file.read_bytes().startswith(b"\x89PNG")


def test_json_says_what_is_saved_and_of_what() -> None:
    found = told("--rps", "4", "--cpu-price", "0.1")
    parts, whole = found["per_modality"], found["whole"]
    assert found["saving"]["of"] == "dollars"
    assert found["saving"]["share"] == pytest.approx(1 - parts["dollars_per_hour"] / whole["dollars_per_hour"])
    assert parts["dollars_per_hour"] == pytest.approx(0.1 * parts["hours"]["cpus"] / (found["seconds"] / 3600))
    assert whole["replicas"]["vision"] == whole["replicas"]["text"]


def test_a_promise_is_kept_by_replicas_that_hold_less_or_said_not_to_be() -> None:
    easy, hard = told("--rps", "3", "--slo", "ttft=30"), told("--rps", "3", "--slo", "ttft=1ms")
    assert easy["per_modality"]["slo_kept"] is True
    assert easy["per_modality"]["target_share"] == 1
    assert hard["per_modality"]["slo_kept"] is False
    assert hard["per_modality"]["target_share"] < 1


def test_own_hardware_is_priced_and_what_is_assumed_is_said(tmp_path: Path) -> None:
    values = load_service_times("embedded-cpu").model_dump()
    values["origin"], values["where"] = "assumed", "a GPU that nobody measured"
    for part in ("vision", "audio", "text"):
        values[part]["hardware"] = {"cpus": 0.0, "gpus": 0.5}
    file = tmp_path / "gpu.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    output = run("serve", "--rps", "2", "--times", str(file), *SHORT)
    assert "service times assumed: a GPU that nobody measured" in output
    assert "price not given" in output
    assert "of GPU hours" in output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--times", "h100"), "service times 'h100' are unknown: choose one of embedded-cpu"),
        (("--slo", "latency=2"), "--slo latency=2"),
        (("--mix", "video=1"), "--mix video=1"),
        (("--profile", "none.yaml"), "none.yaml: no such file"),
    ],
)
def test_a_mistake_is_named(arguments: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run("serve", "--rps", "1", *arguments)


def test_service_times_with_an_unknown_key_are_refused(tmp_path: Path) -> None:
    values = load_service_times("embedded-cpu").model_dump() | {"gpus": 3}
    file = tmp_path / "times.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigError, match="gpus"):
        load_service_times(str(file))


@pytest.mark.parametrize(("said", "seconds"), [("ttft=2", 2), ("ttft=2.5s", 2.5), ("ttft=800ms", 0.8)])
def test_seconds_are_read(said: str, seconds: float) -> None:
    assert parse_slo(said) == pytest.approx(seconds)


def test_both_plans_are_in_the_help_and_a_recipe_needs_no_word_of_its_own() -> None:
    output = run("--help")
    assert "serve" in output
    assert "recipe" in output
    for arguments in (("no-such-recipe",), ("recipe", "no-such-recipe"), ("--gpu", "H100", "no-such-recipe")):
        with pytest.raises(ConfigError, match="no-such-recipe"):
            run(*arguments)
