"""Experts with adapters of PEFT on their weights: the numbers are PEFT's in every state, or PEFT computes them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel.ops import fused_moe as op
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers.patching.sites import lora_experts
from tests.transformers.test_lora import fill
from tests.transformers.tiny import batch, mixture

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.skipif(
        not hasattr(peft.tuners.lora.layer, "ParamWrapper"), reason="PEFT before 0.17"
    ),
    pytest.mark.usefixtures("quiet_on_one_thread"),
]

NODE = "LoRA in the node of the experts"
BOTH = ("gate_up_proj", "down_proj")


def config(names: tuple[str, ...] = BOTH, r: int = 3) -> Any:
    parameters = [f"experts.{name}" for name in names]
    return peft.LoraConfig(r=r, lora_alpha=8, target_modules=[], target_parameters=parameters)


def adapted(
    name: str = "mixtral", names: tuple[str, ...] = BOTH, dtype: torch.dtype = torch.float32
) -> Any:
    """A tiny mixture whose adapters are no zeros."""
    model = peft.get_peft_model(mixture(name, dtype), config(names))
    fill(model)
    return model.train()


def experts(model: nn.Module) -> Any:
    return model.get_submodule("base_model.model.model.layers.0.mlp.experts")


@pytest.fixture
def low_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[str]]]:
    """Of every call of the op, which weights had a low rank."""
    found: list[set[str]] = []
    original = op.fused_moe

    def counting(*args: Any, **options: Any) -> Tensor:
        found.append({name for name in options if name.endswith("_lora")})
        return original(*args, **options)

    monkeypatch.setattr(op, "fused_moe", counting)
    return found


def run(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of one call."""
    generator = torch.Generator().manual_seed(7)
    x, dy = (torch.randn(9, 48, generator=generator).bfloat16().to(dtype) for _ in range(2))
    index = torch.tensor([[0, 3], [2, 1], [3, 2]] * 3)
    weights = torch.rand(9, 2, generator=generator).bfloat16().to(dtype)
    x.requires_grad_()
    module.zero_grad(set_to_none=True)
    out = module(x, index, weights)
    out.backward(dy)
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


def assert_as_peft(
    make: Callable[[], Any],
    change: Callable[[Any], Any] = lambda model: None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    stock, wide, ours = make(), make(), make()
    report = liger_kernel.patch(ours)
    assert {row.by for row in report.rows if row.kind == "lora"} == {NODE}
    for model in (stock, wide, ours):
        change(model)
    wide.double().base_model.model.set_experts_implementation("eager")  # others take no float64
    high = run(experts(wide), torch.float64)
    low, found = (run(experts(model), dtype) for model in (stock, ours))
    assert found.keys() == low.keys()
    for name in found:
        assert found[name].dtype == low[name].dtype
        narrow = found[name].to(dtype), high[name], low[name].to(dtype)
        assert_no_worse(name, *narrow)
    return ours


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("names", [BOTH, ("down_proj",), BOTH[::-1]], ids=len)
def test_numbers_of_peft(name: str, names: tuple[str, ...], low_ranks: list[set[str]]) -> None:
    """Of weights in either layout; and the base gets no gradient."""
    assert_as_peft(lambda: adapted(name, names))
    wanted = {"gate_up_lora", "down_lora"} if len(names) == 2 else {"down_lora"}
    assert low_ranks[-1] == wanted


def test_adapters_in_fp32_on_weights_of_16_bits(low_ranks: list[set[str]]) -> None:
    model = assert_as_peft(lambda: adapted(dtype=torch.bfloat16), dtype=torch.bfloat16)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}
    assert len(low_ranks[-1]) == 2


def second_adapter(model: Any) -> None:
    model.add_adapter("other", config(r=2))
    fill(model)


def both_adapters(model: Any) -> None:
    second_adapter(model)
    model.base_model.set_adapter(["default", "other"])


STATES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "another": (lambda model: (second_adapter(model), model.set_adapter("other")), 2),
    "both": (both_adapters, 0),
    "off": (lambda model: model.base_model.disable_adapter_layers(), 0),
    "merged": (lambda model: model.merge_adapter(), 0),
    "hooked": (
        lambda model: experts(model).base_layer.register_forward_hook(lambda *args: None),
        0,
    ),
    "trained": (lambda model: model.requires_grad_(True), 2),
}


@pytest.mark.parametrize("state", STATES)
def test_states_of_the_adapters(state: str, low_ranks: list[set[str]]) -> None:
    """What is no sum of one product, and what somebody has to see, is PEFT's; with the experts still ours."""
    change, n_low = STATES[state]
    assert_as_peft(adapted, change)
    assert len(low_ranks[-1]) == n_low


def test_a_step_of_the_model_and_of_its_copies(low_ranks: list[set[str]]) -> None:
    model = adapted()
    expected = model(**batch()).loss
    liger_kernel.patch(model)
    low_ranks.clear()
    loss = model(**batch()).loss
    assert [len(found) for found in low_ranks] == [2, 2]
    assert torch.allclose(loss, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        low_ranks.clear()
        assert torch.equal(twin(**batch()).loss, loss)
        assert [len(found) for found in low_ranks] == [2, 2]
    liger_kernel.unpatch(model)
    low_ranks.clear()
    assert torch.equal(model(**batch()).loss, expected)
    assert not low_ranks


def test_adapters_that_come_after_the_patch(low_ranks: list[set[str]]) -> None:
    model = mixture()
    liger_kernel.patch(model)
    wrapped = peft.get_peft_model(model, config())
    rows = [row for row in liger_kernel.patch(wrapped).rows if row.kind == "lora"]
    assert {row.by for row in rows} == {NODE}
    wrapped(**batch())
    assert low_ranks[-1] == {"gate_up_lora", "down_lora"}


def reasons(model: nn.Module, **options: Any) -> set[str | None]:
    return {row.reason for row in liger_kernel.patch(model, **options).rows if row.kind == "lora"}


def test_why_they_are_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons(adapted(), mlp=False) == {
        "its base layer, MixtralExperts, runs its own code",
    }
    assert reasons(adapted("gpt_oss", (*BOTH, "down_proj_bias"))) == {
        "down_proj_bias has an adapter, and is no weight of a product"
    }
    wrapper = type(experts(adapted()))
    original = wrapper.forward
    monkeypatch.setattr(wrapper, "forward", lambda self, *args: 2 * original(self, *args))
    assert reasons(adapted()) == {"ParamWrapper computes something else"}
    monkeypatch.undo()
    lora_experts._verdict.cache_clear()
