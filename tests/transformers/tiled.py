"""Tiled MLPs under DDP and FSDP2, for the processes of test_distributed.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import LigerTiledSwiGLUMLP
from tests.transformers import ranks
from tests.transformers.tiny import batch, build


def config(act: str = "silu", **more: Any) -> Any:
    return SimpleNamespace(hidden_size=16, intermediate_size=40, hidden_act=act, **more)


class Adapted(nn.Linear):
    """As PEFT does it: a frozen weight, and two small ones."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out)
        self.requires_grad_(False)
        self.lora = nn.Sequential(nn.Linear(n_in, 2, bias=False), nn.Linear(2, n_out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora(x)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a weighted sum of it."""
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    (y * torch.linspace(1, 2, y.shape[-1]).to(y)).mean().backward()
    found = {"y": y.detach(), "x": leaf.grad}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name.removeprefix("module.")] = getattr(
                p.grad, "full_tensor", lambda p=p: p.grad
            )()
    return found


def stack(dtype: torch.dtype = torch.float32, adapted: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(LigerTiledSwiGLUMLP(config(), 3), LigerTiledSwiGLUMLP(config(), 4))
    if adapted:
        for mlp in model:
            mlp.gate_proj = Adapted(16, 40)
    return model.to(ranks.device(), dtype)


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for mlp in model:  # type: ignore[attr-defined]
        fully_shard(mlp)
    return fully_shard(model)


def fsdp2_each_linear(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for mlp in model:  # type: ignore[attr-defined]
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            fully_shard(linear)
    return fully_shard(model)


def check(rank: int, wrap: Callable[[nn.Module], nn.Module], adapted: bool) -> None:
    """Averaged gradients, reduced once for each unit; DDP itself refuses to reduce one twice."""
    make = Make(torch.float32, ranks.device())
    batches = [make.randn(2, 21, 16) for _ in range(ranks.WORLD)]
    wrapped = wrap(stack(adapted=adapted))
    names = [name for name in dir(dist) if name.startswith("reduce_scatter_")]
    with ExitStack() as stacked:
        for name in names:
            stacked.enter_context(patch.object(dist, name, Mock(side_effect=getattr(dist, name))))
        ours = step(wrapped, batches[rank])
        reductions = sum(getattr(dist, name).call_count for name in names)
    if wrap is fsdp2:
        assert reductions == 2
    steps = {
        dtype: [step(stack(dtype, adapted), x.to(dtype)) for x in batches]
        for dtype in (torch.float64, torch.float32)
    }
    assert ours.keys() == steps[torch.float32][0].keys()
    for name, value in ours.items():
        high, low = (
            of[rank][name] if name in "xy" else sum(s[name] for s in of) / ranks.WORLD
            for of in steps.values()
        )
        assert_no_worse(name, value, high, low)


def of_layers(model: nn.Module) -> nn.Module:
    """FSDP2 around each layer of an HF model."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:  # type: ignore[attr-defined,union-attr]
        fully_shard(layer)
    return fully_shard(model)


def check_patched(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A patched model with biases in its MLPs, which are called in tiles, in checkpointed layers."""
    from liger_kernel.ops import tiled_mlp

    inputs = [ranks.moved(batch(seed=seed, ignored=0.0)) for seed in range(ranks.WORLD)]

    def gradients(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
        model.train()(**given, use_cache=False).loss.backward()
        grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        return {n: getattr(g, "full_tensor", lambda g=g: g)() for n, g in grads.items()}

    model: Any = build("llama").to(ranks.device())
    with (
        patch.object(tiled_mlp, "_tile_bytes", lambda _: 2**12),
        patch.object(tiled_mlp, "_MIN_ROWS", 6),
    ):
        liger_kernel.patch(model, long_context=True)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        ours = gradients(wrap(model), inputs[rank])
    high, low = (
        [gradients(build("llama", dtype).to(ranks.device()), given) for given in inputs]
        for dtype in (torch.float64, torch.float32)
    )
    for name, value in ours.items():
        wide, narrow = (
            sum(of[name] for of in all_ranks) / ranks.WORLD for all_ranks in (high, low)
        )
        assert_no_worse(name, value, wide, narrow)


SCENARIOS = {
    f"tiled MLP, {wrap.__name__}{', adapted' if adapted else ''}": (wrap, adapted)
    for wrap in (ddp, fsdp2, fsdp2_each_linear)
    for adapted in (False, True)
    if wrap is ddp or not ranks.LACKS_FSDP2
    if not (adapted and wrap is fsdp2_each_linear)
}


def checks() -> dict[str, ranks.Check]:
    wraps = [ddp, *[of_layers] * (not ranks.LACKS_FSDP2)]
    patched = {f"long_context, {w.__name__}": partial(check_patched, wrap=w) for w in wraps}
    found = {n: partial(check, wrap=w, adapted=a) for n, (w, a) in SCENARIOS.items()}
    return {**found, **patched}
