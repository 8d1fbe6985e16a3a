"""RMSNorm of queries and keys (Henry et al. 2020, https://arxiv.org/abs/2010.04245; with RMSNorm in Qwen3 and Gemma 3)
and their rotary embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) in one pass."""

from __future__ import annotations

from torch import Tensor

from liger_kernel._core.autograd import Op
from liger_kernel._core.checks import check_choice, check_floating, check_same_device
from liger_kernel.backends.dispatch import Dispatch, no_shards
from liger_kernel.ops.norms import CASTING_MODES
from liger_kernel.ops.qk_norm_rope import reference
from liger_kernel.ops.qk_norm_rope.contract import QKNormRopeOptions
from liger_kernel.ops.rope import check_rotation


class _QKNormRope(Op):
    pass


_dispatch = Dispatch(
    "qk_norm_rope",
    _QKNormRope,
    reference.qk_norm_rope,
    shards=no_shards("qk_norm_rope", "call it on the local heads, .to_local(), or norm and rope"),
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`rope` of `rms_norm(q, q_weight)` and `rms_norm(k, k_weight)`.

    Args:
        q, k, cos, sin, unsqueeze_dim, rotary_dim, interleaved: as in `rope`.
        q_weight, k_weight: (D,), for a norm of each head (Qwen3, Gemma 3); of as many elements as all heads of a token,
            for a norm of these together (OLMo 2); or None for a norm of each head without an affine part.
        eps, offset, casting_mode: as in `rms_norm`, the same for q and k.

    Returns: (q', k'), each in the dtype of its input, and by the kernel in its memory layout. Between norm and rotation
        nothing is rounded, and nothing is kept for backward but the inputs.
    Raises: ValueError for shapes that do not fit or an unknown mode; TypeError for integer tensors and for DTensors.
    """
    check_choice("casting_mode", casting_mode, CASTING_MODES)
    check_floating(q_weight=q_weight, k_weight=k_weight)
    check_same_device(q=q, q_weight=q_weight, k_weight=k_weight)
    for name, x, weight in (("q", q, q_weight), ("k", k, k_weight)):
        if weight is None or x is None:
            continue
        heads, size = x.shape[unsqueeze_dim] if x.ndim == 4 else 1, x.shape[-1]
        if weight.numel() not in (size, heads * size):
            raise ValueError(
                f"{name}_weight has {weight.numel()} elements, but {name} {tuple(x.shape)} {heads} heads of {size}; "
                f"pass {size} for a norm of each head, or {heads * size} for one of all heads."
            )
    cos, sin, rotary_dim = check_rotation(q, k, cos, sin, unsqueeze_dim, rotary_dim)
    options = QKNormRopeOptions(eps, offset, casting_mode, unsqueeze_dim, rotary_dim, interleaved)
    return _dispatch(options, q, k, q_weight, k_weight, cos, sin)
