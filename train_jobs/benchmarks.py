"""Public benchmarks of a served assistant, by lmms-eval through the OpenAI API.

In: names of benchmarks and the URL of a service. Out: their scores, as lmms-eval counts them. lmms-eval's packages do
not go with our pins, so it lives in an environment of its own and is run as a program; nothing of it is imported. Does
not know bundles or models: what is measured is what users get.
"""

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm_core.errors import ConfigError, EnvironmentLack, MmllmError
from mmllm_core.models.home import home

SUITES = {
    "vqav2": "vqav2_val",
    "gqa": "gqa",
    "textvqa": "textvqa_val",
    "pope": "pope",
    # The other tasks of MMBench have answers read by GPT-4; this one looks for the letter.
    "mmbench": "mmbench_en_dev_static",
}
"""lmms-eval's tasks by the benchmark's name; its other tasks go by their own."""

PROGRAM_VARIABLE = "MMLLM_LMMS_EVAL"
REQUIREMENT = "lmms-eval==0.7.3"
_INSTALL = f"python3 -m venv lmms-eval && lmms-eval/bin/pip install '{REQUIREMENT}'"
_FAILED = "[LMMS_EVAL_REQUEST_FAILED"
"""How an answer begins that lmms-eval did not get. It would count as a wrong answer."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"Error during evaluation: (.*?)(?:\.? Please set .*)?$")


@dataclass(frozen=True)
class BenchmarkRun:
    """What to ask, and whom."""

    tasks: tuple[str, ...]
    """Names of `SUITES`, or of lmms-eval's tasks."""
    url: str
    """Of the service, without `/v1`."""
    model: str
    """Id under which it is asked for."""
    limit: int | None = None
    """Questions of each task, the first ones; None for all."""
    concurrent: int = 8
    """Requests at a time."""
    own_tasks: Path | None = None
    """Folder with YAML files of tasks that lmms-eval does not have."""


@dataclass(frozen=True)
class BenchmarkScore:
    """One figure of one task."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    asked: int | None


def run_benchmarks(run: BenchmarkRun, program: Path, folder: Path) -> list[BenchmarkScore]:
    """Let lmms-eval ask the service.

    Args:
        program: lmms-eval's, as `find_program` finds it.
        folder: for its log, its answers (JSON lines of each task) and its results; made anew.

    Raises:
        MmllmError: it failed, knows no such task, or got no answer to some of its questions.
    """
    folder.mkdir(parents=True)
    log = folder / "lmms-eval.log"
    with log.open("wb") as stream:
        done = subprocess.run(
            command(run, program, folder), stdout=stream, stderr=subprocess.STDOUT, env=_environment(), check=False
        )
    results = sorted(folder.rglob("*_results.json"))
    if done.returncode or not results:
        raise MmllmError(f"lmms-eval gave no results: {_last_error(log)}; all it said: {log}")
    unanswered = list(_unanswered(folder))
    if unanswered:
        raise MmllmError(
            f"questions without an answer: {len(unanswered)}, which would count as wrong ({unanswered[0]}): "
            f"mend the service or ask fewer at a time with --concurrent; the answers are in {folder}"
        )
    return read_scores(results[-1])


def command(run: BenchmarkRun, program: Path, folder: Path) -> list[str]:
    """lmms-eval's command line.

    Raises:
        ConfigError: no task was named, or a name holds what separates names there.
    """
    if not run.tasks:
        raise ConfigError(f"no benchmark was named: give some of {', '.join(SUITES)}, or lmms-eval's own names")
    model_args = {
        "model_version": run.model,
        "base_url": f"{run.url.rstrip('/')}/v1",
        "api_key": "local",  # else it would send us the user's own OpenAI key
        "num_concurrent": str(run.concurrent),
    }
    for value in (*run.tasks, *model_args.values()):
        if "," in value:
            raise ConfigError(f"'{value}' holds a comma, with which lmms-eval separates values: leave it out")
    arguments = {
        "--model": "openai",
        "--model_args": ",".join(f"{name}={value}" for name, value in model_args.items()),
        "--tasks": ",".join(SUITES.get(task, task) for task in run.tasks),
        "--batch_size": "1",
        "--output_path": str(folder),
    }
    if run.limit is not None:
        arguments["--limit"] = str(run.limit)
    if run.own_tasks is not None:
        arguments["--include_path"] = str(run.own_tasks)
    return [str(program), "eval", *(part for pair in arguments.items() for part in pair), "--log_samples"]


def find_program(given: Path | None = None) -> Path:
    """lmms-eval's program: the one given, that of `$MMLLM_LMMS_EVAL`, or the one on the PATH.

    Raises:
        EnvironmentLack: there is none.
    """
    named = str(given) if given else os.environ.get(PROGRAM_VARIABLE)
    found = shutil.which(named or "lmms-eval")
    if found is None:
        what = f"{named}: is no program" if named else "lmms-eval is not installed"
        raise EnvironmentLack(
            f"{what}: it wants an environment of its own ({_INSTALL}), and its program is named with --lmms-eval or in "
            f"{PROGRAM_VARIABLE}"
        )
    return Path(found)


def results_folder(model: str) -> Path:
    """A folder for the results of a run that begins now; it does not exist yet."""
    return home() / "benchmarks" / f"{model}-{time.strftime('%Y%m%d-%H%M%S')}"


def read_scores(results: Path) -> list[BenchmarkScore]:
    """The figures of lmms-eval's results file, in its order; what is no number (a submission's file) is left out."""
    told = json.loads(results.read_text(encoding="utf-8"))
    asked = {task: counts.get("effective") for task, counts in told.get("n-samples", {}).items()}
    return [
        BenchmarkScore(task, metric, value, error, asked.get(task))
        for task, figures in told["results"].items()
        for metric, value, error in _figures(figures)
    ]


def _figures(figures: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """`{"exact_match,none": 0.5, "exact_match_stderr,none": 0.1}` -> `("exact_match", 0.5, 0.1)`."""
    for key, told in figures.items():
        metric, comma, chosen_by = key.partition(",")
        value = _number(told)
        if comma and value is not None and "_stderr" not in metric:
            yield metric, value, _number(figures.get(f"{metric}_stderr,{chosen_by}"))


def _number(told: Any) -> float | None:
    """A finite number, or None for what lmms-eval writes besides: `N/A`, the path of a file."""
    is_number = isinstance(told, int | float) and not isinstance(told, bool) and math.isfinite(told)
    return float(told) if is_number else None


def _unanswered(folder: Path) -> Iterator[str]:
    """What lmms-eval wrote in place of answers that it did not get."""
    for path in sorted(folder.rglob("*_samples_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            answers = sample.get("resps", sample.get("filtered_resps", []))
            yield from (text for text in _texts(answers) if text.startswith(_FAILED))


def _texts(value: str | Sequence[Any]) -> Iterator[str]:
    """The strings of nested lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _environment() -> dict[str, str]:
    """Ours, without what would make another environment's Python import from here."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _last_error(log: Path) -> str:
    said = _COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    error = (errors or lines or ["it said nothing"])[-1]
    told = _ERROR.search(error)
    hint = (
        ": its data set wants a token of the Hugging Face hub: hf auth login" if "LocalTokenNotFound" in error else ""
    )
    return (told[1] if told else error) + hint
