"""The head and the loss: the head is armed while its model runs with labels, and the fused loss runs in its place."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_kernel._core.autograd import is_transformed
from liger_kernel.transformers.patching import heads, trl_head
from liger_kernel.transformers.patching.forward import KEY, FusedForward
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.savings import LossSite, text_setting
from liger_kernel.transformers.patching.site import Site
from liger_kernel.transformers.patching.state import State

#: names that only heads have, and names of heads that other Linears have too
_CERTAIN = re.compile(r"(.*_)?(head|logits?|vocab|unembed)s?|embed_out|decoder")
_LIKELY = re.compile(r"(.*_)?out(put)?|output_projection|classifier|generator")


def head_paths(model: Any) -> list[str]:
    """Where `model` calls its head: at its output embedding, or else at the one Linear that is surely its head."""
    head = None
    if hasattr(type(model), "get_output_embeddings"):
        try:
            head = model.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            head = None
    if head is not None:
        return [path for path, module in model.named_modules() if module is head]
    return _by_structure(model)


def _by_structure(model: nn.Module) -> list[str]:
    """Without an output embedding. Layers have Linears of any width, and a vocabulary may have the width of theirs."""
    vocabulary = text_setting(model, "vocab_size")
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    wide = [
        path
        for path in linears
        if model.get_submodule(path).out_features == vocabulary
        and not any(part.isdigit() for part in path.split("."))
    ]
    sure = [path for path in wide if _CERTAIN.fullmatch(path.rpartition(".")[2])]
    last = [path for path in wide if path == linears[-1] and _LIKELY.fullmatch(path)]
    return sure or last if len(sure or last) == 1 else []


def language_models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model`, if it has a head; else the models inside of it that have one, outermost ones."""
    if hasattr(type(model), "get_output_embeddings") and head_paths(model):
        yield "", model
        return
    found: list[str] = []
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if hasattr(type(module), "get_output_embeddings") and head_paths(module):
            found.append(path)
            yield f"{path}.", module
    if not found and head_paths(model):
        yield "", model


def trl_as_ours(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook: TRL's forward, which may lie around ours, passes on what it does not know."""
    if not kwargs.get(trl_head.THEIRS) or torch.compiler.is_compiling() or is_transformed():
        return None
    site: FusedForward | None = model.__dict__.get(KEY)
    head = None if site is None else site.trl_head()
    if site is None or head is None or site.trl_obstacle(head) is not None:
        return None
    return args, {**{n: v for n, v in kwargs.items() if n != trl_head.THEIRS}, trl_head.OURS: head}


def fuse(model: nn.Module, state: State) -> None:
    """Whether a head can be fused is looked at in every forward, and where the report is read."""
    found = list(language_models(model))
    if not found:
        state.report.add(SITE.kind, type(model).__name__, reason="no head onto the vocabulary")
    for prefix, inner in found:
        site: FusedForward | None = inner.__dict__.get(KEY)
        if site is None or site.state is None:  # not of an enclosing or earlier patch
            site = FusedForward(inner, state, tuple(head_paths(inner)))
            site.install()
            state.handles.append(site)
            state.handles.append(inner.register_forward_pre_hook(trl_as_ours, with_kwargs=True))
        for path in site.paths:
            by = functools.partial(FusedForward.computed_by, site, path)
            check = functools.partial(FusedForward.verdict, site, path)
            state.report.add(SITE.kind, prefix + path, by=by, check=check)
    state.report.forecast = saved_bytes


@dataclass(frozen=True)
class _FusedLoss(Site):
    def patch(self, model: nn.Module, state: State) -> None:
        if any(option.name in state.options.enabled for option in self.options):
            fuse(model, state)


def loss_sites(model: nn.Module, tokens: int) -> Iterator[LossSite]:
    """What the memory of each fused loss depends on."""
    for module in model.modules():
        site: FusedForward | None = module.__dict__.get(KEY)
        if site is None or site.state is None or any(map(site.verdict, site.paths)):
            continue
        linears = [leaf for around in site.around() for leaf in heads.leaves(around)]
        yield LossSite.of(module, linears, site.state.options, tokens)


def saved_bytes(model: nn.Module, tokens: int) -> int:
    """`PatchReport.savings` of a model; 0 where no head is fused with its loss."""
    # of several models one runs at a time
    return max((loss.stock() - loss.fused() for loss in loss_sites(model, tokens)), default=0)


SITE = _FusedLoss(
    options=(Option("fused_linear_cross_entropy", True, "`lm_head` and loss as one; no logits."),),
    kind="loss",
    candidates=language_models,
    prove=lambda module, state: None,
    replaces_forward=False,
)
