"""A real service for the tests: a tiny bundle, spoken to over HTTP, on real Ray Serve or in the test's own process.

What processes and Serve do is tested on Serve, of which each start takes a minute; what the API says, in one process.

The LM and the CLIP tower are tiny and random; the tokenizer and Whisper are the embedded profile's own.
"""

import base64
import io
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import openai
import pytest
import torch
import yaml
from PIL import Image

from mmllm_core.bundle import Bundle, BundleInfo, save_bundle
from mmllm_core.config import PathSource, Profile
from mmllm_core.models.profile import load_profile
from mmllm_core.models.resolve import resolve
from mmllm_core.vision import CLIP_CONFIG, CLIP_WEIGHTS, ClipEncoder
from serve_apps.limits import Limits

if TYPE_CHECKING:
    from gradio_client import Client

ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def speech() -> bytes:
    """An mp3 in which a man says "If you're good at something, never do it for free."."""
    return recorded_speech()


def recorded_speech() -> bytes:
    """An mp3 of three seconds that comes with Gradio."""
    import gradio  # here, for vLLM's environment has none

    return (Path(gradio.__file__).parent / "media_assets" / "audio" / "heath_ledger.mp3").read_bytes()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, home_of_the_module: None) -> Bundle:
    """A bundle in a home of its own, with weights fetched into the usual home."""
    return build_tiny_bundle(tmp_path_factory.mktemp("home"))


@dataclass(frozen=True)
class Service:
    """A running service."""

    base_url: str
    model: str
    app_name: str

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """A stock client that does not hide failures behind retries."""
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def body(self, content: Any, **fields: Any) -> dict[str, Any]:
        """A request body of one user message."""
        return {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 8} | fields


Proxy = Literal["serve", "haproxy"]
BOTH_PROXIES: list[Proxy] = ["serve", "haproxy"] if sys.platform == "linux" else ["serve"]
SERVE_AND_LONG_HAPROXY = [
    pytest.param(name, marks=pytest.mark.long if name == "haproxy" else ()) for name in BOTH_PROXIES
]
"""Of modules that take minutes."""


@pytest.fixture(scope="module")
def proxy(request: pytest.FixtureRequest) -> Proxy:
    """What takes HTTP in; modules that are held to their word behind `BOTH_PROXIES` say so in a mark."""
    usual: Proxy = "haproxy" if os.environ.get("MMLLM_TEST_PROXY") == "haproxy" else "serve"
    return getattr(request, "param", usual)


@pytest.fixture(scope="module")
def serve_port(proxy: Proxy) -> Iterator[int]:
    """Ray and Serve of our own, whatever else runs on this machine."""
    with own_serve(proxy=proxy) as port:
        yield port


@contextmanager
def own_serve(
    host: str = "127.0.0.1", num_cpus: int = 2, proxy: Proxy = "serve", limits: Limits | None = None
) -> Iterator[int]:
    """Ray and Serve that end with the block, and the port of HTTP at `host`."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    from cluster.local import end_quietly
    from cluster.ray_record import token_is_named
    from serve_apps.config import HttpConfig
    from serve_apps.haproxy import proxies_of

    port, named = free_port(), token_is_named()
    with (
        proxies_of(HttpConfig(host=host, port=port, proxy=proxy), limits or Limits()) as proxies,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in proxies.items():
            patch.setenv(name, value)
        ray.init(
            address="local",  # never somebody else's cluster
            num_cpus=num_cpus,
            resources={"vision": 8, "audio": 8, "text": 8},
            object_store_memory=150_000_000,
            include_dashboard=False,
            log_to_driver=False,
        )
        try:
            serve.start(http_options={"host": host, "port": port})
            yield port
        finally:
            end_quietly(serve.shutdown)
            end_quietly(ray.shutdown)
            if not named:
                os.environ.pop("RAY_AUTH_MODE", None)  # which Ray has set, and with which its token would be asked for


NO_SOUND = {"whisper.autoscaling.min_replicas": 0}
"""Whisper is not started, for nobody speaks."""
TEXT_ALONE = NO_SOUND | {"ui": False, "clip.autoscaling.min_replicas": 0}
"""Neither are CLIP and the chat page."""
SMALL_LM = {"phi.threads": 1, "phi.kv_cache_bytes": 60_000_000}


@pytest.fixture(scope="module")
def service(bundle: Bundle, serve_port: int) -> Service:
    """The embedded config, chat page included, with a small limit on bodies."""
    return deploy(bundle, "mmllm", "/", {"http.port": serve_port, "limits.max_body_bytes": 2_000_000})


ServeHere = Callable[[Bundle, dict[str, Any]], Service]


@pytest.fixture(scope="module")
def serve_here() -> Iterator[ServeHere]:
    """Serve bundles in this process by the embedded config, changed as said, until the module ends."""
    from serve_apps.config_files import load_serve_config
    from serve_apps.in_process import serving_in_process

    with ExitStack() as services:

        def serve(bundle: Bundle, overrides: dict[str, Any]) -> Service:
            config = load_serve_config("embedded", {"ui": False, "phi.kv_cache_bytes": 60_000_000} | overrides)
            url = services.enter_context(serving_in_process(bundle, config))
            return Service(url, bundle.info.name, "in process")

        yield serve


@pytest.fixture(scope="module")
def hasty_service(bundle: Bundle, serve_port: int) -> Service:
    """A service with little time for a request, which answers one at a time and lets one wait."""
    overrides = TEXT_ALONE | {
        "http.port": serve_port,
        "limits.request_timeout_s": 2,
        "phi.autoscaling": None,
        "phi.max_ongoing_requests": 1,
        "phi.max_queued_requests": 1,
    }
    return deploy(bundle, "hasty", "/hasty", overrides)


def image_uri(colour: str = "red", size: tuple[int, int] = (64, 64), kind: str = "png") -> str:
    """A picture of one colour as a data URI."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return data_uri(stream.getvalue(), kind)


def data_uri(data: bytes, kind: str = "png") -> str:
    """Bytes as an image's data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def text_part(text: str) -> dict[str, Any]:
    """A part of text."""
    return {"type": "text", "text": text}


def image_part(url: str) -> dict[str, Any]:
    """A part that holds an image."""
    return {"type": "image_url", "image_url": {"url": url}}


def audio_part(data: bytes, kind: str = "wav") -> dict[str, Any]:
    """A part that holds sound."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": kind}}


def wav(samples: "np.ndarray[Any, Any]", rate: int = 16_000) -> bytes:
    """Samples in [-1, 1] as a 16-bit mono wav file."""
    import wave

    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def page_answer(page: "Client", text: str, *files: Path) -> list[tuple[str | None, str]]:
    """Ask on the chat page, and return what it shows of the answer: what kind each entry is of, and its text."""
    from gradio_client import handle_file

    message = {"text": text, "files": [handle_file(str(file)) for file in files]}
    _, talked, _, _ = page.predict(message, api_name="/chat")
    answer = [entry for entry in talked if entry["role"] == "assistant"]
    return [((entry["metadata"] or {}).get("id"), entry["content"][0]["text"]) for entry in answer]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deploy(bundle: Bundle, name: str, prefix: str, overrides: dict[str, Any]) -> Service:
    """Serve a bundle by the embedded config, changed as said, behind the proxy that Ray was started for."""
    from ray import serve

    from serve_apps.builder import build
    from serve_apps.config_files import load_serve_config
    from serve_apps.haproxy import ENABLED

    there = "haproxy" if os.environ.get(ENABLED) == "1" else "serve"
    config = load_serve_config("embedded", {"http.proxy": there} | overrides)
    serve.run(build(config, bundle.folder), name=name, route_prefix=prefix)
    return Service(config.http.base_url + prefix.rstrip("/"), bundle.info.name, name)


def config_file(folder: Path, overrides: dict[str, Any]) -> Path:
    """The embedded config, changed as said, as a file of one's own for `mmllm serve --profile`."""
    from serve_apps.config_files import load_serve_config

    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(load_serve_config("embedded", overrides).model_dump(mode="json")), encoding="utf-8")
    return path


def build_tiny_bundle(home: Path, whisper: Path | None = None) -> Bundle:
    """Save a bundle in a home of its own, which is `MMLLM_HOME` from then on; weights come from the usual one.

    Args:
        whisper: other weights than the embedded profile's.
    """
    profile = load_profile("embedded")
    whisper, language = whisper or resolve(profile.audio.source), resolve(profile.language.source)
    os.environ["MMLLM_HOME"] = str(home)
    return _build_bundle(profile, whisper, language, home)


def _build_bundle(profile: Profile, whisper: Path, language: Path, folder: Path) -> Bundle:
    from transformers import LlamaConfig, LlamaForCausalLM

    from mmllm_core.connectors import LmShape, build_connector
    from mmllm_core.language import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(language)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.2,
        )
    )
    lm.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    clip = _save_clip(folder / "clip")
    profile = profile.model_copy(
        update={
            "vision": profile.vision.model_copy(update={"source": PathSource(path=clip), "merge": 1}),
            "audio": profile.audio.model_copy(update={"source": PathSource(path=whisper)}),
            "language": profile.language.model_copy(
                update={"source": PathSource(path=folder / "lm"), "quantization": "none", "dtype": "float32"}
            ),
        }
    )
    encoder = ClipEncoder(profile.vision, clip)
    info = BundleInfo(
        name="tiny",
        profile=profile,
        d_vision=encoder.d_vision,
        n_patches=encoder.n_patches,
        feature_fingerprint=encoder.fingerprint,
    )
    connector = build_connector(profile.connector, encoder.d_vision, LmShape(64, 2), output_std=0.2)
    return save_bundle(info, connector, tokenizer, vision_weights=clip)


def _save_clip(folder: Path) -> Path:
    from open_clip.model import _build_text_tower, _build_vision_tower
    from safetensors.torch import save_file

    folder.mkdir()
    tower = _build_vision_tower(ARCHITECTURE["embed_dim"], ARCHITECTURE["vision_cfg"])
    state = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    texts = _build_text_tower(ARCHITECTURE["embed_dim"], ARCHITECTURE["text_cfg"])
    save_file(state | texts.state_dict(), folder / CLIP_WEIGHTS)
    (folder / CLIP_CONFIG).write_text(json.dumps({"model_cfg": ARCHITECTURE, "preprocess_cfg": {}}), encoding="utf-8")
    return folder
