"""The head and the loss: the head is armed while its model runs with labels, and the fused loss runs in its place."""

from __future__ import annotations

import functools
import inspect
import threading
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from liger_kernel.backends import is_capturing
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.transformers import functional
from liger_kernel.transformers.outputs import with_metrics
from liger_kernel.transformers.patching.deferred import DeferredLogits, LossRequest
from liger_kernel.transformers.patching.options import LOSS_OPTIONS, Option
from liger_kernel.transformers.patching.plans import NamedPlan
from liger_kernel.transformers.patching.savings import LossSite
from liger_kernel.transformers.patching.site import Site
from liger_kernel.transformers.patching.state import State, is_replaced, state_of

#: keyword arguments of a patched model's forward that HF does not know; they are taken out before HF's forward runs
METRICS = ("return_token_accuracy", "return_predicted_tokens")
CALL_OPTIONS = ("skip_logits", "use_token_scaling", *METRICS)


@dataclass
class ForwardCall:
    """One running forward of a patched model."""

    model: nn.Module
    armed: bool
    skip_logits: bool
    loss_options: dict[str, Any] = field(default_factory=dict)
    label_count: LabelCount | None = None
    deferred: list[DeferredLogits] = field(default_factory=list)
    fused: bool = False
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def fused_loss(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, request: LossRequest
    ) -> Tensor:
        """Called from inside the head's forward, where its weight is whole."""
        self.fused, fused = True, request.fused
        if fused.classes is not None:
            weight, bias = weight[: fused.classes], None if bias is None else bias[: fused.classes]
        if fused.scale != 1.0:
            hidden = hidden * fused.scale
            bias = None if bias is None else bias * fused.scale
        result = functional.liger_fused_linear_cross_entropy(
            hidden,
            weight,
            request.target.to(hidden.device),  # a hook moves `hidden` to the head's device
            bias,
            **request.arguments,
            **self.loss_options,
            label_count=self._count_for(request),
        )
        if not isinstance(result, functional.CrossEntropyOutput):
            return result
        for name in ("token_accuracy", "predicted_tokens"):
            value = getattr(result, name)
            if value is not None:
                self.metrics[name] = value
        return result.loss

    def _count_for(self, request: LossRequest) -> LabelCount | None:
        """The count of this call's labels, where what the loss is given can only be fewer of them."""
        count = self.label_count
        if count is None or request.target.numel() > count.size:
            return None
        return count if request.arguments["ignore_index"] == count.ignore_index else None

    def entry(self, head: nn.Module) -> nn.Module:
        """What to call to reach `head` with its weight whole: the head, or the unit of FSDP1 around it."""
        get = getattr(self.model, "get_output_embeddings", None)
        around: Any = get() if callable(get) else None
        return around if getattr(around, "_fsdp_wrapped_module", None) is head else head


class _Running(threading.local):
    """The forwards of this thread, innermost last."""

    def __init__(self) -> None:
        self.calls: list[ForwardCall] = []


_running = _Running()


class FusedHead:
    """Mixed into the class of a head: hands on deferred logits while its model is armed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _running.calls[-1] if _running.calls else None
        if call is not None and call.armed and len(args) == 1 and not kwargs:
            logits = DeferredLogits(call.entry(cast(nn.Module, self)), args[0], call.fused_loss)
            call.deferred.append(logits)
            return logits
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, hidden: Tensor, request: LossRequest | None = None) -> Tensor:
        if request is None:
            return super().forward(hidden)  # type: ignore[misc]
        return request.run(hidden, self.weight, self.bias, request)  # type: ignore[attr-defined]


class LigerLMHead(FusedHead, nn.Linear):
    """The usual head; a class of its own so that a patched model can be pickled."""


@functools.cache
def _fused_class(cls: Any) -> Any:
    return LigerLMHead if cls is nn.Linear else type(f"Liger{cls.__name__}", (FusedHead, cls), {})


def find_heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The output embedding with PEFT's saved copies, else every Linear onto the vocabulary."""
    head: Any = None
    if hasattr(model, "get_output_embeddings"):
        try:
            head = model.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            head = None
    config: Any = getattr(model, "config", None)
    text_config = (
        config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    )
    vocab = getattr(text_config, "vocab_size", None)
    found = []
    for path, module in model.named_modules():
        if head is not None:
            inside = module is head or any(module is child for child in head.modules())
            if inside and (module is head or isinstance(module, nn.Linear)):
                found.append((path, module))
        elif type(module) is nn.Linear and vocab is not None and module.out_features == vocab:
            found.append((path, module))
    return found


def unsuitable(head: nn.Module) -> str | None:
    """Why the fused loss cannot stand in for this head; None if it can."""
    if getattr(type(head), "forward", None) not in (nn.Linear.forward, FusedHead.forward):
        return f"{type(head).__name__} does not compute a plain linear map"
    if is_replaced(head):
        return "its forward was already replaced by someone else"
    weight = head._parameters.get("weight")
    if weight is None or hasattr(weight, "quant_state"):
        return "its weight is not a plain parameter"
    return None


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The heads that can be fused, and those of which the report says why they cannot; without any, the model."""
    heads = find_heads(model)
    if not heads:
        return [(type(model).__name__, model)]
    if len(heads) == 1 or isinstance(heads[0][1], nn.ModuleList):
        return heads[:1]
    if _is_adapted(heads[0][1]):
        leaves = (place for place in heads[1:] if not list(place[1].children()))
        return [*(place for place in leaves if unsuitable(place[1])), heads[0]]
    # a wrapper around several is none itself
    return [(p, head) for p, head in heads if not unsuitable(head) or not list(head.children())]


def _is_adapted(head: nn.Module) -> bool:
    return any("lora" in name for name, _ in head.named_parameters())


def _prove(head: nn.Module, state: State) -> NamedPlan | str:
    if head is state.model:
        return "no head onto the vocabulary"
    if isinstance(head, nn.ModuleList):
        return f"{len(head)} heads, whose logits are joined before the loss"
    if _is_adapted(head):
        return "an adapter adds to its output"
    return unsuitable(head) or NamedPlan("fused linear cross entropy")


@functools.cache
def _position_of_labels(cls: Any) -> int | None:
    names = list(inspect.signature(cls.forward).parameters)[1:]
    return names.index("labels") if "labels" in names else None


def _before_forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    given = {name: kwargs.pop(name) for name in CALL_OPTIONS if name in kwargs}
    skip_logits = given.pop("skip_logits", None)
    labels, shift_labels = kwargs.get("labels"), kwargs.get("shift_labels")
    if labels is None:
        at = _position_of_labels(cast(Any, type(model)))
        labels = args[at] if at is not None and at < len(args) else None
    if labels is None and shift_labels is not None:
        # HF's forward asks only `labels` whether to compute a loss
        kwargs["labels"] = labels = shift_labels
    state = state_of(model)
    wanted = {name: value for name, value in given.items() if value}
    # Without labels no loss takes the place of the logits, so they come, `skip_logits` or not: for label smoothing and
    # `compute_loss_func` HF's Trainer takes the labels away, and `evaluate()` sends `skip_logits=True` all the same.
    armed = state is not None and labels is not None and not getattr(model, "_is_replica", False)
    if skip_logits is not None and not wanted:
        armed = armed and bool(skip_logits)
    elif not wanted:
        armed = armed and model.training
    if armed and state is not None:
        options = {name: getattr(state.options, name) for name in LOSS_OPTIONS}
        wanted |= {name: value for name, value in options.items() if value is not None}
    call = ForwardCall(model, armed, bool(skip_logits), wanted)
    same = shift_labels is None or shift_labels is labels
    if armed and labels is not None and same and _may_count(labels):
        call.label_count = LabelCount(labels)  # shifting and slicing only leave labels out
    _running.calls.append(call)
    return args, kwargs


def _may_count(labels: Tensor) -> bool:
    """A compiled or a captured graph is the same for every number of labels, and a DTensor holds only some of them."""
    if torch.compiler.is_compiling() or type(labels) is not Tensor:
        return False
    return not is_capturing(labels.device)


def _after_forward(model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    calls = _running.calls
    if not calls or calls[-1].model is not model:
        return None  # the pre-hook itself raised
    call = calls.pop()
    # they refer to the call, and what refers to itself waits for Python's GC
    deferred, call.deferred = call.deferred, []
    if not call.armed or output is None:
        return None
    state = state_of(model)
    if state is not None and not call.fused and any(logits.is_real for logits in deferred):
        state.report.retract("loss", "its forward needs real logits before the loss")
        state.report.forecast = None
    as_tuple = isinstance(output, tuple)
    entries = list(enumerate(output)) if as_tuple else list(output.items())
    for key, value in entries:
        if not isinstance(value, DeferredLogits):
            continue
        if call.skip_logits or torch.compiler.is_compiling():
            logits = None
        else:
            logits = value if model.training else value.materialize()
        if as_tuple:
            output = (*output[:key], logits, *output[key + 1 :])
        elif logits is not value:
            output = type(output)(**{**dict(output), key: logits})
    if call.metrics:
        if as_tuple:
            return (*output, *call.metrics.values())
        return with_metrics(output, **call.metrics)
    return output


def _install(head: nn.Module, plan: NamedPlan, state: State) -> None:
    model = state.model
    if not isinstance(head, FusedHead):
        state.set_class(head, _fused_class(cast(Any, type(head))))
    if _before_forward in model._forward_pre_hooks.values():  # by another of its heads
        return
    state.report.forecast = saved_bytes
    state.handles += [
        model.register_forward_pre_hook(_before_forward, with_kwargs=True),
        model.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
    ]


def saved_bytes(model: nn.Module, tokens: int) -> int:
    """`PatchReport.savings` of a model; 0 where no head is fused with its loss."""
    state = state_of(model)
    heads = [module for module in model.modules() if isinstance(module, FusedHead)]
    if state is None or not heads:
        return 0
    site = LossSite.of(model, heads, state.options, tokens)
    return site.stock() - site.fused()


SITE = Site(
    options=(Option("fused_linear_cross_entropy", True, "`lm_head` and loss as one; no logits."),),
    kind="loss",
    candidates=_candidates,
    prove=_prove,
    install=_install,
    slot=None,
)
