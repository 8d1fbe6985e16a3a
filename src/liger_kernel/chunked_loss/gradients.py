"""What the bases share that other projects derive losses from: gradients made in forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.autograd import (
    OwnApply,
    in_torch_func,
    made_in_forward,
    refuse_double_backward,
)
from liger_kernel.ops.scale_gradients import scale_gradients


class GradientsInForward(torch.autograd.Function, metaclass=OwnApply):
    """Gradients are made in forward, only for tensors with `requires_grad=True`, and handed out by backward."""

    @classmethod
    @torch.compiler.disable
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        if in_torch_func():
            raise RuntimeError(
                f"{cls.__name__} makes its gradients in forward, which torch.func and forward-mode AD do not follow. "
                f"Write the loss as a FormulaLoss of liger_kernel.loss_head.row_loss, or call it outside of them."
            )
        return super().apply(*args, **kwargs)

    @staticmethod
    def keep(
        ctx: Any, loss_of: Callable[..., tuple[Tensor, Any]], *given: Tensor | None
    ) -> tuple[Tensor, Any]:
        """`loss_of(*given)`, a loss and what is returned beside it; the gradients of `given` are kept in `ctx`.

        Raises: ValueError if the loss reads anything else that requires a gradient, which it would not get.
        """
        leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in given]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        with torch.enable_grad():
            loss, beside = loss_of(*leaves)
        other = _leaf_of(loss, beside=wanted)
        if other is not None:
            raise ValueError(
                f"The loss reads a tensor of shape {tuple(other.shape)} that requires a gradient, which "
                f"it would not get here: only _input, weight and bias do. Pass it detached, or write the loss as a "
                f"FormulaLoss of liger_kernel.loss_head.row_loss."
            )
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ())
        ctx.save_for_backward(
            *(next(found) if t is not None and t.requires_grad else None for t in leaves)
        )
        return loss.detach(), beside

    @staticmethod
    def handed_out(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that forward saved in `ctx`, times the gradient that arrives in backward."""
        refuse_double_backward()
        grads = made_in_forward(ctx)
        scale_gradients(grads, grad_output)
        return grads


def _leaf_of(loss: Tensor, beside: list[Tensor]) -> Tensor | None:
    """A leaf of the graph of `loss` that is not among these."""
    nodes: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is t for t in beside):
            return leaf
        nodes += [following for following, _ in node.next_functions]
    return None
