"""LayerNorm over the last dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liger_kernel._core.checks import check_choice
from liger_kernel.ops import layer_norm as op
from liger_kernel.ops.layer_norm import LigerLayerNormFunction as LigerLayerNormFunction


class LigerLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` of one dimension by `liger_kernel.ops.layer_norm`; also stands in for it by keyword.

    Args:
        hidden_size: N, or a sequence of that one number; `normalized_shape` is another name for it.
        eps: added to the variance; 1e-6 by default where torch has 1e-5.
        bias: unused: as in the incumbent there is a bias either way, so that state dicts fit; it starts at zero.
        init_fn: what the weight starts with, "ones" or "zeros".
        elementwise_affine: False for neither weight nor bias.
        device, dtype: of the parameters.

    Raises: ValueError for more than one dimension, no size, or an unknown `init_fn`.
    """

    def __init__(
        self,
        hidden_size: int | Sequence[int] | None = None,
        eps: float = 1e-6,
        bias: bool = False,
        init_fn: str = "ones",
        *,
        normalized_shape: int | Sequence[int] | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        given = hidden_size if normalized_shape is None else normalized_shape
        shape = (given,) if isinstance(given, int) else tuple(given or ())
        if len(shape) != 1:
            raise ValueError(
                f"LigerLayerNorm normalises one dimension, got the shape {given}; pass one, or use torch.nn.LayerNorm."
            )
        check_choice("init_fn", init_fn, ("ones", "zeros"))
        super().__init__(shape, eps, elementwise_affine, device=device, dtype=dtype)
        self.hidden_size = shape[0]
        self.variance_epsilon = eps
        if init_fn == "zeros" and elementwise_affine:
            nn.init.zeros_(self.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return op.layer_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"
