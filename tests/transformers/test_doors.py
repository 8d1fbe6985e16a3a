"""The entry points that frameworks call: apply_liger_kernel_to_* and the Auto class. HF's Trainer has its own file."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import liger_kernel
from liger_kernel import transformers as doors
from liger_kernel.testing import assert_no_worse
from liger_kernel.transformers import monkey_patch
from liger_kernel.transformers.patching.families import FAMILIES
from liger_kernel.transformers.patching.state import state_of
from tests.fresh import in_a_new_process
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
        toggles = [p for n, p in signature.parameters.items() if n not in ("model", "kwargs")]
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


def replaced(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if {"forward", "_get_name"} & vars(m).keys()]


@pytest.mark.parametrize(
    "auto",
    [
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
    ],
)
def test_heads_that_inherit_their_constructor(auto: Any) -> None:
    """A bare model inside another class: patched once, with it, and unpatched with it."""
    doors.apply_liger_kernel_to_llama()
    model = auto.from_config(build("llama").config)
    assert len(replaced(model)) == 9
    assert [path for path, m in model.named_modules() if state_of(m)] == [""]
    ids = torch.randint(3, 50, (2, 7))
    outputs = model(input_ids=ids)
    sum(t.square().mean() for t in outputs.to_tuple() if isinstance(t, torch.Tensor)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    liger_kernel.unpatch(model)
    assert replaced(model) == []
    assert not any("_liger" in name for m in model.modules() for name in vars(m))


def test_unpatch_reaches_the_parts_that_were_patched_by_themselves() -> None:
    doors.apply_liger_kernel_to_llama()
    file, config = modeling("llama"), build("llama").config
    wrapper = nn.Sequential(file.LlamaModel(config), file.LlamaRMSNorm(48))
    assert len(replaced(wrapper)) == 10
    liger_kernel.unpatch(wrapper)
    assert replaced(wrapper) == []


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


def test_what_others_put_on_the_modeling_file_stays_there() -> None:
    """Axolotl assigns our public function itself."""
    modeling("llama").apply_rotary_pos_emb = doors.liger_rotary_pos_emb
    model = build("llama")
    doors.apply_liger_kernel_to_llama(model=model)
    doors.apply_liger_kernel_to_llama()
    monkey_patch.revert_liger_kernel_to_llama()
    liger_kernel.unpatch(model)
    assert modeling("llama").apply_rotary_pos_emb is doors.liger_rotary_pos_emb


def test_a_model_that_is_gone_holds_nothing() -> None:
    original = modeling("llama").apply_rotary_pos_emb
    model = build("llama")
    doors.apply_liger_kernel_to_llama(model=model)
    assert modeling("llama").apply_rotary_pos_emb is doors.liger_rotary_pos_emb
    del model
    gc.collect()
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


# -- classes: what lives already, bare modules, several calls ----------------------------------------------------------


def bare() -> dict[str, nn.Module]:
    """Modules of the Llama file, built by themselves."""
    file, config = modeling("llama"), build("llama").config
    torch.manual_seed(0)
    made: dict[str, Callable[[], nn.Module]] = {
        "norm": lambda: file.LlamaRMSNorm(48),
        "mlp": lambda: file.LlamaMLP(config),
        "layer": lambda: file.LlamaDecoderLayer(config, 0),
    }
    return {kind: make() for kind, make in made.items()}


def test_a_class_level_call_reaches_models_that_live() -> None:
    model, heads = build("llama"), nn.ModuleList([build("llama").model])
    own = build("llama")
    liger_kernel.patch(own, mlp=False)
    kept = state_of(own)
    doors.apply_liger_kernel_to_llama()
    assert "LigerRMSNorm" in repr(model.model.norm)
    assert "LigerSwiGLU" in repr(heads)
    assert state_of(own) is kept, "its owner said how to patch it"
    assert_same("llama", model)
    monkey_patch.revert_liger_kernel_to_llama()
    assert "Liger" not in repr([model, heads])
    assert vars(model).keys() == vars(build("llama")).keys()
    assert state_of(own) is kept


def test_bare_modules_of_the_classes() -> None:
    before = bare()
    doors.apply_liger_kernel_to_llama()
    file = modeling("llama")
    x = torch.randn(2, 5, 48)
    for module in (*before.values(), *bare().values()):
        assert "Liger" in repr(module)
        for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert isinstance(again, type(module))
            if not isinstance(module, file.LlamaDecoderLayer):
                theirs = type(module).forward(module, x)
                exact = type(module).forward(copy.deepcopy(module).double(), x.double())
                assert_no_worse("forward", again(x), exact, theirs)
    # a Linear onto as many features as the vocabulary has is no head
    config = copy.deepcopy(build("llama").config)
    config.intermediate_size = config.vocab_size
    assert type(file.LlamaMLP(config).up_proj) is nn.Linear
    monkey_patch.revert_liger_kernel_to_llama()
    assert "Liger" not in repr([*before.values(), *bare().values()])


def test_class_level_calls_add_up() -> None:
    model = build("llama")
    off = {"rope": False, "fused_linear_cross_entropy": False}
    doors.apply_liger_kernel_to_llama(**off, swiglu=False)
    doors.apply_liger_kernel_to_llama(**off, rms_norm=False)
    for one in (model, build("llama")):
        assert {row.kind for row in state_of(one).report.replaced} == {"norm", "residual", "mlp"}
    doors.apply_liger_kernel_to_llama()
    doors.apply_liger_kernel_to_llama(cross_entropy=True, fused_linear_cross_entropy=False)
    assert isinstance(model.train()(**batch()).logits, torch.Tensor)
    assert {row.by for row in state_of(model).report.replaced} >= {"cross entropy"}
    monkey_patch.revert_liger_kernel_to_llama()
    assert state_of(model) is None
    doors.apply_liger_kernel_to_llama(**off, swiglu=False)
    assert {row.kind for row in state_of(model).report.replaced} == {"norm", "residual"}


def test_what_is_loaded_copied_and_compiled_while_classes_are_patched(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    doors.apply_liger_kernel_to_llama()
    cls = modeling("llama").LlamaForCausalLM
    loaded = cls.from_pretrained(tmp_path, attn_implementation="eager")
    for model in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert type(model) is cls
        assert_same("llama", model)
    x = torch.randn(2, 48)
    for module in bare().values():
        if not isinstance(module, modeling("llama").LlamaDecoderLayer):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            theirs = type(module).forward(module, x)
            exact = type(module).forward(copy.deepcopy(module).double(), x.double())
            assert_no_worse("compiled", compiled(x), exact, theirs)
    monkey_patch.revert_liger_kernel_to_llama()
    assert "Liger" not in repr(loaded)


RELOAD = """
import importlib
from liger_kernel import transformers as doors, unpatch
from liger_kernel.transformers import monkey_patch
from tests.transformers.tiny import build
file = importlib.import_module("transformers.models.llama.modeling_llama")
doors.apply_liger_kernel_to_llama()
old = build("llama")
importlib.reload(file)
assert file.apply_rotary_pos_emb is not doors.liger_rotary_pos_emb
assert "Liger" not in repr(file.LlamaForCausalLM(old.config))
doors.apply_liger_kernel_to_llama(swiglu=False)
new = file.LlamaForCausalLM(old.config)
assert "LigerRMSNorm" in repr(new) and "SwiGLU" not in repr(new)
assert file.apply_rotary_pos_emb is doors.liger_rotary_pos_emb
kept = build("llama")
doors.apply_liger_kernel_to_llama(model=kept)
importlib.reload(file)
doors.apply_liger_kernel_to_llama()
unpatch(kept)
assert file.apply_rotary_pos_emb is doors.liger_rotary_pos_emb, "held by the classes of today"
monkey_patch.revert_liger_kernel_to_llama()
assert "Liger" not in repr(new) and file.apply_rotary_pos_emb is not doors.liger_rotary_pos_emb
"""


def test_reloading_the_modeling_file_undoes_a_class_level_call() -> None:
    """As HF's own tests do; in a process of its own, where the classes of other tests stay as they are."""
    in_a_new_process(RELOAD)


# -- calls as frameworks make them -------------------------------------------------------------------------------------


def test_a_model_in_the_place_of_a_flag() -> None:
    """By position: the seventh parameter of one family is the model, of another a flag."""
    model = build("llama")
    before = modeling("llama").apply_rotary_pos_emb
    with pytest.raises(TypeError, match=r"swiglu is True or False, got LlamaForCausalLM.*model="):
        doors.apply_liger_kernel_to_llama(True, False, True, True, model)
    with pytest.raises(TypeError, match="rms_norm is True or False, got str"):
        doors.apply_liger_kernel_to_llama(rms_norm="false")
    assert state_of(model) is None
    assert modeling("llama").apply_rotary_pos_emb is before
    doors.apply_liger_kernel_to_llama(False, False, True, True, True, model)
    assert state_of(model) is not None


def test_flags_that_an_entry_point_passes_on(caplog: pytest.LogCaptureFixture) -> None:
    """`llava` and its like take the flags of the text model inside; what nobody knows is logged."""
    for name in ("llava", "internvl", "smolvlm", "nemotron"):
        family = next(f for f in FAMILIES if f.name == name)
        assert family.takes_more
        assert family.options({})["mlp"]
        given = {"swiglu": False, "geglu": False, "relu_squared": False}
        assert not family.options(given)["mlp"]
        caplog.clear()
        getattr(doors, f"apply_liger_kernel_to_{name}")(
            **given, rope=False, fused_linear_cross_entropy=False, bogus=1
        )
        getattr(monkey_patch, f"revert_liger_kernel_to_{name}")()
        assert f"apply_liger_kernel_to_{name}() ignores bogus" in caplog.text
    model = build("llama")
    caplog.clear()
    doors._apply_liger_kernel_to_instance(model, bogus=1, swiglu=False)
    assert "ignores bogus" in caplog.text
    with pytest.raises(TypeError, match="bogus"):
        doors.apply_liger_kernel_to_llama(model=model, bogus=1)


class TwoProjections(nn.Module):
    """What `_patch_swiglu_module` cannot prove: its own forward raises."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(8, 12, False), nn.Linear(6, 8, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Doubled(doors.swiglu.LigerSwiGLUMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * doors.swiglu.LigerSwiGLUMLP.forward(self, x)


def test_patch_by_decree_runs_the_class_that_is_given() -> None:
    mlp, x = build("llama").model.layers[0].mlp, torch.randn(2, 48)
    own = copy.deepcopy(mlp)
    monkey_patch._patch_swiglu_module(mlp, Doubled)
    assert repr(mlp).startswith("Doubled[LlamaMLP]")
    for again in (mlp, copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        exact = 2 * copy.deepcopy(own).double()(x.double())
        assert_no_worse("mlp", again(x), exact, 2 * own(x))
    packed, x = TwoProjections(), torch.randn(2, 8)
    with pytest.raises(ValueError, match="not a gated MLP"):
        monkey_patch._patch_swiglu_module(packed)
    monkey_patch._patch_swiglu_module(packed, doors.swiglu.LigerPhi3SwiGLUMLP)
    gate, up = packed.gate_up_proj(x).chunk(2, -1)
    low = packed.down_proj(nn.functional.silu(gate) * up)
    gate, up = (x.double() @ packed.gate_up_proj.weight.double().T).chunk(2, -1)
    high = (nn.functional.silu(gate) * up) @ packed.down_proj.weight.double().T
    assert_no_worse("mlp", packed(x), high, low)
    monkey_patch._patch_geglu_module(mlp)
    assert repr(mlp).startswith("LigerGEGLUMLP")


def test_patch_by_decree_reaches_the_copies_of_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    model = peft.get_peft_model(build("llama"), config)
    monkey_patch._patch_rms_norm_module(model.base_model.model.model.norm)
    assert repr(model.base_model.model.model.norm).count("LigerRMSNorm[LlamaRMSNorm]") == 2
