"""DPO: prefer the chosen answers more than the reference model does, which is the model as it was.

python -m examples.alignment.dpo
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from examples.alignment.compare import compare, hidden
from examples.alignment.pairs import PairExample, Pairs, share
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

BETA = 0.1


class DPO(PairExample):
    loss_of = LigerFusedLinearDPOLoss(beta=BETA)

    def __init__(self, args: argparse.Namespace, tokens: Tensor) -> None:
        super().__init__(args, tokens)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def models(self) -> list[Any]:
        return [self.model, self.reference]

    def patched(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        loss, metrics = self.loss_of(
            self.model.lm_head.weight,
            hidden(self.model, pairs.ids),
            pairs.labels,
            ref_input=hidden(self.reference, pairs.ids),
            ref_weight=self.reference.lm_head.weight,
        )
        return loss, share(metrics[5], metrics[6])  # the rewards

    def stock(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            reference = self.sequence_logps(self.reference, pairs)
        chosen, rejected = BETA * (self.sequence_logps(self.model, pairs) - reference)
        return -logsigmoid(chosen - rejected).mean(), share(chosen, rejected)


if __name__ == "__main__":
    compare("dpo", __doc__, DPO)
