"""Kernels of a mixture of experts: grouped matrix products over a table of tiles, and what stands between them.

With S = T K rows, forward and backward together do 6 S H (2I + I) FLOPs; beside the weights and their gradients they
move about 30 S H + 30 S I bytes in 16 bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liger_kernel._core.shapes import cdiv, next_power_of_2
from liger_kernel.backends import facts_of
from liger_kernel.backends.kernels import TensorDescriptor, launch
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.backends.triton import INTERPRET
from liger_kernel.ops.fused_moe import pipeline
from liger_kernel.ops.fused_moe.contract import MoEOptions
from liger_kernel.ops.fused_moe.kernels import activate, activate_bwd, combine, relaid, spread
from liger_kernel.ops.fused_moe.pipeline import LowRank, Routing
from liger_kernel.ops.fused_moe.products.kernels import (
    bias_gradient,
    grouped_product,
    tile_table,
    weight_gradient,
)

_OF_WARP = 512  # elements of a pass over memory: two loads of 16 bytes in each thread. Not measured, as all below
_SOME, _MANY = 384, 1024  # rows of an expert, by and large
_SQUARE, _TABLE = 64, 128  # sides of a tile of `_bias_gradient`; tiles of a step of `_tile_table`


def _pass(n_cols: int, warps: int, most: int) -> dict[str, int]:
    """The tile of a program that goes over memory once; `most` columns leave it some rows, whose indices it shares."""
    cols = min(most, next_power_of_2(n_cols))
    return {"ROWS": warps * _OF_WARP // cols, "COLS": cols, "num_warps": warps}


class Library(NamedTuple):
    """Which products are PyTorch's, where its products serve. A pass has to gather the rows of tokens for it, which
    costs the less, the more columns they are multiplied with; `None`: never."""

    gathered_from: int | None = None  # products of the rows of tokens: columns of the result
    plain: bool = False  # products of sorted rows
    gradients_from: int | None = None  # gradients of weights: columns beside the rows of tokens


@dataclass(frozen=True)
class Tile:
    """A program owns (rows, cols) of the result, and goes over the inner dimension by `inner`."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int

    def constants(self) -> dict[str, Any]:
        return {
            "PRECISION": _precision(),
            "ROWS": self.rows,
            "COLS": self.cols,
            "INNER": self.inner,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    @functools.cache  # noqa: B019 (there are few)
    def fitted(self, n_rows: int, n_cols: int) -> Tile:
        """For a result of (n_rows, n_cols), which may be narrow, as those of a low rank are."""
        rows, cols = (
            min(most, max(16, next_power_of_2(n)))
            for most, n in ((self.rows, n_rows), (self.cols, n_cols))
        )
        if (rows, cols) == (self.rows, self.cols):
            return self
        return replace(self, rows=rows, cols=min(cols, 128), warps=4)


@dataclass(frozen=True)
class Config:
    """Of all products.

    product: its rows are those of the table of tiles, which all products share. On an H100 128 x 256 x 64 with 8 warps
        was the fastest of 13, at 1024 and 8192 tokens of Qwen3-30B-A3B and at 8192 of Mixtral.
    gradient: of the gradients of weights.
    library: of (rows of an expert, by and large, from which it holds; who multiplies), in rising order. H100, ms of
        ours and of PyTorch's with its gathering passes, Qwen3-30B-A3B at 64, 512 and 2048 rows, and Mixtral at 2048:
        first product .32 / .35, .79 / .88, 3.00 / 3.12 and 6.58 / 5.23; da .16 / .20, .40 / .56, 1.32 / 1.99 and
        3.17 / 3.03; down .18 / .18, .49 / .44, 1.69 / 1.49 and 3.18 / 2.93; dx .31 / .33, .77 / .76, 3.15 / 2.56 and
        6.15 / 5.97; dW2 .26 / .22, .53 / .62, 1.67 / 1.97 and 3.66 / 2.80; dW1 .60 / .40, 1.19 / .98, 4.02 / 3.08 and
        8.44 / 6.23.
    low_rows, low_inner: rows and step of a product onto a low rank: 32 to 52 us each on an H100 at 4096 tokens and rank
        16, within 10 % whatever they are. Rows made again in every tile of the four products with weights took .31 ms
        of tensor cores there, where these kernels and what reads them take .23.
    halves: the last rows of an expert take half a tile, if they fit in.
    fused_forward: the product that is activated ends with it, which saves .03 of .90 ms on an H100 (512 rows of
        Qwen3-30B-A3B). At the end of da, backward lost as much as it saved: it spilled.
    descriptors: of how many rows of an expert, by and large, the copy engine reads less than these: weights, and rows
        that nobody gathers, if they have no gaps. H200, LoRA with 256 rows of Qwen3-30B-A3B: first product 464 us
        without and 436 with, down 270 and 241, dx 426 and 409; with 2048 rows it gained nothing.
    group: tiles of rows whose programs run at a time, and share columns of the weight in the L2 cache; twice as many in
        the gradients of weights, of which an expert's rows are read again for each tile.
    """

    product: Tile
    gradient: Tile
    library: tuple[tuple[int, Library], ...] = ()
    low_rows: int = 64
    low_inner: int = 128
    halves: bool = False
    fused_forward: bool = False
    descriptors: int = 0
    group: int = 8

    @staticmethod
    @functools.cache
    def of(facts: DeviceFacts, dtype: torch.dtype, even: bool, many: bool) -> Config:
        """`even`: all features are multiples of 64. Where they are not, loads are narrow, and their addresses many.
        `many`: an expert has `_MANY` rows or more."""
        if INTERPRET:  # it pays per program, and tests want several
            tile = Tile(32, 32, 32, warps=4, stages=1)  # tl.dot wants 16, also of half a tile
            fused: Any = dict.fromkeys(("halves", "fused_forward"), True)
            fused["descriptors"] = _SOME if TensorDescriptor is not None else 0
            return Config(tile, tile, low_rows=16, low_inner=32, **fused)
        if dtype.itemsize > 2:
            # steps of 128 spill; so do 4 warps without matrix units for fp32, 8 of gfx1100 do not
            warps = 8 if facts.architecture.startswith("rdna") else 4
            tile = Tile(64, 64, inner=32, warps=warps, stages=facts.stages(3, 2**14))
            return Config(tile, tile, low_inner=32)
        large = facts.architecture in ("hopper", "blackwell", "blackwell_ultra")
        if large and even:
            tile = Tile(128, 256, inner=64, warps=8, stages=facts.stages(3, 3 * 2**14))
            # ms of all four products with 3 / 4 steps under way: 1.54 / 1.44 of 256 rows of an expert, 2.53 / 2.48 of
            # 512, 9.47 / 9.58 of 2048, and there 4.63 / 4.79 of the two that are ours
            product = replace(tile, stages=facts.stages(3 if many else 4, 3 * 2**14))
            # rows between 64 and 512 were not measured
            library = (0, Library(gradients_from=0)), (_SOME, Library(2048, True, 1024))
            reads = facts.architecture == "hopper" and TensorDescriptor is not None
            fused = dict.fromkeys(("halves", "fused_forward"), True)
            return Config(product, tile, library, descriptors=_SOME if reads else 0, **fused)
        cols = 128 if even else 64
        tile = Tile(rows=64, cols=cols, inner=32, warps=4, stages=facts.stages(3, 3 * 2**12))
        return Config(tile, tile)

    @functools.cache  # noqa: B019
    def of_low_rank(self, rank: int) -> Tile:
        """Of a product onto a low rank: parts of the rows of a tile."""
        whole = self.product
        cols = min(whole.cols, max(16, next_power_of_2(rank)))
        rows, inner = min(whole.rows, self.low_rows), max(whole.inner, self.low_inner)
        return replace(
            whole, rows=rows, cols=cols, inner=inner, warps=4, stages=min(3, whole.stages)
        )

    def library_at(self, rows: float) -> Library:
        found = Library()
        for least, library in self.library:
            if rows >= least:
                found = library
        return found


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


#: of a product without an activation: `limit`, `alpha`, `up_shift`, and constants
_PLAIN: tuple[tuple[float, ...], dict[str, Any]] = (
    (0.0, 0.0, 0.0),
    {"ACTIVATION": "none", "GATED": False, "INTERLEAVED": False, "LIMITED": False},
)


@dataclass(frozen=True)
class Kernels(pipeline.Separately):
    """`pipeline.Steps`. PyTorch's products want bf16, gathered rows, and whole vectors of 16 bytes."""

    config: Config
    library: Library

    @staticmethod
    def of(n_rows: int, x: Tensor, *weights: Tensor) -> Kernels:
        even = all(size % 64 == 0 for weight in weights for size in weight.shape[1:])
        rows = n_rows / max(1, weights[0].shape[0])
        config = Config.of(facts_of(x.device), x.dtype, even, rows >= _MANY)
        if not config.library or not _library_serves(x, *weights):
            return Kernels(config, Library())
        return Kernels(config, config.library_at(rows))

    def tiles(self, starts: Tensor, n_rows: int) -> Tensor:
        n_experts, rows = starts.shape[0] - 1, self.config.product.rows
        n_tiles = cdiv(n_rows, rows) + n_experts
        tiles = starts.new_empty(n_tiles, 2)
        sizes = {"ROWS": rows, "EXPERTS": next_power_of_2(n_experts), "BLOCK": _TABLE}
        launch(tile_table, (n_experts + 1,), starts, tiles, n_experts, n_tiles, **sizes)
        return tiles

    def product(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        gathered: bool,
        low: LowRank | None = None,
        scale: float | None = None,
    ) -> Tensor:
        # what is added would be added to rounded rows, and rounded again
        alone = bias is None and low is None and scale is None
        if alone and (self._gathers(weight) if gathered else self.library.plain):
            return _grouped_mm(_rows_of(a, routing, gathered), weight.mT, routing)
        out = a.new_empty(routing.slots.shape[0], weight.shape[1])
        self._launch(a, weight, bias, routing, gathered, low, scale, out=out)
        return out

    def _gathers(self, weight: Tensor) -> bool:
        least = self.library.gathered_from
        return least is not None and weight.shape[1] >= least

    def _launch(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        gathered: bool,
        low: LowRank | None,
        scale: float | None = None,
        *,
        out: Tensor | None,
        act: Tensor | None = None,
        options: MoEOptions | None = None,
    ) -> None:
        """A product, `out`, and its activation by `options`, `act`. Either is made if there is a tensor for it."""
        n_cols, n_inner = weight.shape[1:]
        tile = self.config.product.fitted(self.config.product.rows, n_cols)
        if scale is not None:
            tile = self.config.of_low_rank(n_cols)
        parts = self.config.product.rows // tile.rows
        n_tiles = routing.tiles.shape[0] * parts
        features = 0 if act is None else act.shape[1]
        paired = options is not None and options.gated and not options.interleaved
        read = self._descriptors(a, weight, routing, gathered, tile, paired)
        numbers, constants = _PLAIN if options is None else _of_activation(options)
        low_numbers = (0,) * 4 if low is None else (low.b.shape[2], *low.b.stride())
        rank = 0 if low is None else max(16, next_power_of_2(low.b.shape[2]))
        launch(
            grouped_product,
            (n_tiles * cdiv(n_cols, tile.cols),),
            a,
            *read[:2],
            weight,
            read[2],
            None if bias is None else bias.contiguous(),
            None if low is None else low.rows,
            None if low is None else low.b,
            out,
            act,
            routing.tokens,
            routing.starts,
            routing.tiles,
            n_tiles,
            n_cols,
            n_inner,
            *weight.stride(),
            *low_numbers,
            1.0 if scale is None else float(scale),
            features,
            *numbers,
            GATHERED=gathered,
            A_DESC=read[0] is not None,
            WEIGHT_DESC=read[2] is not None,
            TURNED=read[2] is not None and weight.stride(1) == 1,
            HAS_BIAS=bias is not None,
            PARTS=parts,
            HALVES=self.config.halves and parts == 1,
            KEEP=out is not None,
            **constants,
            RANK=min(rank, tile.inner),
            EVEN=n_inner % tile.inner == 0,
            ALIGNED=(features or n_cols) % 8 == 0,
            GROUP=self.config.group,
            **tile.constants(),
        )

    def _descriptors(
        self,
        a: Tensor,
        weight: Tensor,
        routing: Routing,
        gathered: bool,
        tile: Tile,
        paired: bool,
    ) -> tuple[Any, Any, Any]:
        """Of a, by tiles and by halves of them, and of the weight; `paired`: of gates and of ups. None: by pointers."""
        rows = routing.slots.shape[0] / max(1, weight.shape[0])
        if rows >= self.config.descriptors or tile is not self.config.product:
            return None, None, None
        if weight.shape[2] % tile.inner:
            return None, None, None
        cols = tile.cols // (1 + paired)
        turned = weight.stride(1) == 1
        block = (tile.inner, cols) if turned else (cols, tile.inner)
        of_weight = _descriptor(weight.mT if turned else weight, *block)
        if of_weight is None or gathered:
            return None, None, of_weight
        whole = _descriptor(a, tile.rows, tile.inner)
        half = whole and _descriptor(a, tile.rows // 2, tile.inner)
        return whole, half, of_weight

    def activated(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: Routing,
        low: LowRank | None,
        options: MoEOptions,
        keep: bool,
    ) -> tuple[Tensor | None, Tensor]:
        if not self.config.fused_forward or self._gathers(weight):
            return super().activated(a, weight, bias, routing, low, options, keep)
        n_rows, n_cols = routing.slots.shape[0], weight.shape[1]
        hidden = a.new_empty(n_rows, n_cols) if keep else None
        act = a.new_empty(n_rows, n_cols // (1 + options.gated))
        self._launch(a, weight, bias, routing, True, low, out=hidden, act=act, options=options)
        return hidden, act

    def weight_gradient(
        self,
        a: Tensor,
        b: Tensor,
        routing: Routing,
        gathered: tuple[bool, bool],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        least, beside = self.library.gradients_from, (a if gathered[1] else b).shape[1]
        if least is not None and beside >= least and dtype is None:  # not of a low rank
            a, b = (_rows_of(t, routing, n) for t, n in zip((a, b), gathered, strict=True))
            return _grouped_mm(a.t(), b, routing)
        n_experts, shape = routing.starts.shape[0] - 1, (a.shape[1], b.shape[1])
        out = a.new_empty(n_experts, *shape, dtype=dtype or a.dtype)
        tile = self.config.gradient.fitted(*shape)
        launch(
            weight_gradient,
            (n_experts * cdiv(shape[0], tile.rows) * cdiv(shape[1], tile.cols),),
            a,
            b,
            out,
            routing.tokens,
            routing.starts,
            *shape,
            GATHERED_A=gathered[0],
            GATHERED_B=gathered[1],
            ALIGNED=shape[0] % 8 == shape[1] % 8 == 0,
            GROUP=2 * self.config.group,
            **tile.constants(),
        )
        return out

    def bias_gradient(
        self, a: Tensor, weights: Tensor | None, routing: Routing, gathered: bool
    ) -> Tensor:
        n_experts, n_cols = routing.starts.shape[0] - 1, a.shape[1]
        out = a.new_empty(n_experts, n_cols, dtype=torch.float32)
        launch(
            bias_gradient,
            (n_experts * cdiv(n_cols, _SQUARE),),
            a,
            weights,
            out,
            routing.slots,
            routing.tokens,
            routing.starts,
            n_cols,
            GATHERED=gathered,
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

    def copy(self, source: Tensor, out: Tensor) -> Tensor:
        """Of a matrix of all experts and (E, N, R): a transposition, which PyTorch's copy does at .5 TB/s."""
        ours = source.stride(0) == 1 or out.stride(0) == 1
        if not ours or any(t.stride(1) != t.shape[2] * t.stride(2) for t in (source, out)):
            return out.copy_(source)
        n_experts, n_cols = source.shape[0], source[0].numel()
        strides = (n for t in (source, out) for n in (t.stride(0), t.stride(2)))
        launch(
            relaid,
            (cdiv(n_experts, _SQUARE) * cdiv(n_cols, _SQUARE),),
            source,
            out,
            n_experts,
            n_cols,
            *strides,
            ROWS=_SQUARE,
            COLS=_SQUARE,
            num_warps=4,
        )
        return out


def _rows_of(a: Tensor, routing: Routing, gathered: bool) -> Tensor:
    """Of tokens, each is read once: 3.3 TB/s are written so where a gather of rows wrote 1.95 (H200, 2048 columns)."""
    n_tokens, n_cols = a.shape
    if not gathered or not n_tokens:
        return a
    n_rows = routing.slots.shape[0]
    out = a.new_empty(n_rows, n_cols)
    tile = _pass(n_cols, warps=4, most=2048)
    grid = (cdiv(n_tokens, tile["ROWS"]) * cdiv(n_cols, tile["COLS"]),)
    launch(spread, grid, a, routing.rows, out, n_tokens, n_cols, TOP_K=n_rows // n_tokens, **tile)
    return out


def _descriptor(matrix: Tensor, *block: int) -> Any:
    """Of a matrix (S, N), or (E, N, M); None if the copy engine cannot read it."""
    if not matrix.is_contiguous() or not matrix.numel() or matrix.data_ptr() % 16:
        return None
    whole = matrix.view(-1, matrix.shape[-1])
    if whole.shape[0] >= 2**31 or whole.shape[1] * whole.element_size() % 16:
        return None
    return TensorDescriptor(whole, [*whole.shape], [*whole.stride()], [*block])


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
