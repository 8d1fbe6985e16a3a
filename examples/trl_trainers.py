"""TRL's trainers on a patched model: SFT, DPO and GRPO compute their losses themselves; norms, MLPs and rope are ours.

python -m examples.trl_trainers --trainer dpo
"""

from __future__ import annotations

from typing import Any

import liger_kernel
from examples.common import causal_lm, need, options, run_trainer, tokenizer, trainer_options

WORDS = [
    "the",
    "loss",
    "of",
    "a",
    "model",
    "is",
    "a",
    "sum",
    "of",
    "what",
    "it",
    "did",
    "not",
    "know",
]


def rows(count: int, *columns: str) -> Any:
    """Prompts and answers of a few words; the chosen answer ends, the rejected one repeats itself."""
    from datasets import Dataset

    def row(i: int) -> dict[str, str]:
        prompt, answer = " ".join(WORDS[i % 7 : i % 7 + 4]), " ".join(WORDS[i % 7 + 4 :])
        made = {"prompt": prompt, "completion": f" {answer}", "chosen": f" {answer}"}
        made["rejected"] = f" {WORDS[i % 7]}" * 4
        return {name: made[name] for name in columns}

    return Dataset.from_list([row(i) for i in range(count)])


def many_letters(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter.isalpha() for letter in text) / max(len(text), 1) for text in completions]


def main() -> None:
    args = options(__doc__, trainer=("sft", "dpo", "grpo"))
    need("trl", "trl")
    import trl

    shared = trainer_options(args)
    columns: dict[str, tuple[str, ...]] = {
        "sft": ("prompt", "completion"),
        "dpo": ("prompt", "chosen", "rejected"),
        "grpo": ("prompt",),
    }
    more: dict[str, Any] = {}
    if args.trainer == "dpo":
        more = {"ref_model": causal_lm()}
    if args.trainer == "grpo":
        more = {"reward_funcs": many_letters}
        shared |= {"num_generations": 2, "max_completion_length": 16, "beta": 0.0}
    model = causal_lm()
    report = liger_kernel.patch(model, fused_linear_cross_entropy=False)
    name = args.trainer.upper()
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(**shared),
        train_dataset=rows(64, *columns[args.trainer]),
        processing_class=tokenizer(),
        **more,
    )
    run_trainer(trainer)
    print(report)


if __name__ == "__main__":
    main()
