"""What computes weights of 4 bits has to offer, and the options that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from liger_kernel._core.contract import Needs, Saved
from liger_kernel._core.options import OpOptions


@dataclass(frozen=True)
class Dequantize4bitOptions(OpOptions):
    """shape, dtype: of the result. blocksize: elements with one absmax. absmax_blocksize: of these, with one scale."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    absmax_blocksize: int


class Kernels(Protocol):
    def forward(
        self,
        packed: Tensor,
        code: Tensor,
        absmax: Tensor,
        absmax_code: Tensor | None,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        *,
        options: Dequantize4bitOptions,
        needs: Needs,
    ) -> tuple[Tensor, Saved]:
        """A new tensor; nothing is kept."""
