"""Loss helpers of patched models, kept as functions because frameworks call and replace them by name."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from liger_kernel.transformers import functional
from liger_kernel.transformers.labels import per_item, shifted

#: what may be handed on to the fused loss; fixed here, because frameworks wrap the live function
_LOSS_ARGUMENTS = frozenset(
    inspect.signature(functional.liger_fused_linear_cross_entropy).parameters
) - {
    "input",
    "weight",
    "target",
    "reduction",
    "ignore_index",
    "softcap",
}


def unpack_cross_entropy_result(result: Any) -> tuple[Any, Any, Any, Any]:
    """(loss, z_loss, token_accuracy, predicted_tokens) of a tensor, a tuple or a `CrossEntropyOutput`."""
    if isinstance(result, functional.CrossEntropyOutput):
        return result.loss, result.z_loss, result.token_accuracy, result.predicted_tokens
    values = tuple(result) if isinstance(result, tuple) else (result,)
    return (*values, None, None, None)[:4]


def fixed_fused_linear_cross_entropy(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target: Tensor,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    final_logit_softcapping: float | None = None,
    accum_dtype: torch.dtype | None = None,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    **kwargs: Any,
) -> Any:
    """Mean over the labels, or sum / num_items_in_batch: the rule of HF's `fixed_cross_entropy`.

    Args:
        hidden_states: (N, H). lm_head_weight: (V, H). target: (N,).

    Returns: the loss, or a `CrossEntropyOutput` if an extra such as `return_token_accuracy` is asked for.
    """
    result = functional.liger_fused_linear_cross_entropy(
        hidden_states,
        lm_head_weight,
        target,
        reduction="mean" if num_items_in_batch is None else "sum",
        ignore_index=ignore_index,
        softcap=final_logit_softcapping,
        accum_dtype=accum_dtype,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        **kwargs,
    )
    if num_items_in_batch is None:
        return result
    loss, _, token_accuracy, predicted_tokens = unpack_cross_entropy_result(result)
    loss = per_item(loss, num_items_in_batch)
    if not isinstance(result, functional.CrossEntropyOutput):
        return loss
    return functional.CrossEntropyOutput(
        loss=loss, token_accuracy=token_accuracy, predicted_tokens=predicted_tokens
    )


def LigerForCausalLMLoss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor | None,
    hidden_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    final_logit_softcapping: float | None = None,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    **kwargs: Any,
) -> Any:
    """Loss of a causal LM from hidden states (B, S, H): `labels` (B, S) are shifted, `shift_labels` are not.

    Keyword arguments that the fused loss does not know are ignored: model forwards pass on all they were given.
    """
    known = {name: value for name, value in kwargs.items() if name in _LOSS_ARGUMENTS}
    extras = {
        "return_token_accuracy": return_token_accuracy,
        "return_predicted_tokens": return_predicted_tokens,
    }
    known |= {
        name: True for name, wanted in extras.items() if wanted
    }  # who replaces the loss may not know them
    return fixed_fused_linear_cross_entropy(
        hidden_states.reshape(-1, hidden_size),
        lm_head_weight,
        shifted(labels, shift_labels, ignore_index).reshape(-1).to(hidden_states.device),
        num_items_in_batch,
        ignore_index,
        final_logit_softcapping,
        **known,
    )
