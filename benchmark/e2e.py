"""Full training steps: forward, backward and fused AdamW on a HuggingFace model of a known shape, random weights.

    python benchmark/e2e.py                                            # the whole table, stock and patched
    python benchmark/e2e.py --shape qwen3-0.6b --seq 512 --batch 4     # one row
    python benchmark/e2e.py --modes patched,incumbent --peer-site DIR  # DIR: pip install --target DIR liger-kernel
    python benchmark/e2e.py --device cpu --shape tiny --quick          # does it run at all?

Each mode runs in a process of its own, row after row, on the same random tokens; the losses must agree. The rows are
merged into benchmark/results/<gpu>.json. To add a shape, add a row to `SHAPES`; to add a mode, one to `MODES`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import release

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3-8b-4-layers": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


class Setup(NamedTuple):
    """What is trained: a row of the table."""

    shape: str
    seq: int
    batch: int
    checkpointing: bool = False


TABLE = (
    Setup("llama-3.2-1b", 2048, 8),
    Setup("llama-3.2-1b", 16384, 1),
    Setup("llama-3.2-1b", 32768, 1, checkpointing=True),
    Setup("llama-3-8b-4-layers", 4096, 4),
    Setup("qwen3-0.6b", 2048, 8),
    Setup("qwen3-0.6b", 512, 4),
)


def _stock(model: Any) -> Any:
    return model


def _patched(model: Any) -> Any:
    import liger_kernel

    print(liger_kernel.patch(model))
    return model


def _incumbent(model: Any) -> Any:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)
    return model


def _compiled(model: Any) -> Any:
    return torch.compile(model, dynamic=False)


#: mode -> what it does to the model
MODES: dict[str, Callable[[Any], Any]] = {
    "stock": _stock,
    "patched": _patched,
    "incumbent": _incumbent,
    "compile": _compiled,
    "patched+compile": lambda model: _compiled(_patched(model)),
}
RESULT_MARK = "@result "


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, help="one row; default: the whole table")
    parser.add_argument("--seq", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument(
        "--ignored", type=float, default=0.0, metavar="PART", help="of the labels, as prompts are"
    )
    parser.add_argument(
        "--modes", default="stock,patched", help=f"of {','.join(MODES)}; default: %(default)s"
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="measured steps, after --warmup; default: %(default)s"
    )
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="3 steps after 2")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="default: benchmark/results/<gpu>.json")
    parser.add_argument(
        "--peer-site", help="folder with the incumbent, as `pip install --target` makes it"
    )
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one mode of one row")
    parser.add_argument("--worker", metavar="ROWS", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set(args.modes.split(",")) - set(MODES)
    if unknown:
        parser.error(f"unknown mode {', '.join(sorted(unknown))}; known: {', '.join(MODES)}")
    if "incumbent" in args.modes.split(",") and not args.peer_site:
        parser.error("mode incumbent needs --peer-site: the package has our import name")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --shape tiny checks the program itself")
    if args.quick:
        args.steps, args.warmup = 3, 2
    return args


def build(shape: str, seq: int, checkpointing: bool, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(
        values.pop("model_type"), **values, max_position_embeddings=seq, use_cache=False
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def train(args: argparse.Namespace, row: Setup) -> dict[str, Any]:
    """One mode of one row, in this process."""
    device = args.device
    model = MODES[args.modes](build(row.shape, row.seq, row.checkpointing, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator(device).manual_seed(0)
    shape, classes = (row.batch, row.seq), SHAPES[row.shape]["vocab_size"]
    batches = [torch.randint(classes, shape, generator=generator, device=device) for _ in range(2)]
    unused = torch.rand(shape, generator=generator, device=device) < args.ignored
    seconds, losses = [], []
    for step in range(args.warmup + args.steps):
        if step == args.warmup and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        tokens = batches[step % 2]
        synchronize(device)
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens.masked_fill(unused, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    median = statistics.median(seconds[args.warmup :])
    return {
        "tokens_per_s": row.batch * row.seq / median,
        "step_ms": 1e3 * median,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "loss": losses[-1],
        "steps": args.warmup + args.steps,
        "package": str(getattr(sys.modules.get("liger_kernel"), "__file__", None)),
    }


def worker(args: argparse.Namespace) -> None:
    """The other end of `in_child`: a line of JSON per row, and nothing kept from one row to the next."""
    for row in json.loads(args.worker):
        try:
            found = train(args, Setup(*row))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print("\n" + RESULT_MARK + json.dumps(found), flush=True)
        torch._dynamo.reset()
        release()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_child(args: argparse.Namespace, rows: list[Setup], mode: str) -> Iterator[dict[str, Any]]:
    """One mode of all rows, in a process of its own."""
    import sources

    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(rows)]
    command += ["--modes", mode, "--device", args.device, "--ignored", str(args.ignored)]
    command += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
    environment = dict(os.environ)
    if mode == "incumbent":
        environment = sources.peer_environment(args.peer_site)
        command += ["--peer-site", args.peer_site]
    else:
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [sources.SOURCE, os.environ.get("PYTHONPATH")])
        )
    keys = [{**row._asdict(), "mode": mode, "ignored": args.ignored} for row in rows]
    site = str(Path(args.peer_site or "").resolve())
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        limit = started(args.timeout, child.kill)
        try:
            for line in child.stdout:
                if not line.startswith(RESULT_MARK):
                    sys.stderr.write(line)
                    continue
                limit.cancel()
                found: dict[str, Any] = json.loads(line.removeprefix(RESULT_MARK))
                package = found.pop("package", "")  # a path of this machine
                if mode == "incumbent" and "error" not in found and site not in package:
                    found = {"error": f"{package} is not under {args.peer_site}"}
                yield {**keys.pop(0), **found}
                limit = started(args.timeout, child.kill)
        finally:
            limit.cancel()
    for key in keys:
        error = f"its process ended with code {child.returncode}; a row may take {args.timeout} s"
        yield {**key, "error": error}


def started(seconds: float, action: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def line(row: dict[str, Any]) -> str:
    name = (
        f"{row['shape']:20} S{row['seq']} B{row['batch']}{' ckpt' if row['checkpointing'] else ''}"
        + (f" {row['ignored']:.0%} ignored" if row["ignored"] else "")
    )
    if "error" in row:
        return f"{name:36} {row['mode']:16} {row['error']}"
    memory = f"{row['peak_gb']:7.1f} GB" if row["peak_gb"] is not None else ""
    return f"{name:36} {row['mode']:16} {row['tokens_per_s']:10.0f} tokens/s {memory}  loss {row['loss']:.4f}"


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.worker:
        worker(args)
        return 0
    import sources  # not in a worker: it would put our package before the incumbent
    from results import default_path, describe_run, load, merge, save

    rows = [row for row in TABLE if args.shape in (None, row[0]) and args.seq in (None, row[1])]
    if args.shape and args.seq and args.batch:
        rows = [Setup(args.shape, args.seq, args.batch, args.checkpointing)]
    elif args.shape and not rows:
        rows = [Setup(args.shape, args.seq or 64, args.batch or 2, args.checkpointing)]
    path = args.json or default_path(args.device)
    run = describe_run(
        args.device, warmup=args.warmup, incumbent=sources.site_version(args.peer_site)
    )
    found = []
    for mode in args.modes.split(","):
        for row in in_child(args, rows, mode):
            found.append(row)
            print(line(row), flush=True)
            save(path, merge(load(path), "e2e", run, found))
    print(f"{len(found)} rows in {path}")
    return 1 if any("error" in row for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
