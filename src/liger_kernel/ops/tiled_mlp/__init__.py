"""A feed-forward block computed one tile of tokens after the other (Bekman et al. 2025, Arctic long sequence training,
https://arxiv.org/abs/2506.13996): what a tile needs for backward is computed there once more, and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from liger_kernel._core.autograd import autocast_dtype, has_numbers, in_torch_func
from liger_kernel._core.checks import check_choice, check_floating
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel._core.lazy import compat_names
from liger_kernel._core.shapes import cdiv
from liger_kernel.backends import REFERENCE, facts_of, requested, serving
from liger_kernel.backends.dispatch import is_chosen, is_composed, kernels_for
from liger_kernel.backends.inductor import INDUCTOR
from liger_kernel.ops import OPS
from liger_kernel.ops.gated_mlp import check_tensors, gated_mlp
from liger_kernel.ops.gated_mlp import reference as gated
from liger_kernel.ops.glu import ACTIVATIONS, gated_product
from liger_kernel.ops.glu.contract import GLUOptions
from liger_kernel.ops.tiled_mlp.tiles import in_tiles

#: rows of a tile below which products become slow
_MIN_ROWS = 1024


def tiled_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    activation: str = "silu",
    num_tiles: int | None = None,
) -> Tensor:
    """`gated_mlp` in tiles of tokens: backward keeps x alone, and computes gate and up once more.

    Args: x, the weights and the activation as in `gated_mlp`, but x of two dimensions or more. num_tiles: None for as
        many as keep the outputs of the products within 256 MiB a tile, 1 GiB on processors, but for no less than 1024
        tokens each. One tile by default is `gated_mlp` where there are no kernels, as on processors: memory is less
        scarce there, and nothing is computed twice.

    Returns: (..., O), as by `gated_mlp`. With more than two tiles the gradients of 16-bit weights are summed in fp32.
    Raises: as `gated_mlp`; ValueError for less than one tile.
    """
    check_choice("activation", activation, ACTIVATIONS)
    weights = (gate_weight, up_weight, down_weight)
    autocast = autocast_dtype(x) is not None
    check_tensors(x, *weights, autocast)
    num_tiles = _tiles(x, num_tiles, weights)
    if num_tiles is None:
        return gated_mlp(x, *weights, activation)
    return gated_tiles(x, *weights, GLUOptions(activation), num_tiles)


def gated_tiles(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    options: GLUOptions,
    num_tiles: int,
) -> Tensor:
    """`gated_mlp` of tensors that fit, in tiles, with all options of the gate."""
    weights = (gate_weight, up_weight, down_weight)
    if not (autocast_dtype(x) is not None or is_composed(x, *weights) or is_chosen("glu")):
        return in_tiles(
            _Gated(kernels_for("glu", options, x, None), options), x, num_tiles, weights
        )
    form = (options.activation, options.gate_multiplier, options.limit, options.alpha)

    def block(tile: Tensor, of_tile: Mapping[str, Tensor]) -> Tensor:
        gate, up, down = (of_tile.get(name) for name in names)
        return gated.gated_mlp(tile, gate, up, down, *form, product=gated_product)  # type: ignore[arg-type]

    names = ("gate", "up", "down")
    named = {n: w for n, w in zip(names, weights, strict=True) if w is not None}
    return _checkpointed(block, x, num_tiles, named)


def apply_tiled_mlp(
    fn: Callable[..., Tensor],
    mlp_module: nn.Module,
    x: Tensor,
    num_shards: int | None = None,
    compute_params: Sequence[nn.Parameter] | None = None,
) -> Tensor:
    """`fn(mlp_module, x)`, computed in tiles of x along its second to last dimension.

    Args:
        fn: computes each token on its own, from the module and from any other tensor. It runs twice for each tile, the
            second time in backward, under the same autocast and with the same random numbers.
        x: (..., T, H).
        num_shards: the number of tiles; None as in `tiled_mlp`, by the linear layers of the module.
        compute_params: not needed. Every tensor that requires a gradient gets it by autograd, and whole: DDP and FSDP
            reduce it once.

    Returns: (..., T, O).
    With more than two tiles the gradients of the module's parameters are summed in fp32; those of DTensors, under
    ZeRO-3 or torch.compile, and of tensors that only `fn` knows, are summed in their own dtype.
    Raises: ValueError for less than one tile, or an x of one dimension; TypeError for an x of integers.
    """
    check_floating(x=x)
    num_shards = _tiles(x, num_shards, mlp_module.parameters())
    if num_shards is None:
        return fn(mlp_module, x)
    if torch.compiler.is_compiling():  # which does not follow the exchange of parameters
        return _checkpointed(lambda tile, _: fn(mlp_module, tile), x, num_shards, {})
    block = _Block(fn, mlp_module)
    replaceable: dict[str, Tensor] = {
        name: p
        for name, p in block.named_parameters()
        if type(p) in (nn.Parameter, Tensor) and not hasattr(p, "ds_id")  # ZeRO-3 wants its own
    }
    return _checkpointed(
        lambda tile, of_tile: functional_call(block, of_tile, (tile,)), x, num_shards, replaceable
    )


class _Block(nn.Module):
    """Gives the parameters of `module` names, by which `functional_call` puts others in their place."""

    def __init__(self, fn: Callable[..., Tensor], module: nn.Module):
        super().__init__()
        self.fn = fn
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.module, x)


def _tiles(x: Tensor, num_tiles: int | None, weights: Iterable[Tensor | None]) -> int | None:
    """`num_tiles`, or the default for a block whose products have these weights; None for all of x, computed once."""
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but tiles are cut along T of (..., T, H).")
    if num_tiles is None:
        found = tiles_of(x, sum(w.shape[0] for w in weights if w is not None and w.ndim == 2))
        return None if found == 1 and has_numbers(x) and _by_torch(x.device.type) else found
    if num_tiles < 1:
        raise ValueError(
            f"The number of tiles is {num_tiles}, but at least 1; pass None for the default."
        )
    return num_tiles


def tiles_of(x: Tensor, outputs: int) -> int:
    """The default number of tiles of x (..., H), for products with so many columns in all."""
    n_rows = x.numel() // max(1, x.shape[-1])
    needed = n_rows * max(outputs, x.shape[-1]) * x.element_size()
    return max(1, min(cdiv(needed, _tile_bytes(x.device)), n_rows // _MIN_ROWS))


@torch.compiler.assume_constant_result
def _tile_bytes(device: torch.device) -> int:
    return facts_of(device).tile_bytes


@torch.compiler.assume_constant_result
def _by_torch(device_type: str) -> bool:
    """Whether no kernels compute the gated product there."""
    return serving("glu", device_type, requested())[0] in (REFERENCE, INDUCTOR.name)


def _checkpointed(
    run: Callable[[Tensor, dict[str, Tensor]], Tensor],
    x: Tensor,
    num_tiles: int,
    weights: dict[str, Tensor],
) -> Tensor:
    """`run(tile, weights)` of each tile by PyTorch's checkpointing; their gradients are summed in fp32."""
    tiles = x.chunk(num_tiles, -2)
    # torch.func lets nothing be computed again, and before torch 2.13 a trace with checkpoints cannot be saved
    if not torch.is_grad_enabled() or in_torch_func() or torch.jit.is_tracing():
        return torch.cat([run(tile, weights) for tile in tiles], -2)
    summed = {
        name: (w.detach(), _Sum.apply(w))
        for name, w in weights.items()
        if w.requires_grad and not is_dtensor(w) and len(tiles) > 2
    }
    found = []
    for tile in tiles:
        of_tile = {name: _OfTile.apply(*pair) for name, pair in summed.items()}
        found.append(checkpoint(run, tile, {**weights, **of_tile}, use_reentrant=False))
    return torch.cat(found, -2)


class _Sum(torch.autograd.Function):
    """Stands for a weight where autograd sums its gradient: of fp32 or wider, and without memory."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.new_zeros((), dtype=wide).expand(weight.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(ctx.dtype)


class _OfTile(torch.autograd.Function):
    """The weight as one tile uses it; its gradient goes to `total`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, total: Tensor) -> Tensor:
        ctx.dtype = total.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.to(ctx.dtype)


class _Gated:
    """The gated block of plain weights; the implementation is that of `glu`."""

    def __init__(self, impl: Any, options: GLUOptions):
        self.impl, self.options = impl, options

    def forward(self, number: int, tile: Tensor, weights: Any) -> Tensor:
        gate, up = _projected(tile, *weights)
        product = self.impl.forward(gate, up, options=self.options, needs=(False, False))[0]
        return torch.mm(product, weights[2].t())

    def backward(
        self, number: int, tile: Tensor, weights: Any, dy: Tensor, needs_dx: bool, sums: Any
    ) -> Tensor | None:
        gate_weight, up_weight, down_weight = weights
        needs = (
            needs_dx or sums[0] is not None,
            up_weight is not None and (needs_dx or sums[1] is not None),
        )
        gate, up = _projected(tile, *weights)
        found: Any = None, None
        if any(needs):
            dproduct, saved = torch.mm(dy, down_weight), (gate, up)
            found, product = self.impl.backward_with_output(
                dproduct, saved, options=self.options, needs=needs, into=saved
            )
        else:
            product = self.impl.forward(gate, up, options=self.options, needs=needs)[0]
        for total, d, of in zip(sums, (*found, dy), (tile, tile, product), strict=True):
            if total is not None:
                total.add(d.t(), of)
        if not needs_dx:
            return None
        dx = torch.mm(found[0], gate_weight)
        return dx if up_weight is None else dx.addmm_(found[1], up_weight)


def _projected(
    rows: Tensor, gate_weight: Tensor, up_weight: Tensor | None, _: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gate and up of a tile."""
    up = None if up_weight is None else torch.mm(rows, up_weight.t())
    return torch.mm(rows, gate_weight.t()), up


__getattr__ = compat_names(__name__, OPS["tiled_mlp"])
