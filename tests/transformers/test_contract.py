"""What replacements of whole models are known to get wrong: one row per case, by the entry points that frameworks call.

Not here, since tested elsewhere: LoRA on the head (`test_patching.py`), biases of a Llama's MLPs at class level
(`test_doors.py`), `logits_to_keep` with `shift_labels` (`test_forward_contract.py`), that classes reach what one model
reaches, by default flags (`test_families.py`).
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import assert_draws_no_worse
from liger_kernel.transformers import monkey_patch
from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
from liger_kernel.transformers.patching.state import state_of
from tests.transformers.here import ENTRIES, lacks
from tests.transformers.steps import in_float64, move
from tests.transformers.zoo import build, check, inputs, releases

Inputs = dict[str, Any]


pytestmark = pytest.mark.usefixtures("quiet_on_one_thread")


def apply(name: str, **arguments: Any) -> None:
    getattr(monkey_patch, f"apply_liger_kernel_to_{name}")(**arguments)


def revert(name: str) -> None:
    getattr(monkey_patch, f"revert_liger_kernel_to_{name}")()


# -- settings under which a loss or a gradient came out wrong ----------------------------------------------------------


def text(model_type: str, model: nn.Module) -> Inputs:
    return inputs.inputs(ENTRIES[model_type], model)


def pixels(model_type: str, model: nn.Module) -> Inputs:
    return inputs.image_inputs(ENTRIES[model_type], model)


def tiles(model_type: str, model: nn.Module) -> Inputs:
    """One image of four tiles per row, seen by every token."""
    rows, length, size = inputs.ROWS, inputs.LENGTH, model.config.vision_config.image_size
    noise = torch.randn(rows, 1, 4, 3, size, size, generator=torch.Generator().manual_seed(4))
    return {
        **text(model_type, model),
        "pixel_values": noise,
        "aspect_ratio_ids": torch.full((rows, 1), 6),
        "aspect_ratio_mask": torch.ones(rows, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(rows, length, 1, 4, dtype=torch.long),
    }


def packed(model_type: str, model: nn.Module) -> Inputs:
    """Positions of its own for every row: two sequences of unlike lengths, one behind the other."""
    positions = [[*range(cut), *range(inputs.LENGTH - cut)] for cut in (5, 9)]
    return {**text(model_type, model), "position_ids": torch.tensor(positions)}


@dataclass(frozen=True)
class Case:
    model_type: str
    make: Callable[[str, nn.Module], Inputs] = text
    config: dict[str, Any] = field(default_factory=dict)  # set after the zoo's settings
    arguments: dict[str, Any] = field(default_factory=dict)  # of the config's constructor
    kinds: tuple[str, ...] = ("loss", "norm", "mlp")  # of replacements, at least


_GELU, _RELU = {"hidden_act": "gelu"}, {"hidden_act": "relu"}
CASES = {
    "paligemma with images": Case("paligemma", pixels),
    "paligemma with images, of gemma2": Case(
        "paligemma", pixels, arguments={"text_config": {"model_type": "gemma2"}}
    ),
    "mllama with images": Case("mllama", tiles, config={"vision_config.vision_output_dim": 384}),
    "pixtral inside llava, gelu": Case(
        "llava",
        pixels,
        config={"vision_config.hidden_act": "gelu", "vision_feature_select_strategy": "full"},
        arguments={"vision_config": {"model_type": "pixtral"}},
    ),
    "qwen3_moe with a dense layer": Case("qwen3_moe", config={"mlp_only_layers": [0]}),
    "qwen3_next with router losses": Case("qwen3_next", config={"output_router_logits": True}),
    "llama4, positions by row": Case("llama4", packed),
    "falcon_h1 with biases": Case(
        "falcon_h1", config={"mlp_bias": True, "mlp_multipliers": [0.7, 1.3]}
    ),
    "olmo2, gelu": Case("olmo2", config=_GELU),
    "qwen2, relu": Case("qwen2", config=_RELU, kinds=("loss", "norm")),
    "gemma2, silu": Case("gemma2", config={"hidden_activation": "silu"}),
}


def made(case: Case, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The zoo's model with the settings of the case."""
    name = case.model_type
    settings = {**build.OVERRIDES.get(name, {}), **case.config}
    monkeypatch.setitem(build.OVERRIDES, name, settings)
    if case.arguments:
        monkeypatch.setitem(build.ARGUMENTS, name, case.arguments)
    return build.build(ENTRIES[name])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_model_and_its_classes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default flags: loss, every gradient, and the way back; the same numbers at class level."""
    model = made(case, monkeypatch)
    batch = case.make(case.model_type, copy.deepcopy(model))
    result = check.Result(case.model_type, type(model).__name__)
    expected: list[Any] = []

    def patch(model: nn.Module) -> Any:
        apply(case.model_type, model=model)
        expected.extend(check.step(model, batch)[:2])
        state = state_of(model)
        assert state is not None
        state.report.add("rope", "(the modeling file)", by="liger_rotary_pos_emb")
        return state.report

    check.check(model, batch, result, patch)
    assert result.loss == "fused"
    assert set(case.kinds) <= result.replaced.keys()
    apply(case.model_type)
    try:
        built = build.build(ENTRIES[case.model_type])
        loss, grads, _ = check.step(built, batch)
    finally:
        revert(case.model_type)
    assert torch.equal(loss, expected[0])
    assert grads.keys() == expected[1].keys()
    assert all(torch.equal(grad, expected[1][name]) for name, grad in grads.items())


# -- models without a head onto the vocabulary -------------------------------------------------------------------------


class Scored(nn.Module):
    """A model that has no loss of its own, with one over its first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        outputs = self.model(**batch)
        loss = getattr(outputs, "loss", None)
        return SimpleNamespace(loss=outputs[0].square().mean() if loss is None else loss)


def whole(name: str) -> Any:
    return build.config_for(ENTRIES[name])


def inner(name: str) -> Any:
    config = whole(name).get_text_config()
    assert config.model_type in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    return config


def tower(name: str) -> Any:
    config = transformers.AutoConfig.for_model(name, hidden_act="gelu")
    build.shrink(config, {})
    return config


def ids(labels: Tensor | None = None) -> Inputs:
    batch = {k: v for k, v in inputs.text().items() if k != "labels"}
    return batch if labels is None else {**batch, "labels": labels}


_BARE = "AutoModel"
#: auto class, config, inputs; all of them have a `model_type` that is served, or that is patched by structure
HEADLESS: dict[str, tuple[str, Callable[[], Any], Inputs]] = {
    **{
        f"{name}, classification": (
            "AutoModelForSequenceClassification", lambda name=name: whole(name), ids(torch.tensor([0, 1])),
        )
        for name in ("llama", "qwen2", "gemma2", "mixtral")
    },
    "qwen3, tags": (
        "AutoModelForTokenClassification",
        lambda: whole("qwen3"),
        ids(torch.arange(inputs.ROWS * inputs.LENGTH).view(inputs.ROWS, -1) % 2),
    ),
    **{
        f"{name}, bare": (_BARE, lambda name=name: whole(name), ids())
        for name in (
            "llama", "qwen3_next", "gemma3", "paligemma", "mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
            "qwen3_vl_moe", "qwen3_5", "glm4v", "glm4v_moe", "smolvlm", "llava", "internvl",
        )
    },
    **{
        f"{name}, text": (_BARE, lambda name=name: inner(name), ids())
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
    },
    "pixtral, gelu": (_BARE, lambda: tower("pixtral"), {"pixel_values": inputs._pixels(3, 32, 32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADLESS)
def test_without_a_head(name: str) -> None:
    """As HF's Trainer patches whatever it is given: all but the loss, and the numbers stay."""
    auto, config, batch = HEADLESS[name]
    torch.manual_seed(0)
    made = config()
    made.pad_token_id = 0
    made._experts_implementation = "eager"
    model = getattr(transformers, auto).from_config(made, attn_implementation="eager")
    fresh = Scored(build.randomize(model))
    ours = copy.deepcopy(fresh)
    _apply_liger_kernel_to_instance(ours.model)
    kinds = {row.kind for row in state_of(ours.model).report.replaced}
    assert "norm" in kinds
    assert "loss" not in kinds
    check.compare(ours, fresh, batch, check.Result(name, auto))
    assert check.step(ours, batch)[1]
    liger_kernel.unpatch(ours.model)


# -- ways to call the forward ------------------------------------------------------------------------------------------

Call = Callable[[nn.Module, Inputs], dict[str, Any]]


def evaluated(model: nn.Module, batch: Inputs, **arguments: Any) -> Any:
    with torch.no_grad():
        return model.eval()(**{**batch, **arguments})


def as_tuple(model: nn.Module, batch: Inputs) -> dict[str, Any]:
    outputs = model.train()(**batch, return_dict=False)
    assert isinstance(outputs, tuple)
    return {"loss": outputs[0]}


def per_item(model: nn.Module, batch: Inputs) -> dict[str, Any]:
    return {"loss": evaluated(model, batch, num_items_in_batch=torch.tensor(7)).loss}


def kept_logits(model: nn.Module, batch: Inputs) -> dict[str, Any]:
    batch = {k: v for k, v in batch.items() if k != "labels"}
    if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        lacks(f"logits_to_keep in {type(model).__name__}.forward")
    logits = evaluated(model, batch, logits_to_keep=2).logits
    assert logits.shape[1] == 2
    return {"logits": logits}


def hidden_states(model: nn.Module, batch: Inputs) -> dict[str, Any]:
    found = model.train()(**batch, output_hidden_states=True).hidden_states
    return {f"hidden state {i}": h for i, h in enumerate(found)}


def shifted(model: nn.Module, batch: Inputs) -> dict[str, Any]:
    """Labels that are shifted already, alone; what has router losses adds them."""
    if "loss_function" not in inspect.unwrap(type(model).forward).__code__.co_names:
        lacks(f"loss function of {type(model).__name__} that could be told so")
    if state_of(model) is not None:
        moved = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        batch = {k: v for k, v in batch.items() if k != "labels"} | {"shift_labels": moved}
    training = model.train()(**batch)
    found = {"training": training.loss, "evaluation": evaluated(model, batch).loss}
    aux_loss = getattr(training, "aux_loss", None)
    return found if aux_loss is None else {**found, "router loss": aux_loss}


def without_logits(model: nn.Module, batch: Inputs) -> dict[str, Any]:
    if state_of(model) is None:
        return {"loss": evaluated(model, batch).loss}
    outputs = evaluated(model, batch, skip_logits=True)
    assert outputs.logits is None
    return {"loss": outputs.loss}


def accuracy(model: nn.Module, batch: Inputs) -> dict[str, Any]:
    if state_of(model) is not None:
        outputs = evaluated(model, batch, return_token_accuracy=True)
        return {"loss": outputs.loss, "accuracy": outputs.token_accuracy}
    outputs = evaluated(model, batch)
    labels = batch["labels"][:, 1:]
    hits = (outputs.logits[:, :-1].argmax(-1) == labels)[labels != -100]
    return {"loss": outputs.loss, "accuracy": hits.to(outputs.loss.dtype).mean()}


CALLS: dict[Call, tuple[str, ...]] = {
    as_tuple: ("deepseek_v4", "gpt_oss"),
    per_item: ("gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_5_moe"),
    kept_logits: ("qwen2_vl", "qwen2_5_vl"),
    hidden_states: ("phi3",),
    shifted: (
        "falcon_h1", "smolvlm", "internvl", "qwen3_5_moe", "llama4", "granite", "mixtral", "qwen3_moe",
        "qwen3_next", "gpt_oss",
    ),
    without_logits: ("llama4", "mllama", "paligemma", "qwen2_vl", "smolvlm", "internvl"),
    accuracy: ("smolvlm", "granite", "llama4", "mllama"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("call", "name"),
    [(call, name) for call, names in CALLS.items() for name in names],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_call(call: Call, name: str, calls: Counter[str]) -> None:
    fresh = build.build(ENTRIES[name])
    batch = inputs.inputs(ENTRIES[name], fresh)
    models = [fresh, copy.deepcopy(fresh).double(), copy.deepcopy(fresh)]
    originals = [p.detach().clone() for p in fresh.parameters()]
    fused = {"fused_linear_cross_entropy": True, "cross_entropy": False}  # Granite's flags differ

    def draw(seed: int) -> Any:
        move(models, originals, seed)
        calls.clear()
        low = call(models[2], batch)
        high = in_float64(lambda: call(models[1], batch))
        assert not calls
        _apply_liger_kernel_to_instance(fresh, **fused)
        ours = call(fresh, batch)
        liger_kernel.unpatch(fresh)
        return ours, high, low

    assert_draws_no_worse(draw)


@pytest.mark.parametrize("name", ["glm4v", "qwen2_vl", "paligemma"])
def test_generates_with_images(name: str) -> None:
    fresh = build.build(ENTRIES[name]).eval()
    batch = {k: v for k, v in inputs.image_inputs(ENTRIES[name], fresh).items() if k != "labels"}
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = fresh.generate(**batch, **arguments)
    apply(name, model=fresh)
    ours = fresh.generate(**batch, **arguments)
    liger_kernel.unpatch(fresh)
    assert torch.equal(ours, expected)
    assert ours.shape[1] > batch["input_ids"].shape[1]


# -- what else is in the process, and flags that do nothing ------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "mllama", "internvl", "smolvlm"])
def test_layer_norm_of_the_process_stays(name: str) -> None:
    before = torch.nn.LayerNorm, torch.nn.functional.layer_norm
    apply(name, layer_norm=True)
    try:
        assert (torch.nn.LayerNorm, torch.nn.functional.layer_norm) == before
        norm = nn.LayerNorm((3, 4), elementwise_affine=False)
        assert (norm.eps, norm.weight, type(norm).forward) == (1e-5, None, before[0].forward)
        built = build.build(ENTRIES[name])
        found = {row.by for row in state_of(built).report.replaced if row.kind == "norm"}
    finally:
        revert(name)
    assert "LigerLayerNorm" in found


def test_a_saved_copy_of_a_layer_norm() -> None:
    """PEFT's wrapper hands on attributes of the norm inside, which therefore must have them all."""
    peft = pytest.importorskip("peft")
    model = build.build(ENTRIES["stablelm"])
    saved = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    model = peft.get_peft_model(model, saved)
    batch = inputs.text()
    fresh = copy.deepcopy(model)
    report = liger_kernel.patch(model)
    assert sum("model.norm." in row.path for row in report.replaced) == 2
    assert repr(model).count("LigerLayerNorm[LayerNorm]") > 2
    check.compare(model, fresh, batch, check.Result("stablelm", type(model).__name__))
    liger_kernel.unpatch(model)


FLAGS = {
    "rope": ("qwen2_vl", "qwen2_5_vl"),
    "swiglu": ("glm4v", "qwen3_vl"),
    "cross_entropy": (
        "mistral", "ministral", "nemotron", "llama4", "gemma3", "paligemma", "qwen2_vl", "qwen2_5_vl",
    ),
}  # fmt: skip
OP_OF = {"rope": "rope", "swiglu": "glu", "cross_entropy": "cross_entropy"}


@pytest.mark.parametrize(
    ("flag", "name"), [(flag, name) for flag, names in FLAGS.items() for name in names]
)
def test_no_flag_does_nothing(flag: str, name: str) -> None:
    """Each flag alone, for one model and for the classes."""
    family = next(f for f in monkey_patch.FAMILIES if f.name == name)
    flags = {known: known == flag for known in family.flags if known != "model"}
    one = build.build(ENTRIES[name])
    batch = inputs.inputs(ENTRIES[name], one)
    calls: list[dict[str, int]] = [{}, {}]
    apply(name, **flags, model=one)
    with check._counted(calls[0]):
        check.step(one, batch)
    liger_kernel.unpatch(one)
    apply(name, **flags)
    try:
        built = build.build(ENTRIES[name])
        with check._counted(calls[1]):
            check.step(built, batch)
    finally:
        revert(name)
    if not calls[0] and transformers.__version__ != releases.DOCUMENTED:
        lacks(f"{name} that {flag} reaches")
    assert calls[0].get(OP_OF[flag])
    assert calls[0] == calls[1]


def test_a_loss_that_the_forward_computes_itself_is_not_claimed() -> None:
    """Nobody asks such a model's `loss_function`."""
    model = build.build(ENTRIES["bart"])
    report = liger_kernel.patch(model, cross_entropy=True, fused_linear_cross_entropy=False)
    liger_kernel.unpatch(model)
    assert [row.by for row in report.rows if row.kind == "loss"] == [None]
    assert "computes its loss itself" in str(report)
