"""`register_kernels()`: our layers where transformers' `use_kernels=True` asks for one.

What `kernels` does to a module is bind the forward of a class to it; so much is tested without that package, too.
`make` installs it apart, in `.venv/kernels`, and all of this runs once more with it, in a process of its own.
"""

from __future__ import annotations

import collections
import copy
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import transformers.utils
from torch import nn
from transformers.integrations import hub_kernels

from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers import hub, register_kernels
from liger_kernel.transformers.patching.sites import norms
from tests.transformers.here import hf_class
from tests.transformers.steps import assert_all_no_worse, assert_same_step, step, steps, unrounded
from tests.transformers.tiny import batch, build

HERE = importlib.util.find_spec("kernels") is not None
APART = Path(sys.prefix) / "kernels"
needs_kernels = pytest.mark.skipif(
    not (HERE and transformers.utils.is_kernels_available()), reason="no kernels that HF works with"
)
#: of norms: Llama's rounding, that of Gemma, and the one that is centered at 0
NORMS = ("llama", "olmo2", "gemma")


def bind(model: nn.Module) -> nn.Module:
    """What `kernels` does for the name "RMSNorm"."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(hub.RMSNorm.forward, module)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", NORMS)
def test_one_layer_serves_every_norm(
    model_type: str, dtype: torch.dtype, calls: collections.Counter[str]
) -> None:
    model = bind(build(model_type, dtype)).train()
    model(**batch())
    calls.clear()
    model(**batch())
    assert calls["rms_norm"] == sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    assert_same_step(model_type, dtype, model)


def test_an_unproven_norm_keeps_its_own_forward(calls: collections.Counter[str]) -> None:
    model = build("llama")

    class Odd(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.001

    model.model.norm.__class__ = Odd
    x = torch.randn(3, 48)
    expected = model.model.norm(x)
    assert torch.equal(bind(model).model.norm(x), expected)
    calls.clear()
    model.model.norm(x)
    assert not calls


@pytest.mark.parametrize(
    "where", ["qwen3_next.Qwen3NextRMSNormGated", "kimi_linear.KimiLinearRMSNormGated"]
)
def test_gated(where: str, calls: collections.Counter[str]) -> None:
    """A gate by silu and one by sigmoid; the gate is passed by position or by name."""
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 5, 16, generator=generator)
    stock, bound = (hf_class(where)(16) for _ in range(2))
    bound.forward = MethodType(hub.RMSNormGated.forward, bound)
    high = copy.deepcopy(stock).double()
    with unrounded(high):
        high = high(x.double(), gate.double())
    bound(x, gate)
    calls.clear()
    for found in (bound(x, gate), bound(x, gate=gate)):
        assert_no_worse(where, found, high, stock(x, gate))
    assert calls["rms_norm"] == 2


def test_rotary(calls: collections.Counter[str]) -> None:
    """`kernels` turns a function into a module; its forward is found in the class."""
    from transformers.models.llama import modeling_llama

    function = modeling_llama.apply_rotary_pos_emb

    class Func(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    class Odd(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return function(q * 1.001, k, *args, **kwargs)

    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(2, 5, 8, generator=generator).repeat(1, 1, 2)
    for unsqueeze_dim, shape in ((1, (2, 3, 5, 16)), (2, (2, 5, 3, 16))):
        q, k = (torch.randn(shape, generator=generator) for _ in range(2))
        for cls, ours in ((Func, 1), (Odd, 0)):
            module = cls()
            module.forward = MethodType(hub.RotaryEmbedding.forward, module)
            tensors = (q, k, angles.cos(), angles.sin())
            module(*tensors, unsqueeze_dim=unsqueeze_dim)
            calls.clear()
            found = module(*tensors, unsqueeze_dim=unsqueeze_dim)
            assert calls["rope"] == ours
            high = cls()(*(t.double() for t in tensors), unsqueeze_dim=unsqueeze_dim)
            low = cls()(*tensors, unsqueeze_dim=unsqueeze_dim)
            for name, *values in zip("qk", found, high, low, strict=True):
                assert_no_worse(name, *values)


def rows(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of a module, and every gradient."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    with unrounded(module):
        outputs = module(x)
        sum(o.double().square().sum() for o in outputs if o.is_floating_point()).backward()
    return [*outputs, *(p.grad for p in (x, *module.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("where", "changes", "ours"),
    [
        ("qwen3_5_moe.Qwen3_5MoeTopKRouter", {}, 1),
        ("laguna.LagunaTopKRouter", {}, 1),
        ("laguna.LagunaTopKRouter", {"router_logit_softcapping": 2.0}, 1),
        ("mixtral.MixtralTopKRouter", {}, 0),  # its weights are not rounded
        ("gpt_oss.GptOssTopKRouter", {}, 0),  # its softmax is of the chosen ones alone
    ],
)
def test_routers(
    where: str,
    changes: dict[str, Any],
    ours: int,
    dtype: torch.dtype,
    calls: collections.Counter[str],
) -> None:
    """One name for two kinds of scores, of which each is proven; what is neither keeps its own forward."""
    config = SimpleNamespace(
        hidden_size=40, num_experts_per_tok=3, moe_router_logit_softcapping=0.0
    )
    config.num_experts = config.num_local_experts = 13
    stock = hf_class(where)(config)
    vars(stock).update(changes)
    generator = torch.Generator().manual_seed(0)
    for p in stock.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(dtype) / 3
    x = torch.randn(2, 7, 40, generator=generator).to(dtype)
    bound, wide = copy.deepcopy(stock), copy.deepcopy(stock).double()
    bound.forward = MethodType(hub.TopKRouter.forward, bound)
    bound(x)
    calls.clear()
    found = rows(bound, x)
    assert calls["moe_router"] == ours
    for i, (a, high, low) in enumerate(
        zip(found, rows(wide, x.double()), rows(stock, x), strict=True)
    ):
        assert a.dtype == low.dtype
        if a.is_floating_point():
            assert_no_worse(f"{where} {i}", a, high, low)
        else:
            assert torch.equal(a, low)


def test_experts_of_a_mixture(calls: collections.Counter[str]) -> None:
    """Its own router, and experts by our op; hooks on these are called, and nothing stays in them."""
    pytest.importorskip("transformers.integrations.moe")  # before, experts took other arguments
    stock = partial(build, experts_implementation="eager")  # others take no float64
    model = stock("gpt_oss").train()
    mixtures = [m for m in model.modules() if type(m) is hf_class("gpt_oss.GptOssMLP")]
    seen = []
    for mixture in mixtures:
        mixture.forward = MethodType(hub.MoEMLP.forward, mixture)
        mixture.experts.register_forward_hook(lambda *_: seen.append(1))
    model(**batch())
    calls.clear()
    model(**batch())
    assert calls["fused_moe"] == len(mixtures) == len(seen) // 2
    assert all("forward" not in vars(mixture.experts) for mixture in mixtures)
    assert_same_step("gpt_oss", torch.float32, model, stock)
    first = mixtures[0].experts
    vars(first)["forward"] = MethodType(type(first).forward, first)  # somebody else's
    calls.clear()
    model(**batch())
    assert calls["fused_moe"] == len(mixtures) - 1


@pytest.mark.parametrize(
    "layer", dict.fromkeys(hub.LAYERS.values()), ids=lambda layer: layer.__name__
)
def test_layers_are_what_kernels_takes(layer: type[nn.Module]) -> None:
    """Its rules: a module without a constructor and without members, but for what says what it can do."""
    assert layer.__init__ is nn.Module.__init__
    members = {name for name, _ in inspect.getmembers(layer)}
    members -= {name for name, _ in inspect.getmembers(nn.Module)}
    assert members <= {"can_torch_compile", "has_backward"}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our layers for the CPU, in a mapping of transformers without what it downloads; all of it gone afterwards."""
    import kernels

    monkeypatch.setattr(hub_kernels, "_KERNEL_MAPPING_CACHE", {})
    with kernels.use_kernel_mapping({}, inherit_mapping=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "\nNo kernel mapping found")
        register_kernels("cpu")
        yield
    for model_type in NORMS:  # all models of a file share its rotary function
        modeling = importlib.import_module(
            f"transformers.models.{model_type}.modeling_{model_type}"
        )
        modeling.apply_rotary_pos_emb.__dict__.pop("forward", None)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_use_kernels(
    model_type: str, dtype: torch.dtype, registered: None, calls: collections.Counter[str]
) -> None:
    high, low = (
        steps(build(model_type, dtype).double(), dtype),
        steps(build(model_type, dtype), dtype),
    )
    assert not calls
    model = build(model_type, dtype).train()
    model.set_use_kernels(True)
    count = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    for training in (True, False, True):  # at every switch HF binds again
        model.train(training)(**batch())
        calls.clear()
        model(**batch())
        assert calls == {"rms_norm": count, "rope": model.config.num_hidden_layers}
    assert_all_no_worse(steps(model, dtype), high, low)


@needs_kernels
def test_compiles_to_one_graph(one_graph: None, registered: None) -> None:
    high, low = (step(build("llama", d), **batch())[1] for d in (torch.float64, torch.float32))
    model = build("llama").train()
    model.set_use_kernels(True)
    norms.find_plan.cache_clear()  # nothing is proven while a graph is traced
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = step(compiled, **batch(), use_cache=False)[1]
    assert_all_no_worse({n.removeprefix("_orig_mod."): g for n, g in ours.items()}, high, low)


@needs_kernels
def test_by_default_where_our_kernels_run(registered: None) -> None:
    register_kernels()
    mapping = hub._mapping()
    assert mapping.keys() == hub.LAYERS.keys()
    for devices in mapping.values():
        assert devices.keys() == {"cpu", *hub.DEVICES}
    assert {"cuda", "rocm"} <= hub_kernels._build_kernel_mapping()["RMSNorm"].keys() & set(
        hub.DEVICES
    )


@needs_kernels
def test_hf_asks_for_every_name() -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3_5 import modeling_qwen3_5
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

    asking = (
        modeling_llama.LlamaRMSNorm,
        modeling_qwen3_5.Qwen3_5RMSNormGated,
        modeling_qwen3_5.Qwen3_5RMSNorm,
        type(modeling_llama.apply_rotary_pos_emb),
        modeling_qwen3_5_moe.Qwen3_5MoeTopKRouter,
        modeling_gpt_oss.GptOssMLP,
    )
    assert [cls.kernel_layer_name for cls in asking] == list(hub.LAYERS)


#: what HF attaches, and no op of ours computes
NOT_OURS = {
    "MultiScaleDeformableAttention": "attention",
    "Qwen3_5GatedDeltaNet": "linear attention",
    "EsmFold2TriangleMultiplication": "of one model",
    "Llama4TextMoe": "of one model, in transformers 4",
    **dict.fromkeys(
        ("SiLU", "GeLU", "NewGELU", "GeluTanh", "QuickGELU", "FastGELU"),
        "an activation alone; with its product it is `liger_kernel.patch`'s",
    ),
    **dict.fromkeys(
        ("causal_conv1d_fn", "causal_conv1d_update"),
        "a convolution without gates; with two of them it is `liger_kernel.patch`'s",
    ),
    **dict.fromkeys(
        (
            "chunk_gated_delta_rule",
            "fused_recurrent_gated_delta_rule",
            "chunk_kda",
            "fused_recurrent_kda",
        ),
        "linear attention",
    ),
    **dict.fromkeys(
        (
            "mamba_split_conv1d_scan_combined",
            "mamba_chunk_scan_combined",
            "mamba_inner_fn",
            "selective_scan_fn",
            "selective_state_update",
        ),
        "a state space",
    ),
}


def test_every_name_that_hf_attaches_is_served_or_known_to_be_not_ours() -> None:
    attached = set()
    for file in Path(transformers.__file__).parent.rglob("*.py"):
        if "_from_hub" in (text := file.read_text(encoding="utf-8")):
            attached |= set(
                re.findall(r'^@use_kernel_\w+_from_hub\w*\("(\w+)"', text, re.MULTILINE)
            )
    assert "RMSNorm" in attached  # and the others in newer releases
    assert attached <= {*hub.LAYERS, *NOT_OURS}
    assert not {*hub.LAYERS} & {*NOT_OURS}


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="pip install kernels"):
        register_kernels()


@needs_kernels
@pytest.mark.parametrize(
    ("module", "name", "value", "said"),
    [
        (
            transformers.utils,
            "is_kernels_available",
            bool,
            "does not work with kernels .*kernels>=",
        ),
        (hub_kernels, "_kernels_enabled", False, "USE_HUB_KERNELS"),
        (hub_kernels, "get_kernel_mapping_transformers", None, "update to 5.17 or later"),
    ],
)
def test_with_the_wrong_versions(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any, said: str
) -> None:
    monkeypatch.setattr(module, name, value)
    if value is None:
        monkeypatch.delattr(module, name)
    with pytest.raises(RuntimeError, match=said):
        register_kernels()


@pytest.mark.skipif(HERE or not APART.exists(), reason="kernels is here, or nowhere")
def test_with_kernels_installed() -> None:
    path = os.pathsep.join([str(APART), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed, 1 skipped", done.stdout), done.stdout
