"""The rules of the house that only a GPU can break: host syncs, graph capture, devices, determinism, recompiles."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_kernel.testing import Make, OpCase, OpSpec, specs
from liger_kernel.testing.calls import (
    assert_as_exact,
    call,
    cotangents,
    drawing_on,
    drawn,
    leaves,
    output_shapes,
    wanted_inputs,
)

SPECS = list(specs().values())
BF16 = torch.bfloat16  # what training runs in; `tests/ops` covers the other dtypes

#: position of the token axis in each input (None: the input has none), where it is not axis 0
TOKEN_AXES: dict[str, tuple[int | None, ...]] = {"rope": (2, 2, -2, -2)}


def params(large: bool) -> list[Any]:
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.id}")
        for spec in SPECS
        for case in spec.cases
        if case.large == large and not case.sweep
    ]


every_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
every_case = pytest.mark.parametrize(("spec", "case"), params(large=False))
every_large_case = pytest.mark.parametrize(("spec", "case"), params(large=True))


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_bit_equal(ours: Any, other: Any) -> None:
    """Both are (outputs, gradients) as `call` returns them."""
    (outputs, grads), (outputs_too, grads_too) = ours, other
    assert grads.keys() == grads_too.keys()
    for i, (a, b) in enumerate(zip(outputs, outputs_too, strict=True)):
        assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num()), (
            f"output {i}"
        )
    for i, grad in grads.items():
        assert torch.equal(grad.nan_to_num(), grads_too[i].nan_to_num()), f"gradient of input {i}"


def overwrite(target: Tensor, source: Tensor) -> None:
    """Copy into the memory behind `target`, which may be a view with stride 0."""
    for dim in range(target.ndim):
        if target.stride(dim) == 0:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.detach().copy_(source)


def test_the_sync_check_bites() -> None:
    with pytest.raises(RuntimeError), no_host_sync():
        torch.ones(1, device="cuda").item()


@every_case
def test_no_host_sync(spec: OpSpec, case: OpCase) -> None:
    inputs, grads = drawn(spec, case, Make(BF16, "cuda"))
    args = leaves(inputs, wanted_inputs(spec, case, inputs))
    torch.use_deterministic_algorithms(
        False
    )  # its substitutes for torch's own kernels are not what users run
    call(spec.function, case.options, args, grads)  # compiles
    with no_host_sync():
        call(spec.function, case.options, args, grads)


@every_case
def test_cuda_graph_capture(spec: OpSpec, case: OpCase) -> None:
    inputs, grads = drawn(spec, case, Make(BF16, "cuda"))
    args = leaves(inputs, wanted_inputs(spec, case, inputs))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call(spec.function, case.options, args, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(spec.function, case.options, args, grads)

    fresh, fresh_grads = drawn(spec, case, Make(BF16, "cuda", seed=1))
    for target, source in zip(
        (*inputs, *grads.values()), (*fresh, *fresh_grads.values()), strict=True
    ):
        if target is not None:
            overwrite(target, source)
    graph.replay()
    torch.cuda.synchronize()
    eager = call(
        spec.function, case.options, leaves(fresh, wanted_inputs(spec, case, fresh)), fresh_grads
    )
    assert_bit_equal(captured, eager)


@every_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors(spec: OpSpec) -> None:
    case = spec.cases[0]
    results = []
    for device in ("cuda:1", "cuda:0"):
        inputs, grads = drawn(spec, case, Make(BF16, device))
        with torch.cuda.device(0):
            outputs, found = call(
                spec.function,
                case.options,
                leaves(inputs, wanted_inputs(spec, case, inputs)),
                grads,
            )
        made = [t for t in (*outputs, *found.values()) if t is not None]
        assert {t.device for t in made} == {torch.device(device)}
        results.append(
            (
                tuple(t if t is None else t.cpu() for t in outputs),
                {i: t.cpu() for i, t in found.items()},
            )
        )
    assert_bit_equal(*results)


@pytest.mark.xdist_group("memory")
@every_large_case
def test_deterministic_at_size(spec: OpSpec, case: OpCase) -> None:
    with drawing_on("cuda", BF16) as make:
        inputs, grads = drawn(spec, case, make)
    # it would make torch's own kernels deterministic for us
    torch.use_deterministic_algorithms(False)

    def once() -> tuple[tuple[Any, ...], dict[int, Tensor]]:
        fresh = tuple(t if t is None else t.clone() for t in inputs)  # it may be overwritten
        args = leaves(fresh, wanted_inputs(spec, case, inputs))
        return call(spec.function, case.options, args, grads)

    first = once()
    for _ in range(2):
        assert_bit_equal(once(), first)


def token_axes(spec: OpSpec, inputs: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    if spec.name in TOKEN_AXES:
        return TOKEN_AXES[spec.name]
    first = inputs[0]
    assert first is not None
    return tuple(
        0 if t is not None and t.ndim and t.shape[0] == first.shape[0] else None for t in inputs
    )


def resized(
    spec: OpSpec, case: OpCase, tokens: int, seed: int = 0
) -> tuple[tuple[Any, ...], dict[int, Tensor]]:
    """`case` with `tokens` tokens: each a random one of its own."""
    make = Make(BF16, "cuda", seed)
    inputs = case.inputs(make)
    axes = token_axes(spec, inputs)
    there = inputs[0].shape[axes[0]]  # type: ignore[union-attr, index]
    chosen = make.integers(there, tokens)
    resized = tuple(
        t if t is None or axis is None else t.index_select(axis, chosen)
        for t, axis in zip(inputs, axes, strict=True)
    )
    return resized, cotangents(spec, case, output_shapes(spec, case, resized), make)


@pytest.mark.xdist_group("memory")
@every_op
def test_more_tokens_than_a_grid_axis_holds(spec: OpSpec) -> None:
    """65,535 is the most that grid axes y and z hold."""
    case = spec.cases[0]
    assert_as_exact(spec, case, *resized(spec, case, 70_001))


def compiled_kernels() -> dict[str, int]:
    """Number of compiled variants of every Triton kernel of this package."""
    from triton.runtime import JITFunction

    found: dict[str, int] = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("liger_kernel"):
            continue
        for value in vars(module).values():
            while hasattr(value, "fn") and not isinstance(
                value, JITFunction
            ):  # autotune, heuristics
                value = value.fn
            if isinstance(value, JITFunction):
                variants = sum(len(cache[0]) for cache in value.device_caches.values())
                found[f"{value.module}.{value.__name__}"] = variants
    return found


@every_op
def test_no_recompile_for_another_length(spec: OpSpec) -> None:
    """Triton compiles anew for an integer that is 1 or divisible by 16, so the warm-up holds both kinds; the second ten
    lengths are new, but each is in every such class (for tiles of 1 to 64 rows) together with one of the first.
    """
    case = spec.cases[0]
    warm_up = (
        1,
        2,
        7,
        16,
        33,
        48,
        100,
        333,
        777,
        1024,
        1040,
        2000,
        4096,
        8001,
        17_000,
        34_001,
        40_960,
    )
    again = tuple(
        n + 1024 * (i + 1)
        for i, n in enumerate((7, 16, 33, 48, 100, 333, 777, 1024, 17_000, 40_960))
    )
    counts = []
    for lengths in (warm_up, again):
        for tokens in lengths:
            inputs, grads = resized(spec, case, tokens)
            call(
                spec.function,
                case.options,
                leaves(inputs, wanted_inputs(spec, case, inputs)),
                grads,
            )
        counts.append(compiled_kernels())
    assert any(counts[0].values()), "no kernel was found: this test would not see a recompile"
    grown = {
        name: (counts[0].get(name, 0), n)
        for name, n in counts[1].items()
        if n > counts[0].get(name, 0)
    }
    assert not grown, f"compiled variants before and after: {grown}"
