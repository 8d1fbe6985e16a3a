"""Supervised fine-tuning with HuggingFace's Trainer: one flag, alone or sharded.

python -m examples.hf_trainer
torchrun --nproc_per_node 2 -m examples.hf_trainer --sharding zero3
accelerate launch --config_file examples/configs/fsdp2.yaml -m examples.hf_trainer --device cuda
"""

from __future__ import annotations

from examples.common import Text, causal_lm, need, options, run_trainer, trainer_options


def without_compiler() -> None:
    """On a CPU alone: DeepSpeed would compile its own collectives, for minutes; gloo's do as well."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    args = options(__doc__, sharding=("none", "zero3"))
    more = {}
    if args.sharding == "zero3":
        need("deepspeed", "deepspeed")
        if args.device == "cpu":
            without_compiler()
        more["deepspeed"] = "examples/configs/zero3.json"
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(**trainer_options(args), use_liger_kernel=True, **more)
    trainer = Trainer(model=causal_lm(), args=arguments, train_dataset=Text(args.seq))
    run_trainer(trainer)
    if trainer.is_world_process_zero():
        norm = trainer.accelerator.unwrap_model(trainer.model).model.norm
        print(f"the Trainer patched the model: its last norm is {norm}")


if __name__ == "__main__":
    main()
