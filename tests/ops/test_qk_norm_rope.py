"""RMSNorm and rotary embedding of heads in one pass: what the cases of the op do not say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel import backends
from liger_kernel.functional import qk_norm_rope, rms_norm, rope
from liger_kernel.testing import Make, assert_no_worse


def drawn(make: Make, of_weight: int = 8) -> tuple[Tensor, ...]:
    q, k = make.randn(2, 5, 3, 8).transpose(1, 2), make.randn(2, 5, 1, 8).transpose(1, 2)
    return q, k, make.randn(of_weight), make.randn(8), make.randn(5, 8), make.randn(5, 8)


@pytest.mark.usefixtures("on_the_kernels_device")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_norm_then_rope(implementation: str, dtype: torch.dtype) -> None:
    """Of each head, as in Qwen3, and of all heads of a token, as in OLMo 2."""
    for of_weight in (8, 24):
        given = drawn(Make(dtype), of_weight)

        def composed(
            q: Tensor, k: Tensor, w_q: Tensor, w_k: Tensor, cos: Tensor, sin: Tensor
        ) -> Any:
            rows = q.transpose(1, 2).reshape(2, 5, -1, w_q.numel())
            q = rms_norm(rows, w_q, 1e-5, 1.0).view(2, 5, 3, 8).transpose(1, 2)
            return rope(q, rms_norm(k, w_k, 1e-5, 1.0), cos, sin)

        with backends.use_implementation(implementation):
            found = qk_norm_rope(*given, eps=1e-5, offset=1.0)
        high, low = composed(*(t.double() for t in given)), composed(*given)
        for name, ours, h, theirs in zip("qk", found, high, low, strict=True):
            assert_no_worse(name, ours, h, theirs)
        assert found[0].stride() == given[0].stride() or implementation == "reference"


@pytest.mark.usefixtures("on_the_kernels_device")
def test_keeps_its_inputs_alone() -> None:
    kept: list[Tensor] = []
    given = [t.requires_grad_() for t in drawn(Make(torch.float32))[:4]]
    angles = drawn(Make(torch.float32))[4:]
    with (
        backends.use_implementation("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        qk_norm_rope(*given, *angles)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (*given, *angles)}


def test_compiles_to_one_graph() -> None:
    given = drawn(Make(torch.float32))
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="eager")
    for a, b in zip(compiled(*given), qk_norm_rope(*given), strict=True):
        assert_no_worse("output", a, b.double(), b)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q_weight": torch.ones(16)}, ValueError, r"q_weight has 16 elements.*3 heads of 8.*24"),
        ({"k_weight": torch.ones(8).int()}, TypeError, "k_weight must have a floating dtype"),
        ({"casting_mode": "qwen"}, ValueError, "casting_mode='qwen'"),
        ({"rotary_dim": 10}, ValueError, "rotary_dim=10"),
        ({"k": torch.ones(2, 1, 4, 8)}, ValueError, "dimension 2"),
        ({"q": torch.ones(2, 8)}, ValueError, r"\(B, H, S, D\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_an_error(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin")
    given: dict[str, Any] = dict(zip(names, drawn(Make(torch.float32)), strict=True))
    with pytest.raises(error, match=message):
        qk_norm_rope(**{**given, **changed})
