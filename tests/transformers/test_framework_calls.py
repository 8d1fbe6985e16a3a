"""Entry points, called as each framework calls them: the patch takes effect, and loss and gradients are those of stock.

The forms are those of the newest releases on 2026-11-27; `test_real_adapters.py` runs three frameworks' own code. TRL's
trainers and HF's run as a whole in `test_trl.py` and `test_trainer.py`, losses derived from our bases in
`tests/chunked_loss`.
"""

from __future__ import annotations

import collections
import importlib.util
import inspect
import operator
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from liger_kernel.transformers.model import loss_utils
from torch import Tensor, nn

import liger_kernel
import liger_kernel.transformers as trf
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers import functional, monkey_patch
from liger_kernel.transformers.patching.state import state_of
from tests.transformers.here import lacks
from tests.transformers.steps import assert_same_step, step
from tests.transformers.tiny import batch, build

pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")

NOT_FUSED = {"norm", "residual", "mlp"}
FUSED, UNFUSED_LOSS = (
    {*NOT_FUSED, FUSED_LOSS := "fused linear cross entropy"},
    {*NOT_FUSED, "cross entropy"},
)


def reverted(name: str) -> None:
    getattr(monkey_patch, f"revert_liger_kernel_to_{name}")()


def kinds(model: nn.Module) -> set[str]:
    """Of what was replaced; of the loss, by what."""
    state = state_of(model)
    rows = () if state is None else state.report.replaced
    return {row.by if row.kind == "loss" else row.kind for row in rows} - {"rope"}


# -- one call on a model that is there ---------------------------------------------------------------------------------


def hf_trainer(model: nn.Module, options: dict[str, Any] | None = None) -> None:
    if importlib.util.find_spec("transformers.integrations.liger") is None:
        lacks("integrations.liger: its Trainer makes the call")
    from transformers.integrations.liger import apply_liger_kernel

    for _ in range(2):  # at every train()
        apply_liger_kernel(model, options)


def llamafactory_v1(model: nn.Module) -> None:
    """Every parameter but `model` is a switch."""
    apply = getattr(trf, f"apply_liger_kernel_to_{model.config.model_type}")
    switches = [name for name in inspect.signature(apply).parameters if name != "model"]
    wanted = {"rms_norm", "swiglu", "fused_linear_cross_entropy"}
    assert wanted <= {*switches}
    apply(**{name: name in wanted for name in switches}, model=model)


def llamafactory_v1_auto(model: nn.Module) -> None:
    apply = getattr(trf, f"apply_liger_kernel_to_{model.config.model_type}")
    parameters = inspect.signature(apply).parameters.items()
    apply(**{name: p.default for name, p in parameters if name != "model"}, model=model)


def axolotl(model: nn.Module) -> None:
    """Only names of the signature, many of them None; the table by subscript."""
    table = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    assert model.config.model_type in table
    apply = table[model.config.model_type]
    options = {
        "rope": True, "cross_entropy": None, "fused_linear_cross_entropy": True, "rms_norm": True, "layer_norm": None,
        "geglu": True, "swiglu": True,
    }  # fmt: skip
    known = inspect.signature(apply).parameters
    apply(**{name: value for name, value in options.items() if name in known}, model=model)


CALLS: dict[str, tuple[Callable[[nn.Module], None], set[str]]] = {
    "transformers": (lambda m: hf_trainer(m, {"rms_norm": True, "bogus": 1}), FUSED),
    "transformers by default": (hf_trainer, FUSED),
    "trl": (
        lambda m: trf._apply_liger_kernel_to_instance(model=m, fused_linear_cross_entropy=False),
        NOT_FUSED,
    ),
    "verl": (
        lambda m: monkey_patch._apply_liger_kernel_to_instance(
            model=m, fused_linear_cross_entropy=False, swiglu=True
        ),
        NOT_FUSED,
    ),
    "nemo_automodel": (lambda m: trf._apply_liger_kernel_to_instance(model=m), FUSED),
    "agilerl": (lambda m: trf._apply_liger_kernel_to_instance(m), FUSED),
    "llamafactory v1": (llamafactory_v1, FUSED),
    "llamafactory v1, auto": (llamafactory_v1_auto, FUSED),
    "axolotl": (axolotl, FUSED),
}


@pytest.mark.parametrize("model_type", ["qwen3", "gemma"])
@pytest.mark.parametrize("framework", CALLS)
def test_on_a_model(framework: str, model_type: str) -> None:
    if "v1" in framework and model_type == "gemma":
        pytest.skip("LLaMA-Factory's v1 knows Qwen only")
    apply, expected = CALLS[framework]
    model = build(model_type)
    apply(model)
    assert kinds(model) == expected
    assert ("forward" in vars(model)) is (FUSED_LOSS in expected)  # TRL put its own there
    assert_same_step(model_type, torch.float32, model)
    liger_kernel.unpatch(model)


def test_nemo_patches_a_backbone_as_another_type() -> None:
    model = build("llama").model
    x, kw = {"input_ids": batch()["input_ids"]}, {"use_cache": False}
    expected = model(**x, **kw).last_hidden_state
    trf.apply_liger_kernel_to_mistral(
        model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False
    )
    assert kinds(model) == NOT_FUSED
    high = build("llama", torch.float64).model(**x, **kw).last_hidden_state
    assert_no_worse("hidden", model(**x, **kw).last_hidden_state, high, expected)


# -- before the model is built -----------------------------------------------------------------------------------------


def llamafactory(model_type: str) -> None:
    getattr(trf, f"apply_liger_kernel_to_{model_type}")()


def llamafactory_with_logits(model_type: str) -> None:
    apply = getattr(trf, f"apply_liger_kernel_to_{model_type}")
    assert "fused_linear_cross_entropy" in inspect.signature(apply).parameters
    apply(fused_linear_cross_entropy=False, cross_entropy=True)


def mini_trainer(model_type: str) -> None:
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    given = {"rms_norm": True, "torch_dtype": "auto", "pretrained_model_name_or_path": "x"}
    known = inspect.signature(apply).parameters
    monkey_patch._apply_liger_kernel(model_type, **{k: v for k, v in given.items() if k in known})


BEFORE = {
    "llamafactory": (llamafactory, FUSED),
    "llamafactory, logits": (llamafactory_with_logits, UNFUSED_LOSS),
    "ms_swift": (llamafactory, FUSED),
    "oumi": (lambda model_type: trf._apply_liger_kernel(model_type), FUSED),
    "mini_trainer": (mini_trainer, FUSED),
}


@pytest.mark.parametrize("framework", BEFORE)
def test_on_classes(framework: str, calls: collections.Counter[str]) -> None:
    apply, expected = BEFORE[framework]
    apply("qwen2")
    try:
        model = build("qwen2")
        assert kinds(model) == expected
        ours = step(model, **batch())
        assert calls["rms_norm"]
        assert calls["cross_entropy"]
    finally:
        reverted("qwen2")
    high, low = (step(build("qwen2", dtype), **batch()) for dtype in (torch.float64, torch.float32))
    assert_no_worse("loss", ours[0].loss, high[0].loss, low[0].loss)
    for name, grad in ours[1].items():
        assert_no_worse(name, grad, high[1][name], low[1][name])


def test_types_that_nobody_knows_are_no_error() -> None:
    trf._apply_liger_kernel("no_such_type")
    trf._apply_liger_kernel("")
    assert monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get("no_such_type") is None


# -- the auto class ----------------------------------------------------------------------------------------------------


AUTO = {
    "openrlhf": {"trust_remote_code": True, "attn_implementation": "eager", "dtype": "float32"},
    "skyrl": {"trust_remote_code": True, "config": None},
    "instructlab": {"cross_entropy": True, "fused_linear_cross_entropy": False},
    "arctic": {"config": None, "attn_implementation": "eager", "swiglu": False},
    "mini_trainer": {"dtype": torch.float32, "trust_remote_code": False},
}


@pytest.mark.parametrize("framework", AUTO)
def test_auto_class(framework: str, tmp_path: Path) -> None:
    stock = build("llama")
    stock.save_pretrained(tmp_path)
    options = dict(AUTO[framework])
    if "config" in options:
        options["config"] = stock.config
    by_name = framework in ("instructlab", "mini_trainer")
    where = {"pretrained_model_name_or_path": tmp_path} if by_name else {}
    model = trf.AutoLigerKernelForCausalLM.from_pretrained(
        *([] if by_name else [tmp_path]), **where, **options
    )
    assert type(model).__name__.removeprefix("Liger") == type(stock).__name__
    expected = UNFUSED_LOSS if options.get("cross_entropy") else FUSED
    assert kinds(model) == expected - (set() if options.get("swiglu", True) else {"mlp"})
    assert_same_step("llama", torch.float32, model)


def test_auto_class_without_weights() -> None:
    """The ranks of skyrl that load nothing."""
    with torch.device("meta"):
        model = trf.AutoLigerKernelForCausalLM.from_config(
            build("llama").config, trust_remote_code=True
        )
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert kinds(model) == FUSED


# -- names that frameworks replace or derive from ----------------------------------------------------------------------


def test_axolotl_wraps_the_fused_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it puts on `functional` later reaches models that were patched before."""
    model = build("llama")
    trf._apply_liger_kernel_to_instance(model)
    plain, original = step(model, **batch())[0].loss, functional.liger_fused_linear_cross_entropy

    def scaled(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "use_token_scaling": True})

    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", scaled)
    wrapped = step(model, **batch())[0].loss
    monkeypatch.undo()
    asked = step(model, **batch(), use_token_scaling=True)[0].loss
    assert torch.equal(wrapped, asked)
    assert not torch.equal(wrapped, plain)


def test_axolotl_keeps_the_loss_out_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    import liger_kernel.ops.fused_linear_cross_entropy as module

    for name in ("fused_linear_cross_entropy_forward", "fused_linear_cross_entropy_backward"):
        wrapped = torch.compiler.disable(getattr(module, name))
        monkeypatch.setattr(module, name, wrapped)
        assert getattr(module, name) is wrapped


def test_axolotl_swaps_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    high, low = (step(build("llama", d), **batch()) for d in (torch.float64, torch.float32))
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", trf.LigerRMSNorm)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", trf.LigerSwiGLUMLP.forward)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", trf.liger_rotary_pos_emb)
    monkeypatch.setattr(F, "cross_entropy", functional.liger_cross_entropy)
    model = build("llama")
    assert isinstance(model.model.norm, trf.LigerRMSNorm)
    ours = step(model, **batch())
    assert_no_worse("loss", ours[0].loss, high[0].loss, low[0].loss)
    for name, grad in ours[1].items():
        assert_no_worse(name, grad, high[1][name], low[1][name])


def test_axolotl_derives_modules() -> None:
    from liger_kernel.transformers.geglu import LigerGEGLUMLP
    from liger_kernel.transformers.rms_norm import LigerRMSNormForGemma4

    class Centered(trf.LigerRMSNorm):
        def __new__(cls, dim: int, eps: float = 1e-6, with_scale: bool = True) -> Any:
            return super().__new__(cls)

        def __init__(self, dim: int, eps: float = 1e-6, with_scale: bool = True) -> None:
            super().__init__(
                dim, eps, offset=1.0, casting_mode="gemma", init_fn="zeros", in_place=False
            )

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    low, high = (F.rms_norm(t, (8,), eps=1e-6) for t in (x, x.double()))
    assert_no_worse("centered", Centered(8, with_scale=True)(x), high, low)
    assert_no_worse(
        "without a scale", LigerRMSNormForGemma4(8, 1e-6, with_scale=False)(x), high, low
    )
    sizes = SimpleNamespace(hidden_size=8, intermediate_size=16, hidden_act="silu")
    gelu = SimpleNamespace(**{**vars(sizes), "hidden_act": "gelu_pytorch_tanh"})
    for cls, config, act in ((trf.LigerSwiGLUMLP, sizes, F.silu), (LigerGEGLUMLP, gelu, tanh_gelu)):
        mlp = cls(config)
        mlp.config = config
        stock = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
        low, high = (
            gated(x.to(d), [w.to(d) for w in stock], act) for d in (x.dtype, torch.float64)
        )
        assert_no_worse(cls.__name__, mlp(x), high, low)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gated(x: Tensor, weights: list[Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    down, gate, up = weights
    return (act(x @ gate.T) * (x @ up.T)) @ down.T


def test_axolotl_helpers() -> None:
    from liger_kernel.ops.utils import calculate_settings, compare_version, ensure_contiguous

    assert calculate_settings(100)[0] == 128
    assert compare_version("torch", operator.ge, "2.0.0")

    class Doubled(torch.autograd.Function):
        @staticmethod
        @ensure_contiguous
        def forward(ctx: Any, x: Tensor) -> Tensor:
            assert x.is_contiguous()
            return 2 * x

        @staticmethod
        @ensure_contiguous
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    assert torch.equal(Doubled.apply(torch.ones(2, 3).T), torch.full((3, 2), 2.0))


@pytest.fixture
def without_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    """mini-trainer reduces over all ranks itself: it replaces HF's function for the loss, and ours."""
    from transformers.loss import loss_utils as hf

    def of_hf(
        source: Any, target: Any, num_items_in_batch: Any = None, ignore_index: int = -100, **_: Any
    ) -> Any:
        return F.cross_entropy(source, target, ignore_index=ignore_index, reduction="none")

    def ours(
        hidden: Any,
        weight: Any,
        target: Any,
        n: Any = None,
        ignore_index: int = -100,
        softcap: Any = None,
        **_: Any,
    ) -> Any:
        options = {"reduction": "none", "ignore_index": ignore_index, "softcap": softcap}
        return functional.liger_fused_linear_cross_entropy(hidden, weight, target, **options)

    monkeypatch.setattr(hf, "fixed_cross_entropy", of_hf)
    monkeypatch.setattr(loss_utils, "fixed_fused_linear_cross_entropy", ours)


@pytest.mark.usefixtures("without_reduction")
def test_mini_trainer(calls: collections.Counter[str]) -> None:
    model = build("llama")
    inputs = batch()
    expected = model(**inputs).loss.detach()
    high = build("llama", torch.float64)(**inputs).loss.detach()
    trf._apply_liger_kernel_to_instance(model)
    calls.clear()
    outputs = model.train()(**inputs)
    assert calls["cross_entropy"]
    assert outputs.logits is None
    assert outputs.loss.shape == (inputs["labels"].numel(),)
    assert_no_worse("losses", outputs.loss, high, expected)
    outputs.loss.float().sum().backward()
    hidden = torch.randn(2, 5, 8)
    found = loss_utils.LigerForCausalLMLoss(hidden, torch.randn(11, 8), torch.ones(2, 5).long(), 8)
    assert found.shape == (10,)


def test_ms_swift_wraps_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = loss_utils.LigerForCausalLMLoss, []

    def wrapper(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.pop("cu_seq_lens_q", None))
        return original(hidden_states.contiguous(), *args, **kwargs)

    monkeypatch.setattr(loss_utils, "LigerForCausalLMLoss", wrapper)
    model = build("llama")
    trf._apply_liger_kernel_to_instance(model=model)
    assert_same_step("llama", torch.float32, model)
    x, w, y = torch.randn(2, 5, 8), torch.randn(11, 8), torch.ones(2, 5).long()
    more = {"cu_seq_lens_q": 1, "max_length_q": 3}
    loss = loss_utils.LigerForCausalLMLoss(
        hidden_states=x, lm_head_weight=w, labels=y, hidden_size=8, **more
    )
    assert loss.ndim == 0
    assert seen == [1]
