"""Routers of mixtures of experts: which experts a token goes to, their weights, and the losses that balance them.

Softmax as in Mixtral (https://arxiv.org/abs/2401.04088); sigmoid, groups and a bias that chooses without weighing as in
DeepSeek-V3 (https://arxiv.org/abs/2412.19437).
"""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_floating, check_parameters
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops.moe_router import reference
from liger_kernel.ops.moe_router.contract import RouterOptions

SCORES = ("softmax", "sigmoid")


class _MoERouter(Op):
    """Of its outputs, the indices carry no gradient."""


_dispatch = Dispatch(
    "moe_router",
    _MoERouter,
    reference.moe_router,
    shards=no_shards("moe_router", "route the tokens of each rank, .to_local()"),
)


def moe_router(
    logits: Tensor,
    bias: Tensor | None = None,
    top_k: int = 2,
    score: str = "softmax",
    n_groups: int = 1,
    groups_kept: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of each token and their weights, for `fused_moe`.

    Args:
        logits: (..., E). bias: (E,), added to the scores for the choice only; it gets no gradient.
        score: "softmax" over all experts, or "sigmoid".
        n_groups, groups_kept: experts come in groups of E / n_groups neighbours; only those of the `groups_kept` groups
            whose two best add up to most can be chosen.
        normalize: weights of a token add up to `scale`; without, they are scores times `scale`.

    Returns: weights (..., K) in the dtype of logits, computed in fp32, and indices (..., K) int64, the best first.
    Raises: ValueError for a choice of more experts or groups than there are, and for an unknown score; TypeError for
        integers.
    """
    check_choice("score", score, SCORES)
    check_floating(logits=logits)
    check_parameters(logits, bias=bias)
    n_experts = logits.shape[-1]
    if n_groups < 1 or n_experts % n_groups or not 1 <= groups_kept <= n_groups:
        raise ValueError(
            f"n_groups={n_groups} must divide the {n_experts} experts, and groups_kept={groups_kept} be in 1 to "
            f"{n_groups}."
        )
    most = n_experts // n_groups * groups_kept
    if not 1 <= top_k <= most:
        raise ValueError(f"top_k={top_k}, but 1 to {most} of {n_experts} experts can be chosen.")
    options = RouterOptions(top_k, score, n_groups, groups_kept, normalize, float(scale))
    weights, index = _dispatch(options, logits.reshape(-1, n_experts).contiguous(), bias)
    shape = (*logits.shape[:-1], top_k)
    return weights.view(shape), index.view(shape)
