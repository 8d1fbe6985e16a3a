"""Measure this library beside its peers, on a machine that does nothing else. Run from the repository's root."""

from __future__ import annotations

import importlib
import sys

from benchmark import sources

COMMANDS = {
    "run": "ops: time, memory and share of the ceiling, beside eager, torch.compile and other packages",
    "e2e": "training steps of whole models",
    "sharded": "training steps over several GPUs, by DDP and FSDP2",
    "losses": "preference and RL losses, from hidden states to gradients",
    "trl_head": "training steps by the fused head of TRL's trainers",
    "cpu": "ops on a processor, beside eager PyTorch",
    "host": "how long Python is busy with a call",
    "savings": "what the patch report predicts against what a step needs less",
    "longest": "the longest sequence that a training step with LoRA fits into memory",
    "ablation": "which replacement in a model pays",
    "budget": "the fused loss against its memory budget",
    "results": "merge files of results",
    "tables": "results as Markdown, printed or put into pages",
    "plots": "results as SVG, for light and for dark pages",
}
ON_FILES = ("results", "tables", "plots")


def main(argv: list[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    wrong = None
    if name in ("-h", "--help"):
        rows = (f"  python -m benchmark {command:9} {why}" for command, why in COMMANDS.items())
        print(__doc__, *rows, "\n--help after a command shows its options.", sep="\n")
        return 0
    if name not in COMMANDS:
        wrong = f"unknown command {name!r}; known: {', '.join(COMMANDS)}"
    elif name not in ON_FILES:
        wrong = sources.not_ours()
    if wrong:
        print(f"python -m benchmark: {wrong}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"benchmark.{name}").main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
