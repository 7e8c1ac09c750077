"""Several bundles of one base behind one service, asked for by model name."""

import asyncio
import concurrent.futures
from typing import Any

import httpx
import openai
import pytest

from cluster.server import reload_bundle
from mmllm_core.bundle import Bundle, save_bundle
from mmllm_core.config import CrossAttentionConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import Message
from mmllm_core.engine.protocol import SamplingParams
from mmllm_core.errors import BundleError, ConfigError
from serve_apps.builder import build
from serve_apps.config_files import load_serve_config
from serve_apps.phi_app import PhiDeployment
from serve_apps.prompt import Prompt
from serve_apps.served_bundles import ServedBundle
from tests.serve_apps.bundles import adapted
from tests.serve_apps.conftest import NO_SOUND, SMALL_LM, Service, deploy, image_part, image_uri, text_part

QUESTIONS = ["Hello", "Who are you?", "Where does the river rise?"]
PICTURE = [image_part(image_uri("red")), text_part("What is it?")]
N = 16


@pytest.fixture(scope="module")
def others(bundle: Bundle) -> dict[str, Bundle]:
    return {name: adapted(bundle, name, seed=seed) for name, seed in (("poet", 1), ("clerk", 2), ("cook", 3))}


@pytest.fixture(scope="module")
def fleet(bundle: Bundle, others: dict[str, Bundle], serve_port: int) -> Service:
    """Four bundles, of which a replica holds two."""
    overrides: dict[str, Any] = {
        "http.port": serve_port,
        "ui": False,
        "phi.autoscaling": None,
        "phi.adapters": {name: str(other.folder) for name, other in others.items()},
        "phi.adapters_in_memory": 2,
    }
    return deploy(bundle, "mmllm", "/", overrides | NO_SOUND | SMALL_LM)


def alone(bundle: Bundle) -> dict[str, str]:
    """The answers of a bundle that is served by itself, its adapter not merged."""
    config = load_serve_config("embedded", SMALL_LM | {"phi.merged": False}).phi
    phi = PhiDeployment({"alone": ServedBundle.of(bundle)}, config)

    async def say(question: str) -> str:
        prompt = Prompt("a", (Message.text("user", question),), None, SamplingParams(max_tokens=N))
        return "".join([chunk.text async for chunk in phi.generate(prompt)])

    async def all_of() -> dict[str, str]:
        return {question: await say(question) for question in QUESTIONS}

    try:
        return asyncio.run(all_of())
    finally:
        phi.shutdown()


def say(service: Service, model: str, content: Any) -> str:
    body = service.body(content, max_tokens=N, temperature=0) | {"model": model}
    return service.client().chat.completions.create(**body).choices[0].message.content or ""


@pytest.mark.slow
def test_each_model_answers_as_its_bundle_alone_though_all_are_asked_at_once(
    fleet: Service, bundle: Bundle, others: dict[str, Bundle]
) -> None:
    bundles = {"tiny": bundle} | others
    assert [model.id for model in fleet.client().models.list()] == list(bundles)
    expected = {model: alone(found) for model, found in bundles.items()}
    assert len({tuple(answers.values()) for answers in expected.values()}) == 4
    asked = [(model, question) for question in QUESTIONS for model in bundles] * 2
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: say(fleet, *pair), asked))
    assert found == [expected[model][question] for model, question in asked]
    # Each has a connector of its own, too.
    assert len({say(fleet, model, PICTURE) for model in bundles}) == 4


@pytest.mark.slow
def test_a_model_that_is_not_served_is_not_found(fleet: Service) -> None:
    with pytest.raises(openai.NotFoundError, match="ask for 'tiny' or 'poet' or 'clerk' or 'cook'"):
        say(fleet, "gpt-9", "Hi")
    assert httpx.get(f"{fleet.base_url}/readyz", timeout=60).json()["text"] == "ready"


@pytest.mark.slow
def test_one_models_bundle_is_swapped_and_the_others_stay(fleet: Service, bundle: Bundle) -> None:
    before = {model: say(fleet, model, "Hello") for model in ("tiny", "poet", "clerk")}
    new = adapted(bundle, "new-poet", seed=9)
    assert reload_bundle(new, "poet") == "poet"
    after = {model: say(fleet, model, "Hello") for model in ("tiny", "poet", "clerk")}
    assert after["poet"] == alone(new)["Hello"] != before["poet"]
    assert after | {"poet": before["poet"]} == before
    assert [model.id for model in fleet.client().models.list()] == ["tiny", "poet", "clerk", "cook"]


@pytest.mark.lengthy
def test_bundles_that_cannot_share_are_refused_at_build(bundle: Bundle, others: dict[str, Bundle]) -> None:
    def refused(error: type[Exception], match: str, **adapters: Bundle) -> None:
        folders = {name: str(other.folder) for name, other in adapters.items()}
        with pytest.raises(error, match=match):
            build(load_serve_config("embedded", {"phi.adapters": folders}), bundle.folder)

    refused(ConfigError, "'tiny' is the name of the first bundle", tiny=others["poet"])
    connector = build_connector(bundle.profile.connector, bundle.info.d_vision, LmShape(64, 2))
    language = bundle.profile.language.model_copy(update={"quantization": "nf4"})
    profile = bundle.profile.model_copy(update={"language": language})
    info = bundle.info.model_copy(update={"name": "nf4", "profile": profile})
    refused(BundleError, "'nf4' .* has another LM than 'tiny'", nf4=save_bundle(info, connector, bundle.tokenizer))
    looking = CrossAttentionConfig(kind="cross_attention", n_queries=2, depth=1, head_dim=8, every_k_layers=1)
    profile = bundle.profile.model_copy(update={"connector": looking})
    info = bundle.info.model_copy(update={"name": "looking", "profile": profile})
    looks = save_bundle(info, build_connector(looking, info.d_vision, LmShape(64, 2)), bundle.tokenizer)
    refused(ConfigError, "'looking' look at images themselves", looking=looks)
