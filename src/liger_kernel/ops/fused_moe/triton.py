"""Kernels of a mixture of experts: grouped matrix products over a table of tiles, and what stands between them.

With S = T K rows, forward and backward together do 6 S H (2I + I) FLOPs; beside the weights and their gradients they
move about 30 S H + 30 S I bytes in 16 bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.shapes import cdiv, next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.backends.triton import INTERPRET
from liger_kernel.ops.fused_moe import pipeline
from liger_kernel.ops.fused_moe.contract import MoEOptions
from liger_kernel.ops.fused_moe.kernels import activate, activate_bwd, combine
from liger_kernel.ops.fused_moe.pipeline import LowRank, Routing

# NumPy knows no bf16, in which the interpreter would multiply
_WIDEN = tl.constexpr(INTERPRET)
_OF_WARP = 512  # elements of a pass over memory: two loads of 16 bytes in each thread. Not measured, as all below
_SQUARE, _TABLE = 64, 128  # sides of a tile of `_bias_gradient`; tiles of a step of `_tile_table`


def _pass(n_cols: int, warps: int, most: int) -> dict[str, int]:
    """The tile of a program that goes over memory once; `most` columns leave it some rows, whose indices it shares."""
    cols = min(most, next_power_of_2(n_cols))
    return {"ROWS": warps * _OF_WARP // cols, "COLS": cols, "num_warps": warps}


@dataclass(frozen=True)
class Config:
    """Of a grouped product: a program owns (rows, cols) of the result, and goes over the inner dimension by `inner`.

    `rows` is the same for all products of a device, which share one table of tiles. On an H100 128 x 256 x 64 with 8
    warps was the fastest of 13, at 1024 and 8192 tokens of Qwen3-30B-A3B and at 8192 of Mixtral; in TFLOP/s of the
    first product 155, 480 and 560. PyTorch's products, gathered rows not counted: 150, 460 and 650; its gradients of
    weights 125, 390 and 570 where ours have 80, 210 and 240.

    library_from: rows of an expert, by and large, from which all products of plain weights are PyTorch's; below, their
        gradients are. None: ours compute everything.
    low_rows, low_inner: rows and step of a product onto a low rank, which is bound by memory: of 128 rows it took about
        100 us where 40 would do, at 4096 tokens and rank 16. Not measured.
    """

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    library_from: int | None = None
    low_rows: int = 64
    low_inner: int = 128
    group: int = 8  # tiles of rows whose programs run at a time, and share columns of the weight in the L2 cache

    @staticmethod
    @functools.cache
    def of(facts: DeviceFacts, dtype: torch.dtype, even: bool) -> Config:
        """`even`: all features are multiples of 64. Where they are not, loads are narrow, and their addresses many."""
        if INTERPRET:  # it pays per program, and tests want several
            return Config(16, 32, 32, warps=4, stages=1, low_inner=32)  # tl.dot wants 16
        if dtype.itemsize > 2:
            stages = facts.stages(3, 2**14)  # steps of 128 spill
            return Config(64, 64, inner=32, warps=4, stages=stages, low_inner=32)
        large = facts.architecture in ("hopper", "blackwell", "blackwell_ultra")
        if large and even:
            stages = facts.stages(3, 3 * 2**14)
            return Config(rows=128, cols=256, inner=64, warps=8, stages=stages, library_from=1024)
        cols = 128 if even else 64
        return Config(rows=64, cols=cols, inner=32, warps=4, stages=facts.stages(3, 3 * 2**12))

    @functools.cache  # noqa: B019 (there are few)
    def fitted(self, n_rows: int, n_cols: int) -> Config:
        """For a result of (n_rows, n_cols), which may be narrow, as those of a low rank are."""
        rows, cols = (
            min(most, max(16, next_power_of_2(n)))
            for most, n in ((self.rows, n_rows), (self.cols, n_cols))
        )
        if (rows, cols) == (self.rows, self.cols):
            return self
        return replace(self, rows=rows, cols=min(cols, 128), warps=4)

    @functools.cache  # noqa: B019
    def of_low_rank(self, rank: int) -> Config:
        """Of a product onto a low rank: parts of the rows of a tile."""
        cols = min(self.cols, max(16, next_power_of_2(rank)))
        rows, inner = min(self.rows, self.low_rows), max(self.inner, self.low_inner)
        return replace(self, rows=rows, cols=cols, inner=inner, warps=4)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _inside(at, n, ALIGNED: tl.constexpr):
    """`at` below n, and 0 beyond: what lies outside is read from inside, and not stored.

    ALIGNED: n is a multiple of 8. Vectors lie inside or outside as a whole then, which the compiler does not see; its
    loads of single elements ran at a tenth of the speed.
    """
    inside = tl.where(at < n, at, 0)
    if ALIGNED:
        inside = tl.max_contiguous(tl.multiple_of(inside, 8), 8)
    return inside


@triton.jit
def _tile_table(
    starts_ptr,
    tiles_ptr,
    n_experts,
    n_tiles,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(expert, first row) of every tile of ROWS rows, in order; expert -1 for those that are left.

    A program owns the tiles of an expert, the last one those that are left.
    """
    own = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    start = tl.load(starts_ptr + expert, mask=expert < n_experts, other=0)
    end = tl.load(starts_ptr + expert + 1, mask=expert < n_experts, other=0)
    count = tl.cdiv(end - start, ROWS)
    first = tl.sum(tl.where(expert < own, count, 0))
    last = first + tl.sum(tl.where(expert == own, count, 0))
    row = tl.load(starts_ptr + own)
    if own == n_experts:
        last = n_tiles
        own = -1
    for tile in range(first, last, BLOCK):
        at = tile + tl.arange(0, BLOCK)
        tl.store(tiles_ptr + 2 * at, tl.zeros((BLOCK,), tl.int32) + own, mask=at < last)
        tl.store(tiles_ptr + 2 * at + 1, row + (at - first) * ROWS, mask=at < last)


@triton.jit
def _grouped_product(
    a_ptr,
    weight_ptr,
    bias_ptr,
    low_ptr,
    low_weight_ptr,
    out_ptr,
    slots_ptr,
    starts_ptr,
    tiles_ptr,
    n_tiles,
    n_cols,
    n_inner,
    top_k,
    expert_stride,
    col_stride,
    inner_stride,
    rank,
    low_expert_stride,
    low_col_stride,
    low_inner_stride,
    scale,
    GATHERED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[p, n] = scale sum_m a[p, m] weight[e, n, m] + sum_r low[p, r] low_weight[e, n, r] + bias[e, n].

    With GATHERED a has the rows of tokens. A program owns ROWS rows of one expert and COLS columns. EVEN: n_inner is a
    multiple of INNER. RANK: how far a step over the low rank goes; 0 where there is none. PARTS: of a tile of the
    table, each of ROWS rows; n_tiles counts them.
    """
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(n_cols, COLS)
    first = pid // (GROUP * col_tiles) * GROUP
    size = tl.minimum(n_tiles - first, GROUP)
    within = pid % (GROUP * col_tiles)
    tile = first + within % size
    expert = tl.load(tiles_ptr + 2 * (tile // PARTS)).to(tl.int64)
    if expert < 0:
        return
    first_row = tl.load(tiles_ptr + 2 * (tile // PARTS) + 1).to(tl.int64) + tile % PARTS * ROWS
    end = tl.load(starts_ptr + expert + 1)
    if first_row >= end:
        return
    rows = first_row + tl.arange(0, ROWS)
    live = rows < end
    cols = within // size * COLS + tl.arange(0, COLS)
    source = rows
    if GATHERED:
        source = tl.load(slots_ptr + rows, mask=live, other=0) // top_k
    source = tl.where(live, source, 0)
    inside = _inside(cols, n_cols, ALIGNED).to(tl.int64)
    inner = tl.arange(0, INNER)
    a_ptrs = a_ptr + source[:, None] * n_inner + inner[None, :]
    weight_ptrs = weight_ptr + expert * expert_stride
    weight_ptrs += inside[None, :] * col_stride + inner[:, None].to(tl.int64) * inner_stride
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for at in range(0, n_inner, INNER):
        if EVEN:
            a = tl.load(a_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            left = n_inner - at
            a = tl.load(a_ptrs, mask=inner[None, :] < left, other=0.0)
            weight = tl.load(weight_ptrs, mask=inner[:, None] < left, other=0.0)
        acc = _dot(a, weight, acc, PRECISION)
        a_ptrs += INNER
        weight_ptrs += INNER * inner_stride
    acc *= scale
    if RANK:
        low_rows = tl.where(live, rows, 0)[:, None] * rank
        low_weight_ptr += expert * low_expert_stride + inside[None, :] * low_col_stride
        for at in range(0, rank, RANK):
            r = at + tl.arange(0, RANK)
            low = tl.load(low_ptr + low_rows + r[None, :], mask=r[None, :] < rank, other=0.0)
            beside = low_weight_ptr + r[:, None].to(tl.int64) * low_inner_stride
            beside = tl.load(beside, mask=r[:, None] < rank, other=0.0)
            acc = _dot(low, beside, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * n_cols + inside).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows[:, None] * n_cols + cols[None, :]
    mask = live[:, None] & (cols < n_cols)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_gradient(
    a_ptr,
    b_ptr,
    out_ptr,
    slots_ptr,
    starts_ptr,
    a_cols,
    b_cols,
    top_k,
    GATHERED_A: tl.constexpr,
    GATHERED_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out[e] = sum over the rows p of expert e of a[p]^T b[p]. A program owns (ROWS, COLS) of one expert's."""
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(b_cols, COLS)
    row_tiles = tl.cdiv(a_cols, ROWS)
    expert = (pid // (row_tiles * col_tiles)).to(tl.int64)
    within = pid % (row_tiles * col_tiles)
    rows = within % row_tiles * ROWS + tl.arange(0, ROWS)
    cols = within // row_tiles * COLS + tl.arange(0, COLS)
    a_at = _inside(rows, a_cols, ALIGNED)[None, :]
    b_at = _inside(cols, b_cols, ALIGNED)[None, :]
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for at in range(start, end, INNER):
        row = at + tl.arange(0, INNER).to(tl.int64)
        live = row < end
        a_row = row
        b_row = row
        if GATHERED_A:
            a_row = tl.load(slots_ptr + row, mask=live, other=0) // top_k
        if GATHERED_B:
            b_row = tl.load(slots_ptr + row, mask=live, other=0) // top_k
        a = tl.load(a_ptr + a_row[:, None] * a_cols + a_at, mask=live[:, None], other=0.0)
        b = tl.load(b_ptr + b_row[:, None] * b_cols + b_at, mask=live[:, None], other=0.0)
        acc = _dot(tl.trans(a), b, acc, PRECISION)
    out_ptrs = out_ptr + (expert * a_cols + rows[:, None]) * b_cols + cols[None, :]
    mask = (rows < a_cols)[:, None] & (cols < b_cols)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gradient(
    a_ptr,
    weights_ptr,
    out_ptr,
    slots_ptr,
    starts_ptr,
    n_cols,
    top_k,
    GATHERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[e] = sum over the rows p of expert e of weights[slot of p] a[p]. A program owns COLS columns of one sum."""
    col_tiles = tl.cdiv(n_cols, COLS)
    expert = (tl.program_id(0) // col_tiles).to(tl.int64)
    cols = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for at in range(start, end, ROWS):
        row = at + tl.arange(0, ROWS).to(tl.int64)
        live = row < end
        slot = tl.load(slots_ptr + row, mask=live, other=0)
        source = slot // top_k if GATHERED else row
        mask = live[:, None] & (cols < n_cols)[None, :]
        a = tl.load(a_ptr + source[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
        a = a.to(tl.float32)
        if WEIGHTED:
            a *= tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        total += a
    tl.store(out_ptr + expert * n_cols + cols, tl.sum(total, 0), mask=cols < n_cols)


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _of_activation(options: MoEOptions) -> tuple[tuple[float, ...], dict[str, Any]]:
    """The numbers and the constants of the kernels that activate."""
    limit = 0.0 if options.limit is None else options.limit
    constants = {
        "ACTIVATION": options.activation,
        "GATED": options.gated,
        "INTERLEAVED": options.interleaved,
        "LIMITED": options.limit is not None,
    }
    return (limit, options.alpha, options.up_shift), constants


@dataclass(frozen=True)
class Kernels:
    """`pipeline.Steps`"""

    config: Config

    @staticmethod
    def of(n_rows: int, x: Tensor, *weights: Tensor) -> Kernels:
        even = all(size % 64 == 0 for weight in weights for size in weight.shape[1:])
        config = Config.of(facts_of(x.device), x.dtype, even)
        if config.library_from is None or not _library_serves(x, *weights):
            return Kernels(config)
        many = n_rows >= config.library_from * weights[0].shape[0]
        return (LibraryProducts if many else LibraryGradients)(config)

    def _sizes(self, c: Config) -> dict[str, Any]:
        return {
            "PRECISION": _precision(),
            "ROWS": c.rows,
            "COLS": c.cols,
            "INNER": c.inner,
            "num_warps": c.warps,
            "num_stages": c.stages,
        }

    def tiles(self, starts: Tensor, n_rows: int) -> Tensor:
        n_experts = starts.shape[0] - 1
        n_tiles = cdiv(n_rows, self.config.rows) + n_experts
        tiles = starts.new_empty(n_tiles, 2)
        sizes = {"ROWS": self.config.rows, "EXPERTS": next_power_of_2(n_experts), "BLOCK": _TABLE}
        launch(_tile_table, (n_experts + 1,), starts, tiles, n_experts, n_tiles, **sizes)
        return tiles

    def product(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        gathered: int,
        low: LowRank | None = None,
        scale: float | None = None,
    ) -> Tensor:
        n_cols, n_inner = weight.shape[1:]
        out = a.new_empty(routing.slots.shape[0], n_cols)
        c = self.config.fitted(self.config.rows, n_cols)
        if scale is not None:
            c = self.config.of_low_rank(n_cols)
        parts = self.config.rows // c.rows
        n_tiles = routing.tiles.shape[0] * parts
        rank = 0 if low is None else low[0].shape[1]
        launch(
            _grouped_product,
            (n_tiles * cdiv(n_cols, c.cols),),
            a,
            weight,
            None if bias is None else bias.contiguous(),
            *(low or (None, None)),
            out,
            routing.slots,
            routing.starts,
            routing.tiles,
            n_tiles,
            n_cols,
            n_inner,
            max(1, gathered),
            *weight.stride(),
            rank,
            *(low[1].stride() if low else (0, 0, 0)),
            1.0 if scale is None else float(scale),
            GATHERED=gathered > 0,
            HAS_BIAS=bias is not None,
            PARTS=parts,
            RANK=min(c.inner, max(16, next_power_of_2(rank))) if rank else 0,
            EVEN=n_inner % c.inner == 0,
            ALIGNED=n_cols % 8 == 0,
            GROUP=c.group,
            **self._sizes(c),
        )
        return out

    def weight_gradient(
        self,
        a: Tensor,
        b: Tensor,
        routing: Routing,
        gathered: tuple[int, int],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        n_experts, shape = routing.starts.shape[0] - 1, (a.shape[1], b.shape[1])
        out = a.new_empty(n_experts, *shape, dtype=dtype or a.dtype)
        c = self.config.fitted(*shape)
        launch(
            _weight_gradient,
            (n_experts * cdiv(shape[0], c.rows) * cdiv(shape[1], c.cols),),
            a,
            b,
            out,
            routing.slots,
            routing.starts,
            *shape,
            max(1, *gathered),
            GATHERED_A=gathered[0] > 0,
            GATHERED_B=gathered[1] > 0,
            ALIGNED=shape[0] % 8 == shape[1] % 8 == 0,
            **self._sizes(c),
        )
        return out

    def bias_gradient(
        self, a: Tensor, weights: Tensor | None, routing: Routing, gathered: int
    ) -> Tensor:
        n_experts, n_cols = routing.starts.shape[0] - 1, a.shape[1]
        out = a.new_empty(n_experts, n_cols, dtype=torch.float32)
        launch(
            _bias_gradient,
            (n_experts * cdiv(n_cols, _SQUARE),),
            a,
            weights,
            out,
            routing.slots,
            routing.starts,
            n_cols,
            max(1, gathered),
            GATHERED=gathered > 0,
            WEIGHTED=weights is not None,
            ROWS=_SQUARE,
            COLS=_SQUARE,
            num_warps=4,
        )
        return out

    def activate(self, hidden: Tensor, routing: Routing, options: MoEOptions) -> Tensor:
        n_rows, n_cols = hidden.shape[0], hidden.shape[1] // (1 + options.gated)
        act = hidden.new_empty(n_rows, n_cols)
        numbers, constants = _of_activation(options)
        tile = _pass(n_cols, warps=8, most=1024)
        if n_rows:
            launch(
                activate,
                (cdiv(n_rows, tile["ROWS"]) * cdiv(n_cols, tile["COLS"]),),
                hidden,
                act,
                routing.starts[-1:],
                n_cols,
                *numbers,
                **constants,
                **tile,
            )
        return act

    def activate_backward(
        self,
        da: Tensor,
        hidden: Tensor,
        weights: Tensor,
        routing: Routing,
        options: MoEOptions,
        needs: tuple[bool, bool, bool],
        into: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        needs_dh, needs_act, needs_dw = needs
        n_rows, n_cols = da.shape
        dhidden = None
        if needs_dh:
            dhidden = torch.empty_like(hidden) if into is None else into
        dw = weights.new_zeros(weights.shape, dtype=torch.float32) if needs_dw else None
        numbers, constants = _of_activation(options)
        tile = _pass(n_cols, warps=4, most=512)
        if n_rows and any(needs):
            launch(
                activate_bwd,
                (cdiv(n_rows, tile["ROWS"]),),
                da,
                hidden,
                weights,
                routing.slots,
                dhidden,
                da,
                dw,
                routing.starts[-1:],
                n_cols,
                *numbers,
                NEEDS_DH=needs_dh,
                NEEDS_ACT=needs_act,
                NEEDS_DW=needs_dw,
                **constants,
                **tile,
            )
        return dhidden, da if needs_act else None, dw

    def combine(
        self,
        y: Tensor,
        weights: Tensor | None,
        routing: Routing,
        shape: torch.Size,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        (n_tokens, top_k), n_cols = shape, y.shape[1]
        out = y.new_empty(n_tokens, n_cols, dtype=dtype)
        tile = _pass(n_cols, warps=4, most=2048)
        if n_tokens:
            launch(
                combine,
                (cdiv(n_tokens, tile["ROWS"]) * cdiv(n_cols, tile["COLS"]),),
                y,
                weights,
                routing.rows,
                routing.starts[-1:],
                out,
                n_tokens,
                n_cols,
                TOP_K=top_k,
                WEIGHTED=weights is not None,
                **tile,
            )
        return out


class LibraryGradients(Kernels):
    """With PyTorch's gradients of weights. Its products want bf16, gathered rows, and whole vectors of 16 bytes."""

    def weight_gradient(
        self,
        a: Tensor,
        b: Tensor,
        routing: Routing,
        gathered: tuple[int, int],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if dtype is not None:  # of a low rank
            return super().weight_gradient(a, b, routing, gathered, dtype)
        a, b = (_rows(t, routing, n) for t, n in zip((a, b), gathered, strict=True))
        return _grouped_mm(a.t(), b, routing)


class LibraryProducts(LibraryGradients):
    """With all products of plain weights by PyTorch."""

    def product(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        gathered: int,
        low: LowRank | None = None,
        scale: float | None = None,
    ) -> Tensor:
        # what is added would be added to rounded rows, and rounded again
        if bias is not None or low is not None or scale is not None:
            return super().product(a, weight, bias, routing, gathered, low, scale)
        return _grouped_mm(_rows(a, routing, gathered), weight.mT, routing)


def _rows(a: Tensor, routing: Routing, gathered: int) -> Tensor:
    return a.index_select(0, routing.slots // gathered) if gathered else a


def _grouped_mm(a: Tensor, b: Tensor, routing: Routing) -> Tensor:
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    found: Tensor = function(a, b, offs=routing.starts[1:])
    return found


def _library_serves(x: Tensor, *weights: Tensor) -> bool:
    there = hasattr(torch.nn.functional, "grouped_mm") or hasattr(torch, "_grouped_mm")
    aligned = all(w.is_contiguous() and w.shape[1] % 8 == w.shape[2] % 8 == 0 for w in weights)
    return there and aligned and x.dtype == torch.bfloat16


forward = partial(pipeline.forward, Kernels.of)
backward = partial(pipeline.backward, Kernels.of, False)
backward_over = partial(pipeline.backward, Kernels.of, True)
