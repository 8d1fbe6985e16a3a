"""Named inputs of an op, read by the tests and by the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from liger_kernel.ops import LINEAR_LOSSES, OPS, SHARDED_LOSSES


@dataclass
class Make:
    """Draws the inputs of one case: everything it returns is on `device`, and floats are in `dtype`."""

    dtype: torch.dtype
    device: torch.device | str = field(default_factory=torch.get_default_device)
    seed: int = 0
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        # drawn on the CPU: the same numbers on every machine
        self._generator = torch.Generator("cpu").manual_seed(self.seed)

    def _draw(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        return function(*args, generator=self._generator, device=self._generator.device)

    def randn(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        drawn = self._draw(torch.randn, shape) * scale + shift
        return drawn.to(self.device, self.dtype)

    def strided(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A view with a row stride larger than the row: columns 1..n of a wider tensor."""
        return self.randn(*shape[:-1], shape[-1] + 3, scale=scale)[..., 1:-2]

    def transposed(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A view whose last dimension is not the contiguous one."""
        return self.randn(*shape[:-2], shape[-1], shape[-2], scale=scale).transpose(-1, -2)

    def expanded(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A view with stride 0 along the first dimension."""
        return self.randn(1, *shape[1:], scale=scale).expand(*shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        return self._draw(torch.randint, high, shape).to(self.device)

    def permutation(self, n: int) -> Tensor:
        return self._draw(torch.randperm, n).to(self.device)

    def labels(
        self, rows: int, classes: int, ignored: float = 0.0, ignore_index: int = -100
    ) -> Tensor:
        """int64 labels in [0, classes), a share `ignored` of them (1.0: all) replaced by `ignore_index`."""
        labels = self._draw(torch.randint, classes, (rows,))
        drop = self._draw(torch.rand, rows) < ignored
        return labels.masked_fill(drop, ignore_index).to(self.device)

    def peaked(self, rows: int, classes: int, labels: Tensor, height: float = 60.0) -> Tensor:
        """Logits that are certain: even rows right (p -> 1), odd rows wrong (loss ~ height)."""
        logits = self._draw(torch.randn, (rows, classes)).to(self.device)
        at, row = labels.clamp(min=0), torch.arange(rows, device=labels.device)
        logits[row, torch.where(row % 2 == 0, at, (at + 1) % classes)] += height
        return logits.to(self.dtype)


Inputs = Callable[[Make], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class OpCase:
    """One named input of an op; made by `case`.

    `inputs(make)` returns the positional tensors (or None); `options` are the keyword arguments after them. `why` says
    what the case is there to catch. `flops` are the least that forward and backward together must do (0: not
    meaningful). `large` cases are for the GPU: too slow for the CPU suite; of these, `sweep` cases map a whole plane of
    shapes, and are measured only on request. `unused`: positions of outputs that nobody uses in this case.
    `frozen`: positions of differentiable inputs that require no gradient in it.
    """

    id: str
    why: str
    inputs: Inputs
    options: Mapping[str, Any] = field(default_factory=dict)
    flops: int = 0
    large: bool = False
    sweep: bool = False
    unused: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()


def elements(case: OpCase) -> int:
    """Of all inputs of a case."""
    return sum(t.numel() for t in case.inputs(Make(torch.float32)) if t is not None)


def case(id: str, why: str, inputs: Inputs, **more: Any) -> OpCase:
    """`more`: fields of the case, and options of the op."""
    fields = {name: more.pop(name) for name in OpCase.__match_args__ if name in more}
    return OpCase(id, why, inputs, more, **fields)


@dataclass(frozen=True)
class OpSpec:
    """An op under test: how to call it, its reference with the same arguments, and its cases.

    `function(*inputs, **options)` and `reference(*inputs, **options)` return a tensor or a tuple of tensors and Nones.
    `defaults`: options of every case that has no others. `differentiable`: positions of the inputs that may require a
    gradient. `outputs_without_grad`: positions of outputs that carry none.
    `elementwise`: positions of outputs compared element by element. `traffic`: how often forward and backward together
    must move the elements of the inputs at these positions (0: not meaningful), or a function of the inputs that says
    how many bytes.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[OpCase, ...]
    differentiable: tuple[int, ...]
    outputs_without_grad: tuple[int, ...] = ()
    elementwise: tuple[int, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    traffic: tuple[float, tuple[int, ...]] | Callable[..., int] = (0, ())

    def __post_init__(self) -> None:
        cases = (replace(c, options={**self.defaults, **c.options}) for c in self.cases)
        object.__setattr__(self, "cases", tuple(cases))

    def bytes_moved(self, inputs: Sequence[Tensor | None]) -> int:
        if callable(self.traffic):
            return self.traffic(*inputs)
        times, positions = self.traffic
        moved = (t for i in positions if (t := inputs[i]) is not None)
        return round(times * sum(t.numel() * t.element_size() for t in moved))


def specs() -> dict[str, OpSpec]:
    """The spec of every op and of every linear or sharded loss, by its name."""
    rooms = {"ops": OPS, "loss_head": LINEAR_LOSSES, "distributed": SHARDED_LOSSES}
    folders = [f"{room}.{name}" for room, names in rooms.items() for name in names]
    found = (import_module(f"liger_kernel.{folder}.cases").SPEC for folder in folders)
    return {spec.name: spec for spec in found}
