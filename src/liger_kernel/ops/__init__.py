"""The ops: a folder each. `OPS` is the complete list."""

from __future__ import annotations

from liger_kernel._core.lazy import compat_names

#: op -> the incumbent's names that `liger_kernel.ops.<op>` serves
OPS: dict[str, tuple[str, ...]] = {
    "attn_res": ("LigerAttnResFunction", "attn_res_backward", "attn_res_forward"),
    "cross_entropy": (
        "LigerCrossEntropyFunction",
        "cross_entropy_backward",
        "cross_entropy_forward",
    ),
    "dequantize_4bit": (),
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
    "fused_ce_tvd": ("LigerFusedCETVDFunction", "fused_ce_tvd_backward", "fused_ce_tvd_forward"),
    "grpo_loss": ("GrpoLossFunction", "fused_selective_log_softmax"),
    "fused_neighborhood_attention": (
        "LigerFusedNeighborhoodAttentionFunction",
        "fused_neighborhood_attention_forward",
    ),
    "fused_moe": ("BLOCK_M_TOKEN", "LigerFusedMoEFunction", "compute_routing_metadata"),
    "group_norm": ("LigerGroupNormFunction", "group_norm_backward", "group_norm_forward"),
    "jsd": ("LigerJSDFunction", "jsd_backward", "jsd_forward"),
    "kl_div": ("LigerKLDivLossFunction", "kldiv_backward_triton", "kldiv_forward_triton"),
    "layer_norm": ("LigerLayerNormFunction", "layer_norm_backward", "layer_norm_forward"),
    "mm_int8int2": (),
    "lora_linear": (),
    "lora_mlp": (),
    "logprobs": (),
    "mhc_mix": (
        "LigerMHCPostResFunction",
        "LigerMHCPreFunction",
        "mhc_post_res_bwd",
        "mhc_post_res_fwd",
        "mhc_pre_bwd",
        "mhc_pre_fwd",
    ),
    "mhc_project": ("mhc_mm_norm_bwd", "mhc_mm_norm_fwd"),
    "mhc_sinkhorn": ("LigerMHCCoeffsFunction", "mhc_sinkhorn_bwd", "mhc_split_sinkhorn_fwd"),
    "modulated_rms_norm": (
        "LigerModulatedRMSNormFunction",
        "modulated_rms_norm_backward",
        "modulated_rms_norm_forward",
    ),
    "multi_token_attention": ("LigerMultiTokenAttentionFunction",),
    "moe_router": (),
    "poly_norm": ("LigerPolyNormFunction", "poly_norm_backward", "poly_norm_forward"),
    "qk_norm_rope": (),
    "relu_squared": ("LigerReLUSquaredFunction", "relu_squared_backward", "relu_squared_forward"),
    "rms_norm": ("LigerRMSNormFunction", "rms_norm_backward", "rms_norm_forward"),
    "rope": (
        "LigerLlama4RopeFunction",
        "LigerQwen2VLMRopeFunction",
        "LigerRopeFunction",
        "llama4_rope_forward",
        "qwen2vl_mrope_backward",
        "qwen2vl_mrope_forward",
        "rope_backward",
        "rope_forward",
    ),
    "scale_gradients": (),
    "short_conv": (),
    "softmax": ("LigerSoftmaxFunction",),
    "sparsemax": ("LigerSparsemaxFunction",),
    "tiled_mlp": ("LigerTiledMLPFunction", "apply_tiled_mlp"),
    "tvd": ("LigerTVDLossFunction", "tv_distance_forward_triton", "tvd_backward_triton"),
}
#: what has no kernels of its own -> the op whose kernels compute it
COMPUTED_BY = {
    "fused_linear_cross_entropy": "cross_entropy",
    "gated_mlp": "glu",
    "lora_mlp": "glu",
    "linear_logprobs": "logprobs",
    "fused_linear_jsd": "fused_ce_tvd",
    "fused_linear_kl_div": "fused_ce_tvd",
    "vocab_parallel_cross_entropy": "cross_entropy",
    "vocab_parallel_logprobs": "logprobs",
    "fused_neighborhood_attention": "softmax",
    "tiled_mlp": "glu",
}
#: as in `OPS`, for the losses that live above the ops, in `liger_kernel.loss_head`
LINEAR_LOSSES: dict[str, tuple[str, ...]] = {
    "fused_linear_cross_entropy": (
        "LigerFusedLinearCrossEntropyFunction",
        "fused_linear_cross_entropy_backward",
        "fused_linear_cross_entropy_forward",
    ),
    "linear_logprobs": ("LigerFusedLinearScaledCrossEntropyFunction",),
    "fused_linear_jsd": (
        "LigerFusedLinearJSDFunction",
        "fused_linear_jsd_backward",
        "fused_linear_jsd_forward",
    ),
    "fused_linear_kl_div": (
        "LigerFusedLinearKLDivFunction",
        "fused_linear_kl_div_backward",
        "fused_linear_kl_div_forward",
    ),
}
#: likewise, for those over classes that are spread over ranks, in `liger_kernel.distributed`
SHARDED_LOSSES: dict[str, tuple[str, ...]] = {
    "vocab_parallel_cross_entropy": ("LigerVocabParallelCEFunction",),
    "vocab_parallel_logprobs": (
        "LigerFusedLinearScaledCrossEntropyTPFunction",
        "_apply_tp_fallback",
    ),
}
#: likewise, for what PyTorch computes
BY_PYTORCH: dict[str, tuple[str, ...]] = {"embedding": ("LigerEmbeddingFunction",)}
SERVED = {**OPS, **LINEAR_LOSSES, **SHARDED_LOSSES, **BY_PYTORCH}
_NAMES = {name for names in SERVED.values() for name in names}
__getattr__ = compat_names(__name__, _NAMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
