"""The jobs for real, small: Ray Train, DeepSpeed ZeRO-2, NF4 and LoRA on two CPU workers; real data, tiny models."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cluster.local import local_ray, quieten
from mmllm_core.bundle import Bundle
from mmllm_core.config import ClipRecipe, Recipe, parse_config
from mmllm_core.data import easy_vqa
from mmllm_core.errors import ConfigError, TrainingError
from mmllm_core.evaluation.accuracy import answer_questions
from mmllm_core.models.home import features_folder, home
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from tests.train_jobs.conftest import save_tiny_lm
from train_jobs.checkpoint import load_weights_alone
from train_jobs.embed_images import embed_images, embed_recipe
from train_jobs.evaluate import Asked, evaluate
from train_jobs.held_out import HeldOutQuestions
from train_jobs.plan import planned_profile
from train_jobs.run_record import read_run
from train_jobs.stored_features import StoredFeatures
from train_jobs.train import TrainedRun, train
from train_jobs.train_clip import train_clip

pytestmark = pytest.mark.slow

CLIP = {
    "name": "tiny-clip",
    "architecture": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
    },
    "steps": 6,
    "batch_size": 32,
    "workers": 2,
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory, home_of_the_module: None) -> Iterator[Path]:
    """A profile file of tiny models in a home of its own; packages come from the usual home."""
    quieten()
    folder = tmp_path_factory.mktemp("home")
    embedded = load_profile("embedded")
    tokenizer_folder = resolve(embedded.language.source)
    easy_vqa.fetch()
    (folder / "packages").symlink_to(home() / "packages")
    os.environ["MMLLM_HOME"] = str(folder)
    from transformers import AutoTokenizer

    save_tiny_lm(AutoTokenizer.from_pretrained(tokenizer_folder), folder / "lm")
    values = embedded.model_dump(mode="json")
    values["vision"] |= {"source": {"kind": "trained", "recipe": "tiny-clip"}, "merge": 2}
    values["language"] |= {"source": {"kind": "path", "path": str(folder / "lm")}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with local_ray():
        yield path


@pytest.fixture(autouse=True)
def _shared_home(_home_of_the_test: None, profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this file look at one home; elsewhere each has its own."""
    monkeypatch.setenv("MMLLM_HOME", str(profile.parent))


def recipe(profile: Path, **changes: object) -> Recipe:
    """Three steps of what embedded-instruct does."""
    values = {"name": "tiny", "profile": str(profile), "stage": "instruct", "steps": 3, "micro_batch": 2}
    values |= {"word_alignment_steps": 5, "evaluation_questions": 20, "batch_size": 4}
    values |= {"learning_rates": {"connector": 1e-3, "lm": 1e-3}, "tracker": "none"}
    values |= {"lora": {"rank": 4, "interpolation": 0.5}}
    return parse_config(Recipe, values | changes, "test")


@pytest.fixture(scope="module")
def run(profile: Path) -> TrainedRun:
    clip = parse_config(ClipRecipe, CLIP, "test")
    weights = train_clip(clip)
    stamp = weights.stat().st_mtime_ns
    assert train_clip(clip).stat().st_mtime_ns == stamp, "an equal recipe is not trained again"
    n_images = sum(len(easy_vqa.load_split(easy_vqa.fetch(), split)) for split in ("train", "test"))
    written = embed_recipe(recipe(profile)).new
    assert 0 < written <= n_images, "pictures with equal pixels are stored once"
    assert embed_recipe(recipe(profile)).new == 0, "what is stored is not encoded again"
    return train(recipe(profile))


def test_training_leaves_a_bundle_that_opens_and_answers(run: TrainedRun, tmp_path: Path) -> None:
    bundle = Bundle.latest()
    assert bundle.folder == run.bundle.folder
    model = bundle.load_model()
    assert model.trainable_names() == set()
    assert bundle.load_vision().fingerprint == bundle.info.feature_fingerprint
    found = evaluate(bundle, Asked(limit=24), workers=1)
    assert found.scores["all"].asked == found.baseline["all"].asked == 24
    features = StoredFeatures(features_folder(), bundle.info.feature_fingerprint)
    assert found.answers == answer_questions(model, bundle.tokenizer, found.questions, features)
    found.save(tmp_path / "answers.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == found.answers
    assert sum(line["is_right"] for line in lines) == found.scores["all"].right
    assert all(Path(line["image"]).is_file() for line in lines)


def test_only_what_was_trained_is_saved(run: TrainedRun) -> None:
    adapter = load_file(run.bundle.folder / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in key for key in adapter)
    assert any(weight.abs().sum() > 0 for key, weight in adapter.items() if "lora_B" in key)


def test_the_adapter_is_taken_as_far_as_the_recipe_says(run: TrainedRun) -> None:
    adapter = load_file(run.bundle.folder / "adapter" / "adapter_model.safetensors")
    checkpoint = max((run.bundle.folder.parents[1] / "ray" / "tiny").glob("checkpoint_*/"))
    trained = load_weights_alone(checkpoint)
    for name, weight in adapter.items():
        whole = trained["lm." + name.replace(".weight", ".default.weight")]
        assert torch.allclose(weight, 0.5 * whole if "lora_B" in name else whole, rtol=2**-8), name  # bfloat16


def test_a_run_asks_what_its_bundle_answers(run: TrainedRun) -> None:
    held_out = HeldOutQuestions(20, 0)
    features = StoredFeatures(features_folder(), run.bundle.info.feature_fingerprint)
    model = run.bundle.load_model()
    answers = {}
    # As the workers asked: bfloat16 rounds otherwise in other batches, and two words of a random LM are close.
    for share in (held_out.share(rank, 2) for rank in range(2)):
        asked = [held_out.questions[i] for i in share]
        answers |= zip(share, answer_questions(model, run.bundle.tokenizer, asked, features), strict=True)
    assert [answer.after for answer in read_run(run.folder).answers] == [answers[i] for i in range(20)]


def test_a_run_records_what_made_it(run: TrainedRun) -> None:
    info = run.bundle.info
    assert info.recipe["steps"] == 3
    assert info.data == {"easy-vqa": easy_vqa.SOURCE.sha256}
    assert info.versions["torch"] == torch.__version__.partition("+")[0]
    assert run.after["all"].asked == run.before["all"].asked == 20
    assert run.report.stat().st_size > 1000


def test_an_equal_recipe_reuses_the_bundle(run: TrainedRun, profile: Path) -> None:
    before = (run.bundle.folder / "bundle.json").stat().st_mtime_ns
    again = train(recipe(profile))
    assert (again.bundle.folder / "bundle.json").stat().st_mtime_ns == before
    assert again.after == run.after


def test_a_loss_that_is_not_finite_is_one_named_error(run: TrainedRun, profile: Path) -> None:
    too_fast = {"connector": 1e30, "lm": 1e30}
    broken = recipe(profile, name="broken", learning_rates=too_fast, warmup_steps=0, workers=1)
    with pytest.raises(TrainingError, match="the loss is not finite in a batch of easy-vqa"):
        train(broken)
    assert Bundle.latest().folder == run.bundle.folder, "the last good bundle stays"


def test_an_image_that_cannot_be_read_is_one_line_that_names_it(run: TrainedRun, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    vision = run.bundle.profile.vision
    with pytest.raises(TrainingError, match=r"broken\.png: the image could not be read") as caught:
        embed_images([broken], vision, run.bundle.weights(vision.source))
    assert "\n" not in str(caught.value)


def test_evaluating_without_stored_features_computes_them(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_stored = evaluate(run.bundle, Asked(limit=4), workers=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "packages").symlink_to(home() / "packages")
    (tmp_path / "other" / "clip").symlink_to(home() / "clip")
    monkeypatch.setenv("MMLLM_HOME", str(tmp_path / "other"))
    assert evaluate(run.bundle, Asked(limit=4), workers=1).answers == with_stored.answers


def test_images_and_text_train_together_packed_and_through_cross_attention(
    run: TrainedRun, profile: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "What is a circle?"}, {"role": "assistant", "content": "A round shape."}]
    chat.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    connector = {"kind": "cross_attention", "every_k_layers": 1, "n_queries": 4}
    sources = [{"dataset": "easy-vqa"}, {"dataset": "chat", "file": str(chat)}]
    batching = {"grouping": "modality", "pack_tokens": 512, "window": 4}
    mixed = recipe(
        profile,
        name="mixed",
        connector=connector,
        data={"sources": sources},
        batching=batching,
        word_alignment_steps=0,
        workers=1,
    )

    bundle = train(mixed).bundle
    assert bundle.info.data.keys() == {"easy-vqa", "chat"}
    gates = [t for n, t in load_file(bundle.folder / "connector.safetensors").items() if n.endswith("_gate")]
    assert len(gates) == 4
    assert all(gate.abs() > 0 for gate in gates), "the LM has begun to look"
    assert bundle.load_model().connector.n_tokens(bundle.info.n_patches) == 1
    with pytest.raises(ConfigError, match="leave 'connector' out"):
        recipe(profile, connector=connector, from_bundle="mixed")
    further = planned_profile(recipe(profile, name="further", from_bundle="mixed"))
    assert further.connector == bundle.profile.connector, "the bundle's connector, not the profile's, is planned"
