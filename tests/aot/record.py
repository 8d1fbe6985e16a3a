"""What the library would launch on a GPU that is not there: every case of every op, on tensors without numbers."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tests.aot.targets import Target

DEVICE = "meta"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Variant:
    """One kernel as Triton compiles it once: all that its own cache distinguishes."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"{self.module.removeprefix('liger_kernel.').removesuffix('.triton')}:{self.kernel}"

    def named(self) -> dict[str, Any]:
        """The constants by the names of their parameters."""
        parameters = [name for name, _ in self.signature]
        return {parameters[path[0]]: value for path, value in self.constants}

    def __str__(self) -> str:
        given = {**self.named(), **dict(self.options)}
        types = [kind for _, kind in self.signature if kind != "constexpr"]
        return f"{self.name}({', '.join(types)}; {', '.join(f'{k}={v}' for k, v in given.items())})"


def pretend(vendor: str) -> None:
    """Make torch that of a vendor, once a process. To be called before the first import of a kernel, which reads it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no GPU that this machine may have
    torch.version.cuda, torch.version.hip = ("12.8", None) if vendor == "nvidia" else (None, "6.4")
    for name in ("mm", "addmm"):
        setattr(torch, name, _without_numbers(getattr(torch, name)))


def _without_numbers(product: Any) -> Any:
    """`product` of meta tensors, for which torch before 2.13 has no `out_dtype`."""

    @functools.wraps(product)
    def shaped(*args: Any, out: Any = None, out_dtype: Any = None, **kwargs: Any) -> Any:
        if out is None:
            out = product(*args, **kwargs)
            out = out if out_dtype is None else out.to(out_dtype)
        return out

    return shaped


def install(target: Target) -> None:
    """Let `target` be the device of meta tensors."""
    from liger_kernel import backends
    from liger_kernel.backends import kernels
    from liger_kernel.backends.records import Backend, Implementation

    kernels.starts_on_meta = True
    facts = target.facts()
    everywhere = Implementation("triton", lambda device_type: None)
    backends.register(Backend("pretended", (DEVICE,), lambda _: facts, implementation=everywhere))


@contextmanager
def recording(target: Target) -> Iterator[list[Variant]]:
    """Kernels launched inside are noted in the list, and not run."""
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(target.triton())
    found: list[Variant] = []

    @functools.cache
    def binder(kernel: Any) -> Any:
        return create_function_from_signature(kernel.signature, kernel.params, backend)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound, specialization, options = binder(self)(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        given = {name: value for name, value in kwargs.items() if name not in signature}
        variant = Variant(
            self.fn.__module__,
            self.fn.__name__,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple((path, tuple(map(tuple, value))) for path, value in attributes.items()),
            tuple(sorted(given.items())),
        )
        found.append(variant)

    original, JITFunction.run = JITFunction.run, run
    try:
        yield found
    finally:
        JITFunction.run = original


@functools.cache
def _draws() -> Any:
    from liger_kernel.testing import Make

    class MetaMake(Make):
        """Shapes, dtypes and strides of the draws of `Make`, without numbers and without memory."""

        def __post_init__(self) -> None:
            pass

        def _draw(self, function: Any, *args: Any) -> Any:
            return function(*args, device=DEVICE)

        def peaked(self, rows: int, classes: int, labels: Any, height: float = 60.0) -> Any:
            return self.randn(rows, classes)

    return MetaMake


def needs(spec: Any, case: Any, inputs: Any) -> Iterator[set[int]]:
    """Every set of inputs that may require a gradient; of a large case, all and none of them.

    Of more than six: sets that have or lack two at most. lora_mlp, with ten, launches no other kernels for the rest.
    """
    from liger_kernel.testing.calls import wanted_inputs

    wanted = sorted(wanted_inputs(spec, case, inputs))
    n = len(wanted)
    sizes = [size for size in range(n + 1) if n <= 6 or size <= 2 or size >= n - 2]
    for size in dict.fromkeys((0, n) if case.large else sizes):
        yield from map(set, itertools.combinations(wanted, size))


def run_case(spec: Any, case: Any, dtype: torch.dtype) -> None:
    """Forward and backward, as the tests call them."""
    from liger_kernel.testing.calls import call, drawn, leaves

    with torch.device(DEVICE):
        inputs, grads = drawn(spec, case, _draws()(dtype, DEVICE))
        for wanted in needs(spec, case, inputs):
            call(spec.function, case.options, leaves(inputs, wanted), grads)


def launches(target: Target, spec: Any, dtype: torch.dtype) -> dict[Variant, str]:
    """What the cases of `spec` launch on `target`: each variant, and the first case that asks for it."""
    from liger_kernel import backends

    install(target)
    found: dict[Variant, str] = {}
    with backends.use_implementation("triton"), recording(target) as launched:
        for case in spec.cases:
            run_case(spec, case, dtype)
            for variant in launched:
                found.setdefault(variant, f"{spec.name}-{case.id}-{str(dtype)[6:]}")
            launched.clear()
    return found


#: kernels that are launched on some targets alone
ONLY_ON = {
    "liger_kernel.ops.fused_moe.kernels:spread": (
        "sm_90",
        "sm_100",
    ),  # where experts take large tiles
    "liger_kernel.ops.softmax.triton:_softmax_shared_bwd": ("sm_90",),  # whose programs share a row
    "liger_kernel.ops.softmax.triton:_softmax_shared_fwd": ("sm_90",),
}


def never_launched(found: Iterable[Variant], target: str) -> list[str]:
    """Functions of the kernel files that are neither a kernel in `found` nor named by another function there.

    Without those that are for other targets.
    """
    from triton.runtime.jit import JITFunction

    modules = {v.module: importlib.import_module(v.module) for v in found}
    functions = {
        (name, function.fn.__name__): function
        for name, module in modules.items()
        for function in vars(module).values()
        if isinstance(function, JITFunction) and function.fn.__module__ == name
    }
    launched = {(v.module, v.kernel) for v in found}
    sources = [(at, function.src) for at, function in functions.items()]
    return sorted(
        f"{module}:{name}"
        for module, name in functions.keys() - launched
        if target in ONLY_ON.get(f"{module}:{name}", (target,))
        and not any(re.search(rf"\b{name}\b", src) for at, src in sources if at != (module, name))
    )
