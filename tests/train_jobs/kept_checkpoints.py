"""Waiting until a run has a checkpoint that it would be started again from."""

import json
from pathlib import Path

from tests.waiting import wait_for


def kept_step(folder: Path) -> int:
    """Step of the checkpoint that Ray Train would start a run again from; 0 where there is none yet.

    It is the record of Ray Train's controller (`ray.train.v2._internal.execution.checkpoint.checkpoint_manager`) in the
    run's folder of the storage. The `checkpoint` of a worker in our own log comes before that, by up to the two seconds
    after which the controller asks workers again.
    """
    try:
        record = json.loads((folder / "checkpoint_manager_snapshot.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # none yet, or it is being written
        return 0
    last = record["latest_checkpoint_result"]
    return int(last["metrics"]["step"]) if last else 0


def wait_for_kept_step(folder: Path, step: int) -> None:
    """Until a run would be started again from this step or a later one.

    Raises:
        TimeoutError: it did not come so far.
    """
    wait_for(lambda: kept_step(folder) >= step, f"{folder}: a checkpoint of step {step}", seconds=400)
