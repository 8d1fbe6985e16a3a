"""What `patch` finds by structure, module by module: forms of norms, MLPs, experts and rotary functions.

Whole models of every type are the zoo's business (`test_zoo.py`).
"""

from __future__ import annotations

import collections
import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig

import liger_kernel
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers.patching import Row
from liger_kernel.transformers.patching.plans import marker
from liger_kernel.transformers.patching.sites import rope
from tests.transformers.here import hf_class
from tests.transformers.steps import assert_all_no_worse
from tests.transformers.tiny import build, mixture

SIZE = 64
Calls = collections.Counter[str]


def hf(file: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Something of a modeling file, called; not every release has every file."""
    made: Any = hf_class(f"{file}.{name}")
    if file == "bamba" and "group_size" in inspect.signature(made).parameters:  # transformers 5.24
        kwargs["group_size"] = SIZE
    return made(*args, **kwargs)


def patched(module: nn.Module) -> tuple[Any, list[Row]]:
    """A copy of the module inside of a patched model, and what the report says of it."""
    model = nn.Sequential(copy.deepcopy(module))
    return model[0], [row for row in liger_kernel.patch(model).rows if row.kind != "loss"]


def drawn(module: nn.Module) -> nn.Module:
    make = Make(torch.float32)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(make.randn(*p.shape, scale=0.4) + (p.ndim == 1))
    return module


def run(module: nn.Module, *inputs: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """Output and all gradients under a fixed cotangent."""
    leaves = [t.clone().requires_grad_() for t in (*inputs, *more.values())]
    given = dict(zip(more, leaves[len(inputs) :], strict=True))
    y = module(*leaves[: len(inputs)], **given)
    wanted = {str(i): t for i, t in enumerate(leaves)} | dict(module.named_parameters())
    grads = torch.autograd.grad(y, wanted.values(), Make(torch.float64).randn(*y.shape).to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_same_module(
    ours: nn.Module, theirs: nn.Module, dtype: torch.dtype, *inputs: Tensor, **more: Tensor
) -> None:
    """Output and gradients against the module in float64 on the same, already rounded numbers."""
    low = copy.deepcopy(theirs).to(dtype)
    inputs = tuple(t.to(dtype) for t in inputs)
    more = {name: t.to(dtype) for name, t in more.items()}
    doubles = {name: t.double() for name, t in more.items()}
    high = run(copy.deepcopy(low).double(), *(t.double() for t in inputs), **doubles)
    assert_all_no_worse(run(ours.to(dtype), *inputs, **more), high, run(low, *inputs, **more))


# -- norms -------------------------------------------------------------------------------------------------------------

X, GATE = (Make(torch.float32, seed=s).randn(3, 5, SIZE, scale=2) for s in range(2))

GATED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bamba": (("BambaRMSNormGated", SIZE), "LigerRMSNorm(llama, of x * silu(gate))"),
    "zamba2": (
        ("Zamba2RMSNormGated", SIZE, 16),
        "LigerRMSNorm(gemma, in groups, of x * silu(gate))",
    ),
    "qwen3_next": (("Qwen3NextRMSNormGated", SIZE), "LigerRMSNorm(llama, then * silu(gate))"),
    "kimi_linear": (("KimiLinearRMSNormGated", SIZE), "LigerRMSNorm(gemma, then * sigmoid(gate))"),
}


class TestGatedNorms:
    @pytest.fixture(params=sorted(GATED))
    def norm(self, request: pytest.FixtureRequest) -> nn.Module:
        return drawn(hf(request.param, *GATED[request.param][0]))

    @pytest.mark.parametrize("name", sorted(GATED))
    def test_are_told_apart(self, name: str) -> None:
        made, expected = GATED[name]
        _, rows = patched(hf(name, *made))
        assert [row.by for row in rows] == [expected]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_gate_by_position_and_by_name(
        self, norm: nn.Module, dtype: torch.dtype, calls: Calls
    ) -> None:
        ours, _ = patched(norm)
        calls.clear()
        assert_same_module(ours, norm, dtype, X, GATE)
        assert calls["rms_norm"] == 1
        assert_same_module(ours, norm, dtype, X, gate=GATE)
        assert calls["rms_norm"] == 2

    def test_fp32_activations_with_16_bit_weights(self, norm: nn.Module, calls: Calls) -> None:
        """As in Mamba-2 without its own kernels, in bf16."""
        norm = norm.bfloat16()
        ours, _ = patched(norm)
        calls.clear()
        found, expected = (run(m, X, GATE.bfloat16()) for m in (ours, norm))
        assert calls["rms_norm"] == 1
        truth = run(copy.deepcopy(norm).double(), X.double(), GATE.bfloat16().double())
        assert_all_no_worse(found, truth, expected)

    def test_unproven_forms_are_the_modules_own(self, norm: nn.Module, calls: Calls) -> None:
        ours, _ = patched(norm)
        calls.clear()
        row = GATE[:, :1]
        assert torch.equal(ours(X, row), norm(X, row))  # a gate of another shape
        with pytest.raises(TypeError):
            ours(X, GATE, GATE)
        with pytest.raises(TypeError, match="no_such"):
            ours(X, no_such=GATE)
        assert not calls

    def test_without_a_gate(self, calls: Calls) -> None:
        norm = drawn(hf("bamba", "BambaRMSNormGated", SIZE)).bfloat16()
        ours, _ = patched(norm)
        calls.clear()
        assert_same_module(ours, norm, torch.bfloat16, X)
        assert torch.equal(ours(X.bfloat16(), None), ours(X.bfloat16(), gate=None))
        assert calls["rms_norm"] == 3
        needs, _ = patched(hf("qwen3_next", "Qwen3NextRMSNormGated", SIZE))
        # before transformers 5 it fails inside
        with pytest.raises((TypeError, AttributeError), match=r"gate|NoneType"):
            needs(X)


class UnscaledNorm(nn.Module):
    """Not weightless: its scale is a buffer that starts with ones, and it counts its calls."""

    def __init__(self, scaled: bool = True) -> None:
        super().__init__()
        self.eps, self.scaled = 1e-6, scaled
        self.register_buffer("scale", torch.ones(SIZE))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return y * self.scale.to(x.dtype) if self.scaled else y


class DropsADimension(nn.Module):
    """Of size 1, the second of three."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(SIZE)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return y.squeeze(1)


class TestOtherNorms:
    @pytest.mark.parametrize(
        ("norm", "expected"),
        [
            (("nemotron", "NemotronLayerNorm1P", SIZE), "LigerLayerNorm(offset=1)"),
            (("olmo", "OlmoLayerNorm", SIZE), "LigerLayerNorm"),
            (("falcon_mamba", "FalconMambaWeightlessRMSNorm", SIZE), "LigerRMSNorm(llama)"),
            (("deepseek_v4", "DeepseekV4UnweightedRMSNorm"), "LigerRMSNorm(llama)"),
            (
                ("qwen4_exp", "Qwen4ExpTextRMSNorm", SIZE, 16),
                "LigerRMSNorm(gemma, offset=1, in groups)",
            ),
        ],
        ids=lambda row: row[0] if isinstance(row, tuple) else "",
    )
    def test_replaced(self, norm: tuple[Any, ...], expected: str, calls: Calls) -> None:
        theirs = drawn(hf(*norm))
        ours, rows = patched(theirs)
        assert [row.by for row in rows] == [expected]
        calls.clear()
        assert_same_module(ours, theirs, torch.bfloat16, X)
        assert calls["rms_norm"] + calls["layer_norm"] == 1

    @pytest.mark.parametrize(
        "make",
        [
            lambda: hf("hy_v4", "HYV4UnweightedRMSNorm"),  # the inverse alone
            lambda: hf("sam", "SamLayerNorm", SIZE, data_format="channels_first"),
            DropsADimension,  # as Falcon-H1's gated norm did before transformers 5.24
            lambda: nn.GroupNorm(4, SIZE),
            lambda: nn.BatchNorm1d(SIZE),
            UnscaledNorm,
        ],
        ids=["inverse", "channels first", "dropped dimension", "groups", "batch", "scaled"],
    )
    def test_left_alone_and_named(self, make: Callable[[], nn.Module]) -> None:
        norm = make()
        _, rows = patched(norm)
        assert [(row.kind, row.by) for row in rows] == [("norm", None)]
        assert type(norm).__name__ in rows[0].reason

    def test_the_proof_leaves_the_real_buffers_alone(self) -> None:
        norm, rows = patched(UnscaledNorm(scaled=False))
        assert [row.by for row in rows] == [None]  # it counts its calls, which ours would not
        assert "scale, seen" in rows[0].reason
        assert norm.seen == 0

    def test_weights_wider_than_the_activations(self, calls: Calls) -> None:
        """Only where the proof covers it: here Llama's convention would return float32."""
        llama = drawn(hf("llama", "LlamaRMSNorm", SIZE))
        gemma = drawn(hf("gemma", "GemmaRMSNorm", SIZE))
        for norm, dtype in ((llama, torch.float32), (gemma, torch.bfloat16)):
            ours, _ = patched(norm)
            assert ours(X.bfloat16()).dtype == norm(X.bfloat16()).dtype == dtype
        other_16_bit = drawn(hf("gemma", "GemmaRMSNorm", SIZE)).half()
        ours, _ = patched(other_16_bit)
        calls.clear()
        assert torch.equal(ours(X.bfloat16()), other_16_bit(X.bfloat16()))
        assert not calls


# -- MLPs --------------------------------------------------------------------------------------------------------------


class Squared(nn.Module):
    """The function under another name."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square() * self.factor


#: file, class, arguments after the config, what stands in the report
LIMITED = [
    ("deepseek_v4", "DeepseekV4MLP", (), "LigerSwiGLU(limit=10)"),
    ("step3p7", "Step3p7MLP", (0,), "LigerSwiGLU(limit after silu, limit=10)"),
    (
        "minimax_m3_vl",
        "MiniMaxM3VLDenseMLP",
        (),
        "LigerSwiGLU(up + 1, limit=10, alpha=1.702, fused gate_up)",
    ),
]
LIMITED_CONFIG = SimpleNamespace(
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=48,
    dense_intermediate_size=48,
    num_local_experts=2,
    hidden_act="silu",
    mlp_bias=False,
    swiglu_limit=10.0,
    swiglu_limits_shared=[10.0],
    swiglu_alpha=1.702,
)


class TestMLPs:
    def test_relu_squared(self, calls: Calls) -> None:
        config = AutoConfig.for_model("arcee", hidden_size=32, intermediate_size=48)
        mlp = drawn(hf("arcee", "ArceeMLP", config))
        ours, rows = patched(mlp)
        assert [(row.path, row.by) for row in rows] == [("0.act_fn", "LigerReLUSquared")]
        calls.clear()
        assert_same_module(ours, mlp, torch.bfloat16, X[..., :32])
        assert calls["relu_squared"] == 1
        assert "LigerReLUSquared[ReLUSquaredActivation]" in str(ours)

    @pytest.mark.parametrize("factor", [1.0, 1.001])
    def test_relu_squared_is_known_by_its_numbers(self, factor: float) -> None:
        _, rows = patched(nn.ModuleDict({"act": Squared(factor), "pool": Squared()}))
        assert [row.path for row in rows] == ["0.act"][: factor == 1]

    @pytest.mark.parametrize("bias", [False, True])
    def test_multipliers(self, bias: bool, calls: Calls) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 48}
        config = AutoConfig.for_model(
            "falcon_h1", **sizes, mlp_multipliers=[0.7, 0.3], mlp_bias=bias
        )
        mlp = drawn(hf("falcon_h1", "FalconH1MLP", config))
        ours, rows = patched(mlp)
        assert [row.by for row in rows] == ["LigerSwiGLU"]
        calls.clear()
        assert_same_module(ours, mlp, torch.bfloat16, X[..., :32])
        assert calls["glu"] == 1
        ours.gate_multiplier = mlp.gate_multiplier = 1.9  # read at every call
        assert_same_module(ours, mlp, torch.bfloat16, X[..., :32])

    @pytest.mark.parametrize(("file", "name", "arguments", "expected"), LIMITED)
    def test_limits(
        self, file: str, name: str, arguments: tuple[Any, ...], expected: str, calls: Calls
    ) -> None:
        """A limit that small numbers do not reach, as DeepSeek-V4's 10, is no less of one."""
        mlp = drawn(hf(file, name, LIMITED_CONFIG, *arguments))
        ours, rows = patched(mlp)
        assert [row.by for row in rows] == [expected]
        calls.clear()
        assert_same_module(ours, mlp, torch.bfloat16, 20 * X[..., :32])
        assert calls["glu"] == 1

    def test_a_limit_that_no_attribute_holds(self) -> None:
        class Literal(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate, self.up, self.down = nn.Linear(8, 9), nn.Linear(8, 9), nn.Linear(9, 8)
                self.act = F.silu

            def forward(self, x: Tensor) -> Tensor:
                return self.down(self.act(self.gate(x).clamp(max=300)) * self.up(x))

        _, (row,) = patched(Literal())
        assert (row.by, row.reason) == (None, "Literal computes something else")


# -- rotary embeddings, and what all kinds share -----------------------------------------------------------------------


def test_the_last_columns_are_rotated() -> None:
    original = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4"
    ).apply_rotary_pos_emb
    ours = rope.replacement(original)
    assert ours is not None
    assert {form.narrow for form in rope.prove(original)} == {"last"}
    make = Make(torch.bfloat16)
    heads, angles = make.randn(2, 3, 5, 24), make.randn(2, 5, 4).float()
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    y = ours(heads, cos, sin)
    high = original(heads.double(), cos.double(), sin.double())
    assert_no_worse("y", y, high, original(heads, cos, sin))
    assert torch.equal(y[..., :16], heads[..., :16])


@pytest.mark.parametrize(
    ("family", "name", "angles", "heads"),
    [
        ("llama4", "apply_rotary_emb", (2, 5, 4), 2),
        ("llama4", "vision_apply_rotary_emb", (5, 1, 4), 2),
        ("deepseek_v2", "apply_rotary_emb", (2, 5, 4), 1),
    ],
)
def test_complex_angles(
    family: str, name: str, angles: tuple[int, ...], heads: int, calls: dict[str, int]
) -> None:
    """By position and by name; where a cast made them real, HF's own code multiplies."""
    path = f"transformers.models.{family}.modeling_{family}"
    original = getattr(pytest.importorskip(path), name)
    ours = rope.replacement(original)
    assert ours is not None
    calls.clear()
    make = Make(torch.bfloat16)
    q, k = (make.randn(2, 5, n, 8) for n in (3, 1))
    q, k = (q, k) if heads == 2 else (q.transpose(1, 2), k.transpose(1, 2))
    freqs = torch.view_as_complex(make.randn(*angles, 2).float())
    last = list(inspect.signature(original).parameters)[-1]
    for found in (ours(q, k, freqs), ours(q, k, **{last: freqs})):
        high = original(q.double(), k.double(), freqs)
        for part, y, h, low in zip("qk", found, high, original(q, k, freqs), strict=True):
            assert_no_worse(part, y, h, low)
    assert calls["rope"] == 2
    assert torch.equal(ours(q, k, freqs.real)[0], original(q, k, freqs.real)[0])
    assert calls["rope"] == 2


def test_three_positions(calls: dict[str, int]) -> None:
    """As Qwen2-VL's attention selected them until transformers 5; sections of another size are its own."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb

    def original(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, section: list[int], unsqueeze_dim: int = 1
    ) -> Any:
        rows = [row for row, n in enumerate(section) for _ in range(n)] * 2
        tables = (torch.stack([t[r, ..., i] for i, r in enumerate(rows)], -1) for t in (cos, sin))
        return llama(q, k, *tables, unsqueeze_dim=unsqueeze_dim)

    ours = rope.replacement(original)
    assert ours is not None
    calls.clear()
    make = Make(torch.float32)
    q, k, angles = (
        make.randn(2, 5, 3, 8),
        make.randn(2, 5, 1, 8),
        make.randn(3, 2, 5, 4).repeat(1, 1, 1, 2),
    )
    cos, sin = angles.cos(), angles.sin()
    for y, theirs in zip(
        ours(q, k, cos, sin, [2, 1, 1], unsqueeze_dim=2),
        original(q, k, cos, sin, [2, 1, 1], 2),
        strict=True,
    ):
        assert_no_worse("y", y, theirs.double(), theirs)
    assert calls["rope"] == 1
    with pytest.raises(RuntimeError):
        ours(q, k, cos, sin, [1, 1, 1], unsqueeze_dim=2)


def test_an_inner_patch_is_reported_by_the_outer_one() -> None:
    for build_one in (mixture, lambda: build("llama")):
        model = build_one()
        inner = liger_kernel.patch(model.model)
        outer = liger_kernel.patch(model)
        told = {(row.kind, f"model.{row.path}", row.by) for row in inner.replaced}
        assert told <= {(row.kind, row.path, row.by) for row in outer.replaced}
        assert not outer.skipped
        assert marker("rope") in vars(model.model.layers[0].self_attn)
        liger_kernel.unpatch(model)
        liger_kernel.unpatch(model.model)
        assert not [n for m in model.modules() for n in vars(m) if n.startswith("_liger")]
