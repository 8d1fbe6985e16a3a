"""Inputs of log-probabilities for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops.logprobs import logprobs, named, reference
from liger_kernel.ops.logprobs.contract import LogProbs, LogProbsOptions
from liger_kernel.testing import Make, OpCase, OpSpec, case


def _case(
    id: str,
    why: str,
    rows: int,
    classes: int,
    *,
    draw: Any = Make.randn,
    ignored: float = 0.3,
    height: float = 3.0,
    warm: bool = False,
    **options: Any,
) -> OpCase:
    def inputs(make: Make) -> tuple[Tensor | None, ...]:
        ids = make.labels(rows, classes, ignored, options.get("ignore_index", -100))
        logits = draw(make, rows, classes, scale=height)
        return logits, ids, make.randn(rows).abs() + 0.5 if warm else None

    return case(id, why, inputs, **options)


def _peaked(make: Make) -> tuple[Tensor | None, ...]:
    ids = make.labels(6, 120, 0.3)
    return make.peaked(6, 120, ids), ids, None


def _distinct(make: Make) -> tuple[Tensor | None, ...]:
    """No two logits of a row are equal, in any dtype; the first 5 classes are ruled out."""
    order = torch.stack([make.permutation(60) for _ in range(6)])
    logits = ((order - 30) / 8).to(make.device, make.dtype)
    logits[:, :5] = -torch.inf
    ids = make.labels(6, 55, 0.3)
    return logits, torch.where(ids < 0, ids, ids + 5), None


def _masked(make: Make) -> tuple[Tensor | None, ...]:
    """A whole block of -inf before the rest."""
    logits = make.randn(3, 16437)
    logits[:, :16400] = -torch.inf
    return logits, make.labels(3, 37) + 16400, None


#: every differentiable number
NUMBERS: dict[str, Any] = dict.fromkeys(("entropy", "logsumexp", "sum_p2", "mean_logit"), True)
SCALED: dict[str, Any] = {"temperature": 0.7, "softcap": 5.0, "scale": 1.5}
LARGE: dict[str, Any] = {"ignored": 0.0, "large": True}

CASES = (
    _case("log-prob", "nothing else; odd number of classes, some ignored", 7, 301),
    _case("entropy", "the usual pair", 6, 130, entropy=True),
    _case("all", "every number and report, scaled and capped", 6, 77, top1=True, **NUMBERS, **SCALED),
    _case("temperatures", "one for each row", 5, 64, warm=True, **NUMBERS, softcap=4.0),
    _case("without-entropy", "columns in another place", 5, 33, sum_p2=True, scale=-0.5),
    _case("long-row", "two blocks", 2, 16384 + 57, ignored=0.0, top1=True, **NUMBERS),
    _case("no-rows", "an empty batch", 0, 32, top1=True, top_k=2, **NUMBERS),
    _case("all-ignored", "zeros", 3, 45, ignored=1.0, ignore_index=1, top1=True, top_k=2, **NUMBERS),
    case("peaked", "p near 1, an entropy near 0", _peaked, entropy=True, sum_p2=True),
    case("distinct", "the largest, and classes that are ruled out", _distinct,
         entropy=True, sum_p2=True, top1=True, top_k=3, softcap=None, temperature=0.5),
    case("masked-classes", "a whole block of -inf before the rest", _masked, entropy=True, sum_p2=True),
    _case("strided", "row stride larger than the row", 6, 90, draw=Make.strided, entropy=True),
    _case("8192x151936-entropy", "Qwen 3", 8192, 151936, entropy=True, **LARGE),
)  # fmt: skip


def _ours(logits: Tensor, ids: Tensor, temperatures: Tensor | None, **options: Any) -> LogProbs:
    if temperatures is not None:
        options["temperature"] = temperatures
    return logprobs(logits, ids, **options)


def _reference(
    logits: Tensor, ids: Tensor, temperatures: Tensor | None, **options: Any
) -> LogProbs:
    found = reference.logprobs(logits, ids, temperatures, **options)
    return named(found, LogProbsOptions(**options), ids.shape)


SPEC = OpSpec(
    name="logprobs",
    function=_ours,
    reference=_reference,
    cases=CASES,
    differentiable=(0,),
    outputs_without_grad=(5, 6, 7),
    elementwise=(0, 1, 2, 3, 4),
    traffic=(2, (0,)),
)
