"""`AutoModelForCausalLM` that hands out patched models."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from liger_kernel.transformers.monkey_patch import (
    MODEL_TYPE_TO_APPLY_LIGER_FN,
    _apply_liger_kernel_to_instance,
    _known_flags,
)
from liger_kernel.transformers.patching.classes import patched_on_init
from liger_kernel.transformers.patching.state import state_of


class AutoLigerKernelForCausalLM(AutoModelForCausalLM):
    """`AutoModelForCausalLM`, whose models are patched as soon as they are built, before weights are loaded.

    The flags of the model type's `apply_liger_kernel_to_*` (of any, for a type without one) are taken out of the
    keyword arguments; everything else goes to HF. Only the returned model is patched, no class.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        config = kwargs.get("config")
        if config is None or isinstance(config, str):
            config = AutoConfig.from_pretrained(
                config or pretrained_model_name_or_path, **_for_config(kwargs)
            )
        flags, rest = _split(config, kwargs)
        with _patch_as_built(cls, config, flags):
            model = super().from_pretrained(pretrained_model_name_or_path, *model_args, **rest)
        return _patched(model, flags)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        flags, rest = _split(config, kwargs)
        with _patch_as_built(cls, config, flags):
            model = super().from_config(config, **rest)
        return _patched(model, flags)


def _for_config(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What decides which configuration is loaded."""
    names = (
        "cache_dir",
        "force_download",
        "local_files_only",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
    )
    return {name: kwargs[name] for name in (*names, "code_revision", "proxies") if name in kwargs}


def _split(config: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(flags of the entry point, everything else)."""
    names = _known_flags(MODEL_TYPE_TO_APPLY_LIGER_FN.get(getattr(config, "model_type", "")))
    flags = {name: value for name, value in kwargs.items() if name in names}
    return flags, {name: value for name, value in kwargs.items() if name not in names}


def _patch_as_built(
    auto: Any, config: Any, flags: dict[str, Any]
) -> contextlib.AbstractContextManager[None]:
    """Patch at the end of the constructor: before quantisation, device maps and their hooks settle on the modules."""
    try:
        found = auto._model_mapping[type(config)]
    except KeyError:  # remote code: its class is not known yet
        return contextlib.nullcontext()
    classes = found if isinstance(found, (list, tuple)) else (found,)
    return patched_on_init(classes, lambda model: _apply_liger_kernel_to_instance(model, **flags))


def _patched(model: nn.Module, flags: dict[str, Any]) -> nn.Module:
    if state_of(model) is None and type(model).__module__ in sys.modules:
        _apply_liger_kernel_to_instance(model, **flags)
    return model
