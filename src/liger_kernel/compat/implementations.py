"""`liger_kernel.ops.backends.registry`: by what it lists, frameworks find out which implementation has been loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liger_kernel.backends import BACKENDS, IMPLEMENTATIONS

__path__: list[str] = []


@dataclass(frozen=True)
class ImplInfo:
    """`module_path` is among the loaded modules once kernels of the implementation have run."""

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
            implementation.module("rms_norm"),
        )
        for name, implementation in IMPLEMENTATIONS.items()
    }


def __getattr__(name: str) -> Any:
    if name == "IMPL_REGISTRY":
        return _registry()
    if name == "registry":  # this module stands for the package, too
        return sys.modules[__name__]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
