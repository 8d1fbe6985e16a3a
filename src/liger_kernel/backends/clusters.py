"""A row in the registers of several programs, which add up what each finds in its part. Imported by kernel files only.

The programs are a thread block cluster: the hardware starts them together, and they write into each other's shared
memory. So nobody waits for a program that has not begun, no counter has to be zeroed, nothing is atomic, and launches
in a CUDA graph or on several streams have nothing in common. Sums are made in the order of the parts: always the same.

Triton's `num_ctas` deals the first axis of a (PARTS, BLOCK) tile out among the programs, so that reductions along the
second stay within one. Along the first, which Triton 3.6 cannot reduce, numbers travel by the PTX below. Its
interpreter runs no PTX; there one program has the whole tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from liger_kernel._core.shapes import cdiv, next_power_of_2
from liger_kernel.backends.kernels import launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.backends.triton import INTERPRET

#: what the columns of a part, and all strides, must be a multiple of, for whole vectors
VECTOR = 16


@dataclass(frozen=True)
class SharedRow:
    """A row in `parts` of `columns` each, which a program of `warps` holds in a tile of `block`."""

    parts: int
    columns: int
    block: int
    warps: int

    @staticmethod
    @functools.cache
    def of(
        n_cols: int, stride: int, facts: DeviceFacts, block: int, warps: int
    ) -> SharedRow | None:
        """Of rows at multiples of `stride`, in as few parts as fit into blocks of `block`.

        None if the device has no clusters of so many programs, or if rows are no whole vectors.
        """
        parts = next_power_of_2(cdiv(n_cols, block))
        if parts > facts.cluster or n_cols % VECTOR or stride % VECTOR:
            return None
        columns = cdiv(cdiv(n_cols, parts), VECTOR) * VECTOR
        return SharedRow(parts, columns, next_power_of_2(columns), warps)

    def constants(self) -> dict[str, int]:
        """What a kernel is compiled with, for two programs a processor: one loads while the other waits."""
        return {
            "PARTS": self.parts,
            "BLOCK": self.block,
            "num_warps": self.warps,
            "num_ctas": self.parts,
            "maxnreg": 1024 // self.warps,
        }

    def launch(self, kernel: Any, n_rows: int, *args: Any, **constants: Any) -> None:
        """`kernel` with a cluster for each row, and with what it has to know of the parts."""
        launch(kernel, (n_rows,), *args, self.columns, **constants, **self.constants())


@triton.jit
def columns_of_parts(n_cols, n_part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """(PARTS, BLOCK): the columns of a row of which each part has n_part, and which there are."""
    cols = tl.arange(0, BLOCK)[None, :]
    at = tl.arange(0, PARTS)[:, None] * n_part + cols
    return at, (cols < n_part) & (at < n_cols)


if INTERPRET:

    @triton.jit
    def open_box():
        return 0

    @triton.jit
    def sum_of_parts(box, x, PARTS: tl.constexpr):
        return tl.sum(x, 0)

    @triton.jit
    def softmax_of_parts(box, top, total, PARTS: tl.constexpr):
        most = tl.max(top, 0)
        anchor = tl.where(most == float("-inf"), 0.0, most)
        return most, tl.sum(total * tl.exp(top - anchor), 0)

    @triton.jit
    def narrow(x):
        return x

else:
    # Places of 8 bytes for up to 16 parts, then a barrier in shared memory that counts the bytes that have arrived. A
    # barrier of the cluster says that the others have begun and initialised theirs; until `_exchange` waits for it, all
    # load their parts. Its release has nothing to publish but the initialisation: without the fence of everything that
    # the default implies, which costs each warp about a microsecond.
    _OPEN = tl.constexpr("""{
        .shared .align 16 .b8 box[144];
        .reg .pred first;
        .reg .b32 at, thread;
        mov.u32 at, box;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first mbarrier.init.shared::cta.b64 [at+128], 1;
        @first fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.relaxed.aligned;
        mov.u32 $0, at;
    }""")
    # Thread i sends the pair to place `rank` of part i, and those who send to us complete the phase that we wait for.
    # As nobody leaves before all have written to it, none writes into the memory of a program that has gone.
    _EXCHANGE = tl.constexpr("""{
        .reg .pred sends, first, full;
        .reg .b32 thread, place, barrier, there, their_barrier, bytes;
        mov.u32 thread, %tid.x;
        setp.lt.u32 sends, thread, $4;
        setp.eq.u32 first, thread, 0;
        mov.u32 place, %cluster_ctarank;
        mad.lo.u32 place, place, 8, $1;
        add.u32 barrier, $1, 128;
        mul.lo.u32 bytes, $4, 8;
        @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], bytes;
        barrier.cluster.wait.aligned;
        @sends mapa.shared::cluster.u32 there, place, thread;
        @sends mapa.shared::cluster.u32 their_barrier, barrier, thread;
        @sends st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {$2, $3}, [their_barrier];
        again:
        mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 full, [barrier], 0;
        @!full bra again;
        mov.u32 $0, $1;
    }""")

    @triton.jit
    def open_box():
        """Shared memory for one exchange. To be called once, at the start, by every program of the cluster."""
        return tl.inline_asm_elementwise(_OPEN, "=r", [], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def _exchange(box, first, second, PARTS: tl.constexpr):
        """Two numbers of each part, (PARTS,), into the box of each."""
        tl.inline_asm_elementwise(
            _EXCHANGE,
            "=r,r,f,f,r",
            [box, first, second, PARTS],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def _place(box, NUMBER: tl.constexpr):
        return tl.inline_asm_elementwise(
            "ld.shared.f32 $0, [$1];",
            "=f,r",
            [box + 4 * NUMBER],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def sum_of_parts(box, x, PARTS: tl.constexpr):
        """The sum of x (PARTS,)."""
        _exchange(box, x, x, PARTS)
        total = _place(box, 0)
        for part in tl.static_range(1, PARTS):
            total += _place(box, 2 * part)
        return total

    @triton.jit
    def softmax_of_parts(box, top, total, PARTS: tl.constexpr):
        """The largest number of a row, and its sum of exp(x - that), of those of the parts (PARTS,); -inf counts as 0
        in the difference."""
        _exchange(box, top, total, PARTS)
        most = _place(box, 0)
        for part in tl.static_range(1, PARTS):
            most = tl.maximum(most, _place(box, 2 * part))
        anchor = tl.where(most == float("-inf"), 0.0, most)
        total = _place(box, 1) * tl.exp(_place(box, 0) - anchor)
        for part in tl.static_range(1, PARTS):
            total += _place(box, 2 * part + 1) * tl.exp(_place(box, 2 * part) - anchor)
        return most, total

    @triton.jit
    def narrow(x):
        """x, not to be kept in 32 bits where it has 16: the compiler cannot know that it has converted it before."""
        if x.dtype.primitive_bitwidth == 16:
            return tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
            )
        else:
            return x
