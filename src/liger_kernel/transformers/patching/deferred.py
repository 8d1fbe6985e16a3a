"""Logits that are not computed yet.

While a patched model runs with labels, its head returns a `DeferredLogits` instead of a tensor. HF's own code then
casts, scales, soft-caps, slices and flattens it; each of these is only recorded. When the recording reaches
`torch.nn.functional.cross_entropy`, the fused loss runs through the head's own `__call__`, so that the hooks of FSDP,
ZeRO and offloading gather the weight at that moment. Anything this file does not know makes real logits by replaying
the recording on the head's real output: slower, never wrong.

It is a plain object with `__torch_function__`, not a Tensor subclass: `torch.compile` traces through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Fused:
    """How to get the recorded value without the logits: softcap(scale * head(hidden)), in fp32."""

    hidden: Tensor
    scale: float = 1.0
    softcap: float | None = None
    classes: int | None = None  # of the head's, the first so many
    in_tanh: bool = False  # tanh(scale * logits): a soft cap whose last factor is still to come


@dataclass(frozen=True)
class LossRequest:
    """What the head's `forward` computes instead of logits when it is called a second time."""

    target: Tensor
    fused: Fused
    arguments: dict[str, Any]
    run: Callable[..., Any]


class DeferredLogits:
    """See the module docstring. `chain` replays the recorded operations on real logits.

    `head(hidden, request)` computes what `request` asks for, `head(hidden, None)` the real logits.
    """

    def __init__(
        self,
        head: nn.Module,
        hidden: Tensor,
        run: Callable[..., Any],
        chain: tuple[Callable[[Tensor], Tensor], ...] = (),
        fused: Fused | None = None,
        root: DeferredLogits | None = None,
    ):
        self._head, self._hidden, self._run, self._chain = head, hidden, run, chain
        self._fused = Fused(hidden) if root is None else fused
        self._root = root  # None: this one. A reference to itself would hold the hidden states until Python's GC runs
        self._dtype: torch.dtype = hidden.dtype if root is None else root._dtype
        self._device: torch.device = hidden.device if root is None else root._device
        self._real: Tensor | None = None

    @property
    def is_real(self) -> bool:
        """Whether somebody needed the logits themselves."""
        return self._real is not None

    # -- real logits ------------------------------------------------------------------------------------------------

    def materialize(self) -> Tensor:
        """The real logits, made once by the head's own call and the recorded operations."""
        if self._real is None:
            if self._root is None:
                self._real = self._head(self._hidden, None)  # the second argument: now
            else:
                value = self._root.materialize()
                for operation in self._chain:
                    value = operation(value)
                self._real = value
        return self._real

    def _then(
        self,
        operation: Callable[[Tensor], Tensor],
        fused: Fused | None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Any:
        """The value after one more operation; real at once where the fused loss could not express it."""
        if fused is None or self._real is not None:
            return operation(self.materialize())
        root = self if self._root is None else self._root
        after = DeferredLogits(
            self._head, self._hidden, self._run, (*self._chain, operation), fused, root
        )
        after._dtype, after._device = dtype or self._dtype, device or self._device
        return after

    # -- what HF's forwards do to logits before the loss ------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        if self._real is not None or self._fused is None:
            return self.materialize().shape
        vocabulary: Any = self._fused.classes or self._head.out_features
        return torch.Size((*self._fused.hidden.shape[:-1], vocabulary))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype if self._real is None else self._real.dtype

    @property
    def device(self) -> torch.device:
        return self._device if self._real is None else self._real.device

    @property
    def requires_grad(self) -> bool:
        return self.materialize().requires_grad

    def _cast(self, dtype: torch.dtype) -> Any:
        return self._then(lambda t: t.to(dtype), self._fused, dtype)

    def float(self) -> Any:
        return self._cast(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        # accelerate moves all outputs of a model on several devices to that of its inputs
        if device is not None and device != self.device:
            return self._then(lambda t: t.to(*args, **kwargs), self._fused, dtype, device)
        return self if dtype is None else self._cast(dtype)

    def contiguous(self, *args: Any, **kwargs: Any) -> Any:
        return self._then(lambda t: t.contiguous(*args, **kwargs), self._fused)

    def view(self, *shape: Any) -> Any:
        return self.reshape(*shape)

    def reshape(self, *shape: Any) -> Any:
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        fused = None
        if self._fused is not None and len(wanted) > 0 and wanted[-1] == self.shape[-1]:
            hidden = self._fused.hidden
            fused = replace(self._fused, hidden=hidden.reshape(*wanted[:-1], hidden.shape[-1]))
        return self._then(lambda t: t.reshape(wanted), fused)

    def __getitem__(self, index: Any) -> Any:
        fused = None
        rows, classes = _without_classes(index, self.ndim)
        if self._fused is not None and _keeps_last_dimension(rows, self.ndim):
            fused = replace(self._fused, hidden=self._fused.hidden[rows])
            if classes is not None:
                fused = replace(fused, classes=min(classes, self.shape[-1]))
        return self._then(lambda t: t[index], fused)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.materialize()[index] = value

    def _scaled(self, factor: Any, operation: Callable[[Tensor], Tensor], inverse: bool) -> Any:
        fused = None
        if self._fused is not None and isinstance(factor, (int, float)) and factor > 0:
            by = 1 / factor if inverse else factor
            if self._fused.in_tanh:  # by * tanh(scale * logits) = softcap_by(by * scale * logits)
                fused = replace(
                    self._fused, softcap=by, scale=self._fused.scale * by, in_tanh=False
                )
            elif self._fused.softcap is None:
                fused = replace(self._fused, scale=self._fused.scale * by)
        return self._then(operation, fused)

    def __mul__(self, factor: Any) -> Any:
        return self._scaled(factor, lambda t: t * factor, inverse=False)

    __rmul__ = mul = __mul__

    def __truediv__(self, factor: Any) -> Any:
        return self._scaled(factor, lambda t: t / factor, inverse=True)

    div = true_divide = __truediv__

    def tanh(self) -> Any:
        fused = self._fused
        if fused is not None:
            capped = fused.softcap is not None or fused.in_tanh
            fused = None if capped else replace(fused, in_tanh=True)
        return self._then(torch.tanh, fused)

    # -- the loss ---------------------------------------------------------------------------------------------------

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: Any = 0.0,  # `float` is a method here
    ) -> Tensor:
        """`torch.nn.functional.cross_entropy(self, target, ...)`."""
        fused = self._fused
        if (
            self._real is not None
            or fused is None
            or fused.in_tanh
            or fused.hidden.ndim != 2
            or target.ndim != 1
            or target.is_floating_point()
            or size_average is not None
            or reduce is not None
        ):
            return F.cross_entropy(
                self.materialize(),
                target,
                weight,
                size_average,
                ignore_index,
                reduce,
                reduction,
                label_smoothing,
            )
        arguments = {
            "ce_weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "softcap": fused.softcap,
        }
        request = LossRequest(target, fused, arguments, self._run)
        return self._head(fused.hidden, request).to(self.device, self.dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        known = _FUNCTIONS.get(func)
        if known is not None and args and isinstance(args[0], cls):
            return getattr(args[0], known)(*args[1:], **kwargs)
        return func(*_real(args), **{name: _real(value) for name, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"DeferredLogits has no attribute {name!r}")
        return getattr(self.materialize(), name)

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}; .materialize() makes them)"


_FUNCTIONS = {
    F.cross_entropy: "cross_entropy",
    torch.tanh: "tanh",
    torch.mul: "mul",
    torch.div: "div",
    torch.true_divide: "div",
    torch.reshape: "reshape",
}


def _real(value: Any) -> Any:
    if isinstance(value, DeferredLogits):
        return value.materialize()
    if isinstance(value, (list, tuple)):
        return type(value)(_real(v) for v in value)
    return value


def _without_classes(index: Any, ndim: int) -> tuple[Any, int | None]:
    """`[..., :k]` as (`[..., :]`, k), where a head has more rows than there are tokens; else (index, None)."""
    last = index[-1] if isinstance(index, tuple) and index else None
    if not isinstance(last, slice) or not isinstance(last.stop, int) or last.stop <= 0:
        return index, None
    reaches = any(i is Ellipsis for i in index) or _consumed(index) == ndim
    if not reaches or last.start not in (None, 0) or last.step not in (None, 1):
        return index, None
    return (*index[:-1], slice(None)), last.stop


def _consumed(index: tuple[Any, ...]) -> int:
    """How many dimensions an index without None takes, but for those of its ellipsis."""
    masks = (i.ndim for i in index if isinstance(i, Tensor) and i.dtype == torch.bool)
    others = (i for i in index if not (isinstance(i, Tensor) and i.dtype == torch.bool))
    return sum(masks) + sum(i is not Ellipsis for i in others)


def _keeps_last_dimension(index: Any, ndim: int) -> bool:
    """Whether `logits[index]` selects rows only, so that `hidden[index]` selects the same ones."""
    index = index if isinstance(index, tuple) else (index,)
    if sum(i is Ellipsis for i in index) > 1 or any(i is None for i in index):
        return False
    consumed, last = _consumed(index), index[-1] if index else Ellipsis
    if last is Ellipsis:
        return consumed < ndim
    whole = isinstance(last, slice) and last == slice(None)
    if any(i is Ellipsis for i in index):
        return whole
    return consumed < ndim or (consumed == ndim and whole)


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: DeferredLogits, *args: Any) -> Any:
        return getattr(self.materialize(), name)(*_real(args))

    return method


_DELEGATED = (
    "add radd sub rsub rtruediv pow neg abs matmul rmatmul lt le "
    "gt ge eq ne iter floordiv mod and or bool float int "
)
for _name in _DELEGATED.split():
    setattr(DeferredLogits, f"__{_name}__", _delegate(f"__{_name}__"))
DeferredLogits.__hash__ = object.__hash__  # type: ignore[method-assign]
