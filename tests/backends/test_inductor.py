"""References that Inductor compiles, on request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor import cpp_builder, exc

from liger_kernel import backends
from liger_kernel.backends import inductor, serving
from liger_kernel.ops.cross_entropy import cross_entropy
from liger_kernel.ops.layer_norm import layer_norm
from liger_kernel.ops.rms_norm import rms_norm
from liger_kernel.testing import Make, specs
from liger_kernel.testing.calls import assert_as_exact, drawn

WHY_NOT = inductor.unavailable("cpu")
needs_compiler = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The names of the functions that are called compiled, which here nobody compiles."""
    found: list[str] = []

    def note(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            found.append(function.__name__)
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(torch, "compile", note)
    inductor.compiled.cache_clear()
    backends.forget()
    with backends.use_implementation("inductor"):
        yield found
    inductor.compiled.cache_clear()
    backends.forget()


@needs_compiler
def test_it_is_as_exact_as_the_reference() -> None:
    spec = specs()["rms_norm"]
    case = spec.cases[0]

    def draw(seed: int) -> Any:
        return drawn(spec, case, Make(torch.bfloat16, "cpu", seed))

    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with backends.use_implementation("inductor"):
        assert_as_exact(spec, case, *draw(0), draw)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > frames


@needs_compiler
def test_only_of_ops_that_have_nothing_better(compiled: list[str]) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    rms_norm(x, None).sum().backward()
    assert compiled == ["rms_norm"]
    layer_norm(x, None, None)  # PyTorch's own kernel
    cross_entropy(x, torch.zeros(3, dtype=torch.long))  # ours for every device
    assert compiled == ["rms_norm"]
    assert [serving(op, "cpu", "inductor")[0] for op in ("glu", "cross_entropy")] == [
        "inductor",
        "portable",
    ]


@needs_compiler
def test_a_compiled_model_is_one_graph(compiled: list[str]) -> None:
    x = torch.randn(3, 8)
    graph = torch._dynamo.export(lambda x: rms_norm(x * 2, None))(x)[0]
    assert torch.equal(graph(x), rms_norm(x * 2, None))


@pytest.mark.parametrize(
    ("device_type", "why"),
    [("cuda", "serve this device"), ("npu", "serve this device"), ("cpu", "finds no C")],
)
def test_a_request_that_cannot_be_served_raises(
    device_type: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    inductor.unavailable.cache_clear()
    with pytest.raises(RuntimeError, match=rf"LIGER_KERNEL_IMPL='inductor' cannot.*{why}"):
        backends.implementation_for(device_type, "inductor")
    inductor.unavailable.cache_clear()
    assert backends.implementation_for("cpu") is None, "by device: the reference, as it is"


def test_apples_gpus_are_offered_it_and_have_no_kernels() -> None:
    assert backends.implementation_for("mps") is None
    assert backends.implementation_for("mps", "inductor") is inductor.INDUCTOR
    assert backends.backend_of("mps").facts(torch.device("mps")).queues  # type: ignore[misc]
    with pytest.raises(RuntimeError, match="'triton' cannot serve"):
        backends.implementation_for("mps", "triton")
