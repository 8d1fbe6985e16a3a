"""Distillation from a teacher's logits by the row losses of `loss_head`, in the call forms of the incumbent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from liger_kernel._core.declared import LossModule
from liger_kernel.chunked_loss.gradients import GradientsInForward
from liger_kernel.chunked_loss.options import LossOptions, check_chunk_size
from liger_kernel.loss_head import loop
from liger_kernel.loss_head.label_count import count_labels
from liger_kernel.loss_head.losses.distillation import DistillationLoss as DistillationRows
from liger_kernel.loss_head.node import compute_dtype, linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.loss_head.products import HeadInputs


@dataclass(frozen=True)
class _OwnLoss(DistillationRows):
    """A soft loss that is given as the sum over the rows of a chunk."""

    of_chunk: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def soft(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        assert self.of_chunk is not None
        counted = (target != self.ignore_index).to(student.dtype)
        return self.of_chunk(student, teacher, target) * counted / counted.sum().clamp(min=1)


class LigerFusedLinearDistillationBase(GradientsInForward):
    """weight_hard_loss * cross entropy + weight_soft_loss * `distillation_loss_fn`, per labelled token.

    A subclass gives `distillation_loss_fn(student_logits, teacher_logits, target=, ignore_index=, beta=, ...)`: the
    sum over the rows of a chunk, from fp32 logits that are already divided by the temperature.
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

        student_input: (..., Hs). student_weight: (V, Hs). teacher_input: (..., Ht). teacher_weight: (Vt, Ht). A class
        that only one of the two has counts as a logit of 0 of the other. target: (...). `chunk_size` rows at a time.
        `compiled` is accepted and has no effect.
        """

        def of_chunk(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            found: Tensor = cls.distillation_loss_fn(
                student,
                teacher,
                target=labels,
                ignore_index=ignore_index,
                beta=beta,
                **loss_kwargs,
            )
            return found

        check_chunk_size(chunk_size)
        student, teacher, labels = _flat_rows(student_input, teacher_input, target)
        loss = _OwnLoss(
            ignore_index,
            hard_weight=weight_hard_loss,
            soft_weight=weight_soft_loss,
            temperature=temperature,
            hard=compute_ce_loss and (weight_hard_loss != 0.0 or return_soft_hard_loss),
            of_chunk=of_chunk,
        )
        ctx.shape = student_input.shape
        given = (student_input, student_weight, student_bias)
        _, (value, soft, hard), grads = loop.run(
            loss,
            HeadInputs(
                student, student_weight, student_bias, compute_dtype(student, student_weight)
            ),
            labels,
            None,
            ChunkOptions(chunk_size=chunk_size, label_count=count_labels(labels, ignore_index)),
            [t is not None and t.requires_grad for t in given],
            teacher=HeadInputs(
                teacher, teacher_weight, teacher_bias, compute_dtype(teacher, teacher_weight)
            ),
        )
        ctx.save_for_backward(*grads)
        if not return_soft_hard_loss:
            return value
        ctx.mark_non_differentiable(soft, hard)
        return value, soft, hard

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        """Gradients of student_input, student_weight, None for three, and of student_bias."""
        dx, dw, db = GradientsInForward.handed_out(ctx, grad_output)
        return None if dx is None else dx.view(ctx.shape), dw, None, None, None, db


def _flat_rows(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = target.numel()
    for name, hidden in (("student_input", student), ("teacher_input", teacher)):
        if hidden.numel() != rows * hidden.shape[-1]:
            raise ValueError(
                f"{name} has shape {tuple(hidden.shape)}, but there are {rows} labels {tuple(target.shape)}; "
                f"pass one label per row."
            )
    return (
        student.reshape(-1, student.shape[-1]),
        teacher.reshape(-1, teacher.shape[-1]),
        target.reshape(-1),
    )


@dataclass(frozen=True)
class DistillationOptions(LossOptions):
    """weight_hard_loss, weight_soft_loss: of the cross entropy and of the distance to the teacher.
    beta: weight of the teacher in the mixture of the JSD, which with 0 is KL(teacher || student) and with 1
    KL(student || teacher); scale of the cosine distance.
    temperature: both models' logits are divided by it in the soft loss; an angle does not change by that, so that
    for the cosine it is without effect. chunk_size: rows of logits held at a time.
    return_soft_hard_loss: return (loss, soft loss, hard loss). compiled: accepted, without effect.

    Raises: ValueError for a temperature or a chunk_size that is not positive."""

    positive = ("temperature",)

    weight_hard_loss: float = 0.5
    weight_soft_loss: float = 0.5
    beta: float = 0.5
    ignore_index: int = -100
    temperature: float = 1.0
    compiled: bool = True
    chunk_size: int = 1024
    return_soft_hard_loss: bool = False


class DistillationLoss(LossModule):
    """What the distillation losses share; a subclass names its row loss."""

    rows: ClassVar[Any]

    @classmethod
    def compute(
        cls,
        options: Any,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor | None,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Any:
        """The loss, 0-d and at least fp32, or (loss, soft loss, hard loss) with `return_soft_hard_loss`.

        student_input: (..., Hs). student_weight: (V, Hs). teacher_input: (..., Ht). teacher_weight: (Vt, Ht); None:
        teacher_input are the logits (..., Vt). true_labels: (...). A class that only one of the two has, which are the
        last ones of the larger vocabulary, counts as a logit of 0 of the other. Only the student gets gradients; with
        no labelled token the loss is 0.
        """
        student, teacher, labels = _flat_rows(student_input, teacher_input, true_labels)
        loss = cls.rows(
            options.ignore_index,
            hard_weight=options.weight_hard_loss,
            soft_weight=options.weight_soft_loss,
            temperature=options.temperature,
            hard=options.weight_hard_loss != 0.0 or options.return_soft_hard_loss,
            **({"beta": options.beta} if hasattr(options, "beta") else {}),
        )
        found = linear_loss(
            loss,
            student,
            student_weight,
            labels,
            student_bias,
            teacher=(teacher, teacher_weight, teacher_bias),
            chunks=ChunkOptions(
                chunk_size=options.chunk_size,
                label_count=count_labels(labels, options.ignore_index),
            ),
        )
        return found if options.return_soft_hard_loss else found[0]


FIRST = "student_input student_weight teacher_input teacher_weight true_labels"
