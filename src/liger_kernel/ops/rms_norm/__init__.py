"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) with the casting conventions of Llama and Gemma."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_last_dim, check_parameters
from liger_kernel._core.dtensor import is_dtensor, on_shards
from liger_kernel._core.launch import as_rows
from liger_kernel.backends import host_bound, implementation, use_implementation
from liger_kernel.ops.rms_norm import reference

#: elements up to which `F.rms_norm` (one kernel forward and two backward, since torch 2.8) is taken on a GPU; its
#: backward takes 0.25 ms for 65536x128, ours 0.025
_SMALL = 2**22
_FUSED_IN_TORCH = hasattr(torch.ops.aten, "_fused_rms_norm")

#: casting mode -> the code that the incumbent's helpers return and take
CASTING_MODES = {"llama": 0, "gemma": 1, "none": -1}


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:
    """RMSNorm over the last dimension: `x / sqrt(mean(x^2) + eps) * (offset + weight)`.

    Args:
        x: (..., N), any floating dtype, any strides. A DTensor is normalised shard by shard, whole rows at a time.
        weight: (N,), or None for no affine part.
        eps: added to the mean of squares.
        offset: added to the weight; 1.0 for models that store `weight - 1` (Gemma, Qwen3-Next).
        casting_mode: "llama" rounds the normalised x to the dtype of x before the weight is applied, "gemma" rounds
            once at the end, "none" promises no fp32 statistics (and is computed in fp32 where that is free).

    Returns: (..., N) in the dtype of x.
    Raises: ValueError for an unknown mode or a weight that does not fit; TypeError for integer tensors.
    """
    check_choice("casting_mode", casting_mode, CASTING_MODES)
    check_parameters(x, weight=weight)
    if torch.compiler.is_compiling():  # Inductor fuses the norm with its neighbours
        return reference.rms_norm(x, weight, eps, offset, casting_mode)
    if is_dtensor(x) or is_dtensor(weight):
        options = (eps, offset, casting_mode)
        return on_row_shards(lambda x, weight: rms_norm(x, weight, *options), x, weight)
    plain = weight is not None and weight.dtype == x.dtype and not offset and casting_mode != "none"
    if plain and _FUSED_IN_TORCH and host_bound(x, _SMALL):
        # one rounding at the end in either mode, so at least as exact
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    return _RMSNorm.apply(implementation("rms_norm", x), (eps, offset, casting_mode), x, weight)


def on_row_shards(function: Callable[..., Tensor], x: Tensor, *parameters: Tensor | None) -> Any:
    """`function(x, *parameters)`, which works on each row of x, as a DTensor: each rank computes the rows it holds.

    The parameters are made whole first; their gradients are summed over the ranks that hold different rows.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    like: Any = next(t for t in (x, *parameters) if is_dtensor(t))
    mesh = like.device_mesh
    everywhere: list[Any] = [Replicate()] * mesh.ndim

    def spread(t: Tensor) -> Any:
        return t if is_dtensor(t) else DTensor.from_local(t, mesh, everywhere, run_check=False)

    rows = spread(x)
    grads = [
        Partial() if p.is_shard() and not p.is_shard(x.ndim - 1) else Replicate()
        for p in rows.placements
    ]
    whole = [
        p if p is None else spread(p).redistribute(mesh, everywhere).to_local(grad_placements=grads)
        for p in parameters
    ]
    return on_shards(lambda local: function(local, *whole), rows, shape=x.shape, whole_dims=(-1,))


class _RMSNorm(Op):
    pass


class LigerRMSNormFunction:
    """`apply` in the argument order of the incumbent; `in_place` and `row_mode` are accepted and change nothing."""

    @staticmethod
    def apply(
        X: Tensor,
        W: Tensor | None,
        eps: float,
        offset: float = 0.0,
        casting_mode: str = "llama",
        in_place: bool = True,
        row_mode: bool | None = None,
    ) -> Tensor:
        return rms_norm(X, W, eps, offset, casting_mode)


def rms_norm_forward(
    X: Tensor,
    W: Tensor | None,
    eps: float,
    offset: float,
    casting_mode: str | int,
    row_mode: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
    """(Y, X as rows, rstd, block size, warps, mode code) for `rms_norm_backward`: the Triton kernel without autograd.

    `row_mode` changes nothing. Raises ValueError for an unknown mode, RuntimeError where Triton cannot run.
    """
    mode = mode_name(casting_mode)
    check_last_dim("W", W, X.shape[-1], "X")
    impl = triton_kernels("rms_norm", X)
    y, (rows, _, rstd) = impl.forward(X, W, eps, offset, mode, needs=(True, True))
    config = impl.Config.of(X.shape[-1])
    return y, rows, rstd, config.block, config.warps, CASTING_MODES[mode]


def rms_norm_backward(
    dY: Tensor,
    X: Tensor,
    W: Tensor | None,
    RSTD: Tensor,
    offset: float,
    casting_mode: str | int,
    BLOCK_SIZE: int,
    num_warps: int,
    in_place: bool,
    row_mode: bool | None = None,
    needs_dw: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dX, dW or None), always in fresh memory: `in_place`, `row_mode` and the launch configuration change nothing."""
    needs = (True, W is not None and needs_dw is not False)
    options = (0.0, offset, mode_name(casting_mode))
    return triton_kernels("rms_norm", X).backward((dY,), (as_rows(X), W, RSTD), options, needs)


def mode_name(casting_mode: str | int) -> str:
    """The name of a casting mode given by name or code."""
    check_choice("casting_mode", casting_mode, (*CASTING_MODES, *CASTING_MODES.values()))
    return next(name for name, code in CASTING_MODES.items() if casting_mode in (name, code))


def triton_kernels(op: str, x: Tensor) -> Any:
    """What the incumbent's helpers promise to run; raises RuntimeError where it cannot."""
    with use_implementation("triton"):
        return implementation(op, x)
