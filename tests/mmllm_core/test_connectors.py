"""The connector: shape, gradient, scale, and equality after saving."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm_core.config import ConnectorConfig
from mmllm_core.connectors import build_connector
from mmllm_core.word_alignment import align_to_words, caption_targets


@pytest.mark.parametrize("input_norm", [False, True])
def test_shape_and_gradient(input_norm: bool) -> None:
    connector = build_connector(ConnectorConfig(input_norm=input_norm), 32, 64)
    features = torch.randn(2, 5, 32)
    output = connector(features)
    assert output.shape == (2, connector.n_tokens(5), 64)
    output.sum().backward()
    assert all(p.grad is not None for p in connector.parameters())


def test_features_in_half_precision_are_taken() -> None:
    connector = build_connector(ConnectorConfig(), 32, 64)
    assert connector(torch.randn(1, 5, 32, dtype=torch.float16)).dtype == torch.float32


def test_outputs_start_at_the_scale_that_was_asked_for() -> None:
    connector = build_connector(ConnectorConfig(input_norm=True), 32, 64, output_std=0.1)
    assert connector(torch.randn(64, 5, 32)).std().item() == pytest.approx(0.1, rel=0.2)


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    config = ConnectorConfig(input_norm=True)
    first, second = build_connector(config, 32, 64), build_connector(config, 32, 64)
    save_file(first.state_dict(), tmp_path / "c.safetensors")
    second.load_state_dict(load_file(tmp_path / "c.safetensors"))
    features = torch.randn(1, 5, 32)
    assert torch.equal(first(features), second(features))


def test_word_alignment_puts_images_nearest_their_own_caption(tokenizer: object) -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(400, 64) * 0.1
    captions = ["a blue circle", "a red circle", "a blue square"]
    prototypes = torch.randn(3, 5, 32)
    which = torch.randint(3, (200,))
    features = prototypes[which] + 0.1 * torch.randn(200, 5, 32)
    connector = build_connector(ConnectorConfig(input_norm=True), 32, 64, output_std=0.1)
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
