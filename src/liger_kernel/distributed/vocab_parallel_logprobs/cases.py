"""Inputs of vocabulary-parallel log-probabilities on one rank, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.distributed.vocab_parallel_logprobs import vocab_parallel_logprobs
from liger_kernel.ops.logprobs.cases import SPEC as WHOLE
from liger_kernel.ops.logprobs.contract import LogProbs
from liger_kernel.testing import OpSpec


def _ours(logits: Tensor, ids: Tensor, temperatures: Tensor | None, **options: Any) -> LogProbs:
    if temperatures is not None:
        options["temperature"] = temperatures
    return vocab_parallel_logprobs(logits, ids, **options)


KEPT = ("entropy", "all", "temperatures", "without-entropy", "long-row", "masked-classes")
SPEC = OpSpec(
    name="vocab_parallel_logprobs",
    function=_ours,
    reference=WHOLE.reference,
    cases=tuple(c for c in WHOLE.cases if c.id in KEPT or (c.large and not c.sweep)),
    differentiable=WHOLE.differentiable,
    outputs_without_grad=WHOLE.outputs_without_grad,
    elementwise=WHOLE.elementwise,
    traffic=(3, (0,)),
)
