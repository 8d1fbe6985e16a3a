"""The modulated RMSNorm beyond the cases: what it is made of, its doors, the incumbent's helpers, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel import ops
from liger_kernel.backends import use_implementation
from liger_kernel.ops.modulated_rms_norm import modulated_rms_norm
from liger_kernel.ops.rms_norm import rms_norm
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import LigerModulatedRMSNorm
from liger_kernel.transformers.functional import liger_modulated_rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAKE = Make(torch.float32, DEVICE)
X, DY, WEIGHT = MAKE.randn(2, 6, 20), MAKE.randn(2, 6, 20), MAKE.randn(20)
SCALE, SHIFT = MAKE.randn(2, 20), MAKE.randn(2, 20)


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_implementation(request.param):
        yield


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("mode", ["llama", "gemma"])
def test_is_norm_and_modulation(mode: str) -> None:
    """A row of scale belongs to an entry of the batch."""

    def expected(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed = rms_norm(x, weight, 1e-5, 1.0, mode)
        return normed * (1 + scale[:, None]) + shift[:, None]

    inputs = X, WEIGHT, SCALE, SHIFT
    y = modulated_rms_norm(*inputs, 1e-5, 1.0, mode)
    with use_implementation("reference"):
        high = expected(*(t.double() for t in inputs))
        low = expected(*inputs)
    assert_no_worse("y", y, high, low)


@pytest.mark.usefixtures("implementation")
def test_every_door_leads_to_the_op() -> None:
    y = modulated_rms_norm(X, WEIGHT, SCALE, SHIFT)
    for door in (liger_modulated_rms_norm, ops.LigerModulatedRMSNormFunction.apply):
        assert torch.equal(door(X, WEIGHT, SCALE, SHIFT, 1e-6), y)
    module = LigerModulatedRMSNorm(20).to(DEVICE)
    module.weight.data = WEIGHT.clone()
    assert torch.equal(module(X, SCALE, SHIFT), y)
    bare = LigerModulatedRMSNorm(None, elementwise_affine=False)
    assert torch.equal(bare(X, SCALE), modulated_rms_norm(X, None, SCALE))
    assert "eps=1e-06" in repr(module)


@pytest.mark.parametrize("rows", [(), (2,), (2, 6)], ids=str)
@pytest.mark.parametrize("parts", [(WEIGHT, True), (None, False)], ids=["all", "scale-only"])
def test_helpers(rows: tuple[int, ...], parts: tuple[Any, bool]) -> None:
    weight, shifted = parts
    scale, shift = (Make(torch.float32, DEVICE, seed=s).randn(*rows, 20) for s in range(2))
    given = (X, weight, scale, shift if shifted else None)
    leaves = [None if t is None else t.clone().requires_grad_() for t in given]
    with use_implementation("triton"):
        y = modulated_rms_norm(*leaves)
        wanted = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], DY))
    made, rstd, block, warps, code, per_scale = ops.modulated_rms_norm_forward(
        *given, 1e-6, 0.0, "llama"
    )
    assert torch.equal(made, y)
    assert (rstd.shape, code, per_scale) == ((12,), 0, 12 // (scale.numel() // 20))
    found = ops.modulated_rms_norm_backward(
        DY, *given, rstd, 0.0, code, block, warps, per_scale, False
    )
    for grad, t in zip(found, given, strict=True):
        assert (grad is None) == (t is None)
        assert grad is None or (grad.shape == t.shape and torch.equal(grad, next(wanted)))


def test_compiles_to_one_graph() -> None:
    x = X.clone().requires_grad_()
    step = torch.compile(
        lambda x: modulated_rms_norm(2 * x, WEIGHT, SCALE, SHIFT),
        fullgraph=True,
        backend="aot_eager",
    )
    with use_implementation("reference"):
        assert torch.equal(step(x), modulated_rms_norm(2 * x, WEIGHT, SCALE, SHIFT))


def test_dtensors_are_refused() -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = DeviceMesh(DEVICE, [0, 1])
        x = DTensor.from_local(X, mesh, [Shard(0)], run_check=False)
        with pytest.raises(TypeError, match=r"takes no DTensors.*local shards"):
            modulated_rms_norm(x, WEIGHT, SCALE, SHIFT)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((X, WEIGHT, SCALE[:, :5]), ValueError, r"scale has shape \(2, 5\).*\(2, 6, 20\)"),
        ((X, WEIGHT, MAKE.randn(5, 20)), ValueError, r"scale has shape \(5, 20\).*evenly"),
        ((X, WEIGHT, SCALE[:0]), ValueError, r"scale has shape \(0, 20\).*evenly"),
        ((X, WEIGHT, SCALE, SHIFT[0]), ValueError, r"scale has shape \(2, 20\).*shift \(20,\)"),
        ((X, WEIGHT[:5], SCALE), ValueError, r"weight has shape \(5,\)"),
        ((X, WEIGHT, SCALE.to("meta")), ValueError, "on one device.*scale on meta"),
        ((X, WEIGHT, SCALE.long()), TypeError, r"scale .*torch\.int64"),
        ((X, WEIGHT, SCALE, None, 1e-6, 0.0, "other"), ValueError, "casting_mode='other'"),
    ],
)
def test_refused(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        modulated_rms_norm(*arguments)
