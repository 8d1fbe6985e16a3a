"""Linear layer and log-probabilities with all logits in memory: the specification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops.logprobs.reference import Columns, logprobs


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    temperatures: Tensor | None = None,
    **options: Any,
) -> Columns:
    """`logprobs` of `hidden @ weight.T + bias`, rounded once to the dtype of `hidden`."""
    return logprobs(torch.nn.functional.linear(hidden, weight, bias), ids, temperatures, **options)
