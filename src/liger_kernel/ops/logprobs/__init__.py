"""Log-probabilities of given tokens, and the entropy of their distribution, from logits that exist.

`liger_kernel.loss_head.linear_logprobs` gives the same from hidden states, without the logits.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from liger_kernel._core.autograd import Op, is_transformed, refuse_double_backward
from liger_kernel._core.checks import check_floating, check_same_device
from liger_kernel._core.shapes import as_rows
from liger_kernel.backends import can_look
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops.cross_entropy import (
    check_class_indices,
    check_labels,
    only_loss_has_gradient,
)
from liger_kernel.ops.logprobs import reference
from liger_kernel.ops.logprobs.contract import LogProbRows, LogProbs, LogProbsOptions

Options = TypeVar("Options", bound=LogProbsOptions)


def logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    logsumexp: bool = False,
    sum_p2: bool = False,
    mean_logit: bool = False,
    top1: bool = False,
    top_k: int = 0,
    ignore_index: int = -100,
) -> LogProbs:
    """The log-probability of each token under `softmax(z)`, z = softcap tanh(scale logits / softcap) / temperature.

    Args:
        logits: (..., V), any floating dtype, any strides; computed in fp32. ids: (...) integers, of the tokens.
        temperature: above 0; a number, or a tensor (...) with one for each token, a constant.
        scale: the logits are multiplied by it. softcap: None leaves the tanh out.
        entropy: of the distribution, in nats. logsumexp: of z. sum_p2: the sum of p^2, the probability that two draws
            agree. mean_logit: the mean of z over the classes.
        top1: whether the token is the first that has the largest logit. top_k: so many of the largest log-probabilities
            and their ids, without gradient.
        ignore_index: a token with this id has numbers and gradients of 0, is no largest, and has `top_ids` of -1.

    Returns: `LogProbs`, fp32 or float64, of shape (...), the last two (..., top_k). The first five are differentiable;
    their backward reads the logits again. log_prob <= 0 and 0 <= entropy <= ln V whatever the rounding.
    Raises: ValueError and TypeError for arguments that do not fit; IndexError for an id out of range on the CPU.
        Elsewhere that would cost a synchronisation: such an id, and a temperature of a token that is not above 0, give
        NaN, as log-probability and in the gradient.
    """
    check_floating(logits=logits)
    if logits.ndim == 0 or ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and ids {tuple(ids.shape)}, not (..., V) and (...)."
        )
    check_class_indices(ids)
    n_classes = logits.shape[-1]
    number, of_rows = split_temperature(temperature, ids, ignore_index)
    options = checked(
        LogProbsOptions(
            ignore_index, number, softcap, scale, entropy, logsumexp, sum_p2, mean_logit, top1, top_k
        ),
        n_classes,
    )  # fmt: skip
    check_same_device(logits=logits, ids=ids, temperature=of_rows)
    rows, flat = logits.reshape(-1, n_classes), ids.reshape(-1).to(torch.int64)
    if not is_transformed():
        check_labels(flat, n_classes, ignore_index)
        if not torch.is_grad_enabled():
            rows = rows.detach()  # `needs_input_grad` does not know about no_grad
    return named(_dispatch(options, rows, flat.contiguous(), of_rows), options, ids.shape)


def split_temperature(
    temperature: float | Tensor, ids: Tensor, ignore_index: int
) -> tuple[float, Tensor | None]:
    """The temperature of all rows, and those of the rows as a tensor (N,), of which one is neutral."""
    if not isinstance(temperature, Tensor):
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} is not a finite number above 0.0.")
        return float(temperature), None
    check_floating(temperature=temperature)
    if temperature.shape != ids.shape:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} and ids {tuple(ids.shape)}; pass a number, or expand it "
            f"with .expand(ids.shape)."
        )
    if temperature.requires_grad:
        raise ValueError(
            "temperature requires a gradient, but is a constant here; pass temperature.detach()."
        )
    of_rows = temperature.reshape(-1)
    fits = (of_rows > 0) & of_rows.isfinite()
    if not is_transformed() and can_look(fits):
        wrong = ~fits & (ids.reshape(-1) != ignore_index)
        if wrong.any():
            raise ValueError(
                f"temperature is {of_rows[wrong][0].item()} for a token; each must be a finite number above 0.0."
            )
    # where nobody can look, such a token has no number
    return 1.0, torch.where(fits, of_rows, torch.nan)


def checked(options: Options, n_classes: int) -> Options:
    if options.softcap is not None and options.softcap <= 0:
        raise ValueError(f"softcap={options.softcap} is not above 0.0; pass None for no soft-cap.")
    if not -math.inf < options.scale < math.inf:
        raise ValueError(f"scale={options.scale} is not a finite number.")
    if not 0 <= options.top_k <= n_classes:
        raise ValueError(f"top_k={options.top_k} is not between 0 and the {n_classes} classes.")
    return options


def step(
    kernels: Any,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | None,
    *,
    options: LogProbsOptions,
    out: LogProbRows,
    grad: Tensor | None = None,
    row_scale: Tensor | None = None,
    padded: bool = False,
) -> None:
    """`kernels.step`, and the largest log-probabilities, which nobody asks for beside a gradient."""
    lse = largest = None
    if options.top_k and grad is None:
        lse = out.loss.new_empty(ids.shape)
        largest = logits.topk(options.top_k, -1, largest=options.scale >= 0)
    kernels.step(
        logits, ids, temperature, options=options, out=out, lse=lse, grad=grad, row_scale=row_scale, padded=padded
    )  # fmt: skip
    if lse is None or largest is None:
        return
    ignored = (ids == options.ignore_index)[:, None]
    _, _, top_log_probs, top_ids = out.columns
    assert top_log_probs is not None
    assert top_ids is not None
    z = largest.values.to(lse.dtype) * options.scale
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    z = z / (options.temperature if temperature is None else temperature.to(z.dtype)[:, None])
    top_log_probs.copy_((z - lse[:, None]).clamp(max=0).masked_fill(ignored, 0))
    top_ids.copy_(largest.indices.masked_fill(ignored, -1))


def named(found: Any, options: LogProbsOptions, shape: torch.Size) -> LogProbs:
    """The columns of all rows as what the user gets."""
    numbers, is_top1, top_log_probs, top_ids = found
    # a column of its own for each: what `unbind` gives must not be written to
    columns = [c.clone() for c in numbers.unbind(1)] if numbers.shape[1] > 1 else [numbers]
    of = {n: c.view(shape) for n, c in zip(options.numbers, columns, strict=True)}
    top = (*shape, options.top_k)
    return LogProbs(
        **of,
        is_top1=None if is_top1 is None else is_top1.view(shape),
        top_log_probs=None if top_log_probs is None else top_log_probs.view(top),
        top_ids=None if top_ids is None else top_ids.view(top),
    )


class _LogProbs(Op):
    """Backward runs the step again."""

    @staticmethod
    def forward(ctx: Any, impl: Any, options: Any, *tensors: Any) -> Any:
        logits, ids, temperature = tensors
        rows = as_rows(logits)
        out = LogProbRows.empty(ids, torch.promote_types(rows.dtype, torch.float32), options)
        step(impl, rows, ids, temperature, options=options, out=out)
        only_loss_has_gradient(ctx, out.columns)
        if ctx.needs_input_grad[2]:
            ctx.save_for_backward(rows, ids, temperature)
            ctx.of_forward = impl, options
        return out.columns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if grads[0] is None:
            return (None,) * 5
        impl, options = ctx.of_forward
        rows, ids, temperature = ctx.saved_tensors
        grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        scale = grads[0].contiguous()
        out = LogProbRows(torch.empty_like(scale), None, None, None)
        step(impl, rows, ids, temperature, options=options, out=out, grad=grad, row_scale=scale)
        return None, None, grad, None, None


_dispatch = Dispatch(
    "logprobs",
    _LogProbs,
    reference.logprobs,
    shards=no_shards("logprobs", "pass logits.full_tensor(), or the rows of this rank"),
)
