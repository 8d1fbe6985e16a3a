"""LigerCrossEntropyLoss and LigerFusedLinearCrossEntropyLoss: the ops with their options, torch's call forms."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch
from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

from liger_kernel.backends import use_implementation
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernel.ops.cross_entropy import cross_entropy
from liger_kernel.testing import Make, assert_draws_no_worse, assert_no_worse
from liger_kernel.transformers.functional import CrossEntropyOutput

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"ignore_index": 3, "reduction": "sum", "softcap": 4.0},
    {"lse_square_scale": 1e-3, "label_smoothing": 0.2, "reduction": "none", "return_z_loss": True},
    {"return_token_accuracy": True, "return_predicted_tokens": True},
)


def assert_same(found: Any, outputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    if not any(name.startswith("return_") for name in options):
        assert torch.equal(found, outputs[0])
        return
    assert isinstance(found, CrossEntropyOutput)
    for a, b in zip(
        (found.loss, found.z_loss, found.token_accuracy, found.predicted_tokens),
        outputs,
        strict=True,
    ):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_modules_call_the_ops(options: dict[str, Any]) -> None:
    make = Make(torch.float32, DEVICE)
    states, weight = make.randn(6, 8), make.randn(20, 8)
    target = make.labels(6, 20, 0.2, options.get("ignore_index", -100))
    bias, class_weight = make.randn(20), make.randn(20).abs()
    logits = states @ weight.t()
    assert_same(
        LigerCrossEntropyLoss(class_weight, **options)(logits, target),
        cross_entropy(logits, target, class_weight, **options),
        options,
    )
    for more in ({}, {"use_token_scaling": True, "accum_dtype": torch.float32}):
        module = LigerFusedLinearCrossEntropyLoss(class_weight, **options, **more)
        assert_same(
            module(weight, states, target, bias),
            fused_linear_cross_entropy(
                states, weight, target, bias, class_weight, **options, **more
            ),
            options,
        )
        assert not list(module.buffers())


def test_gradients_flow_through_the_modules() -> None:
    make = Make(torch.float32, DEVICE)
    states, weight = make.randn(6, 8).requires_grad_(), make.randn(20, 8).requires_grad_()
    target = make.labels(6, 20)
    LigerFusedLinearCrossEntropyLoss()(weight, states, target).backward()
    fused = states.grad
    states.grad = None
    LigerCrossEntropyLoss()(states @ weight.t(), target).backward()
    assert fused is not None
    assert states.grad is not None
    exact = states.detach().double().requires_grad_()
    cross_entropy(exact @ weight.detach().double().t(), target)[0].backward()
    assert exact.grad is not None
    assert_no_worse("hidden states", fused, exact.grad, states.grad)


def test_cross_entropy_in_place_overwrites_the_logits() -> None:
    make = Make(torch.float32, DEVICE)
    logits, target = make.randn(6, 20).requires_grad_(), make.labels(6, 20)
    with use_implementation("triton"):
        expected = torch.autograd.grad(LigerCrossEntropyLoss()(logits, target), logits)[0]
        module = LigerCrossEntropyLoss(in_place=True)
        assert "in_place=True" in repr(module)
        module(logits, target).backward()
    assert torch.equal(logits.grad, expected)
    assert torch.equal(logits.detach(), expected)


@pytest.mark.parametrize("module", [LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss])
def test_options_are_checked_when_made(module: Any) -> None:
    for words, options in (
        ("'avg'.*'mean', 'sum', 'none'", {"reduction": "avg"}),
        ("label_smoothing=-0.1", {"label_smoothing": -0.1}),
        ("softcap=0.0", {"softcap": 0.0}),
    ):
        with pytest.raises(ValueError, match=words):
            module(**options)
    assert "softcap=2.0" in repr(module(softcap=2.0))


def test_in_place_is_checked_when_made() -> None:
    with pytest.raises(ValueError, match='in_place=True with reduction="none"'):
        LigerCrossEntropyLoss(reduction="none", in_place=True)


@pytest.mark.parametrize("module", [LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss])
def test_every_option_arrives(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the constructor and from an attribute that is set later, in the name that the op has for it."""
    op = "cross_entropy" if module is LigerCrossEntropyLoss else "fused_linear_cross_entropy"
    given: dict[str, Any] = {}

    def recorded(*args: Any, **options: Any) -> Any:
        given.update(options)
        return "loss", None, None, None

    monkeypatch.setattr(importlib.import_module(f"liger_kernel.ops.{op}"), op, recorded)
    parameters = inspect.signature(module).parameters
    values = {name: object() for name in parameters}
    values |= {"label_smoothing": 0.1, "reduction": "sum", "softcap": 3.0}
    changed = module()
    for name, value in values.items():
        setattr(changed, name, value)
    renamed = {"class_weight" if name == "ce_weight" else name: values[name] for name in values}
    tensors = ("logits", "target") if op == "cross_entropy" else ("weight", "states", "target")
    for loss in (module(**values), changed):
        given.clear()
        assert loss(*tensors) == "loss"
        assert given == renamed


@pytest.mark.parametrize("module", [LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss])
def test_copies(module: Any) -> None:
    loss = module(torch.arange(4.0), reduction="sum", return_z_loss=True)
    assert "tensor" not in repr(loss)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(other) is module
        assert repr(other) == repr(loss)
        weight = next(iter(inspect.signature(module).parameters))
        assert torch.equal(getattr(other, weight), torch.arange(4.0))
        assert not other.state_dict()


def test_compiled_without_a_graph_break() -> None:
    """The numbers of the uncompiled modules, but for rounding: one composes what the other has a step for."""
    torch._dynamo.reset()

    def draw(seed: int) -> Any:
        def run(dtype: torch.dtype, compiled: bool = False) -> Any:
            make = Make(torch.float32, seed=seed)
            states, weight = make.randn(6, 8).to(dtype), make.randn(20, 8).to(dtype)
            target = make.labels(6, 20)
            plain = LigerCrossEntropyLoss(return_z_loss=True, lse_square_scale=0.1)
            fused = LigerFusedLinearCrossEntropyLoss(make.randn(20).abs().to(dtype))

            def both() -> dict[str, torch.Tensor]:
                output = plain(states @ weight.t(), target)
                parts = {"loss": output.loss, "z_loss": output.z_loss}
                return {**parts, "fused": fused(weight, states, target)}  # torch 2.6 knows no |

            return torch.compile(both, fullgraph=True, backend="eager")() if compiled else both()

        return run(torch.float32, compiled=True), run(torch.float64), run(torch.float32)

    with use_implementation("reference"):
        assert_draws_no_worse(draw)
