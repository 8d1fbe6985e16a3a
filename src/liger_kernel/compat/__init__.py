"""What other projects import under paths and names that do not fit this house: a row here, or a shim in this folder.

Nothing else in the library imports this package, except `liger_kernel` itself, which installs the paths, and the ops,
which serve the names in `ops.py` when they are used.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: path that other projects import -> the module that is served under it
ALIASES = {
    "liger_kernel.ops.backends": "liger_kernel.compat.implementations",
    "liger_kernel.ops.backends.registry": "liger_kernel.compat.implementations",
    "liger_kernel.ops.fused_linear_cross_entropy": "liger_kernel.loss_head.fused_linear_cross_entropy",
    "liger_kernel.ops.geglu": "liger_kernel.ops.glu",
    "liger_kernel.ops.mhc": "liger_kernel.compat.ops.mhc",
    "liger_kernel.ops.mlp": "liger_kernel.ops.gated_mlp",
    "liger_kernel.ops.swiglu": "liger_kernel.ops.glu",
    "liger_kernel.ops.utils": "liger_kernel.compat.ops_utils",
    "liger_kernel.transformers.fsdp": "liger_kernel.compat.fsdp",
    "liger_kernel.transformers.model": "liger_kernel.compat.model",
    "liger_kernel.transformers.model.llama": "liger_kernel.compat.lm_head",
    "liger_kernel.transformers.model.loss_utils": "liger_kernel.compat.loss_utils",
    "liger_kernel.transformers.model.output_classes": "liger_kernel.transformers.outputs",
    "liger_kernel.transformers.model.smollm3": "liger_kernel.compat.lm_head",
    "liger_kernel.transformers.trainer_integration": "liger_kernel.compat.trainer_integration",
    **{
        f"liger_kernel.transformers.{module}": "liger_kernel.transformers.modules.divergences"
        for module in ("jsd", "kl_div", "tvd")
    },
    **{
        f"liger_kernel.transformers.{module}": f"liger_kernel.transformers.modules.{module}"
        for module in (
            "cross_entropy",
            "dyt",
            "fused_add_rms_norm",
            "fused_linear_cross_entropy",
            "geglu",
            "group_norm",
            "layer_norm",
            "mhc",
            "mlp",
            "modulated_rms_norm",
            "poly_norm",
            "relu_squared",
            "rms_norm",
            "rope",
            "softmax",
            "sparsemax",
            "swiglu",
        )
    },
}


class _AliasFinder:
    """Serves the target module object itself, so that setting an attribute through an alias reaches the real module.

    Finder and loader by their methods alone: importing their base classes costs more than all of this file.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in ALIASES:
            return None
        loader: Any = self
        return ModuleSpec(fullname, loader, origin=f"alias of {ALIASES[fullname]}")

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns, and binds in the parent package, whatever stands in sys.modules after this call.
        # Returning the target from create_module instead would overwrite its __spec__.
        name = module.__name__
        sys.modules[name] = importlib.import_module(ALIASES[name])


def install() -> None:
    """Put the finder last on `sys.meta_path`, once: real files win, and other imports do not pass through it."""
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.append(_AliasFinder())
