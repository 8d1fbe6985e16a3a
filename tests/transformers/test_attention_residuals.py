"""Attention residuals of Inkling-2: proven, and left to HF where the module computes something else."""

from __future__ import annotations

import collections
import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import Make, assert_no_worse
from tests.transformers.here import hf_class
from tests.transformers.steps import in_float64

Calls = collections.Counter[str]
WHERE = "inkling2.Inkling2BlockAttentionResidual"
MAKE = Make(torch.float32)
BLOCKS, PRESENT = MAKE.randn(2, 5, 3, 16), MAKE.randn(2, 5, 16, scale=3)


def made(queries: int = 1, cls: Any = None, attention: str = "sdpa") -> nn.Module:
    config = SimpleNamespace(hidden_size=16, _attn_implementation=attention)
    module = (cls or hf_class(WHERE))(config, queries)
    with torch.no_grad():
        module.query.copy_(Make(torch.float32, seed=3).randn(*module.query.shape))
    return module  # type: ignore[no-any-return]


def patched(module: nn.Module, **options: Any) -> tuple[Any, dict[str, str]]:
    """A copy of the module inside of a patched model, and what the report says."""
    model = nn.Sequential(copy.deepcopy(module))
    rows = liger_kernel.patch(model, **options).rows
    return model[0], {row.path: row.by or row.reason for row in rows if row.kind != "loss"}


def run(module: Any, blocks: Tensor, present: Tensor) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in (blocks, present)]
    found = module(*leaves)
    g = Make(torch.float64, seed=1).randn(*found[0].shape).to(found[0].dtype)
    wanted = [*leaves, module.query]
    grads = torch.autograd.grad(sum((h * g * (i + 1)).sum() for i, h in enumerate(found)), wanted)
    outputs = {f"output {i}": h.detach() for i, h in enumerate(found)}
    return outputs | dict(zip(("blocks", "present", "query"), grads, strict=True))


@pytest.mark.parametrize(("queries", "dtype"), [(1, torch.bfloat16), (3, torch.float32)], ids=str)
def test_same_numbers(queries: int, dtype: torch.dtype, calls: Calls) -> None:
    module = made(queries)
    ours, rows = patched(module)
    assert rows["0"] == "LigerAttentionResidual"
    for blocks in (BLOCKS.to(dtype), BLOCKS[:, :, :0].to(dtype)):
        low = run(module, blocks, PRESENT)
        high = in_float64(
            lambda b=blocks: run(copy.deepcopy(module).double(), b.double(), PRESENT.double())
        )
        calls.clear()
        found = run(ours, blocks, PRESENT)
        assert calls["attn_res"] == queries
        for name, theirs in low.items():
            if blocks.shape[2] or name != "query":  # of one block only: 0 but for rounding
                assert found[name].dtype == theirs.dtype
                assert_no_worse(name, found[name], high[name].double(), theirs)


def test_other_calls_are_hfs(calls: Calls) -> None:
    module = made(attention="eager")
    ours, _ = patched(module)
    calls.clear()  # of the proof
    with torch.autocast("cpu", torch.bfloat16):
        assert [h.dtype for h in ours(BLOCKS, PRESENT)] == [
            h.dtype for h in module(BLOCKS, PRESENT)
        ]
    assert calls["attn_res"] == 1
    named = {"block_states": BLOCKS, "partial_block_states": PRESENT}
    assert torch.equal(ours(**named)[0], module(**named)[0])
    for other in (ours, module):
        other.norm.eps = 1.0
    assert torch.equal(ours(BLOCKS, PRESENT)[0], module(BLOCKS, PRESENT)[0])
    assert calls["attn_res"] == 1
    assert "0" not in patched(module, attention_residuals=False)[1]


def test_another_function_is_left_alone() -> None:
    parent = hf_class(WHERE)

    class Raw(parent):  # type: ignore[misc, valid-type]
        """The sum of what the blocks are, not of what their norm makes."""

        def forward(self, block_states: Tensor, partial_block_states: Tensor) -> Any:
            v = torch.cat([block_states, partial_block_states.unsqueeze(-2)], -2).float()
            weights = (self.norm(v) @ self.query * v.shape[-1] ** -0.5).softmax(-1)
            return ((weights.unsqueeze(-1) * v).sum(-2),)

    class Scaled(parent):  # type: ignore[misc, valid-type]
        def forward(self, block_states: Tensor, partial_block_states: Tensor) -> Any:
            return super().forward(block_states, 2 * partial_block_states)

    for cls in (Raw, Scaled):
        assert patched(made(1, cls))[1]["0"] == f"{cls.__name__} computes something else"
