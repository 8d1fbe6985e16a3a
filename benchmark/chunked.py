"""Losses of preference tuning and RL, from hidden states to gradients: ours, PyTorch over all logits, the incumbent.

    python benchmark/chunked.py                                      # ours and eager
    python benchmark/chunked.py --modes incumbent --peer-site DIR    # DIR: pip install --target DIR liger-kernel
    python benchmark/chunked.py --device cpu --shape tiny            # does it run at all?

Each mode runs in a process of its own, because the incumbent has our import name. Its loss and gradients are compared
with float64 on a small shape first: where ours is wrong it gets no time, the incumbent a mark. The rows are merged
into benchmark/results/<gpu>.json. To add a loss, add an entry to `LOSSES`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import sources  # first of ours: decides which liger_kernel is imported
import torch
import torch.nn.functional as F
from measure import host_inclusive, peak_mb
from results import default_path, describe_run, load, merge, save
from torch import Tensor

from liger_kernel.testing import assert_no_worse

MODES = ("ours", "eager", "incumbent")
SHAPES = {  # sequences, tokens of each, hidden size, classes
    "8x1024x4096x128256": (8, 1024, 4096, 128256),
    "tiny": (4, 8, 16, 64),
}
CHECKED = (4, 64, 256, 1000)
RESULT_MARK = "@result "


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
    return lambda i: module(i.hidden, i.weight, i.target, torch.ones_like(i.target), i.advantages)[
        0
    ]


class Loss(NamedTuple):
    eager: Callable[[Inputs], Tensor]
    fused: Callable[[], Callable[[Inputs], Tensor]]  # from whichever liger_kernel is imported
    products: int  # of B T H V multiplications and additions each


LOSSES = {
    "dpo": Loss(eager_dpo, fused_dpo, 4),  # with a reference model
    "grpo": Loss(eager_grpo, fused_grpo, 3),
}


def stepped(function: Callable[[Inputs], Tensor], i: Inputs) -> list[Tensor]:
    loss = function(i)
    return [loss.detach(), *torch.autograd.grad(loss, [i.hidden, i.weight])]


def wrong(loss: Loss, function: Callable[[Inputs], Tensor], device: str) -> str | None:
    """What of the loss and its gradients is less exact than the project's rule allows."""
    given = inputs(CHECKED, device, torch.bfloat16)
    exact = Inputs(
        *(t.detach().double() if t.is_floating_point() else t for t in given[:2]),
        given.target,
        *(t.double() for t in given[3:]),
    )
    exact.hidden.requires_grad_()
    exact.weight.requires_grad_()
    runs = stepped(function, given), stepped(loss.eager, given), stepped(loss.eager, exact)
    for name, mine, low, high in zip(("loss", "dX", "dW"), *runs, strict=True):
        try:
            assert_no_worse(name, mine.to(low.dtype), high, low)
        except AssertionError as error:
            return str(error)
    return None


def worker(args: argparse.Namespace) -> None:
    """One mode, in this process: a line of JSON per loss."""
    if args.modes == "incumbent":  # from here on, what a loss imports is the incumbent's
        sources.become_peer(sources.PACKAGE, args.peer_site)
    for name, loss in LOSSES.items():
        row: dict[str, Any] = {"loss": name, "case": args.shape, "mode": args.modes}
        try:
            function = loss.eager if args.modes == "eager" else loss.fused()
            if reason := wrong(loss, function, args.device):
                if args.modes == "ours":
                    raise ArithmeticError(reason)
                row["compared"] = f"worse: {reason}"
            torch._dynamo.reset()  # or the incumbent compiles for any shape, and fails
            given = inputs(SHAPES[args.shape], args.device, torch.bfloat16)

            def call(
                function: Callable[[Inputs], Tensor] = function, given: Inputs = given
            ) -> list[Tensor]:
                return stepped(function, given)

            row["ms"] = host_inclusive(call, args.device, 300).ms
            batch, length, width, classes = SHAPES[args.shape]
            flops = 2 * loss.products * batch * length * width * classes
            row["tflop_s"] = flops / row["ms"] / 1e9
            if args.device == "cuda":
                row["peak_mb"] = peak_mb(call)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print("\n" + RESULT_MARK + json.dumps(row), flush=True)


def in_child(args: argparse.Namespace, mode: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--modes", mode]
    command += ["--device", args.device, "--shape", args.shape]
    command += ["--peer-site", args.peer_site] if args.peer_site else []
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    marked = [text for text in child.stdout.splitlines() if text.startswith(RESULT_MARK)]
    rows: list[dict[str, Any]] = [json.loads(text.removeprefix(RESULT_MARK)) for text in marked]
    if child.returncode:
        print(f"{mode} ended with code {child.returncode}", file=sys.stderr)
    return rows


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", default="ours,eager", help=f"of {','.join(MODES)}")
    parser.add_argument("--shape", default=next(iter(SHAPES)), choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="default: benchmark/results/<gpu>.json")
    parser.add_argument("--peer-site", help="folder with the incumbent")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.modes.split(",")) - set(MODES)):
        parser.error(f"unknown mode {', '.join(unknown)}; known: {', '.join(MODES)}")
    if "incumbent" in args.modes.split(",") and not args.peer_site:
        parser.error("mode incumbent needs --peer-site: the package has our import name")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --shape tiny checks the program itself")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.worker:
        worker(args)
        return 0
    path = args.json or default_path(args.device)
    run = describe_run(args.device, incumbent=sources.site_version(args.peer_site))
    failed = 0
    for mode in args.modes.split(","):
        rows = in_child(args, mode)
        failed += len(LOSSES) - sum("ms" in row for row in rows)
        for row in rows:
            found = (
                f"{row['ms']:.1f} ms, {row.get('peak_mb', 0):.0f} MB"
                if "ms" in row
                else row["error"]
            )
            print(f"{row['loss']:8} {row['case']:20} {row['mode']:10} {found}", flush=True)
        save(path, merge(load(path), "chunked", run, rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
