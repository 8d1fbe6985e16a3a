"""Training steps of a patched and an unpatched model, and how they are compared."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liger_kernel
from liger_kernel.testing import assert_draws_no_worse, assert_no_worse
from liger_kernel.transformers.patching.deferred import DeferredLogits
from tests.transformers.tiny import batch, build

T = TypeVar("T")
#: in 16 bits one batch may be near the truth, or far from it, by luck, and all gradients with it
BATCHES = 8


@contextmanager
def float_means_double(*methods: str) -> Iterator[None]:
    """HF rounds logits (and norms, and angles) to float32, which would leave a float32 loss as the truth."""
    originals = {name: getattr(Tensor, name) for name in methods}

    def wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = {name: wide(value) for name, value in kwargs.items()}
        return originals["to"](self, *map(wide, args), **named)

    for name in methods:
        setattr(Tensor, name, {"float": Tensor.double, "to": to}[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


def in_float64(run: Callable[[], T]) -> T:
    """What `run` gives with as few roundings to float32 as the model's code stands: some of it mixes dtypes then."""
    for methods in (("float", "to"), ("float",)):
        with contextlib.suppress(RuntimeError, TypeError, ValueError), float_means_double(*methods):
            return run()
    return run()


def unrounded(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """What a model in float64 runs in."""
    if next(model.parameters()).dtype == torch.float64:
        return float_means_double("float", "to")
    return contextlib.nullcontext()


def step(model: nn.Module, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Outputs and all parameter gradients of one training step."""
    model.train()
    model.zero_grad()
    with unrounded(model):
        outputs = model(**inputs)
        loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
        loss.backward()
    return outputs, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def named_step(model: nn.Module, inputs: dict[str, Any], rename: str = "") -> dict[str, Tensor]:
    outputs, grads = step(model, **inputs)
    grads = {name.replace(rename, ""): grad for name, grad in grads.items()}
    return {"loss": outputs.loss.detach(), **grads}


def move(models: Sequence[nn.Module], originals: list[Tensor], seed: int) -> None:
    """Give all of `models` the weights `originals`, moved by one rounding error each: everything rounds otherwise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for original, *group in zip(originals, *(m.parameters() for m in models), strict=True):
            sign = torch.randint(0, 2, original.shape, generator=generator) * 2 - 1
            eps = torch.finfo(original.dtype).eps if seed else 0.0
            moved = original * (1 + eps * sign.to(original))
            for p in group:
                p.copy_(moved)


def steps(
    model: nn.Module, dtype: torch.dtype, context: Any = contextlib.nullcontext
) -> dict[str, Tensor]:
    """Losses and gradients of several batches, and of weights moved by a rounding error of `dtype`, stacked."""
    originals = [p.detach().to(dtype, copy=True) for p in model.parameters()]
    found: dict[str, list[Tensor]] = collections.defaultdict(list)
    for draw in range(4 * BATCHES):
        move([model], originals, draw // BATCHES)
        with context():
            for name, value in named_step(model, batch(seed=draw % BATCHES)).items():
                found[name].append(value)
    move([model], originals, 0)
    return {name: torch.stack(values) for name, values in found.items()}


def fused(outputs: Any) -> bool:
    """Whether the loss was made without logits, which still wait for somebody to read them."""
    return any(isinstance(value, DeferredLogits) for value in outputs.values())


def patched(model_type: str = "llama", **options: Any) -> Any:
    """In training, its loss fused."""
    model = build(model_type)
    assert any(row.kind == "loss" for row in liger_kernel.patch(model, **options).replaced)
    return model.train()


def outputs_of(model: nn.Module, **more: Any) -> Any:
    outputs = model(**batch(), **more)
    assert fused(outputs)
    return outputs


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    return (1 - torch.exp(-loss)) ** 2 * loss


def assert_full_gradient(
    use: Callable[[Any], Tensor], model_type: str = "llama", context: Any = contextlib.nullcontext
) -> None:
    """Gradients of `use(outputs)`, of which stock gives the truth."""

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        with context():
            outputs = model.train()(**batch())
        use(outputs).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients(patched(model_type))
    high, low = (gradients(build(model_type, d)) for d in (torch.float64, torch.float32))
    assert_all_no_worse(ours, high, low)


def assert_same_step(
    model_type: str,
    dtype: torch.dtype,
    patched: nn.Module,
    build: Any = build,
    rename: str = "",
    **inputs: Any,
) -> None:
    """Loss and every parameter's gradient; in 16 bits over several batches from the start."""
    models = patched, build(model_type, dtype).double(), build(model_type, dtype)
    count = 1 if dtype == torch.float32 else BATCHES
    batches = [{**batch(seed=seed), **inputs} for seed in range(count)]
    assert_same_steps(models, batches, rename)


def assert_same_steps(
    models: tuple[nn.Module, nn.Module, nn.Module],
    inputs: list[dict[str, Any]],
    rename: str = "",
) -> None:
    """Loss and every parameter's gradient of the patched model, the truth in float64, and stock.

    More draws are the same batches with weights that are moved by a rounding error. Other batches are no substitute: a
    rare one magnifies every rounding error, and then the largest error of many draws is that of one.
    """
    originals = [p.detach().clone() for p in models[-1].parameters()]

    def draw(seed: int) -> Any:
        move(models, originals, seed // len(inputs))
        return [named_step(model, inputs[seed % len(inputs)], rename) for model in models]

    assert_draws_no_worse(draw, first=len(inputs), last=256)
    move(models, originals, 0)


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
