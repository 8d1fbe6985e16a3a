"""The tiled feed-forward block beyond the cases: any function of a module, and how its gradients are handed out."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from liger_kernel import ops
from liger_kernel.backends import facts_of
from liger_kernel.backends.records import DeviceFacts
from liger_kernel.functional import apply_tiled_mlp, tiled_mlp
from liger_kernel.ops.tiled_mlp import reference
from liger_kernel.testing import Make, assert_draws_no_worse, assert_no_worse


class Block(nn.Module):
    """Two linear layers, one of them frozen, a tied weight, a dropout, and an adapter."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 24, dtype=dtype)
        self.down = nn.Linear(24, 8, dtype=dtype)
        self.down.bias.requires_grad_(False)
        self.tied = self.up.weight
        self.adapter = nn.Linear(24, 8, bias=False, dtype=dtype)
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(F.silu(self.up(x)))
        return self.down(inner) + self.adapter(inner) + F.linear(inner, self.tied.t())


def call(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def gradients(y: Tensor, x: Tensor, block: nn.Module) -> dict[str, Tensor]:
    wanted = {"x": x, **{n: p for n, p in block.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(
        (y * torch.linspace(1, 2, y.numel()).view_as(y)).sum(), [*wanted.values()]
    )
    return dict(zip(wanted, found, strict=True))


def data(dtype: torch.dtype = torch.float32, seed: int = 0, rows: int = 37) -> Tensor:
    return Make(dtype, seed=seed).randn(3, rows, 8).requires_grad_()


@pytest.mark.parametrize("tiles", [1, 2, 5, 99])
def test_any_function_of_a_module(tiles: int) -> None:
    def draw(seed: int) -> Any:
        runs = []
        for dtype, n in ((torch.float32, tiles), (torch.float64, 0), (torch.float32, 0)):
            block, x = (
                Block(dtype).eval(),
                data(torch.float32, seed).detach().to(dtype).requires_grad_(),
            )
            y = apply_tiled_mlp(call, block, x, n) if n else block(x)
            runs.append({"y": y.detach(), **gradients(y, x, block)})
        return runs

    assert_draws_no_worse(draw)


def test_gradients_of_many_tiles_are_rounded_once() -> None:
    """Summed in bfloat16, as autograd does, they are not."""
    x = Make(torch.bfloat16).randn(400, 8).abs()
    one = Make(torch.bfloat16).randn(8, 8).abs()  # all terms of the sums have one sign

    def run(dtype: torch.dtype, tiles: int) -> Tensor:
        block = nn.Linear(8, 8, bias=False).to(dtype)
        block.weight.data.copy_(one)
        apply_tiled_mlp(call, block, x.to(dtype), tiles).sum().backward()
        return block.weight.grad

    ours, low, high = run(torch.bfloat16, 200), run(torch.bfloat16, 1), run(torch.float64, 1)
    assert_no_worse("weight", ours, high, low)


def test_random_numbers_are_the_same_again() -> None:
    block, x = Block().train(), data()
    torch.manual_seed(3)
    y = apply_tiled_mlp(call, block, x, 4)
    after = torch.rand(1)
    found = gradients(y, x, block)
    torch.manual_seed(3)
    plain = torch.cat([block(tile) for tile in x.chunk(4, 1)], 1)
    assert torch.equal(y, plain)
    assert torch.equal(torch.rand(1), after)
    for name, grad in gradients(plain, x, block).items():
        assert_no_worse(name, found[name], grad.double(), grad)


def test_every_tensor_gets_its_gradient_once() -> None:
    """Hooks run once a backward, so that DDP and FSDP reduce once; tensors that only `fn` knows are served, too."""
    block, x, outside = Block().eval(), data(), torch.ones(8, requires_grad=True)
    seen: list[str] = []
    for name, p in [*block.named_parameters(), ("outside", outside)]:
        if p.requires_grad:
            p.register_hook(lambda grad: 2 * grad)
            p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    y = apply_tiled_mlp(lambda m, tile: m(tile) * outside, block, x, 5)
    y.sum().backward()
    assert sorted(seen) == ["adapter.weight", "down.weight", "outside", "tied", "up.bias"]
    once = 2 * block(x).detach().sum((0, 1))
    assert_no_worse("outside", outside.grad, once.double(), once)
    assert block.down.bias.grad is None


def test_weights_without_a_gradient_for_x() -> None:
    block, x = Block().eval(), data().detach()
    apply_tiled_mlp(call, block, x, 3).sum().backward()
    assert block.up.weight.grad is not None
    weights = [torch.ones(*s, requires_grad=True) for s in ((4, 8), (4, 8), (8, 4))]
    tiled_mlp(x, *weights, num_tiles=3).sum().backward()
    assert all(w.grad is not None for w in weights)


@pytest.mark.parametrize("native", [False, True])
def test_autocast_checkpoint_and_compile(native: bool) -> None:
    """Weights in float32, of which autocast makes one copy for all tiles, get sums in float32, too."""
    block, x = Block().eval(), data(rows=64)
    make = Make(torch.float32)
    weights = [make.randn(*s).requires_grad_() for s in ((24, 8), (24, 8), (8, 24))]

    def ours(x: Tensor, tiles: int = 16) -> Tensor:
        if native:
            return tiled_mlp(x, *weights, num_tiles=tiles)
        return apply_tiled_mlp(call, block, x, tiles)

    def theirs(x: Tensor) -> Tensor:
        if native:
            return reference.tiled_mlp(x, *weights, "silu", None)
        return block(x)

    leaves = [x, *(weights if native else [p for p in block.parameters() if p.requires_grad])]

    def run(function: Any) -> list[Tensor]:
        y = function(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    high = [t.double() for t in run(theirs)]
    with torch.autocast("cpu", torch.bfloat16):
        low, found = run(theirs), run(ours)
    for i, t in enumerate(found):
        assert_no_worse(f"autocast {i}", t, high[i], low[i])
    low, eager = run(theirs), run(ours)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ours(x, 3), backend="aot_eager", fullgraph=True)
    for form in (compiled, lambda x: checkpoint(ours, x, use_reentrant=False)):
        for i, t in enumerate(run(form)):
            assert_no_worse(f"{i}", t, high[i], [low[i], eager[i]])


def test_torch_func_and_no_grad() -> None:
    block, x = Block().eval(), data()
    expected = gradients(block(x).square(), x, block)["x"]
    weight = torch.linspace(1, 2, x.numel()).view_as(x)
    found = torch.func.grad(lambda x: (apply_tiled_mlp(call, block, x, 4).square() * weight).sum())(
        x
    )
    assert_no_worse("x", found, expected.double(), expected)
    with torch.no_grad():
        assert not apply_tiled_mlp(call, block, x, 4).requires_grad


def test_backward_twice_and_a_second_derivative() -> None:
    block, x = Block().eval(), data()
    y = apply_tiled_mlp(call, block, x, 4).square().sum()
    first, second = (torch.autograd.grad(y, block.tied, retain_graph=True)[0] for _ in "12")
    assert torch.equal(first, second)

    def twice(dtype: torch.dtype, tiles: int) -> Tensor:
        block, leaf = Block(dtype).eval(), x.detach().to(dtype).requires_grad_()
        y = apply_tiled_mlp(call, block, leaf, tiles) if tiles else block(leaf)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), block.tied)[0]

    assert_no_worse(
        "dtied", twice(torch.float32, 4), twice(torch.float64, 0), twice(torch.float32, 0)
    )


def test_a_subclass_of_the_function_reaches_the_parameters() -> None:
    class Mine(ops.LigerTiledMLPFunction):  # type: ignore[misc, name-defined]
        pass

    block, x = Block().eval(), data()
    y = Mine.apply(call, block, x, 4, list(block.parameters()))
    (y * torch.linspace(1, 2, y.numel()).view_as(y)).sum().backward()
    low = gradients(block(x), x, block)
    block.double()
    wide = x.detach().double().requires_grad_()
    high = gradients(block(wide), wide, block)
    assert_no_worse("x", x.grad, high["x"], low["x"])
    assert_no_worse("tied", block.tied.grad.float(), high["tied"], low["tied"])


def test_the_default_number_of_tiles() -> None:
    """1 GiB of outputs on processors: here 4 MiB a token, but 1024 tokens at least."""
    seen: list[int] = []
    block = nn.Linear(2, 2**20, bias=False, device="meta")

    def fn(m: nn.Module, tile: Tensor) -> Tensor:
        seen.append(tile.shape[0])
        return tile

    for rows in (5, 2047, 2048, 5000):
        seen.clear()
        with torch.no_grad():
            apply_tiled_mlp(fn, block, torch.zeros(rows, 2))
        assert len(seen) == max(1, rows // 1024), rows
    assert facts_of(torch.device("cpu")).tile_bytes == 4 * DeviceFacts().tile_bytes == 2**30


@pytest.mark.parametrize("native", [False, True])
def test_one_tile_by_default_computes_nothing_twice(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without kernels, where it fits; tiles that were asked for save memory, be it one."""
    products: list[int] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            products.append(op._opname in ("mm", "mm_", "addmm", "addmm_"))
            return op(*args, **(kwargs or {}))

    weights = [torch.ones(*s, requires_grad=True) for s in ((4, 8), (4, 8), (8, 4))]
    block, x = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)), torch.ones(6, 8)

    def products_of(tiles: int | None) -> int:
        products.clear()
        with Counting():
            y = (
                tiled_mlp(x, *weights, num_tiles=tiles)
                if native
                else apply_tiled_mlp(call, block, x, tiles)
            )
            y.sum().backward()
        return sum(products)

    kept, again = (7, 9) if native else (5, 6)  # x requires no gradient
    assert products_of(None) == kept
    assert products_of(1) == again
    with monkeypatch.context() as kernels:
        kernels.setattr(sys.modules[tiled_mlp.__module__], "_by_torch", lambda device_type: False)
        assert products_of(None) == again
    torch._dynamo.reset()
    function = tiled_mlp if native else lambda x, *_: apply_tiled_mlp(call, block, x)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, *weights), function(x, *weights))


def test_refused() -> None:
    block = Block()
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"number of tiles is {n}, but at least 1"):
            apply_tiled_mlp(call, block, data(), n)
    with pytest.raises(ValueError, match=r"x has shape \(8,\), but tiles are cut along T"):
        apply_tiled_mlp(call, block, torch.ones(8))
    with pytest.raises(TypeError, match="floating"):
        apply_tiled_mlp(call, block, torch.ones(3, 8, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="do not fit each other"):
        tiled_mlp(torch.ones(3, 8), torch.ones(4, 8), torch.ones(5, 8), torch.ones(8, 4))
