"""What computes log-probabilities has to offer: one step over rows of logits; and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from liger_kernel._core.options import OpOptions
from liger_kernel._core.rows import RowOutputs

#: the differentiable numbers of a row, in the order of the columns that hold them
NUMBERS = ("log_prob", "entropy", "logsumexp", "sum_p2", "mean_logit")


class LogProbs(NamedTuple):
    """What was asked for of each token; None for the rest. The first five carry gradients."""

    log_prob: Tensor
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    sum_p2: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None  # bool
    top_log_probs: Tensor | None = None  # (..., top_k)
    top_ids: Tensor | None = None  # (..., top_k) int64


@dataclass(frozen=True)
class LogProbsOptions(OpOptions):
    """As `logprobs` takes them, but for temperatures of rows, which are a tensor."""

    ignore_index: int = -100
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0
    entropy: bool = False
    logsumexp: bool = False
    sum_p2: bool = False
    mean_logit: bool = False
    top1: bool = False
    top_k: int = 0

    @property
    def numbers(self) -> tuple[str, ...]:
        """Of `NUMBERS` those that were asked for; the log-probability always is."""
        return tuple(name for name in NUMBERS if name == "log_prob" or getattr(self, name))


class LogProbRows(RowOutputs):
    """Columns: the numbers (N, K), whether the label is the largest, the k largest log-probabilities and their ids."""

    ignored = (0, 0, 0, -1)

    @staticmethod
    def empty(ids: Tensor, dtype: torch.dtype, options: LogProbsOptions) -> LogProbRows:
        likes = LogProbRows.likes(ids, dtype, options)
        return LogProbRows(
            *(None if s is None else torch.empty(s, dtype=d, device=ids.device) for s, d in likes)
        )

    @staticmethod
    def likes(
        ids: Tensor, dtype: torch.dtype, options: LogProbsOptions
    ) -> list[tuple[tuple[int, ...] | None, torch.dtype]]:
        """(shape, dtype) of each column, None for the shape of one that nobody asked for."""
        rows, k = ids.shape[0], options.top_k
        top = (rows, k) if k else None
        return [
            ((rows, len(options.numbers)), dtype),
            ((rows,) if options.top1 else None, torch.bool),
            (top, dtype),
            (top, torch.int64),
        ]


class Kernels(Protocol):
    def step(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor | None,
        *,
        options: LogProbsOptions,
        out: LogProbRows,
        lse: Tensor | None,
        grad: Tensor | None,
        row_scale: Tensor | None,
        padded: bool,
    ) -> None:
        """Write the numbers of (N, V) logits and the comparison with the largest to `out`, and the gradient of
        sum(numbers * row_scale) to `grad`.

        `temperature` (N,): of each row, beside that of `options`. `lse` (N,) gets the logsumexp of each row that is not
        ignored. `row_scale` (N, K); None for ones. `grad` may be the logits themselves. `padded`: rows start at
        multiples of 16 elements, and what is between them has to be 0 afterwards.

        With z the scaled logits, p their softmax, H the entropy, S the sum of p^2 and a g for each number, the gradient
        of z_v is p_v (g_lse - g_log - g_H (log p_v + H) + 2 g_S (p_v - S)) + g_mean / V + g_log [v = y].
        """

    def statistics(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor | None,
        *,
        first: int,
        options: LogProbsOptions,
        out: Tensor,
        padded: bool,
    ) -> None:
        """Write to `out` (7, N) what one needs of `logits` (N, classes from `first` on) for the numbers of all classes.

        Of each row, with e = exp(z - the largest z): the largest z, the sum of e, the z of the label (0 where it is no
        class here), the sum of z, the first class of the largest, and the sums of e (z - largest) and of e^2. What no
        option reads, and a row whose label is ignored, is unspecified.
        """

    def gradient(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor | None,
        factors: Tensor,
        *,
        first: int,
        options: LogProbsOptions,
        grad: Tensor,
        padded: bool,
    ) -> None:
        """Write e (a + b (z - top) + c e) + mean + own [v = y], with e = exp(z - top), times dz/dx to `grad`.

        factors: (6, N) top, a, b, c, mean and own of each row. `grad` may be the logits themselves. Other arguments as
        in `statistics`; the gradient of a row whose label is ignored is 0.
        """
