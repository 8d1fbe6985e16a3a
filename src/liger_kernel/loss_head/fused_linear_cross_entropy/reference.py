"""Linear layer and cross entropy with all logits in memory: the specification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops.cross_entropy.reference import Terms, terms


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    accum_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    label_count: int | None = None,
    **options: Any,
) -> Terms:
    """Cross entropy of `hidden @ weight.T + bias`, rounded once to the dtype of `hidden`; loss and z-loss unrounded.

    `options` are those of `terms`. How the work is done (`accum_dtype`, `chunk_size`, `memory_budget`, `label_count`)
    does not change the result.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    options["token_scaling"] = options.pop("use_token_scaling", False)
    return terms(logits, target, class_weight, **options)
