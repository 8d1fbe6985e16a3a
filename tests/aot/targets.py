"""GPUs to compile for, as their vendors describe them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

KIB = 1024


@dataclass(frozen=True)
class Target:
    """An instruction set, and the GPU that stands for it.

    `shared_memory`: bytes that one program may have, from NVIDIA's CUDA C++ Programming Guide (technical specifications
    per compute capability: maximum amount of shared memory per thread block) and from LLVM's User Guide for AMDGPU and
    AMD's instruction set manuals (local data share of a work-group). `processors`: streaming multiprocessors,
    compute units, and on RDNA pairs of these, as torch counts them, from the vendor's data sheet.
    """

    name: str
    gpu: str
    processors: int
    shared_memory: int
    warp_size: int = 32
    #: choices of which any that meet in a launch meet in one that is compiled: two for one GPU of each vendor
    meet: int = 1

    @property
    def vendor(self) -> str:
        return "nvidia" if self.name.startswith("sm_") else "amd"

    @property
    def arch(self) -> int | str:
        """As Triton names it."""
        return int(self.name[3:]) if self.vendor == "nvidia" else self.name

    def triton(self) -> Any:
        from triton.backends.compiler import GPUTarget

        backend = {"nvidia": "cuda", "amd": "hip"}[self.vendor]
        return GPUTarget(backend, self.arch, self.warp_size)

    def facts(self) -> Any:
        """The `DeviceFacts` of the library's own record, less what needs the GPU itself."""
        from liger_kernel.backends import amd, nvidia
        from liger_kernel.backends.records import no_guard

        if self.vendor == "nvidia":
            facts = nvidia.described(
                divmod(int(self.arch), 10), self.processors, self.shared_memory
            )
        else:
            facts = amd.described(str(self.arch), self.processors, self.warp_size)
        return replace(facts, streams=None, graphs=None, guard=no_guard)


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100", 108, 163 * KIB),
        Target("sm_86", "A10", 72, 99 * KIB),
        Target("sm_89", "L40S", 142, 99 * KIB),
        Target("sm_90", "H100", 132, 227 * KIB, meet=2),
        Target("sm_100", "B200", 148, 227 * KIB),
        Target("sm_120", "RTX 5090", 170, 99 * KIB),
        Target("gfx90a", "MI250X", 110, 64 * KIB, warp_size=64),
        Target("gfx942", "MI300X", 304, 64 * KIB, warp_size=64, meet=2),
        Target("gfx950", "MI355X", 256, 160 * KIB, warp_size=64),
        Target("gfx1100", "RX 7900 XTX", 48, 64 * KIB),
    )
}
