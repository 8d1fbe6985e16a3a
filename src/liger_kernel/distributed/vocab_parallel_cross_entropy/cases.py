"""Inputs of vocabulary-parallel cross entropy on one rank, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from liger_kernel.distributed.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from liger_kernel.ops.cross_entropy import reference
from liger_kernel.ops.cross_entropy.cases import ALL, NONE, REPORTS
from liger_kernel.ops.cross_entropy.cases import SPEC as WHOLE
from liger_kernel.testing import Make, OpCase, OpSpec, case


def _case(
    id: str, why: str, rows: int, classes: int, draw: Any = Make.randn, **more: Any
) -> OpCase:
    index = more.get("ignore_index", -100)
    ignored = more.pop("ignored", 0.0 if more.get("large") else 0.3)
    return case(
        id,
        why,
        lambda make: (
            draw(make, rows, classes, scale=3.0),
            make.labels(rows, classes, ignored, index),
        ),
        **more,
    )


OPTIONS: dict[str, Any] = {name: value for name, value in ALL.items() if name != "weighted"}
SPEC = OpSpec(
    name="vocab_parallel_cross_entropy",
    function=vocab_parallel_cross_entropy,
    reference=reference.terms,
    cases=(
        _case("none", "a row's own upstream gradient; odd", 7, 301, Make.strided, **NONE),
        _case("all", "every option", 6, 130, Make.transposed, **OPTIONS),
        _case("long-row", "two blocks", 2, 16384 + 57, reduction="sum", **REPORTS),
        _case("ignored", "no label counts", 4, 45, ignored=1.0, ignore_index=1, **OPTIONS),
        _case("no-rows", "empty batch: loss 0", 0, 32),
        _case("8192x32064", "Llama 3 on four ranks", 8192, 32064, large=True, **NONE),
        _case("8192x128256", "as much as on one", 8192, 128256, large=True, **NONE),
    ),
    differentiable=WHOLE.differentiable,
    outputs_without_grad=WHOLE.outputs_without_grad,
    elementwise=WHOLE.elementwise,
    traffic=(3, (0,)),
)
