"""An image-text model: vision tower and language model are patched by one call.

python -m examples.vision_language
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import default_collate

import liger_kernel
from examples.common import SIZES, Text, options, train

IMAGE, PATCHES = 255, 4  # a byte that no text has stands for a patch


def model() -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    eye = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    language = LlamaConfig(**SIZES)
    config = LlavaConfig(vision_config=eye, text_config=language, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def with_image(row: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    """An image of noise before the text; its tokens carry no label."""
    image = torch.full((PATCHES,), IMAGE)
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))
    labels = torch.cat((torch.full_like(image, -100), row["labels"]))
    return {
        "input_ids": torch.cat((image, row["input_ids"])),
        "labels": labels,
        "pixel_values": noise,
    }


def main() -> None:
    args = options(__doc__)
    made = model().to(args.device).train()
    report = liger_kernel.patch(made)
    text = Text(args.seq)
    rows = [with_image(text[i], i) for i in range(len(text))]
    batches = [default_collate(rows[i : i + args.batch]) for i in range(0, len(rows), args.batch)]
    train(made, args, lambda batch: made(**batch).loss, batches)
    print(report)


if __name__ == "__main__":
    main()
