"""The functional API: the argument names and order of the incumbent over the public functions of `liger_kernel.ops`.

Every op is looked up in its module at the call, so that replacing it there takes effect here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import liger_kernel.loss_head.fused_linear_cross_entropy as _fused_linear_cross_entropy
import liger_kernel.loss_head.fused_linear_jsd as _fused_linear_jsd
import liger_kernel.loss_head.fused_linear_kl_div as _fused_linear_kl_div
import liger_kernel.ops as _ops
import liger_kernel.ops.attn_res as _attn_res
import liger_kernel.ops.cross_entropy as _cross_entropy
import liger_kernel.ops.dyt as _dyt
import liger_kernel.ops.fused_add_rms_norm as _fused_add_rms_norm
import liger_kernel.ops.fused_neighborhood_attention as _fused_neighborhood_attention
import liger_kernel.ops.glu as _glu
import liger_kernel.ops.group_norm as _group_norm
import liger_kernel.ops.jsd as _jsd
import liger_kernel.ops.kl_div as _kl_div
import liger_kernel.ops.layer_norm as _layer_norm
import liger_kernel.ops.mhc_mix as _mhc_mix
import liger_kernel.ops.mhc_sinkhorn as _mhc_sinkhorn
import liger_kernel.ops.modulated_rms_norm as _modulated_rms_norm
import liger_kernel.ops.multi_token_attention as _multi_token_attention
import liger_kernel.ops.poly_norm as _poly_norm
import liger_kernel.ops.relu_squared as _relu_squared
import liger_kernel.ops.rms_norm as _rms_norm
import liger_kernel.ops.rope as _rope
import liger_kernel.ops.softmax as _softmax
import liger_kernel.ops.sparsemax as _sparsemax
import liger_kernel.ops.tvd as _tvd
from liger_kernel._core.dtensor import is_dtensor
from liger_kernel._core.lazy import compat_names
from liger_kernel._core.options import parameters_of, spells_out
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyTPFunction

#: as it was before anybody installed `liger_cross_entropy` in its place
_torch_cross_entropy = torch.nn.functional.cross_entropy


@dataclass
class CrossEntropyOutput:
    """What a cross entropy returns with a `return_*` flag; a field without its flag is None."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def _loss_or_output(outputs: _cross_entropy.Outputs) -> Tensor | CrossEntropyOutput:
    """The loss alone, unless there is more."""
    if all(output is None for output in outputs[1:]):
        return outputs[0]
    return CrossEntropyOutput(*outputs)


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`torch.nn.functional.cross_entropy`, with z-loss, soft-capping, accuracy and predictions on request.

    Computes (BT, V) logits with (BT,) int64 labels itself and leaves everything else that torch accepts to torch:
    other shapes, class probabilities, DTensors, `size_average` and `reduce`, float64 without the extra options.

    Returns: the loss, or a `CrossEntropyOutput` if one of the `return_*` flags is set.
    Raises: ValueError if an option that torch does not know meets an input that we leave to torch.
    """
    extras: dict[str, Any] = {
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
        "return_z_loss": return_z_loss,
        "return_token_accuracy": return_token_accuracy,
        "return_predicted_tokens": return_predicted_tokens,
    }
    asked = [name for name, value in extras.items() if value]
    ours = (
        input.ndim == 2
        and target.ndim == 1
        and target.dtype == torch.int64
        and size_average is None
        and reduce is None
        and not is_dtensor(input)
    )
    if not asked and (not ours or input.dtype == torch.float64):
        return _torch_cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if not ours:
        raise ValueError(
            f"{', '.join(asked)} needs plain (BT, V) logits and (BT,) int64 labels without size_average and reduce; "
            f"got input {tuple(input.shape)} and target {tuple(target.shape)} of {target.dtype}. Flatten them first."
        )
    outputs = _cross_entropy.cross_entropy(
        input,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        **extras,
    )
    return _loss_or_output(outputs)


@spells_out(_fused_linear_cross_entropy.SHARED_OPTIONS, before="chunk_mem_const")
def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    chunk_mem_const: int = 1,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    label_count: LabelCount | int | None = None,
    **options: Any,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy of `input @ weight.T + bias` without the logits: `fused_linear_cross_entropy`.

    A `chunk_mem_const` other than 1 allows the logits of a chunk so many times the bytes of `input`.

    Returns: the loss, or a `CrossEntropyOutput` if one of the `return_*` flags is set.
    """
    op = _fused_linear_cross_entropy
    if memory_budget is None:
        memory_budget = op.memory_budget(input, weight, chunk_mem_const)
    options.update(chunk_size=chunk_size, memory_budget=memory_budget, label_count=label_count)
    return _loss_or_output(
        op.fused_linear_cross_entropy(input, weight, target, bias, ce_weight, **options)
    )


@spells_out(parameters_of(_fused_linear_jsd.fused_linear_jsd)[:9])
def liger_fused_linear_jsd(**options: Any) -> Tensor:
    """`fused_linear_jsd`: of the softmaxes of two heads, without the logits."""
    return _fused_linear_jsd.fused_linear_jsd(**options)


@spells_out(parameters_of(_fused_linear_kl_div.fused_linear_kl_div)[:9])
def liger_fused_linear_kl_div(**options: Any) -> Tensor:
    """`fused_linear_kl_div`: from given probabilities to the softmax of a head, without the logits."""
    return _fused_linear_kl_div.fused_linear_kl_div(**options)


def liger_rms_norm(
    X: Tensor,
    W: Tensor | None,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> Tensor:
    """`rms_norm`; `in_place` is accepted and changes nothing."""
    return _rms_norm.rms_norm(X, W, eps, offset, casting_mode)


def liger_fused_add_rms_norm(
    X: Tensor,
    R: Tensor,
    W: Tensor,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of X + R, X + R); `in_place` is accepted and changes nothing."""
    return _fused_add_rms_norm.fused_add_rms_norm(X, R, W, eps, offset, casting_mode)


def liger_layer_norm(X: Tensor, W: Tensor | None, B: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` over the last dimension."""
    return _layer_norm.layer_norm(X, W, B, eps)


def liger_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`rope`; `position_ids` is unused, as in HF: cos and sin are already gathered."""
    return _rope.rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, rotary_dim=rotary_dim)


def liger_qwen2vl_mrope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    mrope_section: Sequence[int],
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """`rope` with cos and sin (3, B, S, D), of which `mrope_section` selects."""
    return _rope.rope(q, k, cos, sin, unsqueeze_dim, mrope_section=mrope_section)


def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    """`silu(a) * b`."""
    return _glu.glu(a, b, "silu")


def liger_geglu(a: Tensor, b: Tensor) -> Tensor:
    """`gelu_tanh(a) * b`."""
    return _glu.glu(a, b, "gelu_tanh")


def liger_relu_squared(x: Tensor) -> Tensor:
    """`max(x, 0)^2`."""
    return _relu_squared.relu_squared(x)


def liger_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = True,
    reduce: bool | None = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """`kl_div`; False for `reduce` or `size_average` means "none" or "sum", as in torch."""
    if reduce is False:
        reduction = "none"
    elif size_average is False:
        reduction = "sum"
    return _kl_div.kl_div(input, target, reduction, log_target, eps)


def liger_jsd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """`jsd` of log-probabilities."""
    return _jsd.jsd(input, target, shift_labels, beta, ignore_index)


def liger_tvd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """`tvd` of probabilities."""
    return _tvd.tvd(input, target, shift_labels, reduction, ignore_index)


def liger_softmax(x: Tensor) -> Tensor:
    """`softmax` over the last dimension."""
    return _softmax.softmax(x)


def liger_fused_neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int = 7,
    dilation: int = 1,
    scale: float | None = None,
) -> Tensor:
    """`fused_neighborhood_attention` of (B, H, S, D)."""
    return _fused_neighborhood_attention.fused_neighborhood_attention(
        query, key, value, kernel_size, dilation, scale
    )


def liger_multi_token_attention(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    sparse: bool = False,
) -> Tensor:
    """`multi_token_attention` of scores (B, C, L, L)."""
    return _multi_token_attention.multi_token_attention(
        scores, weight, bias, stride, padding, dilation, groups, sparse
    )


def liger_sparsemax(input: Tensor, dim: int = -1) -> Tensor:
    """`sparsemax` along `dim`."""
    return _sparsemax.sparsemax(input, dim)


def liger_dyt(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    """`tanh(alpha x) gamma + beta`."""
    return _dyt.dyt(x, alpha, gamma, beta)


def liger_poly_norm(
    X: Tensor, W: Tensor, B: Tensor, eps: float = 1e-6, in_place: bool = True
) -> Tensor:
    """`poly_norm`; `in_place` is accepted and changes nothing."""
    return _poly_norm.poly_norm(X, W, B, eps)


def liger_group_norm(
    X: Tensor,
    affine_scaling_weight: Tensor | None,
    affine_shifting_bias: Tensor | None,
    num_channels: int,
    num_groups: int,
    eps: float,
) -> Tensor:
    """`group_norm`, whose channels are counted: ValueError unless X has `num_channels`."""
    _group_norm.check_channels(X, num_channels)
    weight, bias = affine_scaling_weight, affine_shifting_bias
    return _group_norm.group_norm(X, weight, bias, num_groups, eps)


def liger_modulated_rms_norm(
    X: Tensor,
    W: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> Tensor:
    """`modulated_rms_norm`; `in_place` is accepted and changes nothing."""
    return _modulated_rms_norm.modulated_rms_norm(X, W, scale, shift, eps, offset, casting_mode)


#: the autograd Functions of all ops are here, too
__getattr__ = compat_names(__name__, (n for n in dir(_ops) if n.endswith("Function")))


def liger_fused_linear_scaled_cross_entropy_tp(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: Any,
    temperature: float = 1.0,
    ignore_index: int = -100,
    tiles_per_reduce: int = 1,
    return_entropy: bool = False,
) -> Any:
    """The negative log-probability (N,) of each token, and with `return_entropy` the entropy, by a head whose classes
    are spread over the ranks of `tp_group`: see `liger_kernel.distributed.vocab_parallel_logprobs`.

    Args:
        input: (N, H) and target: (N,), the same on every rank. weight: (classes of this rank, H).
    """
    return LigerFusedLinearScaledCrossEntropyTPFunction.apply(
        input, weight, target, tp_group, temperature, ignore_index, tiles_per_reduce, return_entropy
    )


def liger_mhc_coeffs(
    x: Tensor,
    phi: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    *,
    allow_fp32: bool = False,
    tmax: int = 20,
    rms_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(h_pre, h_post, h_res) of streams x (..., HC, C), in fp32: `mhc_coeffs`. fp32 streams need no `allow_fp32`."""
    options = {"tmax": tmax, "pre_eps": pre_eps, "sinkhorn_eps": sinkhorn_eps}
    return _mhc_sinkhorn.mhc_coeffs(
        x, phi, b, alpha_pre, alpha_post, alpha_res, rms_eps, post_mult=post_mult, **options
    )


def liger_mhc_pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """What the layer gets, (..., C): `mhc_pre`."""
    return _mhc_mix.mhc_pre(x, h_pre)


def liger_mhc_post_res(x: Tensor, f_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The next streams, (..., HC, C): `mhc_post_res`."""
    return _mhc_mix.mhc_post_res(x, f_out, h_post, h_res)


def liger_mhc_apply(
    x: Tensor,
    f_out: Tensor,
    h_pre: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    *,
    return_x_in: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The next streams; with `return_x_in` also what the layer gets."""
    x_out = liger_mhc_post_res(x, f_out, h_post, h_res)
    return (x_out, liger_mhc_pre(x, h_pre)) if return_x_in else x_out


def liger_mhc_forward(
    x: Tensor,
    layer: Callable[[Tensor], Tensor],
    phi: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    *,
    allow_fp32: bool = False,
    tmax: int = 20,
    rms_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 2.0,
    return_coeffs: bool = False,
) -> Any:
    """The next streams `h_res x + h_post layer(h_pre x)`; with `return_coeffs` also (h_pre, h_post, h_res).

    `layer` gets one stream, in the dtype of its first parameter if it has one.
    """
    coeffs = liger_mhc_coeffs(
        x, phi, b, alpha_pre, alpha_post, alpha_res,
        allow_fp32=allow_fp32, tmax=tmax, rms_eps=rms_eps, pre_eps=pre_eps, sinkhorn_eps=sinkhorn_eps,
        post_mult=post_mult,
    )  # fmt: skip
    h_pre, h_post, h_res = coeffs
    parameters = [*layer.parameters()] if isinstance(layer, torch.nn.Module) else []
    first = parameters[0] if parameters else None
    x_in = liger_mhc_pre(x, h_pre)
    f_out = layer(x_in if first is None else x_in.to(first.dtype))
    x_out = liger_mhc_post_res(x, f_out, h_post, h_res)
    return (x_out, coeffs) if return_coeffs else x_out


def liger_attn_res(
    V: Tensor | Sequence[Tensor], w_query: Tensor, w_norm: Tensor, eps: float = 1e-6
) -> Tensor:
    """`attn_res` of blocks, stacked or in a list."""
    return _attn_res.attn_res(V, w_query, w_norm, eps)
