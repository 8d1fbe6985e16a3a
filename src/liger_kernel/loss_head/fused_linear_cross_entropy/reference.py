"""Linear layer and cross entropy with all logits in memory: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel.ops.cross_entropy.reference import Terms, terms


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    label_count: int | None = None,
) -> Terms:
    """Cross entropy of `hidden @ weight.T + bias`, rounded once to the dtype of `hidden`; loss and z-loss unrounded.

    How the work is done (`accum_dtype`, `chunk_size`, `memory_budget`, `label_count`) does not change the result.
    """
    return terms(
        torch.nn.functional.linear(hidden, weight, bias),
        target,
        class_weight,
        ignore_index,
        lse_square_scale,
        label_smoothing,
        reduction,
        softcap,
        return_z_loss,
        return_token_accuracy,
        return_predicted_tokens,
        use_token_scaling,
    )
