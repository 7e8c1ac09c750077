"""`mmllm plan serve` from the shell, beside `mmllm plan RECIPE`."""

import json
import re
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


def run(*arguments: str) -> tuple[str, Exception | None]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", *arguments])
    if done.exception and not isinstance(done.exception, ConfigError):
        raise done.exception
    return done.output, done.exception  # type: ignore[return-value]


def told(*arguments: str) -> dict[str, Any]:
    output, _ = run("serve", "--json", *SHORT, *arguments)
    found: dict[str, Any] = json.loads(output)
    return found


def gpu_times(folder: Path, gpu: str = "H100") -> Path:
    values = load_service_times("embedded-cpu").model_dump()
    values["origin"], values["where"] = "assumed", "a GPU that nobody measured"
    for part in ("vision", "audio", "text"):
        values[part]["hardware"] = {"cpus": 0.0, "gpus": 0.5, "gpu": gpu}
    file = folder / "gpu.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


@pytest.mark.lengthy
def test_a_load_is_answered_in_a_table_and_a_plot(tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    output, wrong = run("serve", "--rps", "1", "--plot", str(file), *SHORT)
    assert wrong is None
    for word in ("text replicas", "whole, models take turns", "first token, p95", "saves", "measured: CLIP"):
        assert word in output
    assert "$0.0425 an hour (a vCPU of AWS" in output
    assert file.read_bytes().startswith(b"\x89PNG")


def test_json_says_what_is_saved_and_of_what() -> None:
    found = told("--rps", "1", "--cpu-price", "0.1")
    parts, whole, packed = found["per_modality"], found["whole"], found["packed"]
    hours = found["seconds"] / 3600
    for name, other in (("of_whole", whole), ("of_packed", packed)):
        assert found["saving"][name]["unit"] == "dollars"
        expected = 1 - parts["dollars_per_hour"] / other["dollars_per_hour"]
        assert found["saving"][name]["share"] == pytest.approx(expected)
    replicas = sum(count["mean"] for count in parts["replicas"].values())
    assert parts["hours"]["cpu"] == pytest.approx(replicas * hours)  # a core each
    assert parts["dollars_per_hour"] == pytest.approx(0.1 * replicas)
    assert whole["replicas"]["vision"] == whole["replicas"]["text"]
    in_turns = packed["replicas"]["text"]["mean"] + packed["replicas"]["ingress"]["mean"]
    assert packed["hours"]["cpu"] == pytest.approx(in_turns * hours)  # three models, one core


def test_what_a_profile_says_may_be_changed() -> None:
    found = told("phi.autoscaling.min_replicas=5", "whisper.autoscaling.min_replicas=3", "--rps", "0.1")
    assert found["per_modality"]["replicas"]["text"]["mean"] == pytest.approx(5, abs=0.1)
    assert found["per_modality"]["replicas"]["audio"]["mean"] == pytest.approx(3, abs=0.1)
    assert found["whole"]["replicas"]["audio"]["mean"] == pytest.approx(5, abs=0.1)


@pytest.mark.lengthy
def test_gpus_are_counted_and_priced_by_name(tmp_path: Path) -> None:
    file = gpu_times(tmp_path)
    output, _ = run("serve", "--rps", "1", "--times", str(file), *SHORT)
    assert "service times assumed: a GPU that nobody measured" in output
    assert "H100 GPUs at the peak" in output
    assert "H100: $6.88 an hour" in output
    found = told("--rps", "1", "--times", str(file))["per_modality"]
    assert (
        found["gpus"]
        >= found["peak"]["H100"]
        == 0.5 * sum(found["replicas"][part]["peak"] for part in ("vision", "audio", "text"))
    )


def test_a_gpu_without_a_price_is_said_and_saved_in_hours(tmp_path: Path) -> None:
    output, _ = run("serve", "--rps", "1", "--times", str(gpu_times(tmp_path, "B300")), *SHORT)
    assert "B300: no price is known; give --gpu-price" in output
    assert "of GPU hours" in output
    assert "no price" in output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--times", "h100"), "--times h100: .*embedded-cpu do.* Measure your own .*tests.bench.capacity measure"),
        (("--slo", "latency=2"), "--slo latency=2: write ttft=2"),
        (("--slo", ""), "--slo : write ttft=2"),
        (("--slo", "ttft=1ms"), "no number of replicas keeps it.* Promise .* or give service times of faster hardware"),
        (("--mix", "video=1"), "--mix video=1: 'video=1' is not a share"),
        (("--mix", "text=0.5,image=0.3"), "--mix text=0.5,image=0.3: shares add up to 0.8, and audio=0.2 would be"),
        (("--rps", "0"), "--rps 0: say how many requests"),
        (("--trace", "weekly"), "--trace weekly: choose one of steady, daily, burst, shift"),
        (("--profile", "none.yaml"), "none.yaml: no such file"),
        (("--prices", "none.yaml"), "none.yaml: no such file"),
        (("--plot", "no-folder/plan.png"), "--plot no-folder/plan.png: there is no folder"),
        (("phi.autoscaling.min_replica=2",), "min_replica"),
        (("clip.autoscaling=null",), "clip, whisper, phi must all have autoscaling, or none"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(arguments: tuple[str, ...], named: str) -> None:
    _, wrong = run("serve", "--rps", "1", *SHORT, *arguments)
    assert wrong is not None
    assert re.search(named, str(wrong)), wrong


@pytest.mark.lengthy
def test_a_promise_that_is_not_kept_is_an_error_after_the_answer() -> None:
    output, wrong = run("serve", "--rps", "30", "--slo", "ttft=2", "--max-replicas", "2", *SHORT)
    assert "NOT kept" in output
    assert "--slo ttft=2 is not kept" in str(wrong)
    assert "text reached --max-replicas 2: raise it" in str(wrong)


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
    output, _ = run("--help")
    assert "serve" in output
    assert "recipe" in output
    for arguments in (("no-such-recipe",), ("recipe", "no-such-recipe"), ("--gpu", "H100", "no-such-recipe")):
        assert "no-such-recipe" in str(run(*arguments)[1])
