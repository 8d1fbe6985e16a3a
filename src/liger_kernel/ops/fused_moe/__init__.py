"""A mixture of experts (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538) behind its router: the experts' MLPs.

Rows are sorted by expert, multiplied in groups, and gathered again, without an atomic or a look at how many tokens an
expert has. `pipeline.py` has the steps; for backward only x and the output of the first product are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import (
    Op,
    autocast_dtype,
    graph_is_kept,
    in_torch_func,
    is_transformed,
    refuse_double_backward,
    saved_tensors_are_ours,
)
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops import OPS
from liger_kernel.ops.fused_moe import library, reference
from liger_kernel.ops.fused_moe.checks import (
    check_biases,
    check_index,
    check_low_rank,
    check_options,
    check_tensors,
)
from liger_kernel.ops.fused_moe.contract import MoEOptions


class _FusedMoE(Op):
    """The tensors are those of `contract.Kernels`, in its order. Backward may write over what forward saved for
    it alone."""

    @staticmethod
    def forward(ctx: Any, impl: Any, options: Any, *tensors: Tensor | None) -> Any:
        ctx.held_by_us_alone = saved_tensors_are_ours()
        return Op.forward(ctx, impl, options, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        impl, options, needs = ctx.of_forward
        if grads[0] is None:
            return (None,) * (2 + len(needs))
        alone = ctx.held_by_us_alone and not graph_is_kept()
        run = impl.backward_over if alone else impl.backward
        return None, None, *run(grads, ctx.saved_tensors, options=options, needs=needs)


_dispatch = Dispatch(
    "fused_moe",
    _FusedMoE,
    reference.fused_moe,
    shards=no_shards(
        "fused_moe", "pass the local experts, .to_local(), and index E for all others"
    ),
)


def fused_moe(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_shift: float = 0.0,
    gate_up_lora: tuple[Tensor, Tensor] | None = None,
    down_lora: tuple[Tensor, Tensor] | None = None,
    gate_up_scaling: float = 1.0,
    down_scaling: float = 1.0,
) -> Tensor:
    """`out[t] = sum_k w[t, k] * (act(x[t] @ W1[e].T + b1[e]) @ W2[e].T + b2[e])` with `e = top_k_index[t, k]`.

    `act` of 2I numbers, the gate and up, is `f(alpha gate) / alpha * (up + up_shift)`; f is `activation`.

    Args:
        x: (..., H). top_k_index: (..., K) integers in [0, E]; the index E is nobody's: it adds nothing, and gets no
            gradient. top_k_weights: (..., K), any floating dtype.
        gate_up_weight: (E, 2I, H), down_weight: (E, H, I), or with `transposed` (E, H, 2I) and (E, I, H); any strides,
            in the dtype of x unless autocast is on. gate_up_bias: (E, 2I); down_bias: (E, H).
        activation: "silu", "gelu_tanh", "gelu" (exact) or "relu_squared".
        gated: without, the first weight has I features, and `act` is f of them.
        interleaved: gate and up take turns in the features of the first weight, where otherwise the gates come first.
        limit: gate is clamped to (-inf, limit], up to [-limit, limit]. alpha, limit, up_shift = 1.702, 7, 1: gpt-oss.
        gate_up_lora, down_lora: A (E, R, in) and B (E, out, R) of any floating dtype and any rank. The weight of expert
            e is then W[e] + scaling B[e] @ A[e], which is never made: rows go through A and B, rounded once between
            them. They get gradients in their own dtype.

    Returns: (..., H) in the dtype of x. The sum over k is in fp32, and rounded once.
    Raises: ValueError for shapes that do not fit, an unknown activation, an option without effect, and, on the CPU, an
        index out of range, which on other devices makes its token NaN; TypeError for dtypes that do not fit, and for
        DTensors.
    """
    options = MoEOptions(
        activation,
        gated,
        interleaved,
        transposed,
        None if limit is None else float(limit),
        float(alpha),
        float(up_shift),
        float(gate_up_scaling),
        float(down_scaling),
    )
    check_options(options)
    dtype, shape = x.dtype, x.shape
    narrow = autocast_dtype(x)
    if narrow is not None and x.is_floating_point():
        x, gate_up_weight, down_weight = (t.to(narrow) for t in (x, gate_up_weight, down_weight))
    check_tensors(options, x, gate_up_weight, down_weight, top_k_index, top_k_weights)
    check_biases(options, gate_up_weight, down_weight, gate_up_bias, down_bias)
    low_rank = (*(gate_up_lora or (None, None)), *(down_lora or (None, None)))
    check_low_rank(options, x, gate_up_weight, down_weight, *low_rank)
    compiling = torch.compiler.is_compiling() and not in_torch_func()
    if not is_transformed():
        check_index(top_k_index, gate_up_weight.shape[0])
    top_k = top_k_index.shape[-1]
    compute = library.call if compiling else _dispatch
    out = compute(
        options,
        x.reshape(-1, shape[-1]).contiguous(),
        gate_up_weight,
        down_weight,
        top_k_index.reshape(-1, top_k),
        top_k_weights.reshape(-1, top_k),
        gate_up_bias,
        down_bias,
        *low_rank,
    )
    found: Tensor = out.view(shape).to(dtype)
    return found


__getattr__ = compat_names(__name__, OPS["fused_moe"])
