"""Which ops run functions of torch_npu, which the reference, and what becomes of requests by name.

Run by `tests/backends/test_npu.py`, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from liger_kernel import backends
from liger_kernel._core.contract import check_contract
from liger_kernel.backends import disabled
from liger_kernel.backends.dispatch import kernels_for
from liger_kernel.chunked_loss import (
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearJSDLoss,
    LigerFusedLinearKTOLoss,
    fused_linear_distillation,
    grpo_loss,
    preference,
)
from liger_kernel.loss_head import products
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernel.loss_head.label_count import LabelCount, count_labels
from liger_kernel.ops import OPS
from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm
from liger_kernel.ops.fused_moe import fused_moe
from liger_kernel.ops.gated_mlp import gated_mlp
from liger_kernel.ops.glu import glu, glu_packed
from liger_kernel.ops.rms_norm import rms_norm
from liger_kernel.ops.rope import rope
from liger_kernel.testing import Make, assert_draws_no_worse, assert_no_worse, specs
from liger_kernel.testing.calls import as_tuple, call, drawn, leaves, named, wanted_inputs
from tests.npu_stand_in import device

SPECS = specs()
#: op -> functions of torch_npu, and kernels of PyTorch's operators, that forward and backward of its first case call.
#: An op that is not here is computed by its reference.
NATIVE: dict[str, dict[str, int]] = {
    "rms_norm": {"npu_rms_norm": 1, "npu_rms_norm_backward": 1},
    "fused_add_rms_norm": {"npu_add_rms_norm": 1, "npu_rms_norm_backward": 1},
    "glu": {"npu_swiglu": 1, "npu_swiglu_backward": 1},
    "gated_mlp": {"npu_swiglu": 2, "npu_swiglu_backward": 1},
    "lora_mlp": {"npu_swiglu": 2, "npu_swiglu_backward": 1},
    "tiled_mlp": {"npu_swiglu": 10, "npu_swiglu_backward": 5},  # five tiles
    "rope": {"npu_rotary_mul": 4},
    "fused_moe": {"npu_grouped_matmul": 6},
    "layer_norm": {"native_layer_norm": 1, "native_layer_norm_backward": 1},
    "fused_neighborhood_attention": {"_softmax_backward_data": 1},
    "multi_token_attention": {"_softmax_backward_data": 1},
    "attn_res": {"_softmax_backward_data": 1},
    "mhc_sinkhorn": {"_softmax_backward_data": 1},
    "softmax": {"_softmax_backward_data": 1},
    "moe_router": {"_softmax_backward_data": 1},
}

WITH_FILE = ("rms_norm", "fused_add_rms_norm", "glu", "rope", "fused_moe")


def randn(*shape: int, dtype: torch.dtype = torch.float32, **more: Any) -> Tensor:
    return torch.randn(shape, **more).to("npu", dtype).detach().requires_grad_()


def called(run: Callable[[], Any]) -> dict[str, int]:
    """The native functions that `run` calls."""
    torch_npu.calls.clear()
    device.ran.clear()
    run()
    operators = (op for op in device.ran if op.startswith(("native_layer", "_softmax_backward")))
    found = dict(torch_npu.calls)
    for op in operators:
        found[op] = found.get(op, 0) + 1
    return found


def trained(outputs: Any) -> None:
    """A backward from everything that `outputs` has."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(o.float().sum() for o in outputs if o is not None and o.requires_grad).backward()


@pytest.mark.parametrize("op", [*OPS, "fused_linear_cross_entropy"])
def test_what_runs_natively(op: str) -> None:
    spec = SPECS[op]
    dtype = torch.bfloat16 if op == "layer_norm" else torch.float32
    inputs, grads = drawn(spec, spec.cases[0], Make(dtype, "npu"))
    args = leaves(inputs, wanted_inputs(spec, spec.cases[0], inputs))
    native = called(lambda: call(spec.function, spec.cases[0].options, args, grads))
    assert native == NATIVE.get(op, {})
    if op in WITH_FILE:
        assert backends.kernels_of(op, args[0]).__name__ == f"liger_kernel.ops.{op}.npu"


@pytest.mark.parametrize("op", WITH_FILE)
def test_every_file_satisfies_its_contract(op: str) -> None:
    import importlib

    contract = importlib.import_module(f"liger_kernel.ops.{op}.contract").Kernels
    module = importlib.import_module(f"liger_kernel.ops.{op}.npu")
    assert check_contract(module, contract, op) is module


def experts(n: int, tokens: int = 3, features: int = 1) -> Tensor:
    index = torch.zeros(tokens, 1, dtype=torch.long).to("npu")
    weights = randn(n, 2 * features, 2), randn(n, 2, features)
    return fused_moe(randn(tokens, 2), *weights, index, randn(tokens, 1))


HALF = torch.bfloat16
Q, ANGLES = (2, 4, 5, 16), (1, 5, 16)
#: what a file leaves to the reference by its rule -> words of the reason, op, options and tensors
LEFT: dict[str, tuple[str, Callable[[], Any]]] = {
    "no rows": ("no empty", lambda: rms_norm(randn(0, 8), randn(8))),
    "no rows to add": ("no empty", lambda: fused_add_rms_norm(randn(0, 8), randn(0, 8), None)),
    "empty gate": ("no empty", lambda: glu(randn(0, 8), randn(0, 8))),
    "multiplier": ("multiplier", lambda: glu(randn(3, 8), randn(3, 8), gate_multiplier=0.5)),
    "down multiplier": ("multiplier", lambda: glu_packed(randn(3, 8), down_multiplier=2.0)),
    "multiplier of a block": (
        "multiplier",
        lambda: gated_mlp(randn(3, 8), randn(6, 8), randn(6, 8), randn(8, 6), gate_multiplier=0.5),
    ),
    "partial rotation": (
        "rotary_dim",
        lambda: rope(randn(*Q), None, randn(*ANGLES), randn(*ANGLES), rotary_dim=8),
    ),
    "angles of three positions": (
        "section",
        lambda: rope(
            randn(*Q), None, randn(3, *ANGLES), randn(3, *ANGLES), mrope_section=(2, 3, 3)
        ),
    ),
    "float64 angles": (
        "float64",
        lambda: rope(randn(*Q), None, *(randn(*ANGLES, dtype=torch.float64) for _ in "cs")),
    ),
    "wide heads": (
        "896",
        lambda: rope(randn(1, 2, 3, 896), None, randn(1, 3, 896), randn(1, 3, 896)),
    ),
    "many heads": ("1000", lambda: rope(randn(1, 1000, 1, 4), None, randn(1, 4), randn(1, 4))),
    "many sequences": ("1000", lambda: rope(randn(1000, 1, 1, 4), None, randn(1, 4), randn(1, 4))),
    "wide experts": ("65536 features", lambda: experts(2, features=65536)),
    "no token": ("no empty", lambda: experts(2, tokens=0)),
    "angles of each sequence": (
        "interleaved",
        lambda: rope(randn(*Q), None, randn(2, 5, 16), randn(2, 5, 16), interleaved=True),
    ),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_to_the_reference(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason, run = LEFT[what]
    said: list[str | None] = []
    for op in WITH_FILE:
        module = backends.kernels_of(op, torch.empty(1, device="npu"))
        rule = module.unserved

        def told(*tensors: Any, rule: Any = rule, options: Any) -> str | None:
            said.append(rule(*tensors, options=options))
            return said[-1]

        monkeypatch.setattr(module, "unserved", told)
    assert called(lambda: trained(run())) == {}
    assert reason in str(said[0])
    assert len(said) == 1, "a block asks for its gated product"


def test_no_more_experts_than_groups() -> None:
    """By the rule alone: the reference takes long over so many."""
    from liger_kernel.ops.fused_moe import npu
    from liger_kernel.ops.fused_moe.contract import MoEOptions

    for n, reason in ((1023, None), (1024, "1024 experts are too many")):
        tensors = (randn(3, 2), randn(n, 2, 2), randn(n, 2, 1), torch.zeros(3, 1).to("npu").long())
        given = (*tensors, randn(3, 1), *(None,) * 6)
        assert npu.unserved(*given, options=MoEOptions()) == reason


F32, F16 = torch.float32, torch.float16
GEMMA: dict[str, Any] = {"offset": 1.0, "casting_mode": "gemma"}
#: op, options, and the shapes and dtypes of its tensors: what takes another call than that of the plain case
EXPRESSED: dict[str, tuple[Callable[..., Any], dict[str, Any], list[Any]]] = {
    "offset": (rms_norm, GEMMA, [(3, 8), F32, (8,), F32]),
    "offset in 16 bits": (rms_norm, GEMMA, [(300, 8), HALF, (8,), HALF]),
    "float32 weight": (rms_norm, GEMMA | {"offset": 0.0}, [(300, 8), HALF, (8,), F32]),
    "16-bit weight": (rms_norm, {}, [(3, 8), F32, (8,), HALF]),
    "other weight": (rms_norm, GEMMA | {"offset": 0.0}, [(300, 8), F16, (8,), HALF]),
    "one row": (rms_norm, {}, [(8,), F32, (8,), F32]),
    "add, offset": (fused_add_rms_norm, GEMMA, [(9, 8), HALF, (9, 8), HALF, (8,), HALF]),
    "float32 angles": (rope, {}, [Q, HALF, Q, HALF, ANGLES, F32, ANGLES, F32]),
    "16-bit angles": (rope, {}, [Q, F32, Q, HALF, ANGLES, HALF, ANGLES, HALF]),
    "half a table": (rope, {"rotary_dim": 16}, [Q, F32, Q, F32, (1, 5, 8), F32, (1, 5, 8), F32]),
    "interleaved": (rope, {"interleaved": True}, [Q, F32, Q, F32, ANGLES, F32, ANGLES, F32]),
    "heads last": (
        rope,
        {"unsqueeze_dim": 2},
        [(2, 5, 4, 16), HALF, (2, 5, 1, 16), HALF, (2, 5, 16), HALF, (2, 5, 16), HALF],
    ),
    "geglu": (glu, {"activation": "gelu_tanh"}, [(3, 8), F32, (3, 8), F32]),
    "exact geglu": (glu_packed, {"activation": "gelu"}, [(2, 3, 8), F32]),
}
#: whose reference computes in float32 and rounds once, too, so that nothing may differ
ROUNDED_ONCE = ("offset in 16 bits", "float32 weight", "other weight", "add, offset")
ROUNDED_ONCE += ("float32 angles", "16-bit angles", "heads last")


@pytest.mark.parametrize("what", EXPRESSED)
def test_options_that_are_expressed_exactly(what: str) -> None:
    """By native calls, within the documentation's limits, or the stand-in would raise."""
    op, options, described = EXPRESSED[what]

    def draw(seed: int) -> Any:
        torch.manual_seed(seed)
        tensors = list(zip(described[::2], described[1::2], strict=True))
        given = [randn(*shape, dtype=dtype).detach() for shape, dtype in tensors]
        shapes = [o.shape for o in as_tuple(op(*given, **options))]
        grads = {i: randn(*shape).detach() for i, shape in enumerate(shapes) if i == 0}

        def run(implementation: str | None, dtype: torch.dtype | None = None) -> Any:
            wanted = set(range(1 if op in (rope, glu_packed) else 2))
            with backends.use_implementation(implementation):
                return named(*call(op, options, leaves(tuple(given), wanted, dtype), grads))

        assert called(lambda: ours.update(run("npu")))
        low = run("reference")
        if what in ROUNDED_ONCE:
            assert torch.equal(ours["output 0"], low["output 0"])
        return dict(ours), run("reference", torch.float64), low

    ours: dict[str, Tensor] = {}
    assert_draws_no_worse(draw)


def test_a_gradient_of_any_strides() -> None:
    for run in (lambda: glu(randn(3, 8), randn(3, 8)), lambda: rms_norm(randn(3, 8), None)):
        for grad in (randn(8).expand(3, 8), randn(8, 3).t(), randn(3, 1).expand(3, 8)):
            run().backward(grad.detach())


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = randn(3, 8), randn(8).detach()
    trained(rms_norm(x, weight))
    assert x.grad is not None
    assert weight.grad is None
    q, k = randn(*Q), randn(*Q).detach()
    cos, sin = (randn(*ANGLES).detach() for _ in range(2))
    found = called(lambda: trained(rope(q, k, cos, sin)))
    assert found == {"npu_rotary_mul": 3}, "q and k forward, q alone backward"
    without = called(lambda: rms_norm(x.detach(), weight))
    assert without == {"npu_rms_norm": 1}


# --- requests by name -----------------------------------------------------------------------------


def test_a_request_is_honoured_or_refused() -> None:
    x, weight = randn(3, 8), randn(8)
    with backends.use_implementation("npu"):
        assert called(lambda: rms_norm(x, weight)) == {"npu_rms_norm": 1}
        with pytest.raises(RuntimeError, match=r"'npu' cannot serve .* 'cpu': torch_npu computes"):
            rms_norm(x.cpu(), weight.cpu())
        with pytest.raises(RuntimeError, match="'npu' computes in float32 and cannot serve float"):
            rms_norm(x.double(), weight.double())
    with backends.use_implementation("reference"):
        assert called(lambda: rms_norm(x, weight)) == {}
    with (
        backends.use_implementation("triton"),
        pytest.raises(RuntimeError, match=r"'triton' cannot serve .* 'npu': Triton supports cuda"),
    ):
        rms_norm(x, weight)
    assert called(lambda: rms_norm(x.double(), weight.double())) == {}


def test_a_request_by_the_environment() -> None:
    """It is read at import: a process that has PyTorch parts for each."""
    code = """
import os, torch
for name in ("npu", "NPU ", "reference", ""):
    if not (child := os.fork()):
        os.environ["LIGER_KERNEL_IMPL"] = name
        from tests.npu_stand_in import plugin
        import torch_npu
        from liger_kernel.ops.rms_norm import rms_norm
        rms_norm(torch.ones(2, 8, device="npu"), None)
        print(repr(name), dict(torch_npu.calls), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    native = {"npu_rms_norm": 1}
    expected = {"npu": native, "NPU ": native, "reference": {}, "": native}
    told = [f"{name!r} {calls}" for name, calls in expected.items()]
    assert python(code, {}).splitlines() == told


def test_under_compile_the_reference_is_traced() -> None:
    x, weight = randn(3, 8), randn(8)
    compiled = torch.compile(lambda x, w: rms_norm(x, w), backend="eager", fullgraph=True)
    assert called(lambda: compiled(x, weight)) == {}
    with backends.use_implementation("npu"):
        torch._dynamo.reset()
        partly = torch.compile(lambda x, w: rms_norm(x * 2, w) + 1, backend="eager")
        assert called(lambda: partly(x, weight)) == {"npu_rms_norm": 1}


# --- the device -----------------------------------------------------------------------------------


def test_facts() -> None:
    facts = backends.facts_of(torch.device("npu"))
    assert backends.backend_of("npu").name == "npu"
    assert facts.queues
    assert not facts.float64
    assert facts.streams is None, "the stand-in has none"
    with backends.device_guard(torch.device("npu:0")):
        assert device.entered[-1] == torch.device("npu:0")


@pytest.mark.parametrize("op", [*OPS, "fused_linear_cross_entropy"])
def test_the_host_reads_no_number_back(op: str) -> None:
    """On a device that queues, neither forward nor backward waits for it; but see the next test for a count."""
    spec = SPECS[op]
    cases = (c for c in spec.cases if "label_count" not in c.options)
    for case in (c for c in cases if not c.large and "long" not in c.id):
        inputs, grads = drawn(spec, case, Make(torch.float32, "npu"))
        args = leaves(inputs, wanted_inputs(spec, case, inputs))
        device.ran.clear()
        call(spec.function, case.options, args, grads)
        assert device.ran or torch_npu.calls
        assert not device.READS & set(device.ran), case.id


def test_labels_are_left_out_where_the_device_cannot_assert() -> None:
    """As on NPUs, and on MPS before torch 2.14: the host looks at the count instead."""
    assert not backends.can_assert("npu")
    assert not backends.can_assert("mps") or torch.backends.mps.is_available()
    hidden, weight = randn(64, 8), randn(11, 8)
    target = torch.arange(64).remainder(11).masked_fill(torch.arange(64) % 2 == 0, -100).to("npu")
    loss = fused_linear_cross_entropy(hidden, weight, target, label_count=LabelCount(target))[0]
    assert_no_worse(
        "loss",
        loss,
        F.cross_entropy(hidden.double() @ weight.double().t(), target),
        F.cross_entropy(hidden @ weight.t(), target),
    )
    with pytest.raises(RuntimeError, match="more labels than label_count says"):
        fused_linear_cross_entropy(hidden, weight, target, label_count=3)


def loss_of_tokens(name: str, place: str) -> tuple[list[Tensor], int]:
    """The loss, its gradients, and the rows of hidden states whose logits were made, of 6 of 16 labelled tokens."""
    torch.manual_seed(0)
    hidden, weight, given = torch.randn(4, 4, 8), torch.randn(11, 8), torch.randn(4, 4, 11)
    target = torch.arange(16).view(4, 4).remainder(11)
    target[:, :2] = target[1, 3] = target[3, 2] = -100
    hidden, weight, given, target = (t.to(place) for t in (hidden, weight, given, target))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    frozen, of_first = (t.detach() * 0.9 for t in leaves), torch.tensor([1.0, 0, 1, 0]).to(place)
    rows: list[int] = []
    project = products.HeadProducts.project

    def recorded(head: products.HeadProducts, x: Tensor, out: Tensor) -> None:
        rows.append(x.shape[0])
        project(head, x, out)

    def counted(
        labels: Tensor, ignored: int, group_size: int = 1, order: Tensor | None = None
    ) -> Any:
        # the stand-in has no streams, on which numbers come
        return count_labels(
            labels.cpu(), ignored, group_size, None if order is None else order.cpu()
        )

    with pytest.MonkeyPatch.context() as patch:
        for module in (preference, grpo_loss, fused_linear_distillation):
            patch.setattr(module, "count_labels", counted)
        patch.setattr(products.HeadProducts, "project", recorded)
        if name == "dpo":
            reference = dict(zip(("ref_input", "ref_weight"), frozen, strict=True))
            loss = LigerFusedLinearDPOLoss()(weight, hidden, target, **reference)[0]
        elif name == "kto":
            loss = LigerFusedLinearKTOLoss()(hidden, weight, target, preference_labels=of_first)[0]
        elif name == "grpo":
            mask, ids = target != -100, target.clamp(min=0)
            module = LigerFusedLinearGRPOLoss(use_ref_model=False, beta=0.0)
            loss = module(hidden, weight, ids, mask, of_first)[0]
        else:
            soft = given.flatten(0, 1)
            loss = LigerFusedLinearJSDLoss()(hidden, weight, soft, None, target)
        grads = torch.autograd.grad(loss, leaves)
    return [t.detach().cpu() for t in (loss, *grads)], sum(rows)


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo", "jsd"])
def test_tokens_without_a_label_cost_nothing(name: str) -> None:
    """As on the CPU, once the host was told how many there are; the numbers are the same."""
    ours, rows = loss_of_tokens(name, "npu")
    theirs, fewest = loss_of_tokens(name, "cpu")
    assert rows == fewest == (12 if name == "dpo" else 6)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_the_command_line(tmp_path: Path) -> None:
    code = (
        "from tests.npu_stand_in import plugin; from liger_kernel.cli.app import main;"
        "main(['selftest', '--op', 'rope', '--op', 'tvd', '--dtype', 'bfloat16']); main(['env'])"
    )
    told = python(code, {disabled.VARIABLE: str(tmp_path / "disabled")})
    assert "selftest on Ascend910B stand-in" in told
    assert "3 of 3 are right" in told, "rope by both, tvd by its reference"


def python(code: str, variables: dict[str, str]) -> str:
    """What a process prints that interprets no kernels, as on a machine with an NPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_rule_is_checked_when_the_file_is_loaded() -> None:
    import types

    from liger_kernel.ops.glu.contract import Kernels

    module = backends.kernels_of("glu", torch.empty(1, device="npu"))
    found = types.SimpleNamespace(**{**vars(module), "unserved": lambda gate, options: None})
    with pytest.raises(TypeError, match=r"unserved\(gate, options\) must take \(gate, up, options"):
        check_contract(found, Kernels, "my.glu")
    assert kernels_for("glu", None, *_unruled()) is not None


def _unruled() -> tuple[Tensor, None]:
    return torch.empty(2, 4), None
