"""The loss alone: the logits stay, and HF's loss function makes way for the fused cross entropy."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from liger_kernel.transformers import functional
from liger_kernel.transformers.labels import per_item, shifted
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.plans import Plan
from liger_kernel.transformers.patching.site import Site
from liger_kernel.transformers.patching.state import State


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss of a causal LM over existing logits, by the fused cross entropy: `patch(model, cross_entropy=True)`."""
    target = shifted(labels, shift_labels, ignore_index)
    loss: Any = functional.liger_cross_entropy(
        logits.float().view(-1, vocab_size),
        target.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    return per_item(loss, num_items_in_batch)


_SLOT = "_loss_function"  # of a model: what its `loss_function` gives, where somebody has set it


class LossPlan(Plan):
    """HF's loss function makes way for `causal_lm_loss`."""

    def __str__(self) -> str:
        return "cross entropy"

    def lost(self, module: nn.Module) -> str | None:
        now = vars(module).get(_SLOT)
        if now is None:
            return "the patch was taken back"
        return None if now is causal_lm_loss else "its loss function was replaced after patching"


def _prove(model: nn.Module, state: State) -> LossPlan | str:
    if _SLOT in vars(model):
        return "its loss function is not HF's, but one that somebody has set"
    kind = getattr(model, "loss_type", None)
    if kind not in ("ForCausalLM", "ForConditionalGeneration"):  # HF computes both alike
        return f"its loss is {kind!r}, not that of a causal LM"
    forward: Any = inspect.unwrap(type(model).forward)
    if "loss_function" not in forward.__code__.co_names:
        return f"{type(model).__name__} computes its loss itself"
    return LossPlan()


SITE = Site(
    options=(Option("cross_entropy", False, "the loss alone, if `lm_head` is not fused with it."),),
    kind="loss",
    candidates=lambda model: [(type(model).__name__, model)],
    prove=_prove,
    install=lambda model, plan, state: state.set(model, _SLOT, causal_lm_loss),
    replaces_forward=False,
)
