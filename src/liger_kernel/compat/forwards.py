"""`liger_kernel.transformers.model.<type>`: forwards that people put on HuggingFace's classes, or on one model.

    LlamaForCausalLM.forward = lce_forward
    model.forward = types.MethodType(lce_forward, model)

One forward serves them all: it runs HF's own, with the loss fused as `liger_kernel.patch` fuses it. What differs from
type to type is data: the names of the forwards, and of their arguments.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

PACKAGE = "liger_kernel.transformers.model"

_START = "input_ids attention_mask position_ids past_key_values inputs_embeds labels"
_OUTPUTS = "use_cache output_attentions output_hidden_states"
_END = "cache_position logits_to_keep skip_logits"
_TEXT = f"{_START} {_OUTPUTS} return_dict {_END}"
_LATER_TEXT = f"{_START} {_OUTPUTS} {_END} return_dict"
_ROUTED = f"{_START} {_OUTPUTS} output_router_logits"
_PIXELS = "pixel_values pixel_values_videos image_grid_thw video_grid_thw"
_GRID = f"{_START} {_OUTPUTS} return_dict {_PIXELS} rope_deltas mm_token_type_ids cache_position"
_QWEN3_5 = f"{_START} {_PIXELS} mm_token_type_ids logits_to_keep skip_logits"
_GEMMA_IMAGE = (
    "input_ids pixel_values attention_mask position_ids past_key_values token_type_ids cache_position inputs_embeds "
    f"labels {_OUTPUTS} return_dict logits_to_keep skip_logits **lm_kwargs"
)
_LLAVA = (
    "input_ids pixel_values attention_mask position_ids past_key_values inputs_embeds vision_feature_layer "
    f"vision_feature_select_strategy labels {_OUTPUTS} return_dict cache_position logits_to_keep image_sizes "
    "skip_logits **lm_kwargs"
)

_USUAL = (
    "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "glm4", "llama", "llama4", "ministral", "mistral", "nemotron",
    "olmo2", "olmo3", "phi3", "qwen2", "smollm3",
)  # fmt: skip

#: model type -> name of a forward -> its arguments, all of them optional
FORWARDS: dict[str, dict[str, str]] = {
    **{name: {"lce_forward": _TEXT} for name in _USUAL},
    **{
        name: {"lce_forward": _LATER_TEXT}
        for name in ("exaone4", "falcon_h1", "hunyuan_v1", "qwen3")
    },
    **{
        name: {"lce_forward": f"{_ROUTED} {_END} return_dict"}
        for name in ("qwen3_moe", "qwen3_next")
    },
    **{name: {"lce_forward": _LLAVA} for name in ("internvl", "llava")},
    **{
        name: {"lce_forward": f"{_GRID} second_per_grid_ts logits_to_keep skip_logits"}
        for name in ("qwen3_vl", "qwen3_vl_moe")
    },
    "deepseek_v4": {
        "lce_forward": f"{_START} use_cache output_router_logits logits_to_keep skip_logits"
    },
    "gemma3": {
        "causal_forward": f"{_TEXT} **loss_kwargs",
        "multimodal_forward": _GEMMA_IMAGE,
    },
    "gemma4": {
        "causal_forward": f"{_TEXT} **loss_kwargs",
        "multimodal_forward": "input_ids pixel_values pixel_values_videos input_features attention_mask "
        "input_features_mask position_ids image_position_ids video_position_ids past_key_values mm_token_type_ids "
        f"inputs_embeds labels {_OUTPUTS} return_dict {_END} **lm_kwargs",
    },
    # `generate` passes on what a forward names: the pixels, too
    "glm4v": {"lce_forward": f"{_START} {_OUTPUTS} return_dict mm_token_type_ids {_END} {_PIXELS}"},
    "glm4v_moe": {
        "lce_forward": f"{_START} {_PIXELS} rope_deltas mm_token_type_ids {_END} return_dict"
    },
    "gpt_oss": {"lce_forward": f"{_ROUTED} {_END}"},
    "mixtral": {"lce_forward": f"{_ROUTED} return_dict {_END}"},
    "mllama": {
        "lce_forward": "input_ids attention_mask position_ids cross_attention_states cross_attention_mask "
        "full_text_row_masked_out_mask past_key_values inputs_embeds labels "
        f"{_OUTPUTS} return_dict {_END} pixel_values aspect_ratio_mask aspect_ratio_ids"
    },
    "muse_glimmer": {
        "lce_forward": "input_ids pixel_values image_grid_thw pixel_values_videos video_grid_thw attention_mask "
        "position_ids past_key_values inputs_embeds labels use_cache logits_to_keep skip_logits"
    },
    "paligemma": {"lce_forward": _GEMMA_IMAGE},
    "qwen2_5_vl": {"lce_forward": f"{_GRID} second_per_grid_ts skip_logits"},
    "qwen2_vl": {"lce_forward": f"{_GRID} skip_logits"},
    "qwen3_5": {
        "lce_forward": f"{_START} use_cache {_END}",
        "lce_forward_for_multimodal": _QWEN3_5,
    },
    "qwen3_5_moe": {
        "lce_forward": f"{_ROUTED} mm_token_type_ids {_END} return_dict",
        "lce_forward_conditional_generation": _QWEN3_5,
    },
    "smolvlm": {
        "lce_forward": f"{_START.removesuffix('labels')}pixel_values pixel_attention_mask image_hidden_states labels "
        f"{_OUTPUTS} cache_position return_dict logits_to_keep skip_logits **lm_kwargs"
    },
}
#: model types of two modeling files
_FILES = {"hunyuan_v1": ("hunyuan_v1_dense", "hunyuan_v1_moe")}
_OWN = "_liger_own_forward"  # of a class: HF's forward, which the user may have replaced since


def fill(module: ModuleType) -> None:
    """Make `module` the one of its model type; transformers is imported when a forward is."""
    model_type = module.__name__.rpartition(".")[2]

    def get(name: str) -> Any:
        if name in FORWARDS[model_type]:
            for file in _FILES.get(model_type, (model_type,)):
                _note_forwards(
                    importlib.import_module(f"transformers.models.{file}.modeling_{file}")
                )
            found = _forward(module.__name__, name, FORWARDS[model_type][name])
        elif name == "lce_maybe_trainable_lm_head":
            found = importlib.import_module(
                "liger_kernel.compat.lm_head"
            ).lce_maybe_trainable_lm_head
        elif name.startswith("Liger") and name.endswith("OutputWithPast"):
            found = getattr(importlib.import_module("liger_kernel.transformers.outputs"), name)
        else:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return module.__dict__.setdefault(name, found)

    module.__doc__ = __doc__
    module.__getattr__ = get  # type: ignore[method-assign]


def _note_forwards(modeling: ModuleType) -> None:
    from liger_kernel.transformers.patching.classes import module_classes
    from liger_kernel.transformers.patching.forward import is_ours

    for cls in module_classes(modeling):
        own = vars(cls).get("forward")
        if own is not None and not is_ours(own):
            setattr(cls, _OWN, own)


def _own_forward(model: nn.Module) -> Callable[..., Any]:
    """HF's forward of the model's class."""
    cls: Any = type(model)
    own = getattr(cls, _OWN, None) or cls.forward
    if hasattr(own, "_liger"):
        raise TypeError(
            f"{cls.__name__}.forward was replaced by a forward for models of another type, and is lost; import it from "
            f"{PACKAGE}.<type> with the type of the class, or leave the class alone and call liger_kernel.patch(model)."
        )
    return functools.partial(own, model)


def _forward(module: str, name: str, arguments: str) -> Callable[..., Any]:
    names = [argument for argument in arguments.split() if not argument.startswith("*")]
    more = arguments.partition("**")[2] or "kwargs"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """HF's own forward of the class of `self`, with its loss fused as `liger_kernel.patch` fuses it.

        `skip_logits`: True leaves no logits, False makes them; default: none in training. A model with labels returns
        `loss`; arguments that are None are those of HF's forward.
        """
        from liger_kernel.transformers.patching.forward import KEY, running

        if len(args) > len(names):
            raise TypeError(f"{name}() takes {len(names)} arguments, got {len(args)}.")
        given = dict(zip(names, args))  # noqa: B905 (torch 2.6 traces no strict=)
        if twice := given.keys() & kwargs.keys():
            raise TypeError(
                f"{name}() got {', '.join(sorted(twice))} twice: by position and by name."
            )
        given = {key: value for key, value in {**given, **kwargs}.items() if value is not None}
        own, site = _own_forward(self), self.__dict__.get(KEY)
        if "_is_replica" in self.__dict__:  # of nn.DataParallel: its weights are no parameters
            return own(**given)
        if site is None or site.state is None:
            _fuse(self)
            site = self.__dict__.get(KEY)
        if site is None or (running.calls and running.calls[-1].site is site):
            return own(**given)
        return site.call(own, **given)

    parameter = inspect.Parameter
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            parameter("self", parameter.POSITIONAL_OR_KEYWORD),
            *(
                parameter(
                    n, parameter.POSITIONAL_OR_KEYWORD, default=0 if n == "logits_to_keep" else None
                )
                for n in names
            ),
            parameter(more, parameter.VAR_KEYWORD),
        ]
    )
    forward.__module__, forward.__name__, forward.__qualname__ = module, name, name
    forward._liger = False  # type: ignore[attr-defined] # fuses, and is not for us to remove
    return forward


@torch.compiler.disable
def _fuse(model: nn.Module) -> None:
    """At the first call, and at the first after `unpatch`."""
    from liger_kernel.transformers import patching
    from liger_kernel.transformers.patching.sites import loss
    from liger_kernel.transformers.patching.state import state_of

    state = state_of(model)
    if state is None:
        only = {option.name: option in loss.SITE.options for option in patching.OPTIONS}
        patching.patch(model, logits="none", **only)
    else:
        loss.fuse(model, state)
