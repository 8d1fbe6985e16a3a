"""Drop-in modules, the functional API and the patches for HuggingFace models. Every name is imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

#: public name -> the submodule that defines it
_EXPORTS = {
    "LigerBlockSparseTop2MLP": "modules.swiglu",
    "LigerCrossEntropyLoss": "modules.cross_entropy",
    "LigerDyT": "modules.dyt",
    "LigerExperts": "modules.swiglu",
    "LigerFalconH1MLP": "modules.mlp",
    "LigerFalconH1SwiGLUMLP": "modules.swiglu",
    "LigerFusedAddRMSNorm": "modules.fused_add_rms_norm",
    "LigerFusedCETVDLoss": "modules.divergences",
    "LigerFusedLinearCrossEntropyLoss": "modules.fused_linear_cross_entropy",
    "LigerFusedLinearJSD": "modules.divergences",
    "LigerFusedLinearKLDivLoss": "modules.divergences",
    "LigerGEGLUMLP": "modules.geglu",
    "LigerGEGLUMLPForGemma4": "modules.geglu",
    "LigerGroupNorm": "modules.group_norm",
    "LigerHunyuanV1SwiGLUMLP": "modules.swiglu",
    "LigerJSD": "modules.divergences",
    "LigerKLDIVLoss": "modules.divergences",
    "LigerLayerNorm": "modules.layer_norm",
    "LigerMHC": "modules.mhc",
    "LigerMLP": "modules.mlp",
    "LigerModulatedRMSNorm": "modules.modulated_rms_norm",
    "LigerMultiTokenAttention": "modules.multi_token_attention",
    "LigerPhi3SwiGLUMLP": "modules.swiglu",
    "LigerPolyNorm": "modules.poly_norm",
    "LigerQwen3MoeSwiGLUMLP": "modules.swiglu",
    "LigerRMSNorm": "modules.rms_norm",
    "LigerRMSNormForMuseGlimmer": "modules.rms_norm",
    "LigerRMSNormForMuseGlimmerTextCentered": "modules.rms_norm",
    "LigerReLUSquared": "modules.relu_squared",
    "LigerShortConv": "modules.short_conv",
    "LigerSoftmax": "modules.softmax",
    "LigerSparsemax": "modules.sparsemax",
    "LigerSwiGLUMLP": "modules.swiglu",
    "LigerSwiGLUMLPForMuseGlimmer": "modules.swiglu",
    "LigerTVDLoss": "modules.divergences",
    "liger_llama4_text_rotary_pos_emb": "modules.rope",
    "liger_llama4_vision_rotary_pos_emb": "modules.rope",
    "LigerVocabParallelCrossEntropy": "modules.vocab_parallel_cross_entropy",
    "LigerTiledGEGLUMLP": "modules.tiled_mlp",
    "LigerTiledSwiGLUMLP": "modules.tiled_mlp",
    "liger_rotary_pos_emb": "modules.rope",
}
#: names that need HuggingFace transformers; so do all that start with `_APPLY`
_PATCHING = {
    "AutoLigerKernelForCausalLM": "auto_model",
    "_apply_liger_kernel": "monkey_patch",
    "_apply_liger_kernel_to_instance": "monkey_patch",
    "register_experts": "patching.sites.experts",
    "register_kernels": "hub",
}
_APPLY = "apply_liger_kernel_to_"


def is_transformers_available() -> bool:
    """Whether HuggingFace transformers is installed; does not import it."""
    return importlib.util.find_spec("transformers") is not None


__all__ = [*_EXPORTS, "is_transformers_available"]
if is_transformers_available():
    __all__ += _PATCHING


def __getattr__(name: str) -> Any:
    home = _EXPORTS.get(name)
    if home is None and (name in _PATCHING or name.startswith(_APPLY)):
        if not is_transformers_available():
            raise ImportError(
                f"{__name__}.{name} needs HuggingFace transformers: pip install liger-kernel[transformers]"
            )
        home = _PATCHING.get(name, "monkey_patch")
    if home is None:
        if (
            name == "functional" or f"modules.{name}" in _EXPORTS.values()
        ):  # a submodule nobody has imported yet
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
