"""A loss of one's own on the loss head: its formula knows the logits of some rows, and all of them are never in memory.

python -m examples.custom_loss
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import liger_kernel
from examples.common import causal_lm, options, train
from liger_kernel.loss_head.node import linear_loss
from liger_kernel.loss_head.row_loss import FormulaLoss


@dataclass(frozen=True)
class Focal(FormulaLoss):
    """(1 - p)^gamma times the cross entropy: what the model knows already counts less (arXiv 1708.02002)."""

    gamma: float = 2.0

    def formula(self, logits: Tensor, teacher: Tensor | None, target: Tensor) -> tuple[Tensor, ...]:
        picked = target.clamp(min=0)[:, None]  # ignored rows may come out as anything
        logp = logits.log_softmax(-1).gather(-1, picked)[:, 0]
        return (-((1 - logp.exp()) ** self.gamma) * logp,)


def main() -> None:
    args = options(__doc__)
    model = causal_lm().to(args.device).train()
    report = liger_kernel.patch(model.model)  # the loss is ours to compute

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        hidden = model.model(batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
        labels = batch["labels"][:, 1:].flatten()
        return linear_loss(Focal(), hidden.flatten(0, 1), model.lm_head.weight, labels)[0]

    with torch.no_grad():
        ids = torch.arange(20, device=args.device)[None]
        logits = model(input_ids=ids).logits[0, :-1]
        whole = Focal().formula(logits, None, ids[0, 1:])[0].mean()
        print(
            f"from hidden states {loss_of({'input_ids': ids, 'labels': ids}):.6f}, from all logits {whole:.6f}"
        )
    train(model, args, loss_of)
    print(report)


if __name__ == "__main__":
    main()
