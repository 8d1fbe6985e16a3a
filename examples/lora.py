"""LoRA with PEFT and HuggingFace's Trainer: patch before or after the adapters, both work.

python -m examples.lora
"""

from __future__ import annotations

import liger_kernel
from examples.common import Text, causal_lm, need, options, run_trainer, trainer_options


def main() -> None:
    args = options(__doc__)
    need("peft", "peft")
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    projections = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        causal_lm(), LoraConfig(r=8, target_modules=projections, task_type="CAUSAL_LM")
    )
    report = liger_kernel.patch(model)
    model.print_trainable_parameters()
    arguments = TrainingArguments(**trainer_options(args))
    run_trainer(Trainer(model=model, args=arguments, train_dataset=Text(args.seq)))
    print(report)


if __name__ == "__main__":
    main()
