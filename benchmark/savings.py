"""What `PatchReport.savings` predicts against what a training step needs less.

    python -m benchmark savings --out savings.json        # real vocabularies, peak memory of the GPU
    python -m benchmark savings --device cpu              # tiny ones, bytes of the living tensors, interpreted kernels

Each case is a model of few layers, whose peak is its loss. Forward and backward run twice without and twice with the
fused loss, nothing else patched; the peaks are those of the second runs. Ends with 1 if a prediction is off by a tenth.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmark.options import MeasuringParser
from benchmark.results import describe_run
from benchmark.shapes import SAVINGS, Saving
from benchmark.tables import markdown
from liger_kernel.cli.paper import LiveBytes

LOSS_ONLY = {"rms_norm": False, "layer_norm": False, "mlp": False, "rope": False}
OFF = 0.1


def build(case: Saving, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        case.model_type,
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=2 * case.hidden,
        num_hidden_layers=2,
        num_attention_heads=case.hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=case.seq,
        tie_word_embeddings=case.tied,
        pad_token_id=0,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    head = model.get_output_embeddings()
    for p in model.parameters():
        p.requires_grad_(case.frozen != ("head" if p is head.weight else "body"))
    return model.train()


def step(case: Saving, model: Any, tokens: torch.Tensor) -> None:
    device_type = tokens.device.type
    model.zero_grad(set_to_none=True)
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=case.autocast):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()


def peak(case: Saving, model: Any, tokens: torch.Tensor) -> int:
    """Bytes in use at most during a step; of more than the first one's, which compiles and fetches workspaces."""
    if tokens.device.type == "cpu":
        with LiveBytes(model) as counted:
            step(case, model, tokens)
        return counted.peak
    step(case, model, tokens)
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(case, model, tokens)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure(case: Saving, device: str, **options: Any) -> dict[str, Any]:
    """The row of one case; `options` go to `patch`."""
    import liger_kernel

    torch.manual_seed(0)
    model = build(case, device)
    tokens = torch.randint(1, case.vocab, (case.batch, case.seq), device=device)
    stock = peak(case, model, tokens)
    with liger_kernel.patched(model, **LOSS_ONLY, **options) as report:
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=case.autocast):
            predicted = report.savings(case.batch, case.seq)
        patched = peak(case, model, tokens)
    measured = stock - patched
    return {
        **asdict(case),
        "stock_peak": stock,
        "patched_peak": patched,
        "predicted": predicted,
        "measured": measured,
        "ratio": predicted / measured,
    }


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Peaks and savings in MiB."""
    sizes = ("stock_peak", "patched_peak", "measured", "predicted")
    header = ("case", "tokens", *(f"{name}, MiB" for name in sizes), "predicted / measured")
    lines = (
        (row["name"], str(row["batch"] * row["seq"]), *(f"{row[n] / 2**20:.1f}" for n in sizes), f"{row['ratio']:.3f}")
        for row in rows
    )  # fmt: skip
    return markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = MeasuringParser("savings", __doc__)
    parser.add_argument("--cases", nargs="*", metavar="NAME", help="those that begin so")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.read(argv)
    chosen = [c for c in SAVINGS if not args.cases or c.name.startswith(tuple(args.cases))]
    interpreted: Any = contextlib.nullcontext()
    if args.device == "cpu":  # the plain path makes copies that kernels do not
        os.environ["TRITON_INTERPRET"] = "1"
        from liger_kernel.backends import use_implementation

        # and adds 16-bit factors into an fp32 sum in another way
        chosen = [case.tiny() for case in chosen if not case.autocast]
        interpreted = use_implementation("triton")
    rows = []
    with interpreted:
        for case in chosen:
            rows.append(measure(case, args.device))
            gc.collect()
    print(show(rows))
    if args.out:
        content = {"run": describe_run(args.device), "rows": rows}
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(abs(row["ratio"] - 1) > OFF for row in rows))
