"""Every connector: shape, gradient, scale, and equality after saving."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from mmllm_core.config import (
    BaseConnectorConfig,
    ConnectorConfig,
    CrossAttentionConfig,
    LinearConfig,
    MlpConfig,
    Profile,
    ResamplerConfig,
    connector_kinds,
    parse_config,
)
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.errors import ConfigError
from mmllm_core.extensions import extension_names, load_extension
from mmllm_core.models.profile import load_profile
from mmllm_core.word_alignment import align_to_words, caption_targets

LM = LmShape(d_model=64, n_layers=4)
CONFIGS: list[tuple[ConnectorConfig, int]] = [
    (LinearConfig(), 5),
    (LinearConfig(input_norm=True, bias=False), 5),
    (MlpConfig(), 5),
    (MlpConfig(input_norm=True), 5),
    (ResamplerConfig(n_queries=3, head_dim=16), 3),
    (CrossAttentionConfig(every_k_layers=2, n_queries=3, head_dim=16), 3),
]
"""Each config, and the embeddings that it makes of five features."""
ADDED: list[BaseConnectorConfig] = [
    load_extension("mmllm.connectors", kind)() for kind in extension_names("mmllm.connectors")
]
"""Those of installed packages, as they are by default: they keep the same promises."""
CONFIGS += [(config, config.n_tokens(5)) for config in ADDED]

every_kind = pytest.mark.parametrize(("config", "n_embeddings"), CONFIGS, ids=lambda v: getattr(v, "kind", None))


@every_kind
def test_shape_and_gradient(config: ConnectorConfig, n_embeddings: int) -> None:
    connector = build_connector(config, 32, LM)
    output = connector(torch.randn(2, 5, 32))
    assert output.shape == (2, n_embeddings, 64)
    output.square().sum().backward()
    used = {n for n, _ in connector.named_parameters() if not n.startswith(("blocks.", "marker"))}
    blocks_alone = config.kind == "cross_attention"  # its blocks run inside the LM: see test_cross_attention
    assert {n for n, p in connector.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == used
    assert blocks_alone == (len(used) < len(dict(connector.named_parameters())))


@every_kind
def test_what_is_placed_in_the_prompt_is_as_long_as_said(config: ConnectorConfig, n_embeddings: int) -> None:
    connector = build_connector(config, 32, LM)
    assert connector.place(torch.randn(2, 5, 32)).shape == (2, connector.n_tokens(5), 64)


@every_kind
def test_features_in_half_precision_are_taken(config: ConnectorConfig, n_embeddings: int) -> None:
    connector = build_connector(config, 32, LM)
    assert connector(torch.randn(1, 5, 32, dtype=torch.float16)).dtype == torch.float32
    assert connector.bfloat16()(torch.randn(1, 5, 32)).dtype == torch.bfloat16


@every_kind
def test_outputs_start_at_the_scale_that_was_asked_for(config: ConnectorConfig, n_embeddings: int) -> None:
    connector = build_connector(config, 32, LM, output_std=0.1)
    assert connector(torch.randn(64, 5, 32)).std().item() == pytest.approx(0.1, rel=0.25)


@every_kind
def test_saved_and_loaded_is_equal(config: ConnectorConfig, n_embeddings: int, tmp_path: Path) -> None:
    first, second = build_connector(config, 32, LM), build_connector(config, 32, LM)
    features = torch.randn(1, 5, 32)
    assert not torch.equal(first(features), second(features))
    save_file(first.state_dict(), tmp_path / "c.safetensors")
    second.load_state_dict(load_file(tmp_path / "c.safetensors"))
    assert torch.equal(first(features), second(features))


@pytest.mark.parametrize("n_features", [1, 5, 40])
def test_a_resampler_gives_as_many_embeddings_for_any_number_of_features(n_features: int) -> None:
    connector = build_connector(ResamplerConfig(n_queries=7), 32, LM)
    assert connector(torch.randn(2, n_features, 32)).shape == (2, 7, 64)
    assert connector.n_tokens(n_features) == 7


def test_a_resampler_reads_every_feature() -> None:
    connector = build_connector(ResamplerConfig(n_queries=2, head_dim=16), 32, LM)
    features = torch.randn(1, 5, 32, requires_grad=True)
    connector(features).square().sum().backward()
    assert features.grad is not None
    assert (features.grad.abs().sum(-1) > 0).all()


def test_cross_attention_needs_as_many_layers_as_a_stride() -> None:
    with pytest.raises(ConfigError, match=r"every_k_layers: 5 and the LM has only 4"):
        build_connector(CrossAttentionConfig(every_k_layers=5), 32, LM)


@pytest.mark.parametrize("kind", connector_kinds())
def test_a_profile_chooses_the_connector_by_kind(kind: str) -> None:
    values = load_profile("embedded").model_dump() | {"connector": {"kind": kind}}
    profile = parse_config(Profile, values, "test")
    assert type(build_connector(profile.connector, 32, LM)) is resolve_name(profile.connector.builds)
    assert parse_config(Profile, profile.model_dump(mode="json"), "written") == profile


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        ({"kind": "resampler", "input_norm": True}, "unknown key"),
        ({"kind": "linear", "n_queries": 4}, "unknown key"),
        ({"kind": "qformer"}, "'qformer' is unknown: choose one of .*linear"),
        ({"n_queries": 4}, "kind is missing"),
    ],
)
def test_keys_of_another_kind_are_rejected(connector: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(Profile, load_profile("embedded").model_dump() | {"connector": connector}, "test")


def test_configs_survive_being_written_and_read() -> None:
    adapter: TypeAdapter[ConnectorConfig] = TypeAdapter(ConnectorConfig)
    assert [adapter.validate_json(config.model_dump_json()) for config, _ in CONFIGS] == [c for c, _ in CONFIGS]


def test_word_alignment_puts_images_nearest_their_own_caption(tokenizer: object) -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(400, 64) * 0.1
    captions = ["a blue circle", "a red circle", "a blue square"]
    prototypes = torch.randn(3, 5, 32)
    which = torch.randint(3, (200,))
    features = prototypes[which] + 0.1 * torch.randn(200, 5, 32)
    connector = build_connector(MlpConfig(input_norm=True), 32, LM, output_std=0.1)
    error = align_to_words(
        connector,
        features,
        [captions[i] for i in which],
        embeddings,
        tokenizer,  # type: ignore[arg-type]
        steps=150,
        learning_rate=2e-3,
    )
    assert error < 0.3
    targets = caption_targets(captions, embeddings, tokenizer)  # type: ignore[arg-type]
    nearest = torch.cdist(connector(prototypes).mean(1), targets).argmin(1)
    assert nearest.tolist() == [0, 1, 2]
