"""RESULTS.md says what was measured and nothing else; `make bench` goes on where a bench fails."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.bench.gpu import SHAPES, measure
from tests.bench.records import Record, at_path, last_json, load_records
from tests.bench.registry import Bench, Figure, Target, benches, by_name, parse_benches
from tests.bench.results_page import AREAS, Outcome, Row, render, rows_of
from tests.bench.run import PAGE, ROOT, Run, call, read_endings
from tests.bench.scratch import emptied

BENCH = Bench(
    "speed", "tests.bench.speed", "Serving", (1, 1), (Figure("fast", "how fast", "times", Target.parse(">= 2")),)
)


def record(value: float, **changes: Any) -> Record:
    machine = {"cpu": "a CPU", "cores": 2, "memory_gb": 8, "bfloat16": None, "gpu": None}
    found = Record("speed", "quick", "2026-01-02", machine, {"fast": value}, {"torch": "2.13"}, "abc1234")
    return replace(found, **changes)


def the_row(page: str, what: str = "how fast") -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {what} |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.parametrize(
    ("target", "met", "missed"),
    [
        (">= 2", [2, 2.001, 90], [1.9999, -3]),
        ("<= 15", [15, 0], [15.0001]),
        ("< 1", [0.9999], [1, 1.5]),
        ("1 +- 0.15", [0.851, 1, 1.149], [0.849, 1.16]),
    ],
)
def test_a_target_is_met_or_missed(target: str, met: list[float], missed: list[float]) -> None:
    assert all(Target.parse(target).met(value) for value in met)
    assert not any(Target.parse(target).met(value) for value in missed)


def test_what_is_no_target_is_refused() -> None:
    with pytest.raises(ValueError, match="'about 2' is no target"):
        Target.parse("about 2")


@pytest.mark.parametrize(("value", "verdict"), [(2.0, "met"), (1.999, "**missed**"), (0.5, "**missed**")])
def test_a_miss_is_never_called_met_though_it_be_shown_rounded(value: float, verdict: str) -> None:
    page = render([BENCH], [record(value)], {})
    assert the_row(page)[1:4] == [f"{value:.2f} x", "≥ 2.00 x", verdict]
    assert ("Missed:" in page) == (verdict != "met")


def test_a_figure_that_nobody_measured_is_called_so() -> None:
    page = render([BENCH], [], {})
    assert the_row(page)[1:] == ["not measured", "≥ 2.00 x", "not measured", ""]
    assert "Of 1 targets 0 are met, 0 missed and 1 not measured" in page


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"measured": "2026-01-01", "mode": "full"}, {"measured": "2026-01-02", "mode": "quick"}),
        ({"measured": "2026-01-02", "mode": "quick"}, {"measured": "2026-01-02", "mode": "full"}),
        ({"measured": "2026-01-02", "mode": "earlier", "machine": {"as_stated": "two cores"}}, {}),
    ],
)
def test_the_newest_figure_is_shown(older: dict[str, Any], newer: dict[str, Any]) -> None:
    records = [record(7, **newer), record(3, **older)]
    assert [row.value for row in rows_of([BENCH], records)] == [7]


def test_a_newer_record_without_a_figure_leaves_the_older_one() -> None:
    other = record(0, measured="2026-01-09", figures={"other": 5.0})
    assert the_row(render([BENCH], [record(3), other], {}))[4] == "A, 2026-01-02, quick, abc1234"


def test_a_bench_that_failed_shows_its_last_figure_and_why_there_is_no_newer_one() -> None:
    failed = Outcome("failed", "2026-02-01", "full", "def5678+", "exit code 9, see raw/speed.log")
    page = render([BENCH], [record(3)], {"speed": failed})
    assert the_row(page)[4] == "A, 2026-01-02, quick, abc1234; failed when last asked for"
    assert "failed: exit code 9, see raw/speed.log |  | 2026-02-01, full, def5678 with changes |" in page


def test_a_target_of_one_gpu_is_not_judged_on_another() -> None:
    figure = Figure("fast", "how fast", "percent", Target.parse(">= 0.4", only_on="H100"))
    gpus = {"NVIDIA H100 80GB HBM3": "met", "NVIDIA L4": "not judged"}
    for gpu, verdict in gpus.items():
        measured = record(0.5, machine={**record(0).machine, "gpu": gpu})
        assert Row(BENCH, figure, measured).verdict == verdict


def test_a_busy_machine_is_told() -> None:
    page = render([BENCH], [record(3, busy_before=0.6)], {})
    assert the_row(page)[4].endswith("other work took 60% of the machine")


@pytest.mark.parametrize(
    ("path", "found"), [("a.1.b c", 2.0), ("a.0", None), ("a.7.b", None), ("flag", None), ("nan", None), ("x.y", None)]
)
def test_figures_are_found_by_their_path(path: str, found: float | None) -> None:
    assert at_path({"a": [{}, {"b c": 2}], "flag": True, "nan": float("nan"), "x": 1}, path) == found


def test_the_last_line_is_what_a_bench_found() -> None:
    assert last_json('{"no": 1}\ntable\n{"yes": 2}\n') == {"yes": 2}
    assert last_json("no figures\n") is None
    assert last_json("") is None


def test_every_bench_of_the_table_is_a_program_and_has_a_place_on_the_page() -> None:
    for bench in benches():
        assert find_spec(bench.module), bench.name
        assert bench.area in AREAS
        assert len({figure.path for figure in bench.figures}) == len(bench.figures), bench.name


def test_an_entry_that_cannot_be_used_is_named() -> None:
    entry = {"module": "m", "area": "GPU", "seconds": [1, 1], "figures": []}
    with pytest.raises(ValueError, match=r"fast: .*'qick'"):
        parse_benches({"fast": entry | {"qick": ""}})
    with pytest.raises(ValueError, match="fast: needs 'luck', which is none of"):
        parse_benches({"fast": entry | {"needs": ["luck"]}})
    with pytest.raises(ValueError, match="no bench is called 'fats': choose of startup"):
        by_name(["fats"])


def test_kept_records_are_of_figures_that_the_page_shows() -> None:
    known = {bench.name: {figure.path for figure in bench.figures} for bench in benches()}
    for kept in load_records():
        assert kept.figures
        assert set(kept.figures) <= known[kept.bench], kept.bench


def test_the_page_is_what_its_records_make_it() -> None:
    """After a change of benches.yaml or of a record: make bench ARGS=--render-only."""
    assert PAGE.read_text(encoding="utf-8") == render(benches(), load_records(), read_endings())


def startup(name: str, arguments: str, **changes: Any) -> Bench:
    """The bench of importing, as another entry."""
    (found,) = by_name(["startup"])
    return replace(found, name=name, quick=tuple(arguments.split()), seconds=(30, 30), **changes)


def test_a_bench_that_fails_keeps_no_other_from_running(tmp_path: Path) -> None:
    run = Run("quick", 20, tmp_path / "home", tmp_path / "kept", tmp_path / "RESULTS.md")
    run.run(
        [startup("broken", "--rounds none"), startup("startup", "--rounds 1"), startup("blind", "", needs=("gpu",))]
    )
    assert {name: outcome.status for name, outcome in run.outcomes.items()} == {
        "broken": "failed",
        "startup": "measured",
        "blind": "measured" if torch.cuda.is_available() else "left out",
    }
    assert "exit code 2" in run.outcomes["broken"].reason
    assert "invalid int value" in (tmp_path / "kept" / "raw" / "broken.log").read_text()
    (kept,) = [found for found in load_records(tmp_path / "kept") if found.bench == "startup"]
    assert 0 < kept.figures["import_core_s"] < 60
    assert kept.machine["cores"] >= 1
    assert kept.versions["torch"]
    assert "| `startup` (`python -m tests.bench.startup`) | measured |" in (tmp_path / "RESULTS.md").read_text()


def test_what_does_not_fit_the_time_is_left_out(tmp_path: Path) -> None:
    run = Run("quick", 0.1, tmp_path / "home", tmp_path / "kept", tmp_path / "RESULTS.md")
    run.run([startup("startup", "")])
    assert run.outcomes["startup"].status == "left out"
    assert run.outcomes["startup"].reason == "the time that all benches have was up"
    assert load_records(tmp_path / "kept") == []


def test_a_program_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    forever = "import time; time.sleep(600)"
    starts = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
    program = f"{starts}; print(p.pid, flush=True); {forever}"
    printed = tmp_path / "program.out"

    def seconds_left(_: float) -> None:
        """The clock stands still until the program has started its own."""
        while not printed.read_text():
            time.sleep(0.05)

    assert call(["-c", program, forever], tmp_path, tmp_path / "program", 1.0, seconds_left) is None
    gone = time.monotonic() + 30
    while runs(int(printed.read_text())):
        assert time.monotonic() < gone


def runs(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_home_that_no_bench_made_is_not_emptied(tmp_path: Path) -> None:
    made = emptied(tmp_path / "bench")
    (made / "bundles").mkdir()
    assert [file.name for file in emptied(made).iterdir()] == ["made-by-a-bench"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "bundle").touch()
    with pytest.raises(SystemExit, match="holds what no bench has made"):
        emptied(tmp_path / "mine")
    assert (tmp_path / "mine" / "bundle").exists()


WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder
lacking = set(sys.argv.pop(1).split(","))
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *of: None if name.partition(".")[0] in lacking else find(name, *of))
runpy.run_module("tests.bench.gpu", run_name="__main__")
"""


@pytest.mark.lengthy
def test_the_gpu_bench_runs_with_little_more_than_torch() -> None:
    """On a CPU and in a tiny shape: that it runs, and that its arithmetic is the stated one."""
    lacking = "bitsandbytes,deepspeed,open_clip,PIL,psutil,pyarrow,pydantic,pydantic_core,ray,rich,typer,xgrammar"
    command = [sys.executable, "-c", WITHOUT, lacking, "--device", "cpu", "--shape", "tiny"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["tiny"]
    assert "bitsandbytes is not installed" in found["qlora"]["left_out"]
    assert found["clip"]["tower"] == "transformers"
    assert found["engine"]["of_generate"] > 0
    lora = found["lora"]
    layers, adapter, head, attention = 2 * 36_864, 2 * 3_328, 512 * 64, 12 * 2 * 32 * 64
    assert lora["trained"] == adapter
    assert lora["flops_per_step"] == 64 * (4 * layers + 6 * adapter + attention) + 62 * 4 * head
    assert lora["mfu"] == pytest.approx(lora["flops_per_step"] / lora["step_s"] / lora["peak_flops"])


def test_the_gpu_bench_trains_beside_a_quantized_lm() -> None:
    found = measure(["qlora", "lora"], SHAPES["tiny"], "cpu")
    assert found["qlora"]["weights"] == "NF4"
    assert found["qlora"]["parameters"] == found["lora"]["parameters"]
    assert all(5 < loss < 8 for loss in found["qlora"]["losses"])
    assert found["qlora"]["losses"] != found["lora"]["losses"]


def test_figures_of_a_gpu_are_kept_only_if_they_are_of_one() -> None:
    command = [sys.executable, "-m", "tests.bench.gpu", "--keep", "--device", "cpu", "--shape", "tiny"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--keep: only a whole run at the real shape on a GPU is kept" in done.stderr
