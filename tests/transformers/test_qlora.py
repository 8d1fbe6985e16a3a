"""LoRA on quantised weights: the numbers are PEFT's, by the rule, or PEFT computes them; and how often dequantised."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import liger_kernel
from liger_kernel.testing import assert_draws_no_worse, assert_no_worse
from liger_kernel.transformers.patching import quantised
from tests.transformers.quantised import Linear4bit
from tests.transformers.test_lora import counted, fill
from tests.who_keeps import TORCH_TELLS

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")

Quantise = Callable[[nn.Linear], nn.Module]
NAMES = ["q", "k", "v", "o"]


class Block(nn.Module):
    """Three Linears that read one input, and one that reads theirs."""

    def __init__(self, quantise: Quantise, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            linear = nn.Linear(64, 64, bias=name == "q").to(dtype).requires_grad_(False)
            setattr(self, name, quantise(linear))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))


def block(quantise: Quantise, dtype: torch.dtype, **options: Any) -> Any:
    model = Block(quantise, dtype)
    for loaded in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # as transformers says it
        setattr(model, loaded, True)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=NAMES, **options)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    fill(model)
    return model.train()


def step(model: Any, x: Tensor, precision: torch.dtype | None = None) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    assert x.grad is not None
    named = model.named_parameters()
    grads = {n: p.grad for n, p in named if p.grad is not None and "lora" in n}
    return {"y": y.detach(), "x": x.grad, **grads}


def exact(model: Any) -> Any:
    """In float64, with the weights that the quantised ones stand for."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        base = module._modules.get("base_layer")
        if base is None:
            continue
        form, found = quantised._read(base) or ((), None)
        assert found is not None, form
        linear = nn.Linear(base.in_features, base.out_features, base.bias is not None)
        linear.weight = nn.Parameter(found.dense(torch.float32), requires_grad=False)
        linear.bias = base.bias
        module._modules["base_layer"] = linear
    return model.double()


def assert_as_peft(
    model: Any,
    dtype: torch.dtype,
    precision: torch.dtype | None = None,
    nodes: int = 4,
) -> Any:
    stock, ours = copy.deepcopy(model), copy.deepcopy(model)
    report = liger_kernel.patch(ours)
    wide = exact(model)

    def draw(seed: int) -> Any:
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        with counted() as calls:
            found = step(ours, x, precision)
        assert len(calls) == nodes, report
        return found, step(wide, x.double()), step(stock, x, precision)

    assert_draws_no_worse(draw, first=1 if dtype == torch.float32 and not precision else 8)
    return report


def stand_in(dtype: torch.dtype | None, **how: Any) -> Quantise:
    return lambda linear: Linear4bit(linear, dtype, **how)


def weights(report: Any) -> set[str]:
    return {row.by for row in report.replaced if row.kind == "lora"}


class TestFourBits:
    @pytest.mark.parametrize("nested", [True, False])
    def test_a_step(self, nested: bool) -> None:
        model = block(stand_in(torch.float32, nested=nested, blocksize=32), torch.float32)
        report = assert_as_peft(model, torch.float32)
        assert weights(report) == {"LoRA in one node on NF4"}

    def test_in_16_bits(self) -> None:
        model = block(stand_in(torch.bfloat16), torch.bfloat16, lora_dropout=0.2)
        assert_as_peft(model.bfloat16(), torch.bfloat16)

    @pytest.mark.parametrize("precision", [None, torch.bfloat16])
    def test_hidden_states_in_fp32(self, precision: torch.dtype | None) -> None:
        """As `prepare_model_for_kbit_training` makes them: norms are in fp32, and so are adapters."""
        model = block(stand_in(torch.bfloat16), torch.float32)
        assert_as_peft(model, torch.float32, precision)

    def test_computed_in_another_dtype_than_autocast(self) -> None:
        model = block(stand_in(torch.float32), torch.float32)
        assert_as_peft(model, torch.float32, torch.bfloat16, nodes=0)

    def test_a_dtype_that_the_first_call_sets(self) -> None:
        model = block(stand_in(None), torch.float32)
        report = liger_kernel.patch(model)
        reasons = {row.reason for row in report.rows if row.kind == "lora"}
        assert reasons == {"its NF4 weight is not as it is trained with"}
        model(torch.randn(2, 64))
        liger_kernel.unpatch(model)
        assert weights(liger_kernel.patch(model)) == {"LoRA in one node on NF4"}

    def test_a_layer_that_computes_something_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Linear4bit.forward
        model = block(stand_in(torch.float32), torch.float32)
        assert weights(liger_kernel.patch(model))
        monkeypatch.setattr(Linear4bit, "forward", lambda self, x: 1.01 * original(self, x))
        with counted() as calls:
            step(model, torch.randn(2, 64))
        assert not calls
        rows = liger_kernel.patch(block(stand_in(torch.float32), torch.float32)).rows
        told = "Linear4bit computes something else than a product with its dequantised weight"
        assert {row.reason for row in rows if row.kind == "lora"} == {told}
        monkeypatch.undo()
        quantised._verdicts.clear()

    def test_hooks_on_the_base_layer(self) -> None:
        model = block(stand_in(torch.float32), torch.float32)
        liger_kernel.patch(model)
        seen: list[Any] = []
        model.base_model.model.q.base_layer.register_forward_hook(lambda *args: seen.append(args))
        with counted() as calls:
            step(model, torch.randn(2, 64))
        assert (len(calls), len(seen)) == (3, 1)


class TestHowOften:
    """A weight is dequantised once for each direction, and once less than that where a checkpoint repeats a forward."""

    @pytest.mark.parametrize(
        ("run", "rows", "told", "untold"),
        [
            (lambda model, x: model(x), 64, 2, 2),
            (lambda model, x: checkpoint(model, x, use_reentrant=False), 64, 2, 3),
            (lambda model, x: checkpoint(model, x, use_reentrant=True), 64, 2, 3),
            # little else is kept then, and the weights would be most of it
            (lambda model, x: checkpoint(model, x, use_reentrant=False), 16, 3, 3),
        ],
    )
    @pytest.mark.parametrize("tells", [True, False])
    def test_a_step(
        self,
        run: Any,
        rows: int,
        told: int,
        untold: int,
        tells: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """`tells`: whether torch knows who keeps what a node saves. That of 2.6 does not."""
        name = "_top_saved_tensors_default_hooks"
        if not tells:
            monkeypatch.delattr(torch._C._autograd, name, raising=False)
        elif not TORCH_TELLS:
            pytest.skip(f"torch {torch.__version__} cannot tell")
        model = block(stand_in(torch.float32), torch.float32)
        x = torch.randn(rows, 64, requires_grad=True)
        high, low = (
            torch.autograd.grad(m(leaf).sum(), leaf)[0]
            for m, leaf in ((exact(model), x.detach().double().requires_grad_()), (model, x))
        )
        liger_kernel.patch(model)
        made: list[Any] = []
        original = quantised.dequantize_4bit

        def counting(*args: Any, **kwargs: Any) -> Tensor:
            made.append(args)
            return original(*args, **kwargs)

        monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)  # whose own runs on CPUs
        monkeypatch.setattr(quantised, "dequantize_4bit", counting)
        run(model, x).sum().backward()
        assert len(made) == 4 * (told if tells else untold)
        assert x.grad is not None
        assert_no_worse("dx", x.grad, high, low)

    def test_no_weight_is_kept(self) -> None:
        model = block(stand_in(torch.float32), torch.float32)
        liger_kernel.patch(model)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model(torch.randn(128, 64, requires_grad=True))
        assert not [t for t in kept if t.shape == (64, 64)]


class TestTheLibraries:
    """Where they are installed."""

    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bitsandbytes_4_bits(self, kind: str, dtype: torch.dtype) -> None:
        bnb = pytest.importorskip("bitsandbytes")

        def quantise(linear: nn.Linear) -> nn.Module:
            found = bnb.nn.Linear4bit(
                64, 64, linear.bias is not None, compute_dtype=dtype, quant_type=kind
            )
            found.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type=kind
            )
            found.bias = linear.bias
            return found.to("cpu")

        report = assert_as_peft(block(quantise, dtype).to(dtype), dtype)
        assert weights(report) == {f"LoRA in one node on {kind.upper()}"}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bitsandbytes_8_bits(self, dtype: torch.dtype) -> None:
        bnb = pytest.importorskip("bitsandbytes")

        def quantise(linear: nn.Linear) -> nn.Module:
            found = bnb.nn.Linear8bitLt(64, 64, linear.bias is not None, has_fp16_weights=False)
            found.weight = bnb.nn.Int8Params(
                linear.weight.data, requires_grad=False, has_fp16_weights=False
            )
            found.bias = linear.bias
            return found.to("cpu")

        model = block(quantise, dtype).to(dtype)
        step(model, torch.randn(2, 64, dtype=dtype))  # quantises on the CPU
        report = assert_as_peft(model, dtype)
        assert weights(report) == {"LoRA in one node on LLM.int8"}

    @pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
    def test_torchao(self, config: str) -> None:
        pytest.importorskip("torchao")
        quantization = importlib.import_module("torchao.quantization")

        def quantise(linear: nn.Linear) -> nn.Module:
            quantization.quantize_(linear, getattr(quantization, config)())
            return linear

        report = assert_as_peft(block(quantise, torch.bfloat16), torch.bfloat16)
        (by,) = weights(report)
        assert by.startswith("LoRA in one node on torchao's ")
