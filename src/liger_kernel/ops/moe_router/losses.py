"""The losses that keep a router balanced and its logits small; plain PyTorch, without a one-hot of all choices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liger_kernel._core.checks import check_floating

Logits = Tensor | Sequence[Tensor]


def load_balancing_loss(
    router_logits: Logits, top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """`E sum_e f_e P_e` of Switch Transformers (https://arxiv.org/abs/2101.03961, equations 4 to 6), over all layers.

    Args:
        router_logits: (T, E) or a sequence of them, one a layer. top_k: experts of a token, the best of its logits.
        attention_mask: (B, S) with B S = T, or None: tokens where it is 0 do not count.

    Returns: a scalar in fp32 or wider; f_e is the number of choices of expert e over that of tokens, and carries no
        gradient, P_e the mean probability. 0 where no token counts.
    Raises: ValueError for no layer, for another mask, and for a `top_k` of more experts than there are.
    """
    layers, mask = _checked(router_logits, attention_mask)
    n_experts = layers[0].shape[-1]
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k={top_k}, but there are {n_experts} experts.")
    chosen, probabilities = [], []
    for logits in layers:
        index = logits.detach().topk(top_k, -1).indices.to(torch.int32)
        chosen.append(index if mask is None else index.masked_fill(~mask[:, None], n_experts))
        p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        probabilities.append((p if mask is None else p * mask[:, None]).sum(0))
    # sorted and not scattered: the same numbers every time
    ordered = torch.cat(chosen).flatten().sort().values
    experts = torch.arange(n_experts + 1, dtype=torch.int32, device=ordered.device)
    total = torch.stack(probabilities).sum(0)
    counts = torch.searchsorted(ordered, experts).diff().to(total.dtype)
    n_tokens = _count(layers, mask, total)
    return n_experts * (counts / n_tokens * (total / n_tokens)).sum()


def router_z_loss(router_logits: Logits, attention_mask: Tensor | None = None) -> Tensor:
    """The mean over tokens and layers of `logsumexp(logits)^2` (ST-MoE, https://arxiv.org/abs/2202.08906, equation 5).

    Arguments, return value and errors as of `load_balancing_loss`.
    """
    layers, mask = _checked(router_logits, attention_mask)
    sums = []
    for logits in layers:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1).square()
        sums.append((z if mask is None else z * mask).sum())
    total = torch.stack(sums).sum()
    return total / _count(layers, mask, total)


def _count(layers: Sequence[Tensor], mask: Tensor | None, like: Tensor) -> Tensor:
    n_tokens = like.new_full((), layers[0].shape[0]) if mask is None else mask.sum().to(like.dtype)
    return (n_tokens * len(layers)).clamp(min=1)


def _checked(router_logits: Logits, mask: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    if not layers:
        raise ValueError("router_logits is empty; pass the logits of at least one layer.")
    for logits in layers:
        check_floating(router_logits=logits)
    shapes = {tuple(logits.shape) for logits in layers}
    if len(shapes) > 1 or layers[0].ndim != 2:
        raise ValueError(
            f"router_logits have shapes {sorted(shapes)}; pass (T, E) for every layer."
        )
    if mask is None:
        return layers, None
    if mask.numel() != layers[0].shape[0]:
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} has {mask.numel()} tokens, but router_logits {layers[0].shape[0]}."
        )
    return layers, mask.reshape(-1).to(layers[0].device, torch.bool)
