"""What a run was started with, kept in its folder: so that it goes on with the same, or not at all.

    recipe.yaml     the recipe as it is run, for people and reports
    inputs.json     the same, and the profile, data hashes and CLIP that it met; a copy lies beside the checkpoints

Does not know how the run goes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from mmllm_core.config import Profile, Recipe, StrictModel, apply_overrides, parse_config
from mmllm_core.errors import ConfigError, TrainingError
from train_jobs.launch import read_beside_checkpoints, write_beside_checkpoints
from train_jobs.run_folders import INPUTS
from train_jobs.run_record import RECIPE

_HOW = frozenset(
    {
        "workers",
        "min_workers",
        "gpus_per_worker",
        "zero",
        "micro_batch",
        "gradient_checkpointing",
        "checkpoint",
        "max_restarts",
        "on_non_finite",
        "tracker",
    }
)
"""Settings of a recipe that say how it is run; all others say what is learned."""


class RunInputs(StrictModel):
    """`inputs.json`."""

    recipe: Recipe
    profile: Profile
    fingerprint: str
    """Of the CLIP encoder."""
    data: dict[str, str] = Field(default_factory=dict)
    """sha256 of files by source."""
    start: str | None = None
    """sha256 of the manifest of the bundle that the run goes on from."""

    def gives_the_same_as(self, other: "RunInputs") -> bool:
        """Whether a run of these could go on as one of the others."""
        return learns_the_same(self.recipe, other.recipe) and self.model_dump(exclude={"recipe"}) == (
            other.model_dump(exclude={"recipe"})
        )

    def changed(self, changes: dict[str, Any]) -> Recipe:
        """The recipe with other settings of how it is run.

        Args:
            changes: by dotted key, as `parse_overrides` gives them.

        Raises:
            ConfigError: a setting of what is learned, or one that does not validate.
        """
        for key in changes:
            if key.partition(".")[0] not in _HOW:
                raise ConfigError(
                    f"--resume: '{key}' would change what is learned, and a resumed run may change only "
                    f"{', '.join(sorted(_HOW))}: start another run"
                )
        values = self.recipe.model_dump(mode="json")
        apply_overrides(values, changes)
        return parse_config(Recipe, values, f"run '{self.recipe.name}'")

    def require_unchanged(self, now: "RunInputs") -> None:
        """Hold what is there now against what the run was started with.

        Raises:
            TrainingError: something differs; the message says what.
        """
        changed = [
            f"data source '{label}'"
            for label in sorted(self.data.keys() | now.data.keys())
            if self.data.get(label) != now.data.get(label)
        ]
        if now.start != self.start:
            changed.insert(0, f"bundle '{self.recipe.from_bundle}'")
        if now.fingerprint != self.fingerprint:
            changed.insert(0, "CLIP (its weights or which layer is taken)")
        if now.profile != self.profile:
            changed.insert(0, f"profile '{self.profile.name}'")
        if changed:
            raise TrainingError(
                f"--resume {self.recipe.name}: {changed[0]} changed since the run began: bring it back, or start "
                "another run"
            )


def learns_the_same(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes differ at most in how they are run."""
    return one.model_dump(exclude=set(_HOW)) == other.model_dump(exclude=set(_HOW))


def read_inputs(folder: Path, storage: str | None = None) -> RunInputs | None:
    """What a run was started with; None where no run was, or one of another mmllm.

    Args:
        folder: the run's; it is called as the run.
        storage: where the run's checkpoints are, which have a copy, should the folder be lost.
    """
    ways: tuple[Callable[[], str], ...] = (
        lambda: (folder / INPUTS).read_text(encoding="utf-8"),
        lambda: read_beside_checkpoints(storage, folder.name, INPUTS) if storage else "",
    )
    for read in ways:
        try:
            return RunInputs.model_validate_json(read())
        except (OSError, ValueError):
            continue
    return None


def write_inputs(folder: Path, inputs: RunInputs, storage: str | None = None) -> None:
    """Record what a run is started with; folder and storage as for `read_inputs`.

    Raises:
        EnvironmentLack: the storage cannot be written to.
    """
    text = inputs.model_dump_json(indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(
        yaml.safe_dump(inputs.recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
    )
    (folder / INPUTS).write_text(text, encoding="utf-8")
    if storage:
        write_beside_checkpoints(storage, folder.name, INPUTS, text)
