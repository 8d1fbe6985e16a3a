"""The linear KL divergence: see `core`."""

from __future__ import annotations

import liger_kernel.loss_head.fused_linear_kl_div as _op
from liger_kernel.compat.function import autograd_function
from liger_kernel.compat.ops.fused_linear_jsd import fused_linear_jsd_backward, with_gradients


def _function(
    student_input, student_weight, target, shift_labels=None, reduction="batchmean", ignore_index=-100,
    temperature=1.0, eps=1e-10, accum_dtype=None,
):  # fmt: skip
    options = shift_labels, reduction, ignore_index, temperature, eps, accum_dtype
    return _op.fused_linear_kl_div(student_input, student_weight, target, *options)


LigerFusedLinearKLDivFunction = autograd_function("LigerFusedLinearKLDivFunction", _function)


def fused_linear_kl_div_forward(
    student_input, student_weight, target, shift_labels, reduction, ignore_index, has_label, temperature, eps,
    accum_dtype=None,
):  # fmt: skip
    """(loss, gradient of student_input, that of student_weight if it requires one, else None)."""
    labels = shift_labels if has_label else None
    options = labels, reduction, ignore_index, temperature, eps, accum_dtype
    return with_gradients(
        lambda x, w: _function(x, w, target, *options), student_input, student_weight
    )


fused_linear_kl_div_backward = fused_linear_jsd_backward
