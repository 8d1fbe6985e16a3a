"""Multi-token attention as an autograd Function."""

from __future__ import annotations

import liger_kernel.ops.multi_token_attention as _mta
from liger_kernel.compat.function import autograd_function


def _multi_token_attention(
    scores, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, sparse=False
):
    return _mta.multi_token_attention(
        scores, weight, bias, stride, padding, dilation, groups, sparse
    )


LigerMultiTokenAttentionFunction = autograd_function(
    "LigerMultiTokenAttentionFunction", _multi_token_attention
)
