"""The ops: a folder each. `OPS` is the complete list."""

from __future__ import annotations

from liger_kernel._core.lazy import compat_names

#: op -> the incumbent's names that `liger_kernel.ops.<op>` serves
OPS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (
        "LigerCrossEntropyFunction",
        "cross_entropy_backward",
        "cross_entropy_forward",
    ),
    "dyt": ("LigerDyTFunction", "liger_dyt_bwd", "liger_dyt_fwd"),
    "gated_mlp": ("LigerMLPFunction",),
    "glu": (
        "LigerFusedGateUpSiLUMulFunction",
        "LigerGELUMulFunction",
        "LigerSiLUMulFunction",
        "geglu_backward",
        "geglu_forward",
        "swiglu_backward",
        "swiglu_forward",
        "swiglu_fused_gate_up_backward",
        "swiglu_fused_gate_up_forward",
    ),
    "fused_add_rms_norm": (
        "LigerFusedAddRMSNormFunction",
        "fused_add_rms_norm_backward",
        "fused_add_rms_norm_forward",
    ),
    "fused_moe": ("BLOCK_M_TOKEN", "LigerFusedMoEFunction", "compute_routing_metadata"),
    "group_norm": ("LigerGroupNormFunction", "group_norm_backward", "group_norm_forward"),
    "jsd": ("LigerJSDFunction", "jsd_backward", "jsd_forward"),
    "kl_div": ("LigerKLDivLossFunction", "kldiv_backward_triton", "kldiv_forward_triton"),
    "layer_norm": ("LigerLayerNormFunction", "layer_norm_backward", "layer_norm_forward"),
    "modulated_rms_norm": (
        "LigerModulatedRMSNormFunction",
        "modulated_rms_norm_backward",
        "modulated_rms_norm_forward",
    ),
    "moe_router": (),
    "poly_norm": ("LigerPolyNormFunction", "poly_norm_backward", "poly_norm_forward"),
    "relu_squared": ("LigerReLUSquaredFunction", "relu_squared_backward", "relu_squared_forward"),
    "rms_norm": ("LigerRMSNormFunction", "rms_norm_backward", "rms_norm_forward"),
    "rope": ("LigerRopeFunction", "rope_backward", "rope_forward"),
    "scale_gradients": (),
    "softmax": ("LigerSoftmaxFunction",),
    "sparsemax": ("LigerSparsemaxFunction",),
    "tvd": ("LigerTVDLossFunction", "tv_distance_forward_triton", "tvd_backward_triton"),
}
#: what has no kernels of its own -> the op whose kernels compute it
COMPUTED_BY = {"fused_linear_cross_entropy": "cross_entropy", "gated_mlp": "glu"}
#: as in `OPS`, for the losses that live above the ops, in `liger_kernel.loss_head`
LINEAR_LOSSES: dict[str, tuple[str, ...]] = {
    "fused_linear_cross_entropy": (
        "LigerFusedLinearCrossEntropyFunction",
        "fused_linear_cross_entropy_backward",
        "fused_linear_cross_entropy_forward",
    ),
}
_NAMES = {name for names in (*OPS.values(), *LINEAR_LOSSES.values()) for name in names}
__getattr__ = compat_names(__name__, _NAMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
