from pathlib import Path
from typing import Any

import pytest

from mmllm_core.errors import ConfigError
from mmllm_core.models.profile import load_profile
from serve_apps.config_files import load_serve_config, serve_config_names


@pytest.mark.parametrize("name", serve_config_names())
def test_shipped_configs_load(name: str) -> None:
    config = load_serve_config(name)
    assert config.name == name
    assert config.ingress.max_replicas == 1  # a chat page has one home


def test_both_configs_ship() -> None:
    assert serve_config_names() == ["embedded", "phi"]


def test_the_laptop_fits_two_cores_and_one_gpu_holds_a_replica_of_each_model() -> None:
    for name, cpus, gpus in (("embedded", 2, 0), ("phi", 16, 1)):
        config = load_serve_config(name)
        options = [part.ray_actor_options for part in (config.ingress, config.clip, config.whisper, config.phi)]
        assert sum(option.num_cpus for option in options) <= cpus
        assert sum(option.num_gpus for option in options) <= gpus


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"phi.num_replicas": 2}, "num_replicas or autoscaling"),
        ({"phi.autoscaling.min_replicas": 5}, "above max_replicas"),
        ({"phi.device": "cuda"}, "device cuda does not go with"),
        ({"clip.ray_actor_options.num_gpus": 0.5}, "device cpu does not go with"),
        ({"clip.max_batch_size": 64}, "batches would never fill"),
        ({"whisper.ray_actor_options.resources": {"text": 1}}, "must ask for audio and asks for text"),
        ({"ingress.ray_actor_options.resources": {"vision": 1}}, "must ask for nothing and asks for vision"),
        ({"ingress.num_replicas": 2}, "ui needs a single ingress replica"),
        (
            {
                "ui": False,
                "ingress.num_replicas": None,
                "ingress.autoscaling": {"min_replicas": 0, "max_replicas": 1, "target_requests": 9},
            },
            "nobody would answer",
        ),
    ],
)
def test_settings_that_cannot_work_together_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_serve_config("embedded", overrides)


def test_a_service_without_a_page_may_have_several_ingress_replicas() -> None:
    assert load_serve_config("embedded", {"ui": False, "ingress.num_replicas": 3}).ingress.max_replicas == 3


@pytest.mark.parametrize("key", ["prot", "clip.batch_size", "limits.max_body", "phi.ray_actor_options.resources.sound"])
def test_unknown_keys_are_named(key: str) -> None:
    with pytest.raises(ConfigError, match=key.rsplit(".", 1)[-1]):
        load_serve_config("embedded", {key: 1})


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="embedded, phi"):
        load_serve_config("laptop")


def test_a_file_of_ones_own_is_loaded_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    shipped = Path(__file__).parents[2] / "serve_apps" / "configs" / "embedded.yaml"
    path.write_text(shipped.read_text().replace("port: 8000", "port: 9000"))
    assert load_serve_config(str(path)).http.base_url == "http://127.0.0.1:9000"


def test_a_relative_feature_store_means_the_same_folder_for_replicas_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_serve_config("embedded", {"clip.feature_store": "features"})
    assert config.clip.feature_store == str(tmp_path / "features")
    url = load_serve_config("embedded", {"clip.feature_store": "s3://bucket/features"})
    assert url.clip.feature_store == "s3://bucket/features"


def test_how_whisper_is_run_is_the_profiles_unless_the_config_says() -> None:
    profile = load_profile("embedded").audio
    assert load_serve_config("embedded").whisper.audio(profile) == profile
    changed = {"whisper.engine": "openai-whisper", "whisper.compute_type": "float32", "whisper.batch_size": 4}
    audio = load_serve_config("embedded", changed).whisper.audio(profile)
    assert (audio.engine, audio.compute_type, audio.batch_size) == ("openai-whisper", "float32", 4)
    assert audio.beam_size == profile.beam_size


@pytest.mark.parametrize("wrong", [{"whisper.engine": "openai-whisper"}, {"whisper.compute_type": "float16"}])
def test_whisper_does_not_compute_in_what_it_cannot(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="compute_type"):
        load_serve_config("embedded", wrong).whisper.audio(load_profile("embedded").audio)
