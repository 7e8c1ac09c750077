"""The summed loss equals plain cross-entropy over full logits, gradients included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmllm_core import loss as loss_module
from mmllm_core.config import MlpConfig
from mmllm_core.connectors import LmShape, build_connector
from mmllm_core.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from mmllm_core.loss import summed_cross_entropy
from mmllm_core.model import MultimodalLM
from tests.conftest import VOCABULARY, TinyLM

FAMILIES = ["llama", "phi3", "phi"]


def full_logits(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


@pytest.fixture(params=[(37, 37), (9, 4), (1, 1)], ids=["one chunk", "chunks of 9 rows", "chunks of 1 row"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, block = request.param
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", chunk * VOCABULARY)
    monkeypatch.setitem(loss_module.FLOATS_AT_ONCE, "cpu", block * VOCABULARY)


def hidden_and_targets(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 64, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(0, VOCABULARY, (n,), generator=generator)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("trained_head", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_full_logits(family: str, trained_head: bool, tiny_lm: TinyLM) -> None:
    head = tiny_lm(family).get_output_embeddings().requires_grad_(trained_head)
    assert (head.bias is not None) == (family == "phi")
    hidden, targets = hidden_and_targets(37)
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    assert len(wanted) == 1 + trained_head * (1 + (family == "phi"))
    expected = full_logits(head, hidden, targets)
    found = summed_cross_entropy(head, hidden, targets)
    assert torch.allclose(found, expected, rtol=1e-6)
    # A scale, because callers divide the sum by how many positions are supervised.
    for ours, theirs in zip(
        torch.autograd.grad(found * 0.37, wanted), torch.autograd.grad(expected * 0.37, wanted), strict=True
    ):
        assert theirs.abs().max() > 0.05
        assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("frozen", ["lm", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_of_the_model_equals_that_of_full_logits(family: str, frozen: str, tiny_lm: TinyLM) -> None:
    model = MultimodalLM(tiny_lm(family), build_connector(MlpConfig(), 32, LmShape(64, 2)))
    model.lm.requires_grad_(frozen != "lm")
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, 7, 8, 9], [4, 5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7, 8, IGNORE_INDEX], [IGNORE_INDEX, 5, 6, *[IGNORE_INDEX] * 2]])
    features = torch.randn(1, 1, 32)
    names, wanted = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = model(ids, mask, labels, features)
    logits = model.lm(inputs_embeds=model.embed(ids, features), attention_mask=mask).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(found, expected, rtol=1e-6)
    ours, theirs = torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-6 * largest, name


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("trained_head", [True, False])
def test_in_bfloat16_it_is_as_near_the_truth_as_full_logits(trained_head: bool, tiny_lm: TinyLM) -> None:
    exact_head = tiny_lm("phi").get_output_embeddings()
    head = nn.Linear(64, VOCABULARY, dtype=torch.bfloat16)
    head.load_state_dict(exact_head.state_dict())
    head.requires_grad_(trained_head)
    exact_head.load_state_dict(head.state_dict())  # the truth of the rounded weights
    hidden, targets = hidden_and_targets(37, torch.bfloat16)
    exact_hidden = hidden.detach().float().requires_grad_()
    n_wanted = 3 if trained_head else 1
    truth = torch.autograd.grad(
        full_logits(exact_head, exact_hidden, targets), [exact_hidden, *exact_head.parameters()][:n_wanted]
    )
    wanted = [hidden, *head.parameters()][:n_wanted]
    expected, found = full_logits(head, hidden, targets), summed_cross_entropy(head, hidden, targets)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-6), "logits are rounded alike, and nothing after them is"
    gradients = zip(truth, torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True)
    for true, ours, theirs in gradients:
        assert ours.dtype == theirs.dtype == torch.bfloat16
        # One rounding more: of the gradient before it is scaled, or of each chunk's share in that of the head.
        assert (ours.float() - true).norm() < 1.5 * (theirs.float() - true).norm()


def test_without_supervised_positions_the_loss_is_0_and_has_a_graph(tiny_lm: TinyLM) -> None:
    model = MultimodalLM(tiny_lm("phi"), build_connector(MlpConfig(), 32, LmShape(64, 2)))
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, 7]])
    loss = model(ids, torch.ones_like(ids), torch.full_like(ids, IGNORE_INDEX), torch.randn(1, 1, 32))
    assert float(loss) == 0
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values()), gradients


def test_without_gradients_none_are_computed(tiny_lm: TinyLM, monkeypatch: pytest.MonkeyPatch) -> None:
    head = tiny_lm("llama").get_output_embeddings()
    hidden, targets = hidden_and_targets(9)
    expected = full_logits(head, hidden, targets)
    multiply = torch.mm
    products: list[torch.Size] = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        product = multiply(*args, **kwargs)
        products.append(product.shape)
        return product

    monkeypatch.setattr(torch, "mm", watched)
    with torch.inference_mode():
        assert torch.allclose(summed_cross_entropy(head, hidden, targets), expected, rtol=1e-6)
    assert products == [(9, VOCABULARY)]
    summed_cross_entropy(head, hidden, targets)
    assert products == [(9, VOCABULARY)] * 2 + [(9, 64)]


def test_the_head_is_called_once_and_as_before_afterwards(tiny_lm: TinyLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ZeRO-3 hangs on: it gathers the head's weight by hooks on its calls."""
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 1)
    head = tiny_lm("llama").get_output_embeddings()
    hidden, targets = hidden_and_targets(9)
    expected = head(hidden)
    calls: list[int] = []
    head.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    for n in (9, 0):
        summed_cross_entropy(head, hidden[:n], targets[:n])
    assert calls == [9, 0]
    with pytest.raises(RuntimeError):
        summed_cross_entropy(head, hidden[:, :5], targets)
    assert torch.equal(head(hidden), expected)


def test_a_head_with_an_adapter_is_not_bypassed(tiny_lm: TinyLM) -> None:
    from peft import LoraConfig, get_peft_model

    lm = get_peft_model(tiny_lm("llama"), LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    head = lm.get_base_model().get_output_embeddings()
    hidden, targets = hidden_and_targets(9)
    adapter = [p for p in head.parameters() if p.requires_grad]
    assert adapter
    found, expected = summed_cross_entropy(head, hidden, targets), full_logits(head, hidden, targets)
    assert torch.allclose(found, expected, rtol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, adapter), torch.autograd.grad(expected, adapter), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("liger", [True, False])
def test_on_a_gpu_it_equals_full_logits(liger: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if liger:
        pytest.importorskip("liger_kernel")
    else:
        monkeypatch.setattr(loss_module, "_has_liger", lambda: False)
    torch.manual_seed(0)
    head = nn.Linear(64, VOCABULARY, device="cuda")
    hidden = torch.randn(37, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (37,), device="cuda")
    wanted = [hidden, *head.parameters()]
    found, expected = summed_cross_entropy(head, hidden, targets), full_logits(head, hidden, targets)
    assert torch.allclose(found, expected, rtol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)
