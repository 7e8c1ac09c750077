"""Configs and collation."""

from pathlib import Path

import numpy as np
import pytest

from mmllm_core.config import Profile, Recipe, load_config, parse_overrides
from mmllm_core.conversation import IGNORE_INDEX, Rendered
from mmllm_core.data.collate import collate
from mmllm_core.errors import ConfigError
from mmllm_core.models.profile import load_profile, profile_names


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_masked_by_length_not_by_id(padding: str) -> None:
    rows = [Rendered([1, 0, 0], [IGNORE_INDEX, 0, 0], 0), Rendered([5], [IGNORE_INDEX], 0)]
    batch = collate(rows, [], padding)  # type: ignore[arg-type]
    assert batch.attention_mask[0].tolist() == [1, 1, 1]
    assert batch.attention_mask[1].tolist() == ([0, 0, 1] if padding == "left" else [1, 0, 0])
    assert batch.n_supervised == 2


def test_features_must_match_images() -> None:
    with pytest.raises(ValueError, match="1 images"):
        collate([Rendered([1], [IGNORE_INDEX], 1)], [])
    batch = collate([Rendered([1], [IGNORE_INDEX], 1)], [np.zeros((5, 8), dtype=np.float16)])
    assert batch.features is not None
    assert batch.features.shape == (1, 5, 8)


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_validates(name: str) -> None:
    assert load_profile(name).name == name


def test_an_unknown_key_is_named_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("name: x\nvision: {source: {kind: path, path: v}, featur_layer: -1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Profile, path)
    assert "unknown key 'vision.featur_layer'" in str(caught.value)
    assert "missing key 'audio'" in str(caught.value)


def test_files_that_are_no_yaml_mapping_are_one_line(tmp_path: Path) -> None:
    for text in ("[1, 2]", "a: [", ""):
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(Profile, path)
        assert "\n" not in str(caught.value)


def test_overrides_are_read_as_yaml() -> None:
    assert parse_overrides(["steps=20", "lora.rank=8", "lora=null"]) == {"steps": 20, "lora.rank": 8, "lora": None}


def test_overrides_reach_nested_keys(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\nprofile: embedded\nstage: instruct\nsteps: 5\nlearning_rates: {connector: 1e-3, lm: 1e-3}\n"
    )
    recipe = load_config(Recipe, path, parse_overrides(["steps=20", "lora.rank=8"]))
    assert recipe.steps == 20
    assert recipe.lora is not None
    assert recipe.lora.rank == 8


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\nprofile: embedded\nstage: instruct\nsteps: 5\nlearning_rates: {connector: 1e-3, lm: 1e-3}\n"
        "data: {sources: [{dataset: easy-vqa}, {dataset: chat, file: c}]}\n"
    )
    recipe = load_config(Recipe, path, parse_overrides(["data.sources.0.questions_per_image=3"]))
    assert recipe.data.sources[0].model_dump()["questions_per_image"] == 3
    for key in ("data.sources.2.weight", "data.sources.first.weight", "data.sources.0.dataset.x.y.z", "steps.1.x"):
        with pytest.raises(ConfigError, match=r"override|unknown|'data|'steps"):
            load_config(Recipe, path, {key: 3})


@pytest.mark.parametrize("item", ["steps", "=3", "steps=["])
def test_an_override_that_cannot_be_read_is_named(item: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        parse_overrides([item])


@pytest.mark.parametrize("text", ["[1, 2]", "", "word"])
def test_overriding_a_file_that_is_no_mapping_is_a_config_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(Recipe, path, {"lora.rank": 8})


def test_a_folder_in_place_of_a_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Recipe, tmp_path)
