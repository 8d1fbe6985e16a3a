"""The native ops by plain names, for people who write models: each is documented where it is defined.

    from liger_kernel.functional import rms_norm, fused_linear_cross_entropy

Every op takes tensors of any strides on any device, is differentiable, and never writes to its inputs.
`liger_kernel.transformers.functional` has the same ops under the names and argument orders of the incumbent.
"""

from importlib import import_module
from typing import Any

from torch import Tensor

from liger_kernel._core.lazy import compat_names
from liger_kernel.loss_head.fused_linear_cross_entropy import fused_linear_cross_entropy
from liger_kernel.loss_head.fused_linear_jsd import fused_linear_jsd
from liger_kernel.loss_head.fused_linear_kl_div import fused_linear_kl_div
from liger_kernel.loss_head.label_count import LabelCount
from liger_kernel.loss_head.linear_logprobs import linear_logprobs, linear_logprobs_loss
from liger_kernel.ops import OPS as _OPS
from liger_kernel.ops.attn_res import attn_res
from liger_kernel.ops.cross_entropy import cross_entropy
from liger_kernel.ops.dequantize_4bit import dequantize_4bit
from liger_kernel.ops.dyt import dyt
from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm
from liger_kernel.ops.fused_ce_tvd import fused_ce_tvd
from liger_kernel.ops.fused_moe import fused_moe
from liger_kernel.ops.fused_neighborhood_attention import fused_neighborhood_attention
from liger_kernel.ops.gated_mlp import gated_mlp
from liger_kernel.ops.glu import glu, glu_packed
from liger_kernel.ops.group_norm import group_norm
from liger_kernel.ops.grpo_loss import grpo_loss
from liger_kernel.ops.jsd import jsd
from liger_kernel.ops.kl_div import kl_div
from liger_kernel.ops.layer_norm import layer_norm
from liger_kernel.ops.logprobs import logprobs
from liger_kernel.ops.logprobs.contract import LogProbs
from liger_kernel.ops.lora_linear import lora_linear
from liger_kernel.ops.lora_mlp import lora_mlp
from liger_kernel.ops.mhc_mix import mhc_mix, mhc_post_res, mhc_pre
from liger_kernel.ops.mhc_project import mhc_project
from liger_kernel.ops.mhc_sinkhorn import mhc_coeffs, mhc_sinkhorn
from liger_kernel.ops.mm_int8int2 import mm_int8int2
from liger_kernel.ops.modulated_rms_norm import modulated_rms_norm
from liger_kernel.ops.moe_router import moe_router
from liger_kernel.ops.moe_router.losses import load_balancing_loss, router_z_loss
from liger_kernel.ops.multi_token_attention import multi_token_attention
from liger_kernel.ops.poly_norm import poly_norm
from liger_kernel.ops.qk_norm_rope import qk_norm_rope
from liger_kernel.ops.relu_squared import relu_squared
from liger_kernel.ops.rms_norm import rms_norm
from liger_kernel.ops.rope import complex_rope, rope
from liger_kernel.ops.short_conv import short_conv
from liger_kernel.ops.softmax import softmax
from liger_kernel.ops.sparsemax import sparsemax
from liger_kernel.ops.tiled_mlp import apply_tiled_mlp, tiled_mlp
from liger_kernel.ops.tvd import tvd

__all__ = [
    "LabelCount",
    "LogProbs",
    "apply_tiled_mlp",
    "attn_res",
    "complex_rope",
    "cross_entropy",
    "dequantize_4bit",
    "dyt",
    "fused_add_rms_norm",
    "fused_ce_tvd",
    "fused_linear_cross_entropy",
    "fused_linear_jsd",
    "fused_linear_kl_div",
    "fused_moe",
    "fused_neighborhood_attention",
    "gated_mlp",
    "geglu",
    "glu",
    "glu_packed",
    "group_norm",
    "grpo_loss",
    "jsd",
    "kl_div",
    "layer_norm",
    "linear_logprobs",
    "linear_logprobs_loss",
    "load_balancing_loss",
    "logprobs",
    "lora_linear",
    "lora_mlp",
    "mhc_coeffs",
    "mhc_mix",
    "mhc_post_res",
    "mhc_pre",
    "mhc_project",
    "mhc_sinkhorn",
    "mm_int8int2",
    "modulated_rms_norm",
    "moe_router",
    "multi_token_attention",
    "poly_norm",
    "qk_norm_rope",
    "relu_squared",
    "rms_norm",
    "rope",
    "router_z_loss",
    "short_conv",
    "softmax",
    "sparsemax",
    "swiglu",
    "tiled_mlp",
    "tvd",
]


def swiglu(
    a: Tensor, b: Tensor, gate_multiplier: float = 1.0, down_multiplier: float = 1.0
) -> Tensor:
    """`silu(a * gate_multiplier) * b * down_multiplier`: `glu` by the name of this activation."""
    return glu(a, b, "silu", gate_multiplier, down_multiplier)


def geglu(a: Tensor, b: Tensor) -> Tensor:
    """`gelu(a) * b` with the tanh form of GELU: `glu` by the name of this activation."""
    return glu(a, b, "gelu_tanh")


_of_the_incumbent = compat_names(
    __name__, ("declare_op_locations", "dispatch"), "liger_kernel.compat.dispatch"
)


def __getattr__(name: str) -> Any:
    """An op that is not imported above."""
    if name in _OPS:
        return getattr(import_module(f"liger_kernel.ops.{name}"), name)
    return _of_the_incumbent(name)
