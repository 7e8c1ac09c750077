"""What a run left in its folder, read back: for reports, and for whoever wants to know later.

    metrics.jsonl   a line of JSON for each step, phase and event (`train_jobs.progress`)
    recipe.yaml     the recipe as it was run
    answers.json    held-out questions with the answers before and after
    run.json        the `BundleInfo`: profile, data hashes, versions, scores

In: a run's folder or name. Out: a `RunRecord`. A run of which only the log is there (CLIP's, or one that goes on) is
read as well. Does not know how it is shown.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mmllm_core.bundle import BundleInfo
from mmllm_core.config import StrictModel
from mmllm_core.errors import DataError
from mmllm_core.evaluation.accuracy import OVERALL, Score, Scores, scores_from_json
from train_jobs.progress import read_metrics, step_lines
from train_jobs.run_folders import LOG, run_folder

RECIPE, ANSWERS, INFO = "recipe.yaml", "answers.json", "run.json"
WARM_UP = 2
"""First steps of an attempt, in which libraries compile and caches fill: no measure of speed."""


class Answer(StrictModel):
    """A held-out question, and what was answered before and after training."""

    image: Path | None
    question: str
    right: str
    kind: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    folder: Path
    lines: tuple[dict[str, Any], ...]
    recipe: str
    """YAML; empty if there is none."""
    answers: tuple[Answer, ...]
    info: BundleInfo | None

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.folder.name

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Lines of steps, each step once."""
        return step_lines(self.lines)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened: restarts, checkpoints, skipped batches."""
        return [line for line in self.lines if "event" in line]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps at which a value was measured, and the values."""
        found = [(line["step"], line[name]) for line in self.steps if line.get(name) is not None]
        return [step for step, _ in found], [float(value) for _, value in found]

    def typical(self, name: str) -> float | None:
        """Median of a value over the steps, without the first; None if it was never measured."""
        _, values = self.series(name)
        return median(values[WARM_UP:] or values) if values else None

    def total(self, name: str) -> float | None:
        """Sum of a value over the steps; None if it was never measured."""
        _, values = self.series(name)
        return sum(values) if values else None

    @property
    def accuracy(self) -> dict[str, Scores]:
        """Scores under `baseline`, `before` and `after`, as far as they were taken."""
        taken = self.info.metrics.get("accuracy", {}) if self.info else {}
        scores = {when: scores_from_json(taken[when]) for when in ("baseline", "before", "after") if taken.get(when)}
        return {when: {kind: by_kind[kind] for kind in _kinds(by_kind)} for when, by_kind in scores.items()}

    def overall(self, when: str) -> Score | None:
        """The score over all questions; None if none were asked."""
        return self.accuracy.get(when, {}).get(OVERALL)


def read_run(run: str | Path) -> RunRecord:
    """Read a run by its folder, or by its name among this machine's runs.

    Raises:
        DataError: there is no such run, or a file in its folder is not what it should be.
    """
    folder = run_folder(run)
    recipe = folder / RECIPE
    return RunRecord(
        folder=folder,
        lines=tuple(read_metrics(folder / LOG)),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        answers=tuple(_read(folder / ANSWERS, list[Answer]) or ()),
        info=_read(folder / INFO, BundleInfo),
    )


def has_ended(folder: Path) -> bool:
    """Whether a run made its bundle."""
    return (folder / INFO).is_file()


def record_info(folder: Path, info: BundleInfo) -> None:
    """Keep what a bundle says of its run beside the log: the bundle may be replaced, moved or removed."""
    (folder / INFO).write_text(info.model_dump_json(indent=2), encoding="utf-8")


def _read(path: Path, kind: Any) -> Any:
    if not path.is_file():
        return None
    try:
        return TypeAdapter(kind).validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: '{where}': {first['msg']}") from error


def _kinds(scores: Scores) -> list[str]:
    return [OVERALL, *sorted(kind for kind in scores if kind != OVERALL)]
