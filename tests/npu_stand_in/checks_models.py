"""Patched models train on the stand-in as stock models do. Run by `tests/backends/test_npu.py`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor, nn

import liger_kernel
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernel.testing import assert_draws_no_worse, assert_no_worse
from tests.transformers.steps import fused, move, named_step
from tests.transformers.tiny import batch, build

STEPS = 2
LEARNING_RATE = 0.02


def train(model: nn.Module, originals: list[Tensor], seed: int, context: Any) -> dict[str, Tensor]:
    """Losses and gradients of some steps of SGD, from weights moved by a rounding error."""
    move([model], originals, seed)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    device, found = next(model.parameters()).device, {}
    for number in range(STEPS):
        inputs = {k: v.to(device) for k, v in batch(seed=100 * seed + number).items()}
        with context():
            for name, value in named_step(model, inputs).items():
                found[f"step {number}: {name}"] = value.cpu()
        optimizer.step()
    return found


@pytest.mark.parametrize(
    ("model_type", "how"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("llama", "autocast"),
        ("qwen3", "float32"),
        ("qwen3", "autocast"),
    ],
)
def test_training(model_type: str, how: str) -> None:
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    patched, stock, exact = (build(model_type, dtype, num_hidden_layers=1) for _ in range(3))
    originals = [p.detach().clone() for p in exact.parameters()]
    patched.to("npu"), stock.to("npu"), exact.double()
    assert not liger_kernel.patch(patched).skipped

    def autocast() -> Any:
        return torch.autocast("npu", torch.bfloat16, enabled=how == "autocast")

    def draw(seed: int) -> Any:
        torch_npu.calls.clear()
        ours = train(patched, originals, seed, autocast)
        called = set(torch_npu.calls)
        assert called >= {"npu_rms_norm", "npu_rms_norm_backward", "npu_swiglu", "npu_rotary_mul"}
        torch_npu.calls.clear()
        low = train(stock, originals, seed, autocast)
        assert not torch_npu.calls, "stock calls none of them"
        return ours, train(exact, originals, seed, contextlib.nullcontext), low

    assert_draws_no_worse(draw, first=2)


def test_a_step_of_a_mixture() -> None:
    """In fp32: in 16 bits a router near a tie chooses another expert."""
    patched, stock, exact = (build("qwen3_moe", num_hidden_layers=1).train() for _ in range(3))
    found = []
    for model in (patched, stock, exact):
        model.load_state_dict(exact.state_dict())
        model.set_experts_implementation("eager")
        model.to(*(("cpu", torch.float64) if model is exact else ("npu",)))
        if model is patched:
            assert not liger_kernel.patch(model).skipped
        torch_npu.calls.clear()
        found.append(named_step(model, {k: v.to(model.device) for k, v in batch().items()}))
        assert bool(torch_npu.calls["npu_grouped_matmul"]) == (model is patched)
    ours, low, high = found
    for name, gradient in ours.items():
        if gradient.ndim > 1:
            assert_no_worse(name, gradient.cpu(), high[name], low[name].cpu())


def test_checkpointed_and_unpatched() -> None:
    model, stock = (build("llama", num_hidden_layers=1).to("npu").train() for _ in range(2))
    stock.load_state_dict(model.state_dict())
    inputs = {k: v.to("npu") for k, v in batch().items()}
    liger_kernel.patch(model)
    whole = named_step(model, inputs)
    model.gradient_checkpointing_enable()
    torch_npu.calls.clear()
    checkpointed = named_step(model, inputs)
    # of its two norms, the layer runs both again
    assert torch_npu.calls["npu_rms_norm"] + torch_npu.calls["npu_add_rms_norm"] == 3 + 2
    model.gradient_checkpointing_disable()
    liger_kernel.unpatch(model)
    torch_npu.calls.clear()
    unpatched, theirs = named_step(model, inputs), named_step(stock, inputs)
    assert not torch_npu.calls
    for name, value in theirs.items():
        assert torch.equal(checkpointed[name], whole[name])
        assert torch.equal(unpatched[name], value)


def test_the_loss_is_fused_and_its_logits_are_lazy() -> None:
    model = build("llama").to("npu").train()
    liger_kernel.patch(model)
    inputs = {k: v.to("npu") for k, v in batch().items()}
    outputs = model(**inputs)
    assert fused(outputs)
    logits = outputs.logits + 0
    assert logits.device.type == "npu"
    assert logits.shape == (*inputs["input_ids"].shape, model.config.vocab_size)


def test_the_report_names_the_implementation() -> None:
    model = build("llama").to("npu")
    report = liger_kernel.patch(model)
    assert "computed by npu" in str(report)
    with liger_kernel.backends.use_implementation("reference"):
        assert "computed by reference" in str(report)
    assert "computed by npu" not in str(liger_kernel.patch(build("llama")))


def test_generation() -> None:
    model, stock = (build("llama").to("npu").eval() for _ in range(2))
    liger_kernel.patch(model)
    ids = batch()["input_ids"].to("npu")[:, :5]
    for each in (model, stock):
        each.generation_config.pad_token_id = 0
    ours, theirs = (m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, stock))
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_loss_in_one_graph(backend: str) -> None:
    hidden, weight = (torch.randn(n, 8).to("npu").requires_grad_() for n in (6, 11))
    target = torch.arange(6).to("npu")

    def loss(hidden: Tensor) -> Tensor:
        return fused_linear_cross_entropy(hidden * 2, weight, target)[0]

    (plain,) = torch.autograd.grad(loss(hidden), hidden)
    torch._dynamo.reset()
    (compiled,) = torch.autograd.grad(
        torch.compile(loss, backend=backend, fullgraph=True)(hidden), hidden
    )
    assert torch.equal(plain, compiled)


def test_a_trainer_patches_and_trains_on_the_device(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(tmp_path),
        use_liger_kernel=True,
        bf16=True,
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,  # the stand-in has none
        disable_tqdm=True,
    )
    rows = [dict(zip(batch(), row, strict=True)) for row in zip(*batch(4).values(), strict=True)]
    trainer = Trainer(build("llama", num_hidden_layers=1), arguments, train_dataset=rows)
    torch_npu.calls.clear()
    trainer.train()
    assert trainer.model.device.type == "npu"
    assert torch_npu.calls["npu_rms_norm_backward"] == 2 * 3
    assert torch_npu.calls["npu_swiglu_backward"] == 2
    assert torch_npu.calls["npu_rotary_mul"] == 2 * 4
