"""Another bundle takes the place of the one that is served, on real Serve, while answers flow."""

import asyncio
import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.server import reload_bundle
from mmllm_core.bundle import Bundle
from mmllm_core.conversation import Message
from mmllm_core.engine.protocol import SamplingParams
from mmllm_core.errors import BundleError, EngineError, MmllmError
from serve_apps.config_files import load_serve_config
from serve_apps.phi_app import PhiDeployment
from serve_apps.prompt import Prompt
from serve_apps.served_bundles import ServedBundle, ServedBundles, base_of, require_base
from tests.serve_apps.bundles import adapted
from tests.serve_apps.conftest import NO_SOUND, SMALL_LM, ServeHere, Service, deploy, image_part, image_uri, text_part

ALIKE = NO_SOUND | SMALL_LM | {"ui": False}
CONFIG = load_serve_config("embedded", ALIKE)
PROMPT = Prompt("a", (Message.text("user", "Tell me all."),), None, SamplingParams(max_tokens=600))


@pytest.fixture(scope="module")
def other(bundle: Bundle) -> Bundle:
    return adapted(bundle, "other", seed=1)


@pytest.fixture(scope="module")
def swapped_service(bundle: Bundle, serve_port: int) -> Service:
    return deploy(bundle, "mmllm", "/", ALIKE | {"http.port": serve_port, "phi.autoscaling": None})


def say(service: Service, content: Any, n: int = 12) -> str:
    body = service.body(content, max_tokens=n, temperature=0)
    return service.client().chat.completions.create(**body).choices[0].message.content or ""


PICTURE = [image_part(image_uri("red")), text_part("What is it?")]


@pytest.mark.slow
def test_another_bundle_answers_without_a_failed_request(
    swapped_service: Service, serve_here: ServeHere, other: Bundle
) -> None:
    service = swapped_service
    before = {text: say(service, text) for text in ("Hello", "Who are you?")} | {"picture": say(service, PICTURE)}
    long_before = say(service, "Tell me all.", 1000)
    ended, failed = threading.Event(), []

    def keep_streaming() -> list[str]:
        found = []
        while not ended.is_set():
            body = service.body("Tell me all.", max_tokens=1000, temperature=0)
            try:
                chunks = list(service.client().chat.completions.create(**body, stream=True))
                found.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
            except Exception as error:
                failed.append(error)
        return found

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_streaming) for _ in range(3)]
        command = [sys.executable, "-m", "cluster.cli", "reload", "--bundle", str(other.folder)]
        address = ray.get_runtime_context().gcs_address
        done = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True)
        ended.set()
        heard = [text for future in asking for text in future.result()]
    assert "model tiny answers by bundle 'other'" in done.stdout, done.stderr
    assert failed == []
    after = {text: say(service, text) for text in ("Hello", "Who are you?")} | {"picture": say(service, PICTURE)}
    assert all(after[key] != before[key] for key in before)
    # All of an answer is by the one bundle or by the other.
    assert long_before in heard
    assert set(heard) <= {long_before, say(service, "Tell me all.", 1000)}
    # The answers are those of the bundle when it is served alone.
    alone = serve_here(other, ALIKE)
    assert after == {text: say(alone, text) for text in ("Hello", "Who are you?")} | {"picture": say(alone, PICTURE)}
    assert [model.id for model in service.client().models.list()] == ["tiny"]


@pytest.mark.slow
def test_a_bundle_that_cannot_be_loaded_leaves_the_service_as_it_is(
    swapped_service: Service, bundle: Bundle, tmp_path: Path
) -> None:
    before = say(swapped_service, "Hello")
    with pytest.raises(MmllmError, match="'gpt-9' is not served: choose one of tiny"):
        reload_bundle(bundle, "gpt-9")
    broken = adapted(bundle, "broken", seed=3)
    (broken.folder / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(BundleError, match="is missing"):
        reload_bundle(broken)
    assert say(swapped_service, "Hello") == before


@pytest.mark.lengthy
def test_an_answer_on_its_way_ends_by_the_bundle_that_it_began_with(bundle: Bundle, other: Bundle) -> None:
    async def swap() -> tuple[list[int], list[int], list[int]]:
        phi = PhiDeployment({"tiny": ServedBundle.of(bundle)}, CONFIG.phi)
        voice = await phi._voices.of("")
        before = await _say(phi)
        stream = phi.generate(PROMPT)
        begun = list((await anext(stream)).token_ids)
        await phi.reconfigure(ServedBundles(bundles={"tiny": ServedBundle.of(other)}).model_dump(mode="json"))
        after = await _say(phi)
        voice.engine.health()  # it goes on for the answer that began with it
        begun += [token async for chunk in stream for token in chunk.token_ids]
        assert begun == before
        await asyncio.gather(*phi._voices._letting_go)
        with pytest.raises(EngineError, match="shut down"):  # its memory is given back
            voice.engine.health()
        broken = ServedBundle(folder=other.folder, sha256="0" * 64)
        await phi.reconfigure(ServedBundles(bundles={"tiny": broken}).model_dump(mode="json"))
        assert await _say(phi) == after
        alone = await _say(PhiDeployment({"other": ServedBundle.of(other)}, CONFIG.phi))
        return before, after, alone

    before, after, alone = asyncio.run(swap())
    assert before != after == alone


async def _say(phi: PhiDeployment) -> list[int]:
    return [token async for chunk in phi.generate(PROMPT) for token in chunk.token_ids]


def test_a_tokenizer_is_the_same_however_it_is_written(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.folder / "tokenizer", tmp_path / "tokenizer")
    template, config = tmp_path / "tokenizer/chat_template.jinja", tmp_path / "tokenizer/tokenizer_config.json"
    words = base_of(bundle)["tokenizer"]
    assert base_of(Bundle(tmp_path, bundle.info))["tokenizer"] == words
    as_before = json.loads(config.read_text()) | {"chat_template": template.read_text()}
    template.unlink()  # older versions of transformers wrote it into the config
    config.write_text(json.dumps(as_before))
    assert base_of(Bundle(tmp_path, bundle.info))["tokenizer"] == words
    config.write_text(json.dumps(as_before | {"chat_template": "{{ messages }}"}))
    assert base_of(Bundle(tmp_path, bundle.info))["tokenizer"] != words


def test_a_bundle_of_another_base_is_refused_and_says_what_differs(bundle: Bundle, other: Bundle) -> None:
    require_base(base_of(bundle), bundle.info.name, other)
    language = bundle.profile.language.model_copy(update={"quantization": "nf4"})
    profile = bundle.profile.model_copy(update={"language": language})
    changed = Bundle(other.folder, other.info.model_copy(update={"profile": profile}))
    with pytest.raises(BundleError, match="has another LM than 'tiny'"):
        require_base(base_of(bundle), bundle.info.name, changed)
    seen = Bundle(other.folder, other.info.model_copy(update={"feature_fingerprint": "of another"}))
    with pytest.raises(BundleError, match="another CLIP"):
        require_base(base_of(bundle), bundle.info.name, seen)
