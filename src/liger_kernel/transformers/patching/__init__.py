"""`patch(model)`: fused kernels in place of the slow parts of a HuggingFace model, proven, reported, reversible.

The model's own forward stays as HF wrote it. What changes are instance attributes of that one model: the class of its
head (`loss.py`), the `forward` of norms, gated MLPs and attention modules (`norms.py`, `mlps.py`, `rope.py`), and the
gate between the products of experts (`experts.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from liger_kernel.transformers.patching.experts import patch_experts
from liger_kernel.transformers.patching.loss import patch_cross_entropy, patch_loss
from liger_kernel.transformers.patching.mlps import patch_mlps
from liger_kernel.transformers.patching.norms import patch_norms
from liger_kernel.transformers.patching.options import Options
from liger_kernel.transformers.patching.report import PatchReport, Row
from liger_kernel.transformers.patching.rope import patch_rope
from liger_kernel.transformers.patching.state import KEY, State, beneath_hooks, state_of

__all__ = ["Options", "PatchReport", "Row", "patch", "patched", "unpatch"]


@beneath_hooks
def patch(model: nn.Module, **options: Any) -> PatchReport:
    """Replace what can be replaced in `model`, in place, and say what was and what was not.

    Args:
        model: a HuggingFace model (or any `nn.Module`), before or after PEFT; wrappers of PEFT are looked through.
        **options: see `Options`.

    Returns: a `PatchReport`; print it for a table. A model that is patched already with the same options is left as it
        is; with other options it is unpatched first.
    Raises: TypeError for something that is no module or an unknown option; ValueError for options that exclude each
        other, and with `strict=True` if nothing could be replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"patch() takes an nn.Module, got {type(model).__name__}; build the model first."
        )
    model = _unwrapped(model)
    wanted = Options.of(**options)
    before = state_of(model)
    if before is not None:
        if before.options == wanted:
            return before.report
        unpatch(model)
    state = State(wanted, PatchReport(type(model).__name__, of=model))
    try:
        if wanted.fused_linear_cross_entropy:
            patch_loss(model, state)
        if wanted.cross_entropy:
            patch_cross_entropy(model, state)
        if wanted.rms_norm or wanted.layer_norm:
            patch_norms(model, state)
        if wanted.mlp:
            patch_mlps(model, state)
            patch_experts(model, state)
        if wanted.rope:
            patch_rope(model, state)
        if wanted.strict and not state.report.replaced:
            raise ValueError(
                f"strict=True, but nothing in {type(model).__name__} could be replaced.\n{state.report}"
            )
    except BaseException:
        state.revert()
        raise
    model.__dict__[KEY] = state
    return state.report


@beneath_hooks
def unpatch(model: nn.Module) -> None:
    """Restore `model` to what it was before `patch`; a model that is not patched stays as it is."""
    model = _unwrapped(model)
    state = state_of(model)
    if state is not None:
        state.revert()
        del model.__dict__[KEY]


@contextlib.contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[PatchReport]:
    """`patch` on entry, `unpatch` on exit: the model that was patched before stays patched its old way."""
    before = state_of(_unwrapped(model))
    report = patch(model, **options)
    try:
        yield report
    finally:
        unpatch(model)
        if before is not None:
            patch(model, **{f: getattr(before.options, f) for f in vars(before.options)})


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model
