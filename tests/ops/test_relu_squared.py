"""Squared ReLU beyond the cases: NaN, its doors, torch.compile, tensor parallelism, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from liger_kernel import ops
from liger_kernel.backends import use_implementation
from liger_kernel.ops.relu_squared import relu_squared
from liger_kernel.testing import Make
from liger_kernel.transformers import LigerReLUSquared
from liger_kernel.transformers.functional import liger_relu_squared

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
X, DY = (Make(torch.bfloat16, DEVICE, seed=s).randn(2, 3, 20) for s in range(2))


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_implementation(request.param):
        yield


@pytest.mark.usefixtures("implementation")
def test_not_a_number_stays_so() -> None:
    x = torch.tensor([float("nan"), -1.0, 2.0], device=DEVICE, requires_grad=True)
    y = relu_squared(x)
    y.sum().backward()
    assert y.isnan().tolist() == x.grad.isnan().tolist() == [True, False, False]
    assert y.tolist()[1:] == [0, 4]
    assert x.grad.tolist()[1:] == [0, 4]


@pytest.mark.usefixtures("implementation")
def test_every_door_leads_to_the_op() -> None:
    x = X.clone().requires_grad_()
    y = relu_squared(x)
    (dx,) = torch.autograd.grad(y, x, DY)
    for door in (LigerReLUSquared(), liger_relu_squared, ops.LigerReLUSquaredFunction.apply):
        assert torch.equal(door(X), y)
    made = ops.relu_squared_forward(x)
    assert torch.equal(made, y)
    assert not made.requires_grad
    assert torch.equal(ops.relu_squared_backward(x.detach(), DY), dx)


def test_compiles_to_one_graph() -> None:
    x = X.float().requires_grad_()
    y = torch.compile(lambda t: relu_squared(t) + 1, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, relu_squared(x) + 1)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"x must have a floating dtype, got torch\.int64"):
        relu_squared(torch.ones(3, dtype=torch.int64))


def test_a_partial_sum_is_made_whole_first() -> None:
    from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = DeviceMesh(DEVICE, [0, 1])
        x = DTensor.from_local(X, mesh, [Partial()], run_check=False)
        with use_implementation("triton"):
            assert relu_squared(x).placements == (Replicate(),)
    finally:
        torch.distributed.destroy_process_group()
