"""What LoRA and QLoRA share: the base model as a folder, its adapters, both trainers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import liger_kernel
from benchmark.shapes import MODELS
from examples import common
from examples.demo.train import PeakMemory

BASE = Path("demo_output/finetuning")
SHAPES: dict[bool, dict[str, Any]] = {
    False: {"learning_rate": 3e-3, "pretraining": 60, "sizes": {}, "dtype": torch.float32},
    True: {
        "learning_rate": 2e-4,
        "pretraining": 0,
        "sizes": MODELS["llama-3.2-1b"],
        "dtype": torch.bfloat16,
    },
}


def options(description: str | None) -> argparse.Namespace:
    parser = common.parser(description, trainer=("hf", "trl"), patch=("yes", "no"))
    parser.add_argument("--pretraining", type=int, help="steps of the base model, on code")
    args = common.parsed(parser, on_gpu={"batch": 8, "seq": 2048, "steps": 20})
    shape = SHAPES[args.gpu_shape]
    if args.pretraining is None:
        args.pretraining = shape["pretraining"]
    args.learning_rate, args.sizes, args.dtype = (
        shape[name] for name in ("learning_rate", "sizes", "dtype")
    )
    common.need("peft", "peft")
    if args.trainer == "trl":
        common.need("trl", "trl")
    return args


def base(args: argparse.Namespace, **loading: Any) -> Any:
    """The model to adapt, from a folder as from the hub: its layers can be quantised when they are read."""
    from transformers import AutoModelForCausalLM

    with torch.device(args.device):
        model = common.causal_lm(**args.sizes, dtype=args.dtype)
    if args.pretraining:
        first = argparse.Namespace(**{**vars(args), "steps": args.pretraining})
        text = common.Text(args.seq, Path("src").rglob("*.py"))
        common.train(model.train(), first, lambda batch: model(**batch).loss, text, quiet=True)
    model.save_pretrained(BASE)
    device = {"": args.device}
    return AutoModelForCausalLM.from_pretrained(
        BASE, dtype=args.dtype, device_map=device, **loading
    )


def fine_tune(args: argparse.Namespace, model: Any) -> None:
    """Adapters on all linear layers of the model, patched, and trained."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapters)
    model.print_trainable_parameters()
    report = None
    if args.patch == "yes":
        # after get_peft_model, so that the adapters are fused, too; TRL computes its loss itself
        report = liger_kernel.patch(model, fused_linear_cross_entropy=args.trainer == "hf")
    trainer = trainer_of(args, model)
    with PeakMemory(args.device) as memory:
        common.run_trainer(trainer)
    tokens = args.steps * args.batch * args.seq
    seconds = trainer.state.log_history[-1]["train_runtime"]
    print(f"{tokens / float(seconds):,.0f} tokens/s, peak memory {memory.peak / 1e9:.2f} GB")
    print(report or "not patched")


def trainer_of(args: argparse.Namespace, model: Any) -> Any:
    settings = common.trainer_options(args) | {"learning_rate": args.learning_rate}
    text = common.Text(args.seq, Path("docs").rglob("*.md"))
    if args.trainer == "hf":
        from transformers import Trainer, TrainingArguments

        return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=text)
    import trl
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in text.rows])
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings, max_length=args.seq),
        train_dataset=rows,
        processing_class=common.tokenizer(),
    )
