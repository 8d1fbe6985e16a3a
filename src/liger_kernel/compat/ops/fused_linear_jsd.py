"""The linear JSD: see `core`."""

from __future__ import annotations

import torch

import liger_kernel.loss_head.fused_linear_jsd as _op
from liger_kernel.compat.function import autograd_function
from liger_kernel.loss_head.fused_linear_cross_entropy import check_implementation


def _function(
    student_input, student_weight, teacher_input, teacher_weight, shift_labels=None, jsd_beta=0.5, ignore_index=-100,
    temperature=1.0, accum_dtype=None, jsd_impl=None, jsd_mode=None,
):  # fmt: skip
    check_implementation(jsd_impl=jsd_impl, jsd_mode=jsd_mode)
    teacher = teacher_input, teacher_weight
    options = shift_labels, jsd_beta, ignore_index, temperature, accum_dtype
    return _op.fused_linear_jsd(student_input, student_weight, *teacher, *options)


LigerFusedLinearJSDFunction = autograd_function("LigerFusedLinearJSDFunction", _function)


def fused_linear_jsd_forward(
    student_input, student_weight, teacher_input, teacher_weight, shift_labels, jsd_beta, ignore_index, has_label,
    temperature, jsd_impl=None, jsd_mode=None, accum_dtype=None,
):  # fmt: skip
    """(loss, gradient of student_input, that of student_weight if it requires one, else None)."""
    labels = shift_labels if has_label else None
    options = labels, jsd_beta, ignore_index, temperature, accum_dtype, jsd_impl, jsd_mode
    return with_gradients(
        lambda x, w: _function(x, w, teacher_input, teacher_weight, *options),
        student_input,
        student_weight,
    )


def with_gradients(loss_of, x, weight):
    x, w = x.detach().requires_grad_(), weight.detach().requires_grad_(weight.requires_grad)
    with torch.enable_grad():
        loss = loss_of(x, w)
    dx, dw = (
        torch.autograd.grad(loss, (x, w))
        if w.requires_grad
        else (*torch.autograd.grad(loss, x), None)
    )
    return loss.detach(), dx, dw


def fused_linear_jsd_backward(grad_output, grad_input, grad_weight):
    return grad_input * grad_output, None if grad_weight is None else grad_weight * grad_output
