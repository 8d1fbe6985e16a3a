"""Trains a model without and with this library, in two processes that take turns step by step, and compares.

    python -m examples.demo                                                     (CPU or GPU, a few minutes)
    python -m examples.demo --device cuda --shape llama-3.2-1b --seq 2048 --batch 8

Writes the losses (JSON) and a plot (PNG) to demo_output/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from benchmark import children
from benchmark.shapes import DEMO, MODELS
from examples.demo import report, text
from examples.demo.text import DemoError
from examples.demo.train import MODES, Run, train

VOCABULARY = 32_000
LOG_LINES_SHOWN = 20
CHILD_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "CUDA_VISIBLE_DEVICES": "0",  # Trainer would spread over all of them
    # glibc then gives freed tensors back at once: the resident set is what is in use, in both runs
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    shapes = "\n".join(f"  {name:<20} {shape.why}" for name, shape in DEMO.items())
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"shapes:\n{shapes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", default="tiny", help=f"one of {', '.join(DEMO)} (default: tiny)")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if torch sees one")
    add("--dtype", choices=("float32", "bfloat16"), help="default: the shape's")
    add("--seq", type=int, help="tokens per sequence (default: the shape's)")
    add("--batch", type=int, help="sequences per step (default: the shape's)")
    add("--steps", type=int, help="optimizer steps (default: the shape's)")
    add("--warmup", type=int, help="first steps left out of the timing (default: 1, on a GPU 3)")
    add("--turn", type=int, help="steps before the other run goes on (default: 1, on a GPU 5)")
    add("--learning-rate", type=float, help="default: the shape's")
    add("--seed", type=int, default=0)
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    add("--via-trainer", action="store_true", help="patch by Trainer's use_liger_kernel=True")
    add("--checkpointing", action="store_true", help="gradient checkpointing, in both runs")
    add("--text", type=Path, help="folder with .py files (default: the standard library)")
    add(
        "--vocabulary", type=int, default=VOCABULARY, help="of the tokenizer; a model may have more"
    )
    add("--output", type=Path, default=Path("demo_output"))
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> Run:
    """The stock run that `args` ask for, its tokens not made yet; raises DemoError for what cannot be."""
    if args.shape not in DEMO:
        raise DemoError(f"Unknown shape {args.shape!r}; known: {', '.join(DEMO)}.")
    shape = DEMO[args.shape]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise DemoError(f"--device cuda: torch {torch.__version__} sees no GPU.")
    steps = shape.steps if args.steps is None else args.steps
    warmup, turn = (3, 5) if device == "cuda" else (1, 1)
    warmup = warmup if args.warmup is None else args.warmup
    turn = turn if args.turn is None else args.turn
    run = Run(
        mode="stock",
        shape=args.shape,
        device=device,
        dtype=args.dtype or shape.dtype,
        batch=shape.batch if args.batch is None else args.batch,
        seq=shape.seq if args.seq is None else args.seq,
        steps=steps,
        warmup=warmup,
        learning_rate=shape.learning_rate if args.learning_rate is None else args.learning_rate,
        seed=args.seed,
        tokens_file="",
        via_trainer=args.via_trainer,
        checkpointing=args.checkpointing,
        turn=turn,
    )
    if run.batch < 1 or run.seq < 2:
        raise DemoError(f"--batch {run.batch} --seq {run.seq}: at least 1 and 2 are needed.")
    if warmup < 0 or turn < 1:
        raise DemoError(f"--warmup {warmup} --turn {turn}: at least 0 and 1 are needed.")
    if steps < 1 or not any(untimed < end for untimed, end in run.turns()):
        raise DemoError(
            f"--steps {steps} leaves nothing to time after --warmup {warmup}, with --turn {turn}."
        )
    known = MODELS[args.shape]["vocab_size"]
    if not 0 < args.vocabulary <= known:
        raise DemoError(
            f"--vocabulary {args.vocabulary} does not fit {args.shape}, which has {known} tokens."
        )
    return run


def advance(bar: tqdm[Any], run: Run, message: dict[str, Any]) -> None:
    if "stage" in message:
        bar.set_description(f"{run.mode}: {message['stage']}", refresh=sys.stderr.isatty())
    elif "step" in message:
        loss = f"loss {message['loss']:.4f}"
        bar.set_description(
            f"{run.mode}: step {message['step']}/{run.steps}, {loss}", refresh=False
        )
        bar.update(message["step"] - (message["step"] - 1) // run.turn * run.turn)


def train_in_turns(runs: list[Run], bar: tqdm[Any], logs: dict[str, Path]) -> report.Results:
    """Train every run in a process of its own, one turn of each after the other; what they print goes to `logs`."""
    processes = {run.mode: children.rows(train, run, log=logs[run.mode]) for run in runs}
    results: report.Results = {}
    try:
        while len(results) < len(runs):
            for run in runs:
                try:
                    for message in processes[run.mode]:
                        advance(bar, run, message)
                        if "result" in message:
                            results[run.mode] = message["result"]
                        if "stage" not in message:
                            break
                except children.ChildError as error:
                    log = logs[run.mode]
                    tail = log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
                    first = f"The {run.mode} run failed: {error}."
                    raise RuntimeError("\n".join([first, *tail, f"All of it: {log}"])) from error
    finally:
        for process in processes.values():
            process.close()
    return results


def show(run: Run, results: report.Results, command: str, files: dict[str, Path]) -> None:
    first = next(iter(results.values()))
    tokens = run.batch * run.seq
    title = (
        f"{run.shape}, {first['parameters'] / 1e6:,.0f} M parameters, {run.dtype}, "
        f"batch {run.batch} x {run.seq} tokens"
    )
    table = report.markdown(f"{run.shape}, {run.dtype}, {run.batch} x {run.seq} tokens", results)
    files["json"].write_text(
        json.dumps(
            {"command": command, "run": dataclasses.asdict(run), "results": results}, indent=1
        )
    )
    report.plot(f"{title}\n{first['machine']}", results, files["png"])
    print(f"\n{title}; {tokens:,} tokens a step\n{first['machine']}\n")
    patch_report = results.get("patched", {}).get("patch_report")
    if patch_report:
        print(f"{patch_report}\n")
    print(report.loss_table(results))
    print(f"\n`{command}`\n\n{table}\n")
    print(
        f"Turns of {run.turn} step(s), times are medians over turns, the first {run.warmup} step(s) not timed. "
        f"Plot: {files['png']}  Data: {files['json']}"
    )
    if report.undecided(results):
        print("The turns disagree on which run is faster: something else uses this machine.")


def demo(args: argparse.Namespace, command: str) -> int:
    began = time.perf_counter()
    run = plan(args)
    text.make_folder(args.output)
    text.check_free_disk(args.output)
    bar = tqdm(
        total=run.steps * len(args.modes),
        bar_format="{desc:<40} {bar:30} {n_fmt}/{total_fmt} [{elapsed}]",
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    stem = f"{run.shape}-{run.device}"
    files = {end: args.output / f"{stem}.{end}" for end in ("json", "png")}
    files |= {mode: args.output / f"{stem}-{mode}.log" for mode in MODES}
    with bar:
        bar.set_description("tokenizer")
        tokens_file = text.prepare(args.output / "cache", args.vocabulary, args.text)
        available = len(torch.load(tokens_file, weights_only=True))
        if available < run.seq:
            raise DemoError(f"--seq {run.seq}: the text has {available} tokens only.")
        run = dataclasses.replace(run, tokens_file=str(tokens_file))
        runs = [dataclasses.replace(run, mode=mode) for mode in MODES if mode in args.modes]
        with mock.patch.dict(os.environ, {**CHILD_ENVIRONMENT, **os.environ}):
            results = train_in_turns(runs, bar, files)
    show(run, results, command, files)
    print(f"Total time: {time.perf_counter() - began:.0f} s")
    if not report.losses_agree(results, run.dtype):
        print("error: the losses differ by more than rounding explains.", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    command = "make demo" + (f' ARGS="{shlex.join(given)}"' if given else "")
    try:
        return demo(parse(argv), command)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
