"""All logits in stripes of classes: the numbers and gradients of chunks of rows, one product less, no more memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from liger_kernel import backends
from liger_kernel.backends.records import ChunkSizes
from liger_kernel.functional import LogProbs, linear_logprobs
from liger_kernel.loss_head import plan
from liger_kernel.loss_head.linear_logprobs.cases import SPEC
from liger_kernel.loss_head.stripes import Layout, Stripes
from liger_kernel.ops.logprobs.contract import NUMBERS
from liger_kernel.testing import Make, assert_draws_no_worse
from tests.loss_head.test_fused_linear_cross_entropy import Watch
from tests.who_keeps import where_torch_tells

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY: dict[str, Any] = dict.fromkeys(NUMBERS[1:], True)


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> list[Stripes]:
    """What backwards were by stripes; chunks are of three rows, so that there are some."""
    sizes = ChunkSizes(most_rows=3, fewest_rows=3, fewest_rows_narrow_sum=3, multiple=1)
    monkeypatch.setattr(plan, "chunk_sizes", lambda device: sizes)
    backward, found = Stripes.backward, []

    def counted(stripes: Stripes, *given: Any) -> Any:
        found.append(stripes)
        return backward(stripes, *given)

    monkeypatch.setattr(Stripes, "backward", counted)
    return found


def drawn(
    n: int, h: int, v: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    make = Make(dtype, DEVICE, seed)
    tensors = [make.randn(n, h), make.randn(v, h, scale=0.5), make.randn(v, scale=0.3)]
    return [*(t.requires_grad_() for t in tensors), make.labels(n, v, 0.3)]


def total(found: LogProbs) -> Tensor:
    """A weighted sum of all numbers."""
    outputs = [o for o in found[:5] if o is not None]
    rows = torch.linspace(0.5, 2, outputs[0].numel()).to(outputs[0])
    return sum(((i + 1) * (o * rows).sum() for i, o in enumerate(outputs)), rows.new_zeros(()))


# as many rows as can be, and fewer than the hidden states are wide
@pytest.mark.parametrize(
    ("sizes", "dtype", "implementation"),
    [
        ((16, 8, 137), torch.float32, "reference"),
        ((16, 8, 137), torch.bfloat16, "triton"),
        ((15, 8, 203), torch.float16, "reference"),
        ((7, 16, 61), torch.bfloat16, "reference"),
        ((7, 16, 61), torch.float32, "triton"),
        ((8, 8, 2), torch.float16, "triton"),
    ],
    ids=str,
)
def test_numbers_and_gradients(
    sizes: tuple[int, int, int], dtype: torch.dtype, implementation: str, used: list[Stripes]
) -> None:
    each = torch.linspace(0.5, 1.5, sizes[0], device=DEVICE)
    options = {"softcap": 3.0, "scale": 1.5, "top1": True, **EVERY}

    def draw(seed: int) -> list[dict[str, Any]]:
        states, weight, bias, ids = drawn(*sizes, dtype, seed)
        runs = []
        for function, to in (
            (SPEC.function, dtype), (SPEC.reference, torch.float64), (SPEC.reference, dtype)
        ):  # fmt: skip
            given = [t.detach().to(to).requires_grad_() for t in (states, weight, bias)]
            with backends.use_implementation(implementation):
                found = function(*given[:2], ids, given[2], each, **options)
                grads = torch.autograd.grad(total(found), given)
            of = dict(zip(NUMBERS, found[:5], strict=True))
            runs.append({**of, **dict(zip(("dX", "dW", "db"), grads, strict=True))})
        return runs

    assert_draws_no_worse(draw)
    assert used


def test_the_logits_are_made_once_in_the_memory_of_two_chunks(used: list[Stripes]) -> None:
    """And a second backward, which makes them again, gives the same bits."""
    n, h, v = 16, 8, 208
    states, weight, _, _ = drawn(n, h, v)
    ids = torch.arange(n, device=DEVICE)
    with Watch() as watch, backends.use_implementation("reference"):
        loss = total(linear_logprobs(states, weight, ids, **EVERY))
        stripes = watch.products
        first = torch.autograd.grad(loss, (states, weight), retain_graph=True)
        assert watch.products == 3 * stripes
        assert max(watch.made) == n * v // 2 == v * h
        again = torch.autograd.grad(loss, (states, weight))
        assert watch.products == 6 * stripes
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(used) == 2
    assert len(used[0].layout.bounds) == stripes > 3
    assert first[1].untyped_storage().nbytes() == first[1].nbytes


def test_only_where_it_takes_no_more_memory(used: list[Stripes]) -> None:
    states, weight, bias, ids = drawn(16, 8, 50)
    states.requires_grad_(False)
    total(linear_logprobs(states, weight, ids, bias=bias.detach(), **EVERY)).backward()
    assert used.pop()
    assert states.grad is bias.grad is None
    states.requires_grad_()
    long, _, _, many = drawn(40, 8, 50)
    for given, options in (
        ((states, weight.detach(), ids), {}),
        ((states, weight, ids), {"top_k": 2}),
        ((states, weight, ids), {"chunk_size": 5}),
        ((states, weight, ids), {"memory_budget": 50 * 4 * 5}),
        ((states[:1], weight, ids[:1]), {}),  # one chunk
        ((long, weight, many.clamp(min=0)), {}),
    ):
        total(linear_logprobs(*given, **EVERY, **options)).backward()
    with torch.autocast(DEVICE, torch.bfloat16):
        total(linear_logprobs(states, weight, ids)).backward()
    assert not used
    assert weight.grad is not None


def test_rows_that_count(used: list[Stripes]) -> None:
    """Ignored rows that are known have no memory, and gradients of 0."""
    states, weight, _, _ = drawn(40, 8, 50)
    ids = torch.arange(40, device=DEVICE).masked_fill(torch.arange(40, device=DEVICE) % 3 > 0, -100)
    found = linear_logprobs(states, weight, ids, label_count=14, **EVERY)
    (dx,) = torch.autograd.grad(total(found), states)
    assert used[0].layout.n_rows == 14
    assert dx.any(1).tolist() == (ids >= 0).tolist()


@where_torch_tells
def test_a_checkpoint_keeps_nothing(used: list[Stripes]) -> None:
    states, weight, _, ids = drawn(16, 8, 50)
    loss = checkpoint(lambda x: total(linear_logprobs(x, weight, ids)), states, use_reentrant=False)
    loss.backward()
    assert not used


@pytest.mark.parametrize("multiple", [1, 8])
def test_no_logits_are_overwritten_that_are_still_read(multiple: int) -> None:
    """What a stripe gives to dW, at its place, touches no logits of the stripes after it in the same memory."""
    for n_rows, hidden, n_classes in (
        (16, 8, 203), (15, 8, 203), (9, 8, 203), (8, 8, 203), (3, 8, 203), (16, 8, 1), (16, 8, 3),
        (1023, 512, 1000), (513, 512, 1000),
    ):  # fmt: skip
        layout = Layout(n_rows, n_classes, hidden, multiple)
        assert layout.bounds[-1] == layout.half <= n_classes // 2
        assert layout.start(0) >= 0
        assert len(layout.bounds) <= 8
        for stop in layout.bounds[1:]:
            assert stop * hidden <= layout.start(stop)
