"""Distillation from a teacher's logits: both models' full distributions, one chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_kernel._core.launch import cdiv
from liger_kernel.chunked_loss.engine import check_chunk_size
from liger_kernel.ops.cross_entropy import refuse_second_backward
from liger_kernel.ops.fused_linear_cross_entropy.loop import scale_
from liger_kernel.ops.fused_linear_cross_entropy.products import Head, WeightGradient


class LigerFusedLinearDistillationBase(torch.autograd.Function):
    """weight_hard_loss * cross entropy + weight_soft_loss * `distillation_loss_fn`, per labelled token.

    A subclass gives `distillation_loss_fn(student_logits, teacher_logits, target=, ignore_index=, beta=, ...)`: the
    sum over the rows of a chunk, from fp32 logits that are already divided by the temperature. The gradients of
    exactly what asks for one are made in forward; one backward hands them out.
    """

    @staticmethod
    def distillation_loss_fn(
        student_logits: Tensor, teacher_logits: Tensor, **options: Any
    ) -> Tensor:
        raise NotImplementedError("A distillation loss defines distillation_loss_fn.")

    @staticmethod
    def forward(
        cls: Any,
        ctx: Any,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        target: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        chunk_size: int = 1024,
        ignore_index: int = -100,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        compute_ce_loss: bool = True,
        temperature: float = 1.0,
        compiled: bool = True,
        return_soft_hard_loss: bool = False,
        **loss_kwargs: Any,
    ) -> Any:
        """The loss, or (loss, soft loss, hard loss), 0-d.

        student_input: (..., Hs). student_weight: (V, Hs). teacher_input: (..., Ht). teacher_weight: (Vt, Ht) with
        Vt >= V; the student's logits of the further classes are 0. target: (...). `chunk_size` rows at a time.
        `compiled` is accepted and has no effect.
        """
        check_chunk_size(chunk_size)
        student, teacher, labels = _flat_rows(student_input, teacher_input, target)
        if teacher_weight.shape[0] < student_weight.shape[0]:
            raise ValueError(
                f"The teacher has {teacher_weight.shape[0]} classes, fewer than the student's "
                f"{student_weight.shape[0]}; drop those of the student that it does not know."
            )
        hard_wanted = compute_ce_loss and (weight_hard_loss != 0.0 or return_soft_hard_loss)
        n_tokens = (labels != ignore_index).sum().clamp(min=1)
        head = _Head(student, student_weight, student_bias, chunk_size, student_input.requires_grad)
        other = _Head(teacher, teacher_weight, teacher_bias, chunk_size, False)
        soft = torch.zeros((), dtype=head.wide, device=student.device)
        hard = soft.clone()
        for start in range(0, student.shape[0], chunk_size):
            at = slice(start, start + chunk_size)
            teacher_logits = other.logits(at).to(head.wide) / temperature
            logits = head.logits(at)
            with torch.enable_grad():
                leaf = logits.requires_grad_(head.needs_any)
                wide = leaf.to(head.wide)
                hard_sum = torch.zeros_like(hard)
                if hard_wanted:
                    hard_sum = F.cross_entropy(
                        wide, labels[at], ignore_index=ignore_index, reduction="sum"
                    )
                extra = teacher_weight.shape[0] - student_weight.shape[0]
                soft_sum = cls.distillation_loss_fn(
                    F.pad(wide / temperature, (0, extra)) if extra else wide / temperature,
                    teacher_logits,
                    target=labels[at],
                    ignore_index=ignore_index,
                    beta=beta,
                    **loss_kwargs,
                )
                total = (weight_hard_loss * hard_sum + weight_soft_loss * soft_sum) / n_tokens
                if head.needs_any:
                    head.add(at, *torch.autograd.grad(total, leaf))
            hard += hard_sum.detach()
            soft += soft_sum.detach()
        hard, soft = hard / n_tokens, soft / n_tokens
        loss = weight_hard_loss * hard + weight_soft_loss * soft
        ctx.save_for_backward(*head.gradients(student_input.shape))
        if not return_soft_hard_loss:
            return loss
        ctx.mark_non_differentiable(soft, hard)
        return loss, soft, hard

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        """Gradients of student_input, student_weight, None for three, and of student_bias."""
        refuse_second_backward(ctx, "the distillation loss")
        dx, dw, db = ctx.saved_tensors
        scale_((dx, dw, db), grad_output)
        return dx, dw, None, None, None, db


class _Head:
    """A linear head in the dtype of its matrix products, and the gradients of what asks for one."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: int,
        needs_dx: bool,
    ):
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        if dtype != weight.dtype and not autocast:
            raise TypeError(
                f"hidden states are {dtype}, but the weight is {weight.dtype}; convert one with .to()."
            )
        self.wide = torch.promote_types(dtype, torch.float32)
        self.hidden, self.dtype, self.n_classes = hidden, dtype, weight.shape[0]
        b = None if bias is None else bias.detach().to(dtype)
        self.head = Head(weight.detach().to(dtype), b, may_pad=True)
        self.bias_dtype = None if bias is None else bias.dtype
        needs_dw = weight.requires_grad
        needs_db = bias is not None and bias.requires_grad
        self.needs_any = needs_dx or needs_dw or needs_db
        n_chunks = cdiv(hidden.shape[0], rows)
        self.dx = torch.zeros_like(hidden) if needs_dx else None
        self.dw = WeightGradient(weight, n_chunks, None) if needs_dw else None
        self.db = torch.zeros(weight.shape[0], dtype=self.wide, device=hidden.device)
        self.needs_db = needs_db

    def logits(self, at: slice) -> Tensor:
        x = self.hidden[at].to(self.dtype)
        rows = x.new_empty(x.shape[0], self.head.width)
        with torch.autocast(x.device.type, enabled=False):
            self.head.project(x, rows)
        return rows[:, : self.n_classes]

    def add(self, at: slice, dlogits: Tensor) -> None:
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            padding = self.head.width - self.n_classes
            rows = F.pad(dlogits, (0, padding)) if padding else dlogits
            if self.dx is not None:
                self.head.back(rows, self.dx, at)
            if self.dw is not None:
                self.dw.add(self.head, rows, self.hidden[at].to(rows.dtype))
            if self.needs_db:
                self.db += dlogits.sum(0, dtype=self.wide)

    def gradients(self, shape: torch.Size) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return (
            None if self.dx is None else self.dx.view(shape),
            None if self.dw is None else self.dw.result(),
            self.db.to(self.bias_dtype) if self.needs_db and self.bias_dtype else None,
        )


def _flat_rows(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = target.numel()
    for name, hidden in (("student_input", student), ("teacher_input", teacher)):
        if hidden.numel() != rows * hidden.shape[-1]:
            raise ValueError(
                f"{name} has shape {tuple(hidden.shape)}, but there are {rows} labels {tuple(target.shape)}; "
                f"pass one label per row."
            )
    return (
        student.detach().reshape(-1, student.shape[-1]),
        teacher.detach().reshape(-1, teacher.shape[-1]),
        target.reshape(-1),
    )


class DistillationFunction(LigerFusedLinearDistillationBase):
    """`apply` in the argument order of the incumbent's losses."""

    @classmethod
    def forward(  # type: ignore[override]
        cls,
        ctx: Any,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> Any:
        return super().forward(
            cls,
            ctx,
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            true_labels,
            student_bias,
            teacher_bias,
            chunk_size,
            ignore_index,
            weight_hard_loss,
            weight_soft_loss,
            beta,
            temperature=temperature,
            compiled=compiled,
            return_soft_hard_loss=return_soft_hard_loss,
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        grads = LigerFusedLinearDistillationBase.backward(ctx, grad_output, *args)
        return (*grads, *(None,) * (len(ctx.needs_input_grad) - len(grads)))


class DistillationLoss(nn.Module):
    """What the modules of the distillation losses share; a subclass names its `function`."""

    function: type[DistillationFunction]

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        check_chunk_size(chunk_size)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Any:
        """The loss, 0-d and at least fp32, or (loss, soft loss, hard loss) with `return_soft_hard_loss`.

        student_input: (..., Hs). student_weight: (V, Hs). teacher_input: (..., Ht). teacher_weight: (Vt, Ht).
        true_labels: (...). Only the student gets gradients; with no labelled token the loss is 0.
        """
        student = (student_input, student_weight, student_bias)
        if not torch.is_grad_enabled():  # `requires_grad` does not know about no_grad
            student = tuple(None if t is None else t.detach() for t in student)  # type: ignore[assignment]
        return self.function.apply(
            student[0],
            student[1],
            teacher_input,
            teacher_weight,
            true_labels,
            student[2],
            teacher_bias,
            self.weight_hard_loss,
            self.weight_soft_loss,
            self.beta,
            self.ignore_index,
            self.temperature,
            self.compiled,
            self.chunk_size,
            self.return_soft_hard_loss,
        )
