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
import warnings
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


def run_in_process(
    entry: build.Entry, image: bool, dtype: str, seconds: float, memory_gib: int
) -> check.Result:
    """The result of one entry, from a forked process that may neither hang nor eat the memory."""
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=_child, args=(entry, image, dtype, memory_gib, answer))
    process.start()
    waited = 0.0
    while True:
        try:
            result: check.Result = answer.get(timeout=1)
            break
        except queue.Empty:
            waited += 1
            if waited >= seconds or not process.is_alive():
                result = check.Result(str(entry), entry.class_name, "image" if image else "text")
                result.status, result.detail = (
                    "raises",
                    "timed out" if process.is_alive() else "the process died",
                )
                break
    process.kill()
    process.join()
    return result


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
    results = []
    for entry in chosen:
        result = run_in_process(
            entry, options.image, options.dtype, options.seconds, options.memory
        )
        if result.status == "unbuilt" and str(entry) in releases.unbuilt():
            result.status = "listed"
        print(result.line(), flush=True)
        results.append(result)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    merged = json.loads(options.json.read_text()) if options.json.exists() else {}
    merged |= {f"{result.entry} {result.inputs}": result.as_dict() for result in results}
    options.json.write_text(json.dumps(merged, indent=1))
    counts = collections.Counter(result.status for result in results)
    fused = sum(result.loss == "fused" for result in results)
    print(f"{len(results)} types: {dict(counts)}; loss fused in {fused}; results in {options.json}")
    return 0 if counts.keys() <= {"ok", "listed"} else 1


if __name__ == "__main__":
    sys.exit(main())
