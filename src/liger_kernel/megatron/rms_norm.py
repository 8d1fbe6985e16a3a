"""RMSNorm as Megatron-core builds its norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops.rms_norm import LigerRMSNormFunction


class LigerMegatronRMSNorm(nn.Module):
    """RMSNorm in the place of the norm of a layer spec, whose arguments it takes.

    config: Megatron's, of which `normalization`, `layernorm_zero_centered_gamma` and `sequence_parallel` are read.
    persist_layer_norm, normalization: accepted, without effect. zero_centered_gamma: the weight is kept less 1.
    Raises: ValueError where the config asks for another norm.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "RMSNorm",
    ):
        super().__init__()
        wanted = getattr(config, "normalization", "RMSNorm")
        if wanted != "RMSNorm":
            raise ValueError(
                f"LigerMegatronRMSNorm requires config.normalization='RMSNorm', got {wanted!r}; "
                f"leave this norm to Megatron."
            )
        self.config, self.eps = config, eps
        self.hidden_size = torch.Size(
            (hidden_size,) if isinstance(hidden_size, int) else hidden_size
        )
        centered = getattr(config, "layernorm_zero_centered_gamma", False)
        self.zero_centered_gamma = bool(zero_centered_gamma or centered)
        self._offset = 1.0 if self.zero_centered_gamma else 0.0
        self.weight = nn.Parameter(torch.empty(self.hidden_size))
        # Megatron sums the gradient of such a parameter over the tensor-parallel ranks
        vars(self.weight)["sequence_parallel"] = bool(getattr(config, "sequence_parallel", False))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self._offset)

    def forward(self, x: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(
            x, self.weight, self.eps, self._offset, "llama", False, None
        )

    def extra_repr(self) -> str:
        return f"hidden_size={tuple(self.hidden_size)}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"
