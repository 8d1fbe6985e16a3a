"""The head: where it is, what lies around it, and whether the fused loss may take its place in a call.

A model calls whatever lies at the head's path at that moment: a Linear, a unit of FSDP around it, a wrapper of PEFT.
That is the outermost callable, `around` here. It alone is asked for the loss, so that all that lies between runs once.
"""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from liger_kernel._core.autograd import has_numbers
from liger_kernel.transformers.patching import adapters, plans, tensor_parallel
from liger_kernel.transformers.patching.mixins import Mixin, register
from liger_kernel.transformers.patching.state import State, beneath_hooks, has_memory

_LINEAR = nn.Linear.forward
_FUNCTIONAL = {"linear": F.linear, "cross_entropy": F.cross_entropy}
_PLAIN = (Tensor, nn.Parameter)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(getattr(_module, f"_global{name}") for name in _HOOKS)
#: whose hooks gather, move or count, and never change what a module computes
_FRIENDS = (
    "torch.distributed.fsdp.", "torch.distributed._composable.", "torch.distributed._tools.",
    "torch.nn.parallel.", "torch.utils.module_tracker", "deepspeed.", "accelerate.", "peft.",
)  # fmt: skip
_SHARDING = ("torch.distributed.fsdp.", "torch.distributed._composable.")
#: the child that a wrapper calls in its own place; PEFT has one for each state
_WRAPPED = (
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_orig_mod",
    "original_module",
    "modules_to_save",
)


class _Running(threading.local):
    """The forwards of patched models that run in this thread, innermost last."""

    def __init__(self) -> None:
        self.calls: list[Any] = []


running = _Running()


class Intercepted(Mixin):
    """Mixed into the class of what lies around a head: hands on deferred logits while its model is armed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls = running.calls
        if calls and len(args) == 1 and not kwargs and calls[-1].takes(self, args[0]):
            return calls[-1].defer(self, args[0])
        if not isinstance(
            self, Intercepted
        ):  # torch.compile holds this method when the class is gone
            return type(self).__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class FusedHead(Intercepted):
    """Mixed into the class of a Linear onto the vocabulary: computes the loss in place of logits on request."""

    prefix = "Liger"

    def forward(self, hidden: Tensor, request: Any = None) -> Tensor:
        head: Any = self
        if request is None:
            # not `super()`: somebody may hold this method when the class is gone
            return nn.Linear.forward(head, hidden)
        # a DTensor may still be one here: what `request.refused` says makes the caller take these logits
        if not (is_plain(head.weight) and is_plain(hidden)):
            request.refused = f"its weight is a {type(head.weight).__name__} inside of its own call"
            return nn.Linear.forward(head, hidden)
        return request.run(hidden, head.weight, head.bias, request)


@register
class LigerLMHead(FusedHead, nn.Linear):
    """The usual head; a class of its own so that a patched model can be pickled."""


class AdaptedHead(Intercepted):
    """Mixed into the class of PEFT's layer around a head: what its adapters add goes into the loss as two matrices."""

    prefix = "Liger"

    def forward(self, hidden: Tensor, request: Any = None, **kwargs: Any) -> Tensor:
        layer: Any = self
        if request is not None and not kwargs:
            request.low_rank = adapters.low_rank(layer, hidden, _weight(layer.base_layer))
            if request.low_rank is not None:
                found: Tensor = layer.base_layer(hidden, request)
                return found
        if request is not None:
            request.refused = "its adapters do more than to add a product"
        if not isinstance(self, AdaptedHead):  # somebody holds this method, and the class is gone
            return type(layer).forward(layer, hidden, **kwargs)
        return super().forward(hidden, **kwargs)  # type: ignore[misc]


def logits_of(around: Any, hidden: Tensor) -> Tensor:
    """What the model would get from a call, hooks included: ours hands on nothing here."""
    if isinstance(around, Intercepted):
        return super(Intercepted, around).__call__(hidden)  # type: ignore[misc]
    return around(hidden)


def loss_of(around: Any, hidden: Tensor, request: Any) -> Tensor:
    """The one call of this head in a step; a head that was compiled on its own has nothing to compile here.

    What spreads classes over ranks would make whole logits, and does not run.
    """
    if sharded_by(around) is not None:
        found: Tensor = request.run(hidden, around.weight, around.bias, request)
        return found
    return around._modules.get("_orig_mod", around)._call_impl(hidden, request)


def sharded_by(around: nn.Module) -> Any:
    """The process group over whose ranks the classes of a head are spread; None for any other head."""
    if not isinstance(around, nn.Linear) or not computes_linear(around) or around._modules:
        return None
    return tensor_parallel.group_of(around)


# -- what lies around --------------------------------------------------------------------------------------------------


def is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleDict) or any(name in module._modules for name in _WRAPPED)


def parts(around: nn.Module) -> list[nn.Module]:
    """Everything from the outermost callable to the Linears."""
    return list(around.modules()) if around._modules else [around]


def leaves(around: nn.Module) -> list[nn.Module]:
    """The Linears onto the vocabulary; those of adapters are none."""
    thin = _of_adapters(around)
    return [m for m in parts(around) if isinstance(m, nn.Linear) and m not in thin]


def _of_adapters(around: nn.Module) -> set[nn.Module]:
    """What lies in layers of PEFT, but for their base layers."""
    layers = filter(adapters.is_candidate, parts(around)) if around._modules else ()
    children = (c for m in layers for n, c in m._modules.items() if n != "base_layer")
    return {inner for c in children if c is not None for inner in c.modules()}


def is_armed(around: nn.Module) -> bool:
    """False once the patch is taken back, by another thread or by the model's own code."""
    return all(isinstance(leaf, FusedHead) for leaf in leaves(around))


@beneath_hooks
def adopt(around: nn.Module, state: State) -> None:
    """Let `around` hand on deferred logits, and the Linears in it compute the loss."""
    thin = _of_adapters(around)
    for module in parts(around):
        linear = computes_linear(module) and module not in thin
        mixin: Any = FusedHead if linear else Intercepted if module is around else None
        mixin = AdaptedHead if adapters.is_candidate(module) else mixin
        if mixin is not None and not isinstance(module, mixin):
            state.mix(module, mixin)


def runs_once(around: nn.Module) -> bool:
    """FSDP1 reduces the gradient of a unit's first call in a step only."""
    return any("_fsdp_wrapped_module" in module._modules for module in parts(around))


def requires_grad(around: nn.Module, hidden: Tensor) -> bool:
    return hidden.requires_grad or any(p.requires_grad for p in around.parameters())


#: what decides in PEFT's layers which of their tensors compute
_OF_ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")


def drops(around: nn.Module) -> bool:
    """Whether a call of the head draws random numbers, as the dropout of an adapter does."""
    return any(isinstance(m, nn.Dropout) and m.training and m.p for m in parts(around))


class Stamp:
    """What logits come from, at one moment: tells whether it was written to, cast, moved or replaced since.

    Fused optimizers, DeepSpeed and whoever writes into `.data`, as moving averages are set, go past the version counter
    of autograd, so some elements of each row of a weight, and all of a bias, are kept as well.
    """

    def __init__(self, around: nn.Module, *operands: Tensor):
        # of a unit of FSDP1 the flat parameter; where that is the model's, what the Linear has for the time being
        own = [p for m in parts(around) for p in m._parameters.values() if p is not None]
        weights = own or [_weight(leaf) for leaf in leaves(around)]
        self._facts: list[Any] = [_facts(t) for t in (*operands, *weights)]
        self._facts += [copy.copy(m.__dict__.get(n)) for m in parts(around) for n in _OF_ADAPTERS]
        self._facts.append(drops(around))
        kept: list[Tensor] = [t for t in weights if t.is_leaf]
        kept += [t for t in operands if t.is_leaf and t.requires_grad]
        shards = map(_shard, kept)
        self._samples = [_sample(shard) for shard in shards if _can_be_read(shard)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stamp) or self._facts != other._facts:
            return False
        return all(map(torch.equal, self._samples, other._samples))

    __hash__ = None  # type: ignore[assignment]


def _can_be_read(shard: Tensor) -> bool:
    return (
        bool(_pointer(shard)) and has_numbers(shard) and shard.is_contiguous() and has_memory(shard)
    )


def _sample(shard: Tensor) -> Tensor:
    step = max(shard.numel() >> 18, 29) if shard.ndim > 1 else 1
    return shard.detach().as_strided((shard.numel() // step,), (step,)).clone()


def _shard(t: Any) -> Any:
    """The part that is here, of a DTensor and of ZeRO-3."""
    t = getattr(t, "ds_tensor", t)
    return getattr(t, "_local_tensor", t)


def _pointer(shard: Any) -> int:
    """Where it lies; fake tensors, and those within a transform of torch.func, cannot tell."""
    real = type(shard) in _PLAIN and not torch._C._are_functorch_transforms_active()
    return int(shard.data_ptr()) if real else 0


def _facts(t: Any) -> Any:
    shard = _shard(t)
    versions = tuple(None if x.is_inference() else x._version for x in (t, shard))
    return versions, t.dtype, t.device, _pointer(shard)


def is_whole(around: nn.Module) -> bool:
    """Whether a call finds the weight: at its place, or by hooks of this head's own that gather it."""
    modules = parts(around)
    if sharded_by(around) is not None or runs_once(around):
        return True
    if any(m.__dict__[kind] for m in modules for kind in _HOOKS):
        return True
    if any("_hf_hook" in m.__dict__ for m in modules):
        return True
    return all(is_plain(w) and w.ndim == 2 and has_memory(w) for w in map(_weight, leaves(around)))


def is_alive(hidden: Tensor) -> bool:
    """Whether the graph behind the output of compiled code is there, with the weights as they were in it."""
    node = hidden.grad_fn
    while node is not None and not hasattr(type(node), "saved_tensors"):
        node = node.next_functions[0][0] if node.next_functions else None
    try:
        return node is None or node.saved_tensors is not None  # type: ignore[attr-defined]
    except RuntimeError:  # freed by a backward, or written to
        return False


def _weight(head: Any) -> Any:
    """FSDP1 may keep it outside of the table of parameters."""
    return head._parameters.get("weight", head.__dict__.get("weight"))


def computes_linear(module: nn.Module) -> bool:
    forward = getattr(type(module), "forward", None)
    return nn.Linear.forward is _LINEAR and forward in (_LINEAR, FusedHead.forward)


def is_plain(t: Any) -> bool:
    """A tensor that is what it looks like: no DTensor, none of torchao's, and not bitsandbytes'."""
    return type(t) in _PLAIN or isinstance(t, torch._subclasses.FakeTensor)


def obstacle(around: nn.Module) -> str | None:
    """Why the fused loss cannot take the place of this head now; None if it can. Looked at in every call."""
    if isinstance(around, nn.ModuleList):
        return f"{len(around)} heads, whose logits are joined before the loss"
    for name, function in _FUNCTIONAL.items():
        now = getattr(F, name)
        if now is not function and not _home(now).startswith(_FRIENDS):
            return f"{_home(now)} has replaced torch.nn.functional.{name}"
    for hooks in _GLOBAL_HOOKS:
        for hook in hooks.values():
            if not _home(hook).startswith(_FRIENDS):
                return f"a hook of {_home(hook)} on all modules has to see its logits"
    if sharded_by(around) is not None:
        return None
    sharded, thin = False, _of_adapters(around)
    for module in parts(around):
        attributes = module.__dict__
        compiled = "_orig_mod" in attributes["_modules"]
        for kind in _HOOKS:
            for hook in attributes[kind].values():
                home = _home(hook)
                if compiled or not home.startswith(_FRIENDS):
                    return f"a hook of {home} has to see its logits"
                sharded = sharded or home.startswith(_SHARDING)
        if module is not around and (compiled or attributes.get("_compiled_call_impl")):
            return "it is compiled on its own, within something else"
        passed = is_wrapper(module) or module in thin
        reason = None if passed else _unsuitable(module, sharded)
        reason = reason or (None if compiled else _of_its_forward(module))
        if reason is not None:
            return reason
    return None


def _unsuitable(head: nn.Module, sharded: bool) -> str | None:
    if "parametrizations" in head._modules:
        return "its weight is parametrised"
    if adapters.is_candidate(head):
        return _unsuitable_adapters(head)
    if not computes_linear(head):
        if any("lora" in name for name, _ in head.named_parameters()):
            return "an adapter adds to its output"
        return f"{type(head).__name__} does not compute a plain linear map"
    weight = _weight(head)
    if is_plain(weight) or (sharded and type(weight).__name__ == "DTensor"):
        return None
    return f"its weight is a {type(weight).__name__}"


def _unsuitable_adapters(layer: Any) -> str | None:
    """Of PEFT's layer around a head."""
    if torch.compiler.is_compiling():
        return "an adapter adds to its output, in a compiled model"
    if layer._forward_pre_hooks:
        return "a hook chooses the adapters of each row"
    return adapters.obstacle(layer)


def _of_its_forward(module: nn.Module) -> str | None:
    """A `forward` of the instance is somebody's, but for that of accelerate, whose hooks move tensors."""
    attributes = module.__dict__
    own = attributes.get("forward")
    if own is None or getattr(own, "func", None) is plans.call:
        return None
    if "_hf_hook" in attributes and "_old_forward" in attributes:
        own, hook = attributes["_old_forward"], attributes["_hf_hook"]
        for one in getattr(hook, "hooks", (hook,)):
            if not type(one).__module__.startswith(_FRIENDS):
                return f"a hook of {type(one).__module__} has to see its logits"
    if getattr(own, "__func__", None) is not type(module).forward:
        return "its forward was already replaced by someone else"
    return None


def _home(hook: Any) -> str:
    """The module that defines a hook, beneath partials, methods and decorators."""
    while True:
        if isinstance(hook, functools.partial):
            hook = hook.func
        elif hasattr(hook, "__wrapped__"):
            hook = hook.__wrapped__
        elif hasattr(hook, "__func__"):
            hook = hook.__func__
        else:
            break
    return f"{getattr(hook, '__module__', None) or type(hook).__module__}"
