"""What a training step does with a patched model: seen from outside, by wrapping what the patch runs through."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor, nn

from liger_kernel.transformers.patching.deferred import DeferredLogits
from liger_kernel.transformers.patching.forward import KEY, ForwardCall, FusedForward
from liger_kernel.transformers.patching.heads import running


@dataclass
class Seen:
    """Counts of one step."""

    forwards: int = 0
    without_labels: int = 0
    in_evaluation: int = 0
    bodies: int = 0  # runs of a body outside of the forward of its model
    logits_read: int = 0  # logits that were fused with the loss, and computed all the same
    overflows: dict[str, int] = field(default_factory=dict)  # kernel -> elements beyond its offsets


def _kernels() -> tuple[Any, str] | None:
    """Through which Triton launches every kernel; None without Triton."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return None
    return JITFunction, "run"


def _span(tensor: Tensor) -> int:
    """From its first element to behind its last one."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[Seen]:
    seen = Seen()
    sites = [m.__dict__[KEY] for m in model.modules() if KEY in m.__dict__]
    begin, materialize = FusedForward.begin, DeferredLogits.materialize
    kernels = _kernels()
    run: Any = getattr(*kernels) if kernels else None

    def counted_begin(self: FusedForward, args: Any, kwargs: Any) -> tuple[ForwardCall, Any]:
        call, given = begin(self, args, kwargs)
        if any(self is site for site in sites):
            seen.forwards += 1
            has_labels = call.armed or given.get("labels") is not None
            seen.without_labels += not has_labels
            seen.in_evaluation += has_labels and not self.model.training and not call.armed
        return call, given

    def counted_materialize(self: DeferredLogits) -> Any:
        seen.logits_read += self._shape is not None and not self.is_real
        return materialize(self)

    def body_runs(*_: Any) -> None:
        seen.bodies += not running.calls

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        most = max(
            (_span(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), default=0
        )
        if most > 2**31 and "int64" not in inspect.getsource(self.fn):
            seen.overflows[f"{self.fn.__module__}.{self.fn.__name__}"] = most
        return run(self, *args, **kwargs)

    bodies = (getattr(site.model, "base_model", None) for site in sites)
    handles = [
        body.register_forward_pre_hook(body_runs)
        for body, site in zip(bodies, sites, strict=True)
        if isinstance(body, nn.Module) and body is not site.model
    ]
    try:
        with (
            mock.patch.object(FusedForward, "begin", counted_begin),
            mock.patch.object(DeferredLogits, "materialize", counted_materialize),
            mock.patch.object(*kernels, counted_run) if kernels else contextlib.nullcontext(),
        ):
            yield seen
    finally:
        for handle in handles:
            handle.remove()
