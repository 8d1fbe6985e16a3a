"""`liger_kernel.ops.backends.registry`: by what it lists, frameworks find out which implementation has been loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liger_kernel.backends import BACKENDS, IMPLEMENTATIONS

__path__: list[str] = []
LIGER_KERNEL_IMPL_ENV = "LIGER_KERNEL_IMPL"


@dataclass(frozen=True)
class ImplInfo:
    """`module_path` is among the loaded modules once kernels of the implementation have run; "" if it has no files."""

    name: str
    devices: tuple[str, ...]
    default_devices: tuple[str, ...] = ()
    module_path: str = ""


def _registry() -> Mapping[str, ImplInfo]:
    """What `LIGER_KERNEL_IMPL` may name here; backends are registered with `liger_kernel.backends.register`."""

    def devices(name: str, *, by_default: bool) -> tuple[str, ...]:
        offered = (
            (b, [b.implementation, *([] if by_default else b.on_request)])
            for b in BACKENDS.values()
        )
        found = (b.device_types for b, its in offered if name in {i.name for i in its if i})
        return tuple(dict.fromkeys(device for types in found for device in types))

    return {
        name: ImplInfo(
            name,
            devices(name, by_default=False),
            devices(name, by_default=True),
            "" if implementation.compiled else implementation.module("rms_norm"),
        )
        for name, implementation in IMPLEMENTATIONS.items()
    }


def register_impl(info: ImplInfo) -> None:
    """Refused: what one module with replacements of all ops is there has another form here."""
    raise NotImplementedError(
        f"{info.module_path} cannot be registered as a whole: an implementation here is a file per op, registered "
        f"by liger_kernel.backends.register(Backend(...)), as in CONTRIBUTING.md; a function for one op by "
        f"liger_kernel.backends.registry.register_impl."
    )


def select_impl(device: str, explicit: str | None = None) -> ImplInfo | None:
    """What computes on `device`: `explicit`, or what does by itself; None for the reference.

    Raises: RuntimeError if `explicit` is unknown, or not for this device.
    """
    known = _registry()
    if explicit is None:
        return next((info for info in known.values() if device in info.default_devices), None)
    if explicit not in known:
        raise RuntimeError(
            f"Unknown {LIGER_KERNEL_IMPL_ENV}={explicit!r}; known: {', '.join(sorted(known))}."
        )
    if device not in known[explicit].devices:
        raise RuntimeError(
            f"{LIGER_KERNEL_IMPL_ENV}={explicit!r} computes on {', '.join(known[explicit].devices)}, not on {device!r}."
        )
    return known[explicit]


def __getattr__(name: str) -> Any:
    if name == "IMPL_REGISTRY":
        return _registry()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
