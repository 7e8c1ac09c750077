"""Model cards: what the hub reads of them, and that they say where every part comes from."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from mmllm_core.bundle import Bundle
from mmllm_core.config import Profile
from mmllm_core.interop.export import export_llava, export_merged_bundle, export_merged_lm
from mmllm_core.interop.llava import import_llava
from mmllm_core.interop.model_card import build_card
from mmllm_core.models.profile import load_profile, profile_names


def test_the_header_survives_a_round_trip_through_the_hubs_own_reader(make_bundle: Any, tmp_path: Path) -> None:
    export_llava(make_bundle(quantization="nf4"), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "transformers"
    assert data["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert data["datasets"] == ["easy-vqa"]
    assert {"mmllm", "llava"} <= set(data["tags"])
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy": 0.75, "accuracy (shape)": 0.5}
    assert ModelCard(str(card)).data.to_dict() == data


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_code_that_a_card_shows_runs_as_it_stands(
    dtype: str, make_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    export_llava(make_bundle(quantization="nf4", dtype=dtype), tmp_path / "out")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "picture.png")
    code = ModelCard.load(tmp_path / "out" / "README.md").text.split("```python\n")[1].split("```")[0]
    exec(
        code.replace("FOLDER_OR_REPO", str(tmp_path / "out")).replace("picture.png", str(tmp_path / "picture.png")), {}
    )
    assert capsys.readouterr().out.strip()


def test_the_text_says_parts_data_recipe_metrics_versions_and_the_merge(make_bundle: Any) -> None:
    bundle = make_bundle(quantization="nf4")
    merged = export_merged_bundle(bundle, "merged")
    text = str(build_card(bundle, "llava-hf", merged.info.merged))
    for section in ("How to load it", "Parts and their licences", "Merging", "Data", "Recipe", "Metrics", "Versions"):
        assert f"\n## {section}\n" in text
    assert "f" * 64 in text
    assert "nf4" in text
    assert "75.0%" in text
    assert bundle.info.versions["torch"] in text
    recipe = text.split("## Recipe\n\n```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(recipe) == bundle.info.recipe


def test_a_card_tells_no_folders_of_the_machine_it_was_made_on(make_bundle: Any) -> None:
    bundle = make_bundle()
    recipe = {"profile": "/home/ann/mine.yaml", "data": {"sources": [{"file": "/home/ann/rows.json", "weight": 1.0}]}}
    told = Bundle(bundle.folder, bundle.info.model_copy(update={"recipe": recipe}))
    text = str(build_card(told, "merged-lm", None))
    assert "ann" not in text
    assert "rows.json" in text


def test_a_merged_lm_speaks_of_the_lm_alone(make_bundle: Any, tmp_path: Path) -> None:
    export_merged_lm(make_bundle(), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.eval_results is None
    assert "CLIP trained by mmllm" not in card.text


def test_a_merged_bundle_names_the_licence_of_whisper_too(make_bundle: Any) -> None:
    merged = export_merged_bundle(make_bundle(), "merged")
    card = ModelCard.load(merged.folder / "README.md")
    assert card.data.license == "other"
    assert card.data.license_name == "of-each-part"
    assert "| audio | hears | [Whisper tiny.en](https://huggingface.co/openai/whisper-tiny.en) | mit |" in card.text


@pytest.mark.parametrize(("header", "licence"), [("license: mit", "mit"), ("license: [a, b]", None), (None, None)])
def test_an_imported_checkpoints_licence_is_its_own_cards(
    header: str | None, licence: str | None, checkpoint: Any, profile: Profile
) -> None:
    _, folder = checkpoint()
    if header:
        (folder / "README.md").write_text(f"---\n{header}\n---\n# It\n")
    bundle = import_llava(folder, profile=profile, name="imported")
    assert bundle.profile.language.origin is not None
    assert bundle.profile.language.origin.licence == licence
    card = build_card(bundle, "llava-hf", None)
    assert card.data.license == (licence or "other")
    assert ("**not known**" in card.text) == (licence is None)


@pytest.mark.parametrize("name", profile_names())
def test_every_part_of_every_profile_says_whose_it_is_and_on_what_terms(name: str) -> None:
    profile = load_profile(name)
    for part in (profile.vision, profile.audio, profile.language):
        assert part.origin is not None
        assert part.origin.licence in ("mit", "apache-2.0")


def test_the_profiles_name_the_three_phis() -> None:
    repos = {name: load_profile(name).language.origin for name in ("phi", "phi-3.5", "phi-2")}
    assert [origin.repo for origin in repos.values() if origin] == [
        "microsoft/Phi-4-mini-instruct",
        "microsoft/Phi-3.5-mini-instruct",
        "microsoft/phi-2",
    ]
