"""The two records that a file of this folder fills in: what a device is like, and who computes on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

MIB = 2**20
#: bytes of shared memory that a program keeps for what it reduces
RESERVED = 8192
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def no_guard(device: torch.device) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


@dataclass(frozen=True)
class ChunkSizes:
    """Rows of a chunk of logits: few enough to bound the slab, enough to keep the matrix products at full speed.

    Measured on an H100, bf16. 256 rows run at 0.72 of the speed of 2048. Each chunk reads and writes the sum of dW
    once; in fp32 that takes as long as 0.4 of its product at 2048 rows, as 0.8 at 1024: 28.2 against 25.6 ms for
    4096x2304x256000, 95.5 against 86.5 for 32768x2048x128256. Without dW, 1024 rows cost 4 % (17.4 against 16.7 ms),
    and its memory is there for a larger slab. Twice as many rows as these limits give are worth 0 to 3 % (6 % at
    H=1024), and another 500 MiB. They give 2048 rows at V=128k to V=256k, and 4096 at V=32k.
    """

    slab_bytes: int = 640 * MIB
    most_rows: int = 4096
    fewest_rows: int = 2048
    fewest_rows_narrow_sum: int = 1024  # where the sum of dW is no wider than the logits
    slab_per_weight: float | None = None  # a slab of at most so many times the bytes of the weight
    multiple: int = 256


@dataclass(frozen=True, eq=False)  # one a device: compared, and hashed, by identity
class DeviceFacts:
    """What host code has to know about a device. Nothing outside this folder asks a tensor where it lives."""

    #: as its maker calls it
    name: str = ""
    #: launch configurations are measured, and chosen, by it: "hopper", "cdna3", ...; "" where there are no kernels
    architecture: str = ""
    #: streaming multiprocessors, compute units, subslices; 2 where kernels are interpreted: partial sums are exercised
    processors: int = 2
    #: bytes that a program may use to load ahead; 0 where loading ahead through it was not measured
    shared_memory: int = 0
    #: programs that may share a row, see `clusters`; 1 where that was not measured
    cluster: int = 1
    #: of one program: 1024 threads
    most_warps: int = 32
    #: the host queues work and runs on: reading a number back waits, and small calls are bound by the host
    queues: bool = False
    #: a few of PyTorch's own operators cost the host less than a node of ours (measured beside Triton's launches)
    small_by_torch: bool = True
    #: matrix products are slow unless the classes of a head are a multiple of this
    product_multiple: int = 1
    #: 16-bit dtypes whose products can be written, and added, unrounded to fp32
    mixed_products: tuple[torch.dtype, ...] = ()
    #: `input_precision` of `tl.dot` with which matrix units multiply fp32 exactly, if short sums alone are left to them
    exact_precision: str = "ieee"
    #: products in fp32 are as fast as those in 16 bits
    wide_products_are_free: bool = False
    #: the torch module with the streams and events on which numbers go to the host beside the work; None: none do
    streams: ModuleType | None = None
    #: the torch module that captures work as graphs; None: there are none
    graphs: ModuleType | None = None
    #: float64 arithmetic is there and no slower than on the CPU
    float64: bool = False
    #: makes the device current for the launches inside
    guard: Callable[[torch.device], AbstractContextManager[object]] = no_guard
    chunks: ChunkSizes = ChunkSizes()

    def stages(self, most: int, tile_bytes: int) -> int:
        """Loads of `tile_bytes` in flight: one in registers, the others as far as they fit into shared memory."""
        return min(most, 1 + max(0, self.shared_memory - RESERVED) // tile_bytes)


@dataclass(frozen=True)
class Implementation:
    """A set of op files, one a line in `LIGER_KERNEL_IMPL`: an op that has no such file runs its reference."""

    name: str
    #: device type -> why these files cannot compute there; None if they can
    unavailable: Callable[[str], str | None]
    #: module of an op
    files: str = "liger_kernel.ops.{op}.{name}"
    #: what makes a faster function of an op's reference, for an implementation without files
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None

    def module(self, op: str) -> str:
        return self.files.format(op=op, name=self.name)


@dataclass(frozen=True)
class Backend:
    """A family of devices: which tensors are its own, what they are like, and which files compute on them."""

    name: str
    device_types: tuple[str, ...]
    #: None: another family has them, and this one computes `on_request` on its devices
    facts: Callable[[torch.device], DeviceFacts] | None
    #: computes without being asked; None: the reference does
    implementation: Implementation | None = None
    #: computes only when LIGER_KERNEL_IMPL or `use_implementation` names it
    on_request: tuple[Implementation, ...] = ()
    #: whether a device type that several families share (AMD's and NVIDIA's "cuda") is this one's
    present: Callable[[], bool] = lambda: True
