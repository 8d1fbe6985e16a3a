"""The last linear layer of a language model and its cross entropy in one, without ever holding all logits.

The logits of a chunk of rows go into one reused slab, become their own gradient in place, and are multiplied into the
gradients of the hidden states and of the weight before the next chunk overwrites them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_kernel._core.checks import check_floating, check_last_dim, check_same_device
from liger_kernel.ops.cross_entropy import (
    NONE_RECOMPUTES,
    check_class_indices,
    check_labels,
    check_loss_options,
    only_loss_has_gradient,
    refuse_second_backward,
)
from liger_kernel.ops.cross_entropy.rows import Options, Outputs
from liger_kernel.ops.fused_linear_cross_entropy import compiled, loop
from liger_kernel.ops.fused_linear_cross_entropy.label_count import LabelCount, check_label_count


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    label_count: LabelCount | int | None = None,
) -> Outputs:
    """Cross entropy of `hidden @ weight.T + bias` with memory for one chunk of logits; options as in `cross_entropy`.

    Args:
        hidden: (N, H), any strides. weight: (V, H) in the same dtype. bias: (V,). target: (N,) integer labels.
        class_weight: (V,), the `weight` of `cross_entropy`.
        accum_dtype: of the running sum of the weight's gradient over the chunks. None: the dtype of the weight for up
            to two chunks, at least fp32 for more, which keeps the error that of one chunk.
        use_token_scaling: multiply the loss of a row by its detached probability of the label.
        chunk_size: rows per chunk. memory_budget: bytes of the logits of a chunk; more where two large chunks need less
            memory in all than many small ones and an fp32 sum. Default: `loop.ChunkPolicy`.
        label_count: how many labels are not ignored, or more; rows beyond cost nothing then. `LabelCount(target)` finds
            it without a stall if it is made well before this call. Not needed on the CPU; unused under torch.compile.

    Returns: `(loss, z_loss, token_accuracy, predicted_tokens)` as `cross_entropy`, but loss and z_loss in fp32.
    Under autocast the matrix products run in its dtype; the gradients have the dtypes of their parameters.
    With "mean" and "sum" the gradients of exactly what asks for one are made in forward, and one backward hands them
    out; with "none" backward runs the loop again.
    Raises: as `cross_entropy`; TypeError if hidden and weight differ in dtype; ValueError for a chunk below one row.
    """
    check_tensors(hidden, weight, target, bias, class_weight)
    check_loss_options(label_smoothing, reduction, softcap)
    _check_chunking(chunk_size, memory_budget, accum_dtype)
    check_label_count(label_count, target.numel(), ignore_index)
    settings = loop.Settings(
        Options(
            ignore_index, lse_square_scale, label_smoothing, reduction, softcap, use_token_scaling
        ),
        return_z_loss,
        return_token_accuracy,
        return_predicted_tokens,
        compute_dtype(hidden, weight),
        accum_dtype,
        chunk_size,
        memory_budget,
        label_count,
    )
    if torch.compiler.is_compiling():
        return compiled.call(hidden, weight, bias, target, class_weight, settings)
    if not torch.is_grad_enabled():  # `needs_input_grad` does not know about no_grad
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    return _FusedLinearCrossEntropy.apply(hidden, weight, bias, target, class_weight, settings)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        settings: loop.Settings,
    ) -> Any:
        ctx.recompute = settings.options.reduction == "none"
        needs = ctx.needs_input_grad[:3]
        *outputs, dx, dw, db = fused_linear_cross_entropy_forward(
            hidden,
            weight,
            target,
            class_weight,
            bias,
            settings=settings,
            needs=(False,) * 3 if ctx.recompute else needs,
        )
        only_loss_has_gradient(ctx, outputs)
        if any(needs):
            ctx.settings = settings
            inputs = (hidden, weight, target, class_weight, bias)
            ctx.save_for_backward(*(inputs if ctx.recompute else (dx, dw, db)))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 6
        if ctx.recompute:
            hidden, weight, target, class_weight, bias = ctx.saved_tensors
            found = fused_linear_cross_entropy_forward(
                hidden,
                weight,
                target,
                class_weight,
                bias,
                settings=ctx.settings,
                token_grad_output=grads[0],
                needs=ctx.needs_input_grad[:3],
            )[4:]
        else:
            refuse_second_backward(ctx, "fused_linear_cross_entropy", NONE_RECOMPUTES)
            found = fused_linear_cross_entropy_backward(grads[0], *ctx.saved_tensors)
        return (*found, None, None, None)


def fused_linear_cross_entropy_forward(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    ce_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    ce_impl: str | None = None,
    ce_mode: str | None = None,
    token_grad_output: Tensor | None = None,
    compute_gradients: bool | None = None,
    weight_requires_grad: bool | None = None,
    chunk_mem_const: int = 1,
    *,
    settings: loop.Settings | None = None,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """The four outputs and the gradients of `_input`, `weight` and `bias`; every eager call goes through here.

    The gradients are for an upstream gradient of 1, or of `token_grad_output` (N,) per row, and for what
    `requires_grad` asks, or `compute_gradients` and `weight_requires_grad`. Our own calls give `needs` for the three
    tensors, and `settings` in place of the options before.
    """
    if settings is None:
        _check_legacy(ce_impl, ce_mode)
        settings = loop.Settings(
            Options(
                ignore_index,
                lse_square_scale,
                label_smoothing,
                reduction,
                softcap,
                use_token_scaling,
            ),
            return_z_loss,
            return_token_accuracy,
            return_predicted_tokens,
            compute_dtype(_input, weight),
            accum_dtype,
            None,
            _legacy_budget(_input, weight, chunk_mem_const),
        )
    if needs is None:
        any_needs = compute_gradients is not False
        needs = (
            any_needs and (_input.requires_grad or compute_gradients is True),
            any_needs
            and (weight.requires_grad if weight_requires_grad is None else weight_requires_grad),
            any_needs and bias is not None and (bias.requires_grad or compute_gradients is True),
        )
    check_labels(target, weight.shape[0], settings.options.ignore_index)
    outputs, grads = loop.run(
        _input, weight, bias, target, ce_weight, settings, needs, token_grad_output
    )
    return (*outputs, *grads)


def fused_linear_cross_entropy_backward(
    grad_output: Tensor,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> loop.Gradients:
    """The gradients times the 0-d `grad_output`, in place; on a GPU nothing is touched where it is 1."""
    grads = (grad_input, grad_weight, grad_bias)
    loop.scale_(grads, grad_output)
    return grads


class LigerFusedLinearCrossEntropyFunction:
    """`apply` in the argument order of the incumbent."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        ce_impl: str | None = None,
        ce_mode: str | None = None,
        chunk_mem_const: int = 1,
    ) -> Outputs:
        """A `chunk_mem_const` other than 1 allows the logits of a chunk so many times the bytes of `_input`."""
        _check_legacy(ce_impl, ce_mode)
        return fused_linear_cross_entropy(
            _input,
            weight,
            target,
            bias,
            ce_weight,
            ignore_index,
            lse_square_scale,
            label_smoothing,
            reduction,
            softcap,
            return_z_loss,
            accum_dtype,
            use_token_scaling,
            return_token_accuracy,
            return_predicted_tokens,
            memory_budget=_legacy_budget(_input, weight, chunk_mem_const),
        )


def _legacy_budget(hidden: Tensor, weight: Tensor, chunk_mem_const: int) -> int | None:
    if (
        isinstance(chunk_mem_const, bool)
        or not isinstance(chunk_mem_const, int)
        or chunk_mem_const < 1
    ):
        raise ValueError(f"chunk_mem_const must be a positive integer, got {chunk_mem_const!r}.")
    if chunk_mem_const == 1:
        return None
    return max(chunk_mem_const * hidden.numel(), weight.shape[0]) * hidden.element_size()


def _check_legacy(ce_impl: str | None, ce_mode: str | None) -> None:
    if ce_impl is not None or ce_mode is not None:
        raise ValueError(
            f"ce_impl={ce_impl!r} and ce_mode={ce_mode!r} name implementations of another package; "
            f"pass None and choose with LIGER_KERNEL_IMPL."
        )


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the logits and the matrix products: the one of autocast, else that of hidden and weight."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype}, but weight is {weight.dtype}; convert one with .to(), or use torch.autocast."
        )
    return hidden.dtype


def check_tensors(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None = None,
) -> None:
    check_floating(hidden=hidden, weight=weight, bias=bias, class_weight=class_weight)
    if hidden.ndim != 2 or target.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and target {tuple(target.shape)}, not (N, H) and (N,); "
            f"flatten them with .view(-1, H) and .view(-1)."
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but hidden states are {hidden.shape[1]} wide; "
            f"pass a weight of shape (V, {hidden.shape[1]})."
        )
    check_last_dim("bias", bias, weight.shape[0], "the logits")
    check_last_dim("class_weight", class_weight, weight.shape[0], "the logits")
    check_class_indices(target)
    check_same_device(
        hidden=hidden, weight=weight, target=target, bias=bias, class_weight=class_weight
    )


def _check_chunking(
    chunk_size: int | None, memory_budget: int | None, accum_dtype: torch.dtype | None
) -> None:
    if chunk_size is not None and memory_budget is not None:
        raise ValueError(
            f"chunk_size={chunk_size} and memory_budget={memory_budget} both decide the rows per chunk; pass one."
        )
    for name, value in (("chunk_size", chunk_size), ("memory_budget", memory_budget)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is below 1; pass None for the default.")
    if accum_dtype is not None and not accum_dtype.is_floating_point:
        raise TypeError(f"accum_dtype={accum_dtype} is no floating dtype; pass torch.float32.")
