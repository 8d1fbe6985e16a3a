"""Preferences that a text has by itself: what comes next in it is chosen, a piece from elsewhere is rejected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from examples.alignment.compare import IGNORED, Example, token_logps


class Pairs(NamedTuple):
    """Chosen sequences, then as many rejected ones."""

    ids: Tensor  # (2P, T)
    labels: Tensor  # (2P, T - 1), of the tokens after the first; those of the prompt are ignored


class PairExample(Example):
    def batch(self, step: int) -> Pairs:
        args, generator = self.args, self.generator(step)
        chosen = self.rows(args.batch, args.seq, generator)
        rejected = chosen.clone()
        answer = args.answer
        rejected[:, -answer:] = self.rows(args.batch, answer, generator)
        ids = torch.cat([chosen, rejected])
        labels = ids[:, 1:].clone()
        labels[:, : args.seq - answer - 1] = IGNORED
        return Pairs(ids.to(args.device), labels.to(args.device))

    def sequence_logps(self, model: object, pairs: Pairs) -> Tensor:
        """Stock: sums over the answers; (chosen and rejected, P)."""
        return token_logps(model, *pairs).sum(-1).view(2, -1)


def share(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Of pairs in which the chosen answer is preferred."""
    return (chosen > rejected).float().mean()
