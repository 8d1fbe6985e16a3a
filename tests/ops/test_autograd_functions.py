"""The incumbent's autograd Functions, as frameworks use them: subclassed, or called by their forward and backward."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from liger_kernel import ops
from liger_kernel.compat import ops as compat_ops
from liger_kernel.testing import Make
from tests.fresh import in_a_new_process

Arguments = tuple[Any, ...]
FUNCTIONS = [name for names in ops.SERVED.values() for name in names if name.endswith("Function")]


class OneRank:
    """A process group of this process alone."""

    size = staticmethod(lambda: 1)


SERVED = {**ops.OPS, **ops.LINEAR_LOSSES}
FROZEN = torch.nn.Linear(8, 8).requires_grad_(False)
FUNCTIONS = [name for names in SERVED.values() for name in names if name.endswith("Function")]


MAKE = Make(torch.float32)


def leaf(*shape: int) -> Tensor:
    return MAKE.randn(*shape).requires_grad_()


def arguments(name: str) -> Arguments:
    """Leaves that require a gradient, and the other arguments of `apply`."""
    MAKE.__post_init__()  # the same numbers at each call
    rows = of_losses()
    return rows[name] if name in rows else of_others()[name]


def of_losses() -> dict[str, Arguments]:
    labels = MAKE.labels(5, 12, 0.3)
    fixed = MAKE.randn(5, 12).softmax(-1)
    return {
        "LigerCrossEntropyFunction": (
            *(leaf(5, 12), labels, None, -100, 1e-3, 0.1, "mean", 5.0),
            *(True, True, True),
        ),
        "LigerFusedLinearCrossEntropyFunction": (leaf(5, 8), leaf(12, 8), labels, leaf(12)),
        "LigerFusedLinearScaledCrossEntropyFunction": (
            *(leaf(5, 8), leaf(12, 8), labels, 0.7),
            *(-100, 1, True, MAKE.integers(12, 3)),
        ),
        "LigerFusedLinearScaledCrossEntropyTPFunction": (
            *(leaf(5, 8), leaf(12, 8), labels, OneRank, 0.7),
            *(-100, 1, True),
        ),
        "LigerVocabParallelCEFunction": (
            *(leaf(5, 1, 12), labels[:, None], None, -100, 0.1),
            *("megatron", "partition"),
        ),
        "LigerJSDFunction": (leaf(5, 12), fixed.log(), labels, 0.3, -100),
        "LigerKLDivLossFunction": (leaf(5, 12), fixed, "none", False, 1e-6),
        "LigerTVDLossFunction": (leaf(5, 12), fixed, labels, "mean", -100),
        "LigerFusedCETVDFunction": (leaf(5, 12), fixed.log(), labels, -100),
        "LigerFusedLinearJSDFunction": (
            *(leaf(5, 8), leaf(12, 8), MAKE.randn(5, 6), MAKE.randn(12, 6)),
            *(labels, 0.3, -100, 2.0),
        ),
        "LigerFusedLinearKLDivFunction": (leaf(5, 8), leaf(12, 8), fixed, labels, "mean", -100),
        "GrpoLossFunction": (
            *(
                leaf(2, 4, 12),
                None,
                -MAKE.randn(2, 3).abs(),
                MAKE.integers(12, 2, 3),
                MAKE.randn(2),
            ),
            *(MAKE.integers(2, 2, 3), 0.9, 0.1, 0.2, 0.3, False, "dapo"),
        ),
    }


def of_others() -> dict[str, Arguments]:
    of_glu = (leaf(5, 12), leaf(5, 12))
    return {
        "LigerRMSNormFunction": (leaf(5, 12), leaf(12), 1e-6),
        "LigerFusedAddRMSNormFunction": (*of_glu, leaf(12), 1e-6),
        "LigerLayerNormFunction": (leaf(5, 12), leaf(12), leaf(12), 1e-6),
        "LigerModulatedRMSNormFunction": (leaf(5, 12), leaf(12), leaf(12), leaf(12), 1e-6),
        "LigerFusedMoEFunction": (
            *(leaf(5, 8), leaf(3, 12, 8), leaf(3, 8, 6)),
            *(MAKE.integers(3, 5, 2), leaf(5, 2)),
        ),
        "LigerGroupNormFunction": (leaf(3, 12, 5), leaf(12), leaf(12), 12, 4, 1e-6),
        "LigerPolyNormFunction": (leaf(5, 12), leaf(3), leaf(1), 1e-6),
        "LigerMLPFunction": (leaf(5, 8), leaf(12, 8), leaf(12, 8), leaf(8, 12), 0.5, 2.0),
        "LigerSiLUMulFunction": (*of_glu, 0.5, 2.0),
        "LigerGELUMulFunction": of_glu,
        "LigerFusedGateUpSiLUMulFunction": (leaf(5, 12),),
        "LigerMHCCoeffsFunction": (
            *(leaf(5, 2, 6), leaf(12, 8), leaf(8), leaf(), leaf(), leaf()),
            *(False, 3, 1e-6, 0.0, 1e-6, 2.0),
        ),
        "LigerAttnResFunction": (leaf(3, 5, 6), leaf(6), leaf(6), 1e-6),
        "LigerMHCPreFunction": (leaf(5, 2, 6), leaf(5, 2)),
        "LigerMHCPostResFunction": (leaf(5, 2, 6), leaf(5, 6), leaf(5, 2), leaf(5, 2, 2)),
        "LigerDyTFunction": (leaf(5, 12), leaf(1), leaf(12), leaf(12)),
        "LigerSoftmaxFunction": (leaf(5, 12),),
        "LigerSparsemaxFunction": (leaf(5, 12), 0),
        "LigerReLUSquaredFunction": (leaf(5, 12),),
        "LigerLlama4RopeFunction": (
            *(leaf(2, 3, 4, 8), leaf(2, 3, 2, 8)),
            torch.view_as_complex(MAKE.randn(3, 4, 2)),
        ),
        "LigerQwen2VLMRopeFunction": (
            *(leaf(2, 4, 3, 8), leaf(2, 2, 3, 8), MAKE.randn(3, 2, 3, 8), MAKE.randn(3, 2, 3, 8)),
            [1, 1, 2],
        ),
        "LigerTiledMLPFunction": (lambda m, x: m(x), FROZEN, leaf(5, 8), 3),
        "LigerMultiTokenAttentionFunction": (leaf(1, 2, 5, 5), leaf(2, 2, 3, 3), leaf(2), 1, 1),
        "LigerFusedNeighborhoodAttentionFunction": (*(leaf(1, 2, 5, 4) for _ in "qkv"), 3, 1),
        "LigerEmbeddingFunction": (leaf(6, 8), torch.tensor([[1, 5, 1], [0, 1, 3]])),
        "LigerRopeFunction": (leaf(2, 4, 3, 8), leaf(2, 2, 3, 8), leaf(3, 8), leaf(3, 8)),
    }


def tensors(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def weights(output: Tensor) -> Tensor:
    return torch.linspace(1, 2, max(1, output.numel())).view_as(output)


def run(function: Any, given: Arguments) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """Outputs, and the gradient of a weighted sum of them for each argument."""
    outputs = tensors(function(*given))
    leaves = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
    roots = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
    total = sum((o * weights(o)).sum() for o in roots)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return outputs, list(found)


def assert_same(ours: Any, expected: Any) -> None:
    for a, b in zip([*ours[0], *ours[1]], [*expected[0], *expected[1]], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    for a, b in zip(ours[0], expected[0], strict=True):
        assert a is None or a.requires_grad == b.requires_grad


def subclass_of(function: Any) -> Any:
    class Mine(function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            ctx.seen = len(given)
            return function.forward(ctx, *given)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            assert ctx.seen
            return function.backward(ctx, *grads)

    return Mine


@pytest.mark.parametrize("name", FUNCTIONS)
class TestEveryFunction:
    def test_is_a_function_of_autograd(self, name: str) -> None:
        function = getattr(ops, name)
        assert issubclass(function, torch.autograd.Function)
        assert function.__name__ == name
        assert pickle.loads(pickle.dumps(function)) is function is copy.deepcopy(function)

    def test_a_subclass(self, name: str) -> None:
        function, given = getattr(ops, name), arguments(name)
        mine = subclass_of(function)
        expected = run(function.apply, given)
        found = run(mine.apply, given)
        assert_same(found, expected)
        roots = [o for o in found[0] if isinstance(o, Tensor) and o.requires_grad]
        assert all(type(o.grad_fn).__name__ == "MineBackward" for o in roots)

    def test_a_ctx_of_somebody_else(self, name: str) -> None:
        function, given = getattr(ops, name), arguments(name)
        outputs, expected = run(function.apply, given)
        needs = tuple(isinstance(t, Tensor) and t.requires_grad for t in given)
        ctx = SimpleNamespace(needs_input_grad=needs, save_for_backward=print, saved_tensors=())
        alone = tensors(function.forward(ctx, *given))
        floating = [o is not None and o.is_floating_point() for o in alone]
        grads = function.backward(
            ctx, *(weights(o) if f else None for o, f in zip(alone, floating, strict=True))
        )
        found = [grad for grad, need in zip(grads, needs, strict=False) if need]
        assert_same(
            ([o for o in alone if o is not None], found),
            ([o.detach() for o in outputs if o is not None], expected),
        )
        assert len(grads) >= len(given)
        assert all(g is None for g, need in zip(grads, needs, strict=False) if not need)

    def test_frozen_inputs_cost_nothing(self, name: str) -> None:
        function, given = getattr(ops, name), arguments(name)
        leaf = next(t for t in given if isinstance(t, Tensor))
        first = tuple(t.detach() if isinstance(t, Tensor) and t is not leaf else t for t in given)
        assert_same(run(subclass_of(function).apply, first), run(function.apply, first))
        constant = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
        for output in tensors(subclass_of(function).apply(*constant)):
            assert output is None or not output.requires_grad

    def test_one_graph_of_torch_compile(self, name: str) -> None:
        function, given = getattr(ops, name), arguments(name)
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: function.apply(*a), backend="eager", fullgraph=True)
        outputs, grads = run(compiled, given)
        assert [o is None for o in outputs] == [o is None for o in run(function.apply, given)[0]]
        assert all(grad is not None for grad in grads[:1])


@pytest.mark.parametrize("op", ops.OPS)
def test_the_package_of_an_op_serves_its_names(op: str) -> None:
    package = importlib.import_module(f"liger_kernel.ops.{op}")
    for name in ops.OPS[op]:
        assert getattr(package, name) is getattr(ops, name) is getattr(compat_ops, name)
        assert name in dir(ops)
    others = {name for names in ops.OPS.values() for name in names} - {*ops.OPS[op]}
    assert not [name for name in others if hasattr(package, name)]


def test_names_are_imported_when_they_are_used() -> None:
    program = (
        "import sys, liger_kernel.ops.rms_norm as op, liger_kernel.functional\n"
        "assert 'liger_kernel.compat.ops' not in sys.modules\n"
        "assert op.LigerRMSNormFunction.__module__ == 'liger_kernel.compat.ops.core'"
    )
    in_a_new_process(program)


NAME = "LigerRMSNormFunction"
Mine = subclass_of(ops.LigerRMSNormFunction)


class Shifted(ops.LigerRMSNormFunction):
    """Arguments of its own, and tensors that are made in forward: `needs_input_grad` is about others."""

    @staticmethod
    def forward(ctx: Any, factor: float, x: Tensor, weight: Tensor) -> Tensor:
        ctx.factor = factor
        return ops.LigerRMSNormFunction.forward(ctx, factor * x, weight, eps=1e-6)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dx, dw, *_ = ops.LigerRMSNormFunction.backward(ctx, grad)
        return None, ctx.factor * dx, dw


def test_a_subclass_with_other_arguments() -> None:
    x, weight, eps = arguments(NAME)
    found = run(Shifted.apply, (2.0, x, weight))
    expected = run(
        lambda x, weight: ops.LigerRMSNormFunction.apply(2.0 * x, weight, eps), (x, weight)
    )
    assert_same(found, expected)


def test_within_a_checkpoint() -> None:
    given = arguments(NAME)
    expected = run(Mine.apply, given)
    assert_same(run(lambda *a: checkpoint(Mine.apply, *a, use_reentrant=False), given), expected)
    y = checkpoint(Mine.apply, *given, use_reentrant=True)
    (y * weights(y)).sum().backward()
    assert torch.equal(given[0].grad, expected[1][0])


def test_backward_twice() -> None:
    x, *rest = arguments(NAME)
    y = Mine.apply(x, *rest)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.autograd.grad(y.sum(), x)
    with pytest.raises(RuntimeError, match=r"second backward through LigerRMSNorm.*retain_graph"):
        torch.autograd.grad(y.sum(), x)


def test_a_second_derivative_is_refused() -> None:
    x, *rest = arguments(NAME)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(Mine.apply(x, *rest).sum(), x, create_graph=True)


def test_nothing_is_kept_after_backward() -> None:
    x, weight, eps = arguments("LigerRMSNormFunction")
    held = 2 * x
    seen = weakref.ref(held.untyped_storage())
    y = Mine.apply(held, weight, eps)
    y.sum().backward()
    del held
    gc.collect()
    assert y.grad_fn is not None
    assert seen() is None
