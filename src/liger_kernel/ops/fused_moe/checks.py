"""What a mixture of experts refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernel._core.checks import check_choice, check_floating, check_same_device
from liger_kernel.backends import can_look
from liger_kernel.ops.fused_moe import reference
from liger_kernel.ops.fused_moe.contract import MoEOptions

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def check_options(options: MoEOptions) -> None:
    check_choice("activation", options.activation, ACTIVATIONS)
    if not options.gated and (options.interleaved or options.up_shift):
        raise ValueError(
            f"interleaved={options.interleaved} and up_shift={options.up_shift} concern gate and up, but gated=False."
        )
    if options.alpha == 0 or (options.limit is not None and options.limit <= 0):
        raise ValueError(
            f"alpha={options.alpha} must not be 0, limit={options.limit} must be more."
        )


def check_tensors(
    options: MoEOptions, x: Tensor, w1: Tensor, w2: Tensor, index: Tensor, weights: Tensor
) -> None:
    check_floating(x=x, gate_up_weight=w1, down_weight=w2, top_k_weights=weights)
    named = {"gate_up_weight": w1, "down_weight": w2}
    if w1.dtype != x.dtype or w2.dtype != x.dtype:
        raise TypeError(
            f"x is {x.dtype}, but the weights are {w1.dtype} and {w2.dtype}; convert them with .to(), or use "
            f"torch.autocast."
        )
    check_same_device(x=x, top_k_index=index, top_k_weights=weights, **named)
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(
            f"top_k_index must hold integers, got {index.dtype}; convert it with .to()."
        )
    if index.shape != weights.shape or index.ndim != x.ndim or index.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"top_k_index {tuple(index.shape)} and top_k_weights {tuple(weights.shape)} must be (..., K) for x "
            f"(..., H) {tuple(x.shape)}."
        )
    first, second = (w.mT.shape if options.transposed else w.shape for w in (w1, w2))
    hidden, halves = x.shape[-1], 1 + options.gated
    n_experts = first[0] if w1.ndim == 3 else -1
    features = first[1] // halves if w1.ndim == 3 else -1
    if first != (n_experts, halves * features, hidden) or second != (n_experts, hidden, features):
        wanted = f"(E, {halves}I, H) and (E, H, I)"
        if options.transposed:
            wanted = f"(E, H, {halves}I) and (E, I, H)"
        shapes = " and ".join(f"{name} {tuple(w.shape)}" for name, w in named.items())
        raise ValueError(
            f"{shapes} must be {wanted} for x (..., H) {tuple(x.shape)} with gated={options.gated} and "
            f"transposed={options.transposed}."
        )


def check_index(index: Tensor, n_experts: int) -> None:
    """ValueError for an index that is no expert, where looking costs no synchronisation: on the CPU."""
    if not can_look(index) or not index.numel():
        return
    least, most = int(index.min()), int(index.max())
    if least < 0 or most > n_experts:
        raise ValueError(
            f"top_k_index is in [{least}, {most}], but there are {n_experts} experts; pass 0 to {n_experts - 1}, or "
            f"{n_experts} for nobody."
        )


def check_biases(
    options: MoEOptions, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None
) -> None:
    out = 2 if options.transposed else 1
    for name, bias, weight in (("gate_up_bias", b1, w1), ("down_bias", b2, w2)):
        if bias is None:
            continue
        check_floating(**{name: bias})
        check_same_device(**{name: bias}, weight=weight)
        if bias.shape != (weight.shape[0], weight.shape[out]):
            raise ValueError(
                f"{name} has shape {tuple(bias.shape)}; pass one of ({weight.shape[0]}, {weight.shape[out]})."
            )


def check_low_rank(options: MoEOptions, x: Tensor, *tensors: Tensor | None) -> None:
    """`tensors`: both weights, and both matrices beside each."""
    w1, w2, a1, b1, a2, b2 = tensors
    pairs: tuple[tuple[str, Any, Any, Any, float], ...] = (
        ("gate_up", w1, a1, b1, options.gate_up_scaling),
        ("down", w2, a2, b2, options.down_scaling),
    )
    for name, weight, a, b, scaling in pairs:
        if a is None or b is None:
            if scaling != 1:
                raise ValueError(f"{name}_scaling={scaling} concerns {name}_lora, which is None.")
            continue
        named = {f"A of {name}_lora": a, f"B of {name}_lora": b}
        check_floating(**named)
        check_same_device(x=x, **named)
        n_experts, out, inner = (weight.mT if options.transposed else weight).shape
        rank = a.shape[1] if a.ndim == 3 else 0
        if not rank or a.shape != (n_experts, rank, inner) or b.shape != (n_experts, out, rank):
            raise ValueError(
                f"{name}_lora has the shapes {tuple(a.shape)} and {tuple(b.shape)}; pass A ({n_experts}, R, {inner}) "
                f"and B ({n_experts}, {out}, R), also with transposed=True."
            )
