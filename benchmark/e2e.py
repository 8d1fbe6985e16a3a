"""Full training steps: forward, backward and fused AdamW on a HuggingFace model of a known shape, random weights.

    python -m benchmark e2e                                            # the whole table, stock and patched
    python -m benchmark e2e --shape qwen3-0.6b --seq 512 --batch 4     # one row
    python -m benchmark e2e --rank 16                                  # those with LoRA; "stock" is PEFT alone
    python -m benchmark e2e --modes patched,incumbent --peer-site DIR  # DIR: pip install --target DIR liger-kernel
    python -m benchmark e2e --device cpu --shape tiny --quick          # does it run at all?

Each mode runs in a process of its own, row after row, on the same random tokens; the losses must agree. The rows are
merged into benchmark/results/<gpu>.json. To add a row, add it to `shapes.STEPS`; to add a mode, add it to `MODES`.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmark import children, sources
from benchmark.measure import release, synchronize
from benchmark.options import MeasuringParser
from benchmark.results import Row, default_path, describe_run, keep, said
from benchmark.shapes import MODELS, STEPS, Setup
from liger_kernel.cli.paper import LiveBytes


def _stock(model: Any) -> Any:
    return model


def _patched(model: Any, **options: Any) -> Any:
    import liger_kernel

    print(liger_kernel.patch(model, **options))
    return model


def _incumbent(model: Any) -> Any:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)
    return model


def _reading(model: Any) -> Any:
    """As a metric on the logits of every step would."""

    def read(model: Any, args: Any, output: Any) -> None:
        output.logits.argmax(-1)

    _patched(model).register_forward_hook(read)
    return model


def _accurate(model: Any) -> Any:
    """Accuracy without logits, in every step."""
    accuracy = {"return_token_accuracy": True}
    _patched(model).register_forward_pre_hook(
        lambda model, args, kwargs: (args, {**kwargs, **accuracy}), with_kwargs=True
    )
    return model


def _compiled(model: Any) -> Any:
    return torch.compile(model, dynamic=False)


#: mode -> what it does to the model
MODES: dict[str, Callable[[Any], Any]] = {
    "stock": _stock,
    "patched": _patched,
    "patched+logits": _reading,
    "patched+accuracy": _accurate,
    "incumbent": _incumbent,
    "base": _patched,
    "compile": _compiled,
    "no-residual": partial(_patched, residual=False),
    "tiled-mlp": partial(_patched, tiled_mlp=True),
    "patched+graphs": partial(_patched, cuda_graphs=True),
    "patched+compile": lambda model: _compiled(_patched(model)),
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = MeasuringParser("e2e", __doc__, "json", "base", "peer-site")
    add = parser.add_argument
    add("--shape", choices=MODELS, help="one model; default: the whole table")
    add("--seq", type=int)
    add("--batch", type=int)
    add("--checkpointing", action="store_true", help="gradient checkpointing")
    add("--rank", type=int, help="of LoRA on all linears; 0: none")
    add("--ignored", type=float, default=0.0, metavar="PART", help="of the labels, as prompts are")
    add("--modes", default="stock,patched", help=f"of {','.join(MODES)}; default: %(default)s")
    add("--steps", type=int, default=10, help="measured, after --warmup; default: %(default)s")
    add("--warmup", type=int, default=4)
    add("--quick", action="store_true", help="3 steps after 2")
    add("--timeout", type=int, default=300, help="seconds for one mode of one row")
    args = parser.read(argv)
    args.modes = parser.listed(args, "mode", args.modes, MODES)
    if args.quick:
        args.steps, args.warmup = 3, 2
    return args


def build(row: Setup, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {"attn_implementation": "sdpa", **MODELS[row.shape]}
    attention = given.pop("attn_implementation")
    config = AutoConfig.for_model(**given, max_position_embeddings=row.seq, use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    if row.weights:
        quantise(model.model, row.weights)
    if row.rank:
        from peft import LoraConfig, get_peft_model

        targets: Any = "all-linear"
        if row.head:
            linears = (n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
            targets = sorted({name.rpartition(".")[2] for name in linears})
        adapters = LoraConfig(r=row.rank, lora_alpha=2 * row.rank, target_modules=targets)
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    if row.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def quantise(body: Any, weights: str) -> None:
    """Put layers of bitsandbytes in the place of all Linears."""
    nn: Any = importlib.import_module("bitsandbytes.nn")
    for path, linear in list(body.named_modules()):
        if type(linear) is not torch.nn.Linear:
            continue
        sizes = linear.in_features, linear.out_features, False
        layer = (
            nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            if weights == "int8"
            else nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type=weights)
        )
        layer.load_state_dict(linear.state_dict())
        parent, _, name = path.rpartition(".")
        setattr(body.get_submodule(parent), name, layer.to(linear.weight.device))


def step(
    model: Any, optimizer: Any, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, tuple[float, ...]]:
    """The loss; seconds until forward, backward and optimizer were queued, and until all was done."""
    device = tokens.device.type
    synchronize(device)
    marks = [time.perf_counter()]
    loss = model(input_ids=tokens, labels=labels).loss
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    marks.append(time.perf_counter())
    synchronize(device)
    return loss, tuple(mark - marks[0] for mark in (*marks[1:], time.perf_counter()))


def train(args: argparse.Namespace, row: Setup, mode: str) -> Row:
    """One mode of one row, in this process."""
    device = args.device
    model = MODES[mode](build(row, device))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    generator = torch.Generator(device).manual_seed(0)
    shape, classes = (row.batch, row.seq), MODELS[row.shape]["vocab_size"]
    batches = [torch.randint(classes, shape, generator=generator, device=device) for _ in range(2)]
    unused = torch.rand(shape, generator=generator, device=device) < args.ignored
    seconds = []
    for number in range(args.warmup + args.steps):
        if number == args.warmup and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        tokens = batches[number % 2]
        loss, (*_, done) = step(model, optimizer, tokens, tokens.masked_fill(unused, -100))
        seconds.append(done)
        last = loss.item()
    median = statistics.median(seconds[args.warmup :])
    if device == "cuda":  # what graphs work in is not allocated, but reserved
        graphs = mode == "patched+graphs"
        peak = torch.cuda.max_memory_reserved() if graphs else torch.cuda.max_memory_allocated()
    else:
        with LiveBytes(model) as live:  # counts what is made inside, and slows it
            step(model, optimizer, tokens, tokens)
        states = (t for state in optimizer.state.values() for t in state.values())
        peak = live.peak + sum(t.nbytes for t in (*model.parameters(), *states))
    return {
        "tokens_per_s": row.batch * row.seq / median,
        "step_ms": 1e3 * median,
        "peak_gb": peak / 1e9,
        "loss": last,
        "steps": args.warmup + args.steps,
    }


def train_rows(
    report: children.Report,
    args: argparse.Namespace,
    rows: list[Setup],
    mode: str,
    site: str | None,
) -> None:
    """One mode of all rows; nothing is kept from one row to the next."""
    if mode in ("incumbent", "base"):
        sources.become(site)
    for row in rows:
        try:
            found = train(args, row, mode)
        except Exception as error:
            found = {"error": said(error)}
        report(found)
        torch._dynamo.reset()
        release()


def in_child(args: argparse.Namespace, rows: list[Setup], mode: str) -> Iterator[Row]:
    keys = [{**row._asdict(), "mode": mode, "ignored": args.ignored} for row in rows]
    try:
        with sources.folder_of(mode, args.peer_site, args.base) as site:
            for found in children.rows(train_rows, args, rows, mode, site, seconds=args.timeout):
                yield {**keys.pop(0), **found}
    except children.ChildError as error:
        yield from ({**key, "error": str(error)} for key in keys)


def line(row: dict[str, Any]) -> str:
    name = (
        f"{row['shape']:20} S{row['seq']} B{row['batch']}{' ckpt' if row['checkpointing'] else ''}"
        + (f" r{row['rank']}{'+head' * row['head']} {row['weights']}" if row["rank"] else "")
        + (f" {row['ignored']:.0%} ignored" if row["ignored"] else "")
    )
    if "error" in row:
        return f"{name:36} {row['mode']:16} {row['error']}"
    memory = f"{row['peak_gb']:7.{1 if row['peak_gb'] > 1 else 3}f} GB"
    return f"{name:36} {row['mode']:16} {row['tokens_per_s']:10.0f} tokens/s {memory}  loss {row['loss']:.4f}"


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    asked = {"shape": args.shape, "seq": args.seq, "rank": args.rank}
    rows = [r for r in STEPS if all(v in (None, getattr(r, name)) for name, v in asked.items())]
    sizes = args.seq or 64, args.batch or 2, args.checkpointing, args.rank or 0
    if args.shape and ((args.seq and args.batch) or not rows):
        rows = [Setup(args.shape, *sizes)]
    path = args.json or default_path(args.device)
    run = describe_run(
        args.device, warmup=args.warmup, incumbent=sources.site_version(args.peer_site)
    )
    found = []
    for mode in args.modes:
        for row in in_child(args, rows, mode):
            found.append(row)
            print(line(row), flush=True)
            keep(path, "e2e", run, [row])
    print(f"{len(found)} rows in {path}")
    return 1 if any("error" in row for row in found) else 0
