"""The loss of a causal LM at its head, for forwards that other projects write."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel.compat import loss_utils
from liger_kernel.compat.fsdp import _FSDPForwardRedirection


def lce_maybe_trainable_lm_head(
    self: Any,
    hidden_states: Tensor,
    hidden_size: int,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    **loss_kwargs: Any,
) -> Any:
    """`LigerForCausalLMLoss` with the weight of `self.lm_head`: of PEFT's copy in use, whole inside a unit of FSDP1.

    Raises: ValueError for a head with an adapter of its own (LoRA), which no weight alone describes.
    """
    head = self.lm_head
    if hasattr(head, "modules_to_save"):
        saved = () if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[saved[0]] if saved else head.original_module

    def loss_of(head: Any) -> Any:
        if hasattr(head, "base_layer"):
            raise ValueError(
                f"The head is a {type(head).__name__}, whose adapter this loss would leave out; leave lm_head out of "
                "the adapter's target modules, or call liger_kernel.patch(model), whose loss has it."
            )
        bias = {} if head.bias is None else {"bias": head.bias}
        return loss_utils.LigerForCausalLMLoss(
            hidden_states=hidden_states,
            lm_head_weight=head.weight,
            labels=labels,
            hidden_size=hidden_size,
            shift_labels=shift_labels,
            **bias,
            **loss_kwargs,
        )

    if "_fsdp_wrapped_module" in head._modules:
        return _FSDPForwardRedirection()(head, loss_of, head.module)
    return loss_of(head)
