"""Patched against unpatched: loss, every gradient, the report, the way back, and a bystander."""

from __future__ import annotations

import collections
import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import liger_kernel
from liger_kernel import backends
from liger_kernel.testing import assert_draws_no_worse
from liger_kernel.transformers.patching.deferred import DeferredLogits
from liger_kernel.transformers.patching.report import PatchReport
from liger_kernel.transformers.patching.state import state_of
from tests.transformers.steps import in_float64, move
from tests.transformers.zoo.build import Entry, build

LOSS_OPS = ("fused_linear_cross_entropy", "cross_entropy")
#: Two runs of the same model that differ by more than this took different paths: routing flipped, say. Not derived from
#: the one tolerance, because no result of ours is compared with it: it only tells which run can serve as the truth.
OTHER_PATH = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}

#: types whose code refuses dropout
NO_DROPOUT = {"diffllama"}

Gradients = dict[str, Tensor]
Step = tuple[Tensor, Gradients]


@dataclass
class Result:
    """What happened to one model type."""

    entry: str
    class_name: str
    inputs: str = "text"
    status: str = "ok"  # or "wrong", "raises", "unbuilt"
    detail: str = ""
    loss: str = "not fused"  # or "fused"
    lazy_logits: bool = False
    replaced: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # kind -> replacement -> modules
    skipped: dict[str, int] = field(default_factory=dict)  # "kind: reason" -> modules
    calls: dict[str, int] = field(default_factory=dict)  # op -> calls in one forward
    drops: bool = False  # compared with dropout on, too
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        kinds = " ".join(
            f"{kind}={sum(by.values())}" for kind, by in self.replaced.items() if kind != "loss"
        )
        kinds += " drops" * self.drops
        text = f"{self.status:8}{self.entry:28}{self.inputs:6}{self.loss:10}{kinds:28}{self.seconds:5.1f}s"
        return " ".join([text, *self.notes, self.detail]).rstrip()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Gradients, Any]:
    """Loss, gradients and outputs of one training step; the same random numbers at every call."""
    torch.manual_seed(0)
    model.train()
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    outputs.loss.backward()
    grads = {
        name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None
    }
    return outputs.loss.detach(), grads, outputs


def check(
    fresh: nn.Module,
    inputs: dict[str, Any],
    result: Result,
    patch: Callable[[nn.Module], PatchReport] = liger_kernel.patch,
) -> None:
    """Fill in `result`; raises AssertionError where the patched model is wrong. `fresh` itself is never run."""
    stock, model = copy.deepcopy(fresh), copy.deepcopy(fresh)
    low_loss, low_grads, _ = step(stock, inputs)
    step(model, inputs)  # HF installs some hooks on the first forward
    bystander, globals_before, before = _snapshot(stock), _globals(stock), _snapshot(model)
    unsteady = _unequal(step(stock, inputs)[:2], (low_loss, low_grads))
    if unsteady:
        result.notes.append(f"{len(unsteady)} of {len(low_grads)} gradients differ from run to run")
    changing = _changed(bystander, _snapshot(stock))  # by HF itself at every step
    report = patch(model)
    if patch is liger_kernel.patch:
        _assert_nothing_silent(model, report)
    with _counted(result.calls):
        outputs = step(model, inputs)[-1]
    for row in report.replaced:
        by = result.replaced.setdefault(row.kind, {})
        by[row.by or ""] = by.get(row.by or "", 0) + 1
    result.skipped = dict(
        collections.Counter(f"{row.kind}: {row.reason}" for row in report.skipped)
    )
    result.lazy_logits = any(isinstance(v, DeferredLogits) for v in outputs.values())
    result.loss = "fused" if any(result.calls.get(op) for op in LOSS_OPS) else "not fused"
    _assert_told(result)
    del outputs
    compare(model, fresh, inputs, result)
    liger_kernel.unpatch(model)
    assert state_of(model) is None
    for what, was, now in (
        ("unpatch left behind", before, _snapshot(model)),
        ("the other model changed", bystander, _snapshot(stock)),
        ("a module global changed", globals_before, _globals(stock)),
    ):
        changed = _changed(was, now) - changing
        assert not changed, f"{what}: {sorted(changed)[:4]}"
    for name, again in (
        ("after unpatch", step(model, inputs)[:2]),
        ("the other model", step(stock, inputs)[:2]),
    ):
        assert again[1].keys() == low_grads.keys(), name
        unequal = _unequal(again, (low_loss, low_grads)) - unsteady
        assert not unequal, f"{name}: differ: {sorted(unequal)[:3]}"


def check_dropout(fresh: nn.Module, inputs: dict[str, Any], result: Result) -> None:
    """With dropout on, the patched model draws the same random numbers and gives the same loss and gradients."""
    with torch.no_grad():
        fresh.train()(
            **inputs
        )  # some of HF's models settle on a way to compute in their first forward
    stock = copy.deepcopy(fresh)
    drawn = _drawn(stock, inputs)
    torch.manual_seed(0)
    if torch.equal(drawn, _random_states()):
        return
    if not torch.equal(drawn, _drawn(stock, inputs)):
        result.notes.append("draws other random numbers in every run")
        return
    model = copy.deepcopy(fresh).eval()  # as `from_pretrained` returns it
    liger_kernel.patch(model)
    assert torch.equal(drawn, _drawn(model, inputs)), "with dropout, other random numbers are drawn"
    # a GPU drops others in float64
    compare(model, fresh, inputs, result, exactly=next(fresh.parameters()).is_cpu)
    result.drops = True


def _drawn(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Where a training step leaves the random states."""
    step(model, inputs)
    return _random_states()


def _random_states() -> Tensor:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.cat([torch.get_rng_state(), *on_gpus])


def _unequal(ours: Step, theirs: Step) -> set[str]:
    """Which of the loss and the gradients are not bit-equal."""
    names = {
        n for n, grad in theirs[1].items() if n not in ours[1] or not torch.equal(ours[1][n], grad)
    }
    return names if torch.equal(ours[0], theirs[0]) else names | {"loss"}


def _assert_told(result: Result) -> None:
    """The report names every kind of op that ran."""
    kinds = {
        "rms_norm": ("norm",),
        "fused_add_rms_norm": ("residual",),
        "layer_norm": ("norm",),
        "glu": ("mlp", "norm"),  # norms with a gate
        "fused_moe": ("experts",),
        "relu_squared": ("mlp",),
        "rope": ("rope",),
        "qk_norm_rope": ("rope",),
        "short_conv": ("short_conv",),
        "attn_res": ("attention_residual",),
        **dict.fromkeys(("mhc_project", "mhc_sinkhorn", "mhc_mix"), ("hyper_connection",)),
        **dict.fromkeys((*LOSS_OPS, "scale_gradients"), ("loss",)),
    }
    untold = {op for op in result.calls if result.replaced.keys().isdisjoint(kinds[op])}
    assert not untold, f"ran, but not reported: {untold}"
    assert result.loss == "fused" or "loss" not in result.replaced, (
        "reported as fused, but did not run"
    )


def _assert_nothing_silent(model: nn.Module, report: PatchReport) -> None:
    """Every norm and every experts module has a row, with a replacement or a reason."""
    told = {row.path for row in report.rows}
    silent = [
        path
        for path, module in model.named_modules()
        if path not in told
        and (
            ("norm" in type(module).__name__.lower() and not module._modules)
            or ("expert" in type(module).__name__.lower() and [*module.parameters(recurse=False)])
        )
    ]
    assert not silent, f"no row for {silent[:4]}"


def compare(
    patched: nn.Module,
    fresh: nn.Module,
    inputs: dict[str, Any],
    result: Result,
    exactly: bool = True,
) -> None:
    """Loss and every gradient of `patched` by the one tolerance, against `fresh`, whose weights it has.

    More draws are weights that are moved by one rounding error. Where a model does not run in float64, or takes another
    path there (or not `exactly`), the truth is the stock run, and that of moved weights says what rounding does to it.
    """
    stock = copy.deepcopy(fresh)
    originals = [p.detach().clone() for p in stock.parameters()]
    first = step(stock, inputs)[:2]
    high, exact = _exact(fresh, inputs, first, result) if exactly else (None, None)

    def run(model: nn.Module, seed: int) -> Step:
        move([model], originals, seed)
        return step(model, inputs)[:2]

    def yardstick(seed: int) -> tuple[Step, Step]:
        low = run(stock, seed) if seed else first
        if high and not seed:
            return high, low
        if exact:
            return exact(lambda model: move([model], originals, seed)), low
        return low, run(stock, seed + 1000)

    def draw(seed: int) -> Any:
        for other in range(seed, seed + 500, 100):
            high, low = yardstick(other)
            if _apart(low, high) <= OTHER_PATH[originals[0].dtype]:
                break
        runs = [run(patched, other), (high[0].double(), high[1]), low]
        return [{"loss": loss, **grads} for loss, grads in runs]

    assert_draws_no_worse(draw, last=256)
    move([patched], originals, 0)


Exact = Callable[[Callable[[nn.Module], None]], Step]


def _exact(
    fresh: nn.Module, inputs: dict[str, Any], low: Step, result: Result
) -> tuple[Step, Exact] | tuple[None, None]:
    """A step in float64, and one at weights that a function of the model has set; None where that is no yardstick."""
    double = {k: v.double() if _floats(v) else v for k, v in inputs.items()}
    model = copy.deepcopy(fresh).double()

    def exact(move: Callable[[nn.Module], None]) -> Step:
        move(model)
        return in_float64(lambda: step(model, double)[:2])

    try:
        high = exact(lambda model: None)
    except (RuntimeError, TypeError, ValueError) as error:
        result.notes.append(f"no float64 ({str(error)[:40]})")
        return None, None
    if not high[0].isfinite() or high[1].keys() != low[1].keys():
        result.notes.append(f"float64 gives {high[0]}")
        return None, None
    apart = _apart(low, high)
    if apart > OTHER_PATH[next(fresh.parameters()).dtype]:
        result.notes.append(f"float64 takes another path ({apart:.1g})")
        return None, None
    return high, exact


def _apart(low: Step, high: Step) -> float:
    """The largest difference of a gradient, relative to the gradient; all-zero ones aside."""
    largest = max(float(g.abs().max()) for g in high[1].values())
    return max(
        float((low[1][n].double() - g).abs().max()) / (float(g.abs().max()) + 1e-4 * largest)
        for n, g in high[1].items()
    )


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _counted(counts: dict[str, int]) -> Iterator[None]:
    """Counts the calls of every op into `counts`."""
    original = backends._kernels

    def counting(op: str, *args: Any) -> Any:
        counts[op] = counts.get(op, 0) + 1
        return original(op, *args)

    backends._kernels = counting  # type: ignore[assignment]
    try:
        yield
    finally:
        backends._kernels = original


def _snapshot(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module and its class; the contents of its dicts."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        found[path, "__class__"] = type(module)
        for name, value in vars(module).items():
            if name == "training":
                continue
            if isinstance(value, dict):
                found |= {(path, f"{name}[{key!r}]"): entry for key, entry in value.items()}
            else:
                found[path, name] = value
    return found


def _globals(model: nn.Module) -> dict[tuple[str, str], Any]:
    """The globals of every file that defines a class of `model`, and of torch."""
    files = {type(module).__module__ for module in model.modules()} | {
        "torch",
        "torch.nn",
        "torch.nn.functional",
    }
    return {(name, key): value for name in files for key, value in vars(sys.modules[name]).items()}


def _changed(before: dict[Any, Any], after: dict[Any, Any]) -> set[Any]:
    return {
        k for k in before.keys() | after.keys() if before.get(k, before) is not after.get(k, after)
    }


def built(entry: Entry, dropout: float = 0.0) -> nn.Module:
    """The model, with the experts as HF runs them by default, but for float64, which grouped_mm does not know."""
    model = build(entry, dropout)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    return model


def run(
    entry: Entry,
    make_inputs: Any,
    kind: str = "text",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Build, check and time one entry; what goes wrong is in the result."""
    result = Result(str(entry), entry.class_name, kind)
    start = time.perf_counter()
    try:
        fresh = built(entry)
        inputs = make_inputs(entry, copy.deepcopy(fresh))
        fresh = fresh.to(device, dtype)
        inputs = {k: v.to(device, dtype if _floats(v) else None) for k, v in inputs.items()}
        step(copy.deepcopy(fresh), inputs)
    except Exception as error:
        result.status, result.detail = "unbuilt", _said(error)
    else:
        try:
            check(fresh, inputs, result)
            if str(entry) not in NO_DROPOUT:
                check_dropout(built(entry, 0.2).to(device, dtype), inputs, result)
        except AssertionError as error:
            result.status, result.detail = "wrong", str(error)
        except Exception as error:
            result.status, result.detail = "raises", _said(error)
    result.seconds = round(time.perf_counter() - start, 2)
    return result


def _said(error: BaseException) -> str:
    trace = error.__traceback__
    places = []
    while trace is not None:
        places.append(f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({' < '.join(reversed(places[-3:]))})"
