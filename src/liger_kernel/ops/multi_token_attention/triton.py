"""Kernels of the causal convolution: a product of the weight (O, K) and the neighbourhoods (K, positions) of the
positions, K = C / groups * kH * kW, which are gathered from x and never stored.

What lies right of the diagonal is neither read nor multiplied. Of n elements of x and of y, forward reads n / 2 and
writes n; backward reads n / 2 of dy and of x, and writes n of dx. A neighbourhood is read kH * kW times, from the L1
cache all but once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_kernel._core.contract import Grads, Needs, Saved
from liger_kernel._core.shapes import cdiv, in_dtype, next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import column_sums, dot, launch
from liger_kernel.backends.triton import INTERPRET
from liger_kernel.ops.multi_token_attention.contract import MultiTokenAttentionOptions
from liger_kernel.ops.softmax import triton as softmax
from liger_kernel.ops.softmax.contract import SoftmaxOptions
from liger_kernel.ops.sparsemax import triton as sparsemax
from liger_kernel.ops.sparsemax.contract import SparsemaxOptions


@dataclass(frozen=True)
class Tile:
    """`rows` x `cols` positions, and `inner` elements of their neighbourhoods at a time."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int = 2


# the interpreter's time is that of its steps, whatever a step holds
CONVOLVE = WEIGH = Tile(16, 32, 64, warps=4) if INTERPRET else Tile(1, 128, 16, warps=4)
# where the outputs of a position are many bytes, 128 positions spill up to 5.7 KB a thread; on Ampere 0.3 KB anyway
CONVOLVE_HEAVY = CONVOLVE if INTERPRET else Tile(1, 64, 16, warps=4)
WEIGH_HEAVY = WEIGH if INTERPRET else Tile(1, 32, 16, warps=4)
#: programs of the gradient of the weight
PROGRAMS = 1056


@triton.jit
def _elements(step, planes, KERNEL: tl.constexpr, INNER: tl.constexpr):
    """Of a step, INNER elements of a neighbourhood: their planes, their taps, and which there are."""
    k = step * INNER + tl.arange(0, INNER)
    plane = k // KERNEL
    return plane, k % KERNEL, plane < planes


@triton.jit
def _gather(
    x_ptr,
    n,
    rows,
    cols,
    plane,
    tap,
    there,
    TRANSPOSED: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ABOVE: tl.constexpr,
    BEFORE: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
):
    """(elements, positions) of planes of n x n: where a tap of the convolution meets the position, or, if TRANSPOSED,
    the output to which it carries the position."""
    down = (tap // KW * DILATION_H)[:, None]
    along = (tap % KW * DILATION_W)[:, None]
    if TRANSPOSED:
        row = rows[None, :] + (ABOVE - down)
        col = cols[None, :] + (BEFORE - along)
        met = (row >= 0) & (col >= 0) & (row % STRIDE_H == 0) & (col % STRIDE_W == 0)
        row = row // STRIDE_H
        col = col // STRIDE_W
    else:
        row = rows[None, :] * STRIDE_H + (down - ABOVE)
        col = cols[None, :] * STRIDE_W + (along - BEFORE)
        met = (row >= 0) & (col >= 0)
    met = met & (row < n) & (col <= row)
    first = x_ptr + plane.to(tl.int64)[:, None] * n * n
    return tl.load(first + (row.to(tl.int64) * n + col), mask=there[:, None] & met, other=0.0)


@triton.jit
def _convolve(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    n_x,
    n_y,
    planes_x,
    planes_y,
    HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ABOVE: tl.constexpr,
    BEFORE: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """y[o, i, j] = bias[o] + sum_k w[o, k] x[neighbour k of (i, j)] for j <= i, and 0 beyond; TRANSPOSED: its gradient
    dx of dy. One program owns ROWS x COLS positions of OUTS planes of y; planes_x and planes_y are those of a group.
    """
    across = tl.cdiv(n_y, COLS)
    down = tl.cdiv(n_y, ROWS)
    outs_blocks = tl.cdiv(planes_y, OUTS)
    tile = tl.program_id(0) % (across * down)
    rest = tl.program_id(0) // (across * down)
    outs = rest % outs_blocks * OUTS + tl.arange(0, OUTS)
    image = (rest // outs_blocks).to(tl.int64)  # of a group of a batch
    group = rest // outs_blocks % GROUPS
    at = tl.arange(0, ROWS * COLS)
    first_row = tile // across * ROWS
    first_col = tile % across * COLS
    rows = first_row + at // COLS
    cols = first_col + at % COLS
    out_mask = outs < planes_y
    n_k = planes_x * KERNEL
    acc = tl.zeros((OUTS, ROWS * COLS), tl.float32)
    if first_col < first_row + ROWS:
        x_ptr += image * planes_x * n_x * n_x
        # of the weight (planes out, planes in, taps)
        w_ptr += group * planes_x * planes_y * (KERNEL)
        for step in range(0, tl.cdiv(n_k, INNER)):
            plane, tap, there = _elements(step, planes_x, KERNEL, INNER)
            x = _gather(
                x_ptr, n_x, rows, cols, plane, tap, there, TRANSPOSED,
                KW, STRIDE_H, STRIDE_W, ABOVE, BEFORE, DILATION_H, DILATION_W,
            )  # fmt: skip
            if TRANSPOSED:
                w_at = outs[:, None] * KERNEL + (plane * (planes_y * KERNEL) + tap)[None, :]
            else:
                w_at = outs[:, None] * n_k + (plane * KERNEL + tap)[None, :]
            w = tl.load(w_ptr + w_at, mask=out_mask[:, None] & there[None, :], other=0.0)
            acc = dot(w, x, acc, PRECISION)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + group * planes_y + outs, mask=out_mask, other=0.0)
            acc += bias.to(tl.float32)[:, None]
    acc = tl.where((cols <= rows)[None, :], acc, 0.0)
    plane = (image * planes_y + outs) * n_y * n_y
    y_at = y_ptr + plane[:, None] + (rows.to(tl.int64) * n_y + cols)[None, :]
    inside = out_mask[:, None] & ((rows < n_y) & (cols < n_y))[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weigh(
    dy_ptr,
    x_ptr,
    dw_ptr,
    dbias_ptr,
    n_x,
    n_y,
    planes_x,
    planes_y,
    n_tiles,
    n_parts,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ABOVE: tl.constexpr,
    BEFORE: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """dw[o, k] = sum of dy[o, i, j] x[neighbour k of (i, j)] over images and j <= i; dbias[o] = sum of dy[o, i, j].

    One program owns a step of columns k of OUTS rows of dw of a group, and part of the rows i, from both ends of an
    image in turns: a late one is long. Tensor cores cut off what they add: the sums of four tiles are added in fp32.
    """
    n_k = planes_x * KERNEL
    steps = tl.cdiv(n_k, INNER)
    out_blocks = tl.cdiv(planes_y, OUTS)
    block = tl.program_id(0) // n_parts
    part = tl.program_id(0) % n_parts
    step = block % steps
    plane, tap, element = _elements(step, planes_x, KERNEL, INNER)
    outs = block // steps % out_blocks * OUTS + tl.arange(0, OUTS)
    group = block // (steps * out_blocks)
    at = tl.arange(0, ROWS * COLS)
    out_mask = outs < planes_y
    dw = tl.zeros((OUTS, INNER), tl.float32)
    dbias = tl.zeros((OUTS, ROWS * COLS), tl.float32)
    down = tl.cdiv(n_y, ROWS)
    for tile in range(
        (part.to(tl.int64) * n_tiles // n_parts).to(tl.int32),
        ((part + 1).to(tl.int64) * n_tiles // n_parts).to(tl.int32),
    ):
        image = (tile // down).to(tl.int64) * GROUPS + group
        turn = tile % down
        first_row = tl.where(turn % 2 == 0, turn // 2, down - 1 - turn // 2) * ROWS
        rows = first_row + at // COLS
        end = tl.minimum(first_row + ROWS, n_y)
        dy_at = dy_ptr + ((image * planes_y + outs) * n_y * n_y)[:, None]
        x_at = x_ptr + image * planes_x * n_x * n_x
        for first in range(0, end, 4 * COLS):
            short = tl.zeros((OUTS, INNER), tl.float32)
            for first_col in range(first, tl.minimum(first + 4 * COLS, end), COLS):
                cols = first_col + at % COLS
                there = out_mask[:, None] & ((rows < n_y) & (cols <= rows))[None, :]
                dy = tl.load(
                    dy_at + (rows.to(tl.int64) * n_y + cols)[None, :], mask=there, other=0.0
                )
                x = _gather(
                    x_at, n_x, rows, cols, plane, tap, element, False,
                    KW, STRIDE_H, STRIDE_W, ABOVE, BEFORE, DILATION_H, DILATION_W,
                )  # fmt: skip
                short = dot(dy, tl.trans(x), short, PRECISION)
                if HAS_BIAS:
                    dbias += dy.to(tl.float32)
            dw += short
    n_outs = GROUPS * planes_y
    row = part.to(tl.int64) * n_outs + group * planes_y + outs
    at = row[:, None] * n_k + (plane * KERNEL + tap)[None, :]
    tl.store(dw_ptr + at, dw, mask=out_mask[:, None] & element[None, :])
    if HAS_BIAS:  # noqa: SIM102 - one is constexpr
        if step == 0:  # no part of the mask: the interpreter of triton 3.9 takes no block & scalar
            tl.store(dbias_ptr + row, tl.sum(dbias, 1), mask=out_mask)


def forward(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    options: MultiTokenAttentionOptions,
    needs: Needs,
) -> tuple[Tensor, Saved]:
    kernels, how = _weights_by(options)
    weights, saved = kernels.forward(scores, options=how, needs=needs[:1])
    x, weight = in_dtype(weights, weight.dtype), weight.contiguous()
    (_, rows), (_, cols) = options.geometry(scores.shape[-1], (weight.shape[2], weight.shape[3]))
    y = x.new_empty(x.shape[0], weight.shape[0], rows, cols)
    if y.numel():
        _convolve_into(y, x, weight, bias, options, transposed=False)
    return y, (x, weight, bias, *saved)


def backward(grads: Any, saved: Any, *, options: MultiTokenAttentionOptions, needs: Needs) -> Grads:
    (dy,), (x, weight, bias, *of_scores) = grads, saved
    dy = dy.contiguous()
    dscores = None
    if needs[0]:
        dx = torch.empty_like(x)
        if dx.numel():
            _convolve_into(dx, dy, weight, None, options, transposed=True)
        kernels, how = _weights_by(options)
        dx = in_dtype(dx, of_scores[0].dtype)
        (dscores,) = kernels.backward((dx,), of_scores, options=how, needs=needs[:1])
    if not any(needs[1:]):
        return dscores, None, None
    dw, dbias = _gradient_of_weight(dy, x, weight, bias, options)
    return dscores, dw if needs[1] else None, dbias if needs[2] else None


def _weights_by(options: MultiTokenAttentionOptions) -> tuple[Any, Any]:
    """The kernels that make weights of scores, and their options."""
    if options.sparse:
        return sparsemax, SparsemaxOptions(causal=True)
    return softmax, SoftmaxOptions(causal=True)


def _convolve_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: MultiTokenAttentionOptions,
    transposed: bool,
) -> None:
    groups = options.groups
    planes_x, planes_y = x.shape[1] // groups, y.shape[1] // groups
    outs = _outs(planes_y)
    tile = CONVOLVE if outs * x.element_size() <= 128 else CONVOLVE_HEAVY
    n = y.shape[-1]
    tiles = cdiv(n, tile.rows) * cdiv(n, tile.cols)
    launch(
        _convolve,
        (tiles * cdiv(planes_y, outs) * groups * x.shape[0],),
        *(x, weight, bias, y, x.shape[-1], n, planes_x, planes_y),
        HAS_BIAS=bias is not None,
        TRANSPOSED=transposed,
        **_constants(x, weight, options, outs, tile),
    )


def _gradient_of_weight(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, options: MultiTokenAttentionOptions
) -> tuple[Tensor, Tensor | None]:
    groups = options.groups
    planes_x, planes_y = x.shape[1] // groups, dy.shape[1] // groups
    outs, n = _outs(planes_y), dy.shape[-1]
    light = outs * x.element_size() <= 32 and facts_of(x.device).architecture == "hopper"
    tile = WEIGH if light else WEIGH_HEAVY
    n_tiles = dy.shape[0] * cdiv(n, tile.rows)
    n_outs, n_k = weight.shape[0], weight[0].numel()
    blocks = groups * cdiv(planes_y, outs) * cdiv(n_k, tile.inner)
    parts = max(1, min(n_tiles // 2, PROGRAMS // blocks))
    dw = x.new_empty(1, parts, n_outs * n_k, dtype=torch.float32)
    dbias = None if bias is None else dw.new_empty(1, parts, n_outs)
    if blocks:
        launch(
            _weigh,
            (blocks * parts,),
            *(dy, x, dw, dbias, x.shape[-1], n, planes_x, planes_y, n_tiles, parts),
            HAS_BIAS=bias is not None,
            **_constants(x, weight, options, outs, tile),
        )
    return (
        column_sums(dw, [weight.dtype])[0].view(weight.shape),
        None if dbias is None or bias is None else column_sums(dbias, [bias.dtype])[0],
    )


def _outs(planes: int) -> int:
    return min(64, max(16, next_power_of_2(planes)))  # 16: the least that `tl.dot` takes


def _constants(
    x: Tensor,
    weight: Tensor,
    options: MultiTokenAttentionOptions,
    outs: int,
    tile: Tile,
) -> dict[str, Any]:
    (above, _), (before, _) = options.geometry(0, (weight.shape[2], weight.shape[3]))
    return {
        "GROUPS": options.groups,
        "KERNEL": weight.shape[2] * weight.shape[3],
        "KW": weight.shape[3],
        "STRIDE_H": options.stride[0],
        "STRIDE_W": options.stride[1],
        "ABOVE": above,
        "BEFORE": before,
        "DILATION_H": options.dilation[0],
        "DILATION_W": options.dilation[1],
        "PRECISION": facts_of(x.device).exact_precision if x.dtype == torch.float32 else "ieee",
        "OUTS": outs,
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "INNER": tile.inner,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
