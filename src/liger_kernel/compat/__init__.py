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
    "liger_kernel.backends.registry": "liger_kernel.compat.dispatch",
    "liger_kernel.ops.backends": "liger_kernel.compat.implementations",
    "liger_kernel.ops.backends.registry": "liger_kernel.compat.implementations",
    "liger_kernel.ops.experimental.embedding": "liger_kernel.compat.ops.embedding",
    "liger_kernel.ops.experimental.mm_int8int2": "liger_kernel.compat.mm_int8int2",
    "liger_kernel.ops.backends._triton": "liger_kernel.compat.triton_ops",
    **{
        f"liger_kernel.ops.backends._triton.{op}": "liger_kernel.compat.triton_ops"
        for op in (
            "cross_entropy",
            "fused_add_rms_norm",
            "fused_linear_cross_entropy",
            "fused_linear_jsd",
            "geglu",
            "jsd",
            "kl_div",
            "layer_norm",
            "rms_norm",
            "rope",
            "softmax",
            "swiglu",
        )
    },
    "liger_kernel.ops.configure": "liger_kernel.compat.configure",
    "liger_kernel.ops.fused_linear_cross_entropy": "liger_kernel.loss_head.fused_linear_cross_entropy",
    "liger_kernel.ops.fused_linear_scaled_cross_entropy": "liger_kernel.loss_head.linear_logprobs",
    **{
        f"liger_kernel.ops.fused_linear_{name}": f"liger_kernel.loss_head.fused_linear_{name}"
        for name in ("jsd", "kl_div")
    },
    "liger_kernel.ops.geglu": "liger_kernel.ops.glu",
    "liger_kernel.ops.llama4_rope": "liger_kernel.ops.rope",
    "liger_kernel.ops.mhc": "liger_kernel.compat.ops.mhc",
    "liger_kernel.ops.mlp": "liger_kernel.ops.gated_mlp",
    "liger_kernel.ops.qwen2vl_mrope": "liger_kernel.ops.rope",
    "liger_kernel.ops.swiglu": "liger_kernel.ops.glu",
    "liger_kernel.ops.utils": "liger_kernel.compat.ops_utils",
    "liger_kernel.triton": "liger_kernel.compat.triton_cache",
    "liger_kernel.triton.monkey_patch": "liger_kernel.compat.triton_cache",
    "liger_kernel.ops.vocab_parallel_cross_entropy": "liger_kernel.compat.ops.vocab_parallel_cross_entropy",
    "liger_kernel.transformers.fsdp": "liger_kernel.compat.fsdp",
    "liger_kernel.transformers.grpo_loss": "liger_kernel.compat.ops.grpo_loss",
    "liger_kernel.transformers.model": "liger_kernel.compat.model",
    "liger_kernel.transformers.model.loss_utils": "liger_kernel.compat.loss_utils",
    "liger_kernel.transformers.model.output_classes": "liger_kernel.transformers.outputs",
    "liger_kernel.transformers.trainer": "liger_kernel.compat.trainer",
    "liger_kernel.transformers.trainer_integration": "liger_kernel.compat.trainer_integration",
    **{
        f"liger_kernel.transformers.{module}": "liger_kernel.transformers.modules.divergences"
        for module in (
            "fused_ce_tvd",
            "fused_linear_jsd",
            "fused_linear_kl_div",
            "jsd",
            "kl_div",
            "tvd",
        )
    },
    **{
        f"liger_kernel.transformers.{module}": "liger_kernel.transformers.modules.rope"
        for module in ("llama4_rope", "qwen2vl_mrope", "rope")
    },
    **{
        f"liger_kernel.transformers.{module}": f"liger_kernel.transformers.modules.{module}"
        for module in (
            "cross_entropy",
            "dyt",
            "fused_add_rms_norm",
            "fused_linear_cross_entropy",
            "fused_neighborhood_attention",
            "geglu",
            "group_norm",
            "layer_norm",
            "mhc",
            "mlp",
            "modulated_rms_norm",
            "moe",
            "multi_token_attention",
            "poly_norm",
            "relu_squared",
            "rms_norm",
            "softmax",
            "sparsemax",
            "swiglu",
            "vocab_parallel_cross_entropy",
            "tiled_mlp",
        )
    },
}


_MODELS = "liger_kernel.transformers.model"


def _forwards() -> Any:
    return importlib.import_module(f"{__name__}.forwards")


def _served(path: str) -> str | None:
    """The module that is served under `path`; itself where it has to be made."""
    if path in ALIASES:
        return ALIASES[path]
    package, _, name = path.rpartition(".")
    if package == _MODELS:
        return path if name in _forwards().FORWARDS else None
    # `from package import name` looks for it under the name of our file
    aliases = (_served(f"{alias}.{name}") for alias, target in ALIASES.items() if target == package)
    return next(filter(None, aliases), None)


class _AliasFinder:
    """Serves the target module object itself, so that setting an attribute through an alias reaches the real module.

    Finder and loader by their methods alone: importing their base classes costs more than all of this file.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        loader: Any = self
        target = _served(fullname)
        return target and ModuleSpec(fullname, loader, origin=f"alias of {target}")

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns, and binds in the parent package, whatever stands in sys.modules after this call.
        # Returning the target from create_module instead would overwrite its __spec__.
        name = module.__name__
        target = _served(name)
        if target == name:
            _forwards().fill(module)
        else:
            sys.modules[name] = importlib.import_module(str(target))


def install() -> None:
    """Put the finder last on `sys.meta_path`, once: real files win, and other imports do not pass through it."""
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.append(_AliasFinder())
