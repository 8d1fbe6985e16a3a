"""The longest sequence that a training step with LoRA fits into the memory of a GPU.

    python -m benchmark longest                                   # 2 and 4 layers of Llama-3.1-8B, and from these 32
    python -m benchmark longest --attention hollow                # minutes less: see below
    python -m benchmark longest --seq 65536 --layers 4 --options none,plain,tiled_mlp,long_context
    python -m benchmark longest --seq 131072,262144 --shape llama-3.1-8b --layers 32 --attention hollow
    python -m benchmark longest --device cpu --shape tiny --limit 0.1 --attention hollow   # does it run at all?

A process builds the deepest model, and takes layers off it for the next depth. For each it runs steps (forward,
backward and optimizer; batch 1, gradient checkpointing): two short ones, whose peaks give the bytes of a token; then it
bisects, from where these say that the memory ends, until the longest sequence that fits and the shortest that does not
are 1 % apart. Peaks and ends are measured. Each step is printed as it ends. After `--within` seconds no other begins:
a depth may take its share of what is left, and a step is not begun that would take longer, as the last one tells.

A deeper model is not: its peak is taken to be `a + b S`, where a and b, fitted for each depth, are linear in the depth.
That is exact for weights, for adapters and for what checkpointing keeps of each layer.

`--attention hollow` leaves out the attention, whose time is quadratic and most of it here. It takes the memory that
the real one takes, forward and backward, as measured at 8192 tokens. `--seq` measures these lengths, and searches
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmark import children
from benchmark.measure import release, synchronize
from benchmark.options import MeasuringParser
from benchmark.results import Row, said
from benchmark.shapes import MODELS
from liger_kernel.cli.paper import LiveBytes

#: what `--options` may name: none (stock HuggingFace), plain (patch), and options of patch
STOCK, PLAIN = "none", "plain"
#: the first two lengths on a GPU, of which the peaks tell the next one, and the part of a length to which it goes on
FIRST, CLOSE = (16384, 65536), 0.01
MULTIPLE = 256


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = MeasuringParser("longest", __doc__)
    add = parser.add_argument
    add("--shape", choices=MODELS, default="llama-3-8b-4-layers", help="default: %(default)s")
    add("--layers", default="2,4", help="depths that are measured; default: %(default)s")
    add("--to", type=int, default=32, metavar="LAYERS", help="the depth of the forecast")
    add("--rank", type=int, default=16, help="of LoRA on all linears; default: %(default)s")
    add("--options", default="long_context", help="of patch, or plain, or none")
    add("--attention", choices=("real", "hollow"), default="real")
    add("--seq", help="measure these lengths, as 65536,131072, in place of the search")
    add("--limit", type=float, metavar="GB", help="of memory; default: all there is")
    add("--within", type=int, default=600, metavar="SECONDS", help="for all; default: %(default)s")
    add("--timeout", type=int, default=900, help="seconds for one step")
    args = parser.read(argv)
    args.layers = [int(n) for n in args.layers.split(",")]
    args.options = args.options.split(",")
    args.seq = [int(n) for n in args.seq.split(",")] if args.seq else []
    if args.device == "cpu" and not args.limit:
        parser.error("--device cpu needs --limit: the memory of the host is no bound")
    return args


def build(args: argparse.Namespace) -> Any:
    """The model, as deep as the deepest, with adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**MODELS[args.shape], "num_hidden_layers": max(args.layers)}
    config = AutoConfig.for_model(**shape, max_position_embeddings=2**20, use_cache=False)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    adapters = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def cut(model: Any, layers: int) -> None:
    """Take the last layers off."""
    body = model.get_base_model().model
    body.layers = body.layers[:layers]
    body.config.num_hidden_layers = layers


def patch(model: Any, options: str) -> None:
    import liger_kernel

    liger_kernel.unpatch(model)
    if options != STOCK:
        liger_kernel.patch(model, **({} if options == PLAIN else {options: True}))


def step(model: Any, optimizer: Any, seq: int, device: str) -> Row:
    """One training step: its seconds, and the most bytes that were in use."""
    counted: Any = contextlib.nullcontext()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        counted = LiveBytes(nn.Module())
        counted.live = sum(p.nbytes for p in model.parameters())
    tokens = torch.randint(MODELS["tiny"]["vocab_size"], (1, seq), device=device)
    synchronize(device)
    start = time.perf_counter()
    with counted:
        model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else counted.peak
    return {"seq": seq, "peak_gb": peak / 1e9, "tokens_per_s": seq / seconds, "seconds": seconds}


def memory(args: argparse.Namespace) -> float:
    """Bytes that a step may take."""
    total = torch.cuda.mem_get_info()[0] if args.device == "cuda" else float("inf")
    return min(total, args.limit * 1e9 if args.limit else total)


def work(report: children.Report, args: argparse.Namespace) -> None:
    """Reports each step, and in between what is done."""
    start = time.monotonic()

    def say(what: str) -> None:
        report({"note": f"{what} [{time.monotonic() - start:.0f} s]"})

    room = memory(args)
    say(f"{room / 1e9:.1f} GB of memory; building {max(args.layers)} layers of {args.shape}")
    if args.device == "cuda" and args.limit:
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    runs = [(n, options) for n in sorted(args.layers, reverse=True) for options in args.options]
    with contextlib.ExitStack() as stack:
        if args.attention == "hollow":
            stack.enter_context(hollow(args, say))
        model = build(args)
        for i, (layers, options) in enumerate(runs):
            cut(model, layers)
            patch(model, options)
            left = args.within - (time.monotonic() - start)
            best = measure(report, args, model, (layers, options), room, left / (len(runs) - i))
            if not args.seq:
                say(f"{layers:3} layers {options}: longest {best:,} tokens")


def measure(
    report: children.Report,
    args: argparse.Namespace,
    model: Any,
    names: tuple[int, str],
    room: float,
    seconds: float,
) -> int:
    """The longest sequence of one model, within these seconds; or the lengths of `--seq`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=args.device == "cuda")
    end = time.monotonic() + seconds
    step(model, optimizer, MULTIPLE, args.device)  # compiles, and fetches workspaces
    last: Row = {}

    def trial(seq: int) -> Row | None:
        nonlocal last
        found: Row | None = None
        if last and time.monotonic() + last["seconds"] * (seq / last["seq"]) > end:
            raise OutOfTime
        try:
            last = found = step(model, optimizer, seq, args.device)
        except torch.OutOfMemoryError as error:
            found = {"seq": seq, "error": said(error)}
        optimizer.zero_grad(set_to_none=True)
        release()
        if found.get("peak_gb", 0) * 1e9 > room:
            found = {"seq": seq, "error": f"over {room / 1e9:.3g} GB"}
        report({"layers": names[0], "options": names[1], "room_gb": room / 1e9, **found})
        return None if "error" in found else found

    if not args.seq:
        return search(trial, room, [n if args.device == "cuda" else n // 128 for n in FIRST])
    for seq in args.seq:
        with contextlib.suppress(OutOfTime):
            if trial(seq) is not None and args.attention == "real":
                trial(seq)  # once more with the host memory there, for the time
    return 0


class OutOfTime(Exception):
    """The next step would end too late."""


def search(trial: Callable[[int], Row | None], room: float, first: list[int]) -> int:
    """The longest sequence that fits, or 0; when time is up, the longest that did."""
    fits: dict[int, float] = {}
    with contextlib.suppress(OutOfTime):
        return _search(trial, room, first, fits)
    return max(fits, default=0)


def _search(
    trial: Callable[[int], Row | None], room: float, first: list[int], fits: dict[int, float]
) -> int:
    fails = 0
    for seq in first:
        found = trial(seq)
        if found is None:
            fails = seq
            break
        fits[seq] = found["peak_gb"] * 1e9
    while True:
        best = max(fits, default=0)
        if fails and fails - best <= max(MULTIPLE, CLOSE * best):
            return best
        seq = (best + fails) // 2 if fails else 2 * best
        if len(fits) > 1 and best < 0.9 * (
            fails or 2 * best
        ):  # far from the end: where two peaks say that it is
            *_, one, two = sorted(fits)
            a, b = line(one, fits[one], two, fits[two])
            guess = int((room - a) / b) if b > 0 else 2 * best
            seq = min(guess, int(0.97 * fails) if fails else guess)
            if guess <= best / 0.9 and not fails:
                seq = int(best * (1 + CLOSE))
        seq = max(MULTIPLE, seq // MULTIPLE * MULTIPLE)
        if seq in fits or seq == fails:
            return best
        found = trial(seq)
        if found is None:
            fails = seq
        else:
            fits[seq] = found["peak_gb"] * 1e9


def line(x1: float, y1: float, x2: float, y2: float) -> tuple[float, float]:
    """(a, b) of a + b x through two points."""
    b = (y2 - y1) / (x2 - x1)
    return y1 - b * x1, b


def forecast(rows: list[Row], depth: int, hidden: int) -> str:
    """The longest sequence of a deeper model, of the rows of two depths."""
    fits: dict[int, list[Row]] = {}
    for row in rows:
        if "error" not in row:
            fits.setdefault(row["layers"], []).append(row)
    fits = {n: sorted(of, key=lambda row: row["seq"]) for n, of in fits.items() if len(of) > 1}
    if len(fits) < 2:
        return f"{depth} layers: two depths with two lengths each are needed, {len(fits)} are there"
    of_depth = {
        n: line(of[0]["seq"], of[0]["peak_gb"], of[-1]["seq"], of[-1]["peak_gb"])
        for n, of in fits.items()
    }
    low, high = min(of_depth), max(of_depth)
    a, b = (
        sum(f * g for f, g in zip(line(low, of_depth[low][i], high, of_depth[high][i]), (1, depth), strict=True))
        for i in (0, 1)
    )  # fmt: skip
    # what of the memory the longest of each depth could use
    used = min(of[-1]["peak_gb"] for of in fits.values())
    longest = max(0, int((used - a) / b)) if b > 0 else 0
    return (
        f"{depth} layers, not measured: {a:.2f} GB + {b * 1e6:.2f} kB a token; in the {used:.1f} GB that were used of "
        f"{rows[0]['room_gb']:.1f}: {longest:,} tokens, {2e-9 * depth * hidden * longest:.0f} GB of checkpoints"
    )


# -- attention without its time ------------------------------------------------------------


class _Hollow(torch.autograd.Function):
    """Takes and keeps what the fused kernel takes and keeps; its numbers mean nothing."""

    @staticmethod
    def forward(ctx: Any, scratch: tuple[float, float], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, width = q.shape
        out = q.new_empty(batch, length, heads, width).transpose(1, 2)
        take(q, scratch[0])
        out.copy_(q)
        ctx.scratch = scratch[1]
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        found = [torch.empty_like(t).copy_(t) for t in (q, k, v)]
        take(q, ctx.scratch)
        return None, *found


def take(q: Tensor, per_token: float) -> None:
    torch.empty(int(per_token * q.shape[0] * q.shape[2]), dtype=torch.uint8, device=q.device)


def scratch(args: argparse.Namespace, tokens: int = 8192) -> tuple[float, float]:
    """Bytes a token that the real attention takes beside its results, forward and backward."""
    if args.device == "cpu":
        return 0.0, 0.0
    shape = MODELS[args.shape]
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    width = shape.get("head_dim", shape["hidden_size"] // heads)
    q, k, v = (
        torch.randn(1, tokens, n, width, device=args.device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for n in (heads, groups, groups)
    )
    call = nn.functional.scaled_dot_product_attention
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call(q, k, v, is_causal=True, enable_gqa=True)
    forward = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    dy = torch.randn_like(out)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = torch.autograd.grad(out, (q, k, v), dy, retain_graph=True)
    backward = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in found)
    return forward / tokens, backward / tokens


@contextlib.contextmanager
def hollow(args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[None]:
    extra = scratch(args)

    def attention(q: Tensor, k: Tensor, v: Tensor, *others: Any, **options: Any) -> Tensor:
        out: Tensor = _Hollow.apply(extra, q, k, v)
        return out

    say("attention takes {:.0f} and {:.0f} bytes a token beside its results".format(*extra))
    with mock.patch.object(nn.functional, "scaled_dot_product_attention", attention):
        yield


def told(row: Row) -> str:
    name = f"{row['layers']:3} layers {row['options']:14} S {row['seq']:>9,}"
    if "error" in row:
        return f"{name}  {row['error'][:60]}"
    return f"{name}  {row['peak_gb']:7.2f} GB {row['tokens_per_s']:10,.0f} tokens/s"


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # no gaps
    rows: list[Row] = []
    print("starting a process ...", flush=True)
    try:
        for row in children.rows(work, args, seconds=args.timeout):
            rows += [] if "note" in row else [row]
            print(row.get("note") or told(row), flush=True)
    except children.ChildError as error:
        print(error)
        return 1
    for options in args.options:
        if not args.seq and len(args.layers) > 1:
            of = [row for row in rows if row["options"] == options]
            print(options, forecast(of, args.to, MODELS[args.shape]["hidden_size"]))
    return 0
