"""Which replacement pays: one model in one process, patched with one kind at a time, in turns.

    python benchmark/ablation.py --shape qwen3-0.6b --seq 512 --batch 4

Host-bound steps differ by a third from one minute to the next on a shared machine; variants that take turns meet the
same weather. Prints the median step, and how long the host was busy until forward, backward and optimizer were queued.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from e2e import SHAPES, build, synchronize

import liger_kernel

KINDS = ("fused_linear_cross_entropy", "rms_norm", "mlp", "rope")
VARIANTS: dict[str, tuple[str, ...]] = {
    "stock": (),
    **{kind: (kind,) for kind in KINDS},
    "all": KINDS,
}
STEPS = 6


def step(model: Any, optimizer: Any, tokens: torch.Tensor, device: str) -> tuple[float, ...]:
    """Seconds until forward, backward and optimizer were queued, and until all was done."""
    synchronize(device)
    start = time.perf_counter()
    loss = model(input_ids=tokens, labels=tokens).loss
    marks = [time.perf_counter()]
    loss.backward()
    marks.append(time.perf_counter())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    marks.append(time.perf_counter())
    synchronize(device)
    return tuple(mark - start for mark in (*marks, time.perf_counter()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    model = build(args.shape, args.seq, False, args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    shape = (args.batch, args.seq)
    tokens = torch.randint(SHAPES[args.shape]["vocab_size"], shape, device=args.device)
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for turn in range(args.rounds):
        for name, kinds in VARIANTS.items():
            warmup = 1 if turn else 4  # the first turn compiles
            wanted = {kind: kind in kinds for kind in KINDS}
            with liger_kernel.patched(model, **wanted, layer_norm=False):
                steps = [step(model, optimizer, tokens, args.device) for _ in range(warmup + STEPS)]
            found[name] += steps[warmup:]
    for name, steps in found.items():
        forward, backward, queued, done = (
            1e3 * statistics.median(column) for column in zip(*steps, strict=True)
        )
        rate = tokens.numel() / done * 1e3
        host = (
            f"host: forward {forward:6.2f}  + backward {backward:6.2f}  + optimizer {queued:6.2f}"
        )
        print(f"{name:28} {done:8.2f} ms {rate:9.0f} tokens/s   {host}")


if __name__ == "__main__":
    main()
