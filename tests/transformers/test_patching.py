"""`patch(model)` on tiny models of every family: the same numbers, nothing else touched, all of it reversible."""

from __future__ import annotations

import collections
import copy
import functools
import sys
from typing import Any

import pytest
import torch
from torch import nn

import liger_kernel
from liger_kernel.testing import assert_draws_no_worse
from tests.transformers.here import GEMMA3_LAYERS_ASK
from tests.transformers.steps import (
    assert_identical,
    assert_same_step,
    assert_same_steps,
    fused,
    named_step,
    snapshot,
    step,
)
from tests.transformers.tiny import CONFIGS, batch, build

FAMILIES = sorted(CONFIGS)
QK_NORMS = ("gemma3_text", "qwen3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_loss_and_every_gradient(
    model_type: str, dtype: torch.dtype, calls: collections.Counter[str]
) -> None:
    model = build(model_type, dtype)
    report = liger_kernel.patch(model)
    assert not report.skipped, str(report)
    layers = model.config.num_hidden_layers
    kinds = collections.Counter(row.kind for row in report.replaced)
    assert kinds["loss"] == 1
    assert kinds["mlp"] == kinds["rope"] == layers
    assert kinds["norm"] >= 2 * layers + 1
    calls.clear()
    model.train()
    model(**batch())
    assert calls["fused_linear_cross_entropy"] + calls["cross_entropy"] >= 1
    with_norms = calls["qk_norm_rope"]  # those of q and k leave their work to the rotation
    with_sums = calls["fused_add_rms_norm"]
    sums = 0 if model_type == "gemma3_text" and GEMMA3_LAYERS_ASK else layers
    assert with_sums == 2 * kinds["residual"] == 2 * sums
    assert calls["rms_norm"] + 2 * with_norms + with_sums == kinds["norm"]
    assert with_norms == (layers if model_type in QK_NORMS else 0)
    assert calls["glu"] == calls["rope"] + with_norms == layers
    assert_same_step(model_type, dtype, model)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_micro_batches_equal_one_batch(model_type: str) -> None:
    """With `num_items_in_batch`, the gradients of uneven micro-batches add up to those of the whole batch."""
    model, high, low = build(model_type), build(model_type, torch.float64), build(model_type)
    liger_kernel.patch(model)
    model.train()

    def draw(seed: int) -> Any:
        whole = batch(rows=4, seed=seed)
        items = (whole["labels"][:, 1:] != -100).sum()
        model.zero_grad()
        losses = []
        for rows in (slice(0, 1), slice(1, 4)):
            loss = model(**{k: v[rows] for k, v in whole.items()}, num_items_in_batch=items).loss
            loss.backward()
            losses.append(loss.detach())
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        ours = {"loss": torch.stack(losses).sum(), **grads}
        return ours, named_step(high, whole), named_step(low, whole)

    assert_draws_no_worse(draw)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_second_model_is_untouched(model_type: str) -> None:
    other, model = build(model_type), build(model_type)
    outputs, grads = step(other, **batch())
    modules = [sys.modules[type(other).__module__], torch.nn, torch.nn.functional, torch]
    globals_before = [dict(vars(m)) for m in modules]
    other_before = snapshot(other)
    liger_kernel.patch(model)
    step(model, **batch())
    for module, before in zip(modules, globals_before, strict=True):
        assert_identical(before, dict(vars(module)))
    after, grads_after = step(other, **batch())
    assert torch.equal(outputs.loss, after.loss)
    assert torch.equal(outputs.logits, after.logits)
    assert all(torch.equal(grads[n], grads_after[n]) for n in grads)
    assert_identical(other_before, snapshot(other))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_unpatch_restores_everything(model_type: str) -> None:
    model = build(model_type)
    before = snapshot(model)
    liger_kernel.patch(model)
    assert snapshot(model).keys() != before.keys()
    liger_kernel.unpatch(model)
    assert_identical(before, snapshot(model))
    liger_kernel.unpatch(model)  # of an unpatched model: nothing
    with liger_kernel.patched(model) as report:
        assert report.replaced
    assert_identical(before, snapshot(model))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_generate_gives_the_same_tokens(model_type: str) -> None:
    inputs = {k: v for k, v in batch(rows=2, length=6).items() if k != "labels"}
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model = build(model_type).eval()
    expected = model.generate(**inputs, **arguments)
    liger_kernel.patch(model)
    assert torch.equal(model.generate(**inputs, **arguments), expected)


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3"])
def test_compiles_to_one_graph(model_type: str) -> None:
    """The fused loss stays fused (no logits come back), and the numbers stay the same."""
    model = build(model_type)
    liger_kernel.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert fused(compiled(**batch(), use_cache=False))
    assert_same_step(
        model_type, torch.float32, compiled, rename="_orig_mod.", **batch(), use_cache=False
    )


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3"])
def test_compiled_layers_are_those_of_hf(model_type: str) -> None:
    """Inductor fuses HF's own code; other code for the same numbers made it launch more kernels."""

    def traced(patch: bool) -> list[Any]:
        model = build(model_type)
        if patch:
            assert liger_kernel.patch(model).replaced
        calls: list[Any] = []

        def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            calls.extend(n.target for n in graph.graph.nodes if n.op.startswith("call"))
            return graph.forward

        torch._dynamo.reset()
        body = torch.compile(model.model, fullgraph=True, backend=record)
        body(input_ids=batch()["input_ids"], use_cache=False)
        return calls

    expected = traced(False)
    assert len(expected) > 50
    assert traced(True) == expected


def test_frozen_body_and_frozen_head() -> None:
    for frozen in ("model.", "lm_head"):
        reference, model = build("llama"), build("llama")
        for m in (reference, model):
            for name, p in m.named_parameters():
                p.requires_grad_(not name.startswith(frozen))
        liger_kernel.patch(model)
        _, expected = step(reference, **batch())
        _, ours = step(model, **batch())
        assert ours.keys() == expected.keys()
        assert ours


def test_report_reads_as_a_table() -> None:
    text = str(liger_kernel.patch(build("llama")))
    assert "model.layers.*.mlp" in text
    assert "LigerSwiGLU" in text
    assert "lm_head" in text
    assert "x2" in text


def test_patching_twice_is_patching_once() -> None:
    model = build("llama")
    first = liger_kernel.patch(model)
    after_first = snapshot(model)
    assert liger_kernel.patch(model) is first
    assert_identical(after_first, snapshot(model))
    second = liger_kernel.patch(model, mlp=False)
    assert {row.kind for row in second.replaced} == {"loss", "norm", "residual", "rope"}
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_what_someone_else_replaced_is_left_alone() -> None:
    model = build("llama")
    model.model.norm.forward = lambda x: x
    skipped = liger_kernel.patch(model).skipped
    assert [row.path for row in skipped] == ["model.norm"]
    assert "already replaced" in skipped[0].reason


def test_a_module_that_computes_something_else_is_refused() -> None:
    """The proof is numerical: a class that looks right but is not stays."""
    model = build("llama")

    class Odd(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.001

    class OddMLP(type(model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1.0) * self.up_proj(x))

    model.model.norm.__class__ = Odd
    model.model.layers[1].mlp.__class__ = OddMLP
    report = liger_kernel.patch(model)
    assert {row.path for row in report.skipped} == {"model.norm", "model.layers.1.mlp"}


def test_a_scaled_head_is_fused_with_its_scale() -> None:
    """Granite divides its logits; the fused loss must too."""
    model = build("granite", logits_scaling=1.7)
    report = liger_kernel.patch(model)
    assert any(row.kind == "loss" for row in report.replaced)
    assert_same_step_of("granite", model, logits_scaling=1.7)


def assert_same_step_of(model_type: str, patched: nn.Module, **overrides: Any) -> None:
    assert fused(step(patched, **batch())[0])
    high, low = (build(model_type, dtype, **overrides) for dtype in (torch.float64, torch.float32))
    assert_same_steps((patched, high, low), [batch()])


@pytest.mark.parametrize("rebuildable", [True, False])
def test_rope_within_a_decorator(
    rebuildable: bool, monkeypatch: pytest.MonkeyPatch, calls: collections.Counter[str]
) -> None:
    """As HF decorates forwards whose arguments get new names; where the function is hidden, the report says so."""
    attention = type(build("llama").model.layers[0].self_attn)
    function = attention.forward
    hidden = [function]
    decorated: list[int] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        decorated.append(1)
        return function(*args, **kwargs)

    @functools.wraps(function)
    def hiding(*args: Any, **kwargs: Any) -> Any:
        decorated.append(1)
        return hidden[0](*args, **kwargs)

    monkeypatch.setattr(attention, "forward", wrapper if rebuildable else hiding)
    model = build("llama")
    report = liger_kernel.patch(model)
    calls.clear()  # those of a proof
    assert {row.by is not None for row in report.rows if row.kind == "rope"} == {rebuildable}
    assert_same_step("llama", torch.float32, model)
    assert decorated
    assert bool(calls["rope"]) == rebuildable


@pytest.mark.parametrize(
    "index",
    [
        (..., slice(None, 100)),
        (slice(None), slice(None), slice(0, 100)),
        (slice(None), slice(None, 5)),
        (slice(None), slice(None, -1), slice(None, 10**6)),
    ],
    ids=str,
)
def test_a_slice_of_the_classes_is_fused(index: Any, calls: collections.Counter[str]) -> None:
    """As in models whose head has more rows than the tokenizer has tokens."""

    def sliced(dtype: torch.dtype) -> Any:
        model: Any = build("llama", dtype)
        original = model.loss_function

        def loss(logits: Any, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
            logits = logits[index].contiguous()
            labels = labels[:, : logits.shape[1]]
            labels = labels.masked_fill(labels >= logits.shape[-1], -100)
            return original(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)

        model.loss_function = loss
        return model

    model = sliced(torch.float32)
    liger_kernel.patch(model)
    ours, _ = step(model, **batch())
    assert calls["cross_entropy"]  # the steps of the fused loop
    assert fused(ours)
    assert_same_steps((model, sliced(torch.float64), sliced(torch.float32)), [batch()])


def test_no_logits_are_ever_made() -> None:
    """The largest tensor of a training step is far smaller than the logits would be."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    Largest.size = max(
                        Largest.size, t.untyped_storage().nbytes() // t.element_size()
                    )
            return out

    model = build("llama", max_position_embeddings=2048, vocab_size=2000)
    liger_kernel.patch(model, chunk_size=64)
    with Largest():
        step(model, **batch(rows=4, length=150), use_cache=False)
    assert Largest.size < 4 * 150 * 2000 / 2


def test_options_are_checked() -> None:
    model = build("llama")
    with pytest.raises(TypeError, match=r"no_such.*known: .*rms_norm"):
        liger_kernel.patch(model, no_such=True)
    with pytest.raises(ValueError, match="exclude each other"):
        liger_kernel.patch(model, cross_entropy=True)
    with pytest.raises(ValueError, match="chunk_size=1 and memory_budget=2"):
        liger_kernel.patch(model, chunk_size=1, memory_budget=2)
    for wrong, error, reason in (
        ({"chunk_size": 2.5}, TypeError, "chunk_size=2.5 is no int"),
        ({"memory_budget": "1G"}, TypeError, "memory_budget='1G' is no int"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0 is below 1"),
        ({"accum_dtype": "bf16"}, TypeError, "accum_dtype='bf16' is no dtype"),
        ({"accum_dtype": torch.int8}, TypeError, "no floating dtype"),
        ({"rope": "no"}, TypeError, "rope='no' is no bool"),
    ):
        with pytest.raises(error, match=reason):
            liger_kernel.patch(model, **wrong)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        liger_kernel.patch("llama")
    with pytest.raises(ValueError, match="strict=True"):
        liger_kernel.patch(nn.Linear(2, 2), strict=True)
    assert not liger_kernel.patch(nn.Linear(2, 2)).replaced


def test_cross_entropy_leaves_a_loss_of_ones_own() -> None:
    options = {"cross_entropy": True, "fused_linear_cross_entropy": False}

    def own(logits: Any, labels: Any, **others: Any) -> Any:
        return logits.float().square().mean()

    first, later = build("llama").train(), build("llama").train()
    first.loss_function = own
    reports = [liger_kernel.patch(model, **options) for model in (first, later)]
    assert [row.kind for row in reports[1].replaced if row.kind == "loss"] == ["loss"]
    later.loss_function = own
    reports.append(liger_kernel.patch(later, **options))
    for report in reports:
        reason = next(row.reason for row in report.rows if row.kind == "loss")
        assert "loss function" in reason
    expected = build("llama").train()
    expected.loss_function = own
    for model in (first, later):
        torch.testing.assert_close(model(**batch()).loss, expected(**batch()).loss)
        liger_kernel.unpatch(model)
        assert model.loss_function is own


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_cross_entropy_alone(model_type: str, calls: collections.Counter[str]) -> None:
    model = build(model_type)
    liger_kernel.patch(model, cross_entropy=True, fused_linear_cross_entropy=False)
    calls.clear()
    assert_same_step(model_type, torch.float32, model)
    assert calls["cross_entropy"] == 1
    assert isinstance(model.train()(**batch()).logits, torch.Tensor)


class TestPeft:
    def lora(self, model: nn.Module, **options: Any) -> nn.Module:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        made = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options))
        return made

    @pytest.mark.parametrize("patch_first", [True, False])
    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": ["q_proj", "gate_proj", "down_proj"]},
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"target_modules": ["q_proj", "lm_head"]},
        ],
        ids=["body", "saved head", "LoRA on the head"],
    )
    def test_adapters_get_their_gradients(self, options: dict[str, Any], patch_first: bool) -> None:
        reference = self.lora(build("llama"), **options)
        model = build("llama")
        if patch_first:
            liger_kernel.patch(model)
        model = self.lora(model, **options)
        if not patch_first:
            liger_kernel.patch(model)
        assert_same_steps((model, copy.deepcopy(reference).double(), reference), [batch()])
