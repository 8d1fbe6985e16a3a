"""The autograd Functions and helpers of the incumbent's ops: its names, signatures and return values.

They are computed by our ops: on any device, with any strides, without writing to an input. What cannot matter here
(`in_place`, `row_mode`, `position_ids`, launch configurations) is accepted and changes nothing. A `..._forward` runs
without autograd and returns what `..._backward` takes, which gives gradients in fresh memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import liger_kernel.loss_head.fused_linear_cross_entropy as _fused_loss
import liger_kernel.ops.cross_entropy as _ce
import liger_kernel.ops.dyt as _dyt
import liger_kernel.ops.fused_add_rms_norm as _add_rms
import liger_kernel.ops.gated_mlp as _mlp
import liger_kernel.ops.glu as _glu
import liger_kernel.ops.group_norm as _group
import liger_kernel.ops.jsd as _jsd
import liger_kernel.ops.kl_div as _kl
import liger_kernel.ops.layer_norm as _layer
import liger_kernel.ops.modulated_rms_norm as _modulated
import liger_kernel.ops.poly_norm as _poly
import liger_kernel.ops.relu_squared as _relu
import liger_kernel.ops.rms_norm as _rms
import liger_kernel.ops.softmax as _softmax
import liger_kernel.ops.sparsemax as _sparsemax
import liger_kernel.ops.tvd as _tvd
from liger_kernel._core.checks import check_choice, check_last_dim
from liger_kernel._core.options import parameters_of, spells_out
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends import facts_of, kernels_of, use_implementation
from liger_kernel.backends.dispatch import kernels_for
from liger_kernel.compat.function import autograd_function
from liger_kernel.ops.dyt.contract import DyTOptions
from liger_kernel.ops.group_norm.contract import GroupNormOptions
from liger_kernel.ops.modulated_rms_norm.contract import ModulatedRMSNormOptions
from liger_kernel.ops.norms import CASTING_MODES
from liger_kernel.ops.poly_norm.contract import PolyNormOptions

fused_linear_cross_entropy_forward = _fused_loss.fused_linear_cross_entropy_forward
fused_linear_cross_entropy_backward = _fused_loss.fused_linear_cross_entropy_backward

# --- autograd Functions ---------------------------------------------------------------------------


@spells_out(_fused_loss.SHARED_OPTIONS, before="ce_impl")
def _fused_linear_cross_entropy(
    _input, weight, target, bias=None, ce_weight=None, ce_impl=None, ce_mode=None, chunk_mem_const=1, **options
):  # fmt: skip
    """A `chunk_mem_const` other than 1 allows the logits of a chunk so many times the bytes of `_input`."""
    _fused_loss.check_implementation(ce_impl=ce_impl, ce_mode=ce_mode)
    options["memory_budget"] = _fused_loss.memory_budget(_input, weight, chunk_mem_const)
    op = _fused_loss.fused_linear_cross_entropy
    return op(_input, weight, target, bias, ce_weight, **options)


def _gated_mlp(
    input, gate_weight, up_weight, down_weight, gate_multiplier=1.0, down_multiplier=1.0
):
    y = _mlp.gated_mlp(input, gate_weight, up_weight, down_weight, "silu", gate_multiplier)
    return y if down_multiplier == 1 else y * down_multiplier


def _jsd_function(
    _input, target, shift_labels=None, beta=0.5, ignore_index=-100, jsd_impl=None, jsd_mode=None
):
    _fused_loss.check_implementation(jsd_impl=jsd_impl, jsd_mode=jsd_mode)
    return _jsd.jsd(_input, target, shift_labels, beta, ignore_index)


def _group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
    _group.check_channels(X, num_channels)
    return _group.group_norm(X, affine_scaling_weight, affine_shifting_bias, num_groups, eps)


#: name -> what its `apply` computes, and by it `forward` and `backward`
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "LigerCrossEntropyFunction": spells_out(parameters_of(_ce.cross_entropy))(
        lambda **options: _ce.cross_entropy(**options)
    ),
    "LigerFusedLinearCrossEntropyFunction": _fused_linear_cross_entropy,
    "LigerJSDFunction": _jsd_function,
    "LigerKLDivLossFunction": spells_out(parameters_of(_kl.kl_div))(
        lambda **options: _kl.kl_div(**options)
    ),
    "LigerTVDLossFunction": spells_out(parameters_of(_tvd.tvd))(
        lambda **options: _tvd.tvd(**options)
    ),
    "LigerRMSNormFunction": lambda X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None: (
        _rms.rms_norm(X, W, eps, offset, casting_mode)
    ),
    "LigerFusedAddRMSNormFunction": lambda X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False: (
        _add_rms.fused_add_rms_norm(X, R, W, eps, offset, casting_mode)
    ),
    "LigerLayerNormFunction": lambda X, W, B, eps: _layer.layer_norm(X, W, B, eps),
    "LigerModulatedRMSNormFunction": lambda X, W, scale, shift, eps, offset=0.0, casting_mode="llama", in_place=True: (
        _modulated.modulated_rms_norm(X, W, scale, shift, eps, offset, casting_mode)
    ),
    "LigerGroupNormFunction": _group_norm,
    "LigerPolyNormFunction": lambda X, W, B, eps=1e-6, in_place=True: _poly.poly_norm(X, W, B, eps),
    "LigerMLPFunction": _gated_mlp,
    "LigerSiLUMulFunction": lambda a, b, gate_multiplier=1.0, down_multiplier=1.0: _glu.glu(
        a, b, "silu", gate_multiplier, down_multiplier
    ),
    "LigerGELUMulFunction": lambda a, b: _glu.glu(a, b, "gelu_tanh"),
    "LigerFusedGateUpSiLUMulFunction": lambda y, in_place=False: _glu.glu_packed(y, "silu"),
    "LigerDyTFunction": lambda x, alpha, gamma, beta: _dyt.dyt(x, alpha, gamma, beta),
    "LigerSoftmaxFunction": lambda input_: _softmax.softmax(input_),
    "LigerSparsemaxFunction": lambda x, dim: _sparsemax.sparsemax(x, dim),
    "LigerReLUSquaredFunction": lambda X: _relu.relu_squared(X),
}
globals().update({name: autograd_function(name, call) for name, call in FUNCTIONS.items()})

# --- helpers --------------------------------------------------------------------------------------


def cross_entropy_forward(_input, target, *args, **options):
    """The outputs of `cross_entropy` and d sum(loss) / d _input, which is None if `_input` requires no gradient."""
    logits = _input.detach().requires_grad_(_input.requires_grad)
    with torch.enable_grad():
        loss, *others = _ce.cross_entropy(logits, target, *args, **options)
    grad = torch.autograd.grad(loss.sum(), logits)[0] if logits.requires_grad else None
    return loss.detach(), *others, grad


def cross_entropy_backward(_input, grad_output):
    """The gradient that `cross_entropy_forward` returned times that of the loss, 0-d or one per row; out of place."""
    return _input * (grad_output[:, None] if grad_output.ndim else grad_output)


def jsd_forward(
    _input, target, shift_labels, beta, ignore_index, has_label, jsd_impl=None, jsd_mode=None
):
    """The loss and its gradient."""
    options = (shift_labels if has_label else None, beta, ignore_index, jsd_impl, jsd_mode)
    return _with_gradient(lambda x: _jsd_function(x, target, *options), _input)


def jsd_backward(dX, grad_output):
    return dX * grad_output


@torch.no_grad()
def kldiv_forward_triton(y_pred, y_true, log_target, reduction, eps):
    return _kl.kl_div(y_pred, y_true, reduction, log_target, eps)


def kldiv_backward_triton(target, grad_output, new_grads, log_target):
    """`new_grads`, which gets the gradient of the sum times `grad_output`."""
    return new_grads.copy_(-(target.exp() if log_target else target) * grad_output)


def tv_distance_forward_triton(p, q, shift_labels, reduction, ignore_index, has_label):
    """The loss and its gradient."""
    labels = shift_labels if has_label else None
    return _with_gradient(lambda p: _tvd.tvd(p, q, labels, reduction, ignore_index), p)


def tvd_backward_triton(grad_output, grads):
    return grads * grad_output


def _with_gradient(loss_of, x):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(x)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def rms_norm_forward(X, W, eps, offset, casting_mode, row_mode=None):
    """(Y, X as rows, rstd, block size, warps, mode code) by the Triton kernel.

    Raises, as the other norms here: ValueError for what does not fit, RuntimeError where Triton cannot run.
    """
    options = _rms.RMSNormOptions(eps, offset, _mode_name(casting_mode))
    y, (rows, _, rstd) = _norm("rms_norm", options, X, W=W)
    return y, rows, rstd, *_launch_configuration(X), CASTING_MODES[options.casting_mode]


def rms_norm_backward(
    dY, X, W, RSTD, offset, casting_mode, BLOCK_SIZE, num_warps, in_place, row_mode=None, needs_dw=None
):  # fmt: skip
    """(dX, dW or None)."""
    options = _rms.RMSNormOptions(0.0, offset, _mode_name(casting_mode))
    needs, saved = (True, _wanted(W, needs_dw)), (as_rows(X), W, RSTD)
    return _triton("rms_norm", X).backward((dY,), saved, options=options, needs=needs)


def fused_add_rms_norm_forward(X, R, W, eps, offset, casting_mode):
    """(Y, S, rstd, block size, warps, stages, mode code) by the Triton kernel."""
    options = _add_rms.FusedAddRMSNormOptions(eps, offset, _mode_name(casting_mode))
    (y, s), (_, _, rstd) = _norm("fused_add_rms_norm", options, X, R, W=W)
    return y, s, rstd, *_launch_configuration(X), 2, CASTING_MODES[options.casting_mode]


def fused_add_rms_norm_backward(
    dY, dS_out, S, W, RSTD, offset, casting_mode, BLOCK_SIZE, num_warps, num_stages, in_place, needs_dw=None
):  # fmt: skip
    """(dX, the same dX as gradient of R, dW or None)."""
    options = _add_rms.FusedAddRMSNormOptions(0.0, offset, _mode_name(casting_mode))
    grads, saved, needs = (dY, dS_out), (S, W, RSTD), (True, True, _wanted(W, needs_dw))
    return _triton("fused_add_rms_norm", S).backward(grads, saved, options=options, needs=needs)


def layer_norm_forward(X, W, B, eps):
    """(Y, X as rows, mean, rstd, block size, warps) by the Triton kernel; both statistics fp32."""
    options = _layer.LayerNormOptions(eps)
    y, (rows, _, _, mean, rstd) = _norm("layer_norm", options, X, W=W, B=B)
    return y, rows, mean, rstd, *_launch_configuration(X, centered=True)


def layer_norm_backward(dY, X, W, B, Mean, RSTD, needs_dw=None, needs_db=None):
    """(dX, dW or None, dB or None); dX in the shape of dY."""
    options, saved = _layer.LayerNormOptions(0.0), (as_rows(X), W, B, Mean, RSTD)
    needs = (True, _wanted(W, needs_dw), _wanted(B, needs_db))
    return _triton("layer_norm", X).backward((dY,), saved, options=options, needs=needs)


def poly_norm_forward(X, W, B, eps=1e-6):
    """(Y, X as rows, (R, 3) factors of the third, second and first power, block size, warps) by the Triton kernel.

    The first two factors are those of the powers of the third's product with X, which do not overflow.
    """
    _poly.check_weight(X, W, B)
    kernels, options = _triton("poly_norm", X), PolyNormOptions(eps)
    y, (rows, _, _, rstd) = kernels.forward(X, W, B, options=options, needs=(True,) * 3)
    return y, rows, rstd, *_launch_configuration(X)


def poly_norm_backward(dY, X, W, RSTD, BLOCK_SIZE, num_warps, in_place):
    """(dX in the shape of dY, dW, dB of shape () in the dtype of W)."""
    options, saved = PolyNormOptions(0.0), (as_rows(X), W, W[0], RSTD)
    return _triton("poly_norm", X).backward((dY,), saved, options=options, needs=(True,) * 3)


def modulated_rms_norm_forward(X, W, scale, shift, eps, offset, casting_mode):
    """(Y, rstd, block size, warps, mode code, rows of X to a row of scale) by the Triton kernel."""
    kernels, mode = _triton("modulated_rms_norm", X), _mode_name(casting_mode)
    per_scale = _modulated.check_modulation(X, W, scale, shift)
    options, needs = ModulatedRMSNormOptions(eps, offset, mode), (True,) * 4
    y, (*_, rstd) = kernels.forward(X, W, scale, shift, options=options, needs=needs)
    return y, rstd, *_launch_configuration(X), CASTING_MODES[mode], per_scale


def modulated_rms_norm_backward(
    dY, X, W, scale, shift, RSTD, offset, casting_mode, BLOCK_SIZE, num_warps, rows_per_modulation, in_place
):  # fmt: skip
    """(dX, dW or None, dscale, dshift or None)."""
    options = ModulatedRMSNormOptions(0.0, offset, _mode_name(casting_mode))
    needs = (True, W is not None, True, shift is not None)
    saved = (as_rows(X), W, scale, shift, RSTD)
    return _triton("modulated_rms_norm", X).backward((dY,), saved, options=options, needs=needs)


def group_norm_forward(X, num_channels, num_groups, W, B, eps):
    """(Y, X, mean, rstd, block size) by the Triton kernel; both statistics fp32, of shape (batch, groups)."""
    _group.check_channels(X, num_channels)
    _group.check_groups(X, W, B, num_groups)
    kernels, options = _triton("group_norm", X), GroupNormOptions(num_groups, eps)
    y, (x, _, _, mean, rstd) = kernels.forward(X, W, B, options=options, needs=(True,) * 3)
    return y, x, mean, rstd, _launch_configuration(X)[0]


def group_norm_backward(dY, X, W, B, Mean, RSTD, num_channels, num_groups):
    """(dX, dW or None, dB or None)."""
    options, needs = GroupNormOptions(num_groups, 0.0), (True, W is not None, B is not None)
    saved = (X.contiguous(), W, B, Mean, RSTD)
    return _triton("group_norm", X).backward((dY,), saved, options=options, needs=needs)


def _wanted(parameter, needs):
    return parameter is not None and needs is not False


def _norm(op, options, *rows, **parameters):
    """The forward of a norm, and what its backward needs."""
    for name, parameter in parameters.items():
        check_last_dim(name, parameter, rows[0].shape[-1], "X")
    tensors = (*rows, *parameters.values())
    return _triton(op, rows[0]).forward(*tensors, options=options, needs=(True,) * len(tensors))


def _triton(op, X):
    with use_implementation("triton"):
        return kernels_of(op, X)


def _mode_name(casting_mode):
    """The name of a casting mode given by name or code."""
    check_choice("casting_mode", casting_mode, (*CASTING_MODES, *CASTING_MODES.values()))
    return next(name for name, code in CASTING_MODES.items() if casting_mode in (name, code))


def _launch_configuration(X, centered=False):
    """(block size, warps) of the forward kernel."""
    from liger_kernel.ops.norms.kernels import Config

    config = Config.of(X.shape[-1], facts_of(X.device), centered)
    return config.block, config.warps


def swiglu_forward(a, b, gate_multiplier=1.0):
    """(a and b as (R, F), silu(a * gate_multiplier) * b like a)."""
    return _glu_forward(a, b, "silu", gate_multiplier)


def swiglu_backward(a, b, dc, gate_multiplier=1.0):
    return _glu_backward(a, b, dc, "silu", gate_multiplier)


def geglu_forward(a, b):
    """(a and b as (R, F), gelu_tanh(a) * b like a)."""
    return _glu_forward(a, b, "gelu_tanh")


def geglu_backward(a, b, dc):
    return _glu_backward(a, b, dc, "gelu_tanh")


@torch.no_grad()
def _glu_forward(a, b, activation, gate_multiplier=1.0):
    return as_rows(a), as_rows(b), _glu.glu(a, b, activation, gate_multiplier)


def _glu_backward(a, b, dc, activation, gate_multiplier=1.0):
    """The gradients of a and b, shaped like dc."""
    options, needs = _glu.GLUOptions(activation, gate_multiplier), (True, True)
    kernels = kernels_for("glu", options, a, b)
    grads = kernels.backward((as_rows(dc),), (a, b), options=options, needs=needs)
    return tuple(grad.view(dc.shape) for grad in grads)


@torch.no_grad()
def swiglu_fused_gate_up_forward(y):
    """(y as (R, 2F), SwiGLU of its halves (..., F))."""
    return as_rows(y), _glu.glu_packed(y)


def swiglu_fused_gate_up_backward(y, dc, in_place=False):
    """The gradient (R, 2F) of the packed rows."""
    options, needs = _glu.GLUOptions(), (True, False)
    kernels = kernels_for("glu", options, y, None)
    return kernels.backward((as_rows(dc),), (y, None), options=options, needs=needs)[0]


@torch.no_grad()
def relu_squared_forward(X):
    return _relu.relu_squared(X)


def relu_squared_backward(X, dY):
    options, saved = _relu.ReLUSquaredOptions(), (X.contiguous(),)
    return kernels_of("relu_squared", X).backward((dY,), saved, options=options, needs=(True,))[0]


@torch.no_grad()
def liger_dyt_fwd(x, alpha, gamma, beta):
    return _dyt.dyt(x, alpha, gamma, beta)


def liger_dyt_bwd(dy, x, alpha, gamma, beta):
    """(dx in the shape of dy, dalpha, dgamma, dbeta or None), each in the dtype of what it belongs to."""
    saved, needs = (as_rows(x), alpha, gamma, beta), (True, True, True, beta is not None)
    kernels = kernels_of("dyt", x)
    dx, *others = kernels.backward((as_rows(dy),), saved, options=DyTOptions(), needs=needs)
    return dx.view(dy.shape), *others
