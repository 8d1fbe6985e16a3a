"""Fused linear cross entropy: what it may allocate, and shapes that matrix products find awkward."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy, reference
from liger_kernel.testing import assert_no_worse
from liger_kernel.testing.calls import call, drawing_on, leaves

pytestmark = pytest.mark.xdist_group("memory")

BF16 = torch.bfloat16
MARGIN = 16 * 2**20  # per-row vectors; rounding of blocks by the allocator


def drawn(
    rows: int, hidden: int, classes: int, ignored: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    with drawing_on("cuda", BF16) as make:
        labels = make.labels(rows, classes, ignored)
        return make.randn(rows, hidden), make.randn(classes, hidden, scale=hidden**-0.5), labels


def peak(function: Callable[[], Any]) -> int:
    """Bytes in use at most during the second call, beyond those before it."""
    function()  # compiles, and cuBLAS takes its workspace
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def step(tensors: tuple[Tensor, ...], wanted: set[int], **options: Any) -> Callable[[], Any]:
    """Forward and backward; only the inputs in `wanted` ask for a gradient."""
    args = leaves(tensors, wanted)

    def run() -> Any:
        loss = fused_linear_cross_entropy(*args, **options)[0]
        return torch.autograd.grad(loss, [args[i] for i in sorted(wanted)]) if wanted else loss

    return run


@pytest.mark.parametrize("accum_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "hidden", "classes"),
    [(4096, 1024, 65_537), (16_384, 512, 128_256), (9000, 2048, 32_000)],
)
def test_peak_memory(rows: int, hidden: int, classes: int, accum_dtype: torch.dtype) -> None:
    chunk = 1024
    slab, dx, dw = 2 * chunk * classes, 2 * rows * hidden, 2 * classes * hidden
    running = classes * hidden * accum_dtype.itemsize
    rounding = dw if accum_dtype != BF16 else 0  # the slab is gone by then
    allowed = dx + running + max(slab, rounding) + MARGIN
    assert allowed < 2 * rows * classes + dx + dw, (
        "this shape proves nothing: all logits would fit too"
    )
    found = peak(
        step(drawn(rows, hidden, classes), {0, 1}, chunk_size=chunk, accum_dtype=accum_dtype)
    )
    assert found <= allowed, f"{found / 2**20:.0f} MiB > {allowed / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    "wanted", [{0}, {1}, set()], ids=["frozen-head", "frozen-body", "no-gradient"]
)
def test_what_is_frozen_costs_no_memory(wanted: set[int]) -> None:
    rows, hidden, classes, chunk = 16_384, 4096, 16_385, 512
    dx, dw, slab = 2 * rows * hidden, 2 * classes * hidden, 2 * chunk * classes
    allowed = slab + MARGIN + (dx if 0 in wanted else 0) + (dw if 1 in wanted else 0)
    found = peak(step(drawn(rows, hidden, classes), wanted, chunk_size=chunk, accum_dtype=BF16))
    assert min(dx, dw) > 2 * MARGIN, "this shape proves nothing"
    assert found <= allowed, f"{found / 2**20:.0f} MiB > {allowed / 2**20:.0f} MiB"


@pytest.mark.parametrize("chunk_size", [None, 100])
@pytest.mark.parametrize(
    ("rows", "hidden", "classes"),
    [
        (1, 8, 7),
        (17, 65, 127),
        (300, 1024, 1000),
        (257, 129, 32_001),
        (300, 896, 151_937),
        (1030, 512, 50_257),
        (2049, 64, 8193),
        (129, 4096, 3),
    ],
)
def test_awkward_shapes(rows: int, hidden: int, classes: int, chunk_size: int | None) -> None:
    inputs = (*drawn(rows, hidden, classes), None, None)
    grads = {0: torch.randn((), device="cuda")}
    ours = call(
        fused_linear_cross_entropy, {"chunk_size": chunk_size}, leaves(inputs, {0, 1}), grads
    )
    high = call(
        reference.fused_linear_cross_entropy, {}, leaves(inputs, {0, 1}, torch.float64), grads
    )
    low = call(reference.fused_linear_cross_entropy, {}, leaves(inputs, {0, 1}), grads)
    assert_no_worse("loss", ours[0][0], high[0][0], low[0][0], elementwise=True)
    for i, name in ((0, "hidden"), (1, "weight")):
        assert_no_worse(f"gradient of {name}", ours[1][i], high[1][i], low[1][i])


def test_ignored_rows_have_no_gradient() -> None:
    hidden, weight, labels = drawn(2000, 256, 5003, ignored=0.5)
    args = leaves((hidden, weight, labels), {0, 1})
    loss = fused_linear_cross_entropy(*args, chunk_size=300)[0]
    dx = torch.autograd.grad(loss, args[0])[0]
    used = dx.abs().amax(1) > 0
    assert torch.equal(used, labels != -100)
