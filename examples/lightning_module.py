"""Lightning: patch in the module's constructor, and nothing else changes.

python -m examples.lightning_module
"""

from __future__ import annotations

import time
from typing import Any

import torch

import liger_kernel
from examples.common import Text, causal_lm, need, options, show


def main() -> None:
    args = options(__doc__)
    need("lightning", "lightning")
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = causal_lm()
            self.report = liger_kernel.patch(self.model)
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 3e-3)

    module, began = Module(), time.perf_counter()
    trainer = lightning.Trainer(
        max_steps=args.steps, accelerator=args.device, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module.model.train()
    trainer.fit(module, torch.utils.data.DataLoader(Text(args.seq), args.batch, shuffle=True))
    show(module.losses, time.perf_counter() - began)
    print(module.report)


if __name__ == "__main__":
    main()
