"""RMSNorm modules: one class, and the rows of a table under the names that model families are patched with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liger_kernel._core.checks import check_choice
from liger_kernel.ops import rms_norm as op
from liger_kernel.ops.rms_norm import LigerRMSNormFunction as LigerRMSNormFunction


def initial_weight(size: int, init_fn: str) -> nn.Parameter:
    """A parameter of shape (size,), all "ones" or all "zeros"; ValueError for another `init_fn`."""
    check_choice("init_fn", init_fn, ("ones", "zeros"))
    return nn.Parameter(getattr(torch, init_fn)(size))


class LigerRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last dimension, see `liger_kernel.ops.rms_norm`.

    Args:
        hidden_size: length N of the weight; may be None without one.
        eps: added to the mean of squares, kept as `variance_epsilon`.
        offset, casting_mode, init_fn, in_place: None for the default of the class, which its body shows. `init_fn` is
            "ones" or "zeros".
        in_place, row_mode: kept for callers that name them; they have no effect, nothing is computed in place.
        elementwise_affine: False for no weight.

    Raises: ValueError for an unknown `init_fn` or casting mode, or a weight without a size.
    """

    offset: float = 0.0
    casting_mode: str = "llama"
    init_fn: str = "ones"
    in_place: bool = True

    def __init__(
        self,
        hidden_size: int | None,
        eps: float = 1e-6,
        offset: float | None = None,
        casting_mode: str | None = None,
        init_fn: str | None = None,
        in_place: bool | None = None,
        row_mode: bool | None = None,
        elementwise_affine: bool = True,
    ):
        super().__init__()
        self.variance_epsilon = eps
        self.offset = self.offset if offset is None else offset
        self.casting_mode = self.casting_mode if casting_mode is None else casting_mode
        check_choice("casting_mode", self.casting_mode, op.CASTING_MODES)
        self.in_place = self.in_place if in_place is None else in_place
        self.row_mode = row_mode
        self.elementwise_affine = elementwise_affine
        if not elementwise_affine:
            self.register_parameter("weight", None)
        elif hidden_size is None:
            raise ValueError(
                "hidden_size=None needs elementwise_affine=False; pass the size of the weight."
            )
        else:
            self.weight = initial_weight(hidden_size, self.init_fn if init_fn is None else init_fn)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return op.rms_norm(
            hidden_states, self.weight, self.variance_epsilon, self.offset, self.casting_mode
        )

    def extra_repr(self) -> str:
        shape = None if self.weight is None else tuple(self.weight.shape)
        return (
            f"{shape}, eps={self.variance_epsilon}, offset={self.offset}, in_place={self.in_place}, "
            f"row_mode={self.row_mode}"
        )


class LigerRMSNormForGemma(LigerRMSNorm):
    """Offset 1, rounded once as Gemma does, a weight that starts with zeros."""

    offset, casting_mode, init_fn = 1.0, "gemma", "zeros"


class LigerRMSNormForGemma2(LigerRMSNorm):
    """As `LigerRMSNormForGemma`."""

    offset, casting_mode, init_fn, in_place = 1.0, "gemma", "zeros", False


class LigerRMSNormForQwen3Next(LigerRMSNormForGemma2):
    """As `LigerRMSNormForGemma`."""


class LigerRMSNormForMuseGlimmerTextCentered(LigerRMSNormForGemma2):
    """As `LigerRMSNormForGemma`."""


class LigerRMSNormForOlmo2(LigerRMSNorm):
    """`LigerRMSNorm` under the name that OLMo 2 is patched with."""

    in_place = False


class LigerRMSNormForGlm4(LigerRMSNorm):
    """`LigerRMSNorm` under the name that GLM-4 is patched with."""

    in_place = False


class LigerRMSNormForGemma3(LigerRMSNorm):
    """`LigerRMSNorm` whose size may also be named `dim`, and whose weight goes with `with_scale=False`, as in HF."""

    offset, casting_mode, init_fn, in_place = 1.0, "gemma", "zeros", False

    def __init__(
        self,
        dim: int | None = None,
        eps: float = 1e-6,
        offset: float | None = None,
        casting_mode: str | None = None,
        init_fn: str | None = None,
        in_place: bool | None = None,
        with_scale: bool = True,
        *,
        hidden_size: int | None = None,
    ):
        size = hidden_size if dim is None else dim
        super().__init__(
            size, eps, offset, casting_mode, init_fn, in_place, elementwise_affine=with_scale
        )
        self.with_scale = with_scale


class LigerRMSNormForGemma4(LigerRMSNormForGemma3):
    """As `LigerRMSNormForGemma3`, with offset 0 and a weight that starts with ones."""

    offset, init_fn = 0.0, "ones"


class LigerRMSNormForMuseGlimmer(LigerRMSNormForGemma4):
    """As `LigerRMSNormForGemma4`."""
