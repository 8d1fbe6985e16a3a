"""What the four examples share: options, a tokenizer of this repository, a training by either loss, a plot."""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import liger_kernel
from benchmark.shapes import MODELS
from examples import common
from examples.demo import report, text
from examples.demo.train import PeakMemory

MMAP_THRESHOLD = -3  # of glibc's mallopt
IGNORED = -100


class Shape(NamedTuple):
    model: dict[str, Any]
    teacher: dict[str, Any]
    dtype: torch.dtype
    learning_rate: float


TINY = Shape(
    {},
    {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4},
    torch.float32,
    2e-3,
)
ON_GPU = Shape(MODELS["llama-3.2-1b"], MODELS["llama-3-8b-4-layers"], torch.bfloat16, 2e-5)


class Example(ABC):
    """A model, its batches, and its loss twice."""

    model: Any
    #: whether both runs see the same batches, so that their losses can be compared
    same_batches = True

    def __init__(self, args: argparse.Namespace, tokens: Tensor) -> None:
        self.args, self.tokens = args, tokens
        self.model = self.pretrained(args.shape.model, args.pretraining)

    @abstractmethod
    def batch(self, step: int) -> Any: ...

    @abstractmethod
    def stock(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Loss and accuracy, from all logits."""

    @abstractmethod
    def patched(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The same from hidden states, and no logits."""

    def models(self) -> list[Any]:
        return [self.model]

    def generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(step)

    def rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Pieces of the text, from anywhere; (count, length)."""
        starts = torch.randint(len(self.tokens) - length, (count, 1), generator=generator)
        return self.tokens[starts + torch.arange(length)].long()

    def pretrained(self, sizes: dict[str, Any], steps: int) -> Any:
        """A model with random weights that has read some text."""
        args = self.args
        vocabulary = sizes.get("vocab_size", args.vocabulary)
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        with torch.device(args.device):
            model = common.causal_lm(
                **{**sizes, "vocab_size": vocabulary, **special}, dtype=args.shape.dtype
            )
        liger_kernel.patch(model)
        common.train(
            model.train(),
            argparse.Namespace(**{**vars(args), "steps": steps}),
            lambda batch: model(**batch, use_cache=False).loss,
            self.reading(steps),
            quiet=True,
            learning_rate=args.shape.learning_rate,
        )
        liger_kernel.unpatch(model)
        return model

    def reading(self, steps: int) -> list[dict[str, Tensor]]:
        generator = self.generator(-1)
        found = [self.rows(self.args.batch, self.args.seq, generator) for _ in range(steps)]
        return [{"input_ids": ids, "labels": ids} for ids in found]


def hidden(model: Any, ids: Tensor) -> Tensor:
    """What predicts the tokens after the first; (B, T - 1, H)."""
    states: Tensor = model.model(ids, use_cache=False).last_hidden_state
    return states[:, :-1]


def token_logps(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Stock: log-probabilities of `labels`, those of the tokens after the first, 0 where ignored; (B, T - 1)."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(labels == IGNORED, 0.0)


def train(example: Example, mode: str) -> dict[str, Any]:
    """From the weights as they are: what `examples.demo.report` shows, and the accuracies."""
    args = example.args
    on_gpu = args.device == "cuda"
    if mode == "patched":
        for model in example.models():
            patched = liger_kernel.patch(model.model)  # the loss is computed here
    loss_of: Callable[[Any], tuple[Tensor, Tensor]] = getattr(example, mode)
    parameters = example.model.parameters()
    optimizer = torch.optim.AdamW(parameters, args.shape.learning_rate, fused=on_gpu)
    torch.manual_seed(0)
    losses, accuracies, seconds = [], [], []
    with PeakMemory(args.device) as memory:
        for step in range(args.steps):
            batch = example.batch(step)
            began = time.perf_counter()
            loss, accuracy = loss_of(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            accuracies.append(accuracy.item())
            seconds.append(time.perf_counter() - began)
    later = statistics.median(seconds[1:] or seconds)
    return {
        "losses": losses,
        "accuracies": accuracies,
        "tokens_per_second": args.batch * args.seq / later,
        "seconds_per_step": later,
        "turns": seconds[1:] or seconds,
        "memory_at_rest": memory.at_rest,
        "memory_peak": memory.peak,
        "patch_report": str(patched) if mode == "patched" else None,
    }


def options(description: str | None) -> argparse.Namespace:
    parser = common.parser(description)
    add = parser.add_argument
    add("--pretraining", type=int, default=60, help="steps on plain text before")
    add("--vocabulary", type=int, default=8192, help="of the tokenizer")
    add("--text", type=Path, default=Path("src"), help="folder with .py files")
    add("--output", type=Path, default=Path("demo_output/alignment"))
    parser.set_defaults(steps=60, batch=16, seq=64)
    args = common.parsed(parser, on_gpu={"batch": 8, "seq": 1024, "steps": 20, "pretraining": 10})
    args.shape = ON_GPU if args.gpu_shape else TINY
    args.answer = args.seq // 2  # tokens that are judged, the last
    return args


def compare(name: str, description: str | None, example_of: Callable[..., Example]) -> None:
    """Train by the stock loss, then by ours from the same weights; tables, a plot, and the numbers as JSON."""
    args = options(description)
    if args.device == "cpu" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 4 * 2**20)  # what is freed leaves the process
    try:
        files = text.find_text(args.text, 1)
        tokens_file = text.prepare(args.output / "cache", args.vocabulary, args.text, 0)
    except text.DemoError as error:
        sys.exit(f"error: {error}")
    args.tokenizer_file = tokens_file.with_name("tokenizer.json")
    tokens = torch.load(tokens_file)
    common.check_length(args.seq, len(tokens) - 1, "tokens")
    example = example_of(args, tokens)
    start = copy.deepcopy(example.model.state_dict())
    results = {}
    for mode in ("stock", "patched"):
        example.model.load_state_dict(start)
        results[mode] = train(example, mode)
    dtype = str(args.shape.dtype).removeprefix("torch.")
    size = f"{example.model.num_parameters() / 1e6:,.0f} M parameters, {dtype}"
    title = f"{name}, {size}, {args.batch} x {args.seq} tokens"
    print(
        f"{title}, on {len(files)} files of {args.text}\n\n{results['patched']['patch_report']}\n"
    )
    print(report.markdown(title, results, example.same_batches))
    stem = args.output / f"{name}-{args.device}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1))
    report.plot(title, results, stem.with_suffix(".png"))
    print(f"\nPlot: {stem}.png  Data: {stem}.json")
    if example.same_batches and not report.losses_agree(results, dtype):
        sys.exit("error: the losses differ by more than rounding explains.")
