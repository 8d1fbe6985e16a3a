"""SwiGLU in the place of Megatron-core's `bias_swiglu_impl`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from liger_kernel.ops.glu import LigerFusedGateUpSiLUMulFunction

logger = logging.getLogger(__name__)


def unsupported(bias: Tensor | None, fp8_input_store: bool, cpu_offload_input: bool) -> str | None:
    """Why a call is left to Megatron; None if it is not."""
    if bias is not None:
        return "add_bias_linear=True (bias is not None)"
    if fp8_input_store:
        return "config.activation_func_fp8_input_store=True"
    return "CPU activation offloading enabled" if cpu_offload_input else None


class LogOnce:
    """Tells the first time that a call is left to Megatron for a reason."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self.told: set[str] = set()

    def __call__(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            self.log.info("%s: SwiGLU is falling back to Megatron's own.", reason)


class LigerMegatronSwiGLU(nn.Module):
    """silu(gate) * up of the two halves of the last dimension.

    fallback_impl: computes what the kernel does not, a bias, an input kept in fp8 or offloaded; takes the same
    arguments. in_place: accepted, without effect.
    """

    def __init__(self, fallback_impl: Callable[..., Any] | None = None, in_place: bool = False):
        super().__init__()
        self.fallback_impl, self.in_place = fallback_impl, in_place
        self._tell = LogOnce(logger)

    def forward(
        self,
        input: Tensor,
        bias: Tensor | None = None,
        fp8_input_store: bool = False,
        cpu_offload_input: bool = False,
    ) -> Tensor:
        """input: (rows, 2 N) or (S, B, 2 N). RuntimeError for a call that only a `fallback_impl` could serve."""
        reason = unsupported(bias, fp8_input_store, cpu_offload_input)
        if reason is not None:
            if self.fallback_impl is None:
                raise RuntimeError(
                    f"LigerMegatronSwiGLU does not compute this: {reason}. Pass Megatron's function as fallback_impl, "
                    f"or use apply_liger_kernel_to_megatron(swiglu=True), which keeps it."
                )
            self._tell(reason)
            found: Tensor = self.fallback_impl(input, bias, fp8_input_store, cpu_offload_input)
            return found
        if input.ndim not in (2, 3):
            raise ValueError(f"input must be 2D or 3D, got shape {tuple(input.shape)}.")
        if input.shape[-1] % 2:
            raise ValueError(
                f"the last dimension must be even, gate and up side by side; got shape {tuple(input.shape)}."
            )
        return LigerFusedGateUpSiLUMulFunction.apply(input, self.in_place)
