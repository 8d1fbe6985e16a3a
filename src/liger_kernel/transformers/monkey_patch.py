"""The entry points that frameworks call: thin doors to `liger_kernel.patch`, one per row of `patching/families.py`."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from liger_kernel.transformers.modules.geglu import LigerGEGLUMLP
from liger_kernel.transformers.modules.rope import liger_rotary_pos_emb as liger_rotary_pos_emb
from liger_kernel.transformers.patching import PatchOptions, PatchReport, patch, sites
from liger_kernel.transformers.patching.classes import (
    GlobalPatch,
    patch_classes,
    patch_rope_globally,
    unpatch_classes,
)
from liger_kernel.transformers.patching.families import FAMILIES, OPTION_OF, Family
from liger_kernel.transformers.patching.plans import MethodPlan, install
from liger_kernel.transformers.patching.sites import mlps, norms
from liger_kernel.transformers.patching.state import State, state_of

logger = logging.getLogger(__name__)

ApplyFunction = Callable[..., None]


def _modeling_name(family: Family) -> str:
    return f"transformers.models.{family.modeling}.modeling_{family.modeling}"


def _patch_instance(model: nn.Module, options: dict[str, bool], modeling_name: str) -> None:
    """Patch one model; rope goes onto the modeling file, where HF's own tests and other libraries look for it."""
    held = None
    if options["rope"]:
        held = patch_rope_globally(importlib.import_module(modeling_name))
        options = {**options, "rope": held is None}  # not the plain form: attention by attention
    try:
        patch(model, logits="none", **options)
    except BaseException:
        if held is not None:
            held.remove()
        raise
    state = state_of(model)
    if held is None or state is None:
        return
    if any(isinstance(handle, GlobalPatch) for handle in state.handles):
        held.remove()  # HF's Trainer patches at every train(): this model holds it already
    else:
        state.handles.append(held)


def _entry_point(family: Family) -> ApplyFunction:
    def apply(*args: Any, **kwargs: Any) -> None:
        bound = apply.__signature__.bind(*args, **kwargs)  # type: ignore[attr-defined]
        flags = dict(bound.arguments)
        flags |= _known(apply, flags.pop("kwargs", {}))
        model = flags.pop("model", None)
        for flag, value in flags.items():
            if not isinstance(value, int | None):
                raise TypeError(
                    f"{apply.__name__}: {flag} is True or False, got {type(value).__name__}; "
                    "pass a model by name, as model=."
                )
        options = family.options(flags)
        # flags that exclude each other are refused before anything changes
        PatchOptions.of(sites.OPTIONS, **options)
        name = _modeling_name(family)
        if model is None:
            patch_classes(name, options, _patch_instance)
        else:
            _patch_instance(model, options, name)

    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    defaults = {**family.flags, "model": None}
    parameters = [inspect.Parameter(n, keyword, default=d) for n, d in defaults.items()]
    if family.takes_more:
        parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
    apply.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    apply.__name__ = apply.__qualname__ = f"apply_liger_kernel_to_{family.name}"
    apply.__doc__ = (
        f"Patch `model`, or without one every {family.name} model and module of the process, built already or later, "
        f"until `revert_liger_kernel_to_{family.name}()`; flags of several calls add up.\n\nFlags given as None or "
        "False leave that kind alone. Raises ValueError if cross_entropy and fused_linear_cross_entropy are both "
        "True, TypeError for unknown flags."
    )
    return apply


def _exit_point(family: Family) -> Callable[[], None]:
    def revert() -> None:
        unpatch_classes(_modeling_name(family))

    revert.__name__ = revert.__qualname__ = f"revert_liger_kernel_to_{family.name}"
    revert.__doc__ = (
        f"Take back all that `apply_liger_kernel_to_{family.name}()` did, in models that live, too."
    )
    return revert


#: `config.model_type` -> entry point
MODEL_TYPE_TO_APPLY_LIGER_FN: dict[str, ApplyFunction] = {}
for _row in FAMILIES:
    _apply = _entry_point(_row)
    globals()[_apply.__name__] = _apply
    globals()[f"revert_liger_kernel_to_{_row.name}"] = _exit_point(_row)
    MODEL_TYPE_TO_APPLY_LIGER_FN.update(dict.fromkeys(_row.model_types, _apply))


def _known_flags(function: ApplyFunction | None) -> set[str]:
    """The flags that an entry point takes; without one, those of any."""
    if function is None:
        return {*OPTION_OF}
    accepted = {*inspect.signature(function).parameters}
    more = {*OPTION_OF} if "kwargs" in accepted else set()
    return (accepted | more) - {"model", "kwargs"}


def _known(function: ApplyFunction, given: dict[str, Any]) -> dict[str, Any]:
    known = _known_flags(function)
    if ignored := sorted(given.keys() - known):
        name, names = function.__name__, ", ".join(sorted(known))
        logger.warning("%s() ignores %s; it knows %s.", name, ", ".join(ignored), names)
    return {name: value for name, value in given.items() if name in known}


def _apply_liger_kernel(model_type: str, **kwargs: Any) -> None:
    """Patch the classes of a model type; an unknown type or flag is logged and ignored, as HF's callers expect."""
    function = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type or "")
    if function is None:
        logger.info(
            "No entry point for model type %r; build the model and call liger_kernel.patch(model).",
            model_type,
        )
        return
    function(**_known(function, kwargs))


def _apply_liger_kernel_to_instance(model: nn.Module, **kwargs: Any) -> None:
    """Patch one model by its `config.model_type`; other types are patched by structure. Safe to call again."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    function = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type or "")
    if function is not None:
        function(**_known(function, kwargs), model=model)
        return
    logger.info("No entry point for model type %r; patching by structure.", model_type)
    options = {OPTION_OF[name]: value for name, value in kwargs.items() if name in OPTION_OF}
    patch(model, logits="none", **options)


def _bind_method_to_module(
    module: nn.Module, method_name: str, new_method: Callable[..., Any]
) -> None:
    """Give one module a method of its own."""
    module.__dict__[method_name] = MethodType(new_method, module)


def _eps_name(module: nn.Module, default: float) -> str:
    """The attribute that holds the module's epsilon; made, with `default`, where there is none."""
    for name in ("variance_epsilon", "eps"):
        if getattr(module, name, None):
            return name
    module.variance_epsilon = default  # type: ignore[assignment]
    return "variance_epsilon"


def _copies(module: nn.Module) -> list[nn.Module]:
    """The module; or, of PEFT's wrapper for modules that are trained and saved whole, what is in it."""
    saved: Any = getattr(module, "modules_to_save", None)
    return [module] if saved is None else [*saved.values(), module.original_module]  # type: ignore[list-item]


def _patch_rms_norm_module(
    module: nn.Module,
    offset: float = 0.0,
    eps: float = 1e-6,
    casting_mode: str = "llama",
    in_place: bool = True,
    row_mode: bool | None = None,
) -> None:
    """Make one module an RMSNorm by decree, without a proof: the caller vouches for it."""
    for norm in _copies(module):
        name = _eps_name(norm, eps)
        plan = norms.NormPlan("rms_norm", name, offset, casting_mode, wide_weight=True, wide_x=True)
        install(norm, plan, _unrecorded())


def _patch_muse_glimmer_text_centered_rms_norm_module(module: nn.Module, eps: float = 1e-6) -> None:
    _patch_rms_norm_module(module, offset=1.0, eps=eps, casting_mode="gemma")


def _patch_muse_glimmer_scale_free_rms_norm_module(module: nn.Module, eps: float = 1e-6) -> None:
    """Make one module an RMSNorm without a weight by decree. Raises: ValueError if it has one."""
    for norm in _copies(module):
        if getattr(norm, "weight", None) is not None:
            raise ValueError(
                f"{type(norm).__name__} has a weight, but the norm has none; use _patch_rms_norm_module."
            )
        install(
            norm, norms.NormPlan("rms_norm", _eps_name(norm, eps), weighted=False), _unrecorded()
        )


def _patch_layer_norm_module(module: nn.Module, eps: float = 1e-6) -> None:
    """Make one module a LayerNorm by decree, without a proof."""
    for norm in _copies(module):
        install(norm, norms.NormPlan("layer_norm", _eps_name(norm, eps)), _unrecorded())


@dataclass(frozen=True)
class _Decreed(MethodPlan):
    """The forward of another class, over the children of the module."""

    kind = "mlp"

    by: type[nn.Module]

    def __str__(self) -> str:
        return self.by.__name__

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.by.forward(module, *args, **kwargs)


def _patch_swiglu_module(module: nn.Module, liger_module: type[nn.Module] | None = None) -> None:
    """Give one MLP the forward of `liger_module` by decree; without a class, what it is proven to compute, fused.

    Raises: ValueError if nothing is proven, or `liger_module` needs children that the module has not.
    """
    plan = mlps.find_plan(module) if liger_module is None else _Decreed(liger_module)
    if isinstance(plan, str):
        raise ValueError(f"{plan}: it is not a gated MLP that we know; leave it as it is.")
    install(module, plan, _unrecorded())


def _patch_geglu_module(module: nn.Module) -> None:
    """Give one MLP the forward of `LigerGEGLUMLP` by decree."""
    _patch_swiglu_module(module, LigerGEGLUMLP)


def _unrecorded() -> State:
    return State(PatchOptions(), PatchReport(""))
