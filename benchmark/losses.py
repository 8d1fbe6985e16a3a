"""Losses of preference tuning and RL, from hidden states to gradients: ours, PyTorch over all logits, the incumbent.

    python -m benchmark losses                                      # ours and eager
    python -m benchmark losses --modes incumbent --peer-site DIR    # DIR: pip install --target DIR liger-kernel
    python -m benchmark losses --shape 2x32768x4096x128256 --losses dpo kto grpo jsd    # too long for stock
    python -m benchmark losses --device cpu --shape tiny            # does it run at all?

Each mode runs in a process of its own, because the incumbent has our import name. Its loss and gradients are compared
with float64 on a small shape first: where ours is wrong it gets no time, the incumbent a mark. The rows are merged
into benchmark/results/<gpu>.json. To add a loss, add an entry to `LOSSES`; a size,
one to `shapes.LOSSES`.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark import children, shapes, sources
from benchmark.measure import host_inclusive, peak_mb, release
from benchmark.options import MeasuringParser
from benchmark.results import Row, default_path, describe_run, keep, said
from liger_kernel.testing import assert_no_worse

MODES = ("ours", "eager", "incumbent", "base")
CHECKED = shapes.LossShape(4, 64, 256, 1000, ignored=0.25)


class Inputs(NamedTuple):
    hidden: Tensor  # (B, T, H), asks for a gradient
    weight: Tensor  # (V, H), likewise
    target: Tensor  # (B, T), -100 where ignored
    ref_hidden: Tensor
    ref_weight: Tensor
    advantages: Tensor  # (B,)
    desirable: Tensor  # (B,)

    @property
    def mask(self) -> Tensor:
        return self.target != -100

    @property
    def ids(self) -> Tensor:
        """Ignored ones are 0: where a mask says what counts."""
        return self.target.clamp(min=0)

    def masked_mean(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum() / self.mask.sum()


def inputs(shape: shapes.LossShape, device: str, dtype: torch.dtype) -> Inputs:
    batch, length, width, classes, ignored = shape
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)

    hidden, weight = randn(batch, length, width), randn(classes, width, scale=width**-0.5)
    target = torch.randint(classes, (batch, length), generator=generator, device=device)
    target[:, : int(length * ignored)] = -100  # as prompts are
    near = hidden + randn(batch, length, width, scale=0.1)
    advantages = randn(batch).float()
    student = hidden.requires_grad_(), weight.requires_grad_()
    desirable = torch.arange(batch, device=device) % 2 == 0
    return Inputs(*student, target, near, weight.detach(), advantages, desirable)


def wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = wide_logits(hidden, weight).flatten(0, 1)
    return -F.cross_entropy(logits, target.flatten(), reduction="none").view(target.shape)


def ratios_of_sequences(i: Inputs) -> Tensor:
    """(B,) log-probabilities beside those of the reference model."""
    with torch.no_grad():
        reference = logps(i.ref_hidden, i.ref_weight, i.target).sum(1)
    return logps(i.hidden, i.weight, i.target).sum(1) - reference


def eager_dpo(i: Inputs) -> Tensor:
    chosen, rejected = ratios_of_sequences(i).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def eager_kto(i: Inputs) -> Tensor:
    margin = 0.1 * ratios_of_sequences(i)
    return torch.where(i.desirable, -margin, margin).sigmoid().mean()


def eager_pairs(
    loss: Callable[[Tensor, Tensor], Tensor], average: bool
) -> Callable[[Inputs], Tensor]:
    """`loss` of the log-probabilities of chosen and rejected sequences, and the NLL of the chosen."""

    def of(i: Inputs) -> Tensor:
        tokens = logps(i.hidden, i.weight, i.target)
        chosen, rejected = (tokens.sum(1) / (i.mask.sum(1) if average else 1)).chunk(2)
        half = len(tokens) // 2
        nll = -tokens[:half].sum() / i.mask[:half].sum()
        return nll + loss(chosen, rejected).mean()

    return of


def orpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    odds = (chosen - rejected) - ((-chosen.expm1()).log() - (-rejected.expm1()).log())
    return -0.1 * F.logsigmoid(odds)


def eager_grpo(i: Inputs) -> Tensor:
    found = logps(i.hidden, i.weight, i.ids)
    ratio, advantages = (found - found.detach()).exp(), i.advantages[:, None]
    return -i.masked_mean(torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages))


def eager_jsd(i: Inputs) -> Tensor:
    """Half the cross entropy, half the Jensen-Shannon divergence."""
    logits = wide_logits(i.hidden, i.weight)
    q = logits.log_softmax(-1)
    with torch.no_grad():
        p = wide_logits(i.ref_hidden, i.ref_weight).log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    soft = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2
    hard = F.cross_entropy(logits.flatten(0, 1), i.target.flatten())
    return 0.5 * hard + 0.5 * i.masked_mean(soft)


def module_of(name: str, **options: Any) -> Any:
    """From whichever `liger_kernel` is imported."""
    home = importlib.import_module("liger_kernel.chunked_loss")
    return getattr(home, f"LigerFusedLinear{name}Loss")(**options)


def fused_dpo() -> Callable[[Inputs], Tensor]:
    module = module_of("DPO", beta=0.1)
    return lambda i: module(i.weight, i.hidden, i.target, None, i.ref_hidden, i.ref_weight)[0]


def fused_pairs(name: str) -> Callable[[], Callable[[Inputs], Tensor]]:
    def fused() -> Callable[[Inputs], Tensor]:
        module = module_of(name)
        return lambda i: module(i.weight, i.hidden, i.target)[0]

    return fused


def fused_kto() -> Callable[[Inputs], Tensor]:
    module = module_of("KTO", use_ref_model=True)
    ref: Callable[[Inputs], Any] = lambda i: (i.ref_hidden, i.ref_weight)  # noqa: E731
    return lambda i: module(i.hidden, i.weight, i.target, None, i.desirable, *ref(i))[0]


def fused_grpo() -> Callable[[Inputs], Tensor]:
    module = module_of("GRPO", beta=0.0, use_ref_model=False)
    return lambda i: module(i.hidden, i.weight, i.ids, i.mask.long(), i.advantages)[0]


def fused_jsd() -> Callable[[Inputs], Tensor]:
    module = module_of("JSD")

    def fused(i: Inputs) -> Tensor:
        student, teacher = i.hidden.flatten(0, 1), i.ref_hidden.flatten(0, 1)
        found: Tensor = module(student, i.weight, teacher, i.ref_weight, i.target.flatten())
        return found

    return fused


def policy(i: Inputs, found: Tensor, entropy: Tensor) -> Tensor:
    """A policy gradient with an entropy bonus."""
    ratio = (found - found.detach()).exp()
    return -i.masked_mean(ratio * i.advantages[:, None] + 0.01 * entropy)


def eager_policy(i: Inputs) -> Tensor:
    log_p = wide_logits(i.hidden, i.weight).log_softmax(-1)
    found = log_p.gather(-1, i.ids[..., None])[..., 0]
    return policy(i, found, -(log_p.exp() * log_p).sum(-1))


def fused_policy() -> Callable[[Inputs], Tensor]:
    """By the one-pass form where there is one; by verl's call of the Function else."""
    import liger_kernel.ops
    from liger_kernel import functional

    once = getattr(functional, "linear_logprobs_loss", None)

    def fused(i: Inputs) -> Tensor:
        if once is not None:
            of = lambda f: (policy(i, f.log_prob, f.entropy), ())  # noqa: E731
            loss: Tensor = once(of, i.hidden, i.weight, i.target, entropy=True)[0]
            return loss
        apply = liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction.apply
        flat = i.hidden.flatten(0, 1), i.weight, i.target.flatten()
        nll, entropy = (t.view(i.target.shape) for t in apply(*flat, 1.0, -100, 1, True))
        return policy(i, -nll, entropy)

    return fused


class Loss(NamedTuple):
    eager: Callable[[Inputs], Tensor]
    fused: Callable[[], Callable[[Inputs], Tensor]]  # from whichever liger_kernel is imported
    products: int  # of B T H V multiplications and additions each


LOSSES = {
    "dpo": Loss(eager_dpo, fused_dpo, 4),  # with a reference model
    "grpo": Loss(eager_grpo, fused_grpo, 3),
    "policy-entropy": Loss(eager_policy, fused_policy, 3),
    "kto": Loss(eager_kto, fused_kto, 4),
    "orpo": Loss(eager_pairs(orpo, average=True), fused_pairs("ORPO"), 3),
    "cpo": Loss(
        eager_pairs(lambda c, r: -F.logsigmoid(0.1 * (c - r)), average=False), fused_pairs("CPO"), 3
    ),
    "simpo": Loss(
        eager_pairs(lambda c, r: -F.logsigmoid(0.1 * (c - r) - 0.5), average=True),
        *(fused_pairs("SimPO"), 3),
    ),
    "jsd": Loss(eager_jsd, fused_jsd, 4),  # distillation, from a teacher of the same width
}


def stepped(function: Callable[[Inputs], Tensor], i: Inputs) -> list[Tensor]:
    loss = function(i)
    return [loss.detach(), *torch.autograd.grad(loss, [i.hidden, i.weight])]


def wrong(loss: Loss, function: Callable[[Inputs], Tensor], device: str) -> str | None:
    """What of the loss and its gradients is less exact than the project's rule allows."""
    given = inputs(CHECKED, device, torch.bfloat16)
    exact = Inputs(*(t.detach().double() if t.is_floating_point() else t for t in given))
    exact.hidden.requires_grad_()
    exact.weight.requires_grad_()
    runs = stepped(function, given), stepped(loss.eager, given), stepped(loss.eager, exact)
    for name, mine, low, high in zip(("loss", "dX", "dW"), *runs, strict=True):
        try:
            assert_no_worse(name, mine.to(low.dtype), high, low)
        except AssertionError as error:
            return str(error)
    return None


def measured(loss: Loss, mode: str, shape: str, device: str) -> Row:
    """One mode, in this process; `loss.fused` imports whichever liger_kernel there is by now."""
    function = loss.eager if mode == "eager" else loss.fused()
    row: Row = {}
    if reason := wrong(loss, function, device):
        if mode in ("ours", "base"):
            raise ArithmeticError(reason)
        row["compared"] = f"worse: {reason}"
    torch._dynamo.reset()  # or the incumbent compiles for any shape, and fails
    given = inputs(shapes.LOSSES[shape], device, torch.bfloat16)
    call = partial(stepped, function, given)
    row["ms"] = host_inclusive(call, device, 300).ms
    size = shapes.LOSSES[shape]
    flops = 2 * loss.products * size.product * (1 - size.ignored)
    row["tflop_s"] = flops / row["ms"] / 1e9
    if device == "cuda":
        row["peak_mb"] = peak_mb(call)
    return row


def measure_mode(
    report: children.Report,
    mode: str,
    site: str | None,
    names: list[str],
    cases: list[str],
    device: str,
) -> None:
    if mode in ("incumbent", "base"):
        sources.become(site)
    for name, case in itertools.product(names, cases):
        row: Row = {"loss": name, "case": case, "mode": mode}
        try:
            row.update(measured(LOSSES[name], mode, case, device))
        except Exception as error:
            row["error"] = said(error)
        release()
        report(row)


def main(argv: list[str] | None = None) -> int:
    parser = MeasuringParser("losses", __doc__, "json", "base", "peer-site")
    parser.add_argument("--modes", default="ours,eager", help=f"of {','.join(MODES)}")
    first = next(iter(shapes.LOSSES))
    parser.add_argument("--shape", nargs="+", default=[first], choices=shapes.LOSSES)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES, metavar="LOSS",
                        help=f"of {', '.join(LOSSES)}; default: all")  # fmt: skip
    args = parser.read(argv)
    modes = parser.listed(args, "mode", args.modes, MODES)
    path = args.json or default_path(args.device)
    run = describe_run(args.device, incumbent=sources.site_version(args.peer_site))
    complete = 0
    for mode in modes:
        try:
            with sources.folder_of(mode, args.peer_site, args.base) as site:
                what = mode, site, args.losses, args.shape, args.device
                for row in children.rows(measure_mode, *what):
                    complete += "ms" in row
                    found = (
                        row.get("error") or f"{row['ms']:.1f} ms, {row.get('peak_mb', 0):.0f} MB"
                    )
                    print(f"{row['loss']:14} {row['case']:20} {row['mode']:10} {found}", flush=True)
                    keep(path, "chunked", run, [row])
        except children.ChildError as error:
            print(f"{mode}: {error}", file=sys.stderr)
    return int(complete < len(modes) * len(args.losses) * len(args.shape))
