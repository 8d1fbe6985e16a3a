"""Rows that a cluster of programs shares: the same bits in a graph, and beside streams that keep the GPU busy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.backends import clusters, facts_of
from liger_kernel.functional import softmax

COLUMNS = (65536 + 48, 128256)


@pytest.fixture(autouse=True)
def shares(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels are those of clusters, or the test tests nothing."""
    if facts_of(torch.device("cuda", 0)).cluster == 1:
        pytest.skip("rows are shared where that was measured: on Hopper")
    launches: list[Any] = []
    constants = clusters.SharedRow.constants

    def counted(self: Any) -> dict[str, int]:
        launches.append(self)
        return constants(self)

    monkeypatch.setattr(clusters.SharedRow, "constants", counted)
    yield
    assert launches


def softmax_and_gradient(x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = softmax(x)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


@pytest.mark.parametrize("columns", COLUMNS)
def test_to_the_bit_beside_other_work(columns: int) -> None:
    torch.manual_seed(0)
    rows = 300  # more than the device holds at once
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 3
    dy = torch.randn_like(x)
    expected = softmax_and_gradient(x, dy)
    alone = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(alone):
        for _ in range(400):
            a @ a
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = softmax_and_gradient(x, dy)
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(100):
        with torch.cuda.stream(beside):
            found = softmax_and_gradient(x, dy)
            unequal = torch.stack([(b != e).any() for b, e in zip(found, expected, strict=True)])
        for b in captured:
            b.fill_(float("nan"))
        graph.replay()
        for b, e in zip(captured, expected, strict=True):
            wrong += (b != e).any()
        torch.cuda.current_stream().wait_stream(beside)
        wrong += unequal.sum()
        beside.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert wrong.item() == 0
