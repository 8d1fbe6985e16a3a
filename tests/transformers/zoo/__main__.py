"""`python -m tests.transformers.zoo [TYPE ...] [--image] [--json FILE]`: check every model type, one process each."""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import queue
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from tests.transformers.zoo import build, check, inputs, releases

DEFAULT_JSON = Path(__file__).parents[3] / "demo_output" / "zoo.json"


def _child(entry: build.Entry, image: bool, dtype: str, memory_gib: int, answer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_gib << 30, memory_gib << 30))
    make_inputs = inputs.image_inputs if image else inputs.inputs
    answer.put(
        check.run(entry, make_inputs, "image" if image else "text", dtype=getattr(torch, dtype))
    )


class _Run:
    """One entry in a forked process, that may neither hang nor eat the memory."""

    def __init__(
        self, entry: build.Entry, image: bool, dtype: str, seconds: float, memory_gib: int
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.failed = check.Result(str(entry), entry.class_name, "image" if image else "text")
        self.answer = context.Queue()
        self.until = time.monotonic() + seconds
        self.process = context.Process(
            target=_child, args=(entry, image, dtype, memory_gib, self.answer)
        )
        self.process.start()

    def result(self) -> check.Result | None:
        """What it found; None while it runs."""
        alive, late = self.process.is_alive(), time.monotonic() > self.until
        try:  # what a process that is gone has left is there within a second
            found: check.Result = self.answer.get(timeout=0.02 if alive else 1)
        except queue.Empty:
            if alive and not late:
                return None
            found = self.failed
            found.status, found.detail = "raises", "timed out" if alive else "the process died"
        self.process.kill()
        self.process.join()
        return found


def _results(entries: Sequence[build.Entry], workers: int, *how: Any) -> Iterator[check.Result]:
    """Of `workers` entries at a time, in the order in which they end."""
    waiting, running = [*entries], list[_Run]()
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(_Run(waiting.pop(0), *how))
        for run in [*running]:
            found = run.result()
            if found is not None:
                running.remove(run)
                yield found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.transformers.zoo", description=__doc__)
    parser.add_argument(
        "types", nargs="*", help="entries to run, such as llama or qwen3_5+image; default: all"
    )
    parser.add_argument(
        "--image", action="store_true", help="with pixel inputs, for the types that have them"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--json", type=Path, default=DEFAULT_JSON, help="results are merged into this file"
    )
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--memory", type=int, default=12, metavar="GIB")
    parser.add_argument("--workers", type=int, default=1, help="entries at a time")
    options = parser.parse_args(arguments)
    known = {str(entry): entry for entry in build.ENTRIES}
    unknown = sorted(set(options.types) - known.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    chosen = [known[name] for name in options.types] or list(known.values())
    if options.image:
        chosen = [entry for entry in chosen if str(entry) in inputs.IMAGE_INPUTS]
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    merged = json.loads(options.json.read_text()) if options.json.exists() else {}
    results = []
    how = (options.image, options.dtype, options.seconds, options.memory)
    for result in _results(chosen, options.workers, *how):
        if result.status == "unbuilt" and result.entry in releases.unbuilt():
            result.status = "listed"
        print(result.line(), flush=True)
        results.append(result)
        merged[f"{result.entry} {result.inputs}"] = result.as_dict()
        options.json.write_text(
            json.dumps(merged, indent=1, sort_keys=True)
        )  # a run may be cut off
    counts = collections.Counter(result.status for result in results)
    fused = sum(result.loss == "fused" for result in results)
    print(f"{len(results)} types: {dict(counts)}; loss fused in {fused}; results in {options.json}")
    return 0 if counts.keys() <= {"ok", "listed"} else 1


if __name__ == "__main__":
    sys.exit(main())
