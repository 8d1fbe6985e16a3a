"""Our kernels in Megatron-core: in a stand-in of the modules that are patched, and in the real one where it is."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liger_kernel.megatron.cross_entropy as our_loss
from liger_kernel.megatron import (
    LigerMegatronCrossEntropy,
    LigerMegatronRMSNorm,
    LigerMegatronSwiGLU,
    apply_liger_kernel_to_megatron,
)
from liger_kernel.testing import Make, assert_no_worse

CORE = "megatron.core"
REAL = importlib.util.find_spec("megatron") and importlib.util.find_spec(CORE)
RMS = SimpleNamespace(normalization="RMSNorm", layernorm_zero_centered_gamma=False)


class WrappedTorchNorm:
    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        norm = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        return norm(hidden_size, eps=eps)


class LocalSpecProvider:
    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> Any:
        return WrappedTorchNorm


def fused_vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, tp_group: Any) -> Tensor:
    raise AssertionError("Megatron's own loss ran")


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    raise AssertionError("Megatron's own loss ran")


class SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, fp8_input_store: bool, cpu_offload_input: bool) -> Tensor:
        gate, up = input.chunk(2, -1)
        return F.silu(gate) * up


def bias_swiglu_impl(input: Tensor, *more: Any) -> Tensor:
    found: Tensor = sys.modules[f"{CORE}.fusions.fused_bias_swiglu"].SwiGLUFunction.apply(
        input.view(-1, input.shape[-1]), *more
    )
    return found.view(*input.shape[:-1], -1)


#: what is patched, and its copies
TREE: dict[str, dict[str, Any]] = {
    "models.backends": {"LocalSpecProvider": LocalSpecProvider},
    "transformer.torch_norm": {"WrappedTorchNorm": WrappedTorchNorm},
    "transformer.transformer_block": {"LayerNormImpl": WrappedTorchNorm},
    "fusions.fused_cross_entropy": {
        "fused_vocab_parallel_cross_entropy": fused_vocab_parallel_cross_entropy
    },
    "models.common.language_module.language_module": {
        "fused_vocab_parallel_cross_entropy": fused_vocab_parallel_cross_entropy
    },
    "tensor_parallel.cross_entropy": {"vocab_parallel_cross_entropy": vocab_parallel_cross_entropy},
    "tensor_parallel": {"vocab_parallel_cross_entropy": vocab_parallel_cross_entropy},
    "fusions.fused_bias_swiglu": {
        "SwiGLUFunction": SwiGLUFunction,
        "bias_swiglu_impl": bias_swiglu_impl,
    },
}


def at(path: str) -> Any:
    return importlib.import_module(f"{CORE}.{path}")


@pytest.fixture(params=["stand-in", "real"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Megatron-core, as it was again afterwards."""
    if request.param == "real":
        if not REAL:
            pytest.skip("megatron-core is not installed")
        for path, names in TREE.items():
            for name in names:
                monkeypatch.setattr(at(path), name, getattr(at(path), name))
        provider = at("models.backends").LocalSpecProvider
        monkeypatch.setattr(provider, "layer_norm", provider.layer_norm)
    else:
        for path in [*TREE, *(f"{p.rpartition('.')[0]}" for p in TREE), "models.common"]:
            for name in ("megatron", CORE, f"{CORE}.{path}"):
                module: Any = types.ModuleType(name)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, name.rstrip("."), module)
        for path, names in TREE.items():
            for name, value in names.items():
                monkeypatch.setattr(at(path), name, value, raising=False)
        own = {"layer_norm": LocalSpecProvider.layer_norm}
        monkeypatch.setattr(
            at("models.backends"), "LocalSpecProvider", type("LocalSpecProvider", (), own)
        )
    return request.param


def everything() -> list[Any]:
    found = [getattr(at(path), name) for path, names in TREE.items() for name in names]
    return [*found, at("models.backends").LocalSpecProvider.layer_norm]


def test_norms_are_built_by_ours(core: str) -> None:
    stock = at("transformer.transformer_block").LayerNormImpl
    apply_liger_kernel_to_megatron()
    patched = everything()
    apply_liger_kernel_to_megatron()  # changes nothing
    assert all(a is b for a, b in zip(patched, everything(), strict=True))
    provider = at("models.backends").LocalSpecProvider()
    assert provider.layer_norm(rms_norm=True, for_qk=True) is LigerMegatronRMSNorm
    assert provider.layer_norm(False, for_qk=True) is at("transformer.torch_norm").WrappedTorchNorm
    last = at("transformer.transformer_block").LayerNormImpl
    assert last.__liger_patched__
    assert last.__wrapped__ is stock
    assert isinstance(last(config=RMS, hidden_size=8, eps=1e-4), LigerMegatronRMSNorm)
    if core == "stand-in":  # the real one reads more of its config
        other = SimpleNamespace(normalization="LayerNorm")
        assert isinstance(last(other, hidden_size=8), nn.LayerNorm)
    assert not hasattr(at("fusions.fused_bias_swiglu").SwiGLUFunction, "__liger_patched__")


def test_another_norm_stays(core: str, caplog: pytest.LogCaptureFixture) -> None:
    at("transformer.transformer_block").LayerNormImpl = other = type("FusedLayerNorm", (), {})
    with caplog.at_level(logging.INFO, "liger_kernel.megatron"):
        apply_liger_kernel_to_megatron()
    assert at("transformer.transformer_block").LayerNormImpl is other
    assert "stays FusedLayerNorm" in caplog.text


def test_losses_are_ours_wherever_they_were_imported(
    core: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    apply_liger_kernel_to_megatron(rms_norm=False, cross_entropy=True)
    apply_liger_kernel_to_megatron(rms_norm=False, cross_entropy=True)
    assert not caplog.records
    make = Make(torch.float32)
    logits, labels = make.randn(3, 2, 20), make.labels(6, 20, 0.3).view(3, 2)
    labels[0, 0] = -1  # of padding: left to the loss mask
    wanted = F.cross_entropy(logits.view(6, 20), labels.view(6).clamp(min=0), reduction="none")
    wanted = wanted.view(3, 2).masked_fill(labels < 0, 0)
    language = at("models.common.language_module.language_module")
    for function in (
        at("fusions.fused_cross_entropy").fused_vocab_parallel_cross_entropy,
        language.fused_vocab_parallel_cross_entropy,
        at("tensor_parallel").vocab_parallel_cross_entropy,
        at("tensor_parallel.cross_entropy").vocab_parallel_cross_entropy,
    ):
        found = function(logits, labels)
        assert_no_worse("loss", found, wanted.double(), wanted)
    smoothed = at("tensor_parallel").vocab_parallel_cross_entropy(logits, labels, 0.1)
    k = 20
    logp = logits.log_softmax(-1)
    alpha = 0.1 * k / (k - 1)
    wanted = ((1 - alpha) * wanted - alpha * logp.mean(-1)).masked_fill(labels < 0, 0)
    assert_no_worse("smoothed", smoothed, wanted.double(), wanted)


def test_the_group_is_megatrons_where_none_is_given(
    core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(LigerMegatronCrossEntropy):
        def forward(self, logits: Tensor, target: Tensor, tp_group: Any = None) -> Any:
            return tp_group, self.label_smoothing

    group = object()
    state = SimpleNamespace(get_tensor_model_parallel_group=lambda check_initialized: group)
    monkeypatch.setitem(sys.modules, f"{CORE}.parallel_state", state)  # type: ignore[arg-type]
    monkeypatch.setattr(our_loss, "LigerMegatronCrossEntropy", Seen)
    apply_liger_kernel_to_megatron(rms_norm=False, cross_entropy=True)
    loss, nothing = at("tensor_parallel").vocab_parallel_cross_entropy, torch.zeros(1, 1, 2)
    assert loss(nothing, nothing) == (group, 0.0)
    assert loss(nothing, nothing, 0.2, tp_group="given") == ("given", 0.2)


def test_a_copy_of_somebody_else_is_reported(core: str, caplog: pytest.LogCaptureFixture) -> None:
    language = at("models.common.language_module.language_module")
    language.fused_vocab_parallel_cross_entropy = other = lambda *args: None
    apply_liger_kernel_to_megatron(rms_norm=False, cross_entropy=True)
    assert language.fused_vocab_parallel_cross_entropy is other
    assert "language_module.fused_vocab_parallel_cross_entropy is neither" in caplog.text


def test_swiglu(core: str, caplog: pytest.LogCaptureFixture) -> None:
    fused = at("fusions.fused_bias_swiglu")
    original = fused.SwiGLUFunction
    apply_liger_kernel_to_megatron(rms_norm=False, swiglu=True)
    make = Make(torch.float32)
    x = make.randn(5, 2, 24)
    found = fused.bias_swiglu_impl(x, None) if core == "real" else fused.bias_swiglu_impl(x)
    gate, up = x.chunk(2, -1)
    wanted = F.silu(gate) * up
    assert_no_worse("swiglu", found, F.silu(gate.double()) * up.double(), wanted)
    leaf = x.view(-1, 24).clone().requires_grad_()
    with caplog.at_level(logging.INFO, "liger_kernel.megatron.monkey_patch"):
        for _ in range(2):
            kept = fused.SwiGLUFunction.apply(leaf, True, False)
    assert type(kept.grad_fn).__name__ == f"{original.__name__}Backward"
    assert [r.getMessage() for r in caplog.records] == [
        "config.activation_func_fp8_input_store=True: SwiGLU is falling back to Megatron's own."
    ]


def test_what_is_missing_is_named(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(at("fusions.fused_bias_swiglu"), "SwiGLUFunction")
    with pytest.raises(ImportError, match="symbol path may have changed"):
        apply_liger_kernel_to_megatron(rms_norm=False, swiglu=True)
    monkeypatch.setitem(sys.modules, f"{CORE}.fusions.fused_bias_swiglu", None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match="requires megatron-core"):
        apply_liger_kernel_to_megatron(rms_norm=False, swiglu=True)


@pytest.mark.parametrize("centered", [False, True])
def test_rms_norm(centered: bool) -> None:
    config = SimpleNamespace(layernorm_zero_centered_gamma=centered, sequence_parallel=True)
    norm: Any = LigerMegatronRMSNorm(config, 12, eps=1e-4, persist_layer_norm=True)
    assert norm.weight.sequence_parallel is True
    assert norm._offset == float(centered)
    assert repr(norm).endswith(f"(hidden_size=(12,), eps=0.0001, zero_centered_gamma={centered})")
    x = Make(torch.float32).randn(3, 2, 12)
    high, low = (F.rms_norm(t, (12,), eps=1e-4) for t in (x.double(), x))
    assert_no_worse("norm", norm(x), high, low)
    with pytest.raises(
        ValueError, match=r"requires config.normalization='RMSNorm', got 'LayerNorm'"
    ):
        LigerMegatronRMSNorm(SimpleNamespace(normalization="LayerNorm"), 12)


def test_swiglu_module(caplog: pytest.LogCaptureFixture) -> None:
    x = Make(torch.float32).randn(3, 2, 12)
    gate, up = x.chunk(2, -1)
    wanted = F.silu(gate) * up
    ours = LigerMegatronSwiGLU()
    assert_no_worse("swiglu", ours(x), F.silu(gate.double()) * up.double(), wanted)
    assert ours(x[0]).shape == (2, 6)
    reasons = {
        "bias is not None": {"bias": x},
        "activation_func_fp8_input_store": {"fp8_input_store": True},
        "CPU activation offloading": {"cpu_offload_input": True},
    }
    with_fallback = LigerMegatronSwiGLU(lambda *given: given)
    for reason, given in reasons.items():
        with pytest.raises(RuntimeError, match=f"{reason}.*apply_liger_kernel_to_megatron"):
            ours(x, **given)
        with caplog.at_level(logging.INFO, "liger_kernel.megatron.swiglu"):
            assert with_fallback(x, **given)[0] is x
            with_fallback(x, **given)
    assert sum("falling back" in r.getMessage() for r in caplog.records) == len(reasons)
    with pytest.raises(ValueError, match="2D"):
        ours(x[None])
    with pytest.raises(ValueError, match="even"):
        ours(x[..., 1:])


def test_loss_takes_megatrons_defaults() -> None:
    loss = LigerMegatronCrossEntropy()
    assert loss.label_smoothing_formula == "megatron"
    assert loss.extra_repr() == (
        "ignore_index=-100, label_smoothing=0.0, reduction='none', label_smoothing_formula='megatron', "
        "label_smoothing_mode='partition'"
    )
    with pytest.raises(ValueError, match="reduction='mean'"):
        LigerMegatronCrossEntropy(reduction="mean")
    with pytest.raises(ValueError, match=r"label_smoothing=1.0 is not in \[0.0, 1.0\)"):
        LigerMegatronCrossEntropy(label_smoothing=1.0)
    with pytest.raises(ValueError, match="label_smoothing_mode='local'"):
        LigerMegatronCrossEntropy(label_smoothing_mode="local")
