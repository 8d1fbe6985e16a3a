"""The products of a mixture of experts by `torch_npu.npu_grouped_matmul`; the other steps are those of every device.

Documented in op-plugin as `npu_grouped_matmul(x, weight, *, bias, group_list, split_item, group_type, ...) -> [y]`,
each a list of one tensor with `split_item=3`, of one dtype. `group_list` (int64, on the device) has the end of each of
1024 groups or less; the last is the number of rows. Of group_type 0 the groups are of rows of x (S, M), contiguous,
for a weight (E, M, N) that may be a transposed view, with a bias (E, N), float32 for bfloat16. Of group_type 2 they are
of terms: x is a transposed view (M, S), weight (S, N), and y (E, M, N). No last dimension reaches 65536.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch_npu
from torch import Tensor

from liger_kernel.backends.npu import no_native_call
from liger_kernel.ops.fused_moe import pipeline
from liger_kernel.ops.fused_moe.contract import MoEOptions
from liger_kernel.ops.fused_moe.pipeline import LowRank, Routing
from liger_kernel.ops.fused_moe.portable import Portable, rows_of

_MOST_GROUPS, _INNER_LIMIT = 1024, 65536


def unserved(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    *,
    options: MoEOptions,
) -> str | None:
    weights = (gate_up_weight, down_weight, gate_up_a, gate_up_b, down_a, down_b)
    if gate_up_weight.shape[0] >= _MOST_GROUPS:  # with a group of pairs without an expert
        return f"{gate_up_weight.shape[0]} experts are too many"
    if any(size >= _INNER_LIMIT for w in weights if w is not None for size in w.shape[1:]):
        return f"{_INNER_LIMIT} features or more"
    return no_native_call(x, top_k_index, *weights)


def _grouped(x: Tensor, weight: Tensor, ends: Tensor, by: int, bias: Tensor | None = None) -> Any:
    if bias is not None:
        bias = bias.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype)
    return torch_npu.npu_grouped_matmul(
        [x],
        [weight],
        bias=None if bias is None else [bias.contiguous()],
        group_list=ends.long(),
        split_item=3,
        group_type=by,
    )[0]


class Steps(Portable):
    """`pipeline.Steps`"""

    def product(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        gathered: bool,
        low: LowRank | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Rows of no expert, which come last, are given to the last one: no step reads what comes out."""
        ends = routing.starts[1:].clone()
        ends[-1] = routing.slots.shape[0]

        def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
            if not (weight.is_contiguous() or weight.mT.is_contiguous()):
                weight = weight.contiguous()
            return _grouped(rows.contiguous(), weight.mT, ends, 0, bias)

        rows = rows_of(a, routing, gathered)
        out: Tensor = product(rows, weight, bias)
        if scale is not None:
            out = out * scale
        if low is not None:
            out = out + product(low.rows, low.b)
        return out

    def weight_gradient(
        self,
        a: Tensor,
        b: Tensor,
        routing: Routing,
        gathered: tuple[bool, bool],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Rows of no expert are a group of their own. What is written for one without rows, nobody documents."""
        x, y = (rows_of(t, routing, n).contiguous() for t, n in zip((a, b), gathered, strict=True))
        last = routing.starts.new_full((1,), routing.slots.shape[0])
        found = _grouped(x.t(), y, torch.cat((routing.starts[1:], last)), 2)[:-1]
        empty = (routing.starts.diff() == 0).view(-1, 1, 1)
        return found.masked_fill_(empty, 0.0).to(dtype or found.dtype)


_STEPS = Steps()
forward = partial(pipeline.forward, lambda *tensors: _STEPS)
backward = partial(pipeline.backward, lambda *tensors: _STEPS, False)
backward_over = partial(pipeline.backward, lambda *tensors: _STEPS, True)
