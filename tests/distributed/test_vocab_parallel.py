"""Losses over classes that are spread over two and four processes: what one process makes of all classes.

On GPUs where there are two, and four of them for the cases of four.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from liger_kernel import backends
from liger_kernel.distributed.vocab_parallel_cross_entropy import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from liger_kernel.distributed.vocab_parallel_logprobs import (
    vocab_parallel_linear_logprobs,
    vocab_parallel_logprobs,
)
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.ops.cross_entropy.reference import terms
from liger_kernel.ops.logprobs import logprobs
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import LigerVocabParallelCrossEntropy, functional
from tests.transformers import ranks

WORLD = 2 if 2 <= torch.cuda.device_count() < 4 else 4
N, H = 11, 6
ON = ranks.device()
SIZES = [(size, classes) for size, classes in ((2, 37), (4, 5)) if size <= WORLD]
REPORTS = dict.fromkeys(("return_z_loss", "return_token_accuracy", "return_predicted_tokens"), True)
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none", "label_smoothing": 0.2, "ignore_index": 1},
    "all": {"lse_square_scale": 1e-2, "label_smoothing": 0.1, "softcap": 4.0, **REPORTS},
}
_groups: dict[int, Any] = {}


def group_of(size: int) -> Any:
    """All four ranks, or the half that this one is in."""
    if not _groups:
        halves = [dist.new_group([first, first + 1]) for first in range(0, WORLD, 2)]
        _groups.update({2: halves[dist.get_rank() // 2], WORLD: dist.group.WORLD})
    return _groups[size]


def own(size: int, t: Tensor, dim: int) -> Tensor:
    """The part of t that is this rank's."""
    largest, rank = -(-t.shape[dim] // size), dist.get_rank(group_of(size))
    first = min(rank * largest, t.shape[dim])
    return t.narrow(dim, first, min(largest, t.shape[dim] - first))


def drawn_labels(make: Make, classes: int, options: dict[str, Any]) -> Tensor:
    return make.labels(N, classes, 0.3, options.get("ignore_index", -100))


def upstream(loss: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, max(1, loss.numel())).to(loss).view_as(loss)


def compare(ours: Any, high: Any, low: Any) -> None:
    for name, *values in zip(ours, ours.values(), high.values(), low.values(), strict=True):
        if values[0] is not None and values[0].is_floating_point():
            assert_no_worse(name, *values)
        else:
            assert values[0] is values[1] is None or torch.equal(values[0], values[1])


NAMES = ("loss", "z_loss", "token_accuracy", "predicted_tokens")


def in_one_graph(function: Any, options: dict[str, Any]) -> Any:
    """`function`, compiled if the options say so."""
    compiled = options.pop("compiled", False)
    return torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function


def of_logits(rank: int, size: int, classes: int, dtype: torch.dtype, **options: Any) -> None:
    make, function = Make(dtype, ON), in_one_graph(vocab_parallel_cross_entropy, options)
    logits, labels = make.strided(N, classes, scale=3), drawn_labels(make, classes, options)

    def whole(dtype: torch.dtype) -> dict[str, Any]:
        leaf = logits.to(dtype).requires_grad_()
        found = terms(leaf, labels, **options)
        found[0].backward(upstream(found[0]))
        return {**dict(zip(NAMES, found, strict=True)), "grad": own(size, leaf.grad, 1)}

    leaf = own(size, logits, 1).detach().requires_grad_()
    before = leaf.detach().clone()
    found = function(leaf, labels, group_of(size), n_classes=classes, **options)
    for _ in range(2):  # a second backward changes nothing
        leaf.grad = None
        found[0].backward(upstream(found[0]), retain_graph=True)
    assert torch.equal(leaf.detach(), before)
    ours = {**dict(zip(NAMES, found, strict=True)), "grad": leaf.grad}
    compare(ours, whole(torch.float64), whole(dtype))


def of_hidden(rank: int, size: int, classes: int, dtype: torch.dtype, **options: Any) -> None:
    make = Make(dtype, ON)
    hidden, weight, bias = make.randn(N, H), make.randn(classes, H), make.randn(classes)
    labels = drawn_labels(make, classes, options)
    function = in_one_graph(vocab_parallel_linear_cross_entropy, options)

    def whole(dtype: torch.dtype) -> dict[str, Any]:
        x, w, b = (t.to(dtype).requires_grad_() for t in (hidden, weight, bias))
        found = terms(F.linear(x, w, b), labels, **options)
        found[0].backward(upstream(found[0]))
        grads = {"dx": x.grad, "dw": own(size, w.grad, 0), "db": own(size, b.grad, 0)}
        return {**dict(zip(NAMES, found, strict=True)), **grads}

    x = hidden.detach().requires_grad_()
    w, b = (own(size, t, 0).detach().requires_grad_() for t in (weight, bias))
    chunks = ChunkOptions(memory_budget=3 * 4 * classes)
    found = function(x, w, labels, group_of(size), b, n_classes=classes, chunks=chunks, **options)
    found[0].backward(upstream(found[0]))
    grads = {"dx": x.grad, "dw": w.grad, "db": b.grad}
    compare({**dict(zip(NAMES, found, strict=True)), **grads}, whole(torch.float64), whole(dtype))


NUMBERS = ("log_prob", "entropy", "logsumexp", "sum_p2", "mean_logit")
REQUESTS = dict.fromkeys((*NUMBERS[1:], "top1"), True)


def of_tokens(
    rank: int, size: int, classes: int, dtype: torch.dtype, linear: bool, **options: Any
) -> None:
    """Log-probabilities and the rest, with a temperature for each token, or one and a soft-cap."""
    make = Make(dtype, ON)
    hidden, weight = make.randn(N, H), make.randn(classes, H)
    logits, labels = make.randn(N, classes, scale=3), drawn_labels(make, classes, options)
    inputs = (hidden, weight) if linear else (logits,)
    warmth = make.randn(N).abs() + 0.5
    temperature = options.pop("temperature", warmth)

    def result(found: Any, grads: dict[str, Tensor]) -> dict[str, Any]:
        numbers = {name: value for name, value in found._asdict().items() if value is not None}
        return {**numbers, **grads}

    def backward(found: Any) -> None:
        sum((getattr(found, name) * upstream(found.log_prob)).sum() for name in NUMBERS).backward()

    def whole(dtype: torch.dtype) -> dict[str, Any]:
        x, *w = (t.to(dtype).requires_grad_() for t in inputs)
        warm = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
        with backends.use_implementation("reference"):
            found = logprobs(
                F.linear(x, *w) if w else x, labels, temperature=warm, **REQUESTS, **options
            )
            backward(found)
        grads = {"dw": own(size, w[0].grad, 0), "dx": x.grad} if w else {"dx": own(size, x.grad, 1)}
        return result(found, grads)

    how = {"n_classes": classes, "temperature": temperature, **REQUESTS, **options}
    if linear:
        x = hidden.detach().requires_grad_()
        w = own(size, weight, 0).detach().requires_grad_()
        chunks = ChunkOptions(chunk_size=3)
        found = vocab_parallel_linear_logprobs(x, w, labels, group_of(size), chunks=chunks, **how)
        backward(found)
        ours = result(found, {"dw": w.grad, "dx": x.grad})
    else:
        x = own(size, logits, 1).detach().requires_grad_()
        found = vocab_parallel_logprobs(x, labels, group_of(size), **how)
        backward(found)
        ours = result(found, {"dx": x.grad})
    compare(ours, whole(torch.float64), whole(dtype))


def as_verl_calls_it(rank: int) -> None:
    make, size = Make(torch.float32, ON), WORLD
    hidden, weight, labels = make.randn(N, H), make.randn(20, H), make.labels(N, 20, 0.3)

    def whole(dtype: torch.dtype) -> dict[str, Any]:
        x = hidden.to(dtype).requires_grad_()
        found = logprobs(F.linear(x, weight.to(dtype)), labels, temperature=0.7, entropy=True)
        (found.entropy.sum() - found.log_prob.sum()).backward()  # type: ignore[union-attr]
        return {"nll": -found.log_prob, "entropy": found.entropy, "dx": x.grad}

    x = hidden.clone().requires_grad_()
    nll, entropy = functional.liger_fused_linear_scaled_cross_entropy_tp(
        x, own(size, weight, 0), labels, group_of(size), 0.7, -100, 1, True
    )
    (nll.sum() + entropy.sum()).backward()
    with backends.use_implementation("reference"):
        high = whole(torch.float64)
    compare({"nll": nll, "entropy": entropy, "dx": x.grad}, high, whole(torch.float32))


def megatron(rank: int, size: int, formula: str, mode: str) -> None:
    """The module, by the formulas written down with one rank's logits and the global sums."""
    make, n, a = Make(torch.float32, ON), 6 * size, 0.3
    logits, labels = make.randn(3, 2, n), make.labels(6, n, 0.3).view(3, 2)
    loss = LigerVocabParallelCrossEntropy(
        label_smoothing=a, label_smoothing_formula=formula, label_smoothing_mode=mode
    )

    def whole(dtype: torch.dtype) -> dict[str, Any]:
        leaf = logits.to(dtype).requires_grad_()
        logp = leaf.log_softmax(-1)
        smoothed = own(size, logp, 2) if mode == "partition" else logp
        k = smoothed.shape[-1]
        alpha = a * k / (k - 1) if formula == "megatron" else a
        nll = -logp.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        found = (1 - alpha) * nll - alpha * smoothed.mean(-1)
        found = found.masked_fill(labels == -100, 0)
        found.backward(upstream(found))
        return {"loss": found.detach(), "grad": own(size, leaf.grad, 2)}

    leaf = own(size, logits, 2).detach().requires_grad_()
    found = loss(leaf, labels, group_of(size))
    found.backward(upstream(found))
    compare({"loss": found.detach(), "grad": leaf.grad}, whole(torch.float64), whole(torch.float32))


def one_collective(rank: int) -> None:
    """A chunk of rows takes one, and the sum of the gradient of all hidden states one more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "c10d" in func.namespace and "wait" not in func.name():
                calls.append(func.name())
            return func(*args, **(kwargs or {}))

    make = Make(torch.float32, ON)
    x = make.randn(9, H).requires_grad_()
    with Count():
        loss = vocab_parallel_linear_cross_entropy(
            x,
            make.randn(5, H),
            make.labels(9, 5 * WORLD),
            group_of(WORLD),
            chunks=ChunkOptions(chunk_size=3),
        )[0]
        loss.backward()
    assert len(calls) == 4, calls


def wrong(rank: int) -> None:
    """What one rank would get wrong, the ranks tell each other."""
    make, group = Make(torch.float32, ON), group_of(WORLD)
    k = 3 * WORLD
    labels = make.labels(3, k)
    with pytest.raises(ValueError, match=rf"of {WORLD} holds 4 classes, but 3 of n_classes={k}"):
        vocab_parallel_cross_entropy(make.randn(3, 4), labels, group, n_classes=k)
    if ON == "cuda":  # where nobody waits for what the others hold
        return
    with pytest.raises(ValueError, match=r"the ranks hold \[3, 4, 5, 6\] classes"):
        vocab_parallel_cross_entropy(make.randn(3, 3 + rank), labels, group)
    with pytest.raises(IndexError, match=f"{k} is out of bounds for {k} classes"):
        vocab_parallel_cross_entropy(make.randn(3, 3), labels.fill_(k), group)
    with pytest.raises(IndexError, match=f"{k} is out of bounds for {k} classes"):
        vocab_parallel_linear_cross_entropy(make.randn(3, H), make.randn(3, H), labels, group)


def under(implementation: str, check: Any, rank: int, **how: Any) -> None:
    with backends.use_implementation(implementation):
        check(rank, **how)


def by_two(check: Any, rank: int, **how: Any) -> None:
    """One half alone, which is enough for what takes long."""
    if rank < 2:
        check(rank, **how)


def checks() -> Iterator[tuple[str, ranks.Check]]:
    half, single = torch.bfloat16, torch.float32
    for implementation in ("reference", "triton"):
        for check in (of_logits, of_hidden):
            for name, options in OPTIONS.items():
                for size, classes in SIZES:
                    dtype = half if name == "all" else single
                    how = {"size": size, "classes": classes, "dtype": dtype, **options}
                    run = partial(under, implementation, check, **how)
                    yield f"{check.__name__} {name} {size}x{classes} {implementation}", run
        for linear in (False, True):
            capped = {"temperature": 0.7, "softcap": 4.0}
            for (size, classes), more in zip(SIZES, ({}, capped), strict=False):
                how = {"size": size, "classes": classes, "dtype": single, "linear": linear, **more}
                run = partial(under, implementation, of_tokens, **how)
                yield f"of_tokens {'linear ' * linear}{size}x{classes} {implementation}", run
    yield "as_verl_calls_it", as_verl_calls_it
    for check in (of_logits, of_hidden):
        how = {"size": 2, "classes": 37, "dtype": single, "compiled": True}
        yield f"{check.__name__} compiled", partial(by_two, check, **how)
    for formula in ("pytorch", "megatron"):
        for mode in ("global", "partition"):
            yield f"{formula} {mode}", partial(megatron, size=WORLD, formula=formula, mode=mode)
    yield "one_collective", one_collective
    yield "wrong", wrong


def named() -> dict[str, ranks.Check]:
    return dict(checks())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return ranks.outcomes(named, tmp_path_factory, __name__, ON, WORLD)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", named())
def test_as_one_process(name: str, outcomes: list[dict[str, str]]) -> None:
    ranks.assert_passed(name, outcomes)
