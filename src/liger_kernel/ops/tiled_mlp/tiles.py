"""Tiles of tokens that backward computes once more: two nodes that keep the input, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from liger_kernel._core.autograd import autocast_dtype, refuse_double_backward
from liger_kernel._core.shapes import as_rows, cdiv
from liger_kernel.backends.products import ProductSum

Weights = Sequence[Tensor | None]
Sums = Sequence[ProductSum | None]


class Block(Protocol):
    """What is computed of each tile (T, H), by its number."""

    def forward(self, number: int, tile: Tensor, weights: Weights) -> Tensor: ...

    def backward(
        self, number: int, tile: Tensor, weights: Weights, dy: Tensor, needs_dx: bool, sums: Sums
    ) -> Tensor | None:
        """The gradient of the tile; those of weights are added to their `sums`, where there is one."""


def in_tiles(block: Block, x: Tensor, num_tiles: int, weights: Weights) -> Tensor:
    """`block` of `num_tiles` tiles of the rows of x, (..., O); `weights` get gradients."""
    nodes: list[Any] = []
    kept = _Kept.apply(nodes, x, *weights)
    y: Tensor = _Tiles.apply((block, nodes[0], num_tiles, x, weights), kept)
    return y


class _Kept(torch.autograd.Function):
    """Keeps x and the weights, and hands out their gradients, which `_Tiles` makes.

    It keeps them before any tile is computed, and `_Tiles` keeps nothing: a checkpointed layer that is computed again
    stops as soon as all that it kept is there again, and so never repeats tiles at its end.
    """

    @staticmethod
    def forward(ctx: Any, nodes: list[Any], x: Tensor, *weights: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        nodes.append(ctx)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: None) -> tuple[Tensor | None, ...]:
        found, ctx.found = ctx.found, None
        return None, *found


class _Tiles(torch.autograd.Function):
    """All tiles, and their backward."""

    @staticmethod
    def forward(ctx: Any, call: Any, kept: Tensor) -> Tensor:
        block, node, num_tiles, x, weights = call
        ctx.of_forward = block, node, num_tiles
        rows, y = as_rows(x), None
        for number, at in enumerate(_slices(rows.shape[0], num_tiles)):
            found = block.forward(number, rows[at], weights)
            if y is None:
                y = found.new_empty(*x.shape[:-1], found.shape[-1])
            y.view(rows.shape[0], found.shape[-1])[at] = found
        assert y is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        refuse_double_backward()
        block, node, num_tiles = ctx.of_forward
        x, *weights = node.saved_tensors
        needs_dx, *needs = node.needs_input_grad[1:]
        rows, dy_rows = as_rows(x), as_rows(grads[0])
        slices = _slices(rows.shape[0], num_tiles)
        dx = x.new_empty(x.shape) if needs_dx else None
        sums = [
            ProductSum(w, torch.promote_types(w.dtype, torch.float32) if len(slices) > 2 else w.dtype)
            if need
            else None
            for w, need in zip(weights, needs, strict=True)
        ]  # fmt: skip
        for number, at in reversed([*enumerate(slices)]):  # as autograd goes
            found = block.backward(number, rows[at], weights, dy_rows[at], needs_dx, sums)
            if dx is not None:
                dx.view(rows.shape)[at] = found
        node.found = dx, *(None if total is None else total.result() for total in sums)
        return None, None


def _slices(n_rows: int, num_tiles: int) -> list[slice]:
    """At least one, which has no rows where there are none."""
    size = max(1, cdiv(n_rows, num_tiles))
    return [slice(start, start + size) for start in range(0, max(1, n_rows), size)]


class Rerun:
    """Any function of a tile, which backward computes once more under autograd, as autocast and dropout were.

    Args:
        run: computes a tile (1, T, H). again: the same where nobody reads the numbers that it returns.
        parameters: those that require a gradient, as the function reads them now; leaves, in the order of the weights.
        draws: whether it draws random numbers.
    """

    def __init__(
        self,
        x: Tensor,
        run: Callable[[Tensor], Tensor],
        again: Callable[[Tensor], Tensor],
        parameters: Callable[[], Sequence[Tensor]],
        draws: bool,
    ):
        self.run, self.again, self.parameters, self.draws = run, again, parameters, draws
        self.device, self.autocast = x.device.type, autocast_dtype(x)
        self.drawn: list[Any] = []

    def forward(self, number: int, tile: Tensor, weights: Weights) -> Tensor:
        if self.draws:
            self.drawn.append((torch.get_rng_state(), get_device_states(tile)))
        return self.run(tile[None])[0]

    def backward(
        self, number: int, tile: Tensor, weights: Weights, dy: Tensor, needs_dx: bool, sums: Sums
    ) -> Tensor | None:
        leaf = tile[None].detach().requires_grad_(needs_dx)
        with torch.enable_grad(), self._as_before(number):
            y = self.again(
                leaf.view_as(leaf)
            )  # what reads an input several times knows it by a node
        wanted = [leaf] * needs_dx
        wanted += [p for p, s in zip(self.parameters(), sums, strict=True) if s is not None]
        found = iter(torch.autograd.grad(y, wanted, dy[None], allow_unused=True))
        dx = next(found) if needs_dx else None
        for total in sums:
            grad = None if total is None else next(found)
            if total is not None and grad is not None:
                total.add_whole(grad)
        return None if dx is None else dx[0]

    @contextlib.contextmanager
    def _as_before(self, number: int) -> Any:
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device, self.autocast))
            if self.draws:
                cpu, (devices, states) = self.drawn[number]
                stack.enter_context(torch.random.fork_rng(devices, device_type=self.device))
                torch.set_rng_state(cpu)
                set_device_states(devices, states, device_type=self.device)
            yield
