"""ORPO: learn the chosen answers and prefer them to the rejected ones, without a reference model.

python -m examples.alignment.orpo
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from examples.alignment.compare import compare, hidden
from examples.alignment.pairs import PairExample, Pairs, share
from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

BETA = 0.1


class ORPO(PairExample):
    loss_of = LigerFusedLinearORPOLoss(beta=BETA)

    def patched(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        states = hidden(self.model, pairs.ids)
        loss, metrics = self.loss_of(self.model.lm_head.weight, states, pairs.labels)
        return loss, share(metrics[0], metrics[1])

    def stock(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.sequence_logps(self.model, pairs) / self.args.answer
        odds = (chosen - rejected) - ((-chosen.expm1()).log() - (-rejected.expm1()).log())
        return -chosen.mean() - BETA * logsigmoid(odds).mean(), share(chosen, rejected)


if __name__ == "__main__":
    compare("orpo", __doc__, ORPO)
