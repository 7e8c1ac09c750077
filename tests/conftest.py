"""Models small enough to build in a test: tokenizers, causal LMs, a CLIP vision tower, and a home of the test's own.

Also the places in which a feature store can lie: a folder, memory, and a server that speaks S3.
"""

import os
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""As SmolLM2: with a system message of its own."""

PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""As Phi-3: training text ends in another token than a turn does."""

PHI4 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
"""As Phi-4-mini: nothing between control tokens and contents."""

LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""As Llama 3: BOS, and contents trimmed by the template."""

CHAT_TEMPLATES = {"chatml": CHATML, "phi3": PHI3, "phi4": PHI4, "llama3": LLAMA3}

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)

VOCABULARY = 400
"""Rows of every tiny LM's embeddings: more than the tokenizer uses."""

# Ray's own 15 leaves replicas and workers a small part of a core while another test computes beside them.
os.environ.setdefault("RAY_worker_niceness", "0")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

TinyLM = Callable[..., Any]
MakeTokenizer = Callable[[str | None], Any]


@pytest.fixture(autouse=True)
def _home_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own cache."""
    monkeypatch.setenv("MMLLM_HOME", str(tmp_path / "mmllm-home"))


@pytest.fixture(scope="module")
def home_of_the_module() -> Iterator[None]:
    """For fixtures that set `MMLLM_HOME` for a module: afterwards it is what it was before."""
    usual = os.environ.get("MMLLM_HOME")
    yield
    os.environ.pop("MMLLM_HOME")
    if usual is not None:
        os.environ["MMLLM_HOME"] = usual


@pytest.fixture(scope="session", autouse=True)
def _offline() -> None:
    """No test reaches the hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach at once, where this process has read its environment already."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Build a byte-level BPE tokenizer with the control tokens of several families.

    Its chat template is given by name (of `CHAT_TEMPLATES`), in full, or as None.
    """

    def build(chat_template: str | None) -> Any:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=list(CONTROL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(["What colour is the circle?", "The circle is blue.", "What is there?"], trainer)
        backend.add_tokens([AddedToken("<|tool|>", special=False, normalized=False), AddedToken("    ", special=False)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<|begin_of_text|>",
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = CHAT_TEMPLATES.get(chat_template or "", chat_template)
        return tokenizer

    return build


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> Any:
    """A ChatML tokenizer; do not change it."""
    return make_tokenizer("chatml")


@pytest.fixture(scope="session")
def tiny_lm() -> TinyLM:
    """Build a random causal LM in float32 by `model_type`: phi (phi-2), phi3 or llama; same seed, same weights."""

    def build(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_lm_config(model_type, **changes)).eval()

    return build


def long_rope(n_factors: int, **more: Any) -> dict[str, Any]:
    """Settings of a phi3 whose positions are told otherwise beyond 48; `n_factors` is half of what is rotated."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * n_factors,
        "long_factor": [1.0 + 4 * i for i in range(n_factors)],
        "original_max_position_embeddings": 48,
        "factor": 8.0,
    }
    return {"rope_parameters": rope | more, "original_max_position_embeddings": 48, "max_position_embeddings": 384}


def tiny_lm_config(model_type: str, **changes: Any) -> Any:
    """Config of a tiny LM; weights are wide enough apart that outputs differ visibly."""
    from transformers import AutoConfig

    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if model_type == "phi" else 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(model_type, **(values | changes))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a random CLIP vision tower in open_clip's folder layout: 32 px, patch 8, width 32, 3 blocks."""

    def build(*, seed: int = 0, quick_gelu: bool = False) -> Path:
        import json

        from open_clip.model import _build_vision_tower
        from safetensors.torch import save_file

        vision_cfg = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
        torch.manual_seed(seed)
        tower = _build_vision_tower(16, vision_cfg, quick_gelu)
        folder = tmp_path_factory.mktemp("clip")
        save_file({f"visual.{k}": v for k, v in tower.state_dict().items()}, folder / "open_clip_model.safetensors")
        clip_config = {"model_cfg": {"embed_dim": 16, "quick_gelu": quick_gelu, "vision_cfg": vision_cfg}}
        (folder / "open_clip_config.json").write_text(json.dumps(clip_config | {"preprocess_cfg": {"size": 32}}))
        return folder

    return build


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a moto server. Its own packages do not go with our pins, so it lives in another environment."""
    program = os.environ.get("MMLLM_TEST_MOTO_SERVER")
    if not program:
        pytest.skip("no moto_server: install moto[server] elsewhere and name it in MMLLM_TEST_MOTO_SERVER")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://{address}/moto-api/", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        bucket = urllib.request.Request(f"http://{address}/bucket", method="PUT")
        urllib.request.urlopen(bucket, timeout=5)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own in a bucket."""
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}?endpoint_override={s3_server}&scheme=http&region=us-east-1"


@pytest.fixture(params=["folder", "memory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty feature store's location, of each kind."""
    if request.param == "folder":
        return str(tmp_path / "features")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/features"
    return str(request.getfixturevalue("s3_url"))
