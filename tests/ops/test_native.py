"""Devices without kernels: an op is PyTorch code, nothing of it is computed twice, and LayerNorm is PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from liger_kernel.ops import OPS
from liger_kernel.ops.cross_entropy import portable
from liger_kernel.ops.cross_entropy.cases import SPEC as CROSS_ENTROPY
from liger_kernel.ops.group_norm import group_norm
from liger_kernel.ops.layer_norm import layer_norm
from liger_kernel.testing import Make, OpSpec, specs
from liger_kernel.testing.calls import call, drawn, leaves, wanted_inputs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there, kernels compute")

NATIVE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "layer_norm": (
        lambda x, w, b: layer_norm(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-5),
    ),
    "group_norm": (
        lambda x, w, b: group_norm(x, w, b, 4, 1e-5),
        lambda x, w, b: F.group_norm(x, 4, w, b, 1e-5),
    ),
}


@pytest.mark.parametrize("op", NATIVE)
def test_is_the_op_of_torch_bit_by_bit(op: str) -> None:
    make = Make(torch.float32, "cpu")
    inputs = make.randn(6, 16, shift=50.0), make.randn(16), make.randn(16)
    dy = make.randn(6, 16)
    (y, grads), (expected, expected_grads) = (
        call(function, {}, leaves(inputs, {0, 1, 2}), {0: dy}) for function in NATIVE[op]
    )
    assert torch.equal(y[0], expected[0])
    assert all(torch.equal(grads[i], expected_grads[i]) for i in range(3))


_VIEWS = {
    getattr(torch.ops.aten, name)
    for name in ("alias", "detach", "slice", "split_with_sizes", "t", "transpose", "view")
}


class Count(TorchDispatchMode):
    """How many of PyTorch's ops ran; views, which cost nothing, and of which releases take more or fewer, apart."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.overloadpacket not in _VIEWS
        return func(*args, **(kwargs or {}))


#: what goes another way than its reference: over tiles or blocks, by a step that writes the gradient in place, or with
#: more inputs to check
ANOTHER_WAY = {
    "fused_ce_tvd",
    "fused_neighborhood_attention",
    "grpo_loss",
    "logprobs",
    "tiled_mlp",
}


@pytest.mark.parametrize(
    "spec",
    [s for s in specs().values() if s.name in OPS.keys() - ANOTHER_WAY and s.differentiable],
    ids=lambda s: s.name,
)
def test_nothing_is_computed_twice(spec: OpSpec) -> None:
    """No more of PyTorch's ops than the reference takes under autograd."""
    case = spec.cases[0]
    inputs, grads = drawn(spec, case, Make(torch.float32, "cpu"))
    wanted = wanted_inputs(spec, case, inputs)
    calls = []
    for function in (spec.function, spec.reference):
        arguments = leaves(inputs, wanted)
        with Count() as count:
            call(partial(function, **case.options), {}, arguments, grads)
        calls.append(count.calls)
    ours, reference = calls
    assert ours <= reference + 6, "six for what a public function checks"


@pytest.mark.parametrize(
    "case", [c for c in CROSS_ENTROPY.cases if not c.large], ids=lambda c: c.id
)
def test_blocks_of_rows_are_one_step(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step goes through rows that fit the cache; what comes out is as if there were one block."""
    inputs, grads = drawn(CROSS_ENTROPY, case, Make(torch.float32, "cpu"))
    found = []
    for size in (1, 2**40):
        monkeypatch.setattr(portable, "BLOCK_BYTES", size)
        arguments = leaves(inputs, wanted_inputs(CROSS_ENTROPY, case, inputs))
        found.append(call(CROSS_ENTROPY.function, case.options, arguments, grads))
    (outputs, gradients), (expected, expected_gradients) = found
    for a, b in zip(outputs, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    for i, grad in gradients.items():
        assert torch.equal(grad.nan_to_num(7), expected_gradients[i].nan_to_num(7))
