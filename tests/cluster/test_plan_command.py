"""`mmllm plan` from the shell: a table, JSON, one line when something is wrong."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from mmllm_core.errors import ConfigError, WeightsError
from tests.conftest import tiny_lm_config
from tests.phi4_mini import PHI4_MINI

RECIPE = """
name: phi-instruct
profile: phi
stage: instruct
steps: 1000
batch_size: 32
batching: {pack_tokens: 1024}
learning_rates: {connector: 0.001, lm: 0.001}
"""


@pytest.fixture
def phi(tmp_path: Path) -> list[str]:
    """A recipe on the phi profile, and the LM's shape to plan it offline."""
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", **PHI4_MINI}), encoding="utf-8")
    return [str(tmp_path / "recipe.yaml"), "--lm-shape", str(tmp_path / "config.json")]


def run(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", *arguments])
    if done.exception:
        raise done.exception
    return done.output


def test_a_phi_recipe_is_planned_offline(phi: list[str]) -> None:
    output = run(*phi, "--gpu", "H100", "--gpus", "8")
    assert "phi-instruct on 8 x H100: 3,871.7M parameters, 35.66M trained; a checkpoint takes 0.43 GB" in output
    for word in ("frozen weights", "activations", "optimizer", "ZeRO-2", "1,000 steps", "at 30% of 8 x 989.4 TFLOP/s"):
        assert word in output
    assert "tokens: a bound" in output
    assert "fits best: zero.stage=0 micro_batch=" in output
    assert "as written (zero.stage=2 micro_batch=4) fits" in output


def test_json_says_the_same(phi: list[str]) -> None:
    values = json.loads(run(*phi, "micro_batch=2", "--gpu", "A100-40GB", "--gpus", "4", "--mfu", "0.5", "--json"))
    assert values["workers"] == 4
    assert values["mfu"] == 0.5
    assert values["as_written"]["micro_batch"] == 2
    assert values["tokens"] == 1000 * 32 * 1024
    assert values["accumulation"] == 4
    peaks = [stage["peak"] for stage in values["stages"]]
    assert peaks[1] > peaks[2] > peaks[3]


@pytest.mark.usefixtures("no_hub")
def test_a_profile_out_of_reach_is_one_line(phi: list[str]) -> None:
    with pytest.raises(WeightsError, match=r"Phi-4-mini-instruct.*--lm-shape") as caught:
        run(phi[0])
    assert "\n" not in str(caught.value)


def test_a_recipe_of_clip_is_refused() -> None:
    with pytest.raises(ConfigError, match="trains CLIP"):
        run("embedded-clip")


@pytest.mark.slow
def test_this_machine_is_rehearsed(phi: list[str], tmp_path: Path) -> None:
    tiny = tmp_path / "tiny"
    tiny_lm_config("llama").save_pretrained(tiny)
    values = json.loads(run(phi[0], "--lm-shape", str(tiny / "config.json"), "--gpu", "cpu", "--gpus", "1", "--json"))
    measured = values["accelerator"]
    assert measured["name"] == "cpu"
    assert measured["runtime"] > 1e8
    assert measured["flops"] > 1e8
    assert measured["slack"] >= 0
    assert values["as_written"]["memory"]["runtime"] == measured["runtime"]
