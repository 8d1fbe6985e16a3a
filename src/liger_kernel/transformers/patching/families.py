"""The rows behind `apply_liger_kernel_to_<name>`.

A row says only what structure cannot: the name, the flags with their defaults (a public contract), the values of
`config.model_type` it serves, and the modeling files whose classes a call without a model patches. What is replaced in
a model is found and proven by `patching`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Flags = Mapping[str, Any]


def _flags(**changed: bool) -> Flags:
    """The usual flags, with what differs."""
    usual = {
        "rope": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": True,
        "rms_norm": True,
        "swiglu": True,
    }
    return {**usual, **changed}


def _with_layer_norm(flags: Flags, after: str, default: bool = True) -> Flags:
    """`layer_norm` is one more flag behind `after`: callers pass flags by position, too."""
    names = list(flags)
    at = names.index(after) + 1
    return {n: flags.get(n, default) for n in (*names[:at], "layer_norm", *names[at:])}


_LLAMA = _flags()
_NO_ROPE = _flags(rope=False)
_GEMMA = {("geglu" if name == "swiglu" else name): default for name, default in _LLAMA.items()}
_TEXT_IN_IMAGE = {"cross_entropy": False, "fused_linear_cross_entropy": True}
_NORMS_IN_IMAGE = {**_TEXT_IN_IMAGE, "rms_norm": True, "layer_norm": True}
_LOSS = "fused_linear_cross_entropy"

#: flag of an entry point -> option of `patch`
OPTION_OF = {
    "rope": "rope",
    "cross_entropy": "cross_entropy",
    "fused_linear_cross_entropy": "fused_linear_cross_entropy",
    "rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "swiglu": "mlp",
    "geglu": "mlp",
    "relu_squared": "mlp",
}


@dataclass(frozen=True)
class Family:
    """One entry point, `apply_liger_kernel_to_<name>(**flags, model=None)`."""

    name: str
    flags: Flags  # with "model" among them where it is not the last
    model_types: tuple[str, ...]
    modeling: str  # transformers.models.<modeling>.modeling_<modeling>
    #: kinds without a flag that are patched all the same: those of the text model inside an image-text model
    always: tuple[str, ...] = ()
    takes_more: bool = False  # the flags of other entry points, too: those of the model inside

    def options(self, flags: Flags) -> dict[str, bool]:
        """The options of `patch` that these flags mean; a kind without a flag is left alone, unless `always`."""
        given = {**self.flags, **flags}
        options = {}
        for option in OPTION_OF.values():
            values = [
                given[name] for name, of in OPTION_OF.items() if of == option and name in given
            ]
            options[option] = any(values) if values else option in self.always
        return options


def _family(name: str, flags: Flags, *more_types: str, modeling: str = "", **more: Any) -> Family:
    return Family(name, flags, (name, *more_types), modeling or name, **more)


_TEXT = ("rms_norm", "mlp", "rope")

FAMILIES = (
    _family("deepseek_v2", _NO_ROPE),
    _family("deepseek_v3", _NO_ROPE),
    _family("deepseek_v4", _flags(rope=False, swiglu=False)),
    _family("exaone4", _LLAMA),
    _family("falcon_h1", _LLAMA),
    _family("gemma", _GEMMA),
    _family("gemma2", _GEMMA),
    _family("gemma3", _with_layer_norm(_GEMMA, _LOSS)),
    _family("gemma3_text", _GEMMA, modeling="gemma3"),
    _family("gemma4", _with_layer_norm({**_GEMMA, "rope": False}, _LOSS, default=False)),
    _family("gemma4_text", {**_GEMMA, "rope": False}, modeling="gemma4"),
    _family("glm4", _NO_ROPE),
    _family("glm4v", _NO_ROPE),
    _family("glm4v_moe", _NO_ROPE),
    _family("gpt_oss", _flags(swiglu=False)),
    _family("granite", _flags(cross_entropy=True, fused_linear_cross_entropy=False)),
    _family("hunyuan_v1_dense", _LLAMA),
    _family("hunyuan_v1_moe", _LLAMA),
    _family("internvl", _NORMS_IN_IMAGE, always=("mlp", "rope"), takes_more=True),
    _family("llama", _LLAMA),
    _family("llama4", {**_LLAMA, "model": None, "layer_norm": True}, "llama4_text"),
    _family("llava", _TEXT_IN_IMAGE, always=_TEXT, takes_more=True),
    _family("ministral", _LLAMA),
    _family("mistral", _LLAMA),
    _family("mixtral", _LLAMA),
    _family("mllama", _with_layer_norm(_LLAMA, _LOSS), "mllama_text_model"),
    _family("muse_glimmer", _with_layer_norm(_LLAMA, _LOSS)),
    _family("nemotron", {"relu_squared": True, **_TEXT_IN_IMAGE}, takes_more=True),
    _family("olmo2", _LLAMA),
    _family("olmo3", _LLAMA),
    _family("paligemma", _with_layer_norm(_GEMMA, _LOSS)),
    _family("phi3", _LLAMA),
    _family("pixtral", {"rope": True, "rms_norm": True, "swiglu": True}),
    _family("qwen2", _LLAMA),
    _family("qwen2_5_vl", _LLAMA, "qwen2_5_vl_text"),
    _family("qwen2_vl", _with_layer_norm(_LLAMA, "rms_norm"), "qwen2_vl_text"),
    _family("qwen3", _LLAMA),
    _family("qwen3_5", _NO_ROPE, "qwen3_5_text"),
    _family("qwen3_5_moe", _NO_ROPE, "qwen3_5_moe_text"),
    _family("qwen3_moe", _LLAMA),
    _family("qwen3_next", _NO_ROPE),
    _family("qwen3_vl", _flags(swiglu=False), "qwen3_vl_text"),
    _family("qwen3_vl_moe", _LLAMA, "qwen3_vl_moe_text"),
    _family("smollm3", _LLAMA),
    _family("smolvlm", _NORMS_IN_IMAGE, always=("mlp", "rope"), takes_more=True),
)
