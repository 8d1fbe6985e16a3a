"""Processors of all makers: what their record says, and that losses are right by either way of multiplying."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from liger_kernel import backends
from liger_kernel.backends import cpu
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernel.testing import Make, specs
from liger_kernel.testing.calls import assert_as_exact, drawn

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("machine", "amx", "bf16", "multiplies"),
    [
        ("x86_64", False, True, False),  # AVX-512 with BF16: fp32 is as fast
        ("x86_64", True, True, True),
        ("AMD64", False, False, False),
        ("aarch64", False, True, True),
        ("arm64", False, False, False),
    ],
)
def test_16_bits_are_multiplied_where_there_are_units_for_them(
    machine: str, amx: bool, bf16: bool, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16, raising=False)
    assert cpu.facts(CPU).wide_products_are_free == (not multiplies)


@pytest.fixture(params=[False, True], ids=["fp32", "bf16"])
def multiplies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: request.param)
    backends.forget()
    yield request.param
    monkeypatch.undo()
    backends.forget()


@pytest.mark.parametrize("name", ["fused_linear_cross_entropy", "linear_logprobs"])
def test_a_head_is_as_exact_by_either_product(name: str, multiplies: bool) -> None:
    spec = specs()[name]

    def draw(seed: int) -> Any:
        return drawn(spec, spec.cases[0], Make(torch.bfloat16, "cpu", seed))

    assert_as_exact(spec, spec.cases[0], *draw(0), draw)


def test_gradients_too_small_for_float16_are_kept_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of thousands of classes that are all about as likely; `tests/loss_head` judges those numbers by the first way."""
    make = Make(torch.float32, "cpu")
    hidden = make.randn(600, 8, scale=0.1).requires_grad_()
    weight, labels = make.randn(700, 8, scale=0.1).requires_grad_(), make.labels(600, 700)
    found = []
    for multiplies in (False, True):
        monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: multiplies)  # noqa: B023
        backends.forget()
        with torch.autocast("cpu", torch.float16):
            loss = fused_linear_cross_entropy(hidden, weight, labels, chunk_size=64)[0]
        found.append(torch.autograd.grad(loss, (hidden, weight)))
    monkeypatch.undo()
    backends.forget()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
