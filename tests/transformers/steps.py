"""Training steps of a patched and an unpatched model, and how they are compared."""

from __future__ import annotations

import collections
import contextlib
from typing import Any

import torch
from torch import nn

from liger_kernel.testing import assert_no_worse
from tests.transformers.tiny import batch, build


def step(model: nn.Module, **inputs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Outputs and all parameter gradients of one training step."""
    model.train()
    model.zero_grad()
    outputs = model(**inputs)
    loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
    loss.backward()
    return outputs, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def steps(
    model: nn.Module, context: Any = contextlib.nullcontext, **inputs: Any
) -> dict[str, torch.Tensor]:
    """Losses and gradients of several batches, stacked.

    In 16 bits one batch may be near the truth, or far from it, by luck, and all gradients with it; eight are not.
    """
    found: dict[str, list[torch.Tensor]] = collections.defaultdict(list)
    for seed in range(8):
        with context():
            outputs, grads = step(model, **{**inputs, **batch(seed=seed)})
        for name, value in {"loss": outputs.loss.detach(), **grads}.items():
            found[name].append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def assert_same_step(
    model_type: str,
    dtype: torch.dtype,
    patched: nn.Module,
    build: Any = build,
    rename: str = "",
    **inputs: Any,
) -> None:
    """Loss and every parameter's gradient; in 16 bits over several batches."""
    runs = []
    for model in (patched, build(model_type, torch.float64), build(model_type, dtype)):
        if dtype == torch.float32:
            outputs, grads = step(model, **(inputs or batch()))
            grads = {name.removeprefix(rename): grad for name, grad in grads.items()}
            runs.append({"loss": outputs.loss.detach(), **grads})
        else:
            runs.append(steps(model, **inputs))
    assert_all_no_worse(*runs)


def assert_all_no_worse(ours: Any, high: Any, low: Any) -> None:
    assert ours.keys() == high.keys() == low.keys()
    for name, value in ours.items():
        assert_no_worse(name, value, high[name], low[name])


def snapshot(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module, and its class; the tables of parameters, children and hooks by content."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        found[path, "__class__"] = type(module)
        for name, value in vars(module).items():
            if name != "training":
                found[path, name] = (
                    dict(value) if name.startswith("_") and isinstance(value, dict) else value
                )
    return found


def assert_identical(before: dict[Any, Any], after: dict[Any, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(key, tuple) and isinstance(value, dict) and isinstance(after[key], dict):
            assert value.keys() == after[key].keys(), key
            assert all(value[k] is after[key][k] for k in value), key
        else:
            assert value is after[key], key
