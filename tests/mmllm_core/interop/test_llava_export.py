"""LLaVA export: plain transformers says what the bundle said, on tiny random models of the real classes."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mmllm_core.bundle import Bundle
from mmllm_core.config import CrossAttentionConfig, LinearConfig, MlpConfig, Profile, ResamplerConfig
from mmllm_core.conversation import IMAGE_TOKEN_ID, ImagePart, Message, TextPart, render
from mmllm_core.engine.protocol import EngineRequest, SamplingParams
from mmllm_core.engine.transformers_engine import TransformersEngine
from mmllm_core.errors import ExportError
from mmllm_core.interop.llava import import_llava
from mmllm_core.interop.llava_export import write_llava
from mmllm_core.language import stop_token_ids

QUESTION = "What colour is the circle?"
PHI2 = (
    "{% for m in messages %}{{ ('Instruct: ' if m.role == 'user' else 'Output: ') + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Output: ' }}{% endif %}"
)

PHI4_MINI = {
    "template": "phi4",
    "tie_word_embeddings": True,
    "partial_rotary_factor": 0.75,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 64,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.5] * 6},
}
"""What is special in Phi-4-mini: tied embeddings, and rotary frequencies that cover a part and change with length."""


def picture(width: int = 40, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def exported(bundle: Bundle, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The model and processor that plain transformers opens, in float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder.mkdir()
    write_llava(bundle, folder, **options)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval(), AutoProcessor.from_pretrained(folder, backend="pil")


def inputs_of(processor: Any, *contents: list[Any]) -> Any:
    """What the processor makes of user turns with assistant turns between; images stand for themselves."""
    messages = []
    for i, content in enumerate(contents):
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in content
        ]
        messages.append({"role": "assistant" if i % 2 else "user", "content": parts})
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def rendered_ids(bundle: Bundle, *contents: list[Any]) -> list[int]:
    messages = [
        Message(
            "assistant" if i % 2 else "user",
            tuple(TextPart(part) if isinstance(part, str) else ImagePart() for part in content),
        )
        for i, content in enumerate(contents)
    ]
    return render(
        messages, bundle.tokenizer, n_image_tokens=bundle.info.n_patches, max_length=10_000, generation_prompt=True
    ).input_ids


@torch.inference_mode()
def logits_of_both(bundle: Bundle, model: Any, processor: Any, image: Image.Image) -> tuple[Tensor, Tensor]:
    """Logits over the bundle's vocabulary: the bundle's with features in full precision, and the export's."""
    encoder, ours = bundle.load_vision(), bundle.load_model()
    features = encoder.tower(encoder.preprocess([image]))
    ids = torch.tensor([rendered_ids(bundle, [image, QUESTION])])
    expected = ours.lm(inputs_embeds=ours.embed(ids, features)).logits
    found = model(**inputs_of(processor, [image, QUESTION])).logits
    return expected.float(), found[..., : expected.shape[-1]]


def assert_exported_alike(bundle: Bundle, folder: Path, **options: Any) -> None:
    expected, found = logits_of_both(bundle, *exported(bundle, folder, **options), picture())
    assert (expected - found).abs().max() < 1e-4


@pytest.mark.parametrize("lm", ["phi3", "llama"])
@pytest.mark.parametrize("layer", [-2, -1])
@pytest.mark.parametrize("cls_token", [False, True])
def test_logits_equal_the_bundles(lm: str, layer: int, cls_token: bool, make_bundle: Any, tmp_path: Path) -> None:
    assert_exported_alike(make_bundle(lm, layer=layer, cls_token=cls_token), tmp_path / "export")


@pytest.mark.parametrize("lm", ["phi3", "llama"])
def test_a_quantized_base_and_its_adapter_are_exported_as_they_were_trained(
    lm: str, make_bundle: Any, tmp_path: Path
) -> None:
    assert_exported_alike(make_bundle(lm, quantization="nf4"), tmp_path / "export")


def test_a_bfloat16_bundle_is_exported_in_bfloat16_or_as_asked(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(quantization="nf4", dtype="bfloat16")
    for dtype, folder in ((None, tmp_path / "half"), ("float32", tmp_path / "full")):
        expected, found = logits_of_both(bundle, *exported(bundle, folder, dtype=dtype), picture())
        assert (expected - found).norm() < 0.02 * expected.norm()
        assert json.loads((folder / "config.json").read_text())["dtype"] == (dtype or "bfloat16")


@pytest.mark.lengthy
@pytest.mark.parametrize(
    "options",
    [
        {"adapter": False},
        {"connector": MlpConfig(bias=False)},
        {"tie_word_embeddings": True, "lm": "llama"},
        {"tie_word_embeddings": True, "lm": "llama", "quantization": "nf4"},
        {"vocab_size": 295},
        {"vocab_size": 295, "tie_word_embeddings": True},
        PHI4_MINI,
    ],
    ids=["no adapter", "no bias", "tied", "tied and quantized", "no spare row", "no spare row and tied", "Phi-4-mini"],
)
def test_every_layout_of_a_bundle_is_exported(options: dict[str, Any], make_bundle: Any, tmp_path: Path) -> None:
    assert_exported_alike(make_bundle(**options), tmp_path / "export")


def test_a_row_that_is_added_for_the_image_token_is_never_the_best(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(vocab_size=295)
    assert len(bundle.tokenizer) == 295
    model, processor = exported(bundle, tmp_path / "export")
    assert processor.image_token_id == 295
    with torch.inference_mode():
        logits = model(**inputs_of(processor, [picture(), QUESTION])).logits  # (1, t, 296)
    assert torch.allclose(logits[..., 295], logits[..., :295].mean(-1), atol=1e-4)
    assert (logits[..., 295] < logits[..., :295].amax(-1)).all()


@pytest.mark.lengthy
@pytest.mark.parametrize("template", ["chatml", "phi3", "phi4", "llama3"])
@pytest.mark.parametrize(
    "conversation",
    [
        [["IMAGE", QUESTION]],
        [[QUESTION, "IMAGE"]],
        [["IMAGE"]],
        [["Compare", "IMAGE", "with", "IMAGE", "."]],
        [["IMAGE", QUESTION], ["Blue."], ["  And\n\nthe square?  "]],
        [["hi"], ["Hello!"], ["IMAGE", '"what" is 3+4?', "(a)"]],
    ],
    ids=["image first", "image last", "image alone", "two images", "several turns", "image later"],
)
def test_the_processors_ids_are_the_renderers(
    template: str, conversation: list[list[str]], make_bundle: Any, tmp_path: Path
) -> None:
    bundle = make_bundle(template=template, adapter=False)
    _, processor = exported(bundle, tmp_path / "export")
    contents = [[picture() if part == "IMAGE" else part for part in content] for content in conversation]
    ours = rendered_ids(bundle, *contents)
    theirs = inputs_of(processor, *contents).input_ids[0].tolist()
    assert [processor.image_token_id if token == IMAGE_TOKEN_ID else token for token in ours] == theirs


def test_contents_as_plain_strings_render_as_the_bundles_template_does(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(template="chatml")
    _, processor = exported(bundle, tmp_path / "export")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert processor.apply_chat_template(messages) == bundle.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("lm", ["phi3", "llama"])
@pytest.mark.lengthy
def test_greedy_text_equals_the_models_and_the_engines(lm: str, make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(lm, quantization="nf4")
    model, processor = exported(bundle, tmp_path / "export")
    image = picture()
    inputs = inputs_of(processor, [image, QUESTION])
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    theirs = processor.decode(new, skip_special_tokens=True)

    ours, stop_ids = bundle.load_model(), stop_token_ids(bundle.load_model().causal_lm, bundle.tokenizer)
    ids = torch.tensor([rendered_ids(bundle, [image, QUESTION])])
    features = torch.from_numpy(bundle.load_vision().encode([image]))
    generated = ours.generate(ids, torch.ones_like(ids), features, max_new_tokens=12, stop_ids=stop_ids)
    assert theirs.strip()
    assert bundle.tokenizer.decode(generated[0], skip_special_tokens=True) == theirs
    embeddings = ours.embed(ids, features)[0].detach()
    streamed = asyncio.run(answer(TransformersEngine(ours.lm, bundle.tokenizer, context_length=512), embeddings))
    assert bundle.tokenizer.decode(streamed, skip_special_tokens=True) == theirs


async def answer(engine: TransformersEngine, embeddings: Tensor) -> list[int]:
    request = EngineRequest("one", embeddings, SamplingParams(max_tokens=12))
    ids = [token async for chunk in engine.generate(request) for token in chunk.token_ids]
    engine.shutdown()
    return ids


def test_the_usual_processor_gives_the_same_logits_where_nothing_is_resized(make_bundle: Any, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    bundle = make_bundle()
    model, _ = exported(bundle, tmp_path / "export")
    expected, found = logits_of_both(bundle, model, AutoProcessor.from_pretrained(tmp_path / "export"), picture(32, 32))
    assert (expected - found).abs().max() < 1e-4


def test_answers_end_where_the_engine_ends_them(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle()
    model, _ = exported(bundle, tmp_path / "export")
    assert model.generation_config.eos_token_id == stop_token_ids(bundle.load_model().causal_lm, bundle.tokenizer)


@pytest.mark.lengthy
@pytest.mark.parametrize("lm", ["phi3", "llama"])
@pytest.mark.parametrize("cls_token", [False, True])
def test_what_was_exported_imports_again_with_equal_logits(
    lm: str, cls_token: bool, make_bundle: Any, profile: Profile, tmp_path: Path
) -> None:
    bundle = make_bundle(lm, cls_token=cls_token, quantization="nf4")
    model, processor = exported(bundle, tmp_path / "export")
    again = import_llava(tmp_path / "export", profile=profile, name="again")
    assert rendered_ids(again, [picture(), QUESTION]) == rendered_ids(bundle, [picture(), QUESTION])
    expected, found = logits_of_both(again, model, processor, picture())
    assert (expected - found).abs().max() < 1e-4
    original, _ = logits_of_both(bundle, model, processor, picture())
    assert (expected - original).abs().max() < 1e-4


def test_what_was_imported_exports_again_with_equal_tensors(checkpoint: Any, profile: Profile, tmp_path: Path) -> None:
    original, folder = checkpoint(layout="hub")
    bundle = import_llava(folder, profile=profile, name="imported")
    model, _ = exported(bundle, tmp_path / "export", exact_ids=False)
    state = model.state_dict()
    for name, tensor in original.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_large_export_is_written_in_several_shards(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm_core.interop.shards.SHARD_BYTES", 50_000)
    assert_exported_alike(make_bundle(), tmp_path / "export")
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 3


def test_every_file_is_safetensors_or_text(make_bundle: Any, tmp_path: Path) -> None:
    exported(make_bundle(), tmp_path / "export")
    suffixes = {path.suffix for path in (tmp_path / "export").iterdir()}
    assert suffixes <= {".safetensors", ".json", ".jinja"}
    names = load_file(tmp_path / "export" / "model-00001.safetensors")
    assert not any("lora" in name or "absmax" in name for name in names)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"connector": MlpConfig(input_norm=True)}, "input_norm"),
        ({"connector": LinearConfig()}, "its connector is 'linear'"),
        ({"connector": ResamplerConfig(n_queries=4)}, "its connector is 'resampler'"),
        ({"connector": CrossAttentionConfig(every_k_layers=1, n_queries=4)}, "its connector is 'cross_attention'"),
        ({"merge": 2}, "2x2 patches"),
        ({"lm": "phi"}, "phi-2, whose head has a bias"),
        ({"template": PHI2}, "--inexact-ids"),
    ],
    ids=["input norm", "linear", "resampler", "cross-attention", "merged patches", "phi-2", "template"],
)
def test_what_llava_cannot_hold_is_refused_by_name(
    options: dict[str, Any], named: str, make_bundle: Any, tmp_path: Path
) -> None:
    bundle = make_bundle(**options)
    with pytest.raises(ExportError, match=named):
        write_llava(bundle, tmp_path)


def test_inexact_ids_can_be_accepted(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle(template=PHI2)
    _, processor = exported(bundle, tmp_path / "export", exact_ids=False)
    assert "Instruct: <image>" in processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    )
