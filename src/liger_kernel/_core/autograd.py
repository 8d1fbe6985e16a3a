"""The one bridge between `torch.autograd` and an implementation of an op.

An implementation is any object that satisfies the op's `contract.py`, most often two pure tensor functions:

    forward(*tensors, options, needs)         -> (outputs, saved)
    backward(grads, saved, options, needs)    -> one gradient (or None) per entry of `tensors`

`outputs` is a tensor or a tuple, `saved` a tuple of tensors and Nones, `options` the op's dataclass. `needs[i]` says
whether `tensors[i]` requires a gradient: what nobody needs is neither saved nor computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionMeta

F = TypeVar("F", bound=Callable[..., Any])

_MAKE_FX = torch._C._TorchDispatchModeKey.PROXY
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_IS_GRADS_BATCHED = torch._C._dispatch_key_parse("VmapMode")


#: whose hooks on saved tensors drop what a node saves, and those that hand it back as it is
_DROP = ("torch.utils.checkpoint",)
_KEEP_NOTHING = (*_DROP, "liger_kernel.transformers.patching.sites.checkpoints")


def in_torch_func() -> bool:
    """Whether a transform of torch.func, or forward-mode AD, is under way; within a compiled graph as outside."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether somebody follows PyTorch's ops one by one, which then have to compute: a kernel would go unseen.

    So do torch.compile, torch.func, forward-mode AD, torch.jit.trace and make_fx.
    """
    return (  # asked ten times a layer: without the calls within torch's and our functions of the same meaning
        torch.compiler.is_dynamo_compiling()
        or torch.compiler._is_compiling_flag
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(_MAKE_FX) is not None
    )


def has_numbers(x: Tensor) -> bool:
    """False for a meta or a fake tensor, which has a shape, a dtype and a device only, and while all ops make those."""
    return type(x) is not FakeTensor and not x.is_meta and not _makes_fakes()


def _makes_fakes() -> bool:
    """`FakeTensorMode(allow_non_fake_inputs=True)` takes real tensors; torch.compile has fakes in the place of all."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch._C._get_dispatch_mode(_FAKE) is not None


def without_grad(function: F) -> F:
    """`torch.no_grad()` as a decorator, which costs nothing within a node, where nothing is recorded anyway."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return called  # type: ignore[return-value]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """In which autocast runs matrix products of x; None where it is off, or leaves x alone, as it does float64."""
    return None if x.dtype == torch.float64 else autocast_dtype_of(x.device.type)


def autocast_dtype_of(device_type: str) -> torch.dtype | None:
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def refuse_double_backward() -> None:
    """For the start of a backward: RuntimeError if its own gradient, or many gradients at once, are asked for."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The fused ops have no second derivative (backward ran with create_graph=True). Take derivatives by "
            "torch.func (grad, jvp, hessian), for which PyTorch's own ops compute; or unpatch the model."
        )
    batched = torch._C._dispatch_tls_is_dispatch_key_included(_IS_GRADS_BATCHED)
    if batched or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "The fused ops take one gradient at a time (backward ran under vmap, as with is_grads_batched=True or "
            "vectorize=True). Run forward within the transform, too, as torch.func does; or call backward in a loop."
        )


def graph_is_kept() -> bool:
    """In a backward: whether another one through the same graph may follow (`retain_graph=True`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def saved_tensors_are_ours() -> bool:
    """Whether nobody holds what a node saves now but the node; checkpointing does, but drops it."""
    hooks = _saved_tensors_hooks()
    return hooks is None or _are_of(_KEEP_NOTHING, hooks)


def observes_saved_tensors() -> bool:
    """Whether somebody has put hooks around what nodes save now, or may have."""
    return _saved_tensors_hooks() is not None


def graph_task() -> int:
    """Of the backward that is under way; -1 where there is none."""
    return int(torch._C._current_graph_task_id())


def is_checkpointed() -> bool:
    """Whether what a node saves now is dropped, or used by a backward that comes at once: checkpoints repeat a forward
    within the backward."""
    hooks = _saved_tensors_hooks()
    if hooks == ():  # the forward could not tell, and its repetition has to keep as many tensors
        return False
    return graph_task() != -1 or _are_of(_DROP, hooks or ())


def _saved_tensors_hooks() -> Any:
    """The innermost pair; None where there is none, () where torch cannot tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top(False) if top is not None else ()


def _are_of(modules: tuple[str, ...], hooks: Sequence[Any]) -> bool:
    return any(h.__module__ in modules for h in hooks[:1])


def made_in_forward(ctx: Any) -> tuple[Tensor | None, ...]:
    """The gradients that a loss made in forward and saved, for its backward to scale in place and hand out.

    Copies where another backward may follow; where not, autograd itself refuses a second one.
    """
    saved: tuple[Tensor | None, ...] = ctx.saved_tensors
    if not graph_is_kept():
        return saved
    return tuple(None if grad is None else grad.clone() for grad in saved)


class OwnApply(FunctionMeta):
    """torch.compile calls `apply` of such a class. For torch's own metaclass it would trace forward and backward."""

    def __init__(cls, name: str, bases: tuple[type, ...], members: Any, **of_class: Any) -> None:
        super().__init__(name, bases, members)  # torch's own takes no keywords of a class statement


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
