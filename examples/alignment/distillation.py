"""Distillation: a small model learns the text, and what a larger one that has read more of it expects there.

python -m examples.alignment.distillation
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from examples.alignment.compare import Example, compare, hidden
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.functional import linear_logprobs


class Distillation(Example):
    def __init__(self, args: argparse.Namespace, tokens: Tensor) -> None:
        super().__init__(args, tokens)
        self.loss_of = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.5,
            weight_soft_loss=0.5,
            beta=0.5,
            # rows of logits held at a time; by default 1,024, which are all that the small batch has
            chunk_size=1024 if args.gpu_shape else 256,
        )
        self.teacher = self.pretrained(args.shape.teacher, 2 * args.pretraining)
        self.teacher.requires_grad_(False)
        self.unseen = self.rows(args.batch, args.seq, self.generator(-2)).to(args.device)

    def models(self) -> list[Any]:
        return [self.model, self.teacher]

    def batch(self, step: int) -> Tensor:
        return self.rows(self.args.batch, self.args.seq, self.generator(step)).to(self.args.device)

    def accuracy(self) -> Tensor:
        """The share of tokens of a text kept aside that the model finds most probable."""
        with torch.no_grad():
            states, labels = hidden(self.model, self.unseen), self.unseen[:, 1:]
            found = linear_logprobs(states, self.model.lm_head.weight, labels, top1=True)
        assert found.is_top1 is not None
        return found.is_top1.float().mean()

    def patched(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = self.model, self.teacher
        loss = self.loss_of(
            hidden(student, ids),
            student.lm_head.weight,
            hidden(teacher, ids),
            teacher.lm_head.weight,
            ids[:, 1:],
        )
        return loss, self.accuracy()

    def stock(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits, expected = (
            model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            for model in (self.model, self.teacher)
        )
        student, teacher = logits.log_softmax(-1), expected.log_softmax(-1)
        mean = torch.logaddexp(student, teacher) - torch.tensor(2.0).log()
        soft = sum(
            0.5 * kl_div(mean, logp, log_target=True, reduction="batchmean")
            for logp in (student, teacher)
        )
        loss: Tensor = 0.5 * cross_entropy(logits, ids[:, 1:].flatten()) + 0.5 * soft
        return loss, self.accuracy()


if __name__ == "__main__":
    compare("distillation", __doc__, Distillation)
