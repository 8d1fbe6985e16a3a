"""What the examples share: options, a tiny model, a text of bytes, a training loop."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

#: one token a byte, and what ends a text
VOCABULARY, END = 257, 256
#: of models that learn something in a minute on a CPU
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
}


def parser(description: str | None, **more: Any) -> argparse.ArgumentParser:
    """The command line that every example has; `more` adds choices: name=("default", "other", ...)."""
    made = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--steps", type=int, default=50)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--seq", type=int, default=128)
    for name, choices in more.items():
        made.add_argument(f"--{name}", choices=choices, default=choices[0])
    return made


def parsed(
    made: argparse.ArgumentParser, on_gpu: dict[str, Any] | None = None
) -> argparse.Namespace:
    """`on_gpu`: other defaults for `--gpu-shape`, which an example then has."""
    if on_gpu is not None:
        made.add_argument(
            "--gpu-shape", action="store_true", help="a 1B model in bfloat16, on a GPU"
        )
        if made.parse_args().gpu_shape:
            made.set_defaults(device="cuda", **on_gpu)
    found = made.parse_args()
    if found.device == "cuda" and not torch.cuda.is_available():
        flag = "--gpu-shape" if getattr(found, "gpu_shape", False) else "--device cuda"
        made.error(f"{flag}: torch {torch.__version__} sees no GPU")
    for name, least in (("steps", 1), ("batch", 1), ("seq", 2)):
        if getattr(found, name) < least:
            made.error(f"--{name} {getattr(found, name)} is below {least}")
    torch.manual_seed(0)
    return found


def options(description: str | None, **more: Any) -> argparse.Namespace:
    return parsed(parser(description, **more))


def need(package: str, install: str) -> None:
    """End with one line where an example needs what is not installed."""
    if importlib.util.find_spec(package) is None:
        sys.exit(f"This example needs {package}: pip install {install}")


def check_length(seq: int, there: int, unit: str) -> None:
    if seq > there:
        sys.exit(f"error: --seq {seq} is more than the text has: {there:,} {unit}")


class Text(Dataset[dict[str, Tensor]]):
    """Files, or the source of a module of Python's library, in rows of `seq` bytes; the labels are the bytes."""

    def __init__(self, seq: int, files: Iterable[Path] = (Path(argparse.__file__),)) -> None:
        data = b"".join(file.read_bytes() for file in sorted(files))
        check_length(seq, len(data), "bytes")
        self.rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        self.rows = self.rows[: len(data) // seq * seq].view(-1, seq)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i].clone()}


def causal_lm(model_type: str = "llama", **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = settings.pop("dtype", torch.float32)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def tokenizer() -> Any:
    """One token a byte, for trainers that want a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<end>"])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def train(
    model: nn.Module,
    args: argparse.Namespace,
    loss_of: Callable[[Any], Tensor],
    batches: Iterable[Any] | Text | None = None,
    quiet: bool = False,
    learning_rate: float = 3e-3,
) -> None:
    """A plain loop: `loss_of(batch)` is made small; `batches` may be a `Text`, and by default are one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    if batches is None or isinstance(batches, Text):
        order = torch.Generator().manual_seed(0)
        text = batches or Text(args.seq)
        batches = DataLoader(text, args.batch, shuffle=True, generator=order)
    losses: list[float] = []
    began = time.perf_counter()
    while len(losses) < args.steps:
        for batch in batches:
            moved = {name: value.to(args.device) for name, value in batch.items()}
            loss = loss_of(moved)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == args.steps:
                break
    if not quiet:
        show(losses, time.perf_counter() - began)


def show(losses: list[float], seconds: float) -> None:
    """The one line that every example ends with."""
    last = losses[-5:]
    print(
        f"loss {losses[0]:.4f} -> {sum(last) / len(last):.4f}, {len(losses)} steps, {seconds:.1f} s"
    )


def trainer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `TrainingArguments` and its relatives."""
    return {
        "output_dir": "demo_output/examples",
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "bf16": False,
    }


def run_trainer(trainer: Any) -> None:
    """Train; then show the losses that were logged."""
    trainer.train()
    logged = trainer.state.log_history
    losses = [float(entry["loss"]) for entry in logged if "loss" in entry]
    if trainer.is_world_process_zero():
        show(losses, logged[-1]["train_runtime"])
