"""The one bridge between `torch.autograd` and an implementation of an op.

An implementation is any object that satisfies the op's `contract.py`, most often two pure tensor functions:

    forward(*tensors, options, needs)         -> (outputs, saved)
    backward(grads, saved, options, needs)    -> one gradient (or None) per entry of `tensors`

`outputs` is a tensor or a tuple, `saved` a tuple of tensors and Nones, `options` the op's dataclass. `needs[i]` says
whether `tensors[i]` requires a gradient: what nobody needs is neither saved nor computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def refuse_double_backward() -> None:
    """For the start of a backward: RuntimeError if its own gradient is asked for."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The fused ops have no second derivative (backward ran with create_graph=True); "
            "unpatch the model, or compute this part with plain PyTorch."
        )


class Op(torch.autograd.Function):
    """`apply(implementation, options, *tensors)`: an op on any device. Each op has a subclass, which names its node."""

    @staticmethod
    def forward(ctx: Any, impl: Any, options: Any, *tensors: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[2:]
        outputs, saved = impl.forward(*tensors, options=options, needs=needs)
        if True in needs:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*saved)
            ctx.of_forward = impl, options, needs
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        impl, options, needs = ctx.of_forward
        if all(grad is None for grad in grads):
            return (None,) * (2 + len(needs))
        return None, None, *impl.backward(grads, ctx.saved_tensors, options=options, needs=needs)


class Recompute:
    """Serves a reference, `function(*tensors, **options)`, as an implementation: backward runs it again under autograd.

    It keeps the inputs only, so that no fp32 intermediate outlives the forward.
    """

    def __init__(self, function: Any):
        self.function = function

    def forward(
        self, *tensors: Tensor | None, options: Any, needs: Sequence[bool]
    ) -> tuple[Any, tuple[Tensor | None, ...]]:
        with torch.no_grad():
            outputs = self.function(*tensors, **options.named())
        return outputs, tensors

    def backward(
        self,
        grads: Sequence[Tensor | None],
        saved: Sequence[Tensor | None],
        options: Any,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        return self._again(grads, saved, options, needs)[0]

    def backward_with_output(
        self,
        grad: Tensor,
        saved: Sequence[Tensor | None],
        options: Any,
        needs: Sequence[bool],
        into: Sequence[Tensor | None] | None = None,
    ) -> tuple[tuple[Tensor | None, ...], Tensor]:
        """The gradients, and the one output that the function has; `into` is memory that it may use, and does not."""
        found, (output,) = self._again((grad,), saved, options, needs)
        return found, output.detach()

    def _again(
        self,
        grads: Sequence[Tensor | None],
        saved: Sequence[Tensor | None],
        options: Any,
        needs: Sequence[bool],
    ) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """The gradients and the outputs."""
        tensors = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(saved, needs, strict=True)
        ]
        with torch.enable_grad():
            outputs = self.function(*tensors, **options.named())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grads, strict=True)
            if grad is not None and out is not None and out.requires_grad
        ]
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
        if not pairs:
            return (None,) * len(tensors), outputs
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
            )
        )
        return tuple(next(found) if need else None for need in needs), outputs
