"""The forward of a model whose loss is fused: HF's own, with its head armed.

It stands in the place of the model's `forward` attribute, so that `model(...)` and `model.forward(...)` are the same,
and it ends on every way out of HF's forward, KeyboardInterrupt included.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from liger_kernel._core.autograd import is_transformed
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel.loss_head.label_count import LabelCount, may_count
from liger_kernel.transformers import functional
from liger_kernel.transformers.outputs import with_metrics
from liger_kernel.transformers.patching import heads, trl_head
from liger_kernel.transformers.patching.deferred import DeferredLogits, LossRequest
from liger_kernel.transformers.patching.heads import running
from liger_kernel.transformers.patching.lazy import lazy
from liger_kernel.transformers.patching.options import LOSS_OPTIONS
from liger_kernel.transformers.patching.origin import Modes, Origin
from liger_kernel.transformers.patching.state import Ours, State, is_replaced
from liger_kernel.transformers.patching.tensor_parallel import sharded_cross_entropy
from liger_kernel.transformers.patching.trl_head import TokenCall, TRLHead

#: keyword arguments of a patched model's forward that HF does not know; they are taken out before HF's forward runs
METRICS = ("return_token_accuracy", "return_predicted_tokens")
_OF_THE_LOSS = ("accum_dtype", "ce_weight", "label_smoothing", "lse_square_scale")
CALL_OPTIONS = ("skip_logits", "use_token_scaling", *METRICS, *_OF_THE_LOSS)
_EXPORTS = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 cannot tell
KEY = "_liger_loss"  # where the FusedForward of a model hangs


@dataclass(eq=False)
class ForwardCall:
    """One running forward of a patched model."""

    site: FusedForward
    armed: bool
    skip_logits: bool | None
    loss_options: dict[str, Any]
    logits: str  # as it was asked for when the forward began
    around: tuple[nn.Module, ...] = ()  # its heads, as they are now
    label_count: LabelCount | None = None
    origins: list[Origin] = field(default_factory=list)
    fused: bool = False
    obstructed: bool = False  # by something that the report sees by itself
    refused: str | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    tokens: TokenCall | None = None  # what is wanted in the place of the loss

    # -- asked by the heads -----------------------------------------------------------------------------------------

    def takes(self, around: Any, hidden: Any) -> bool:
        """Whether this call of `around` shall not be carried out now."""
        if not self.armed or not any(around is mine for mine in self.around):
            return False
        obstacle = heads.obstacle(around)
        if obstacle is not None:
            self.obstructed = True
        elif not heads.is_plain(hidden):
            self.refuse(f"its input is a {type(hidden).__name__}")
        elif self.logits != "none" and heads.drops(around):
            self.refuse('its adapter drops at random, logits as loss; logits="none" fuses the loss')
        elif self.logits == "real" and heads.runs_once(around):
            self.refuse('logits="real", and FSDP1 runs its unit once')
        else:
            return True
        return False

    def refuse(self, reason: str) -> None:
        self.refused = reason

    def defer(self, around: Any, hidden: Tensor) -> DeferredLogits:
        modes = Modes.now(hidden.device.type)
        classes = heads.leaves(around)[0].out_features
        origin = Origin(around, hidden, modes, self, cast(int, classes))
        self.origins.append(origin)
        return DeferredLogits.of(origin)

    def fused_loss(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, request: LossRequest
    ) -> Any:
        """Called from inside the head's forward, where its weight is whole; or that of this rank, a DTensor."""
        self.fused, fused = True, request.fused
        if fused.bias is not None:
            bias = fused.bias if bias is None else bias + fused.bias
        more: dict[str, Any] = {}
        if request.low_rank is not None:
            rows, columns = request.low_rank
            rows = rows * fused.scale if fused.scale != 1.0 else rows
            more["low_rank"] = rows, columns[: fused.classes]
        if fused.classes is not None:
            weight, bias = weight[: fused.classes], None if bias is None else bias[: fused.classes]
        targets = None if self.tokens is None else self.tokens.targets(hidden.shape[0])
        if self.tokens is not None and targets is not None:
            how = {**self.loss_options, "scale": fused.scale, "softcap": fused.softcap}
            how["label_count"] = self.label_count
            return self.tokens.of_head(hidden, weight, bias, targets, **how)
        if fused.scale != 1.0:
            hidden = hidden * fused.scale
            bias = None if bias is None else bias * fused.scale
        loss: Any = functional.liger_fused_linear_cross_entropy
        if is_dtensor(weight):
            loss = sharded_cross_entropy
        result = loss(
            hidden,
            weight,
            request.target.to(hidden.device),  # a hook moves `hidden` to the head's device
            bias,
            **{**request.arguments, **self.loss_options, **more},
            label_count=self._count_for(request),
        )
        if not isinstance(result, functional.CrossEntropyOutput):
            return result
        for name in ("token_accuracy", "predicted_tokens"):
            value = getattr(result, name)
            if value is not None:
                self.metrics[name] = value
        return result.loss

    def loss(self, result: Any) -> Tensor:
        """The loss, of what came out of the head's call."""
        if isinstance(result, tuple):
            result = cast(TokenCall, self.tokens).take(result)
        return cast(Tensor, result)

    def _count_for(self, request: LossRequest) -> LabelCount | None:
        """The count of this call's labels, where what the loss is given can only be fewer of them."""
        count = self.label_count
        if count is None or request.target.numel() > count.size:
            return None
        return count if request.arguments["ignore_index"] == count.ignore_index else None

    # -- the way out ------------------------------------------------------------------------------------------------

    def finish(self, output: Any) -> Any:
        """HF's output without deferred objects, and with the metrics."""
        if self.metrics and isinstance(output, tuple):
            output = (*output, *self.metrics.values())
        elif self.metrics and hasattr(output, "to_tuple"):
            output = with_metrics(output, **self.metrics)
        return self._outside(output) if self.origins else output

    def close(self) -> None:
        """Nothing may refer to this call any more: that would be a cycle, and keep hidden states until Python's GC."""
        origins, self.origins = self.origins, []
        for origin in origins:
            origin.call = None

    def verdict(self) -> str | None:
        """Why the loss was not fused."""
        if self.fused or self.obstructed or self.refused is not None:
            return self.refused
        if any(origin.called for origin in self.origins):
            return "its forward needs real logits before the loss"
        return None if self.origins else "its forward computes a loss without calling it"

    def _value(self, deferred: DeferredLogits, may_wait: bool) -> Any:
        """What the caller gets in the place of deferred logits."""
        skipped = self.skip_logits or (self.skip_logits is None and self.site.model.training)
        if self.logits == "none" and skipped and self.fused:
            return None
        now = not skipped or self.logits == "real" or deferred.is_real
        if self.skip_logits is None and torch.compiler.is_compiling():
            now = now or not torch.is_grad_enabled()  # no graph would tell later what has changed
        if now or not may_wait:
            return deferred.materialize()
        deferred.leave()
        return deferred

    def _outside(self, value: Any, top: bool = True) -> Any:
        """`value` with real logits, or those that an output of HF makes later; containers keep their types."""
        if type(value) is DeferredLogits:
            return value.materialize() if top else self._value(value, may_wait=False)
        if value is None or isinstance(value, Tensor):
            return value
        if isinstance(value, dict) and hasattr(value, "to_tuple"):
            return self._output(value)
        if isinstance(value, tuple):
            items = [self._outside(item, top=False) for item in value]
            if all(map(operator.is_, items, value)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, (dict, list)):
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                outside = self._outside(item, top=False)
                if outside is not item:
                    value[key] = outside
        elif top or hasattr(
            value, "__dataclass_fields__"
        ):  # torch 2.6 does not trace `is_dataclass`
            for name, item in list(getattr(value, "__dict__", {}).items()):
                outside = self._outside(item, top=False)
                if outside is not item:
                    object.__setattr__(value, name, outside)
        return value

    def _output(self, output: Any) -> Any:
        """An output of HF, rebuilt only where torch.compile has to see it."""
        waiting, changed = False, {}
        for name, item in output.items():
            if type(item) is DeferredLogits:
                outside = self._value(item, may_wait=True)
                waiting = waiting or outside is item
            else:
                outside = self._outside(item, top=False)
            if outside is not item:
                changed[name] = outside
        gone = any(outside is None for outside in changed.values())
        if gone or (changed and torch.compiler.is_compiling()):
            output = type(output)(**{**dict(output.items()), **changed})
        else:
            for name, outside in changed.items():
                output[name] = outside
        return lazy(output) if waiting else output


@dataclass(eq=False)
class FusedForward:
    """What `patch` knows of one model that calls a head and computes a loss; hangs on that model, by KEY."""

    model: nn.Module
    state: State | None  # None once it is taken back
    paths: tuple[str, ...]  # of its heads, as the model calls them
    beneath: Any = None  # a `forward` that the instance had before
    reason: str | None = None  # why its last forward did not fuse
    trl_reason: str | None = None  # why a call of TRL's head was left to TRL
    labels_at: int | None = field(
        init=False
    )  # among the arguments; torch.compile cannot look it up

    def __post_init__(self) -> None:
        names = list(inspect.signature(type(self.model).forward).parameters)[1:]
        self.labels_at = names.index("labels") if "labels" in names else None

    def adopt(self) -> None:
        """Let the heads hand on deferred logits, also those that were put in the place of others."""
        for around in self.around():
            if not isinstance(around, heads.Intercepted):
                heads.adopt(around, cast(State, self.state))

    def install(self) -> None:
        self.adopt()
        cast(State, self.state).bind(self.model, _replicate_for_data_parallel=_replica)
        attributes = self.model.__dict__
        attributes[KEY] = self
        if not leads_here(self.model.forward):
            if is_replaced(self.model):
                self.beneath = attributes["forward"]
            attributes["forward"] = BoundForward(self)

    def remove(self) -> None:
        """Taken back; what somebody set around ours stays, and ours calls what is beneath it from now on."""
        attributes = self.model.__dict__
        del attributes[KEY]
        own: Any = attributes.get("forward")
        if is_ours(own) and own._liger:
            del attributes["forward"]
            if self.beneath is not None:
                attributes["forward"] = self.beneath
        self.state = None

    def at(self, path: str) -> nn.Module | None:
        """What the model calls there now."""
        try:
            found = operator.attrgetter(path)(self.model)
        except AttributeError:
            return None
        return found if isinstance(found, nn.Module) else None

    def around(self) -> tuple[nn.Module, ...]:
        return tuple(found for found in map(self.at, self.paths) if found is not None)

    def is_in_place(self) -> bool:
        attributes = self.model.__dict__
        return leads_here(attributes.get("_old_forward", self.model.forward))

    def computed_by(self, path: str) -> str:
        """What computes the loss of this head where it is fused."""
        around, name = self.at(path), "fused linear cross entropy"
        group = None if around is None else heads.sharded_by(around)
        if group is not None:
            name = f"{name} over the classes of {group.size()} ranks"
        head = self.trl_head()
        if head is None:
            return name
        reason = self.trl_obstacle(head)
        return name + (
            f"; TRL's head runs its own code: {reason}" if reason else ", and TRL's head"
        )

    def trl_head(self) -> TRLHead | None:
        """The head that a trainer of TRL gave this model, before it was patched or since."""
        attributes = self.model.__dict__
        forward: Any = attributes.get("_old_forward", self.model.forward)
        while forward is not None:
            head = TRLHead.of(forward)
            if head is not None:
                return head
            ours = is_ours(forward)
            forward = self.beneath if ours else getattr(forward, "__wrapped__", None)
        return None

    def trl_obstacle(self, head: TRLHead) -> str | None:
        """Why calls of TRL's head are left to TRL."""
        if not self.is_in_place():
            return "the forward of the model was replaced after patching"
        if getattr(head.beneath, "__self__", self.model) is not self.model:
            return "it belongs to the model that this one was copied from"
        if head.wide:
            return "it computes in float32"
        return self.trl_reason or next(filter(None, map(heads.obstacle, self.around())), None)

    def verdict(self, path: str) -> str | None:
        """Why the loss of this head is not fused as things are now; None if it is."""
        if self.state is None:
            return "the patch was taken back"
        if not self.is_in_place():
            return "the forward of its model was replaced after patching"
        around = self.at(path)
        if around is None:
            return "it is not there any more"
        return heads.obstacle(around) or self.reason

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ForwardCall, Any]:
        """The call, and the keyword arguments for HF's forward."""
        model: Any = self.model
        given = {name: kwargs.pop(name) for name in CALL_OPTIONS if name in kwargs}
        skip_logits = given.pop("skip_logits", None)
        labels, shift_labels = kwargs.get("labels"), kwargs.get("shift_labels")
        if labels is None:
            at = self.labels_at
            labels = args[at] if at is not None and at < len(args) else None
        if labels is None and shift_labels is not None:
            # HF's forward asks only `labels` whether to compute a loss
            kwargs["labels"] = labels = shift_labels
        wanted = {
            n: value for n, value in given.items() if value is not None and value is not False
        }
        # Without labels no loss takes the place of the logits, so they come, `skip_logits` or not: for label smoothing
        # and `compute_loss_func` HF's Trainer takes the labels away, and `evaluate()` sends `skip_logits=True` still.
        asked = model.training if skip_logits is None else bool(skip_logits)
        if _EXPORTS() or (is_transformed() and not torch.compiler.is_compiling()):
            asked = skip_logits = False  # these follow HF's own code, and all logits are made
        options = cast(State, self.state).options
        if labels is None or not (wanted or asked):
            return ForwardCall(self, False, skip_logits, wanted, options.logits), kwargs
        for name in LOSS_OPTIONS:
            value = getattr(options, name)
            if value is not None:
                wanted.setdefault(name, value)
        call = ForwardCall(self, True, skip_logits, wanted, options.logits, self.around())
        if not torch.compiler.is_compiling():
            self.adopt()
        elif not all(isinstance(around, heads.Intercepted) for around in call.around):
            call.refuse(
                "it is new: call patch(model) again, or the model once, before torch.compile"
            )
        same = shift_labels is None or shift_labels is labels
        if same and may_count(labels):
            call.label_count = LabelCount(labels)  # shifting and slicing only leave labels out
        return call, kwargs

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the model; once the patch is taken back, HF's."""
        model: Any = self.model
        beneath = self.beneath or functools.partial(type(model).forward, model)
        return self.call(beneath, *args, **kwargs)

    def call(self, beneath: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """`beneath(*args, **kwargs)`, a forward of the model, with its loss fused."""
        if self.state is None or kwargs.get(trl_head.THEIRS):
            return beneath(*args, **kwargs)
        head: TRLHead | None = kwargs.pop(trl_head.OURS, None)
        if head is None:
            return self._run(beneath, None, args, kwargs)
        tokens = TokenCall(head, self.model, args, kwargs)
        output = tokens.output(self._run(beneath, tokens, args, tokens.for_model()))
        if output is None:
            self.trl_reason = self.reason or "the loss is not over one row for each token"
            return head.call(self.model, *args, **kwargs)
        return output

    def _run(
        self,
        beneath: Callable[..., Any],
        tokens: TokenCall | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        call, kwargs = self.begin(args, kwargs)
        call.tokens = tokens
        depth = len(running.calls)
        try:
            running.calls.append(call)
            output = beneath(*args, **kwargs)
            if call.armed:
                # of TRL's head nobody sees the logits
                output = call.finish(output) if tokens is None else output
                self.reason = call.verdict()
            return output
        finally:
            while len(running.calls) > depth:  # torch.compile of torch 2.6 cannot delete a slice
                running.calls.pop()
            call.close()


class BoundForward(Ours):
    """The `forward` of a patched model. It looks like a method, which accelerate takes apart and puts together again.

    It has no `__wrapped__`: accelerate would follow that to HF's forward.
    """

    def __init__(self, site: FusedForward):
        self.site, self.__self__ = site, site.model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.site.run(*args, **kwargs)

    @property
    def __func__(self) -> Any:
        return function_of(cast(Any, type(self.__self__)))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.__self__).forward.__get__(self.__self__))

    def __getattr__(self, name: str) -> Any:
        """What a method has of its function: `__code__`, `__name__`, ..."""
        if name in ("site", "__self__", "__func__", "__wrapped__"):
            raise AttributeError(name)
        return getattr(self.__func__, name)

    def __repr__(self) -> str:
        return f"<fused {self.__func__.__qualname__} of {type(self.__self__).__name__}>"


@functools.cache
def function_of(cls: Any) -> Callable[..., Any]:
    """The function of that method: a forward of any model of a class, patched or not."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        site: FusedForward | None = self.__dict__.get(KEY)
        if site is None:
            return cls.forward(self, *args, **kwargs)
        return site.run(*args, **kwargs)

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(forward, name, getattr(cls.forward, name))
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    forward._liger = True  # type: ignore[attr-defined] # False: the user put it there
    return forward


def is_ours(forward: Any) -> bool:
    """Whether `forward` fuses, with nothing around it: ours, or a method that was made of ours."""
    if isinstance(forward, BoundForward):
        return forward.site.state is not None
    return hasattr(forward, "_liger") and not hasattr(forward, "__wrapped__")


def leads_here(forward: Any) -> bool:
    """Whether `forward` is ours, or a decorator around ours that says so, or what TRL puts around it."""
    while not is_ours(forward):
        head = TRLHead.of(forward)
        forward = getattr(forward, "__wrapped__", None) if head is None else head.beneath
        if forward is None:
            return False
    return True


def _replica(model: Any) -> Any:
    """A replica of `nn.DataParallel` shares the attributes of its model; its forward is HF's, on its own weights."""
    replica = type(model)._replicate_for_data_parallel(model)
    for name in (KEY, "_replicate_for_data_parallel", "__getstate__", "forward"):
        if name != "forward" or is_ours(replica.__dict__.get("forward")):
            del replica.__dict__[name]
    return replica
