"""The last linear layer of a language model and its cross entropy in one, without ever holding all logits.

The logits of a chunk of rows go into one reused slab, become their own gradient in place, and are multiplied into the
gradients of the hidden states and of the weight before the next chunk overwrites them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.lazy import compat_names
from liger_kernel._core.options import parameters_of, spells_out
from liger_kernel.loss_head import loop
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.loss_head.losses.cross_entropy import CrossEntropyLoss
from liger_kernel.loss_head.node import compute_dtype, linear_loss
from liger_kernel.loss_head.plan import ChunkOptions
from liger_kernel.loss_head.products import HeadInputs
from liger_kernel.ops.cross_entropy import check_labels, check_loss_options
from liger_kernel.ops.cross_entropy.contract import Outputs
from liger_kernel.ops.scale_gradients import scale_gradients


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    label_count: LabelCount | int | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Outputs:
    """Cross entropy of `hidden @ weight.T + bias` with memory for one chunk of logits; options as in `cross_entropy`.

    Args:
        hidden: (N, H), any strides. weight: (V, H) in the same dtype. bias: (V,). target: (N,) integer labels.
        class_weight: (V,), the `weight` of `cross_entropy`.
        accum_dtype: of the running sum of the weight's gradient over the chunks. None: the dtype of the weight for up
            to two chunks, at least fp32 for more, which keeps the error that of one chunk.
        use_token_scaling: multiply the loss of a row by its detached probability of the label.
        chunk_size: rows per chunk. memory_budget: bytes of the logits of a chunk; more where two large chunks need less
            memory in all than many small ones and an fp32 sum. Default: `backends.records.ChunkSizes`.
        label_count: how many labels are not ignored, or more; rows beyond cost nothing then. `LabelCount(target)` finds
            it without a stall if it is made well before this call. Not needed on the CPU; unused under torch.compile.
        low_rank: (N, r) and (V, r), whose product is added to the logits of each chunk: LoRA on the head is
            `(scaling * hidden @ lora_a.T, lora_b)`. In any floating dtypes, which their gradients have.

    Returns: `(loss, z_loss, token_accuracy, predicted_tokens)` as `cross_entropy`, but loss and z_loss in fp32.
    Under autocast the matrix products run in its dtype; the gradients have the dtypes of their parameters.
    With "mean" and "sum" gradients are made in forward, only for tensors with `requires_grad=True`, and handed out by
    backward; with "none" backward runs the loop again.
    Raises: as `cross_entropy`; TypeError if hidden and weight differ in dtype; ValueError for a chunk below one row.
    """
    settings = _settings if torch.compiler.is_compiling() else _known_settings
    loss, chunks = settings(
        (accum_dtype, chunk_size, memory_budget),
        ignore_index,
        lse_square_scale,
        label_smoothing,
        reduction,
        softcap,
        return_z_loss,
        return_token_accuracy,
        return_predicted_tokens,
        use_token_scaling,
    )
    if label_count is not None:
        chunks = ChunkOptions(accum_dtype, chunk_size, memory_budget, label_count)
    helpers = (fused_linear_cross_entropy_forward, fused_linear_cross_entropy_backward)
    found: Any = linear_loss(
        loss,
        hidden,
        weight,
        target,
        bias,
        class_weight=class_weight,
        chunks=chunks,
        low_rank=low_rank,
        helpers=None if low_rank is not None else helpers,
    )
    outputs: Outputs = found
    return outputs


def _settings(chunks: tuple[Any, ...], *options: Any) -> tuple[CrossEntropyLoss, ChunkOptions]:
    loss = CrossEntropyLoss(*options)
    check_loss_options(loss.label_smoothing, loss.reduction, loss.softcap)
    return loss, ChunkOptions(*chunks)


#: a training step asks for the same ones again and again, and waits for its host where tokens are few
_known_settings = functools.lru_cache(maxsize=64, typed=True)(_settings)

#: the options that the incumbent has, too, in its order
SHARED_OPTIONS = parameters_of(fused_linear_cross_entropy)[5:15]


@spells_out(SHARED_OPTIONS, before="ce_impl")
def fused_linear_cross_entropy_forward(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    ce_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ce_impl: str | None = None,
    ce_mode: str | None = None,
    token_grad_output: Tensor | None = None,
    compute_gradients: bool | None = None,
    weight_requires_grad: bool | None = None,
    chunk_mem_const: int = 1,
    *,
    settings: tuple[CrossEntropyLoss, ChunkOptions, torch.dtype] | None = None,
    needs: Sequence[bool] | None = None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """The four outputs and the gradients of `_input`, `weight` and `bias`; every eager call goes through here.

    The gradients are for an upstream gradient of 1, or of `token_grad_output` (N,) per row, and for the tensors with
    `requires_grad=True`, or what `compute_gradients` and `weight_requires_grad` say, or `needs` for the three tensors.
    `settings` takes the place of the options before.
    """
    if settings is None:
        check_implementation(ce_impl=ce_impl, ce_mode=ce_mode)
        accum_dtype = options.pop("accum_dtype", None)
        options["token_scaling"] = options.pop("use_token_scaling", False)
        chunks = ChunkOptions(
            accum_dtype, memory_budget=memory_budget(_input, weight, chunk_mem_const)
        )
        settings = CrossEntropyLoss(**options), chunks, compute_dtype(_input, weight)
    loss, chunks, dtype = settings
    if needs is None:
        asked = compute_gradients is True
        if weight_requires_grad is None:
            weight_requires_grad = weight.requires_grad
        needs = (
            _input.requires_grad or asked,
            weight_requires_grad,
            bias is not None and (bias.requires_grad or asked),
        )
        if compute_gradients is False:
            needs = (False, False, False)
    check_labels(target, weight.shape[0], loss.ignore_index)
    head = HeadInputs(_input, weight, bias, dtype)
    _, outputs, grads = loop.run(loss, head, target, ce_weight, chunks, needs, token_grad_output)
    return (*outputs, *grads)


def fused_linear_cross_entropy_backward(
    grad_output: Tensor,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> loop.Gradients:
    """The gradients times the 0-d `grad_output`, in place; on a GPU nothing is touched where it is 1."""
    grads = (grad_input, grad_weight, grad_bias)
    scale_gradients(grads, grad_output)
    return grads


def memory_budget(hidden: Tensor, weight: Tensor, chunk_mem_const: int) -> int | None:
    """Bytes of a chunk's logits by the incumbent's option; None for the default."""
    if type(chunk_mem_const) is not int or chunk_mem_const < 1:  # a bool is no number
        raise ValueError(f"chunk_mem_const must be a positive integer, got {chunk_mem_const!r}.")
    if chunk_mem_const == 1:
        return None
    return max(chunk_mem_const * hidden.numel(), weight.shape[0]) * hidden.element_size()


def check_implementation(**names: str | None) -> None:
    if any(name is not None for name in names.values()):
        given = " and ".join(f"{argument}={name!r}" for argument, name in names.items())
        raise ValueError(
            f"{given} name implementations of another package; pass None and choose with LIGER_KERNEL_IMPL."
        )


__getattr__ = compat_names(__name__, ["LigerFusedLinearCrossEntropyFunction"])
