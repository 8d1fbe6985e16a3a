"""Losses of preference tuning and RL, from hidden states to gradients: ours, PyTorch over all logits, the incumbent.

    python -m benchmark losses                                      # ours and eager
    python -m benchmark losses --modes incumbent --peer-site DIR    # DIR: pip install --target DIR liger-kernel
    python -m benchmark losses --device cpu --shape tiny            # does it run at all?

Each mode runs in a process of its own, because the incumbent has our import name. Its loss and gradients are compared
with float64 on a small shape first: where ours is wrong it gets no time, the incumbent a mark. The rows are merged
into benchmark/results/<gpu>.json. To add a loss, add an entry to `LOSSES`; a size,
one to `shapes.LOSSES`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark import children, shapes, sources
from benchmark.measure import host_inclusive, peak_mb
from benchmark.options import MeasuringParser
from benchmark.results import Row, default_path, describe_run, keep, said
from liger_kernel.testing import assert_no_worse

MODES = ("ours", "eager", "incumbent", "base")
CHECKED = (4, 64, 256, 1000)


class Inputs(NamedTuple):
    hidden: Tensor  # (B, T, H), asks for a gradient
    weight: Tensor  # (V, H), likewise
    target: Tensor  # (B, T)
    ref_hidden: Tensor
    ref_weight: Tensor
    advantages: Tensor  # (B,)


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Inputs:
    batch, length, width, classes = shape
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)

    hidden, weight = randn(batch, length, width), randn(classes, width, scale=width**-0.5)
    target = torch.randint(classes, (batch, length), generator=generator, device=device)
    near = hidden + randn(batch, length, width, scale=0.1)
    advantages = randn(batch).float()
    return Inputs(
        hidden.requires_grad_(), weight.requires_grad_(), target, near, weight.detach(), advantages
    )


def logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).flatten(0, 1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(wide, target.flatten(), reduction="none").view(target.shape)


def eager_dpo(i: Inputs) -> Tensor:
    with torch.no_grad():
        reference = logps(i.ref_hidden, i.ref_weight, i.target).sum(1)
    chosen, rejected = (logps(i.hidden, i.weight, i.target).sum(1) - reference).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def eager_grpo(i: Inputs) -> Tensor:
    found = logps(i.hidden, i.weight, i.target)
    ratio, advantages = (found - found.detach()).exp(), i.advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def fused_dpo() -> Callable[[Inputs], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(beta=0.1)
    return lambda i: module(i.weight, i.hidden, i.target, None, i.ref_hidden, i.ref_weight)[0]


def fused_grpo() -> Callable[[Inputs], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    mask = torch.ones_like
    return lambda i: module(i.hidden, i.weight, i.target, mask(i.target), i.advantages)[0]


def policy(found: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
    """A policy gradient with an entropy bonus."""
    ratio = (found - found.detach()).exp()
    return -(ratio * advantages[:, None] + 0.01 * entropy).mean()


def eager_policy(i: Inputs) -> Tensor:
    logits = i.hidden @ i.weight.t()
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    found = log_p.gather(-1, i.target[..., None])[..., 0]
    return policy(found, -(log_p.exp() * log_p).sum(-1), i.advantages)


def fused_policy() -> Callable[[Inputs], Tensor]:
    """By the one-pass form where there is one; by verl's call of the Function else."""
    import liger_kernel.ops
    from liger_kernel import functional

    once = getattr(functional, "linear_logprobs_loss", None)

    def fused(i: Inputs) -> Tensor:
        if once is not None:
            of = lambda f: (policy(f.log_prob, f.entropy, i.advantages), ())  # noqa: E731
            loss: Tensor = once(of, i.hidden, i.weight, i.target, entropy=True)[0]
            return loss
        apply = liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction.apply
        flat = i.hidden.flatten(0, 1), i.weight, i.target.flatten()
        nll, entropy = (t.view(i.target.shape) for t in apply(*flat, 1.0, -100, 1, True))
        return policy(-nll, entropy, i.advantages)

    return fused


class Loss(NamedTuple):
    eager: Callable[[Inputs], Tensor]
    fused: Callable[[], Callable[[Inputs], Tensor]]  # from whichever liger_kernel is imported
    products: int  # of B T H V multiplications and additions each


LOSSES = {
    "dpo": Loss(eager_dpo, fused_dpo, 4),  # with a reference model
    "grpo": Loss(eager_grpo, fused_grpo, 3),
    "policy-entropy": Loss(eager_policy, fused_policy, 3),
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
    row["tflop_s"] = 2 * loss.products * math.prod(shapes.LOSSES[shape]) / row["ms"] / 1e9
    if device == "cuda":
        row["peak_mb"] = peak_mb(call)
    return row


def measure_mode(
    report: children.Report, mode: str, site: str | None, shape: str, device: str
) -> None:
    if mode in ("incumbent", "base"):
        sources.become(site)
    for name, loss in LOSSES.items():
        row: Row = {"loss": name, "case": shape, "mode": mode}
        try:
            row.update(measured(loss, mode, shape, device))
        except Exception as error:
            row["error"] = said(error)
        report(row)


def main(argv: list[str] | None = None) -> int:
    parser = MeasuringParser("losses", __doc__, "json", "base", "peer-site")
    parser.add_argument("--modes", default="ours,eager", help=f"of {','.join(MODES)}")
    parser.add_argument("--shape", default=next(iter(shapes.LOSSES)), choices=shapes.LOSSES)
    args = parser.read(argv)
    modes = parser.listed(args, "mode", args.modes, MODES)
    path = args.json or default_path(args.device)
    run = describe_run(args.device, incumbent=sources.site_version(args.peer_site))
    complete = 0
    for mode in modes:
        try:
            with sources.folder_of(mode, args.peer_site, args.base) as site:
                for row in children.rows(measure_mode, mode, site, args.shape, args.device):
                    complete += "ms" in row
                    found = (
                        row.get("error") or f"{row['ms']:.1f} ms, {row.get('peak_mb', 0):.0f} MB"
                    )
                    print(f"{row['loss']:8} {row['case']:20} {row['mode']:10} {found}", flush=True)
                    keep(path, "chunked", run, [row])
        except children.ChildError as error:
            print(f"{mode}: {error}", file=sys.stderr)
    return int(complete < len(modes) * len(LOSSES))
