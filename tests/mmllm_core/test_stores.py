"""What is kept on disk: artifacts and bundles are whole or not there."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm_core.artifact import build_once, building, is_built
from mmllm_core.bundle import Bundle, BundleInfo, save_bundle
from mmllm_core.config import LoraConfig, PathSource, Profile
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.errors import BundleError, EnvironmentLack
from mmllm_core.language import add_adapter
from mmllm_core.models.profile import load_profile
from mmllm_core.vision import ClipEncoder
from tests.conftest import TinyLM
from tests.full_disk import full_disk


def test_an_artifact_is_reused_only_for_equal_inputs(tmp_path: Path) -> None:
    with building(tmp_path / "a", {"x": 1}) as scratch:
        (scratch / "file").write_text("made")
    assert is_built(tmp_path / "a", {"x": 1})
    assert not is_built(tmp_path / "a", {"x": 2})


def _fail_while_building(folder: Path) -> None:
    with building(folder, {"x": 2}) as scratch:
        (scratch / "file").write_text("half")
        raise RuntimeError("stopped")


def test_a_failed_build_leaves_what_was_there(tmp_path: Path) -> None:
    with building(tmp_path / "a", {"x": 1}) as scratch:
        (scratch / "file").write_text("made")
    with pytest.raises(RuntimeError):
        _fail_while_building(tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "made"
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("mmllm")] == ["a"]


def test_a_full_disk_is_a_named_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    with building(tmp_path / "a", {"x": 1}) as scratch:
        (scratch / "file").write_text("made")
    with full_disk(), pytest.raises(EnvironmentLack, match="free space"), building(tmp_path / "a", {}) as scratch:
        (scratch / "file").write_text("more than the disk takes")
    assert (tmp_path / "a" / "file").read_text() == "made"
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("mmllm")] == ["a"]


def test_of_two_who_come_together_one_builds(tmp_path: Path) -> None:
    built, both_came = [], threading.Barrier(2)

    def build(scratch: Path) -> None:
        built.append(scratch)
        (scratch / "file").write_text("made")

    def come(_: int) -> None:
        both_came.wait()
        build_once(tmp_path / "a", {"x": 1}, build)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(come, range(2)))
    assert len(built) == 1
    build_once(tmp_path / "a", {"x": 2}, build)
    assert len(built) == 2
    assert is_built(tmp_path / "a", {"x": 2})


def test_where_nothing_can_be_written_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(EnvironmentLack, match="set MMLLM_HOME"):
        build_once(tmp_path / "file" / "a", {}, lambda scratch: None)


@pytest.fixture
def bundle(tiny_lm: TinyLM, tiny_clip: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> Bundle:
    """A bundle with an adapter and a CLIP of its own; its LM lies outside."""
    lm_folder, clip = tmp_path / "lm", tiny_clip()
    tiny_lm("phi3").save_pretrained(lm_folder)
    embedded = load_profile("embedded")
    language = {"source": PathSource(path=lm_folder), "quantization": "none", "dtype": "float32"}
    vision = embedded.vision.model_copy(update={"source": PathSource(path=clip), "merge": 2})
    profile: Profile = embedded.model_copy(
        update={"vision": vision, "language": embedded.language.model_copy(update=language)}
    )
    encoder = ClipEncoder(vision, clip)
    info = BundleInfo(
        name="tiny",
        profile=profile,
        d_vision=encoder.d_vision,
        n_patches=encoder.n_patches,
        feature_fingerprint=encoder.fingerprint,
    )
    adapter = add_adapter(tiny_lm("phi3"), LoraConfig(rank=2))
    connector = build_connector(profile.connector, encoder.d_vision, LmShape(64, 2))
    return save_bundle(info, connector, tokenizer, adapter=adapter, vision_weights=clip)


def test_a_bundle_opens_as_the_latest_and_loads(bundle: Bundle) -> None:
    opened = Bundle.latest()
    assert opened.folder == bundle.folder
    assert opened.load_vision().fingerprint == bundle.info.feature_fingerprint
    assert "lora_A" in "".join(name for name, _ in opened.load_model().named_parameters())
    assert opened.tokenizer.chat_template
    assert {"torch", "transformers", "python"} <= opened.info.versions.keys()


@pytest.mark.parametrize("name", ["connector.safetensors", "bundle.json", "adapter/adapter_model.safetensors"])
def test_an_altered_file_is_named(name: str, bundle: Bundle) -> None:
    path = bundle.folder / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match="altered"):
        Bundle.open(bundle.folder)


def test_a_missing_file_is_named(bundle: Bundle) -> None:
    (bundle.folder / "connector.safetensors").unlink()
    with pytest.raises(BundleError, match=r"connector\.safetensors"):
        Bundle.open(bundle.folder)


def test_clip_weights_that_the_connector_was_not_trained_on_are_refused(
    bundle: Bundle, tiny_clip: Callable[..., Path]
) -> None:
    other = PathSource(path=tiny_clip(seed=5))
    vision = bundle.profile.vision.model_copy(update={"source": other})
    profile = bundle.profile.model_copy(update={"vision": vision})
    swapped = Bundle(bundle.folder, bundle.info.model_copy(update={"profile": profile}))
    with pytest.raises(BundleError, match="fingerprint"):
        swapped.load_vision()


def test_a_folder_that_is_no_bundle_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.open(tmp_path)


def test_without_a_bundle_latest_says_how_to_make_one() -> None:
    with pytest.raises(BundleError, match="make demo"):
        Bundle.latest()


@pytest.mark.parametrize("manifest", ["[]", "{"])
def test_a_manifest_that_cannot_be_read_is_one_named_error(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(tmp_path)


def test_a_loaded_bundle_answers_as_what_was_saved(bundle: Bundle, tiny_lm: TinyLM) -> None:
    model = bundle.load_model()
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        found = model.lm(inputs_embeds=model.embed(ids, None)).logits
        expected = tiny_lm("phi3")(input_ids=ids).logits  # a fresh adapter adds nothing
    assert torch.allclose(found, expected, atol=1e-5)
    assert not model.training
    assert not model.trainable_names()
