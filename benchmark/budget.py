"""Time and memory of the fused loss against its memory budget: neither may get worse as the budget grows.

python -m benchmark budget [--shape 8192x4096x128256] [--device cpu]
"""

from __future__ import annotations

import re
from functools import partial

import torch

from benchmark.measure import host_inclusive, peak_mb
from benchmark.options import MeasuringParser
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernel.testing.calls import drawing_on


def step(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, budget: int | None
) -> object:
    loss = fused_linear_cross_entropy(hidden, weight, target, memory_budget=budget)[0]
    return torch.autograd.grad(loss, (hidden, weight))


def main(argv: list[str] | None = None) -> int:
    parser = MeasuringParser("budget", __doc__)
    parser.add_argument("--shape", default="8192x4096x128256", help="tokens x hidden x classes")
    args = parser.read(argv)
    if not re.fullmatch(r"\d+x\d+x\d+", args.shape):
        parser.error(f"--shape {args.shape} is not tokens x hidden x classes, as 8192x4096x128256")
    rows, hidden, classes = map(int, args.shape.split("x"))
    with drawing_on(args.device, torch.bfloat16) as make:
        states = make.randn(rows, hidden).requires_grad_()
        weight = make.randn(classes, hidden, scale=hidden**-0.5).requires_grad_()
        target = make.labels(rows, classes, 0.0)
    most = 2 * rows * classes
    print(f"{args.shape}, bf16: budget MB, ms, peak MB above the inputs")
    for budget in [None, *(most // 2**i for i in range(7, -1, -1))]:
        call = partial(step, states, weight, target, budget)
        ms = host_inclusive(call, args.device, 150).ms
        memory = f"{peak_mb(call):9.0f}" if args.device == "cuda" else ""
        print(f"{'default' if budget is None else f'{budget / 1e6:.0f}':>9} {ms:9.2f} {memory}")
    return 0
