"""LoRA with PEFT, by HuggingFace's Trainer or TRL's SFTTrainer.

python -m examples.finetuning.lora --trainer trl
"""

from __future__ import annotations

from examples.finetuning.adapters import base, fine_tune, options


def main() -> None:
    args = options(__doc__)
    fine_tune(args, base(args))


if __name__ == "__main__":
    main()
