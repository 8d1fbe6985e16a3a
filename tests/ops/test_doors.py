"""The ways to an op: its module, its functional form and its Function give what the op gives, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from liger_kernel import functional, ops
from liger_kernel.backends import use_implementation
from liger_kernel.testing import Make
from liger_kernel.transformers import (
    LigerDyT,
    LigerGroupNorm,
    LigerPolyNorm,
    LigerSoftmax,
    LigerSparsemax,
)
from liger_kernel.transformers import functional as legacy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAKE = Make(torch.float32, DEVICE)
X, DY = MAKE.randn(4, 6, 20), MAKE.randn(4, 6, 20)
ALPHA, GAMMA, BETA = (MAKE.randn(n) for n in (1, 20, 20))


@dataclass(frozen=True)
class Doors:
    """`op(x, *parameters)`; `others` are called likewise, `module(x)` once its parameters are `parameters`."""

    op: Callable[..., Tensor]
    parameters: tuple[Tensor, ...]
    others: tuple[Callable[..., Tensor], ...]
    module: nn.Module


DOORS = {
    "softmax": Doors(
        functional.softmax,
        (),
        (legacy.liger_softmax, ops.LigerSoftmaxFunction.apply),
        LigerSoftmax(),
    ),
    "sparsemax": Doors(
        functional.sparsemax,
        (),
        (legacy.liger_sparsemax, lambda x: ops.LigerSparsemaxFunction.apply(x, -1)),
        LigerSparsemax(),
    ),
    "dyt": Doors(
        functional.dyt,
        (ALPHA, GAMMA, BETA),
        (legacy.liger_dyt, ops.LigerDyTFunction.apply, ops.liger_dyt_fwd),
        LigerDyT(20),
    ),
    "group_norm": Doors(
        lambda x, weight, bias: functional.group_norm(x, weight, bias, 3, 1e-6),
        (GAMMA[:6], BETA[:6]),
        (
            lambda x, weight, bias: legacy.liger_group_norm(x, weight, bias, 6, 3, 1e-6),
            lambda *tensors: ops.LigerGroupNormFunction.apply(*tensors, 6, 3, 1e-6),
        ),
        LigerGroupNorm(6, 3, bias=True),
    ),
    "poly_norm": Doors(
        functional.poly_norm,
        (GAMMA[:3], ALPHA[0]),
        (legacy.liger_poly_norm, ops.LigerPolyNormFunction.apply),
        LigerPolyNorm(),
    ),
}
every_op = pytest.mark.parametrize("doors", DOORS.values(), ids=DOORS.keys())


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_implementation(request.param):
        yield


@every_op
@pytest.mark.usefixtures("implementation")
def test_every_door_leads_to_the_op(doors: Doors) -> None:
    x = X.clone().requires_grad_()
    y = doors.op(x, *doors.parameters)
    for door in doors.others:
        assert torch.equal(door(X, *doors.parameters), y)
    module = doors.module.to(DEVICE)
    for parameter, value in zip(module.parameters(), doors.parameters, strict=True):
        assert parameter.shape == value.shape
        parameter.data = value.clone()
    found = module(x)
    assert torch.equal(found, y)
    ours, theirs = (torch.autograd.grad(out, x, DY)[0] for out in (y, found))
    assert torch.equal(ours, theirs)
    assert type(module).__name__ in repr(module)


@every_op
def test_compiles_to_one_graph(doors: Doors) -> None:
    x = X.clone().requires_grad_()

    def step(x: Tensor) -> Tensor:
        return doors.op(2 * x, *doors.parameters) + 1

    with use_implementation("reference"):
        expected = step(x)
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, expected)
    (found,), (wanted,) = (torch.autograd.grad(out, x, DY) for out in (y, expected))
    assert torch.equal(found, wanted)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Rank 0 of a pretended world of two."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield DeviceMesh(DEVICE, [0, 1])
    torch.distributed.destroy_process_group()


@every_op
@pytest.mark.usefixtures("implementation")
def test_rows_of_a_dtensor_stay_where_they_are(doors: Doors, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    leaves = [t.clone().requires_grad_() for t in (X, *doors.parameters)]
    plain = [t.clone().requires_grad_() for t in (X, *doors.parameters)]
    sharded = DTensor.from_local(leaves[0], mesh, [Shard(0)], run_check=False)
    y = doors.op(sharded, *leaves[1:])
    expected = doors.op(*plain)
    assert (y.placements, y.shape) == ((Shard(0),), (8, 6, 20))
    assert torch.equal(y.to_local(), expected)
    y.backward(DTensor.from_local(DY, mesh, [Shard(0)], run_check=False))
    expected.backward(DY)
    assert torch.equal(leaves[0].grad, plain[0].grad)
    whole = DTensor.from_local(X, mesh, [Shard(2)], run_check=False)
    parameters = (t.repeat(2) if t.numel() == 20 else t for t in doors.parameters)
    assert doors.op(whole, *parameters).placements == (Replicate(),)
