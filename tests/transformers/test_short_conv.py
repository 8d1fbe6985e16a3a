"""The short convolutions of LFM2: proven, with a mask, and left to HF with a cache or packed sequences."""

from __future__ import annotations

import collections
import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import Make, assert_no_worse
from tests.transformers.here import hf_class, lacks
from tests.transformers.steps import in_float64
from tests.transformers.tiny import batch
from tests.transformers.zoo.build import ENTRIES, build

Calls = collections.Counter[str]
X = Make(torch.float32).randn(2, 9, 16)
#: what packs sequences, where this release can
PACKED = {"seq_idx": None} if Version(transformers.__version__) >= Version("5.17") else {}
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


def made(cls: Any = None, taps: int = 3, bias: bool = False) -> nn.Module:
    config = SimpleNamespace(
        hidden_size=16, conv_L_cache=taps, conv_bias=bias, layer_types=["conv"]
    )
    torch.manual_seed(0)
    return (cls or hf_class("lfm2.Lfm2ShortConv"))(config, 0)  # type: ignore[no-any-return]


def patched(module: nn.Module) -> tuple[Any, dict[str, str]]:
    """A copy of the module inside of a patched model, and what the report says."""
    model = nn.Sequential(copy.deepcopy(module))
    rows = liger_kernel.patch(model).rows
    return model[0], {row.path: row.by or row.reason for row in rows if row.kind != "loss"}


def run(module: nn.Module, x: Tensor, **more: Any) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x, **more)
    wanted = {"x": x, **dict(module.named_parameters())}
    g = Make(torch.float64, seed=1).randn(*y.shape).to(y.dtype)
    return {
        "y": y.detach(),
        **dict(zip(wanted, torch.autograd.grad(y, [*wanted.values()], g), strict=True)),
    }


@pytest.mark.parametrize("more", [{}, {"attention_mask": MASK}], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_numbers(dtype: torch.dtype, more: dict[str, Any], calls: Calls) -> None:
    module = made(taps=4, bias=True).to(dtype)
    ours, rows = patched(module)
    assert rows["0"] == "LigerShortConv"
    x = X.to(dtype)
    low = run(module, x, **more)
    high = in_float64(lambda: run(copy.deepcopy(module).double(), x.double(), **more))
    calls.clear()
    found = run(ours, x, **more, **PACKED)
    assert calls["short_conv"] == (1 if PACKED or not more else 0)  # older ones: none with a mask
    for name, theirs in low.items():
        assert_no_worse(name, found[name], high[name].double(), theirs)


def test_another_function_is_left_alone() -> None:
    parent = hf_class("lfm2.Lfm2ShortConv")

    class LooksAhead(parent):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
            return super().forward(hidden_states.flip(1)).flip(1)  # type: ignore[no-any-return]

    class Activates(parent):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
            return super().forward(hidden_states).relu()  # type: ignore[no-any-return]

    class OtherMask(parent):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
            return super().forward(hidden_states)  # type: ignore[no-any-return]

    for cls in (LooksAhead, Activates):
        assert patched(made(cls))[1]["0"] == f"{cls.__name__} computes something else"
    module = made(OtherMask)
    ours, rows = patched(module)
    assert rows["0"] == "LigerShortConv"
    assert torch.equal(ours(X, attention_mask=MASK), module(X, attention_mask=MASK))


def test_what_is_left_to_hf(calls: Calls) -> None:
    module = made()
    ours, _ = patched(module)
    calls.clear()
    packed = torch.zeros(2, 9, dtype=torch.int32)
    if not PACKED:
        lacks("short convolution of packed sequences")
    try:
        expected, refused = module(X, seq_idx=packed), None
    except ValueError as error:  # of transformers 5.24, where causal_conv1d is missing
        expected, refused = None, str(error)
    if refused is None:
        assert torch.equal(ours(X, seq_idx=packed), expected)
    else:
        with pytest.raises(ValueError, match=re.escape(refused)):
            ours(X, seq_idx=packed)
    hook = ours.conv.register_forward_hook(lambda *_: None)
    assert torch.equal(ours(X), module(X))
    hook.remove()
    ours.conv.weight = nn.Parameter(ours.conv.weight.detach() + 1)
    assert not calls["short_conv"]
    assert not torch.allclose(ours(X), module(X))
    assert calls["short_conv"] == 1


def test_a_model_with_and_without_a_cache(calls: Calls) -> None:
    entry = next(e for e in ENTRIES if str(e) == "lfm2")
    model = build(entry).eval()
    ours = copy.deepcopy(model)
    liger_kernel.patch(ours)
    inputs = batch()["input_ids"][:, :6]
    calls.clear()
    expected = model.generate(inputs, max_new_tokens=4, do_sample=False, use_cache=True)
    found = ours.generate(inputs, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(found, expected)
    assert not calls["short_conv"]
    ours(input_ids=inputs, use_cache=False)
    if not PACKED:
        lacks("LFM2 that makes no cache where none is wanted")
    assert calls["short_conv"] == 1
