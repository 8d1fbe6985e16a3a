"""The ops. `OPS` is the complete list; every name below is imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

#: op -> the public names that live in `liger_kernel.ops.<op>`
OPS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (
        "LigerCrossEntropyFunction",
        "cross_entropy_backward",
        "cross_entropy_forward",
    ),
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
    "layer_norm": ("LigerLayerNormFunction", "layer_norm_backward", "layer_norm_forward"),
    "relu_squared": (
        "LigerReLUSquaredFunction",
        "relu_squared_backward",
        "relu_squared_forward",
    ),
    "rms_norm": ("LigerRMSNormFunction", "rms_norm_backward", "rms_norm_forward"),
    "rope": ("LigerRopeFunction", "rope_backward", "rope_forward"),
    "scale_gradients": (),
}
#: names of the incumbent's `liger_kernel.ops` -> the module above the ops that has them here
_ABOVE = dict.fromkeys(
    (
        "LigerFusedLinearCrossEntropyFunction",
        "fused_linear_cross_entropy_backward",
        "fused_linear_cross_entropy_forward",
    ),
    "liger_kernel.loss_head.fused_linear_cross_entropy",
)

_HOME = {name: f"{__name__}.{op}" for op, names in OPS.items() for name in names} | _ABOVE


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
