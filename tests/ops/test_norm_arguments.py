"""What the norms refuse: the parameters that do not fit, each with both values in the message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm
from liger_kernel.ops.layer_norm import layer_norm
from liger_kernel.ops.rms_norm import rms_norm

X = torch.randn(3, 8)
#: each takes x and one parameter
NORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "rms_norm": rms_norm,
    "add + rms_norm": lambda x, weight: fused_add_rms_norm(x, x, weight),
    "layer_norm weight": layer_norm,
    "layer_norm bias": lambda x, bias: layer_norm(x, None, bias),
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())


@every_norm
@pytest.mark.parametrize("shape", [(7,), (1,), (1, 8), ()], ids=str)
def test_parameter_of_another_shape(norm: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"last dimension of x is 8.*shape \(8,\)"):
        norm(X, torch.ones(shape))


@every_norm
def test_parameter_on_another_device(norm: Any) -> None:
    with pytest.raises(ValueError, match=r"on one device.*x on cpu.* on meta"):
        norm(X, torch.ones(8, device="meta"))


@every_norm
def test_integers(norm: Any) -> None:
    with pytest.raises(TypeError, match=r"floating dtype, got torch.int64"):
        norm(X, torch.ones(8, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must have a floating dtype, got torch.int64"):
        norm(X.long(), torch.ones(8))
