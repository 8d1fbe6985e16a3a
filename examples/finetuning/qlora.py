"""QLoRA: LoRA on a base model in four bits by bitsandbytes, which runs on CPUs, too.

python -m examples.finetuning.qlora --trainer trl
"""

from __future__ import annotations

from examples.common import need
from examples.finetuning.adapters import base, fine_tune, options


def main() -> None:
    args = options(__doc__)
    need("bitsandbytes", "bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=args.dtype,
    )
    model = base(args, quantization_config=four_bits)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gpu_shape)
    fine_tune(args, model)


if __name__ == "__main__":
    main()
