"""Which replacement pays: one model in one process, patched with one kind at a time, in turns.

    python -m benchmark ablation --shape qwen3-0.6b --seq 512 --batch 4

Host-bound steps differ by a third from one minute to the next on a shared machine; variants that take turns meet the
same weather. Prints the median step, and how long the host was busy until forward, backward and optimizer were queued.
"""

from __future__ import annotations

import statistics
from collections import defaultdict

import torch

import liger_kernel
from benchmark.e2e import build, step
from benchmark.options import MeasuringParser
from benchmark.shapes import MODELS, Setup

KINDS = ("fused_linear_cross_entropy", "rms_norm", "mlp", "rope")
VARIANTS: dict[str, tuple[str, ...]] = {
    "stock": (),
    **{kind: (kind,) for kind in KINDS},
    "all": KINDS,
}
STEPS = 6


def main(argv: list[str] | None = None) -> int:
    parser = MeasuringParser("ablation", __doc__)
    parser.add_argument("--shape", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.read(argv)
    model = build(Setup(args.shape, args.seq, args.batch), args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    shape = (args.batch, args.seq)
    tokens = torch.randint(MODELS[args.shape]["vocab_size"], shape, device=args.device)
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for turn in range(args.rounds):
        for name, kinds in VARIANTS.items():
            warmup = 1 if turn else 4  # the first turn compiles
            wanted = {kind: kind in kinds for kind in KINDS}
            with liger_kernel.patched(model, **wanted, layer_norm=False):
                steps = [step(model, optimizer, tokens, tokens)[1] for _ in range(warmup + STEPS)]
            found[name] += steps[warmup:]
    for name, steps in found.items():
        forward, backward, queued, done = (
            1e3 * statistics.median(column) for column in zip(*steps, strict=True)
        )
        rate = tokens.numel() / done * 1e3
        print(
            f"{name:28} {done:8.2f} ms {rate:9.0f} tokens/s   host: forward {forward:6.2f}", end=""
        )
        print(f"  + backward {backward:6.2f}  + optimizer {queued:6.2f}")
    return 0
