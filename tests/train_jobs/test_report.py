"""The report of a run: whole, self-contained, and safe whatever a model answered."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app
from mmllm_core.bundle import BundleInfo
from mmllm_core.errors import ConfigError, DataError
from mmllm_core.models.profile import load_profile
from train_jobs.progress import MetricsLog
from train_jobs.report import choose_samples, report, write_report
from train_jobs.run_folders import runs_folder
from train_jobs.run_record import Answer, read_run

MEASURED = {
    "loss": 2.0,
    "grad_norm": 1.0,
    "lr_connector": 1e-4,
    "lr_lm": 1e-3,
    "tokens": 1000,
    "tokens_per_second": 250.0,
    "samples_per_second": 2.0,
    "step_seconds": 4.0,
    "mfu": 0.25,
    "memory_gb": 1.5,
}
ALL_PICTURES = ["accuracy", "gradient_norm", "learning_rates", "loss", "memory", "mfu", "tokens_per_second"]


def make_run(name: str, *, answers: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """A run of four steps, resumed once."""
    folder = runs_folder() / name
    log = MetricsLog(folder / "metrics.jsonl")
    log.write(phase="loading")
    for step in (1, 2, 3):
        log.write(step=step, **(MEASURED | changes))
    log.write(event="resumed", step=2, workers=1)
    for step in (3, 4):
        log.write(step=step, **(MEASURED | changes))
    (folder / "recipe.yaml").write_text(f"name: {name}\nlearning_rates: {{lm: {changes.get('lr_lm', 0.001)}}}\n")
    if answers is not None:
        (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    return folder


def info(name: str) -> BundleInfo:
    after, before, baseline = {"all": [268, 300], "colour": [53, 53]}, {"all": [0, 300]}, {"all": [130, 300]}
    return BundleInfo(
        name=name,
        profile=load_profile("embedded"),
        d_vision=96,
        n_patches=5,
        feature_fingerprint="f" * 16,
        data={"easy-vqa": "a" * 64},
        metrics={"accuracy": {"before": before, "after": after, "baseline": baseline}},
        versions={"torch": "2.14.1"},
    )


def answer(kind: str = "colour", before: str | None = "red", after: str | None = "blue", **more: Any) -> dict[str, Any]:
    asked = {"image": None, "question": "what color is the shape?", "right": "blue", "kind": kind}
    return asked | {"before": before, "after": after} | more


class _Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


def test_a_run_is_shown_with_all_that_it_left(tmp_path: Path) -> None:
    picture = tmp_path / "dot.png"
    Image.new("RGB", (8, 8), "blue").save(picture)
    folder = make_run("one", answers=[answer(image=str(picture)), answer(after="green")])
    path = write_report(folder, info("one"))
    assert path == folder / "report.html"
    assert sorted(p.stem for p in folder.glob("*.png")) == ALL_PICTURES
    page = page_of(path)
    for wanted in (
        "89.3%",
        "85.3-92.3",
        "4,000",
        "25.0%",
        "1.50 GB",
        "16 s",
        "resumed",
        "a" * 64,
        "2.14.1",
        "name: one",
    ):
        assert wanted in page.text
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(ALL_PICTURES) + 1
    assert "dot.png" in [attrs["alt"] for attrs in images]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    path = write_report(make_run("one", answers=[answer()]), info("one"))
    page = page_of(path)
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert not re.search(r"url\(|@import", path.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}


@pytest.mark.lengthy
@pytest.mark.parametrize("field", ["question", "right", "kind", "after"])
def test_what_models_and_data_say_stays_text(field: str) -> None:
    hostile = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
    page = page_of(write_report(make_run("one", answers=[answer(**{field: hostile})])))
    assert hostile in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attrs for _, attrs in page.tags)


def test_a_kind_of_question_is_drawn_as_it_is_called() -> None:
    values = info("one")
    values.metrics["accuracy"]["after"]["$\\nothing{$"] = [1, 2]
    assert "$\\nothing{$" in page_of(write_report(make_run("one"), values)).text


def test_runs_side_by_side_name_what_their_recipes_say_otherwise() -> None:
    make_run("one")
    make_run("two", lr_lm=0.005)
    path = report(["one", "two"])
    assert path.parent.parent.name == "_side-by-side"
    text = page_of(path).text
    assert "learning_rates.lm" in text
    assert "0.005" in text
    assert sorted(p.stem for p in path.parent.glob("*.png")) == [name for name in ALL_PICTURES if name != "accuracy"]


def test_a_run_of_losses_alone_has_a_report_too() -> None:
    folder = runs_folder() / "clip"
    MetricsLog(folder / "metrics.jsonl").write(step=5, loss=2.0, seconds=1.0)
    write_report(folder)
    assert [p.stem for p in folder.glob("*.png")] == ["loss"]


def test_steps_that_were_done_again_count_once() -> None:
    record = read_run(make_run("one"))
    assert record.series("loss")[0] == [1, 2, 3, 4]
    assert record.total("tokens") == 4000


def test_an_image_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    page = page_of(write_report(make_run("one", answers=[answer(image=str(tmp_path / "lost.png"))])))
    assert "lost.png is gone" in page.text


def test_samples_come_from_every_kind_and_every_outcome() -> None:
    common = [answer("yes/no", "blue", "blue", question=f"{i}?") for i in range(50)]
    rare = [answer("colour", "red", "blue"), answer("shape", "blue", "red"), answer("shape", "red", "red")]
    answers = [Answer.model_validate(values) for values in common + rare]
    chosen = choose_samples(answers, 6)
    assert len(chosen) == 6
    assert [a.kind for a in chosen] == ["colour", "shape", "shape", "yes/no", "yes/no", "yes/no"]
    assert chosen == choose_samples(answers, 6)


def test_what_is_no_run_is_refused_with_the_runs_that_there_are() -> None:
    make_run("one")
    with pytest.raises(DataError, match=r"two: no run.*one"):
        read_run("two")


def test_a_run_is_not_set_beside_itself() -> None:
    folder = make_run("one")
    with pytest.raises(ConfigError, match="once"):
        report(["one", folder])


def test_answers_of_another_form_are_refused_by_name() -> None:
    folder = make_run("one", answers=[{"question": "what?"}])
    with pytest.raises(DataError, match=r"answers\.json.*0\.image"):
        read_run(folder)


def test_the_command_prints_the_page(tmp_path: Path) -> None:
    make_run("one")
    done = CliRunner().invoke(app, ["report", "one", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert Path(done.output.strip()) == tmp_path / "out" / "report.html"
    assert (tmp_path / "out" / "loss.png").is_file()
