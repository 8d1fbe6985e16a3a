"""What is special about the mixture of experts: routing, devices without kernels, torch.compile, what it refuses."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from liger_kernel import backends, ops
from liger_kernel.ops.fused_moe import checks, fused_moe, pipeline, portable, reference
from liger_kernel.ops.fused_moe.cases import SPEC
from liger_kernel.testing import Make, OpCase, assert_no_worse
from liger_kernel.testing.calls import assert_as_exact, call, drawn, leaves, wanted_inputs
from liger_kernel.transformers import LigerExperts
from tests.who_keeps import where_torch_tells

CASES = {case.id: case for case in SPEC.cases if not case.large}


def given(case: OpCase, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Without low ranks."""
    inputs, grads = drawn(SPEC, case, Make(dtype))
    return leaves(inputs, wanted_inputs(SPEC, case, inputs))[:7], grads


@pytest.mark.parametrize("id", ["gpt-oss", "no-rows"])
def test_a_device_that_queues_and_has_no_kernels(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It never looks at a number, and computes the same."""
    monkeypatch.setattr(portable, "can_look", lambda t: False)
    monkeypatch.setattr(Tensor, "tolist", lambda t: pytest.fail("it waits for the device"))
    inputs, grads = drawn(SPEC, CASES[id], Make(torch.bfloat16))
    with backends.use_implementation("reference"):
        assert_as_exact(SPEC, CASES[id], inputs, grads)


@pytest.mark.usefixtures("on_the_kernels_device")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("expert", [1, 3], ids=["one-twice", "nobody"])
def test_one_expert_for_all_pairs(implementation: str, expert: int) -> None:
    inputs, grads = drawn(SPEC, CASES["silu"], Make(torch.float32))
    inputs = (*inputs[:3], torch.full_like(inputs[3], expert), *inputs[4:])  # type: ignore[arg-type]
    with backends.use_implementation(implementation):
        assert_as_exact(SPEC, CASES["silu"], inputs, grads)


@pytest.mark.usefixtures("on_the_kernels_device")
@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="an older torch")
@pytest.mark.parametrize("sentinels", [False, True])
def test_products_of_pytorch(sentinels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the configuration of a device prefers them; also with an expert without rows."""
    kernels = pytest.importorskip("liger_kernel.ops.fused_moe.triton")
    make = Make(torch.bfloat16)
    index = torch.tensor([[0, 2], [2, 3 if sentinels else 0], [0, 2]] * 3)
    inputs = make.randn(9, 16), make.randn(3, 32, 16), make.randn(3, 16, 16), index
    tile = kernels.Tile(rows=16, cols=32, inner=32, warps=4, stages=1)
    config = kernels.Config(tile, tile, library=((0, kernels.Library(0, True, 0)),))
    monkeypatch.setattr(kernels.Config, "of", lambda *args: config)
    used = []
    original = kernels._grouped_mm
    monkeypatch.setattr(kernels, "_grouped_mm", lambda *args: used.append(1) or original(*args))
    with backends.use_implementation("triton"):
        given = (*inputs, make.randn(9, 2), *(None,) * 6)
        assert_as_exact(SPEC, CASES["silu"], given, {0: make.randn(9, 16)})
    assert len(used) == 6


@pytest.mark.usefixtures("on_the_kernels_device")
def test_nan_stays_with_its_tokens_and_reaches_the_gradients() -> None:
    """Also behind the clamp, and also from a weight, whose expert all tokens but the last avoid."""
    drawn_inputs: Any = SPEC.cases[1].inputs(Make(torch.float32))
    x, w1, w2, _, weights, b1, b2, *_ = drawn_inputs
    index = torch.zeros(weights.shape, dtype=torch.int64)
    index[-1, 0] = 1
    x[3] = torch.nan
    w1[1] = torch.nan
    for implementation in ("reference", "triton"):
        leaf = x.clone().requires_grad_()
        with backends.use_implementation(implementation):
            out = fused_moe(leaf, w1, w2, index, weights, b1, b2, **SPEC.cases[1].options)
            dx = torch.autograd.grad(out.sum(), leaf)[0]
        for found in (out, dx):
            bad = found.isnan().any(1).nonzero().flatten().tolist()
            assert bad == [3, x.shape[0] - 1]


@pytest.mark.usefixtures("on_the_kernels_device")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_an_index_that_is_no_expert_makes_its_token_nan(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where looking would stall the host: not the output of some other expert, or of memory that nobody wrote."""
    x, w1, w2, index, weights, *_ = CASES["silu"].inputs(Make(torch.float32))
    low = fused_moe(x, w1, w2, index, weights)
    high = fused_moe(x.double(), w1.double(), w2.double(), index, weights.double())
    wrong = index.clone()
    wrong[1, 0], wrong[4, 1] = -1, w1.shape[0] + 1
    with pytest.raises(ValueError, match="top_k_index"):
        fused_moe(*(t.cpu() for t in (x, w1, w2, wrong, weights)))
    for file in (pipeline, checks):
        monkeypatch.setattr(file, "can_look", lambda t: False)
    with backends.use_implementation(implementation):
        found = fused_moe(x, w1, w2, wrong, weights)
    rows = [*range(x.shape[0])]
    assert [i for i in rows if found[i].isnan().all()] == [1, 4]
    others = [i for i in rows if i not in (1, 4)]
    assert_no_worse("others", found[others], high[others], low[others])


@pytest.mark.parametrize("needed", [(0,), (5, 6), (6,), (7, 8, 9, 10), (8,)], ids=str)
def test_one_graph_of_torch_compile(needed: tuple[int, ...]) -> None:
    case = CASES["gpt-oss" if max(needed) < 7 else "lora-gpt-oss"]
    inputs, grads = drawn(SPEC, case, Make(torch.float32))
    expected = call(SPEC.function, case.options, leaves(inputs, {*needed}), grads)
    compiled = torch.compile(SPEC.function, backend="aot_eager", fullgraph=True)
    found = call(compiled, case.options, leaves(inputs, {*needed}), grads)
    assert torch.equal(found[0][0], expected[0][0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][i], expected[1][i]) for i in needed)


def test_passes_opcheck() -> None:
    case = CASES["lora-gpt-oss"]
    inputs, _ = drawn(SPEC, case, Make(torch.float32))
    args = leaves(inputs, wanted_inputs(SPEC, case, inputs))
    options = case.options.values()
    needs = [isinstance(t, Tensor) and t.requires_grad for t in args]
    op: Any = torch.ops.liger_kernel.fused_moe.default
    torch.library.opcheck(op, (*args, needs, *options))


def test_under_autocast_the_products_are_narrow() -> None:
    """Master weights in fp32, and an output like x; the router's weights stay as they are."""
    inputs, _ = given(CASES["silu"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_moe(*inputs)
        out.sum().backward()
    narrow = [t if t is None or t.dtype == torch.int64 else t.detach() for t in inputs]
    options = CASES["silu"].options
    high = reference.fused_moe(
        *(t if t is None or t.dtype == torch.int64 else t.double() for t in narrow), **options
    )
    low = reference.fused_moe(
        *(t if t is None or t.dtype == torch.int64 else t.bfloat16() for t in narrow), **options
    )
    assert out.dtype == torch.float32
    assert_no_worse("output", out.bfloat16(), high, low)
    assert all(t.grad.dtype == t.dtype for t in inputs if t is not None and t.requires_grad)


@where_torch_tells
@pytest.mark.usefixtures("on_the_kernels_device")
def test_backward_writes_over_what_it_saved_but_not_over_what_somebody_holds() -> None:
    """The output of the first product is the largest of all: its gradient takes its place, unless it is seen."""
    drawn_inputs, grads = drawn(SPEC, CASES["silu"], Make(torch.float32))
    inputs = leaves(drawn_inputs, {0})[:7]
    sizes = []
    with backends.use_implementation("triton"):
        for held in (False, True):
            seen: list[Tensor] = []
            keep = torch.autograd.graph.saved_tensors_hooks(
                lambda t, seen=seen: seen.append(t) or t, lambda t: t
            )
            with keep if held else contextlib.nullcontext():
                out = fused_moe(*inputs)
            before = [t.detach().clone() for t in seen]
            with Allocated() as allocated:
                found = torch.autograd.grad(out, inputs[0], grads[0])[0]
            sizes.append(allocated.largest)
            assert all(torch.equal(*pair) for pair in zip(seen, before, strict=True))
            expected = torch.autograd.grad(
                fused_moe(*inputs), inputs[0], grads[0], retain_graph=True
            )
            assert torch.equal(found, expected[0])
    assert sizes[0] < sizes[1]


class Allocated(TorchDispatchMode):
    """Elements of the largest tensor made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "empty" in str(func) and isinstance(found, Tensor):
            self.largest = max(self.largest, found.numel())
        return found


@pytest.mark.usefixtures("on_the_kernels_device")
def test_matrices_of_a_low_rank_in_a_dtype_of_their_own() -> None:
    """In fp32 beside weights of 16 bits, as PEFT keeps them: gradients in fp32, no worse than those of narrow ones,
    and laid out as the matrix of all experts, of which autograd would have to make a copy."""
    case = CASES["lora"]
    narrow, grads = drawn(SPEC, case, Make(torch.bfloat16))
    wanted = wanted_inputs(SPEC, case, narrow)
    wide = [t.float() if i > 6 and t is not None else t for i, t in enumerate(narrow)]
    with backends.use_implementation("triton"):
        _, found = call(SPEC.function, case.options, leaves(tuple(wide), wanted), grads)
    _, high = call(SPEC.reference, case.options, leaves(narrow, wanted, torch.float64), grads)
    _, low = call(SPEC.reference, case.options, leaves(narrow, wanted), grads)
    for i in range(7, 11):
        assert (found[i].dtype, found[i].stride()) == (torch.float32, wide[i].stride())
        assert_no_worse(f"gradient {i}", found[i].bfloat16(), high[i], low[i])


@pytest.mark.usefixtures("on_the_kernels_device")
@pytest.mark.parametrize("id", ["gpt-oss", "no-gate", "lora"])
@pytest.mark.parametrize("fused", [False, True])
def test_how_products_end(id: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored and activated by kernels of their own, or, of a tile that is wide enough for parts, before they are."""
    kernels = pytest.importorskip("liger_kernel.ops.fused_moe.triton")
    tile = kernels.Tile(rows=32, cols=128, inner=32, warps=4, stages=1)
    config = kernels.Config(tile, tile, fused_forward=fused)
    monkeypatch.setattr(kernels.Config, "of", lambda *args: config)
    launched = []
    original = kernels.launch
    monkeypatch.setattr(
        kernels,
        "launch",
        lambda kernel, *args, **kw: launched.append(kernel) or original(kernel, *args, **kw),
    )
    with backends.use_implementation("triton"):
        assert_as_exact(SPEC, CASES[id], *drawn(SPEC, CASES[id], Make(torch.float32)))
    assert (kernels.activate in launched) != fused


@pytest.mark.usefixtures("on_the_kernels_device")
def test_products_onto_a_low_rank_by_parts_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of which have no row, or some rows, of their expert."""
    kernels = pytest.importorskip("liger_kernel.ops.fused_moe.triton")
    tile = kernels.Tile(rows=32, cols=32, inner=32, warps=4, stages=1)
    config = kernels.Config(tile, tile, low_rows=16)
    monkeypatch.setattr(kernels.Config, "of", lambda *args: config)
    with backends.use_implementation("triton"):
        assert_as_exact(SPEC, CASES["lora"], *drawn(SPEC, CASES["lora"], Make(torch.float32)))


@pytest.mark.usefixtures("on_the_kernels_device")
def test_a_low_rank_makes_nothing_of_the_size_of_the_weights() -> None:
    inputs, grads = drawn(SPEC, CASES["lora"], Make(torch.float32))
    x, w1, w2, _, weights, *_ = inputs
    index = torch.zeros_like(weights[:1], dtype=torch.int64)
    few = (x[:1], w1, w2, index, weights[:1], *inputs[5:])  # type: ignore[index]
    given = leaves(few, {0, 7, 8, 9, 10})
    with backends.use_implementation("triton"), Allocated() as allocated:
        call(SPEC.function, CASES["lora"].options, given, {0: grads[0][:1]})
    assert allocated.largest < min(w1.numel(), w2.numel())  # type: ignore[union-attr]


def test_leading_dimensions() -> None:
    inputs, _ = given(CASES["silu"])
    x, w1, w2, index, weights, *_ = inputs
    out = fused_moe(
        x[:18].view(3, 6, -1), w1, w2, index[:18].view(3, 6, -1), weights[:18].view(3, 6, -1)
    )
    assert torch.equal(out.view(18, -1), fused_moe(x[:18], w1, w2, index[:18], weights[:18]))


BAD: dict[str, tuple[dict[int, Any], dict[str, Any], type[Exception], str]] = {
    "activation": ({}, {"activation": "tanh"}, ValueError, "'silu', 'gelu_tanh'"),
    "option": ({}, {"gated": False, "interleaved": True}, ValueError, "gated=False"),
    "limit": ({}, {"limit": 0.0}, ValueError, r"limit=0\.0"),
    "layout": ({}, {"transposed": True}, ValueError, r"\(E, H, 2I\)"),
    "too few weights": ({1: torch.ones(4, 24)}, {}, ValueError, r"gate_up_weight \(4, 24\)"),
    "index": ({3: torch.full((19, 2), 4)}, {}, ValueError, "there are 3 experts"),
    "negative": ({3: torch.full((19, 2), -1)}, {}, ValueError, r"in \[-1, -1\]"),
    "index dtype": ({3: torch.ones(19, 2)}, {}, TypeError, "integers"),
    "index shape": ({3: torch.zeros(18, 2, dtype=torch.int64)}, {}, ValueError, r"\(18, 2\)"),
    "weights dtype": ({2: torch.ones(3, 24, 20).half()}, {}, TypeError, "torch.float16"),
    "low rank": (
        {},
        {"down_lora": (torch.ones(3, 4, 20), torch.ones(3, 20, 4))},
        ValueError,
        "24, R",
    ),
    "scaling": ({}, {"down_scaling": 2.0}, ValueError, "down_lora, which is None"),
    "bias": ({5: torch.ones(3, 20)}, {}, ValueError, r"one of \(3, 40\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str) -> None:
    changes, options, error, message = BAD[name]
    inputs, _ = given(CASES["silu"])
    for i, value in changes.items():
        inputs[i] = value
    with pytest.raises(error, match=message):
        fused_moe(*inputs, **options)


def test_routing_metadata() -> None:
    index = torch.tensor([[2, 0], [2, 2], [0, 3]], dtype=torch.int32)
    found = ops.compute_routing_metadata(index, 4, block_m_token=2)
    expected = (
        [2, 0, 3, 1],
        [0, 2, 2, 5, 6],
        [0, 2, 0, 1, 1, 2],
        [1, 4, 0, 2, 3, 5],
        [2, 0, 3, 4, 1, 5],
        [0, 2, 4, 5],
        [0, 2, 2, 3],
    )
    assert tuple(t.tolist() for t in found) == expected
    assert {t.dtype for t in found} == {torch.int32}
    sizes = [len(t) for t in ops.compute_routing_metadata(index[:0], 4)]
    assert sizes == [4, 5, 0, 0, 0, 0, 0]


def test_the_module_of_experts() -> None:
    config = SimpleNamespace(
        hidden_act="silu", hidden_size=24, num_local_experts=3, intermediate_size=20
    )
    x, w1, w2, index, weights, *_ = (t.detach() for t in given(CASES["silu"])[0][:5])
    experts = LigerExperts(config)
    experts.load_state_dict({"gate_up_proj": w1, "down_proj": w2})
    found = experts(x[:18].view(3, 6, 24), index[:18].int(), weights[:18])
    expected = fused_moe(x[:18], w1, w2, index[:18], weights[:18])
    assert torch.equal(found, expected.view(3, 6, 24))
    with pytest.raises(ValueError, match="gelu"):
        LigerExperts(SimpleNamespace(hidden_act="gelu"))
