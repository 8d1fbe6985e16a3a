"""`patch(model)`: fused kernels in place of the slow parts of a HuggingFace model, proven, reported, reversible.

The model's own forward stays as HF wrote it. What changes are instance attributes of that one model: the class of its
head, the `forward` of norms, gated MLPs, experts, attention modules and Linears with adapters. Each of these is a
site, a file in `sites/`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from liger_kernel.transformers.patching.options import PatchOptions
from liger_kernel.transformers.patching.report import PatchReport, Row
from liger_kernel.transformers.patching.sites import OPTIONS, SITES
from liger_kernel.transformers.patching.state import KEY, State, beneath_hooks, state_of

__all__ = ["PatchOptions", "PatchReport", "Row", "patch", "patched", "unpatch"]


def patch(model: nn.Module, **options: Any) -> PatchReport:
    """Replace what can be replaced in `model`, in place, and say what was and what was not.

    Args:
        model: a HuggingFace model, or any `nn.Module`; wrappers of PEFT, torch.compile, DDP, FSDP1 and DeepSpeed are
            looked through. In a module around HuggingFace models, the losses of these are fused.
        {options}
        logits: "lazy" makes `output.logits` a tensor when it is read, "none" leaves None, "real" computes it at once.
        chunk_size, memory_budget, accum_dtype, strict: see `PatchOptions`.

    Returns: a `PatchReport`; print it for a table. A model that is patched already with the same options is left as it
        is, unless something was put in the place of ours since, adapters came, or a module was left alone beside
        others of its class: then all is tried anew. With other options it is unpatched first.
    Raises: TypeError for something that is no module or an unknown option; ValueError for options that exclude each
        other, and with `strict=True` if nothing could be replaced; whatever one of our ops raises in a proof. The
        model is then not patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"patch() takes an nn.Module, got {type(model).__name__}; build the model first."
        )
    return _patch(_unwrapped(model), PatchOptions.of(OPTIONS, **options))


if patch.__doc__:
    patch.__doc__ = inspect.cleandoc(patch.__doc__).format(  # as Python 3.13 does by itself
        options="\n    ".join(f"{o.name}: {o.help} Default: {o.default}." for o in OPTIONS)
    )


@beneath_hooks
def _patch(model: nn.Module, wanted: PatchOptions) -> PatchReport:
    before = state_of(model)
    if before is not None:
        whole = before.is_in_place() and all(site.is_complete(model, before) for site in SITES)
        if before.options == wanted and whole:
            before.renew()
            return before.report
        unpatch(model)
    state = State(wanted, PatchReport(type(model).__name__, of=model))
    try:
        for site in SITES:
            site.patch(model, state)
        if wanted.strict and not state.report.replaced:
            raise ValueError(
                f"strict=True, but nothing in {type(model).__name__} could be replaced.\n{state.report}"
            )
    except BaseException:
        state.revert()
        raise
    state.bind(model)
    model.__dict__[KEY] = state
    return state.report


@beneath_hooks
def unpatch(model: nn.Module) -> None:
    """Restore `model` to what it was before `patch`, or else those parts of it that were patched by themselves."""
    model = _unwrapped(model)
    for module in [model] if state_of(model) else list(model.modules()):
        state = state_of(module)
        if state is not None:
            state.revert()
            del module.__dict__[KEY]


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
            _patch(_unwrapped(model), before.options)


_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "module")


def _unwrapped(model: Any) -> nn.Module:
    """The model inside wrappers of PEFT, torch.compile, DDP, FSDP1 and DeepSpeed."""
    while True:
        inner = getattr(model, "get_base_model", None)
        children = getattr(model, "_modules", {})
        if callable(inner) and hasattr(type(model), "get_base_model"):
            model = inner()
        elif len(children) == 1 and next(iter(children)) in _WRAPPED:
            model = next(iter(children.values()))
        else:
            return model
