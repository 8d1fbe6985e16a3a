"""Cross entropy with label smoothing, class weights, soft-capped logits and z-loss (PaLM, arXiv:2204.02311)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op, is_transformed, made_in_forward, refuse_double_backward
from liger_kernel._core.checks import (
    check_choice,
    check_floating,
    check_last_dim,
    check_same_device,
)
from liger_kernel._core.lazy import compat_names
from liger_kernel._core.rows import gradient_scale
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends import can_look
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops import OPS
from liger_kernel.ops.cross_entropy import reference
from liger_kernel.ops.cross_entropy.contract import (
    CrossEntropyOptions,
    CrossEntropyRows,
    Outputs,
    Totals,
)
from liger_kernel.ops.scale_gradients import scale_gradients

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    in_place: bool = False,
) -> Outputs:
    """Cross entropy of (N, V) logits, by default the mean of `logsumexp(z) - z[target]` over the labels that count.

    Args:
        logits: (N, V), any floating dtype, any strides; computed in fp32 and, without `in_place`, left as they are.
        target: (N,) integer labels in [0, V), or `ignore_index`, which may be any integer.
        weight: (V,) class weights, floating.
        lse_square_scale: adds `lse_square_scale * logsumexp^2` to the loss.
        softcap: the logits are `softcap * tanh(logits / softcap)`.
        in_place: the gradient may take the memory of the logits, whose values are lost: nothing may read them
            afterwards, and autograd raises if a backward would. Saves N * V elements.

    Returns: `(loss, z_loss, token_accuracy, predicted_tokens)`; the last three are None without their `return_*` flag.
        loss: in the dtype of the logits; 0-d, or (N,) with reduction "none". z_loss: its part that is the z-loss.
        token_accuracy: fp32, mean over the labels that are not ignored, or (N,). predicted_tokens: (N,) int64, the
        first maximum, -1 where the label is ignored. Only the loss carries a gradient.
    Differs from torch: a mean over nothing but ignored labels is 0, not NaN.
    Raises: ValueError and TypeError for arguments that do not fit, `in_place` with "none" among them; IndexError for a
        label out of range on the CPU. Elsewhere that would cost a synchronisation: such a label gives NaN, in the loss
        and in the gradient.
    """
    check_loss_options(label_smoothing, reduction, softcap)
    check_in_place(in_place, reduction)
    check_floating(logits=logits, weight=weight)
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and target {tuple(target.shape)}, not (N, V) and (N,); "
            f"flatten them with .view(-1, V) and .view(-1)."
        )
    check_last_dim("weight", weight, logits.shape[1], "the logits")
    check_class_indices(target)
    check_same_device(logits=logits, target=target, weight=weight)
    options = _Options(
        ignore_index,
        lse_square_scale,
        label_smoothing,
        reduction,
        softcap,
        return_z_loss,
        return_token_accuracy,
        return_predicted_tokens,
        in_place=in_place,
    )
    target = target.to(torch.int64)
    if not is_transformed():
        check_labels(target, logits.shape[1], ignore_index)
        if not torch.is_grad_enabled():
            logits = logits.detach()  # `needs_input_grad` does not know about no_grad
        target = target.contiguous()
        weight = None if weight is None else weight.contiguous()
    found: Outputs = _dispatch(options, logits, target, weight)
    return found


@dataclass(frozen=True)
class _Options(CrossEntropyOptions):
    in_place: bool = False


class _CrossEntropy(Op):
    """The gradient is made in forward, except with reduction "none", whose backward runs the step again."""

    @staticmethod
    def forward(ctx: Any, impl: Any, options: Any, *tensors: Any) -> Outputs:
        logits, target, weight = tensors
        rows = as_rows(logits)
        needs, recomputes = ctx.needs_input_grad[2], options.reduction == "none"
        totals = Totals.of(target, weight, options)
        grad = scale = None
        if needs and not recomputes:
            if options.in_place and rows.is_contiguous():
                grad = rows.detach()
                # whoever saved the logits for a backward learns that they are gone
                torch.autograd.graph.increment_version(grad)
            else:
                grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            scale = gradient_scale(logits.dtype, totals.divisor(options), logits.device)
        out = _step(impl, (rows, target, weight), totals, options, grad, scale, reports=options)
        loss, z_loss, accuracy, predicted = out.reduced(options, totals)
        rounded = None if z_loss is None else z_loss.to(logits.dtype)
        outputs = (loss.to(logits.dtype), rounded, accuracy, predicted)
        only_loss_has_gradient(ctx, outputs)
        if needs:
            ctx.save_for_backward(*((rows, target, weight) if recomputes else (grad, scale)))
            ctx.of_forward = impl, options
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if grads[0] is None:
            return (None,) * 5
        impl, options = ctx.of_forward
        if options.reduction != "none":
            grad, scale = made_in_forward(ctx)
            scale_gradients([grad], grads[0] if scale is None else grads[0] / scale)
        else:
            rows, target, weight = ctx.saved_tensors
            grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
            totals, nothing = Totals.of(target, weight, options), CrossEntropyOptions()
            _step(impl, (rows, target, weight), totals, options, grad, grads[0], reports=nothing)
        return None, None, grad, None, None


def _step(
    impl: Any,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    totals: Totals,
    options: CrossEntropyOptions,
    grad: Tensor | None,
    scale: Tensor | None,
    reports: CrossEntropyOptions,
) -> CrossEntropyRows:
    """The step for all rows; `scale` of their gradient is 0-d or one per row, `reports` says what is written down."""
    rows, target, _ = tensors
    out = CrossEntropyRows.empty(target, torch.promote_types(rows.dtype, torch.float32), reports)
    row_scale = None if scale is None else scale.expand(rows.shape[0]).contiguous()
    how = {"totals": totals, "options": options, "out": out, "grad": grad, "row_scale": row_scale}
    impl.step(*tensors, **how, padded=False)
    return out


_dispatch = Dispatch(
    "cross_entropy",
    _CrossEntropy,
    reference.cross_entropy,
    shards=no_shards("cross_entropy", "pass logits.full_tensor(), or the rows of this rank"),
)


def only_loss_has_gradient(ctx: Any, outputs: Sequence[Tensor | None]) -> None:
    ctx.mark_non_differentiable(*(o for o in outputs[1:] if o is not None))
    ctx.set_materialize_grads(False)


def check_loss_options(label_smoothing: float, reduction: str, softcap: float | None) -> None:
    check_choice("reduction", reduction, REDUCTIONS)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} is not between 0.0 and 1.0.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} is not above 0.0; pass None for no soft-cap.")


def check_in_place(in_place: bool, reduction: str) -> None:
    if in_place and reduction == "none":
        raise ValueError(
            'in_place=True with reduction="none": its backward reads the logits again, so they cannot be '
            "overwritten. Leave in_place=False, or sum or average the loss here."
        )


def check_class_indices(target: Tensor) -> None:
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target has dtype {target.dtype}; pass class indices of an integer dtype.")


def check_labels(target: Tensor, n_classes: int, ignore_index: int) -> None:
    """IndexError for a label that is no class, where looking costs no synchronisation: on the CPU."""
    if not can_look(target):
        return
    wrong = ((target < 0) | (target >= n_classes)) & (target != ignore_index)
    if wrong.any():
        raise IndexError(
            f"target {int(target[wrong][0])} is out of bounds for {n_classes} classes; "
            f"labels to be skipped must equal ignore_index={ignore_index}."
        )


__getattr__ = compat_names(__name__, OPS["cross_entropy"])
