"""LoRA of few tokens, where the host is the bound: the short node computes what PEFT does, or PEFT computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import liger_kernel
from liger_kernel.ops.lora_linear import Quantised, small
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers.patching import adapters
from tests.transformers.test_lora import LINEARS, adapted, assert_as_peft, fill, step
from tests.transformers.tiny import batch

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU, once the layers are proven; of how many layers each call of the short node was."""
    liger_kernel.patch(adapted())
    for module in (small, adapters):
        monkeypatch.setattr(module, "host_bound", lambda x, limit: x.numel() <= limit)
    found: list[int] = []
    original = small.adapted

    def counted(x: Tensor, *layers: small.Layer) -> tuple[Tensor, ...]:
        found.append(len(layers))
        return original(x, *layers)

    monkeypatch.setattr(small, "adapted", counted)
    return found


#: of a step of the tiny model's two layers: q, k, v, o, gate with up, down
A_STEP = [1, 1, 1, 1, 2, 1] * 2


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"target_modules": LINEARS[:5]}])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_step(name: str, options: dict[str, Any], calls: list[int]) -> None:
    model = adapted(name, **options)
    liger_kernel.patch(model)
    step(model)
    dropped = [1] * 14 if "lora_dropout" in options else A_STEP
    assert calls == dropped
    assert_as_peft(lambda: adapted(name, **options), nodes=None)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_adapters_in_fp32_on_a_base_of_16_bits(
    precision: torch.dtype | None, calls: list[int]
) -> None:
    assert_as_peft(lambda: adapted(dtype=torch.bfloat16, lora_dropout=0.2), precision, nodes=14)
    assert calls
    calls.clear()
    assert_as_peft(lambda: adapted(dtype=torch.bfloat16), precision, nodes=14)
    assert calls


def test_biases_in_fp32_under_autocast(calls: list[int]) -> None:
    """PyTorch converts them, and nothing but autocast does."""

    def make() -> Any:
        model = adapted("qwen2", dtype=torch.bfloat16)
        for name, tensor in model.named_parameters():
            if name.endswith("base_layer.bias"):
                tensor.data = tensor.data.float()
        return model

    assert_as_peft(make, torch.bfloat16, nodes=None)
    assert calls


def test_two_adapters_of_which_one_is_frozen(calls: list[int]) -> None:
    def make() -> Any:
        model = adapted()
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=LINEARS))
        fill(model)
        return model

    def change(model: Any) -> None:
        model.base_model.set_adapter(["default", "other"])
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.requires_grad_("other" in name or "lora_B" in name)

    assert_as_peft(make, change=change, nodes=14)
    assert calls


def test_checkpointing(calls: list[int]) -> None:
    def change(model: Any) -> None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})

    assert_as_peft(adapted, change=change, nodes=None)
    assert calls


def test_left_to_peft(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is trained, and weights that autocast converts."""
    trained = assert_as_peft(adapted, change=lambda model: model.requires_grad_(True), nodes=0)
    assert liger_kernel.patch(trained).replaced
    assert_as_peft(adapted, torch.bfloat16, nodes=None)
    assert not calls
    monkeypatch.setattr(small, "SMALL", 100)
    monkeypatch.setattr(adapters, "SMALL", 100)
    assert_as_peft(adapted, nodes=14)  # by the node for many tokens
    assert not calls


def test_what_is_small() -> None:
    x, weight, wide = torch.ones(8, 4), torch.ones(6, 4), torch.ones(2**20 + 1, 1).expand(-1, 4)
    assert small.serves(x, (weight, None, []), (weight, None, []))
    assert not small.serves(x, (weight, None, []), (wide, None, []))
    assert not small.serves(x, (Quantised(lambda dtype: weight.to(dtype)), None, []))
    assert not small.serves(x, (weight, torch.ones(6, requires_grad=True), []))
    assert not small.serves(x.double(), (weight, None, []))
    assert not small.serves(x, (weight, torch.ones(6, dtype=torch.float64), []))
    assert not small.serves(torch.ones(1).expand(2**23 + 4).view(-1, 4), (weight, None, []))


def test_an_output_that_is_written_over() -> None:
    """As HF does: neither is it a view for autograd, nor does backward read it."""
    x, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 4), (2, 4), (5, 2)))
    weight, bias = torch.randn(5, 4), torch.randn(5)
    grads = []
    for function in (small.adapted, None):
        if function is None:
            y = torch.nn.functional.linear(x, weight, bias) + 2 * (x @ a.t() @ b.t())
        else:
            (y,) = function(x, (weight, bias, [small.Adapter(a, b, 2.0)]))
        y.mul_(3)
        grads.append((y, *torch.autograd.grad(y.sin().sum(), (x, a, b))))
    for ours, theirs in zip(*grads, strict=True):
        assert_no_worse("it", ours.double(), theirs.double(), theirs.double() * (1 + 1e-6))
    (y,) = small.adapted(x, (weight, bias, [small.Adapter(a, b, 2.0)]))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sin().sum(), (x, a, b), create_graph=True)


def test_half_of_the_outputs() -> None:
    """Of layers of one input, a gradient may come for some."""
    x, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((3, 4), (2, 4), (5, 2)))
    layers = [(torch.randn(5, 4), None, [small.Adapter(a, b, 0.5)]) for _ in "gu"]
    _, y = small.adapted(x, *layers)
    alone = small.adapted(x, layers[1])[0]
    found, expected = (torch.autograd.grad(t.sum(), (x, a, b)) for t in (y, alone))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_evaluation(calls: list[int]) -> None:
    model = adapted()
    liger_kernel.patch(model)
    with torch.no_grad():
        found = model(**batch()).loss
        assert calls
        liger_kernel.unpatch(model)
        assert torch.allclose(found, model(**batch()).loss)
