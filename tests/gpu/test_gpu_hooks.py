"""Hooks and lazy logits of a patched model on a GPU: what the unpatched model makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import liger_kernel
from tests.transformers.steps import assert_all_no_worse, focal, unrounded
from tests.transformers.tiny import batch, build

HOOKS: dict[str, Callable[[Any], Any]] = {
    "none": lambda model: contextlib.nullcontext(),
    "head": lambda model: model.lm_head.register_forward_hook(lambda _, args, y: y * 0.5),
    "before the head": lambda model: model.lm_head.register_forward_pre_hook(
        lambda _, args: (args[0] * 2,)
    ),
    "gradient of the head": lambda model: model.lm_head.register_full_backward_hook(
        lambda _, into, out: (into[0] * 2,)
    ),
    "activation": lambda model: model.model.layers[0].mlp.act_fn.register_forward_hook(
        lambda _, args, y: y * 0.9
    ),
    "norm": lambda model: model.model.layers[1].post_attention_layernorm.register_forward_hook(
        lambda _, args, y: y * 0.9
    ),
    "norm of q": lambda model: model.model.layers[0].self_attn.q_norm.register_forward_hook(
        lambda _, args, y: y * 0.9
    ),
    "gradient of a weight": lambda model: model.lm_head.weight.register_hook(lambda g: g * 0.5),
    "model": lambda model: model.register_forward_hook(
        lambda _, args, y: type(y)(loss=y.loss * 2, logits=y.logits * 3)
    ),
}


def inputs() -> dict[str, Tensor]:
    return {name: t.to("cuda") for name, t in batch().items()}


def made(dtype: torch.dtype, patched: bool) -> Any:
    model = build("qwen3", dtype, tie_word_embeddings=False).to("cuda")
    if patched:
        liger_kernel.patch(model)
    return model.train()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks(hook: str) -> None:
    found = []
    for dtype, patched in ((torch.float32, True), (torch.float64, False), (torch.float32, False)):
        model = made(dtype, patched)
        with HOOKS[hook](model), unrounded(model):
            outputs = model(**inputs())
            found.append(
                gradients(model, outputs.loss + 1e-2 * outputs.logits.float().square().mean())
            )
    assert_all_no_worse(*found)


def test_logits_that_are_read_without_gradients_first() -> None:
    found = []
    for dtype, patched in ((torch.float32, True), (torch.float64, False), (torch.float32, False)):
        model = made(dtype, patched)
        with unrounded(model):
            outputs, labels = model(**inputs()), inputs()["labels"]
            with torch.no_grad():
                outputs.logits.argmax(-1)
            found.append(gradients(model, focal(outputs.logits, labels) + 1e-3 * outputs.loss))
    assert_all_no_worse(*found)


@pytest.mark.parametrize("how", ["fused", "foreach", "data of a frozen head"])
def test_other_weights_than_those_of_the_forward(how: str) -> None:
    model = made(torch.bfloat16, True)
    frozen = how == "data of a frozen head"
    model.lm_head.requires_grad_(not frozen)
    outputs = model(**inputs())
    outputs.loss.backward()
    if frozen:
        model.lm_head.weight.data[7].mul_(2)
    else:
        torch.optim.AdamW(model.parameters(), **{how: True}).step()
    with pytest.raises(RuntimeError, match='logits="real"'):
        outputs.to_tuple()
