"""Labels that are ignored cost the fused loss nothing where their number is known."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel import backends
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy, reference
from liger_kernel.loss_head.label_count import LabelCount, kept_rows
from liger_kernel.ops.cross_entropy import portable
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.testing.calls import call, leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, HIDDEN, CLASSES = 80, 16, 50
OPTIONS = {
    "label_smoothing": 0.1,
    "return_z_loss": True,
    "lse_square_scale": 1e-3,
    "return_token_accuracy": True,
    "return_predicted_tokens": True,
    "chunk_size": 3,
}


def drawn(dtype: torch.dtype, ignored: float) -> tuple[Tensor | None, ...]:
    make = Make(dtype, DEVICE)
    hidden, weight = make.randn(N, HIDDEN), make.randn(CLASSES, HIDDEN)
    return hidden, weight, make.labels(N, CLASSES, ignored), make.randn(CLASSES), None


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step computes."""
    seen: list[int] = []
    step = portable.step

    @functools.wraps(step)  # it still has the parameters of the contract
    def counting(logits: Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append(logits.shape[0])
        step(logits, *args, **kwargs)

    monkeypatch.setattr(portable, "step", counting)
    return seen


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("more", [0, 7], ids=["exact", "too-many"])
@pytest.mark.parametrize("ignored", [0.9, 0.4, 1.0])
def test_same_numbers_from_fewer_rows(
    reduction: str, more: int, ignored: float, computed: list[int]
) -> None:
    inputs = drawn(torch.float32, ignored)
    assert inputs[2] is not None
    count = int((inputs[2] != -100).sum()) + more
    options = {**OPTIONS, "reduction": reduction}
    grads = {0: torch.randn(N if reduction == "none" else (), device=DEVICE)}
    wanted = {0, 1, 3}
    with backends.use_implementation("reference"):
        ours = call(
            fused_linear_cross_entropy,
            {**options, "label_count": count},
            leaves(inputs, wanted),
            grads,
        )
    assert sum(computed) == count * (2 if reduction == "none" else 1)
    plain = {k: v for k, v in options.items() if k != "chunk_size"}
    high = call(
        reference.fused_linear_cross_entropy, plain, leaves(inputs, wanted, torch.float64), grads
    )
    low = call(reference.fused_linear_cross_entropy, plain, leaves(inputs, wanted), grads)
    for i, name in enumerate(("loss", "z_loss", "token_accuracy", "predicted_tokens")):
        assert_no_worse(name, ours[0][i], high[0][i], low[0][i])
    for i in wanted:
        assert_no_worse(f"gradient of input {i}", ours[1][i], high[1][i], low[1][i])


def test_counted_on_the_device_without_a_stall() -> None:
    target = drawn(torch.float32, 0.5)[2]
    assert target is not None
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        count = LabelCount(target)
        number = int(count)
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert number == int(count) == int((target != -100).sum())


def test_rows_are_left_out_only_where_it_pays() -> None:
    target = torch.arange(64, device=DEVICE)
    target[5] = -100
    assert kept_rows(target, -100, 63) is None
    target[3:9] = -100
    kept = kept_rows(target, -100, 58)
    assert kept is not None
    assert torch.equal(target[kept], target[target != -100])
    assert kept_rows(target, -100, None) is None or DEVICE == "cpu"


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the assertion ends the process")
def test_a_count_too_small_is_an_error() -> None:
    inputs = drawn(torch.float32, 0.5)
    assert inputs[2] is not None
    count = int((inputs[2] != -100).sum())
    with pytest.raises(RuntimeError, match="more labels than label_count"):
        fused_linear_cross_entropy(*inputs, label_count=count - 1)


def test_arguments_are_checked() -> None:
    inputs = drawn(torch.float32, 0.5)
    assert inputs[2] is not None
    for count, words in (
        (N + 1, f"label_count={N + 1} for {N} labels"),
        (-1, "label_count=-1"),
        (LabelCount(inputs[2], 0), "ignore_index=0, but the loss has -100"),
    ):
        with pytest.raises(ValueError, match=words):
            fused_linear_cross_entropy(*inputs, label_count=count)
