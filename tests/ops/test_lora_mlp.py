"""Which gated blocks with adapters get kernels of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from liger_kernel.backends import use_implementation
from liger_kernel.ops import lora_mlp
from liger_kernel.ops.glu.contract import GLUOptions
from liger_kernel.ops.lora_linear import Adapter
from liger_kernel.ops.lora_mlp import triton as kernels
from liger_kernel.testing import Make

BF16 = torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def launched(
    monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...] = (2,), **of_adapters: Any
) -> list[str]:
    """Kernels of one step of a block, each of whose Linears has adapters of these ranks."""
    found: list[str] = []
    launch = kernels._launch

    def noted(kernel: Any, *args: Any) -> None:
        found.append(kernel.fn.__name__)
        launch(kernel, *args)

    monkeypatch.setattr(kernels, "_launch", noted)
    make = Make(BF16, DEVICE, seed=0)
    layers = []
    for n_out, n_in in ((24, 16), (24, 16), (16, 24)):
        thin = [
            Adapter(make.randn(r, n_in).to(**of_adapters), make.randn(n_out, r).to(**of_adapters), 0.5) for r in ranks
        ]  # fmt: skip
        for a in thin:
            a.lora_a.requires_grad_()
            a.lora_b.requires_grad_()
        layers.append(lora_mlp.Layer(make.randn(n_out, n_in), None, thin))
    with use_implementation("triton"):
        gate, up, down = layers
        y = lora_mlp.adapted(make.randn(5, 16), gate, up, down, GLUOptions())
        y.sum().backward()
    return found


def test_one_kernel_a_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch) == ["_lora_glu_fwd", "_lora_glu_bwd"]


@pytest.mark.parametrize(
    ("ranks", "dtype"), [((kernels.RANK + 1,), BF16), ((2, 3), BF16), ((2,), torch.float32)]
)
def test_gemms_for_high_ranks_several_adapters_and_wide_ones(
    ranks: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launched(monkeypatch, ranks, dtype=dtype) == []
