"""Our layers behind transformers' `use_kernels=True`: `kernels` picks the forward of a layer by its name.

It binds the `forward` of a class to HF's own module, so such a class may have neither a constructor nor members of its
own, and its forward takes what the replaced one takes. HF gives one name to norms that round at different places; ours
takes a module's place only after the proof of `patching`, and else runs the module's own class.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from liger_kernel.backends.triton import DEVICE_TYPES
from liger_kernel.transformers.patching import routers
from liger_kernel.transformers.patching.plans import MethodPlan, marker, ours_runs
from liger_kernel.transformers.patching.sites import experts, norms, rope

#: `kernels` calls AMD GPUs by their own name
DEVICES = (*DEVICE_TYPES, "rocm")


class RMSNorm(nn.Module):
    """Bound to norms with and without an offset of 1, of either rounding; `hidden_states` is (..., H)."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _norm(self, hidden_states)


class RMSNormGated(nn.Module):
    """Bound to norms of linear attention, whose gate comes before or after the norm, in groups or not."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return _norm(self, hidden_states, *(() if gate is None else (gate,)))


def _norm(module: Any, *given: Tensor) -> Tensor:
    plan = _plan(module, norms.NormPlan.kind, norms.find_plan)
    found: Tensor = (plan.call if plan else type(module).forward)(module, *given)
    return found


def _plan(
    module: nn.Module, kind: str, find: Callable[[nn.Module], MethodPlan | str]
) -> MethodPlan | None:
    """What computes a call made now in a module's place; sought once for each module."""
    if not ours_runs():
        return None
    if marker(kind) not in module.__dict__:
        found = find(module)
        module.__dict__[marker(kind)] = None if isinstance(found, str) else found
    plan: MethodPlan | None = module.__dict__[marker(kind)]
    return plan if plan is not None and plan.holds(module) else None


class TopKRouter(nn.Module):
    """Bound to routers that choose by softmax and by sigmoid; `hidden_states` is (..., H)."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plan = _plan(self, routers.RouterPlan.kind, routers.find_plan)
        found: Any = (plan.call if plan else type(self).forward)(self, hidden_states)
        return found


class MoEMLP(nn.Module):
    """Bound to a router with its experts: its own forward, in which our op computes the experts."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Any:
        own, inner = type(self).forward, self._modules.get("experts")
        # with a forward of its own it is patched already, or somebody else's
        if inner is None or "forward" in vars(inner):
            return own(self, hidden_states)
        plan = _plan(inner, experts.ExpertsPlan.kind, experts.found_here)
        if plan is None:
            return own(self, hidden_states)
        vars(inner)["forward"] = partial(plan.call, inner)
        try:
            return own(self, hidden_states)
        finally:
            vars(inner).pop("forward", None)


class RotaryEmbedding(nn.Module):
    """Bound to what stands for the `apply_rotary_pos_emb` of a modeling file; q and k are (B, heads, S, D)."""

    can_torch_compile = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        cls: Any = type(self)
        if not ours_runs():
            return cls.forward(self, q, k, cos, sin, unsqueeze_dim)
        return _rotary(cls)(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


@functools.cache
def _rotary(cls: Any) -> Callable[..., Any]:
    def original(*args: Any, **kwargs: Any) -> Any:
        return cls.forward(
            None, *args, **kwargs
        )  # a function in the shape of a module: it has no state

    return rope.replacement(original) or original


#: HF's name of a layer -> what takes its place
LAYERS: dict[str, type[nn.Module]] = {
    "RMSNorm": RMSNorm,
    "RMSNormGated": RMSNormGated,
    "RMSNormZeroCentered": RMSNorm,
    "rotary_pos_emb": RotaryEmbedding,
    "SoftmaxTopKRouter": TopKRouter,
    "MegaBlocksMoeMLP": MoEMLP,
}


@dataclass(frozen=True)
class Repository:
    """What `kernels` asks for a layer, without a download."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


def register_kernels(devices: str | Sequence[str] = DEVICES) -> None:
    """Let `from_pretrained(..., use_kernels=True)` and `set_use_kernels(True)` use our layers.

    These are norms, rotary embeddings, the routers of Qwen3.5-MoE and Laguna, and the experts of GPT-OSS.

    HF's default for these names is code downloaded from its hub. The setting is process-wide, for training and
    inference; models kernelized before take it up when they next switch between the two, and all models of a modeling
    file share its rotary embedding. HF has no names for the loss and for gated MLPs: `liger_kernel.patch(model)`
    reaches those.

    Args:
        devices: the device types to serve, as `kernels` names them; default: where our kernels run.
    Raises: ImportError without transformers or `kernels`; RuntimeError if transformers is too old, does not work with
        the installed version of `kernels`, or has been told not to use it.
    """
    mapping = _mapping()
    for name, layer in LAYERS.items():
        for device in [devices] if isinstance(devices, str) else devices:
            mapping.setdefault(name, {})[device] = Repository(layer)


def _mapping() -> dict[str, Any]:
    """The one mapping that transformers hands to `kernels` whenever a model is kernelized."""
    for package in ("transformers", "kernels"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"register_kernels() needs the package {package}: pip install {package}"
            )
    import transformers
    from transformers.dependency_versions_table import deps
    from transformers.integrations import hub_kernels
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        raise RuntimeError(
            f"transformers {transformers.__version__} does not work with kernels {version('kernels')}: "
            f'pip install "{deps["kernels"]}"'
        )
    if not hub_kernels._kernels_enabled:
        raise RuntimeError("USE_HUB_KERNELS in the environment turns use_kernels off; unset it.")
    if not hasattr(hub_kernels, "get_kernel_mapping_transformers"):
        raise RuntimeError(
            f"transformers {transformers.__version__} has no mapping to add to; update to 5.17 or later."
        )
    mapping: dict[str, Any] = hub_kernels.get_kernel_mapping_transformers()
    return mapping
