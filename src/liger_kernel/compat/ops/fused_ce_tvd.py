"""Cross entropy with total variation distance: see `core`."""

from __future__ import annotations

import liger_kernel.ops.fused_ce_tvd as _op
from liger_kernel._core.shapes import as_rows
from liger_kernel.compat.function import autograd_function
from liger_kernel.compat.ops.core import _triton
from liger_kernel.ops.fused_ce_tvd.contract import CETVDOptions


def _function(student_logits, teacher_logits, target, ignore_index=-100):
    return _op.fused_ce_tvd(student_logits, teacher_logits, target, ignore_index)


LigerFusedCETVDFunction = autograd_function("LigerFusedCETVDFunction", _function)


def fused_ce_tvd_forward(student_logits, teacher_logits, target, ignore_index):
    """(cross entropy, distance, both logsumexps, sum p sign(p - q) of the student's p), all (N,), by the Triton kernel.

    What the last three say of an ignored row is not defined."""
    kernels, options = _triton("fused_ce_tvd", student_logits), CETVDOptions(ignore_index)
    found, saved = kernels.forward(
        student_logits, teacher_logits, target, options=options, needs=(True, False, False)
    )
    lse, teacher_lse, slopes = saved[-3:]
    return *found, lse, teacher_lse, 2 * slopes


def fused_ce_tvd_backward(
    grad_ce, grad_tvd, student_logits, teacher_logits, target, student_lse, teacher_lse, sigma, ignore_index
):  # fmt: skip
    """The gradient of `student_logits`."""
    kernels, options = _triton("fused_ce_tvd", student_logits), CETVDOptions(ignore_index)
    rows = as_rows(student_logits), as_rows(teacher_logits), target.contiguous()
    saved = (*rows, student_lse, teacher_lse, sigma / 2)
    return kernels.backward((grad_ce, grad_tvd), saved, options=options, needs=(True,))[0]
