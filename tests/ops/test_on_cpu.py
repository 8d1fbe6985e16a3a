"""On a CPU an op is never slower than eager PyTorch: most are the same operators, in the same order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liger_kernel.testing import Make, specs
from liger_kernel.testing.calls import call, drawn, leaves, wanted_inputs

SPECS = specs()
#: computed in another way than the reference: `python -m benchmark cpu` has their times, which docs/hardware.md shows
MEASURED = {
    "cross_entropy",
    "fused_ce_tvd",
    "fused_linear_cross_entropy",
    "fused_linear_jsd",
    "fused_linear_kl_div",
    "fused_moe",
    "fused_neighborhood_attention",
    "group_norm",
    "grpo_loss",
    "layer_norm",
    "linear_logprobs",
    "logprobs",
    "lora_linear",
    "lora_mlp",
    "scale_gradients",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_logprobs",
}
#: options of the case that save memory for time, and so are left out
NOT_ASKED = {"tiled_mlp": ("num_tiles",)}

#: that compute nothing
FREE = (
    "aten.detach.default",
    "aten.promote_types.default",
    "aten.transpose.int",
    "aten.view.default",
)


class Operators(TorchDispatchMode):
    """The names of those that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(op) not in FREE:
            self.ran.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [op for op in SPECS if op not in MEASURED])
def test_the_operators_are_those_of_the_reference(op: str) -> None:
    spec = SPECS[op]
    case = spec.cases[0]
    options = {n: v for n, v in case.options.items() if n not in NOT_ASKED.get(op, ())}
    inputs, grads = drawn(spec, case, Make(torch.bfloat16, "cpu"))
    found = []
    for function, given in ((spec.function, options), (spec.reference, case.options)):
        arguments = leaves(inputs, wanted_inputs(spec, case, inputs))
        with Operators() as operators:
            call(function, given, arguments, grads)
        found.append(operators.ran)
    assert found[0] == found[1]
