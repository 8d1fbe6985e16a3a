"""A device "npu" without hardware: PyTorch's PrivateUse1, whose memory is the CPU's and whose kernels are the CPU's.

No compiler is needed. DLPack describes memory by a pointer and a device; a description of CPU memory in which the
device is replaced gives a tensor of PrivateUse1 with real storage, and the other way round. Views, autograd,
`torch.empty`, `module.to("npu")`, `torch.autocast("npu")` and saved tensors then are PyTorch's own code for vendors'
devices: a tensor is a `torch.Tensor` with `device.type == "npu"`.

`register()` is for the whole process and cannot be taken back. What it has not: an allocator (no bare storage can be
made: no `torch.load` onto the device), pinned memory, streams, graphs, a generator of its own, more than one device.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NAME = "npu"
CPU, EXTENSION = 1, 12  # of DLDeviceType

#: autocast runs these in its dtype, and those in float32, as torch_npu does (torch_npu/csrc/aten/AutoCastOps.cpp)
LOWER = ("addmm", "baddbmm", "bmm", "linear", "matmul", "mm", "scaled_dot_product_attention")
WIDER = (
    "cross_entropy_loss",
    "layer_norm",
    "log_softmax.int",
    "nll_loss",
    "pow.Tensor_Scalar",
    "softmax.int",
    "sum",
)
#: that take tensors of the CPU, too
TAKES_CPU = ("copy_", "index", "_index_put_impl_")
#: for which the host waits, and what a copy to it is
READS = {"_local_scalar_dense", "copy_ to the host", "equal", "nonzero"}
#: that torch_npu has no kernel for
UNKNOWN = ("_assert_async",)

#: operators that a kernel computed, so that a test can see them
ran: list[str] = []
_libraries: list[torch.library.Library] = []  # a registration lasts as long as its library


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("index", ctypes.c_int)]


class _Described(ctypes.Structure):  # the start of a DLManagedTensor
    _fields_ = [("data", ctypes.c_void_p), ("device", _Device)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _as_on(t: Tensor, device: int) -> Tensor:
    """The memory of t, as a tensor on another device."""
    capsule = torch._C._to_dlpack(t)
    described = _Described.from_address(_pointer(capsule, b"dltensor"))
    described.device = _Device(device, 0)
    return torch._C._from_dlpack(capsule)


def to_host(t: Tensor) -> Tensor:
    """A CPU tensor with the shape, the strides and the memory of t."""
    return _as_on(t, CPU)


def to_device(t: Tensor) -> Tensor:
    return _as_on(t, EXTENSION)


def _view_of(base: Tensor, host: Tensor, view: Tensor) -> Tensor:
    """The view of `base` that `view` is of `host`."""
    offset = base.storage_offset() + (view.data_ptr() - host.data_ptr()) // host.element_size()
    return torch.ops.aten.alias(base).as_strided_(view.shape, view.stride(), offset)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of every element of lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)(_mapped(function, v) for v in value)
    return function(value)


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """`op` on the CPU, for tensors on the device: what every operator without a kernel of its own runs."""
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE):
        return _computed(op, args, kwargs)


_ABOVE = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutogradPrivateUse1
)


def _computed(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    packet = op._overloadpacket.__name__
    ran.append(packet)
    if packet == "copy_" and args[0].device.type == "cpu":
        ran.append("copy_ to the host")
    if packet in UNKNOWN:
        raise NotImplementedError(f"{op.__name__} has no kernel for {NAME!r}")
    hosts: dict[int, tuple[Tensor, Tensor]] = {}

    def host(value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == NAME:
            if id(value) not in hosts:
                # an empty `out` is resized, which borrowed memory is not
                new = torch.empty(value.shape, dtype=value.dtype) if not value.numel() else None
                hosts[id(value)] = (value, to_host(value) if new is None else new)
            return hosts[id(value)][1]
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        if isinstance(value, Tensor) and value.ndim and packet not in TAKES_CPU:
            raise RuntimeError(f"{op.__name__}: a tensor on {value.device} among those on {NAME}")
        return value

    # PyTorch hands on the number of a scalar form as what it is
    args = tuple(
        torch.tensor(value) if isinstance(value, int | float) and str(a.type) == "Tensor" else value
        for value, a in zip(args, op._schema.arguments, strict=False)
    )
    found = op(*_mapped(host, args), **{name: _mapped(host, v) for name, v in kwargs.items()})
    by_host = {id(h): t for t, h in hosts.values()}
    alias = next((r.alias_info for r in op._schema.returns if r.alias_info is not None), None)
    for t, h in hosts.values():
        if h.shape != t.shape:
            t.data = to_device(h)
    base = args[0] if alias is not None and not alias.is_write else None

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in by_host:
            return by_host[id(value)]
        return to_device(value) if base is None else _view_of(base, host(base), value)

    return _mapped(back, found)


def _as_strided(x: Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> Tensor:
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE):
        return torch.ops.aten.alias(x).as_strided_(size, stride, storage_offset)


def _layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Statistics in float32, whatever the dtype of x; PyTorch's decomposition would be used otherwise."""
    ran.append("native_layer_norm")
    wide = (None if t is None else to_host(t).float() for t in (x, weight, bias))
    host, *parameters = wide
    y, mean, rstd = torch.native_layer_norm(host, shape, *parameters, eps)
    return to_device(y.to(x.dtype)), to_device(mean), to_device(rstd)


def _layer_norm_backward(
    dy: Tensor, x: Tensor, shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any
) -> Any:
    ran.append("native_layer_norm_backward")
    wide = [None if t is None else to_host(t).float() for t in (dy, x, mean, rstd, weight, bias)]
    found = torch.ops.aten.native_layer_norm_backward(*wide[:2], shape, *wide[2:], mask)
    of = (x, weight, bias)
    return tuple(
        None if grad is None else to_device(grad.to(t.dtype))
        for grad, t in zip(found, of, strict=True)
    )


def _convolution(x: Tensor, weight: Tensor, bias: Any, *geometry: Any) -> Any:
    """PyTorch asks a vendor's device for this one by a name of its own."""
    ran.append("convolution")
    host = None if bias is None else to_host(bias)
    return to_device(torch.convolution(to_host(x), to_host(weight), host, *geometry))


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, *geometry: Any) -> Any:
    ran.append("convolution_backward")
    *geometry, mask = geometry
    hosts = [to_host(t) for t in (dy, x, weight)]
    found = torch.ops.aten.convolution_backward(*hosts, [weight.shape[0]], *geometry, mask)
    return tuple(None if grad is None else to_device(grad) for grad in found)


def _autocast(op: Any, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    def cast(*args: Any, **kwargs: Any) -> Any:
        wanted = dtype()

        def converted(value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.device.type == NAME
            fits = fits and value.is_floating_point() and value.dtype != torch.float64
            return value.to(wanted) if fits else value

        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(
                *_mapped(converted, args), **{k: _mapped(converted, v) for k, v in kwargs.items()}
            )

    return cast


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


_deepcopied = Tensor.__deepcopy__


def _deepcopy(self: Tensor, memo: dict[int, Any]) -> Any:
    """PyTorch copies the storage, for which it asks an allocator; the stand-in has none."""
    if self.device.type != NAME or not self.is_leaf:
        return _deepcopied(self, memo)
    if id(self) not in memo:
        memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
    return memo[id(self)]


def _register_with_pytorch() -> None:
    """Answers PyTorch's C++ asks of a device: that there is one, and that there is one only."""
    acc = torch._C._acc

    class Guard(acc.DeviceGuard):  # type: ignore[name-defined, misc]
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    class Hooks(acc.PrivateUse1Hooks):  # type: ignore[name-defined, misc]
        def is_available(self) -> bool:
            return True

        is_built = is_available

        def has_primary_context(self, device_index: int) -> bool:
            return True

    acc.register_python_privateuseone_hook(Hooks())
    acc.register_python_privateuseone_device_guard(Guard())


class _OnDevice:
    """`torch.npu.device`."""

    def __init__(self, device: Any):
        self.device = torch.device(device)

    def __enter__(self) -> None:
        entered.append(self.device)

    def __exit__(self, *raised: object) -> None:
        pass


#: devices that were made current
entered: list[torch.device] = []


def _module() -> ModuleType:
    """`torch.npu`, as far as PyTorch and HuggingFace ask for it."""
    module = ModuleType(f"torch.{NAME}")
    members: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "device": _OnDevice,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=0: torch.get_rng_state(),
        "set_rng_state": lambda state, device=0: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "is_bf16_supported": lambda: True,
        "get_device_name": lambda device=0: "Ascend910B stand-in",
        "get_device_properties": lambda device=0: SimpleNamespace(total_memory=2**36),
        "empty_cache": lambda: None,
    }
    vars(module).update(members)
    return module


def can_register() -> bool:
    """Whether this PyTorch lets a device be registered from Python (2.13 does)."""
    acc = getattr(torch._C, "_acc", None)
    return hasattr(acc, "register_python_privateuseone_device_guard")


@functools.cache
def register() -> None:
    """Give this process a device "npu" and, for `import torch_npu`, the stand-in beside this file."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._register_device_module(NAME, _module())
    _register_with_pytorch()
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_kernel, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    # PyTorch has kernels for any device of these, which would copy, cast or decompose in another way
    for name in ("copy_", "_local_scalar_dense"):
        op = getattr(torch.ops.aten, name).default
        aten.impl(name, functools.partial(_kernel, op), "PrivateUse1")
    aten.impl("as_strided", _as_strided, "PrivateUse1")
    aten.impl("native_layer_norm", _layer_norm, "PrivateUse1")
    aten.impl("native_layer_norm_backward", _layer_norm_backward, "PrivateUse1")
    aten.impl("convolution_overrideable", _convolution, "PrivateUse1")
    aten.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    cast = functools.partial(torch.get_autocast_dtype, NAME)
    for names, dtype in ((LOWER, cast), (WIDER, lambda: torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, _autocast(op, dtype), "AutocastPrivateUse1")
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    Tensor.__deepcopy__ = _deepcopy  # type: ignore[method-assign]
    _libraries.extend((everything, aten, rest))
    sys.path.insert(0, str(Path(__file__).parent / "package"))
