"""What the gated product and the gated MLP refuse, with both values in the message, and what small calls become."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import liger_kernel.ops.gated_mlp as module
from liger_kernel.backends import use_implementation
from liger_kernel.ops.gated_mlp import gated_mlp, reference
from liger_kernel.ops.glu import gated_product, glu, glu_packed

HIDDEN, FEATURES = 6, 8


def block(**changed: Any) -> dict[str, Tensor | None]:
    shapes = {
        "x": (3, HIDDEN),
        "gate_weight": (FEATURES, HIDDEN),
        "up_weight": (FEATURES, HIDDEN),
        "down_weight": (HIDDEN, FEATURES),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(s, generator=generator) for name, s in shapes.items()} | changed


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (3, HIDDEN + 1)),
        ("x", ()),
        ("gate_weight", (2 * FEATURES, HIDDEN)),
        ("gate_weight", (HIDDEN, FEATURES)),
        ("gate_weight", (FEATURES,)),
        ("up_weight", (FEATURES + 1, HIDDEN)),
        ("down_weight", (FEATURES, HIDDEN)),
        ("down_weight", (FEATURES,)),
        ("down_weight", (1, HIDDEN, FEATURES)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"gate_weight .*down_weight .* do not fit .*\(F, H\)"
    ) as e:
        gated_mlp(**block(**{name: torch.ones(shape)}))
    assert str(shape) in str(e.value)


def test_a_packed_weight_holds_both() -> None:
    packed = torch.ones(2 * FEATURES, HIDDEN)
    assert gated_mlp(**block(gate_weight=packed, up_weight=None)).shape == (3, HIDDEN)
    with pytest.raises(ValueError, match=r"up_weight None.*do not fit"):
        gated_mlp(**block(up_weight=None))


@pytest.mark.parametrize("name", ["gate_weight", "up_weight", "down_weight"])
def test_weights_of_another_kind(name: str) -> None:
    good = block()[name]
    assert good is not None
    with pytest.raises(TypeError, match=r"x is torch.float32, but .*torch.float16.*autocast"):
        gated_mlp(**block(**{name: good.half()}))
    with pytest.raises(TypeError, match=rf"{name} must have a floating dtype, got torch.int64"):
        gated_mlp(**block(**{name: good.long()}))
    with pytest.raises(ValueError, match=rf"on one device.*x on cpu.*{name} on meta"):
        gated_mlp(**block(**{name: good.to("meta")}))
    with torch.autocast("cpu", torch.bfloat16):
        assert gated_mlp(**block(**{name: good.half()})).dtype == torch.bfloat16


def test_what_the_product_refuses() -> None:
    gate = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"float32 \(3, 8\) and torch.float32 \(3, 4\)"):
        glu(gate, gate[:, :4])
    with pytest.raises(ValueError, match=r"float32 \(3, 8\) and torch.float16 \(3, 8\)"):
        glu(gate, gate.half())
    with pytest.raises(ValueError, match=r"same dtype and shape"):
        glu(torch.ones(()), torch.ones(()))
    with pytest.raises(ValueError, match=r"on one device.*gate on cpu.*up on meta"):
        glu(gate, gate.to("meta"))
    for up in (gate.long(), gate):
        with pytest.raises(TypeError, match=r"gate must have a floating dtype, got torch.int64"):
            glu(gate.long(), up)
    with pytest.raises(TypeError, match=r"up must have a floating dtype, got torch.int64"):
        glu(gate, gate.long())
    with pytest.raises(ValueError, match=r"must be even.*\(3, 7\)"):
        glu_packed(gate[:, :7])
    for function in (
        lambda: glu(gate, gate, "relu"),
        lambda: gated_mlp(**block(), activation="relu"),
    ):
        with pytest.raises(ValueError, match=r"activation='relu' is not one of 'silu'"):
            function()


def test_limits_and_alphas_that_mean_nothing() -> None:
    gate = torch.ones(3, 8)
    for function in (
        partial(glu, gate, gate),
        partial(glu_packed, gate),
        partial(gated_mlp, **block()),
    ):
        for limit in (0, -1.0, float("nan")):
            with pytest.raises(ValueError, match=rf"limit={limit} must be positive"):
                function(limit=limit)
        with pytest.raises(ValueError, match=r"alpha=1.7 belongs to silu, but .* 'gelu'"):
            function(activation="gelu", alpha=1.7)


@pytest.mark.usefixtures("on_the_kernels_device")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_beyond_a_limit_gradients_are_zero_and_nan_stays(implementation: str) -> None:
    limit, nan, inf = 2.0, float("nan"), float("inf")
    gate = torch.tensor([2.0, 2.5, -5.0, nan, 1.0, inf, 1.0, 1.0], requires_grad=True)
    up = torch.tensor([2.0, 1.0, -2.0, 1.0, nan, 1.0, -inf, 3.0], requires_grad=True)
    with use_implementation(implementation):
        y = glu(gate, up, limit=limit)
        y.sum().backward()
    assert gate.grad is not None
    assert up.grad is not None
    assert y.isnan().tolist() == [i in (3, 4) for i in range(8)]
    edge = torch.ones(1, requires_grad=True)
    edge.clamp(
        max=1.0
    ).sum().backward()  # at the limit itself the gradient passes, until torch 2.14
    stops = implementation == "reference" and edge.grad is not None and not edge.grad
    assert (gate.grad == 0).tolist() == [i in (1, 3, 5, *[0] * stops) for i in range(8)]
    assert (up.grad == 0).tolist() == [i in (4, 6, 7, *[0, 2] * stops) for i in range(8)]


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_small_calls_on_a_gpu_are_plain_pytorch(
    multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three products and two C++ ops take the host less time than any op in Python."""
    tensors = {name: t.requires_grad_() for name, t in block().items() if t is not None}
    asked: list[int] = []
    monkeypatch.setattr(module, "is_plain", lambda *_: False)  # as where there are kernels
    monkeypatch.setattr(module, "host_bound", lambda x, limit: asked.append(limit) or True)
    plain = reference.gated_mlp(*tensors.values(), "silu", multiplier)
    monkeypatch.setattr(module, "_SMALL", 3 * FEATURES - 1)  # below the elements of the gate
    y = gated_mlp(**tensors, gate_multiplier=multiplier)
    assert asked == []
    assert type(y.grad_fn) is not type(plain.grad_fn)
    monkeypatch.setattr(module, "_SMALL", 3 * FEATURES)
    y = gated_mlp(**tensors, gate_multiplier=multiplier)
    assert asked == ([tensors["x"].numel()] if multiplier == 1 else [])
    assert (type(y.grad_fn) is type(plain.grad_fn)) == (multiplier == 1)
    if multiplier == 1:
        assert torch.equal(y, plain)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "amp"],
)
def test_what_is_composed_takes_the_fused_product(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def product(gate: Tensor, *others: Any) -> Tensor:
        seen.append(gate.dtype)
        return gated_product(gate, *others)

    monkeypatch.setattr(module, "gated_product", product)
    monkeypatch.setattr(module, "is_plain", lambda *_: False)  # as with kernels
    tensors = block()
    with context():
        found = gated_mlp(**tensors)
        plain = reference.gated_mlp(*tensors.values(), "silu", 1.0)
    assert seen == [found.dtype]
    assert torch.equal(found, plain)
