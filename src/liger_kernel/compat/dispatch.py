"""Implementations by name: `liger_kernel.set_impl`, and the registry of the incumbent over our own dispatch.

An implementation is one of ours ("triton", "npu", "reference") or one that the user registered for an op. Ours also
answer to the incumbent's names: "nvidia-triton" is "triton", and "torch" is "reference".
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from liger_kernel import backends
from liger_kernel.backends import REFERENCE
from liger_kernel.backends import dispatch as _dispatch
from liger_kernel.backends.capability import Capability
from liger_kernel.compat import ops as _functions
from liger_kernel.loss_head.fused_linear_cross_entropy import check_implementation
from liger_kernel.ops import COMPUTED_BY
from liger_kernel.utils import infer_device

#: op -> its autograd Function, and the arguments of its call
CALLS = {
    "cross_entropy": (
        "LigerCrossEntropyFunction",
        "input, target, weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction='mean', "
        "softcap=None, return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False",
    ),
    "fused_add_rms_norm": (
        "LigerFusedAddRMSNormFunction",
        "X, R, W, eps=1e-6, offset=0.0, casting_mode='llama', in_place=False",
    ),
    "fused_linear_cross_entropy": (
        "LigerFusedLinearCrossEntropyFunction",
        "_input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, "
        "label_smoothing=0.0, reduction='mean', softcap=None, return_z_loss=False, accum_dtype=None, "
        "use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False",
    ),
    "fused_linear_jsd": (
        "LigerFusedLinearJSDFunction",
        "student_input, student_weight, teacher_input, teacher_weight, shift_labels=None, jsd_beta=0.5, "
        "ignore_index=-100, temperature=1.0",
    ),
    "geglu": ("LigerGELUMulFunction", "a, b"),
    "jsd": ("LigerJSDFunction", "_input, target, shift_labels=None, beta=0.5, ignore_index=-100"),
    "kl_div": (
        "LigerKLDivLossFunction",
        "y_pred, y_true, reduction='batchmean', log_target=False, eps=1e-10",
    ),
    "layer_norm": ("LigerLayerNormFunction", "x, weight, bias=None, eps=1e-6"),
    "rms_norm": (
        "LigerRMSNormFunction",
        "x, weight, eps=1e-6, offset=0.0, casting_mode='llama', in_place=False, row_mode=None",
    ),
    "rope": (
        "LigerRopeFunction",
        "q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None",
    ),
    "softmax": ("LigerSoftmaxFunction", "x"),
    "swiglu": ("LigerSiLUMulFunction", "a, b, gate_multiplier=1.0, down_multiplier=1.0"),
}
#: op here -> the op of ours whose files compute it, where the names differ
_FOLDERS = {"swiglu": "glu", "geglu": "glu", "fused_linear_jsd": "jsd", **COMPUTED_BY}
CALLS = {op: row for op, row in CALLS.items() if hasattr(_functions, row[0])}
#: op of ours whose arguments are the tensors, then the options -> its name here
_FOLLOWS = ("fused_add_rms_norm", "layer_norm", "rms_norm", "softmax")
_ACTIVATIONS = {"silu": "swiglu", "gelu_tanh": "geglu"}
_OTHER_NAMES = {
    "torch": REFERENCE,
    "pytorch": REFERENCE,
    "ascend-triton": "npu",
    **{f"{maker}-triton": "triton" for maker in ("nvidia", "amd", "intel")},
}
_RANKS = {"npu": 10, "triton": 50, REFERENCE: 1000}


class ImplNotAvailableError(RuntimeError):
    """The implementation that was asked for by name is unknown, or cannot compute here."""


class NoImplAvailableError(RuntimeError):
    """Nothing computes this op."""


class LigerImplFallbackWarning(UserWarning):
    """Another implementation computes than the one that was asked for."""


BackendNotAvailableError, NoBackendAvailableError = ImplNotAvailableError, NoImplAvailableError
LigerBackendFallbackWarning = LigerImplFallbackWarning


@dataclass(frozen=True)
class OpImpl:
    """One implementation of one op. Of several that can compute, the one with the lowest `preference_rank` does."""

    op_name: str
    impl_name: str
    capability: Capability = field(default_factory=Capability)
    forward: Callable[..., Any] | None = None
    autograd_function: type | None = None
    modes: tuple[str, ...] = ()
    default_mode: str | None = None
    preference_rank: int = 100
    tolerances: Mapping[Any, Mapping[str, float]] = field(default_factory=dict)
    notes: str = ""

    @property
    def backend(self) -> str:
        return self.impl_name

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """`forward(*args, **kwargs)`; an autograd Function takes no keyword arguments, and `mode` is not for it."""
        if self.autograd_function is not None:
            kwargs.pop("mode", None)
            if kwargs:
                raise TypeError(
                    f"{self.impl_name} of {self.op_name} is an autograd Function: pass {', '.join(kwargs)} by position."
                )
            function: Any = self.autograd_function
            return function.apply(*args)
        if self.forward is None:
            raise RuntimeError(f"{self.impl_name} of {self.op_name} has nothing to call.")
        return self.forward(*args, **kwargs)


_registered: dict[str, dict[str, OpImpl]] = {}
_locations: dict[str, tuple[str, ...]] = {}
_failures: dict[str, tuple[type, str]] = {}
_chosen: str | None = None  # by name, among those that users registered


@functools.cache
def call_of(
    op: str, implementation: str | None = None, *, chooses: bool = False
) -> Callable[..., Any]:
    """Our op by the arguments in `CALLS`, on the tensor's device or by `implementation`; `mode` is None.

    With `chooses`, `impl` and `backend` name an implementation.
    """
    function_name, arguments = CALLS[op]
    function = getattr(_functions, function_name)
    plain = inspect.signature(eval(f"lambda {arguments}: None"))
    names = ("impl", "mode", "backend") if chooses else ("mode",)
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in names]

    def call(*args: Any, **kwargs: Any) -> Any:
        named = {name: kwargs.pop(name, None) for name in names}
        check_implementation(mode=named.pop("mode"))
        if chooses:
            return dispatch(op, *args, **named, **kwargs)
        bound = plain.bind(*args, **kwargs)
        bound.apply_defaults()
        if implementation is None:
            return function.apply(*bound.args)
        with backends.use_implementation(implementation):
            return function.apply(*bound.args)

    call.__name__ = call.__qualname__ = op
    call.__signature__ = plain.replace(parameters=[*plain.parameters.values(), *more])  # type: ignore[attr-defined]
    return call


# --- the registry ---------------------------------------------------------------------------------


def register_impl(
    op_name: str,
    *,
    impl_name: str | None = None,
    capability: Capability | None = None,
    modes: tuple[str, ...] = (),
    default_mode: str | None = None,
    preference_rank: int = 100,
    tolerances: Mapping[Any, Mapping[str, float]] | None = None,
    notes: str = "",
    backend: str | None = None,
) -> Callable[[Any], Any]:
    """Decorate a function, or an autograd Function, that computes `op_name`.

    `dispatch` calls it where it can compute and ranks first, or is asked for. `set_impl(impl_name)` lets our own norms,
    softmax, SwiGLU and GeGLU, and with them the modules and patched models, call it: the tensors, then the options, by
    position.

    Raises: TypeError without a name, or for something that cannot be called.
    """
    name = impl_name or backend
    if not name:
        raise TypeError(f"register_impl({op_name!r}) needs impl_name.")

    def register(found: Any) -> Any:
        if not callable(found):
            raise TypeError(f"{name} of {op_name} cannot be called: {found!r}.")
        autograd = isinstance(found, type) and issubclass(found, torch.autograd.Function)
        how = {"autograd_function": found} if autograd else {"forward": found}
        _registered.setdefault(op_name, {})[name] = OpImpl(
            op_name, name, capability or Capability(), **how, modes=modes, default_mode=default_mode,
            preference_rank=preference_rank, tolerances=tolerances or {}, notes=notes,
        )  # fmt: skip
        _follow()
        return found

    return register


def declare_op_locations(op_name: str, module_paths: tuple[str, ...]) -> None:
    """Modules that register implementations of `op_name`; they are imported when the op is first looked for."""
    _locations[op_name] = tuple(module_paths)


def get_discovery_failures() -> dict[str, tuple[type, str]]:
    """Module that was declared and could not be imported -> type and text of the error."""
    return dict(_failures)


def list_registered(op_name: str) -> tuple[OpImpl, ...]:
    """Ours and the users', the preferred one first."""
    for path in _locations.pop(op_name, ()):
        try:
            importlib.import_module(path)
        except Exception as error:  # whatever a broken package raises
            _failures[path] = type(error), str(error)
    found = [*_ours(op_name), *_registered.get(op_name, {}).values()]
    return tuple(sorted(found, key=lambda impl: impl.preference_rank))


def _ours(op: str) -> Iterator[OpImpl]:
    folder = _FOLDERS.get(op, op)
    for name in (*backends.IMPLEMENTATIONS, REFERENCE) if op in CALLS else ():
        files = backends.IMPLEMENTATIONS.get(name)
        if files is None or backends.is_there(files.module(folder)):
            yield OpImpl(op, name, forward=call_of(op, name), preference_rank=_RANKS.get(name, 100))


def get_registered(op_name: str, backend: str) -> OpImpl | None:
    return next(
        (i for i in list_registered(op_name) if i.impl_name in (backend, _ours_for(backend))), None
    )


def all_registered_ops() -> tuple[str, ...]:
    return tuple(sorted({*CALLS, *_registered, *_locations}))


def all_impls(op_name: str) -> list[str]:
    return [impl.impl_name for impl in list_registered(op_name)]


def available_impls(op_name: str, device: Any = None) -> list[str]:
    """Those that can compute on `device` (default: this machine's), the preferred one first."""
    found = list_registered(op_name)
    return [impl.impl_name for impl in found if _reason(impl, device) is None]


def _reason(impl: OpImpl, device: Any) -> str | None:
    """Why `impl` cannot compute on `device`."""
    if impl.impl_name in _registered.get(impl.op_name, {}):
        return impl.capability.reason_if_unsatisfied(device)
    try:
        backends.implementation_for(torch.device(device or infer_device()).type, impl.impl_name)
    except RuntimeError as refused:
        return str(refused).rstrip(".")
    return None


def clear_available_cache() -> None:
    """Look again at devices and packages."""
    backends.forget()


# --- choices --------------------------------------------------------------------------------------


def _ours_for(name: str) -> str:
    return _OTHER_NAMES.get(name.lower(), name.lower())


def set_impl(name: str | None) -> None:
    """Let `name` compute from now on: "triton", "npu", "torch", or what was registered under it; None: by device.

    Ops that a registered name has no implementation for are computed as before.

    Raises: ImplNotAvailableError for an unknown name. A name of ours that cannot compute a call raises there.
    """
    global _chosen
    users = {known for impls in _registered.values() for known in impls}
    if name is not None and name not in users:
        known = {REFERENCE, "torch", *backends.IMPLEMENTATIONS, *users}
        if _ours_for(name) not in known:
            raise ImplNotAvailableError(
                f"Unknown implementation {name!r}; known: {', '.join(sorted(known))}."
            )
        _chosen, ours = None, _ours_for(name)
    else:
        _chosen, ours = name, None
    backends.set_implementation(ours)
    _follow()


def get_impl() -> str | None:
    """What `set_impl` or `LIGER_KERNEL_IMPL` chose."""
    return _chosen or backends.requested()


def _follow() -> None:
    """Our ops call what was chosen."""
    _dispatch.CHOSEN.clear()
    found = {op: impls[_chosen] for op, impls in _registered.items() if _chosen in impls}
    for op in _FOLLOWS:
        if op in found:
            _dispatch.CHOSEN[op] = lambda options, *tensors, impl=found[op]: impl.call(
                *tensors, *options.named().values()
            )
    gated = {act: found[op] for act, op in _ACTIVATIONS.items() if op in found}

    def glu(options: Any, gate: Tensor, up: Tensor | None) -> Any:
        impl = gated.get(options.activation)
        if impl is None or up is None:
            return NotImplemented
        multipliers = (options.gate_multiplier, options.down_multiplier)
        return impl.call(gate, up, *(multipliers if impl.op_name == "swiglu" else ()))

    if gated:
        _dispatch.CHOSEN["glu"] = glu


def resolve_impl(op_name: str, requested: str | None = None, device: Any = None) -> OpImpl:
    """What computes `op_name` on `device`: `requested`, or what `set_impl` chose, or the preferred one.

    Raises: ImplNotAvailableError if that cannot, NoImplAvailableError if nothing can.
    """
    impls = list_registered(op_name)
    chosen = get_impl()
    wanted = requested or (chosen if chosen and get_registered(op_name, chosen) else None)
    if wanted is None:
        for impl in impls:
            if _reason(impl, device) is None:
                return impl
        raise NoImplAvailableError(
            f"Nothing computes {op_name!r} here; registered: {', '.join(all_impls(op_name)) or 'nothing'}."
        )
    found = get_registered(op_name, wanted)
    reason = f"{op_name} has no such implementation" if found is None else _reason(found, device)
    if found is None or reason is not None:
        raise ImplNotAvailableError(
            f"{wanted!r} cannot compute {op_name}: {reason}. Registered: {', '.join(all_impls(op_name)) or 'nothing'}; "
            f"available: {', '.join(available_impls(op_name, device)) or 'nothing'}."
        )
    return found


def dispatch(
    op_name: str, *args: Any, impl: str | None = None, backend: str | None = None, **kwargs: Any
) -> Any:
    """`op_name` by `impl`, or by what computes it on the device of its first tensor."""
    device = next((a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    found = resolve_impl(op_name, impl or backend, device)
    if not (impl or backend) and found.impl_name not in _registered.get(op_name, {}):
        return call_of(op_name)(*args, **kwargs)  # as our own functions decide
    return found.call(*args, **kwargs)


def emit_fallback_warning(op_name: str, requested: str, actual: str, reason: str) -> None:
    message = f"{op_name} is computed by {actual}, not by {requested}: {reason}."
    warnings.warn(message, LigerImplFallbackWarning, stacklevel=2)


register_op, resolve_backend = register_impl, resolve_impl
all_backends, available_backends, get_backend, set_backend = (
    all_impls,
    available_impls,
    get_impl,
    set_impl,
)


def __getattr__(name: str) -> Any:
    """The forms in `liger_kernel.functional`."""
    if name in CALLS:
        return call_of(name, chooses=True)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
