"""The deployments with their models, outside Ray: what is served is what was trained."""

import asyncio
import base64
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mmllm_core.bundle import Bundle, save_bundle
from mmllm_core.config import ConnectorConfig, CrossAttentionConfig, LinearConfig, MlpConfig, ResamplerConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import ImagePart, Message, TextPart, render
from mmllm_core.data.collate import collate
from mmllm_core.data.feature_store import FeatureStore
from mmllm_core.engine.protocol import SamplingParams
from mmllm_core.engine.transformers_engine import stop_token_ids
from mmllm_core.errors import ConversationError, ImageError
from mmllm_core.vision import decode_image
from serve_apps.clip_app import ClipDeployment
from serve_apps.config_files import load_serve_config
from serve_apps.feature_cache import StoreReader
from serve_apps.phi_app import PhiDeployment
from serve_apps.prompt import Prompt
from serve_apps.served_bundles import ServedBundle
from serve_apps.upload import Upload
from tests.serve_apps.conftest import image_uri

CONFIG = load_serve_config("embedded", {"phi.threads": 1})
QUESTION = (Message("user", (ImagePart(), TextPart("What is this?"))),)
PNG = base64.b64decode(image_uri("blue").partition(",")[2])


@pytest.fixture(scope="module")
def phi(bundle: Bundle) -> PhiDeployment:
    return PhiDeployment({"tiny": ServedBundle.of(bundle)}, CONFIG.phi)


@pytest.fixture
def bundle_of(bundle: Bundle) -> Callable[[ConnectorConfig], Bundle]:
    """Save the tiny bundle again with another connector, whose gates, if it has some, are open."""

    def build(config: ConnectorConfig) -> Bundle:
        torch.manual_seed(2)
        connector = build_connector(config, bundle.info.d_vision, LmShape(64, 2), output_std=0.2)
        for name, parameter in connector.named_parameters():
            if name.endswith("_gate"):
                torch.nn.init.constant_(parameter, 0.7)
        profile = bundle.profile.model_copy(update={"connector": config})
        info = bundle.info.model_copy(update={"profile": profile, "name": f"tiny-{config.kind}"})
        return save_bundle(
            info, connector, bundle.tokenizer, vision_weights=bundle.weights(bundle.profile.vision.source)
        )

    return build


async def _say(phi: PhiDeployment, prompt: Prompt) -> list[int]:
    return [token async for chunk in phi.generate(prompt) for token in chunk.token_ids]


@pytest.mark.lengthy
@pytest.mark.parametrize(
    "config",
    [LinearConfig(), MlpConfig(), ResamplerConfig(n_queries=5), CrossAttentionConfig(every_k_layers=1, n_queries=5)],
    ids=lambda config: config.kind,
)
def test_a_served_answer_is_the_trained_models_own(
    config: ConnectorConfig, bundle_of: Callable[[ConnectorConfig], Bundle]
) -> None:
    bundle = bundle_of(config)
    encoder, model, phi = (
        bundle.load_vision(),
        bundle.load_model(),
        PhiDeployment({"tiny": ServedBundle.of(bundle)}, CONFIG.phi),
    )
    features = encoder.encode([decode_image(PNG, 10_000)])  # (1, n_patches, d_vision)
    rendered = render(
        QUESTION,
        bundle.tokenizer,
        n_image_tokens=model.connector.n_tokens(encoder.n_patches),
        max_length=2048,
        generation_prompt=True,
    )
    batch = collate([rendered], list(features), padding="left")
    stop_ids = stop_token_ids(model.lm, bundle.tokenizer)
    with torch.inference_mode():
        expected = model.generate(
            batch.input_ids, batch.attention_mask, batch.features, max_new_tokens=24, stop_ids=stop_ids
        )

    async def say_both() -> list[list[int]]:
        """A second conversation without images runs in between and must not look at the first one's."""
        prompts = [Prompt("a", QUESTION, features, SamplingParams(max_tokens=24))]
        prompts.append(Prompt("b", (Message.text("user", "Hi"),), None, SamplingParams(max_tokens=24)))
        return await asyncio.gather(*(_say(phi, prompt) for prompt in prompts))

    served, beside = asyncio.run(say_both())
    assert served == expected[0].tolist()
    assert len(served) == 24
    assert phi.load().running == 0
    assert getattr(asyncio.run(phi._voices.of("")).model.connector, "_media", None) is None, (
        "nothing of a request stays"
    )
    assert beside == asyncio.run(
        _say(phi, Prompt("c", (Message.text("user", "Hi"),), None, SamplingParams(max_tokens=24)))
    )


def test_leaving_an_answer_frees_the_engine(phi: PhiDeployment) -> None:
    async def leave() -> None:
        stream = phi.generate(Prompt("b", (Message.text("user", "Hi"),), None, SamplingParams(max_tokens=1900)))
        await anext(stream)
        assert phi.load().running == 1
        await stream.aclose()
        assert phi.load().running == 0

    asyncio.run(leave())


def test_a_prompt_beyond_the_context_is_refused(phi: PhiDeployment) -> None:
    with pytest.raises(ConversationError, match="at most 2047 fit"):
        asyncio.run(_say(phi, Prompt("c", (Message.text("user", "word " * 3000),), None, SamplingParams())))


def test_stored_features_are_served_instead_of_computed(bundle: Bundle, tmp_path: Path) -> None:
    encoder = bundle.load_vision()
    stored = np.full((1, encoder.n_patches, encoder.d_vision), 0.5, np.float16)
    FeatureStore(tmp_path).write([encoder.key(decode_image(PNG, 10_000))], stored)
    clip = ClipDeployment(bundle.folder, CONFIG.clip.model_copy(update={"feature_store": str(tmp_path)}))
    found = asyncio.run(clip.encode([Upload(PNG, "p"), Upload(PNG, "p")]))
    assert found.dtype == np.float16
    assert found.flags.c_contiguous
    assert np.array_equal(found, np.concatenate([stored, stored]))


def test_damaged_features_are_not_served(tmp_path: Path) -> None:
    FeatureStore(tmp_path).write(["a-encoder", "b-encoder"], np.ones((2, 5, 8), np.float16))
    array = next(tmp_path.glob("*.npy"))
    array.write_bytes(array.read_bytes()[:-1] + b"x")
    reader = StoreReader(tmp_path, "encoder", refresh_s=0)
    assert asyncio.run(reader.get("a-encoder")) is not None
    assert asyncio.run(reader.get("b-encoder")) is None


def test_a_store_that_cannot_be_reached_any_more_costs_its_features_alone(tmp_path: Path) -> None:
    location = tmp_path / "store"
    FeatureStore(location).write(["a-encoder"], np.ones((1, 5, 8), np.float16))
    reader = StoreReader(location, "encoder", refresh_s=0)
    shutil.rmtree(location)
    location.write_text("a file where the folder was")
    assert [asyncio.run(reader.get(key)) for key in ("a-encoder", "b-encoder")] == [None, None]


def test_features_that_are_added_while_a_replica_runs_are_seen(tmp_path: Path) -> None:
    stored = np.ones((1, 5, 8), np.float16)
    location = tmp_path / "made later"
    reader = StoreReader(location, "encoder", refresh_s=0)

    async def read() -> None:
        assert await reader.get("new-encoder") is None
        FeatureStore(location).write(["new-encoder"], stored)
        async with asyncio.timeout(30):
            while (found := await reader.get("new-encoder")) is None:
                await asyncio.sleep(0.01)
        assert np.array_equal(found, stored[0])

    asyncio.run(read())


def test_a_store_that_is_not_refreshed_yet_shows_what_it_had(tmp_path: Path) -> None:
    reader = StoreReader(tmp_path, "encoder", refresh_s=1e9)
    FeatureStore(tmp_path).write(["new-encoder"], np.ones((1, 5, 8), np.float16))
    assert [asyncio.run(reader.get("new-encoder")) for _ in range(3)] == [None] * 3


def test_a_broken_image_names_its_field(bundle: Bundle) -> None:
    clip = ClipDeployment(bundle.folder, CONFIG.clip)
    with pytest.raises(ImageError) as caught:
        asyncio.run(clip.encode([Upload(b"no image", "messages.0.content.3.image_url")]))
    assert caught.value.param == "messages.0.content.3.image_url"
