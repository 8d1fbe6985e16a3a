"""The entry points that frameworks call: apply_liger_kernel_to_* and the Auto class. HF's Trainer has its own file."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

import liger_kernel
from liger_kernel import transformers as doors
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers import monkey_patch
from liger_kernel.transformers.patching.families import FAMILIES
from liger_kernel.transformers.patching.state import state_of
from tests.transformers.steps import assert_same_step
from tests.transformers.tiny import CONFIGS, batch, build

NAMES = sorted(CONFIGS)


def modeling(name: str) -> Any:
    family = next(f for f in FAMILIES if f.name == name)
    return importlib.import_module(
        f"transformers.models.{family.modeling}.modeling_{family.modeling}"
    )


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    rotary = {name: modeling(name).apply_rotary_pos_emb for name in NAMES}
    yield
    for name in NAMES:
        getattr(monkey_patch, f"revert_liger_kernel_to_{name}")()
        modeling(name).apply_rotary_pos_emb = rotary[name]


def unpatched(model_type: str, dtype: torch.dtype) -> nn.Module:
    """The reference, also while a class-level patch stands."""
    model = build(model_type, dtype)
    liger_kernel.unpatch(model)
    return model


def assert_same(model_type: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    assert model.train()(**batch()).logits is None
    assert_same_step(model_type, dtype, model, build=unpatched)


def test_the_table_and_the_functions_agree() -> None:
    functions = {n for n in dir(monkey_patch) if n.startswith("apply_liger_kernel_to_")}
    assert functions == {f.__name__ for f in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.values()}
    assert set(CONFIGS) <= set(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN)
    for name in (family.name for family in FAMILIES):
        signature = inspect.signature(getattr(doors, f"apply_liger_kernel_to_{name}"))
        assert signature.parameters["model"].default is None
        toggles = [p for n, p in signature.parameters.items() if n != "model"]
        assert all(
            isinstance(p.default, bool) and p.kind is p.POSITIONAL_OR_KEYWORD for p in toggles
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_class_level(name: str, dtype: torch.dtype) -> None:
    original = modeling(name).apply_rotary_pos_emb
    getattr(doors, f"apply_liger_kernel_to_{name}")()
    assert modeling(name).apply_rotary_pos_emb is doors.liger_rotary_pos_emb
    model = build(name, dtype)
    assert "LigerRMSNorm" in repr(model.model.norm)
    assert_same(name, model, dtype)
    getattr(monkey_patch, f"revert_liger_kernel_to_{name}")()
    liger_kernel.unpatch(model)
    assert modeling(name).apply_rotary_pos_emb is original
    assert state_of(build(name)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_instance_level(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    getattr(doors, f"apply_liger_kernel_to_{name}")(model=model)
    assert "LigerRMSNorm" in repr(model.model.norm)
    assert modeling(name).apply_rotary_pos_emb is doors.liger_rotary_pos_emb
    assert state_of(build(name)) is None
    assert_same(name, model, dtype)


def test_a_bare_model_inside_another_class_is_patched_once() -> None:
    doors.apply_liger_kernel_to_llama()
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        num_labels=3,
        pad_token_id=0,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    assert "LigerRMSNorm" in repr(model.model.norm)
    ids = torch.randint(3, 50, (2, 7))
    loss = model(input_ids=ids, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert loss.isfinite()


def test_flags() -> None:
    model = build("llama")
    doors.apply_liger_kernel_to_llama(rms_norm=False, swiglu=None, rope=False, model=model)
    assert {row.kind for row in state_of(model).report.replaced} == {"loss"}
    assert "Liger" not in repr(model.model.norm)
    with pytest.raises(ValueError, match="exclude each other"):
        doors.apply_liger_kernel_to_llama(cross_entropy=True)
    with pytest.raises(TypeError, match="geglu"):
        doors.apply_liger_kernel_to_llama(geglu=True)
    untouched = build("llama")
    doors._apply_liger_kernel_to_instance(untouched, fused_linear_cross_entropy=False)
    assert type(untouched.lm_head) is nn.Linear
    assert "forward" not in vars(untouched)
    assert isinstance(untouched.train()(**batch()).logits, torch.Tensor)


def test_by_model_type() -> None:
    assert doors._apply_liger_kernel("no_such_type") is None
    assert doors._apply_liger_kernel("") is None
    doors._apply_liger_kernel("qwen2", bogus=1, rms_norm=False)
    model = build("qwen2")
    assert "Liger" not in repr(model.model.norm)
    assert "Liger" in repr(model.model.layers[0].mlp)


def test_by_instance() -> None:
    model = build("llama")
    doors._apply_liger_kernel_to_instance(model=model, bogus=1)
    first = state_of(model)
    doors._apply_liger_kernel_to_instance(model=model)
    assert state_of(model) is first
    unknown = build("arcee")
    doors._apply_liger_kernel_to_instance(unknown, swiglu=True)
    assert state_of(unknown).report.replaced
    doors._apply_liger_kernel_to_instance(nn.Linear(2, 2))


def test_two_models_share_the_rope_of_their_file() -> None:
    original = modeling("llama").apply_rotary_pos_emb
    first, second = build("llama"), build("llama")
    for model in (first, second):
        doors.apply_liger_kernel_to_llama(model=model)
    liger_kernel.unpatch(first)
    assert modeling("llama").apply_rotary_pos_emb is doors.liger_rotary_pos_emb
    liger_kernel.unpatch(second)
    assert modeling("llama").apply_rotary_pos_emb is original


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "arcee"])
def test_auto_class(model_type: str, tmp_path: Path) -> None:
    saved = build(model_type)
    saved.save_pretrained(tmp_path)
    model = doors.AutoLigerKernelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    assert "LigerRMSNorm" in repr(model.model.norm)
    assert_same(model_type, model)
    kept = {"rms_norm": False, "fused_linear_cross_entropy": False, "config": saved.config}
    model = doors.AutoLigerKernelForCausalLM.from_pretrained(
        pretrained_model_name_or_path=tmp_path, **kept
    )
    assert "Liger" not in repr(model.model.norm)
    assert type(model.lm_head) is nn.Linear
    with torch.device("meta"):
        model = doors.AutoLigerKernelForCausalLM.from_config(saved.config, trust_remote_code=True)
    assert "LigerRMSNorm" in repr(model.model.norm)
    assert state_of(build(model_type)) is None


def test_a_refused_call_leaves_nothing_behind() -> None:
    original = modeling("llama").apply_rotary_pos_emb
    with pytest.raises(TypeError, match=r"nn\.Module, got str"):
        doors.apply_liger_kernel_to_llama(model="llama")
    assert modeling("llama").apply_rotary_pos_emb is original


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_hold_the_modeling_file_for_themselves(again: Any) -> None:
    before = modeling("llama").apply_rotary_pos_emb
    model = build("llama")
    doors.apply_liger_kernel_to_llama(model=model)
    twin = again(model)
    assert modeling("llama").apply_rotary_pos_emb is not before
    liger_kernel.unpatch(model)
    assert modeling("llama").apply_rotary_pos_emb is not before
    assert_same("llama", twin)
    liger_kernel.unpatch(twin)
    assert modeling("llama").apply_rotary_pos_emb is before


def test_patch_by_decree() -> None:
    model = build("llama")
    expected = model.model.norm(x := torch.randn(2, 48))
    monkey_patch._patch_rms_norm_module(model.model.norm)
    assert "LigerRMSNorm" in repr(model.model.norm)
    assert_no_worse("norm", model.model.norm(x), expected.double(), expected)
    monkey_patch._patch_swiglu_module(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="not a gated MLP"):
        monkey_patch._patch_swiglu_module(nn.Linear(2, 2))
    norm = nn.LayerNorm(48)
    expected = norm(x)
    monkey_patch._patch_layer_norm_module(norm)
    assert_no_worse("norm", norm(x), expected.double(), expected)


def test_proofs_ignore_the_defaults_of_the_moment() -> None:
    """`from_pretrained` builds models on the meta device with a 16-bit default dtype."""
    from liger_kernel.transformers.patching.sites import mlps, norms, rope

    for proof in (norms.find_plan, mlps.find_plan, rope.prove):
        proof.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            report = liger_kernel.patch(build("llama", torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert not report.skipped, str(report)
