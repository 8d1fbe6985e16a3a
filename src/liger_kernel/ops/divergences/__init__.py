"""What the losses between two given distributions share: KL divergence, JSD and total variation distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op, made_in_forward, refuse_double_backward
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.dtensor import is_dtensor, on_shards
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops.divergences.contract import DivergenceOptions


class Divergence(Op):
    """The gradient is made in forward, except with reduction "none", whose backward computes it."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        impl, options, needs = ctx.of_forward
        if grads[0] is None:
            return (None,) * (2 + len(needs))
        saved = ctx.saved_tensors if options.reduction == "none" else made_in_forward(ctx)
        return None, None, *impl.backward(grads, saved, options=options, needs=needs)


def on_shards_of_rows(
    run: Callable[..., Any], x: Tensor, y: Tensor, target: Tensor | None, count: Tensor | None
) -> Any:
    """Each rank computes the rows it holds; a loss that is reduced is the sum of what the ranks make of theirs."""
    if count is None:
        count = torch.full((), x.shape[0], device=x.device)
    elif is_dtensor(count):
        whole: Any = count
        count = whole.full_tensor()
    return on_shards(lambda *rows: run(*rows, count), x, y, target, whole_dims=(-1,))


def divergence(
    dispatch: Dispatch, options: DivergenceOptions, target: Tensor | None, **pair: Tensor
) -> Tensor:
    """The op after its checks; `pair`: the distribution that is trained and the fixed one, by the names of the op."""
    (first, x), (second, y) = pair.items()
    check_floating(**pair)
    if x.ndim != 2 or y.shape != x.shape:
        raise ValueError(
            f"{first} has shape {tuple(x.shape)} and {second} {tuple(y.shape)}, not both (N, V); "
            f"flatten them with .view(-1, V)."
        )
    check_same_device(**pair, shift_labels=target)
    count = None
    if target is not None:
        if target.shape != x.shape[:1]:
            raise ValueError(
                f"shift_labels has shape {tuple(target.shape)}, but {first} has {x.shape[0]} rows; "
                f"pass a tensor of shape ({x.shape[0]},)."
            )
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(
                f"shift_labels has dtype {target.dtype}; pass labels of an integer dtype."
            )
        target = target.to(torch.int64)
        if options.reduction in ("batchmean", "mean"):
            count = (target != options.ignore_index).sum()
    if not torch.is_grad_enabled():
        x = x.detach()  # `needs_input_grad` does not know about no_grad
    found: Tensor = dispatch(options, x, y.detach(), target, count)
    return found
