"""Inputs of linear log-probabilities for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.loss_head.linear_logprobs import linear_logprobs, reference
from liger_kernel.ops.logprobs import named
from liger_kernel.ops.logprobs.cases import NUMBERS, SCALED
from liger_kernel.ops.logprobs.contract import LogProbs, LogProbsOptions
from liger_kernel.testing import Make, OpCase, OpSpec, case

#: how the work is done, which does not change the result
HOW = ("accum_dtype", "chunk_size", "memory_budget", "label_count")


def _case(
    id: str,
    why: str,
    sizes: tuple[int, int, int],
    *,
    ignored: float = 0.3,
    biased: bool = False,
    warm: bool = False,
    **options: Any,
) -> OpCase:
    rows, hidden, classes = sizes

    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        states, weight = make.randn(rows, hidden), make.randn(classes, hidden, scale=hidden**-0.5)
        ids = make.labels(rows, classes, ignored)
        bias = make.randn(classes, scale=0.3) if biased else None
        return states, weight, ids, bias, make.randn(rows).abs() + 0.5 if warm else None

    products = 3 - len(options.get("frozen", ()))
    return case(id, why, inputs, flops=2 * products * rows * hidden * classes, **options)


CHUNKS: dict[str, Any] = {"chunk_size": 3}
LARGE: dict[str, Any] = {"ignored": 0.0, "large": True}
CASES = (
    _case("log-prob", "nothing else; three chunks", (7, 16, 61), **CHUNKS),
    _case("all", "every number, scaled and capped", (7, 16, 60), biased=True, warm=True, top1=True,
          softcap=5.0, scale=1.5, **NUMBERS, **CHUNKS),
    _case("no-rows", "gradients of zero, not of garbage", (0, 16, 50), top_k=2, entropy=True),
    _case("all-ignored", "likewise", (5, 16, 50), ignored=1.0, **NUMBERS, **SCALED, **CHUNKS),
    _case("8192x4096x151936", "log-probabilities alone", (8192, 4096, 151936), **LARGE),
    _case("8192x4096x151936-entropy", "a policy and its entropy", (8192, 4096, 151936), entropy=True, **LARGE),
    _case("8192x4096x151936-entropy-frozen-head", "adapters: no dW", (8192, 4096, 151936), entropy=True,
          frozen=(1,), **LARGE),
    _case("32768x2048x128256-entropy", "long", (32768, 2048, 128256), entropy=True, **LARGE),
)  # fmt: skip


def _ours(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    **options: Any,
) -> LogProbs:
    if temperatures is not None:
        options["temperature"] = temperatures
    return linear_logprobs(hidden, weight, ids, bias=bias, **options)


def _reference(*tensors: Any, **options: Any) -> LogProbs:
    options = {name: value for name, value in options.items() if name not in HOW}
    found = reference.linear_logprobs(*tensors, **options)
    return named(found, LogProbsOptions(**options), tensors[2].shape)


SPEC = OpSpec(
    name="linear_logprobs",
    function=_ours,
    reference=_reference,
    cases=CASES,
    differentiable=(0, 1, 3),
    outputs_without_grad=(5, 6, 7),
    elementwise=(0, 1, 2, 3),
)
