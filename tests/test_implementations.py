"""Implementations by name: `set_impl`, what users register, and the paths that the incumbent has for both."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import liger_kernel
from liger_kernel import backends, functional
from liger_kernel.backends import dispatch, registry  # type: ignore[attr-defined]
from liger_kernel.backends.capability import Capability
from liger_kernel.compat import implementations
from liger_kernel.ops import configure, utils
from liger_kernel.testing import _op_helpers as helpers
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
from liger_kernel.transformers import functional as transformers_functional

X, W = torch.randn(5, 12), torch.rand(12)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    liger_kernel.set_impl(None)
    for known in (registry._registered, registry._locations, registry._failures):
        known.clear()


def seven(x: Tensor, *others: Any, **options: Any) -> Tensor:
    return torch.full_like(x, 7)


def computes_seven(y: Tensor) -> bool:
    return bool((y == 7).all())


@pytest.mark.parametrize("name", ["torch", "PyTorch", "reference"])
def test_a_choice_by_name_is_a_request(name: str) -> None:
    liger_kernel.set_impl(name)
    assert (liger_kernel.get_impl(), backends.requested()) == ("reference", "reference")
    liger_kernel.set_backend(None)
    assert liger_kernel.get_backend() is backends.requested() is None


@pytest.mark.parametrize("name", ["triton", "nvidia-triton"])
def test_kernels_are_chosen(name: str) -> None:
    from liger_kernel.ops.rms_norm import triton as kernels

    liger_kernel.set_impl(name)
    assert liger_kernel.get_impl() == "triton"
    assert backends.kernels_of("rms_norm", X) is kernels or torch.cuda.is_available()
    assert torch.equal(
        functional.rms_norm(X, W), functional.dispatch("rms_norm", X, W, 1e-6, impl=name)
    )


def test_what_cannot_compute_is_refused_at_the_call() -> None:
    liger_kernel.set_impl("ascend-triton")
    assert liger_kernel.get_impl() == "npu"
    for call in (functional.rms_norm, functional.layer_norm):
        with pytest.raises(RuntimeError, match="torch_npu computes on npu"):
            call(X, W)
    with pytest.raises(
        dispatch.ImplNotAvailableError, match=r"npu devices.*available: .*reference\."
    ):
        dispatch.resolve_impl("rms_norm", device="cpu")
    assert dispatch.resolve_impl("softmax").impl_name == "triton"


def test_unknown_names() -> None:
    with pytest.raises(
        dispatch.BackendNotAvailableError, match=r"'cutile'; known: .*reference, torch, triton"
    ):
        liger_kernel.set_impl("cutile")
    with pytest.raises(dispatch.ImplNotAvailableError, match="has no such implementation"):
        dispatch.resolve_impl("rms_norm", "cutile")
    with pytest.raises(dispatch.NoImplAvailableError, match="registered: nothing"):
        dispatch.dispatch("nothing", X)
    assert liger_kernel.available_impls("nothing") == dispatch.all_impls("nothing") == []


def test_what_is_there() -> None:
    assert [n for n in dispatch.all_impls("swiglu") if n != "dummy"] == [
        "npu",
        "triton",
        "reference",
    ]
    found = liger_kernel.available_backends("softmax", device="cpu")
    assert [n for n in found if n != "dummy"] == ["triton", "reference"]
    assert {"rms_norm", "rope", "cross_entropy"} <= {*registry.all_registered_ops()}
    impl = registry.get_registered("rms_norm", "nvidia-triton")
    assert (impl.op_name, impl.impl_name, impl.backend) == ("rms_norm", "triton", "triton")
    dispatch.clear_available_cache()


LOGS, LABELS = X.log_softmax(-1), torch.arange(5)
_LOSS = {
    "ignore_index": 3,
    "lse_square_scale": 0.1,
    "label_smoothing": 0.1,
    "reduction": "sum",
    "softcap": 5.0,
}
#: op -> the arguments of the incumbent's call, and our own
OURS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "rms_norm": ((X, W, 1e-5, 1.0, "gemma"), lambda: functional.rms_norm(X, W, 1e-5, 1.0, "gemma")),
    "layer_norm": ((X, W, W, 1e-5), lambda: functional.layer_norm(X, W, W, 1e-5)),
    "softmax": ((X,), lambda: functional.softmax(X)),
    "swiglu": ((X, LOGS, 0.5, 2.0), lambda: functional.glu(X, LOGS, "silu", 0.5, 2.0)),
    "geglu": ((X, LOGS), lambda: functional.glu(X, LOGS, "gelu_tanh")),
    "fused_add_rms_norm": (
        (X, LOGS, W, 1e-5, 1.0),
        lambda: functional.fused_add_rms_norm(X, LOGS, W, 1e-5, 1.0),
    ),
    "kl_div": (
        (LOGS, X.exp(), "sum", False, 1e-3),
        lambda: functional.kl_div(LOGS, X.exp(), "sum", False, 1e-3),
    ),
    "jsd": (
        (LOGS, LOGS.flip(0), LABELS, 0.2, 3),
        lambda: functional.jsd(LOGS, LOGS.flip(0), LABELS, 0.2, 3),
    ),
    "cross_entropy": (
        (X, LABELS, W, *_LOSS.values()),
        lambda: functional.cross_entropy(X, LABELS, W, **_LOSS),
    ),
    "fused_linear_cross_entropy": (
        (X, X, LABELS % 5, None, W[:5], *_LOSS.values()),
        lambda: functional.fused_linear_cross_entropy(X, X, LABELS % 5, None, W[:5], **_LOSS),
    ),
    "rope": (
        (X.view(1, 5, 1, 12), X.view(1, 5, 1, 12), X[None], LOGS[None], None, 2, 4),
        lambda: functional.rope(
            X.view(1, 5, 1, 12), X.view(1, 5, 1, 12), X[None], LOGS[None], 2, 4
        ),
    ),
}


@pytest.mark.parametrize("op", OURS)
def test_calls_of_ours(op: str) -> None:
    """What `dispatch` calls takes what the incumbent's takes, and computes what our op does."""
    args, ours = OURS[op]
    for impl in (None, "torch"):
        with backends.use_implementation("reference" if impl else None):
            expected = ours()
        pairs = [(dispatch.dispatch(op, *args, impl=impl), expected)]
        if isinstance(expected, tuple):
            pairs = list(zip(pairs[0][0], expected, strict=True))
        for found, wanted in pairs:
            assert found is wanted is None or torch.equal(found, wanted)


def test_forms_of_the_functional_api() -> None:
    plain = functional.glu(X, LOGS, "silu", 0.5, 2.0)
    assert torch.equal(functional.swiglu(X, LOGS, 0.5, 2.0), plain)
    assert torch.equal(functional.geglu(X, LOGS), functional.glu(X, LOGS, "gelu_tanh"))
    with pytest.raises(ValueError, match="mode='fast'"):
        functional.dispatch("swiglu", X, X, mode="fast")


def test_an_implementation_of_the_user_is_called() -> None:
    assert registry.register_impl("rms_norm", impl_name="mine")(seven) is seven
    registry.register_op("swiglu", backend="mine")(seven)
    assert "mine" in liger_kernel.available_impls("rms_norm")
    assert computes_seven(functional.dispatch("rms_norm", X, W, impl="mine"))
    assert not computes_seven(functional.rms_norm(X, W)), "it was not chosen"
    norm, mlp = LigerRMSNorm(12), LigerSwiGLUMLP(_Config())
    plain = [functional.layer_norm(X, W), functional.glu(X, X, "gelu_tanh")]
    liger_kernel.set_impl("mine")
    assert liger_kernel.get_impl() == "mine"
    assert dispatch.resolve_impl("rms_norm").impl_name == "mine"
    assert computes_seven(functional.rms_norm(X, W))
    assert computes_seven(norm(X))
    assert computes_seven(functional.swiglu(X, X))
    assert not computes_seven(mlp(X)), "a gated MLP is an op of its own"
    assert torch.equal(functional.layer_norm(X, W), plain[0]), "as before, without one of that name"
    assert torch.equal(functional.glu(X, X, "gelu_tanh"), plain[1])
    assert functional.glu_packed(X).shape == (5, 6)
    assert not computes_seven(functional.glu(X, X, limit=1.0)), "it has no place for this option"
    torch._dynamo.reset()
    compiled = torch.compile(functional.rms_norm, backend="eager", fullgraph=True)
    assert computes_seven(compiled(X, W))
    with backends.use_implementation("reference"):
        assert not computes_seven(functional.rms_norm(X, W))
    liger_kernel.set_impl(None)
    assert not computes_seven(compiled(X, W))
    liger_kernel.set_impl("torch")
    assert not computes_seven(functional.rms_norm(X, W))


class _Config:
    hidden_size, intermediate_size, hidden_act, mlp_bias = 12, 8, "silu", False


def test_ops_of_several_products_call_it() -> None:
    """Each has kernels or a node of its own around the gated product."""
    registry.register_impl("swiglu", impl_name="mine")(seven)
    gate, up, down = torch.randn(8, 12), torch.randn(8, 12), torch.randn(3, 8)
    a, a_down = torch.randn(2, 12, requires_grad=True), torch.randn(2, 8)
    adapters = (a, torch.zeros(8, 2), a, torch.zeros(8, 2), a_down, torch.zeros(3, 2))
    blocks = {
        "gated_mlp": lambda: functional.gated_mlp(X, gate, up, down),
        "tiled_mlp": lambda: functional.tiled_mlp(X, gate, up, down, num_tiles=2),
        "lora_mlp": lambda: functional.lora_mlp(X, gate, up, down, *adapters),
    }
    of_seven = torch.nn.functional.linear(torch.full((5, 8), 7.0), down)
    for chosen in (None, "mine"):
        liger_kernel.set_impl(chosen)
        for name, block in blocks.items():
            torch._dynamo.reset()
            for run in (block, torch.compile(block, backend="eager")):
                assert torch.equal(run(), of_seven) == (chosen == "mine"), name


def test_options_that_an_implementation_has_no_place_for() -> None:
    registry.register_impl("geglu", impl_name="mine")(seven)
    liger_kernel.set_impl("mine")
    assert computes_seven(functional.geglu(X, X))
    for options in ({"gate_multiplier": 0.5}, {"activation": "silu"}, {"limit": 1.0}):
        assert not computes_seven(functional.glu(X, X, **{"activation": "gelu_tanh", **options}))


def test_the_arguments_of_an_implementation() -> None:
    seen: list[Any] = []

    @registry.register_impl("layer_norm", impl_name="mine", preference_rank=1)
    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *others: Any) -> Tensor:
            seen.append(others)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * 2, None, None, None

    x = X.clone().requires_grad_()
    dispatch.dispatch("layer_norm", x, W, None, 0.5, mode="any").sum().backward()
    assert seen.pop()[1:] == (None, 0.5)
    assert torch.equal(x.grad, torch.full_like(X, 2))
    with pytest.raises(TypeError, match="pass eps by position"):
        dispatch.dispatch("layer_norm", X, W, None, eps=0.5)
    liger_kernel.set_impl("mine")
    functional.layer_norm(X, W, None, 0.25)
    assert seen.pop()[1:] == (None, 0.25)
    assert {impl.impl_name for impl in registry.list_registered("layer_norm")} >= {
        "mine",
        "triton",
        "reference",
    }
    with pytest.raises(TypeError, match="needs impl_name"):
        registry.register_impl("rms_norm")
    with pytest.raises(TypeError, match="cannot be called: 3"):
        registry.register_impl("rms_norm", impl_name="three")(3)
    with pytest.raises(RuntimeError, match="nothing to call"):
        registry.OpImpl("rms_norm", "none").call(X)


def test_capabilities() -> None:
    assert Capability().is_satisfied()
    assert Capability(modules=["torch"], predicate=lambda: True).is_satisfied("cpu")
    assert "no_such" in str(Capability(modules=["no_such"]).reason_if_unsatisfied())
    assert "predicate" in str(Capability(predicate=lambda: False).reason_if_unsatisfied())
    assert "CUDA" in str(Capability(min_cc=(9, 0)).reason_if_unsatisfied("cpu"))
    registry.register_impl("rms_norm", impl_name="mine", capability=Capability(requires_cuda=True))(
        seven
    )
    assert ("mine" in liger_kernel.available_impls("rms_norm", "cpu")) is False
    with pytest.raises(dispatch.ImplNotAvailableError, match="it needs a CUDA device"):
        dispatch.dispatch("rms_norm", X, W, impl="mine")


@pytest.mark.parametrize(
    ("capability", "fits"), [((8, 0), False), ((9, 0), True), ((12, 0), False)]
)
def test_compute_capabilities(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert Capability(min_cc=(9, 0), max_cc=(10, 0)).is_satisfied("cuda") is fits
    assert Capability(max_cc=(8, 0)).is_satisfied() is (capability == (8, 0))


def test_declared_locations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_kernels.py").write_text(
        "from liger_kernel.backends.registry import register_impl\n"
        "register_impl('mine', impl_name='fast')(lambda x: x + 1)"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    functional.declare_op_locations("mine", ("my_kernels", "my_absent_kernels"))
    assert "mine" in registry.all_registered_ops()
    assert torch.equal(functional.dispatch("mine", X), X + 1)
    assert registry.get_discovery_failures()["my_absent_kernels"][0] is ModuleNotFoundError


def test_names_of_the_package() -> None:
    for name in ("OpImpl", "register_impl", "register_op", "set_impl", "resolve_backend"):
        assert getattr(backends, name) is getattr(registry, name) is getattr(dispatch, name)
    assert backends.Capability is Capability
    assert not hasattr(backends, "nothing")


def test_warning() -> None:
    with pytest.warns(
        dispatch.LigerBackendFallbackWarning, match="softmax is computed by a, not by b: c"
    ):
        dispatch.emit_fallback_warning("softmax", "b", "a", "c")


def test_one_implementation_of_all_ops() -> None:
    info = implementations.ImplInfo("mine", ("cuda",), module_path="mine.ops")
    with pytest.raises(NotImplementedError, match=r"backends\.register"):
        implementations.register_impl(info)
    assert implementations.select_impl("cuda").name == "triton"
    assert implementations.select_impl("cpu") is None
    assert implementations.select_impl("cuda", "triton").name == "triton"
    with pytest.raises(RuntimeError, match=r"Unknown LIGER_KERNEL_IMPL='cutile'; known: .*npu"):
        implementations.select_impl("cuda", "cutile")
    with pytest.raises(RuntimeError, match="computes on npu, not on 'cuda'"):
        implementations.select_impl("cuda", "npu")


@pytest.mark.parametrize(
    "op", ["rms_norm", "swiglu", "softmax", "fused_add_rms_norm", "layer_norm", "geglu"]
)
def test_by_triton_alone(op: str) -> None:
    module = importlib.import_module(f"liger_kernel.ops.backends._triton.{op}")
    call = getattr(module, f"{op}_triton")
    args = {"rms_norm": (X, W, 1e-6), "softmax": (X,), "layer_norm": (X, W, W, 1e-6)}.get(
        op, (X, X)
    )
    args = (*args, W, 1e-6) if op == "fused_add_rms_norm" else args
    with backends.use_implementation("triton"):
        expected = dispatch.dispatch(op, *args)
    found = call(*args, mode=None)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with backends.use_implementation("reference"):
        assert torch.equal(call(*args)[0], expected[0]), "it says by what"
    with pytest.raises(AttributeError, match="nothing_triton"):
        _ = module.nothing_triton


def test_configure() -> None:
    config = configure.FusedLinearCrossEntropyConfig(1, 2, 3)
    with pytest.warns(UserWarning, match="no effect"):
        assert configure.configure(flsce=config, moe=configure.MoEConfig(1, 2, 3, 4, 5, 6)) is False


def test_functions_of_ops_are_functional_names_too() -> None:
    from liger_kernel import ops

    assert transformers_functional.LigerRMSNormFunction is ops.LigerRMSNormFunction
    for name in ("LigerNothingFunction", "rms_norm_forward"):
        assert not hasattr(transformers_functional, name)


def test_small_helpers() -> None:
    from liger_kernel.ops.mlp import get_bucket_m

    from liger_kernel.ops.kl_div import REDUCTION_LITERAL, get_num_warps

    assert REDUCTION_LITERAL.__args__ == ("none", "sum", "mean", "batchmean")
    assert [get_num_warps(n) for n in (1024, 2048, 8192, 65536)] == [4, 8, 16, 32]
    assert [get_bucket_m(m) for m in (0, 255, 256, 4095, 4096, 9999)] == [0, 7, 10, 39, 40, 40]
    assert utils.get_npu_core_count(7) == 7
    arguments: dict[str, Any] = {}
    utils.set_large_grf_mode(arguments)
    assert arguments["grf_mode"] in ("256", "large")


def test_raw_kernels(tmp_path: Path) -> None:
    """In a process of its own, where Triton is interpreted; nothing is imported before it is asked for."""
    pytest.importorskip("triton")
    program = (
        "import sys, liger_kernel.triton, liger_kernel.ops.backends.registry\n"
        "assert 'triton' not in sys.modules\n"
        "import liger_kernel.functional, liger_kernel.backends.dispatch as d\n"
        "assert not hasattr(d, 'nothing') and not hasattr(liger_kernel.functional, 'nothing')\n"
        "assert 'liger_kernel.compat.dispatch' not in sys.modules\n"
        "import torch, triton, triton.language as tl\n"
        "from liger_kernel.ops.utils import element_mul_kernel\n"
        "from liger_kernel.ops.swiglu import silu\n"
        "from liger_kernel.ops.cross_entropy import LOG2_E\n"
        "@triton.jit\n"
        "def by(X, Y, N: tl.constexpr, SCALE: tl.constexpr):\n"
        "    i = tl.arange(0, N)\n"
        "    tl.store(Y + i, silu(tl.load(X + i)) * SCALE)\n"
        "x, y = torch.linspace(-4, 4, 8), torch.zeros(8)\n"
    )
    body = (
        "by[(1,)](x, y, 8, 2.0)\n"
        "assert (y - 2 * torch.nn.functional.silu(x)).abs().max() < 1e-6\n"
        "assert abs(float(getattr(LOG2_E, 'value', LOG2_E)) - 1.4426950408889634) < 1e-15\n"
        "for dtype in (torch.float32, torch.float16):\n"
        "    wide = torch.randn(5, 14).to(dtype)\n"
        "    x, keep, factor = wide[:, ::2], wide.clone(), torch.tensor(0.3)\n"
        "    element_mul_kernel[(5,)](x, x.stride(0), factor, 7, BLOCK_SIZE=4, X_col_stride=2)\n"
        "    assert torch.equal(x, (keep[:, ::2].float() * factor).to(dtype)), x\n"
        "    assert torch.equal(wide[:, 1::2], keep[:, 1::2])\n"
        "    y = torch.ones(3, 5)\n"
        "    element_mul_kernel[(3,)](y, 5, factor, 5, 8)\n"
        "    assert torch.equal(y, factor.expand(3, 5))\n"
        "print('done')"
    )
    path = tmp_path / "kernels.py"  # `triton.jit` wants a file
    path.write_text(program + body)
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr


def test_cache_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = pytest.importorskip("triton.runtime.cache")
    from liger_kernel.triton import apply_liger_triton_cache_manager
    from liger_kernel.triton.monkey_patch import LigerTritonFileCacheManager as Manager

    monkeypatch.setenv("TRITON_CACHE_MANAGER", "before")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    apply_liger_triton_cache_manager()
    assert (
        os.environ["TRITON_CACHE_MANAGER"]
        == "liger_kernel.triton.monkey_patch:LigerTritonFileCacheManager"
    )
    manager = cache.get_cache_manager("ab" * 32)
    assert type(manager) is Manager
    for data, name in ((b"\x00\x01", "kernel.cubin"), ("text", "kernel.ptx")):
        path = Path(manager.put(data, name))
        assert path.parent.parent == tmp_path
        assert (path.read_bytes() if isinstance(data, bytes) else path.read_text()) == data
    assert sorted(p.name for p in path.parent.iterdir() if p.name[:4] == "tmp.") == []
    assert manager.get_file("kernel.ptx") == str(path)
    manager.cache_dir = None
    with pytest.raises(RuntimeError, match="cache dir"):
        manager.put(b"", "x")


def test_op_helpers() -> None:
    low, high = functional.rms_norm(X, W), functional.rms_norm(X.double(), W.double())
    assert_no_worse("rms", helpers.pytorch_reference_rms_norm(X, W, 1e-6), high, low)
    assert helpers.pytorch_reference_layer_norm(X, W, W, 1e-6).shape == X.shape
    assert list(helpers.iter_test_shapes([(1, 2), [3], (1, 2)])) == [(1, 2), (3,)]
    assert helpers.requires_cuda("why").kwargs == {"reason": "why"}
    assert helpers.sum_based_dw_close(W, W + 1e-4, 0.0)[0]
    assert helpers.sum_based_dw_close(W, W * 1.01, 0.02, 0.0)[0]
    close, why = helpers.sum_based_dw_close(W, W + 1, 0.0)
    assert not close
    assert "limit 0.001" in why
    assert not helpers.sum_based_dw_close(W, W[:3], 0.0)[0]
    for op in ("rms_norm", "layer_norm", "softmax", "swiglu", "geglu", "fused_add_rms_norm"):
        helpers.assert_op_correctness(
            op,
            "torch",
            (7, 12),
            torch.bfloat16,
            offset=1.0 if "rms" in op else 0.0,
            strict_grad=True,
        )
    registry.register_impl("rms_norm", impl_name="mine")(
        lambda x, weight, eps, offset, casting_mode: x * weight
    )
    with pytest.raises(AssertionError, match="rms_norm by mine: 0"):
        helpers.assert_op_correctness("rms_norm", "mine", (7, 12), torch.float32)


def test_method_of_one_module() -> None:
    from liger_kernel.transformers.monkey_patch import _bind_method_to_module

    norm, other = LigerRMSNorm(12), LigerRMSNorm(12)
    _bind_method_to_module(norm, "forward", lambda self, x: (self, x))
    assert norm(X) == (norm, X)
    assert isinstance(other(X), Tensor)
