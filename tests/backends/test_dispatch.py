"""Who computes: one order of decision for every op, and options that arrive."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from liger_kernel import backends
from liger_kernel._core.options import OpOptions
from liger_kernel.backends import dispatch, kernels_of
from liger_kernel.backends.records import Backend, DeviceFacts
from liger_kernel.ops import OPS
from liger_kernel.ops.glu import glu
from liger_kernel.ops.rms_norm import rms_norm
from liger_kernel.ops.rope import rope
from liger_kernel.testing import Make
from liger_kernel.testing.calls import call, drawn, leaves, wanted_inputs
from tests import dummy_backend
from tests.test_layout import OPS_WITHOUT_KERNELS

#: options that no caller of the op gives: token_scaling is the fused loss's (tests/loss_head), causal that of
#: multi-token attention (its own cases); of in_place the host makes the gradient's memory
INTERNAL = {"token_scaling", "in_place", "causal"}


def has_options(op: str) -> bool:
    if op in OPS_WITHOUT_KERNELS:  # no contract: they are built from other ops
        return False
    contract = vars(importlib.import_module(f"liger_kernel.ops.{op}.contract")).values()
    own = (c for c in contract if isinstance(c, type) and issubclass(c, OpOptions))
    return any({*c.__match_args__} - INTERNAL for c in own if c is not OpOptions)


WITH_OPTIONS = [op for op in OPS if has_options(op)]
#: where the kernels run: on the CPU there is their interpreter, unless this machine has a GPU
KERNELS_ON = "cuda" if torch.cuda.is_available() else "cpu"


class Recorder:
    """Stands between an op and its implementation, and writes down the options that pass."""

    def __init__(self, found: Any, seen: list[Any]):
        self._found, self._seen = found, seen

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._found, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self._seen.append((name, kwargs["options"]))
            return function(*args, **kwargs)

        return recorded


@pytest.mark.parametrize("implementation", ["reference", "triton", "dummy"])
@pytest.mark.parametrize("op", WITH_OPTIONS)
def test_every_option_reaches_every_backend(
    op: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward and in backward, as the caller gave it. `test_ops.py` says of the same cases that it is obeyed."""
    spec = importlib.import_module(f"liger_kernel.ops.{op}.cases").SPEC
    seen: list[Any] = []
    monkeypatch.setattr(dispatch, "kernels_of", lambda name, x: Recorder(kernels_of(name, x), seen))
    changed: set[str] = set()
    defaults: dict[str, Any] = {}
    for case in spec.cases:
        device = KERNELS_ON if implementation == "triton" else "cpu"
        interpreted = implementation == "triton" and device == "cpu"
        if case.large or not case.options or (interpreted and {*case.options} <= changed):
            continue
        seen.clear()
        inputs, grads = drawn(spec, case, Make(torch.float32, device))
        with backends.use_implementation(implementation):
            call(
                spec.function,
                case.options,
                leaves(inputs, wanted_inputs(spec, case, inputs)),
                grads,
            )
        for member, options in seen:
            fields = type(options).__dataclass_fields__
            defaults = {name: field.default for name, field in fields.items()}
            for name, value in case.options.items():
                if name not in fields or value is None:  # None: the op chooses
                    continue
                assert getattr(options, name) == value, f"{member}: {name}"
                if value != defaults[name]:
                    changed.add(name)
    assert seen
    never = {*defaults} - changed - INTERNAL
    assert not never, f"no case changes {sorted(never)}"


def test_an_explicit_request_is_honoured_under_compile() -> None:
    """Inductor would fuse the reference; who asks for the kernels gets them, outside of the graph."""
    x, weight = torch.randn(4, 8, device=KERNELS_ON), torch.randn(8, device=KERNELS_ON)
    ran: list[str] = []
    found = kernels_of

    def recording(name: str, x: torch.Tensor) -> Any:
        ran.append(name)
        return found(name, x)

    compiled = torch.compile(lambda x, w: rms_norm(x * 2, w) + 1, backend="eager")
    with backends.use_implementation("reference"):
        expected = rms_norm(x * 2, weight) + 1
    assert torch.equal(compiled(x, weight), expected)
    with pytest.MonkeyPatch.context() as patch, backends.use_implementation("triton"):
        patch.setattr(dispatch, "kernels_of", recording)
        torch._dynamo.reset()
        assert torch.equal(compiled(x, weight), rms_norm(x * 2, weight) + 1)
    assert ran == ["rms_norm", "rms_norm"]


def test_an_explicit_request_is_refused_in_one_graph() -> None:
    whole = torch.compile(lambda x, w: rms_norm(x, w), backend="eager", fullgraph=True)
    x, weight = torch.randn(4, 8), torch.randn(8)
    whole(x, weight)  # the reference is traced
    torch._dynamo.reset()
    with (
        backends.use_implementation("triton"),
        pytest.raises(Exception, match="_outside_the_graph"),
    ):
        whole(x, weight)
    torch._dynamo.reset()
    with backends.use_implementation("reference"):
        whole(x, weight)


def test_float64_is_refused_by_kernels() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    with backends.use_implementation("triton"), pytest.raises(RuntimeError, match="float64"):
        glu(x, x)
    assert glu(x, x).dtype == torch.float64


def test_an_op_without_a_file_falls_back_to_its_reference() -> None:
    with backends.use_implementation("dummy"):
        assert kernels_of("rms_norm", torch.empty(1)).__name__ == "tests.dummy_backend.rms_norm"
        found = kernels_of("rope", torch.empty(1))
    assert type(found).__name__ == "Recompute"
    assert {"dummy", "triton"} <= backends.IMPLEMENTATIONS.keys()


def test_a_request_for_another_device_is_refused() -> None:
    with (
        backends.use_implementation("dummy"),
        pytest.raises(RuntimeError, match=r"dummy.*'meta'.*the CPU"),
    ):
        kernels_of("rms_norm", torch.empty(1, device="meta"))
    with (
        pytest.raises(
            RuntimeError, match=r"Unknown LIGER_KERNEL_IMPL='no'; known: dummy, inductor, npu, ref"
        ),
        backends.use_implementation("no"),
    ):
        pass


def test_facts_of_a_device_nobody_knows() -> None:
    facts = backends.facts_of(torch.device("meta"))
    assert backends.backend_of("meta").name == "unknown"
    assert facts.queues, "reading a number back may wait"
    assert (facts.product_multiple, facts.mixed_products, facts.streams) == (1, (), None)


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps", "mtia"])
def test_fake_tensors_of_a_device_that_is_not_here(device: str) -> None:
    """As when a step is planned on a laptop: nobody asks the driver for what is not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(4, 8, device=device), torch.empty(8, device=device)
        y = glu(rms_norm(x, weight), x)
    assert (y.device.type, y.shape) == (device, x.shape)


def test_dummy_is_registered_once() -> None:
    assert backends.BACKENDS["dummy"] is dummy_backend.BACKEND
    assert backends.backend_of("cpu").name == "cpu", "the dummy computes there on request alone"


@pytest.mark.parametrize("first", ["acme", "cpu"])
def test_two_families_with_the_facts_of_one_device(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is found first: neither takes the place of the other silently."""
    both = {
        "acme": Backend("acme", ("npu", "cpu"), lambda device: DeviceFacts(processors=7)),
        "cpu": backends.BACKENDS["cpu"],
    }
    monkeypatch.setattr(backends, "BACKENDS", {first: both.pop(first)})
    (second,) = both.values()
    with pytest.raises(ValueError, match=rf"'{first}' and '{second.name}' both .*'cpu' devices"):
        backends.register(second)
    backends.register(dataclasses.replace(second, facts=None))
    backends.register(dataclasses.replace(second, present=lambda: False))
    assert backends.backend_of("cpu").name == first
    for cache in (backends.backend_of, backends.facts_of):
        cache.cache_clear()


@pytest.fixture
def mesh() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_reach_every_op(mesh: Any) -> None:
    """By the op's rule for shards, whatever the op; one process, so that a shard is the whole."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from liger_kernel.ops.cross_entropy import cross_entropy
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm
    from liger_kernel.ops.layer_norm import layer_norm

    def shard(t: torch.Tensor, dim: int = 0) -> Any:
        return distribute_tensor(t, mesh, [Shard(dim)])

    x, r, w = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    cos, sin = torch.randn(3, 8), torch.randn(3, 8)
    pairs: list[tuple[Any, Any]] = [
        (rms_norm(shard(x), w), rms_norm(x, w)),
        (layer_norm(shard(x), w, w), layer_norm(x, w, w)),
        (glu(shard(x, 1), shard(r, 1)), glu(x, r)),
        *zip(fused_add_rms_norm(shard(x), shard(r), w), fused_add_rms_norm(x, r, w), strict=True),
        *zip(rope(shard(q, 1), shard(k, 1), cos, sin), rope(q, k, cos, sin), strict=True),
    ]
    for ours, plain in pairs:
        assert type(ours).__name__ == "DTensor"
        assert ours.shape == plain.shape
        assert torch.equal(ours.full_tensor(), plain)
    with pytest.raises(TypeError, match="cross_entropy takes no DTensors"):
        cross_entropy(shard(x), torch.zeros(4, dtype=torch.int64))
