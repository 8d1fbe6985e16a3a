"""One case of an op on one device: its inputs, what to call and how often it must be right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmark.measure import release
from liger_kernel.testing import OpCase, OpSpec, assert_no_worse
from liger_kernel.testing.calls import (
    as_tuple,
    backward,
    call,
    drawing_on,
    drawn,
    leaves,
    wanted_inputs,
)

MODES = ("fwd", "bwd", "full")
SAMPLE = 2**21  # elements of a tensor that are compared

Function = Callable[..., Any]
Results = tuple[tuple[Any, ...], dict[int, Tensor]]


class Workload:
    def __init__(self, spec: OpSpec, case: OpCase, dtype: torch.dtype, device: str) -> None:
        self.spec, self.case = spec, case
        with drawing_on(device, dtype) as make:
            self.inputs, grads = drawn(spec, case, make)
        # 1 for a scalar is what `loss.backward()` sends
        self.grads = {i: g if g.ndim else torch.ones_like(g) for i, g in grads.items()}
        self.wanted = wanted_inputs(spec, case, self.inputs)
        self._truth: tuple[int, Results, Results] | None = None

    def arguments(self) -> list[Any]:
        """The inputs as leaves, copied: a peer may write into them."""
        copies = tuple(t if t is None else t.clone() for t in self.inputs)
        return leaves(copies, self.wanted)

    def calls(self, function: Function, mode: str, copies: int = 1) -> list[Callable[[], Any]]:
        """What to time, once per copy of the inputs. "bwd" runs the forward now and repeats the backward only."""
        return [self._call(function, mode) for _ in range(copies)]

    def _call(self, function: Function, mode: str) -> Callable[[], Any]:
        arguments = self.arguments()
        if mode == "fwd":
            return partial(function, *arguments)
        if mode == "full":
            return partial(call, function, {}, arguments, self.grads)
        outputs = as_tuple(function(*arguments))
        return partial(backward, outputs, arguments, self.grads, retain_graph=True)

    def input_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.inputs if t is not None)

    def work(self, mode: str) -> tuple[float, float]:
        """(bytes, FLOPs) that `mode` cannot do without.

        The case knows those of the full call. The forward reads its inputs and writes its outputs; the backward is the
        rest. FLOPs of fused losses cannot be split: their forward computes gradients.
        """
        case, full = self.case, self.spec.bytes_moved(self.inputs)
        if mode == "full":
            return full, case.flops
        if not full or case.flops:
            return 0, 0
        forward = self.input_bytes() + sum(
            g.numel() * g.element_size() for g in self.grads.values()
        )
        return (forward, 0) if mode == "fwd" else (max(0, full - forward), 0)

    def check(self, function: Function, exact_dtype: bool = True) -> str:
        """Compare outputs and gradients with float64; AssertionError if they are worse than the project's rule allows.

        A peer may return another dtype than the op does; `exact_dtype=False` converts it first.
        Returns: what was compared.
        """
        if self._truth is None:
            self._truth = self._whole_or_part()
        rows, high, low = self._truth
        ours = self._sampled_run(function, rows)
        for i, (a, b, c) in enumerate(zip(ours[0], high[0], low[0], strict=True)):
            if a is not None and b is not None:
                a = a if exact_dtype else a.to(c.dtype)
                assert_no_worse(f"output {i}", a, b, c, elementwise=i in self.spec.elementwise)
        for i, grad in ours[1].items():
            assert_no_worse(f"gradient of input {i}", grad, high[1][i], low[1][i])
        total = self._rows()
        return "all rows" if rows == total else f"first {rows} of {total} rows"

    def _rows(self) -> int:
        first = self.inputs[0]
        assert first is not None
        return first.shape[0]

    def _whole_or_part(self) -> tuple[int, Results, Results]:
        """The truth for as many rows as fit the memory in float64."""
        rows = self._rows()
        if self.case.flops:  # wide logits in float64
            rows = min(rows, 4096)
        reference = partial(self.spec.reference, **self.case.options)
        while True:
            try:
                high = self._sampled_run(reference, rows, torch.float64)
                return rows, high, self._sampled_run(reference, rows)
            except torch.OutOfMemoryError:
                if rows < 2:
                    raise
            rows //= 2
            release()

    def _sampled_run(
        self, function: Function, rows: int, dtype: torch.dtype | None = None
    ) -> Results:
        """Call with the first `rows` rows of everything that has rows, and keep a sample of each result."""
        total = self._rows()

        def part(t: Tensor) -> Tensor:
            return t[:rows].clone() if t.ndim and t.shape[0] == total else t.clone()

        inputs = leaves(tuple(t if t is None else part(t) for t in self.inputs), self.wanted, dtype)
        outputs, grads = call(function, {}, inputs, {i: part(g) for i, g in self.grads.items()})
        return (
            tuple(sample(t) if isinstance(t, Tensor) else t for t in outputs),
            {i: sample(g) for i, g in grads.items()},
        )


def sample(t: Tensor) -> Tensor:
    """Whole rows, evenly spaced, the first and the last among them; everything if that is little."""
    t = t.detach()
    if t.numel() <= SAMPLE:
        return t.clone()
    rows = t.reshape(-1, t.shape[-1]) if t.ndim > 1 else t
    count = max(2, SAMPLE // rows[0].numel())
    chosen = torch.linspace(
        0, rows.shape[0] - 1, count, dtype=torch.float64, device=t.device
    ).long()
    return rows[chosen]
