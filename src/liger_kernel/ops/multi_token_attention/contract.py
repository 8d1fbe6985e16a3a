"""What computes multi-token attention has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liger_kernel._core.contract import Backward, Needs, Saved
from liger_kernel._core.options import OpOptions

Pair = tuple[int, int]


@dataclass(frozen=True)
class MultiTokenAttentionOptions(OpOptions):
    """stride, padding, dilation and groups: as of `torch.nn.functional.conv2d`; sparse: sparsemax, not softmax."""

    stride: Pair
    padding: Pair | str
    dilation: Pair
    groups: int
    sparse: bool

    def geometry(self, length: int, taps: Pair) -> list[tuple[int, int]]:
        """Of rows and of columns: the zeros before the first, and how many the convolution makes of `length`."""
        found = []
        for i in range(2):
            reach = self.dilation[i] * (taps[i] - 1)
            if self.padding == "same":
                found.append((reach // 2, length))
                continue
            before = 0 if isinstance(self.padding, str) else self.padding[i]
            found.append((before, (length + 2 * before - reach - 1) // self.stride[i] + 1))
        return found


class Kernels(Backward, Protocol):
    def forward(
        self,
        scores: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        options: MultiTokenAttentionOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """y (B, O, L', L') of scores (B, C, L, L), weight (O, C / groups, kH, kW) and bias (O,); and what is saved."""
