"""The gated short convolution between its projections, the token mixer of LFM2."""

from __future__ import annotations

from torch import Tensor, nn

from liger_kernel.ops.short_conv import short_conv


class LigerShortConv(nn.Module):
    """`out_proj(C * conv(B * x))`, of which B, C and x are the thirds of `in_proj(hidden_states)`: `ops.short_conv`.

    Args:
        hidden_size: channels, of input and output.
        kernel_size: taps of the convolution, the last of which is that of the token itself.
        bias: whether projections and convolution have one.

    The parameters have the names and shapes of `Lfm2ShortConv` of transformers.
    """

    def __init__(self, hidden_size: int, kernel_size: int = 3, bias: bool = False):
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.conv = nn.Conv1d(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=bias)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., S, hidden_size); S tokens are one sequence."""
        conv = self.conv
        y: Tensor = self.out_proj(
            short_conv(self.in_proj(hidden_states), conv.weight.squeeze(1), conv.bias)
        )
        return y
