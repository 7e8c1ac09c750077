"""A run's report: one HTML page that needs nothing but itself, and its plots as PNGs.

In: run folders. Out: `report.html` and a PNG for each picture. Several runs make one page that sets them side by side.
What a run did not measure is left out. Everything that comes from data or from a model is escaped, and the page may
load and run nothing. Does not know how runs are trained.

Run it as `mmllm report RUN [RUN ...]` or `python -m train_jobs.report RUN [RUN ...]`.
"""

import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmllm_core.bundle import BundleInfo
from mmllm_core.errors import ConfigError, ImageError
from mmllm_core.evaluation.accuracy import normalise
from train_jobs.report_figures import figures, number
from train_jobs.report_plots import DARK, LIGHT, PICTURES, draw
from train_jobs.run_folders import runs_folder
from train_jobs.run_record import Answer, RunRecord, read_run, record_info

SAMPLES = 12
"""Answers shown of a run."""
_THUMBNAIL = 192
"""Pixels of an image's longer side."""
_EVENTS = 200
"""Events listed of a run; all of them are in its log."""


def write_report(folder: Path, info: BundleInfo | None = None) -> Path:
    """Write the report of one run into its folder.

    Args:
        info: what the run's bundle says of itself; it is kept beside the log, for later reports.

    Returns:
        The page.

    Raises:
        DataError: the folder holds no run, or files that are not a run's.
    """
    if info is not None:
        record_info(folder, info)
    return report([folder])


def report(runs: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write one page about some runs.

    Args:
        runs: folders, or names of this machine's runs.
        out: folder to write into; if it is not given, the run's own, or one for this comparison beside the runs.

    Returns:
        The page.

    Raises:
        ConfigError: the same run twice, or none.
        DataError: as `write_report`.
    """
    records = [read_run(run) for run in runs]
    if not records or len({record.folder for record in records}) != len(records):
        raise ConfigError("report: name at least one run, and each of them once")
    if out is None:
        together = runs_folder() / "_side-by-side" / "-".join(record.name for record in records)
        out = records[0].folder if len(records) == 1 else together
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (title, _) in PICTURES.items():
        light = draw(name, records, LIGHT)
        if light is None:
            continue
        dark = draw(name, records, DARK)
        assert dark is not None
        (out / f"{name}.png").write_bytes(light)
        pictures.append({"title": title, "light": _data_uri(light), "dark": _data_uri(dark)})
    page = out / "report.html"
    page.write_text(_render(records, pictures), encoding="utf-8")
    return page


def _render(records: Sequence[RunRecord], pictures: list[dict[str, str]]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("train_jobs", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=" and ".join(record.name for record in records) if len(records) < 4 else f"{len(records)} runs",
        runs=[_shown(record) for record in records],
        figures=figures(records),
        pictures=pictures,
        accuracy=_accuracy_rows(records),
        settings=_differing_settings(records) if len(records) > 1 else [],
    )


def _accuracy_rows(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """A row for each kind of question; a cell for each run and each time that it was asked."""
    kinds = dict.fromkeys(kind for run in records for scores in run.accuracy.values() for kind in scores)
    rows = []
    for kind in kinds:
        cells = []
        for run in records:
            for when in ("baseline", "before", "after"):
                score = run.accuracy.get(when, {}).get(kind)
                # A baseline is no sample of anything: it has no interval.
                shown = None if score is None else f"{score.accuracy:.1%}" if when == "baseline" else str(score)
                cells.append({"when": when, "text": shown})
        asked = [score.asked for run in records if (score := run.accuracy.get("after", {}).get(kind))]
        rows.append({"kind": kind, "asked": asked[0] if asked else None, "cells": cells})
    return rows


def _differing_settings(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Settings of the recipes that are not the same in all of them."""
    recipes = [dict(_flat(yaml.safe_load(record.recipe) or {})) for record in records]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [{"key": key, "given": [recipe.get(key) for recipe in recipes]} for key in keys]
    return [row for row in rows if len({str(value) for value in row["given"]}) > 1]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        return [(prefix.rstrip("."), value)]
    return [pair for key, part in parts for pair in _flat(part, f"{prefix}{key}.")]


def _shown(record: RunRecord) -> dict[str, Any]:
    """A run as the template wants it."""
    info = record.info
    return {
        "name": record.name,
        "folder": str(record.folder),
        "profile": info.profile.name if info else None,
        "recipe": record.recipe,
        "data": sorted(info.data.items()) if info else [],
        "versions": sorted(info.versions.items()) if info else [],
        "fingerprint": info.feature_fingerprint if info else None,
        "answers": [_shown_answer(answer) for answer in choose_samples(record.answers)],
        "n_answers": len(record.answers),
        "events": [_shown_event(event) for event in record.events[-_EVENTS:]],
        "n_events": len(record.events),
    }


def choose_samples(answers: Sequence[Answer], n: int = SAMPLES) -> list[Answer]:
    """Up to `n` answers, evenly over kinds and over what training did: mended, spoiled, wrong before and after, right
    all along. The same ones for the same answers."""
    groups: dict[tuple[str, bool, bool], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.kind, _is_right(answer, answer.before), _is_right(answer, answer.after)), []).append(
            answer
        )
    queues = [groups[key] for key in sorted(groups)]
    turns = [answer for turn in range(n) for queue in queues for answer in queue[turn : turn + 1]]
    return sorted(turns[:n], key=lambda answer: (answer.kind, answer.question))


def _is_right(answer: Answer, given: str | None) -> bool:
    return given is not None and normalise(given) == normalise(answer.right)


def _shown_answer(answer: Answer) -> dict[str, Any]:
    return {
        "image": _thumbnail(answer.image) if answer.image else None,
        "file": answer.image.name if answer.image else None,
        "question": answer.question,
        "right": answer.right,
        "kind": answer.kind,
        "given": [
            {"when": when, "text": text, "is_right": _is_right(answer, text)}
            for when, text in (("before", answer.before), ("after", answer.after))
            if text is not None
        ],
    }


def _shown_event(event: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in event.items() if key not in ("event", "step")}
    return {
        "event": event["event"],
        "step": event.get("step"),
        "details": ", ".join(
            f"{key}: {number(value) if isinstance(value, float) else value}" for key, value in rest.items()
        ),
    }


def _thumbnail(path: Path) -> str | None:
    """A small PNG of an image; None if it is not there any more, or cannot be read."""
    from PIL import Image

    from mmllm_core.vision import decode_image

    try:
        image = decode_image(path.read_bytes(), max_pixels=100_000_000)
    except (OSError, ImageError):
        return None
    if max(image.size) > _THUMBNAIL:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    elif 2 * max(image.size) <= _THUMBNAIL:
        factor = _THUMBNAIL // max(image.size)  # whole pixels, so that a tiny picture stays sharp
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    stored = io.BytesIO()
    image.save(stored, "PNG")
    return _data_uri(stored.getvalue())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def main() -> None:
    """Entry point of `python -m train_jobs.report RUN [RUN ...]`."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m train_jobs.report RUN [RUN ...]")
    print(report(sys.argv[1:]))


if __name__ == "__main__":
    main()
