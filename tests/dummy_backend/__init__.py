"""A backend that implements three ops, as CONTRIBUTING's recipe says; all other ops fall back to their references.

It computes on the CPU, where somebody asks for it by name: `LIGER_KERNEL_IMPL=dummy`, or `use_implementation("dummy")`.
"""

from __future__ import annotations

from liger_kernel import backends
from liger_kernel.backends.records import Backend, Implementation

OPS = ("glu", "relu_squared", "rms_norm")


def unavailable(device_type: str) -> str | None:
    return None if device_type == "cpu" else "the dummy computes on the CPU"


DUMMY = Implementation("dummy", unavailable, files="tests.dummy_backend.{op}")
BACKEND = Backend("dummy", ("cpu",), facts=None, on_request=(DUMMY,))
backends.register(BACKEND)
