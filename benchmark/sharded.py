"""Training steps over several processes: DDP, FSDP2, on GPUs of one machine or, to see that it runs, on a CPU.

    python -m benchmark sharded                                  # Llama-3.2-1B on two GPUs, stock and patched
    python -m benchmark sharded --how fsdp2 --ranks 4 --modes stock,patched,incumbent --peer-site DIR
    python -m benchmark sharded --device cpu --shape tiny --seq 128 --batch 2 --quick

Each set-up runs in processes of its own. Tokens are counted over all ranks; `--batch` and the peak are of one rank.
The rows are merged into benchmark/results/<gpu>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import resource
import statistics
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.multiprocessing.spawn import ProcessException
from torch.nn.parallel import DistributedDataParallel

from benchmark import sources
from benchmark.e2e import MODES, build, step
from benchmark.options import MeasuringParser
from benchmark.results import Row, default_path, describe_run, keep, said
from benchmark.shapes import MODELS, Setup


def _ddp(model: Any, device: torch.device) -> nn.Module:
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def _fsdp2(model: Any, device: torch.device) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    sharded: nn.Module = fully_shard(model, mesh=mesh)
    return sharded


HOW = {"ddp": _ddp, "fsdp2": _fsdp2}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = MeasuringParser("sharded", __doc__, "json", "base", "peer-site")
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes; default: %(default)s")
    add("--how", default="ddp,fsdp2", help="default: %(default)s")
    add("--modes", default="stock,patched", help=f"of {','.join(MODES)}; default: %(default)s")
    add("--shape", choices=MODELS, default="llama-3.2-1b", help="default: %(default)s")
    add("--seq", type=int, default=2048)
    add("--batch", type=int, default=8, help="of one rank; default: %(default)s")
    add("--steps", type=int, default=10, help="measured, after --warmup; default: %(default)s")
    add("--warmup", type=int, default=4)
    add("--quick", action="store_true", help="3 steps after 2")
    args = parser.read(argv)
    args.modes = parser.listed(args, "mode", args.modes, MODES)
    args.how = args.how.split(",")
    parser.only("--how", args.how, HOW)
    if args.device == "cuda" and args.ranks > torch.cuda.device_count():
        parser.error(f"--ranks {args.ranks}, and there are {torch.cuda.device_count()} GPUs")
    if args.quick:
        args.steps, args.warmup = 3, 2
    return args


def train(rank: int, args: argparse.Namespace, how: str, mode: str, meeting: str, out: Any) -> None:
    """One rank; the first one hands on the row."""
    if mode in ("incumbent", "base"):
        sources.become(args.site)
    device = torch.device(f"cuda:{rank}" if args.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank, world_size=args.ranks
    )
    model = HOW[how](
        MODES[mode](build(Setup(args.shape, args.seq, args.batch), str(device))), device
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator(device).manual_seed(rank)
    classes = MODELS[args.shape]["vocab_size"]
    tokens = torch.randint(classes, (args.batch, args.seq), generator=generator, device=device)
    seconds = []
    for number in range(args.warmup + args.steps):
        if number == args.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss, (*_, done) = step(model, optimizer, tokens, tokens)
        seconds.append(done)
    median = statistics.median(seconds[args.warmup :])
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # of the whole process
    if rank == 0:
        tokens_per_s = args.ranks * args.batch * args.seq / median
        out.put(
            {
                "tokens_per_s": tokens_per_s,
                "step_ms": 1e3 * median,
                "peak_gb": peak,
                "loss": loss.item(),
            }
        )
    dist.barrier()
    dist.destroy_process_group()


def measured(args: argparse.Namespace, how: str, mode: str) -> Row:
    context = mp.get_context("spawn")
    out = context.Queue()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        args.site = stack.enter_context(sources.folder_of(mode, args.peer_site, args.base))
        try:
            mp.spawn(train, (args, how, mode, f"{folder}/meeting", out), nprocs=args.ranks)
        except ProcessException as error:
            lines = str(error).strip().splitlines()
            return {"error": said(RuntimeError(lines[-1] if lines else ""))}
        row: Row = out.get()
        return row


def line(row: Row) -> str:
    name = f"{row['shape']} {row['how']:6} {row['ranks']} ranks S{row['seq']} B{row['batch']} {row['mode']:16}"
    if "error" in row:
        return f"{name} {row['error']}"
    return f"{name} {row['tokens_per_s']:10,.0f} tokens/s {row['peak_gb']:7.2f} GB a rank  loss {row['loss']:.4f}"


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    path = args.json or default_path(args.device)
    run = describe_run(
        args.device, warmup=args.warmup, incumbent=sources.site_version(args.peer_site)
    )
    failed = False
    for how, mode in itertools.product(args.how, args.modes):
        setup = {"shape": args.shape, "seq": args.seq, "batch": args.batch, "ranks": args.ranks}
        row = {**setup, "how": how, "mode": mode, **measured(args, how, mode)}
        print(line(row), flush=True)
        keep(path, "sharded", run, [row])
        failed |= "error" in row
    return int(failed)
