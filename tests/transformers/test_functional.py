"""The functional API, and the legacy Functions and helpers of the gated activation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import liger_kernel.loss_head.fused_linear_cross_entropy as head
import liger_kernel.transformers.functional as F
from liger_kernel import backends, ops
from liger_kernel.ops.glu import glu, glu_packed
from liger_kernel.testing import Make, assert_no_worse


@pytest.fixture(params=["reference", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with backends.use_implementation(request.param):
        yield request.param


def with_gradient(function: Any, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x, *args, **kwargs)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def assert_like(function: Any, expected: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """`function` is no worse than `expected`, with its gradient of x."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    high_args, high_kwargs = [wide(a) for a in args], {k: wide(v) for k, v in kwargs.items()}
    ours = with_gradient(function, x, *args, **kwargs)
    high = with_gradient(expected, x.double(), *high_args, **high_kwargs)
    low = with_gradient(expected, x, *args, **kwargs)
    for name, a, b, c in zip(("value", "gradient"), ours, high, low, strict=True):
        assert_no_worse(name, a, b, c)


LOGITS, LABELS = Make(torch.float32).randn(9, 13), Make(torch.float32).labels(9, 13, ignored=0.3)
WEIGHT = Make(torch.float32, seed=1).randn(13).abs()
PROBABILITIES = LOGITS.softmax(-1).flip(0)


@pytest.mark.usefixtures("implementation")
class TestCrossEntropy:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"reduction": "sum"},
            {"reduction": "none", "ignore_index": 3},
            {"weight": WEIGHT},
            {"weight": WEIGHT, "label_smoothing": 0.1},
        ],
        ids=lambda options: "-".join(options) or "default",
    )
    def test_like_torch(self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(F, "_torch_cross_entropy", None)  # ours, not torch's
        labels = LABELS.clamp(min=options.get("ignore_index", -100))
        assert_like(
            F.liger_cross_entropy, torch_functional.cross_entropy, LOGITS, labels, **options
        )

    @pytest.mark.parametrize(
        ("input", "target", "options"),
        [
            pytest.param(LOGITS[:8].view(2, 13, 2, 2), LABELS[:8].view(2, 2, 2), {}, id="n-dim"),
            pytest.param(
                LOGITS[:8].view(2, 13, 4), LABELS[:8].view(2, 4), {"reduction": "none"}, id="3-dim"
            ),
            pytest.param(LOGITS, PROBABILITIES, {"label_smoothing": 0.1}, id="class-probabilities"),
            pytest.param(LOGITS[0], torch.tensor(4), {}, id="1-dim"),
            pytest.param(LOGITS, LABELS, {"size_average": False}, id="size_average"),
            pytest.param(LOGITS, LABELS, {"reduce": False}, id="reduce"),
            pytest.param(LOGITS.double(), LABELS, {}, id="float64"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:size_average and reduce")
    def test_torch_does_the_rest(self, input: Tensor, target: Tensor, options: Any) -> None:
        expected = with_gradient(torch_functional.cross_entropy, input, target, **options)
        found = with_gradient(F.liger_cross_entropy, input, target, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_installed_in_place_of_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_functional, "cross_entropy", F.liger_cross_entropy)
        loss = torch.nn.CrossEntropyLoss()(LOGITS, PROBABILITIES)
        assert torch.equal(loss, F._torch_cross_entropy(LOGITS, PROBABILITIES))

    @pytest.mark.parametrize(
        "extra",
        [
            {"softcap": 30.0},
            {"lse_square_scale": 1e-4},
            {"return_z_loss": True},
            {"return_token_accuracy": True},
        ],
        ids=lambda extra: next(iter(extra)),
    )
    def test_nothing_is_dropped_silently(self, extra: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=rf"{next(iter(extra))} needs .*\(2, 13, 4\)"):
            F.liger_cross_entropy(LOGITS[:8].view(2, 13, 4), LABELS[:8].view(2, 4), **extra)

    def test_output(self) -> None:
        flags = dict.fromkeys(
            ("return_z_loss", "return_token_accuracy", "return_predicted_tokens"), True
        )
        everything = F.liger_cross_entropy(LOGITS, LABELS, lse_square_scale=1e-2, **flags)
        assert isinstance(everything, F.CrossEntropyOutput)
        assert isinstance(F.liger_cross_entropy(LOGITS, LABELS), Tensor)
        kept = LABELS != -100
        expected = (1e-2 * LOGITS.double().logsumexp(-1).square())[kept].mean()
        low = (1e-2 * LOGITS.logsumexp(-1).square())[kept].mean()
        assert_no_worse("z_loss", everything.z_loss, expected, low)
        assert torch.equal(everything.predicted_tokens[kept], LOGITS.argmax(-1)[kept])
        only = F.liger_cross_entropy(LOGITS, LABELS, return_token_accuracy=True)
        assert only.z_loss is only.predicted_tokens is None
        assert torch.equal(only.token_accuracy, everything.token_accuracy)


@pytest.mark.usefixtures("implementation")
class TestFusedLinearCrossEntropy:
    hidden, head = Make(torch.float32).randn(9, 6), Make(torch.float32, seed=2).randn(13, 6)
    bias = Make(torch.float32, seed=3).randn(13)

    def composed(
        self, hidden: Tensor, head: Tensor, target: Tensor, bias: Any = None, ce_weight: Any = None
    ) -> Tensor:
        return torch_functional.cross_entropy(
            hidden @ head.T + (0 if bias is None else bias), target, ce_weight
        )

    @pytest.mark.parametrize(
        "args", [(), (bias,), (bias, WEIGHT)], ids=["plain", "bias", "ce_weight"]
    )
    def test_like_torch(self, args: tuple[Tensor, ...]) -> None:
        assert_like(
            F.liger_fused_linear_cross_entropy, self.composed, self.hidden, self.head, LABELS, *args
        )

    def test_output(self) -> None:
        args = (self.hidden, self.head, LABELS)
        plain = F.liger_fused_linear_cross_entropy(*args)
        full = F.liger_fused_linear_cross_entropy(
            *args, return_predicted_tokens=True, return_token_accuracy=True
        )
        assert isinstance(plain, Tensor)
        assert torch.equal(full.loss, plain)
        assert full.z_loss is None
        kept = LABELS != -100
        assert torch.equal(
            full.predicted_tokens[kept], (self.hidden @ self.head.T).argmax(-1)[kept]
        )


@pytest.mark.usefixtures("implementation")
class TestOtherOps:
    x, other = Make(torch.bfloat16).randn(5, 24), Make(torch.bfloat16, seed=1).randn(5, 24)
    weight, bias = Make(torch.bfloat16, seed=2).randn(24), Make(torch.bfloat16, seed=3).randn(24)

    def test_swiglu(self) -> None:
        assert_like(F.liger_swiglu, lambda a, b: torch_functional.silu(a) * b, self.x, self.other)

    def test_geglu(self) -> None:
        assert_like(
            F.liger_geglu,
            lambda a, b: torch_functional.gelu(a, approximate="tanh") * b,
            self.x,
            self.other,
        )

    def test_rms_norm(self) -> None:
        def expected(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            return torch_functional.rms_norm(x, (24,), weight, eps)

        assert_like(F.liger_rms_norm, expected, self.x, self.weight, 1e-5)

    def test_fused_add_rms_norm(self) -> None:
        for i in (0, 1):

            def expected(x: Tensor, r: Tensor, weight: Tensor, eps: float, i: int = i) -> Tensor:
                return (torch_functional.rms_norm(x + r, (24,), weight, eps), x + r)[i]

            def ours(*args: Any, i: int = i) -> Tensor:
                return F.liger_fused_add_rms_norm(*args)[i]

            assert_like(ours, expected, self.x, self.other, self.weight, 1e-5)

    def test_layer_norm(self) -> None:
        def expected(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            return torch_functional.layer_norm(x, (24,), weight, bias, eps)

        assert_like(F.liger_layer_norm, expected, self.x, self.weight, self.bias, 1e-5)

    def test_rope(self) -> None:
        make = Make(torch.bfloat16)
        q, k, angles = make.randn(2, 3, 4, 8), make.randn(2, 1, 4, 8), make.randn(1, 4, 4)
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))

        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            half = torch.cat([-x[..., 4:], x[..., :4]], -1)
            return x * cos.unsqueeze(1) + half * sin.unsqueeze(1)

        assert_like(lambda q, c, s: F.liger_rope(q, k, c, s, None, 1)[0], rotate, q, cos, sin)
        assert_like(lambda k, c, s: F.liger_rope(q, k, c, s)[1], rotate, k, cos, sin)


def test_ops_are_looked_up_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import liger_kernel.ops.cross_entropy as cross_entropy
    import liger_kernel.ops.glu as op

    monkeypatch.setattr(op, "glu", lambda *args: "glu")
    monkeypatch.setattr(
        cross_entropy, "cross_entropy", lambda *args, **kwargs: ("loss", None, None, None)
    )
    assert F.liger_swiglu(None, None) == F.liger_geglu(None, None) == "glu"
    assert F.liger_cross_entropy(LOGITS, LABELS) == "loss"


def test_accepts_what_torch_accepts() -> None:
    theirs = inspect.signature(torch_functional.cross_entropy).parameters
    ours = inspect.signature(F.liger_cross_entropy).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[name].default for name in theirs] == [p.default for p in theirs.values()]


class TestGluArguments:
    a = Make(torch.float32).randn(3, 8)

    @pytest.mark.parametrize(
        ("gate", "up", "options", "error", "match"),
        [
            (a, a[:, :4], {}, ValueError, r"\(3, 8\).*\(3, 4\)"),
            (a, a[:1], {}, ValueError, r"\(3, 8\).*\(1, 8\)"),
            (a, a.half(), {}, ValueError, "float32.*float16"),
            (a, a.to("meta"), {}, ValueError, "gate on cpu, up on meta"),
            (a[0, 0], a[0, 0], {}, ValueError, r"shape \(\.\.\., F\)"),
            (a, a, {"activation": "relu"}, ValueError, "'relu'.*'silu'"),
            (a.int(), a, {}, TypeError, "gate .*int32"),
        ],
    )
    def test_refused(self, gate: Tensor, up: Tensor, options: Any, error: Any, match: str) -> None:
        with pytest.raises(error, match=match):
            glu(gate, up, **options)

    def test_packed_refused(self) -> None:
        with pytest.raises(ValueError, match=r"even.*\(3, 7\)"):
            glu_packed(self.a[:, :7])
        with pytest.raises(ValueError, match="'relu'"):
            glu_packed(self.a, "relu")
        with pytest.raises(TypeError, match="int32"):
            glu_packed(self.a.int())


@pytest.mark.usefixtures("implementation")
class TestLegacyGlu:
    """The Functions and helpers of the incumbent; `glu` itself is compared with float64 in tests/ops."""

    gate, up, dy = (Make(torch.bfloat16, seed=s).randn(2, 3, 20) for s in range(3))

    def gradients(self, function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = function(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, self.dy))

    def test_functions(self) -> None:
        expected = self.gradients(lambda a, b: glu(a, b, "silu", 0.5, 2.0), self.gate, self.up)
        found = self.gradients(
            lambda a, b: ops.LigerSiLUMulFunction.apply(a, b, 0.5, 2.0), self.gate, self.up
        )
        assert all(map(torch.equal, found, expected))
        expected = self.gradients(lambda a, b: glu(a, b, "gelu_tanh"), self.gate, self.up)
        assert all(
            map(
                torch.equal,
                self.gradients(ops.LigerGELUMulFunction.apply, self.gate, self.up),
                expected,
            )
        )

    @pytest.mark.parametrize("in_place", [False, True])
    def test_packed_is_bit_equal_to_the_halves(self, in_place: bool) -> None:
        y, da, db = self.gradients(glu, self.gate, self.up)
        packed = torch.cat([self.gate, self.up], -1)
        found = self.gradients(
            lambda t: ops.LigerFusedGateUpSiLUMulFunction.apply(t, in_place), packed
        )
        assert torch.equal(found[0], y)
        assert torch.equal(found[1], torch.cat([da, db], -1))

    @pytest.mark.parametrize(
        ("forward", "backward", "activation", "more"),
        [
            (ops.swiglu_forward, ops.swiglu_backward, "silu", (0.5,)),
            (ops.geglu_forward, ops.geglu_backward, "gelu_tanh", ()),
        ],
        ids=["swiglu", "geglu"],
    )
    def test_helpers(
        self, forward: Any, backward: Any, activation: str, more: tuple[float, ...]
    ) -> None:
        expected = self.gradients(lambda a, b: glu(a, b, activation, *more), self.gate, self.up)
        gate, up = self.gate.clone().requires_grad_(), self.up.clone()
        a, b, c = forward(gate, up, *more)
        assert (a.shape, b.shape, c.requires_grad) == ((6, 20), (6, 20), False)
        da, db = backward(a, b, self.dy, *more)
        assert all(map(torch.equal, (c, da, db), expected))
        assert torch.equal(gate, self.gate)
        assert torch.equal(up, self.up)

    def test_packed_helpers(self) -> None:
        packed = torch.cat([self.gate, self.up], -1)
        expected = self.gradients(glu_packed, packed)
        rows, c = ops.swiglu_fused_gate_up_forward(packed)
        assert rows.shape == (6, 40)
        assert torch.equal(c, expected[0])
        dy = ops.swiglu_fused_gate_up_backward(rows, self.dy.view(6, 20), in_place=True)
        assert torch.equal(dy, expected[1].view(6, 40))
        assert torch.equal(packed, torch.cat([self.gate, self.up], -1))


def test_compiles_without_a_graph_break() -> None:
    def step(gate: Tensor, up: Tensor) -> Tensor:
        return glu(gate, up, "gelu_tanh", 0.5) + glu_packed(torch.cat([gate, up], -1))

    gate, up = Make(torch.float32).randn(2, 3, 8), Make(torch.float32, seed=1).randn(2, 3, 8)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with backends.use_implementation("reference"):
        assert torch.equal(compiled(gate, up), step(gate, up))


class TestDTensor:
    """Rank 0 of a pretended world of two: what must be local is computed from the local shard alone."""

    @pytest.fixture(autouse=True)
    def mesh(self) -> Iterator[Any]:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        self.mesh = DeviceMesh("cpu", [0, 1])
        yield
        torch.distributed.destroy_process_group()

    def dtensor(self, local: Tensor, placement: Any) -> Any:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(local, self.mesh, [placement], run_check=False)

    @pytest.mark.parametrize("dim", [0, 1, 2, -1])
    def test_shards_stay_where_they_are(self, dim: int) -> None:
        from torch.distributed.tensor import Shard

        gate, up, dy = (Make(torch.float32, seed=s).randn(2, 3, 8) for s in range(3))
        leaves = [t.clone().requires_grad_() for t in (gate, up)]
        y = glu(*(self.dtensor(t, Shard(dim)) for t in leaves))
        y.backward(self.dtensor(dy, Shard(dim)))
        plain = [t.clone().requires_grad_() for t in (gate, up)]
        expected = glu(*plain)
        expected.backward(dy)
        assert y.placements == (Shard(dim % 3),)
        assert y.shape == torch.Size(n * 2 if i == dim % 3 else n for i, n in enumerate(gate.shape))
        assert torch.equal(y.to_local(), expected)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, plain, strict=True))

    def test_uneven_shards_keep_the_global_shape(self) -> None:
        from torch.distributed.tensor import DTensor, Shard

        local = torch.randn(3, 4)
        gate = DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=(5, 4), stride=(4, 1)
        )
        y = glu(gate, gate)
        assert y.shape == (5, 4)
        assert torch.equal(y.to_local(), glu(local, local))

    def test_partial_is_made_whole_first(self) -> None:
        from torch.distributed.tensor import Partial, Replicate

        partial = self.dtensor(torch.randn(3, 4), Partial())
        assert glu(partial, partial).placements == (Replicate(),)

    def test_plain_tensor_beside_a_dtensor(self) -> None:
        from torch.distributed.tensor import Shard

        gate, up = torch.randn(2, 4), torch.randn(4, 4, requires_grad=True)
        y = glu(self.dtensor(gate, Shard(0)), up)
        assert torch.equal(y.to_local(), glu(gate, up[:2]))
        y.to_local().sum().backward()
        assert up.grad.shape == (4, 4)

    def test_packed(self) -> None:
        from torch.distributed.tensor import Replicate, Shard

        packed = torch.randn(3, 8)
        y = glu_packed(self.dtensor(packed, Shard(0)))
        assert (y.placements, y.shape) == ((Shard(0),), (6, 4))
        assert torch.equal(y.to_local(), glu_packed(packed))
        whole = glu_packed(self.dtensor(packed, Shard(1)))  # halves do not lie on one rank
        assert (whole.placements, whole.shape) == ((Replicate(),), (3, 8))


def test_chunk_mem_const_is_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 16), torch.randn(48, 16)
    target = torch.randint(48, (64,))
    seen: list[Any] = []
    original = head.fused_linear_cross_entropy

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["memory_budget"])
        return original(*args, **kwargs)

    monkeypatch.setattr(head, "fused_linear_cross_entropy", spy)
    losses = [
        F.liger_fused_linear_cross_entropy(x, weight, target, chunk_mem_const=c) for c in (1, 2)
    ]
    F.liger_fused_linear_cross_entropy(x, weight, target, chunk_mem_const=2, memory_budget=5000)
    assert seen == [None, 2 * x.numel() * 4, 5000]
    assert_no_worse("loss", losses[1], losses[0].double(), losses[0])
    with pytest.raises(ValueError, match="chunk_mem_const must be a positive integer, got True"):
        F.liger_fused_linear_cross_entropy(x, weight, target, chunk_mem_const=True)
