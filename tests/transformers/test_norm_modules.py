"""The norm modules against the classes they replace, and what only their call forms promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from liger_kernel.transformers.fused_add_rms_norm import LigerFusedAddRMSNorm
from liger_kernel.transformers.layer_norm import LigerLayerNorm
from liger_kernel.transformers.rms_norm import LigerRMSNorm
from torch import Tensor, nn

from liger_kernel import backends
from liger_kernel.ops import fused_add_rms_norm as fused_op
from liger_kernel.ops import layer_norm as layer_op
from liger_kernel.ops import rms_norm as rms_op
from liger_kernel.ops.fused_add_rms_norm import reference as fused_reference
from liger_kernel.ops.rms_norm import reference as rms_reference
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import rms_norm

DTYPES = (torch.float32, torch.bfloat16)
#: our class, the module and class of HF, offset, casting mode, further arguments
VARIANTS = {
    "llama": (rms_norm.LigerRMSNorm, "llama.LlamaRMSNorm", 0.0, "llama", {}),
    "gemma": (rms_norm.LigerRMSNormForGemma, "gemma.GemmaRMSNorm", 1.0, "gemma", {}),
    "gemma2": (rms_norm.LigerRMSNormForGemma2, "gemma2.Gemma2RMSNorm", 1.0, "gemma", {}),
    "gemma3": (rms_norm.LigerRMSNormForGemma3, "gemma3.Gemma3RMSNorm", 1.0, "gemma", {}),
    "gemma4": (rms_norm.LigerRMSNormForGemma4, "gemma4.Gemma4RMSNorm", 0.0, "gemma", {}),
    "gemma4-no-scale": (
        rms_norm.LigerRMSNormForGemma4,
        "gemma4.Gemma4RMSNorm",
        0.0,
        "gemma",
        {"with_scale": False},
    ),
    "olmo2": (rms_norm.LigerRMSNormForOlmo2, "olmo2.Olmo2RMSNorm", 0.0, "llama", {}),
    "glm4": (rms_norm.LigerRMSNormForGlm4, "glm4.Glm4RMSNorm", 0.0, "llama", {}),
    "qwen3-next": (
        rms_norm.LigerRMSNormForQwen3Next,
        "qwen3_next.Qwen3NextRMSNorm",
        1.0,
        "gemma",
        {},
    ),
}


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends.use_implementation(request.param):
        yield request.param


def gradients(
    function: Callable[..., Any], inputs: list[Tensor], cotangents: dict[int, Tensor]
) -> list[Tensor]:
    """Outputs and, for the outputs with a cotangent, the gradients of all inputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    roots = [(outputs[i], g.to(outputs[i].dtype)) for i, g in cotangents.items()]
    grads = torch.autograd.grad([o for o, _ in roots], inputs, [g for _, g in roots])
    return [*outputs, *grads]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def compare(ours: list[Tensor], high: list[Tensor], low: list[Tensor]) -> None:
    for i, (a, b, c) in enumerate(zip(ours, high, low, strict=True)):
        assert_no_worse(f"result {i}", a, b, c)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_computes_the_norm_of_hf(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    our_class, path, offset, mode, arguments = VARIANTS[name]
    from tests.transformers import here

    theirs = here.hf_class(path)(48, eps=1e-5, **arguments)
    ours = our_class(48, 1e-5, **arguments)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), "initial values"

    make = Make(dtype)
    x, grad = make.randn(7, 48), {0: make.randn(7, 48)}
    parameters = [make.randn(48)] if len(theirs.state_dict()) else []

    def with_parameters(module: nn.Module) -> Callable[..., Tensor]:
        return lambda x, *weights: torch.func.functional_call(
            module, dict(zip(("weight",), weights, strict=False)), (x,)
        )

    def high(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return rms_reference.rms_norm(x, weight, 1e-5, offset, mode)

    inputs = [x, *parameters]
    compare(
        gradients(with_parameters(ours), inputs, grad),
        gradients(high, double(inputs), grad),
        gradients(with_parameters(theirs), inputs, grad),
    )


def test_rms_norm_constructor_forms() -> None:
    assert torch.equal(LigerRMSNorm(8).weight, torch.ones(8))
    assert torch.equal(LigerRMSNorm(hidden_size=8, init_fn="zeros").weight, torch.zeros(8))
    positional = LigerRMSNorm(8, 1e-5, 1.0, "gemma", "zeros", False, True, False)
    assert positional.weight is None
    assert "weight" not in positional.state_dict()
    found = (positional.variance_epsilon, positional.offset, positional.casting_mode)
    assert found == (1e-5, 1.0, "gemma")
    assert (positional.in_place, positional.row_mode) == (False, True)
    assert repr(positional) == (
        "LigerRMSNorm(None, eps=1e-05, offset=1.0, in_place=False, row_mode=True)"
    )
    assert repr(LigerRMSNorm(8)).startswith("LigerRMSNorm((8,), eps=1e-06, offset=0.0")
    for variant in (rms_norm.LigerRMSNormForGemma, rms_norm.LigerRMSNormForGemma3):
        assert variant(hidden_size=8, eps=1e-5).weight.shape == (8,)
    assert rms_norm.LigerRMSNormForGemma3(dim=8).weight.shape == (8,)
    assert rms_norm.LigerRMSNormForGemma(8, 1e-6, 0.5).offset == 0.5
    assert rms_norm.LigerRMSNormForMuseGlimmer(with_scale=False).weight is None
    with pytest.raises(ValueError, match="init_fn='twos'"):
        LigerRMSNorm(8, init_fn="twos")
    with pytest.raises(ValueError, match="casting_mode='fp8'"):
        LigerRMSNorm(8, casting_mode="fp8")
    with pytest.raises(ValueError, match="hidden_size=None"):
        LigerRMSNorm(None)


def test_foreign_subclass_with_its_own_new() -> None:
    class Choosing(rms_norm.LigerRMSNormForGemma4):
        def __new__(cls, dim: int, eps: float, with_scale: bool) -> Any:
            return super().__new__(cls)

    assert Choosing(8, 1e-6, with_scale=True).weight.shape == (8,)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "only-norm", "only-sum"])
def test_fused_add_with_outputs_unused(used: tuple[int, ...]) -> None:
    """What nobody uses gets no gradient, and does not have to."""
    make = Make(torch.float32)
    inputs = [make.randn(5, 40), make.randn(5, 40), make.randn(40)]
    grads = {i: make.randn(5, 40) for i in used}
    before = {i: g.clone() for i, g in grads.items()}

    def run(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        outputs = function(*leaves, 1e-6, 0.0, "llama")
        torch.autograd.backward(
            [outputs[i] for i in used], [g.to(dtype) for g in grads.values()], inputs=leaves
        )
        assert 0 in used or leaves[2].grad is None, "a weight without a gradient stays without one"
        return [*outputs, *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]

    reference = fused_reference.fused_add_rms_norm
    compare(
        run(fused_op.fused_add_rms_norm, torch.float32),
        run(reference, torch.float64),
        run(reference, torch.float32),
    )
    assert all(torch.equal(g, before[i]) for i, g in grads.items())


@pytest.mark.usefixtures("implementation")
def test_fused_add_norms_the_rounded_sum() -> None:
    make = Make(torch.float16)
    x, residual, weight = make.randn(5, 40), make.randn(5, 40), make.randn(40)
    y, s = fused_op.fused_add_rms_norm(x, residual, weight, casting_mode="gemma")
    assert torch.equal(s, x + residual)
    assert torch.equal(y, rms_op.rms_norm(s, weight, casting_mode="gemma"))


def test_fused_add_module() -> None:
    module = LigerFusedAddRMSNorm(16, 1e-5, 1.0, "gemma", "zeros")
    assert torch.equal(module.weight, torch.zeros(16))
    assert repr(module) == "LigerFusedAddRMSNorm((16,), eps=1e-05, offset=1.0, in_place=False)"
    make = Make(torch.float32)
    x, residual = make.randn(3, 16), make.randn(3, 16)
    y, s = module(x, residual)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, rms_op.rms_norm(s, module.weight, 1e-5, 1.0, "gemma"))
    with pytest.raises(ValueError, match=r"\(3, 16\).*\(1, 16\)"):
        module(x, residual[:1])
    with pytest.raises(ValueError, match="bfloat16"):
        module(x, residual.bfloat16())
    with pytest.raises(ValueError, match="casting_mode"):
        LigerFusedAddRMSNorm(16, casting_mode="fp8")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_computes_that_of_torch(bias: bool, dtype: torch.dtype) -> None:
    make = Make(dtype)
    theirs = nn.LayerNorm(48, dtype=dtype)
    ours = LigerLayerNorm(normalized_shape=(48,), eps=1e-5, bias=bias, dtype=dtype)
    assert ours.state_dict().keys() == {"weight", "bias"}, "as the incumbent's, bias=False or not"
    inputs = [make.randn(7, 48), make.randn(48), make.randn(48)]

    def with_parameters(module: nn.Module) -> Callable[..., Tensor]:
        return lambda x, *values: torch.func.functional_call(
            module, dict(zip(("weight", "bias"), values, strict=False)), (x,)
        )

    grad = {0: make.randn(7, 48)}
    compare(
        gradients(with_parameters(ours), inputs, grad),
        gradients(with_parameters(theirs.double()), double(inputs), grad),
        gradients(with_parameters(theirs.to(dtype)), inputs, grad),
    )


def test_layer_norm_constructor_forms() -> None:
    default = LigerLayerNorm(8)
    assert torch.equal(default.weight, torch.ones(8))
    assert torch.equal(default.bias, torch.zeros(8))
    assert (default.hidden_size, default.eps, default.variance_epsilon) == (8, 1e-6, 1e-6)
    assert repr(default) == "LigerLayerNorm(8, eps=1e-06)"
    assert torch.equal(LigerLayerNorm(8, 1e-5, True, "zeros").weight, torch.zeros(8))
    assert torch.equal(LigerLayerNorm(8, 1e-5, True).bias, torch.zeros(8))
    assert torch.equal(LigerLayerNorm(8, 1e-5, False).bias, torch.zeros(8))
    LigerLayerNorm(8, bias=False).load_state_dict(nn.LayerNorm(8).state_dict())
    as_torch = LigerLayerNorm((8,), eps=1e-5, elementwise_affine=False, bias=True, device="meta")
    assert as_torch.weight is None
    assert as_torch.bias is None
    assert LigerLayerNorm(8, device="meta", dtype=torch.bfloat16).weight.is_meta
    assert isinstance(default, nn.LayerNorm), "so that it is left out of weight decay"
    with pytest.raises(ValueError, match=r"\(2, 8\)"):
        LigerLayerNorm((2, 8))
    with pytest.raises(ValueError, match="init_fn='twos'"):
        LigerLayerNorm(8, init_fn="twos")


@pytest.mark.parametrize(
    ("module", "owner", "name", "n_inputs"),
    [
        (LigerRMSNorm(8), rms_op, "rms_norm", 1),
        (LigerFusedAddRMSNorm(8), fused_op, "fused_add_rms_norm", 2),
        (LigerLayerNorm(8), layer_op, "layer_norm", 1),
    ],
    ids=["rms", "fused-add", "layer"],
)
def test_modules_call_the_op_through_its_module(
    module: nn.Module, owner: Any, name: str, n_inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: "replaced")
    assert module(*[torch.zeros(2, 8)] * n_inputs) == "replaced"


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: rms_op.rms_norm(x, w),
        lambda x, w: fused_op.fused_add_rms_norm(x, x, w)[0],
        lambda x, w: layer_op.layer_norm(x, w, w),
    ],
    ids=["rms", "fused-add", "layer"],
)
def test_compiles_without_a_graph_break(call: Callable[..., Tensor]) -> None:
    make = Make(torch.float32)
    x, w = make.randn(4, 8), make.randn(8)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert_no_worse("output", compiled(x, w), call(x.double(), w.double()), call(x, w))


def test_rms_norm_helpers_agree_with_the_function() -> None:
    make = Make(torch.float32)
    x, w, grad = make.randn(2, 5, 24), make.randn(24), make.randn(2, 5, 24)
    before = grad.clone()
    y, rows, rstd, *rest = rms_op.rms_norm_forward(x, w, 1e-6, 0.5, "gemma", None)
    assert (y.shape, rows.shape, rstd.shape, rest[-1]) == (x.shape, (10, 24), (10,), 1)
    block, warps, code = rest
    args = (grad, rows, w, rstd, 0.5, code, block, warps, True, None)
    dx, dw = rms_op.rms_norm_backward(*args)
    assert rms_op.rms_norm_backward(*args, needs_dw=False)[1] is None
    assert torch.equal(grad, before), "in_place=True must not write into the caller's gradient"
    with backends.use_implementation("triton"):
        expected = gradients(
            lambda x, w: rms_op.rms_norm(x, w, 1e-6, 0.5, "gemma"), [x, w], {0: grad}
        )
    assert all(torch.equal(a, b) for a, b in zip((y, dx, dw), expected, strict=True))
    assert rms_op.rms_norm_forward(x, None, 1e-6, 0.0, -1)[-1] == -1
    for wrong in ("fp8", 7):
        with pytest.raises(ValueError, match="casting_mode"):
            rms_op.rms_norm_forward(x, w, 1e-6, 0.0, wrong)
    with pytest.raises(ValueError, match=r"\(23,\).*24"):
        rms_op.rms_norm_forward(x, w[1:], 1e-6, 0.0, "llama")


def test_fused_add_helpers_agree_with_the_function() -> None:
    make = Make(torch.float32)
    x, r, w = make.randn(2, 5, 24), make.randn(2, 5, 24), make.randn(24)
    dy, ds = make.randn(2, 5, 24), make.randn(2, 5, 24)
    y, s, rstd, *rest = fused_op.fused_add_rms_norm_forward(x, r, w, 1e-6, 0.0, "llama")
    block, warps, stages, code = rest
    args = (dy, ds, s, w, rstd, 0.0, code, block, warps, stages, True)
    dx, dr, dw = fused_op.fused_add_rms_norm_backward(*args)
    assert dx is dr
    with backends.use_implementation("triton"):
        expected = gradients(
            lambda *inputs: fused_op.fused_add_rms_norm(*inputs), [x, r, w], {0: dy, 1: ds}
        )
    assert all(torch.equal(a, b) for a, b in zip((y, s, dx, dr, dw), expected, strict=True))


def test_layer_norm_helpers_agree_with_the_function() -> None:
    make = Make(torch.float32)
    x, w, b, grad = make.randn(2, 5, 24), make.randn(24), make.randn(24), make.randn(2, 5, 24)
    y, rows, mean, rstd, _, _ = layer_op.layer_norm_forward(x, w, b, 1e-6)
    got = layer_op.layer_norm_backward(grad, rows, w, b, mean, rstd)
    _, dw, db = layer_op.layer_norm_backward(grad, rows, w, b, mean, rstd, False, False)
    assert (dw, db) == (None, None)
    with backends.use_implementation("triton"):
        expected = gradients(
            lambda *inputs: layer_op.layer_norm(*inputs, 1e-6), [x, w, b], {0: grad}
        )
    assert all(torch.equal(a, b) for a, b in zip((y, *got), expected, strict=True))
    with pytest.raises(ValueError, match=r"\(23,\).*24"):
        layer_op.layer_norm_forward(x, w, b[1:], 1e-6)


@pytest.fixture
def one_rank() -> Iterator[Any]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch is built without distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_dtensor_in_dtensor_out(one_rank: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    make = Make(torch.float32)
    inputs = [make.randn(2, 4, 8), make.randn(8), make.randn(8)]
    grad = make.randn(2, 4, 8)
    expected = gradients(layer_op.layer_norm, inputs, {0: grad})
    for placement in (Shard(1), Shard(2), Replicate()):
        x = distribute_tensor(inputs[0], one_rank, [placement]).requires_grad_()
        w = distribute_tensor(inputs[1], one_rank, [Replicate()]).requires_grad_()
        b = inputs[2].clone().requires_grad_()
        y = layer_op.layer_norm(x, w, b)
        assert y.placements == ((Replicate() if placement == Shard(2) else placement),)
        y.backward(distribute_tensor(grad, one_rank, list(y.placements)))
        found = (y.full_tensor(), x.grad.full_tensor(), w.grad.full_tensor(), b.grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    x = distribute_tensor(inputs[0], one_rank, [Shard(1)])
    expected_y = layer_op.layer_norm(inputs[0])
    assert torch.equal(layer_op.layer_norm(x).full_tensor(), expected_y)
    assert rms_op.rms_norm(x, inputs[1]).placements == (Shard(1),)


def test_dtensor_weight_gradient_is_summed_over_the_ranks_with_other_rows() -> None:
    pytest.importorskip("torch.distributed.tensor")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        for placement, sums in ((Shard(0), 1), (Replicate(), 0)):
            x = DTensor.from_local(torch.ones(4, 8), mesh, [placement])
            weight = DTensor.from_local(torch.ones(8), mesh, [Replicate()]).requires_grad_()
            y = rms_op.rms_norm(x, weight)
            with CommDebugMode() as communication:
                y.backward(DTensor.from_local(torch.ones(4, 8), mesh, [placement]))
            assert communication.get_total_counts() == sums
    finally:
        torch.distributed.destroy_process_group()
