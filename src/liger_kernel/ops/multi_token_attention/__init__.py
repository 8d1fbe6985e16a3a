"""Multi-token attention (Golovneva et al. 2025, https://arxiv.org/abs/2504.00927): causal attention weights, mixed over
neighbouring queries, keys and heads by a convolution."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.autograd import Op, autocast_dtype
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops import OPS
from liger_kernel.ops.multi_token_attention import reference
from liger_kernel.ops.multi_token_attention.contract import MultiTokenAttentionOptions

Pair = int | tuple[int, int]


class _MultiTokenAttention(Op):
    pass


_dispatch = Dispatch(
    "multi_token_attention",
    _MultiTokenAttention,
    reference.multi_token_attention,
    shards=no_shards("multi_token_attention", "call it on the local shards, .to_local()"),
)


def multi_token_attention(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    sparse: bool = False,
) -> Tensor:
    """`conv2d(softmax(causal scores))`, with zeros above the diagonal.

    Args:
        scores: (B, C, L, L), queries by keys; any floating dtype, any strides.
        weight: (O, C / groups, kH, kW), bias (O,) or None, stride, padding, dilation and groups: as in
            `torch.nn.functional.conv2d`.
        sparse: sparsemax in place of the softmax.

    Returns: (B, O, L', L') in the dtype of scores. A key after the query weighs 0 before the convolution, and 0 in what
        is returned.
    Raises: ValueError for scores that are not square, or that the convolution makes so, and for sizes that do not fit
        each other; TypeError for integers, and for parameters in another dtype than scores, outside of autocast.
    """
    check_floating(scores=scores, weight=weight, bias=bias)
    check_same_device(scores=scores, weight=weight, bias=bias)
    if scores.ndim != 4 or scores.shape[-2] != scores.shape[-1]:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; pass (B, C, L, L).")
    options = MultiTokenAttentionOptions(
        _pair(stride),
        padding if isinstance(padding, str) else _pair(padding),
        _pair(dilation),
        groups,
        sparse,
    )
    _check_sizes(options, scores, weight, bias)
    computed = autocast_dtype(scores)
    if computed is not None:
        weight, bias = weight.to(computed), None if bias is None else bias.to(computed)
    elif weight.dtype != scores.dtype or (bias is not None and bias.dtype != scores.dtype):
        named = {"scores": scores, "weight": weight, "bias": bias}
        found = ", ".join(f"{n} {t.dtype}" for n, t in named.items() if t is not None)
        raise TypeError(f"{found} differ; pass one dtype.")
    y: Tensor = _dispatch(options, scores, weight, bias)
    return y


def _check_sizes(
    options: MultiTokenAttentionOptions, scores: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    fit = weight.ndim == 4 and options.groups > 0 and weight.shape[0] % options.groups == 0
    fit = fit and weight.shape[1] * options.groups == scores.shape[1]
    if not fit or (bias is not None and bias.shape != weight.shape[:1]):
        named = {"scores": scores, "weight": weight, "bias": bias}
        shapes = ", ".join(f"{n} {None if t is None else tuple(t.shape)}" for n, t in named.items())
        raise ValueError(
            f"{shapes} do not fit each other with groups={options.groups}; pass (B, C, L, L), (O, C / groups, kH, kW) "
            f"and (O,) or None."
        )
    padding, taps = options.padding, weight.shape[2:]
    if isinstance(padding, str) and (
        padding != "valid" and (padding, options.stride) != ("same", (1, 1))
    ):
        raise ValueError(
            f"padding={padding!r} with stride={options.stride}; pass numbers, 'valid' or, with stride 1, 'same'."
        )
    pads = (0,) if isinstance(padding, str) else padding
    if min(*options.stride, *options.dilation, *taps) < 1 or min(pads) < 0:
        raise ValueError(
            f"stride={options.stride}, dilation={options.dilation} and a kernel of {tuple(taps)} have to be 1 or more, "
            f"padding={padding} 0 or more."
        )
    (_, rows), (_, cols) = options.geometry(scores.shape[-1], (taps[0], taps[1]))
    if rows != cols or rows < min(1, scores.shape[-1]):
        raise ValueError(
            f"The convolution makes {(scores.shape[0], weight.shape[0], rows, cols)} of scores {tuple(scores.shape)}, "
            f"but the last two dimensions have to be equal for the causal mask, and no less than 1; choose stride and "
            f"padding to fit the kernel."
        )


def _pair(value: Pair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    rows, *rest = value  # of one number, as a list of it, too
    return rows, (rest or [rows])[0]


__getattr__ = compat_names(__name__, OPS["multi_token_attention"])
