"""Triton building blocks shared by the ops' kernels. Imported by kernel files only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.shapes import cdiv, next_power_of_2
from liger_kernel.backends import device_guard
from liger_kernel.backends.triton import INTERPRET

# A launch through `kernel[grid](...)` costs 30 us of host time on the H100 machine, of which the driver's share is 8.
# `launch` finds the compiled kernel by a cheaper key and calls its launcher. Triton has `knobs` since 3.4; before, the
# launcher took other arguments.
_FAST = not INTERPRET and hasattr(triton, "knobs")
_compiled: dict[Any, tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {}
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_INT32 = 2**31
#: a matrix that copy engines read by tiles; None where Triton has none, or other ones
TensorDescriptor: Any = None
if hasattr(triton, "knobs"):
    from triton.tools.tensor_descriptor import TensorDescriptor
_NO_TENSORS = (type(None), float, bool)

# One instruction, right to 2^-22 of the result or, near 1, of 1. `tl.log2` takes 27, as many as the rest of a loss.
# `exp` is as exact as `tl.exp`, but 0 below 2^-126, for which that takes three more instructions.
if torch.version.cuda and not INTERPRET:
    from triton.language.extra.cuda.libdevice import fast_expf as exp
    from triton.language.extra.cuda.libdevice import fast_log2f as log2
else:

    @triton.jit
    def exp(x):
        return tl.exp(x)

    @triton.jit
    def log2(x):
        return tl.log2(x)


def _hooked() -> bool:
    """Whether somebody, a profiler for one, asked Triton to be told of launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


#: whether kernels are launched on the meta device, too: for who records launches
starts_on_meta = False


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`, faster, on the device of `args[0]`, a tensor.

    `args` are all run-time arguments (tensors, their descriptors, None and numbers), `constants` all others.
    """
    first = args[0]
    if not _FAST or not first.is_cuda or _hooked():
        if first.is_meta and not starts_on_meta:  # on paper, for the memory that goes with it
            return
        with device_guard(first.device):
            kernel[grid](*args, **constants)
        return
    device = first.get_device()
    if device != _current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *args, **constants)
        return
    # What Triton compiles a kernel for: of a pointer the dtype and whether it is aligned, of an integer whether it is
    # 1, a multiple of 16, or wide.
    kinds = [kernel.fn, device, *constants.values()]
    values = list(args)
    add = kinds.append
    for i, arg in enumerate(args):
        kind = type(arg)
        if kind is int:
            add(1 if arg == 1 else (arg & 15 == 0, -_INT32 <= arg < _INT32))
        elif kind in _NO_TENSORS:
            add(kind)
        elif kind is TensorDescriptor:
            add((arg.base.dtype, *arg.block_shape))
        else:
            values[i] = pointer = arg.data_ptr()
            add(arg.dtype if pointer & 15 == 0 else (arg.dtype, 0))
    key = tuple(kinds)
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        # the launcher takes every parameter by position and skips the constant ones
        tail = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        before = (compiled.function, compiled.packed_metadata, None, None, None)  # no hooks
        _compiled[key] = compiled.run, before, tail
        return
    run, before, tail = found
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, _current_stream(device), *before, *values, *tail)


@dataclass(frozen=True)
class RowTile:
    """(rows, block) elements, which a program holds in registers; of a longer row (`looped`), its first block."""

    rows: int
    block: int
    warps: int
    looped: bool

    @staticmethod
    @functools.cache
    def of(
        n_cols: int,
        most_warps: int,
        elements: int,
        longest: int,
        walked: int,
        per_thread: int,
        walked_per_thread: int = 0,
    ) -> RowTile:
        """Of rows up to `longest` as many as make `elements`, of longer ones a block of `walked`.

        `per_thread`: elements in each thread; `walked_per_thread`: of the longer rows, if not as many.
        """
        looped = n_cols > longest
        block = walked if looped else next_power_of_2(n_cols)
        rows = 1 if looped else max(1, elements // block)
        per_thread = (looped and walked_per_thread) or per_thread
        warps = min(most_warps, max(4, rows * block // (32 * per_thread)))
        return RowTile(rows, block, warps, looped)

    def launch(self, kernel: Any, n_rows: int, *args: Any, **constants: Any) -> None:
        """`kernel` with a program for each tile of `n_rows` rows, and with what it has to know of the tile."""
        launch(
            kernel,
            (cdiv(n_rows, self.rows),),
            *args,
            ROWS=self.rows,
            BLOCK=self.block,
            LOOPED=self.looped,
            num_warps=self.warps,
            **constants,
        )


# NumPy knows no bf16, in which the interpreter would multiply
_WIDEN = tl.constexpr(INTERPRET)


@triton.jit
def for_dot(x):
    """x as `tl.dot` takes it."""
    if _WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(for_dot(a), for_dot(b), acc, input_precision=PRECISION)


@triton.jit
def reach_of(rows, n_cols, CAUSAL: tl.constexpr):
    """How many columns each row is over; causal rows are those of (..., n_cols, n_cols)."""
    return (rows % n_cols + 1)[:, None] if CAUSAL else n_cols


@triton.jit
def zero_beyond(y, inside, CAUSAL: tl.constexpr):
    """A row with NaN in it is NaN, but not where it must not look."""
    return tl.where(inside, y, 0.0) if CAUSAL else y


@triton.jit
def _column_sum(
    partial_ptr,
    first_ptr,
    second_ptr,
    n_rows,
    n_cols,
    PAIR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """out[c] = sum_r partial[r, c], rows in a fixed order. Program (c, i) owns BLOCK_COLS columns of sum i."""
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    first_row = tl.program_id(1).to(tl.int64) * n_rows
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, n_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        at = (first_row + rows)[:, None] * n_cols + cols[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    out = tl.sum(total, 0)
    # a bound, since triton 3.9 refuses `vector & scalar`
    mask = cols < tl.where(tl.program_id(1) == 0, n_cols, 0)
    tl.store(first_ptr + cols, out.to(first_ptr.dtype.element_ty), mask=mask)
    if PAIR:
        mask = cols < tl.where(tl.program_id(1) == 1, n_cols, 0)
        tl.store(second_ptr + cols, out.to(second_ptr.dtype.element_ty), mask=mask)


#: rows, columns and warps of a tile: so many rows that one or two loads of a thread wait for all of them. Wide are sums
#: of matrices, of a few rows each. The interpreter pays per program.
_SUMS = (64, 1024, 4) if INTERPRET else (256, 16, 8)
_WIDE_SUMS = (16, 1024, 4) if INTERPRET else (16, 256, 4)


def column_sums(partial: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Deterministic sums over R of an fp32 (K, R, N) tensor, K one or two, each rounded once; one launch."""
    n_sums, n_rows, n_cols = partial.shape
    outs = [partial.new_empty(n_cols, dtype=dtype) for dtype in dtypes]
    block_rows, block_cols, warps = _WIDE_SUMS if n_cols >= 2**16 else _SUMS
    launch(
        _column_sum,
        (cdiv(n_cols, block_cols), n_sums),
        partial,
        outs[0],
        outs[-1],
        n_rows,
        n_cols,
        PAIR=n_sums == 2,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=warps,
    )
    return outs
