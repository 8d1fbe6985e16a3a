"""Cross entropy and total variation distance to a teacher of given logits, in one walk over both.

`step` of its kernels computes the other distances between two rows of logits, too: it is that of the row losses of
distillation (`liger_kernel.loss_head.losses.distillation`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op, is_transformed
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.dtensor import on_shards
from liger_kernel._core.lazy import compat_names
from liger_kernel.backends.dispatch import Dispatch
from liger_kernel.ops import OPS
from liger_kernel.ops.cross_entropy import check_class_indices, check_labels
from liger_kernel.ops.fused_ce_tvd import reference
from liger_kernel.ops.fused_ce_tvd.contract import CETVDOptions


class _CETVD(Op):
    pass


_dispatch = Dispatch(
    "fused_ce_tvd",
    _CETVD,
    reference.fused_ce_tvd,
    shards=lambda run, x, y, target: on_shards(
        run, x, y, target, whole_dims=(1,), shapes=x.shape[:1]
    ),
)


def fused_ce_tvd(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Cross entropy with the labels, and total variation distance to a teacher, of each row.

    Args:
        student_logits: (N, V), any floating dtype, any strides. DTensors are computed by shards of rows.
        teacher_logits: (N, V). A constant: it gets no gradient.
        target: (N,) integers; a row whose label is `ignore_index` is not read, and has 0 in both.

    Returns: two tensors (N,), at least fp32; both carry a gradient.
    Raises: ValueError and TypeError for tensors that do not fit; IndexError for a label out of range on the CPU,
        elsewhere such a label gives NaN.
    """
    check_floating(student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.ndim != 2 or teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"student_logits have shape {tuple(student_logits.shape)} and teacher_logits "
            f"{tuple(teacher_logits.shape)}, not both (N, V); flatten them with .view(-1, V)."
        )
    if target.shape != student_logits.shape[:1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but student_logits have {student_logits.shape[0]} rows; "
            f"pass a tensor of shape ({student_logits.shape[0]},)."
        )
    check_class_indices(target)
    check_same_device(student_logits=student_logits, teacher_logits=teacher_logits, target=target)
    target = target.to(torch.int64)
    if not is_transformed():
        check_labels(target, student_logits.shape[1], ignore_index)
        if not torch.is_grad_enabled():
            student_logits = (
                student_logits.detach()
            )  # `needs_input_grad` does not know about no_grad
    found: tuple[Tensor, Tensor] = _dispatch(
        CETVDOptions(ignore_index), student_logits, teacher_logits.detach(), target
    )
    return found


__getattr__ = compat_names(__name__, OPS["fused_ce_tvd"])
