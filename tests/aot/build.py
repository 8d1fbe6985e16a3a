"""One kernel, compiled for one GPU and measured by what its compiler says of it."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any

from tests.aot.record import Variant
from tests.aot.targets import Target

#: bytes of a thread that may go to memory for want of registers: of 1024 threads they fill the L1 of the largest GPUs
MOST_SPILLED = 256
#: kernels that may spill more, in rows that are too long for the registers: about as much as on an H100, where other
#: tiles were measured and are slower; a GPU that needs more needs a configuration of its own
SPILLS = {
    "ops.group_norm:_group_norm_bwd": 1352,
    "ops.group_norm:_group_norm_fwd": 276,
    "ops.modulated_rms_norm:_modulated_rms_norm_bwd": 2304,
    "ops.modulated_rms_norm:_modulated_rms_norm_fwd": 640,
    "ops.norms.kernels:_norm_bwd": 2304,
    "ops.poly_norm:_poly_norm_bwd": 308,
    "ops.softmax:_softmax_bwd": 568,
    "ops.sparsemax:_sparsemax_bwd": 868,
    "ops.sparsemax:_sparsemax_fwd": 648,
}
MOST_THREADS = 1024


@dataclass(frozen=True)
class Measured:
    """What a compiled kernel takes; `error` is why there is none."""

    shared_memory: int = 0  # bytes of a program
    threads: int = 0  # of a program
    registers: int = 0  # of a thread
    spilled: int = 0  # bytes of a thread that found no register
    error: str = ""
    foreign: tuple[str, ...] = ()  # instructions that must not be there


#: what no kernel may contain, in PTX or AMD's assembly: pattern -> why
FOREIGN = {
    r"\b(atom|red)\.\w[\w.]*|\b(global|flat|buffer|ds)_(atomic|add|cmpst|max|min)_\w+": "atomics are not deterministic",
    r"\btanh\.approx\.\w+": "off by 2^-11, and only NVIDIA has it",
    r"\b(add|mul|fma|div)\.(\w+\.)?f64|\bv_(add|mul|fma)_f64": "1/64 of the speed on many GPUs",
    r"\bcall(\.uni)?\s*\(|\bs_swappc_b64": "a call was not inlined",
}


def kernel_of(variant: Variant) -> Any:
    return getattr(importlib.import_module(variant.module), variant.kernel)


def sources(kernel: Any, known: dict[str, str] | None = None) -> dict[str, str]:
    """The text of a kernel, and of all functions and constants that it reads, by name; wherever in a file they are."""
    from triton.language import constexpr
    from triton.runtime.jit import JITFunction

    known = {} if known is None else known
    name = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
    if name in known:
        return known
    known[name] = kernel.src
    for word in set(re.findall(r"\w+", kernel.src)):
        value = kernel.fn.__globals__.get(word)
        if isinstance(value, JITFunction):
            sources(value, known)
        elif isinstance(value, constexpr):
            known[f"{name}:{word}"] = repr(value.value)
        elif callable(value):  # a function of a library: which one depends on the vendor
            known[f"{name}:{word}"] = f"{value.__module__}:{getattr(value, '__qualname__', word)}"
    return known


def build(variant: Variant, target: Target) -> Measured:
    """Compile and measure; a compiler's refusal is an `error`, not an exception."""
    from triton import compile, knobs
    from triton.compiler import ASTSource

    folder = tempfile.mkdtemp()
    log = io.StringIO()
    try:
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.disable_line_info = True
        attributes = {path: [list(pair) for pair in found] for path, found in variant.attributes}
        source = ASTSource(
            kernel_of(variant), dict(variant.signature), dict(variant.constants), attributes
        )
        with contextlib.redirect_stdout(log), _quiet():
            compiled = compile(source, target=target.triton(), options=dict(variant.options))
        measure = of_ptx if target.vendor == "nvidia" else of_amdgcn
        return measure(compiled, log.getvalue(), target)
    except Exception as error:
        reason = str(error).strip() or repr(error)
        return Measured(error=f"{type(error).__name__}: {reason[:2000]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Any:
    """LLVM prints the kernel that it refuses: keep the terminal for the report."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(found) for found in re.findall(pattern, text)]


def foreign(assembly: str) -> tuple[str, ...]:
    found = []
    for pattern, why in FOREIGN.items():
        if match := re.search(pattern, assembly):
            found.append(f"{match.group(0)}: {why}")
    return tuple(found)


def of_ptx(compiled: Any, log: str, target: Target) -> Measured:
    """By `ptxas -v`."""
    return Measured(
        shared_memory=compiled.metadata.shared,
        threads=compiled.metadata.num_warps * target.warp_size,
        registers=max(_numbers(r"Used (\d+) registers", log)),
        spilled=max(_numbers(r"(\d+) bytes spill (?:stores|loads)", log)),
        foreign=foreign(compiled.asm["ptx"]),
    )


def of_amdgcn(compiled: Any, log: str, target: Target) -> Measured:
    """By the metadata that LLVM puts at the end of the assembly."""
    assembly = compiled.asm["amdgcn"]

    def of(name: str) -> int:
        return max(_numbers(rf"\.{name}:\s*(\d+)", assembly))

    threads = of("max_flat_workgroup_size")
    assert of("wavefront_size") == target.warp_size, f"wavefront of {of('wavefront_size')}"
    return Measured(
        shared_memory=max(compiled.metadata.shared, of("group_segment_fixed_size")),
        threads=threads,
        registers=of("vgpr_count"),
        # of scalar registers, one a wavefront; they spill to lanes of a vector register first
        spilled=max(of("private_segment_fixed_size"), 4 * of("vgpr_spill_count")),
        foreign=foreign(assembly),
    )


def faults(measured: Measured, kernel: str, target: Target) -> list[str]:
    """Why this would not run, or not well, on `target`."""
    if measured.error:
        return [measured.error]
    found = list(measured.foreign)
    for what, limit in (
        ("shared_memory", target.shared_memory),
        ("threads", MOST_THREADS),
        ("spilled", SPILLS.get(kernel, MOST_SPILLED)),
    ):
        if (value := getattr(measured, what)) > limit:
            found.append(f"{what} {value} > {limit}")
    return found
