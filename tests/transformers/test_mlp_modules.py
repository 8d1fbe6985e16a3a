"""The gated MLP modules against the HuggingFace classes they replace: parameters, outputs, all gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernel import backends
from liger_kernel.testing import Make, assert_no_worse
from liger_kernel.transformers import geglu, mlp, swiglu


class MixtralExpert(nn.Module):
    """Gone from HF since transformers 5."""

    def __init__(self, config: Any):
        super().__init__()
        sizes = {"w1": (24, 40), "w2": (40, 24), "w3": (24, 40)}
        for name, (n_in, n_out) in sizes.items():
            setattr(self, name, nn.Linear(n_in, n_out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def config(**fields: Any) -> SimpleNamespace:
    defaults = {"hidden_size": 24, "intermediate_size": 40, "hidden_act": "silu", "mlp_bias": False}
    return SimpleNamespace(**{**defaults, **fields})


TANH = "gelu_pytorch_tanh"
GEMMA = config(hidden_act=TANH, hidden_activation=TANH)
GEMMA4 = config(
    hidden_activation=TANH,
    use_double_wide_mlp=True,
    num_hidden_layers=6,
    num_kv_shared_layers=2,
    kv_sharing_modes=[None] * 4 + ["reuse"] * 2,  # since transformers 5.24
)
#: ours, the module and class of HF (or ours above), config, further arguments
ROWS = {
    "llama": (swiglu.LigerSwiGLUMLP, "llama.LlamaMLP", config(), {}),
    "llama-bias": (swiglu.LigerSwiGLUMLP, "llama.LlamaMLP", config(mlp_bias=True), {}),
    "qwen3-moe": (
        swiglu.LigerQwen3MoeSwiGLUMLP,
        "qwen3_moe.Qwen3MoeMLP",
        config(),
        {"intermediate_size": 56},
    ),
    "hunyuan": (
        swiglu.LigerHunyuanV1SwiGLUMLP,
        "hunyuan_v1_dense.HunYuanDenseV1MLP",
        config(),
        {"layer_idx": 1},
    ),
    "falcon-h1-bias": (
        swiglu.LigerFalconH1SwiGLUMLP,
        "falcon_h1.FalconH1MLP",
        config(mlp_multipliers=[0.7, 0.3], mlp_bias=True),
        {},
    ),
    "llama-one-op": (mlp.LigerMLP, "llama.LlamaMLP", config(), {}),
    "falcon-h1-one-op": (
        mlp.LigerFalconH1MLP,
        "falcon_h1.FalconH1MLP",
        config(mlp_multipliers=[0.7, 0.3]),
        {},
    ),
    "mixtral": (swiglu.LigerBlockSparseTop2MLP, MixtralExpert, config(), {}),
    "phi3": (swiglu.LigerPhi3SwiGLUMLP, "phi3.Phi3MLP", config(), {}),
    "gemma": (geglu.LigerGEGLUMLP, "gemma.GemmaMLP", GEMMA, {}),
    "gemma4": (geglu.LigerGEGLUMLPForGemma4, "gemma4.Gemma4TextMLP", GEMMA4, {"layer_idx": 3}),
    "gemma4-wide": (geglu.LigerGEGLUMLPForGemma4, "gemma4.Gemma4TextMLP", GEMMA4, {"layer_idx": 4}),
}


def hf_class(where: Any) -> Any:
    if not isinstance(where, str):
        return where
    pytest.importorskip("transformers")
    from tests.transformers import here

    return here.hf_class(where)


def run(module: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = module(x)
    wanted = {"x": x, **dict(module.named_parameters())}
    return {"y": y, **dict(zip(wanted, torch.autograd.grad(y, wanted.values(), dy), strict=True))}


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("row", ROWS)
def test_like_hf(row: str, implementation: str) -> None:
    ours_class, where, cfg, kwargs = ROWS[row]
    torch.manual_seed(0)
    low = hf_class(where)(cfg, **kwargs).to(torch.bfloat16)
    ours = ours_class(cfg, **kwargs).to(torch.bfloat16)
    ours.load_state_dict(low.state_dict(), strict=True)
    high = hf_class(where)(cfg, **kwargs).double()
    high.load_state_dict(low.state_dict())

    make = Make(torch.bfloat16)
    x, dy = make.randn(3, 5, 24), make.randn(3, 5, 24)
    with backends.use_implementation(implementation):
        found = run(ours, x, dy)
    expected, allowed = run(high, x.double(), dy.double()), run(low, x, dy)
    assert found.keys() == expected.keys()
    for name in found:
        assert_no_worse(f"{row} {name}", found[name], expected[name], allowed[name])


@pytest.mark.parametrize("ours", [swiglu.LigerSwiGLUMLP, geglu.LigerGEGLUMLP])
def test_forward_can_be_grafted(ours: Any) -> None:
    """On a foreign class `forward` finds nothing but the three projections."""

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (
                nn.Linear(8, 6),
                nn.Linear(8, 6),
                nn.Linear(6, 8),
            )

    torch.manual_seed(0)
    foreign, x = Foreign(), torch.randn(2, 8)
    act = F.silu if ours is swiglu.LigerSwiGLUMLP else lambda t: F.gelu(t, approximate="tanh")
    expected = foreign.down_proj(act(foreign.gate_proj(x)) * foreign.up_proj(x))
    assert torch.equal(ours.forward(foreign, x), expected)


@pytest.mark.parametrize(
    "ours",
    [
        swiglu.LigerSwiGLUMLP,
        swiglu.LigerBlockSparseTop2MLP,
        swiglu.LigerPhi3SwiGLUMLP,
        swiglu.LigerQwen3MoeSwiGLUMLP,
        swiglu.LigerHunyuanV1SwiGLUMLP,
        swiglu.LigerFalconH1SwiGLUMLP,
        mlp.LigerMLP,
        mlp.LigerFalconH1MLP,
    ],
)
def test_activation_is_checked(ours: Any) -> None:
    cfg = config(mlp_multipliers=[1, 1])
    cfg.hidden_act = "swish"
    ours(cfg)
    cfg.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r"'gelu' not supported.*'silu'"):
        ours(cfg)


def test_function_is_looked_up_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other packages replace the Function in the module; it is the object of `liger_kernel.ops`."""
    from liger_kernel import ops

    assert swiglu.LigerSiLUMulFunction is ops.LigerSiLUMulFunction
    assert geglu.LigerGELUMulFunction is ops.LigerGELUMulFunction
    module = swiglu.LigerSwiGLUMLP(config())
    monkeypatch.setattr(
        swiglu, "LigerSiLUMulFunction", SimpleNamespace(apply=lambda a, b: torch.zeros_like(a))
    )
    assert not module(torch.randn(2, 24)).any()


@pytest.mark.parametrize("ours", [mlp.LigerMLP, mlp.LigerFalconH1MLP])
def test_one_op_has_no_biases(ours: Any) -> None:
    with pytest.raises(ValueError, match=f"{ours.__name__} does not support bias.*LigerSwiGLUMLP"):
        ours(config(mlp_bias=True, mlp_multipliers=[1, 1]))


def test_no_biases_without_mlp_bias_in_the_config() -> None:
    cfg = SimpleNamespace(hidden_size=8, intermediate_size=12, hidden_act="silu")
    assert set(swiglu.LigerSwiGLUMLP(cfg).state_dict()) == {
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
    }
