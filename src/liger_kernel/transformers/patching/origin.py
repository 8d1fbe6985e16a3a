"""Where logits come from that are not computed yet: one call of a head by its model, not carried out.

Wherever they are asked for, they are made in the modes in which the model called its head: the gradient, inference and
autocast modes. Asked for after the forward, they need the weights that it had.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from liger_kernel._core.autograd import autocast_dtype_of
from liger_kernel.transformers.patching import heads

WAY_OUT = 'Read them before, or ask for logits at once: liger_kernel.patch(model, logits="real").'


class Modes(NamedTuple):
    """What decides how torch computes a matrix product, and whether it records it.

    Of the inference mode its tensors tell; compiled code may not ask for it.
    """

    grad: bool
    device: str
    autocast: torch.dtype | None

    @classmethod
    def now(cls, device: str) -> Modes:
        return cls(torch.is_grad_enabled(), device, autocast_dtype_of(device))

    def dtype_of(self, x: Tensor) -> torch.dtype:
        """Of a product with `x`."""
        return x.dtype if self.autocast is None or x.dtype == torch.float64 else self.autocast

    def on(self, x: Tensor, now: Modes) -> contextlib.AbstractContextManager[Any]:
        """These modes for a product with `x`, in place of those of now."""
        traced = torch.compiler.is_compiling()
        inference = not traced and x.is_inference()
        here = traced or inference == torch.is_inference_mode_enabled()
        if here and self == now:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        if not here:
            stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(self.grad))
        if self.device != "meta":
            on = self.autocast is not None
            stack.enter_context(torch.autocast(self.device, self.autocast, enabled=on))
        return stack


@dataclass(eq=False)
class Origin:
    """One call of a head by its model, not carried out."""

    around: nn.Module  # the outermost callable around the head
    hidden: Tensor
    modes: Modes
    call: Any  # the forward that runs; None once it is over
    classes: int = 0  # of the head
    family: list[Any] = field(
        default_factory=list
    )  # references to what is recorded in this forward
    called: bool = False  # the loss, or logits, were made
    loss: Tensor | None = None  # of compiled code, whose graph it has
    beside: tuple[Tensor, ...] = ()  # the tensors of recorded operations: masks, a bias
    stamp: heads.Stamp | None = None  # of the end of the forward, if logits may be asked for later

    def materialize(self) -> Tensor:
        if self.call is None:
            self._check()
        again, self.called = self.called, True
        value = heads.logits_of(self.around, self.hidden)
        if again and value.requires_grad and heads.runs_once(self.around):
            value = _ValuesOnly.apply(value)
        return value

    def relatives(self) -> list[Any]:
        """What is recorded in this forward and somebody holds, parents first."""
        found = (reference() for reference in self.family)
        return [one for one in found if one is not None] if self.call is not None else []

    def look_around(self) -> bool:
        """Whether gradients are off here and were on at the head: what is made of the logits here has none.

        Raises: RuntimeError inside of an autograd Function.
        """
        off = self.call is not None and self.modes.grad and not torch.is_grad_enabled()
        if off and not torch.compiler.is_compiling():
            _refuse_inside_function()
        return off

    def keep(self, operands: list[Any]) -> None:
        """Logits may be asked for later: note what they come from."""
        self.beside += tuple(x for x in operands if isinstance(x, Tensor))
        self.stamp = self._stamp()

    def _stamp(self) -> heads.Stamp:
        return heads.Stamp(self.around, self.hidden, *self.beside)

    def _check(self) -> None:
        if self.stamp is not None:
            changed = self.stamp != self._stamp()
        else:
            graphs = [
                t for t in (self.hidden, self.loss) if t is not None and t.grad_fn is not None
            ]
            changed = not graphs or not all(map(heads.is_alive, graphs))
        if changed or not heads.is_whole(self.around):
            raise RuntimeError(
                "These logits were fused with the loss, and not computed in the forward. What they come from, the "
                "weight of the head or its input, has changed since or is not whole any more: an optimizer step, a "
                f"cast, a move, sharding, or the backward of compiled code. {WAY_OUT}"
            )


class _ValuesOnly(torch.autograd.Function):
    """FSDP1 reduces the gradient of a unit once: that of its first call, which was the loss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "The head is a unit of FSDP1, which reduces the gradient of one call per step, and that computed the fused "
            "loss: these logits have values and no gradient. Take logits and loss from one call: "
            'liger_kernel.patch(model, logits="real").'
        )


def _refuse_inside_function() -> None:
    """An autograd Function records tensors alone: what it makes of deferred logits would have no gradient."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != f"{__package__}.forward":
        name = _function_of(frame)
        if name is not None:
            raise RuntimeError(
                f"{name}.apply() was given logits that are fused with the loss, and would lose their gradient. "
                "Turn that off: liger_kernel.patch(model, fused_linear_cross_entropy=False)."
            )
        frame = frame.f_back


def _function_of(frame: Any) -> str | None:
    """The autograd Function whose forward runs in this frame; of `apply` there is none since torch 2.14.

    It is known by its ctx, and one whose forward takes none by its code.
    """
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if isinstance(first, FunctionCtx):
        return type(first).__name__.removesuffix("Backward")
    todo = [torch.autograd.Function] if code.co_name == "forward" else []
    for cls in todo:  # which grows
        forward = getattr(vars(cls).get("forward"), "__func__", None)
        if getattr(forward, "__code__", None) is code:
            return cls.__name__
        todo += cls.__subclasses__()
    return None
