"""Softmax and sparsemax beyond the cases: rows that are no numbers, ties, no columns, many rows, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from liger_kernel.backends import use_implementation
from liger_kernel.ops.softmax import softmax
from liger_kernel.ops.sparsemax import sparsemax
from liger_kernel.testing import Make, assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
both = pytest.mark.parametrize("op", [softmax, sparsemax])


@pytest.fixture(params=["reference", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_implementation(request.param):
        yield


@both
@pytest.mark.parametrize("columns", [5, 40_000])
def test_rows_that_are_no_numbers(op: Any, columns: int) -> None:
    """And the rows beside them are, in the same tile."""
    x = Make(torch.float32, DEVICE).randn(5, columns)
    x[0] = -INF
    x[1, -1] = NAN
    x[2, 1] = INF
    x[3, 1:] = -INF
    y = op(x)
    assert y[:3].isnan().all()
    assert y[3].tolist() == [1.0] + [0.0] * (columns - 1)
    high, low = (torch.softmax(t[4:], -1) for t in (x.double(), x))
    if op is sparsemax:
        assert torch.equal(y[4:], op(x[4:].contiguous()))
    else:
        assert_no_worse("row 4", y[4:], high, low)


@both
@pytest.mark.parametrize("shape", [(3, 0), (0,), (0, 4, 0)], ids=str)
def test_no_columns(op: Any, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    y = op(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@both
def test_many_rows(op: Any) -> None:
    y = op(torch.zeros(70_001, 4, device=DEVICE))
    assert torch.equal(y, torch.full_like(y, 0.25))


@both
def test_refused(op: Any) -> None:
    with pytest.raises(TypeError, match=r"x must have a floating dtype, got torch\.int64"):
        op(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(\).*last dimension"):
        op(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1.0, 0.0, -1.0], [1.0, 0.0, 0.0]),  # 0 is tau
        ([0.5, 0.5, 0.0], [0.5, 0.5, 0.0]),  # likewise, of two
        ([3.0, 3.0, 3.0, 3.0], [0.25] * 4),
        ([1.0, 0.5, 0.25, 0.125], [0.75, 0.25, 0.0, 0.0]),
        ([-INF, 2.0, 1.5, -INF], [0.0, 0.75, 0.25, 0.0]),
        ([7.0], [1.0]),
    ],
    ids=str,
)
def test_ties_of_sparsemax(row: list[float], expected: list[float], dtype: torch.dtype) -> None:
    """Values at tau are outside the support, and get no gradient."""
    x = torch.tensor(row, dtype=dtype, device=DEVICE, requires_grad=True)
    y = sparsemax(x)
    assert torch.equal(y, torch.tensor(expected, dtype=torch.float64, device=DEVICE).to(dtype))
    dy = torch.arange(len(row), dtype=dtype, device=DEVICE)
    y.backward(dy)
    support = [i for i, value in enumerate(expected) if value]
    mean = sum(support) / len(support)
    wanted = [i - mean if i in support else 0.0 for i in range(len(row))]
    assert torch.equal(x.grad, torch.tensor(wanted, dtype=dtype, device=DEVICE))


def test_dimensions_of_sparsemax() -> None:
    x = Make(torch.float32, DEVICE).randn(3, 4, 5)
    for dim in range(-3, 3):
        y = sparsemax(x, dim)
        assert torch.equal(y, sparsemax(x.movedim(dim, -1).contiguous()).movedim(-1, dim))
    with pytest.raises(IndexError, match="Dimension out of range"):
        sparsemax(x, 3)
