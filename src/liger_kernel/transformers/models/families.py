"""The rows behind `apply_liger_kernel_to_<name>`.

A row says only what structure cannot: the name, the flags with their defaults (a public contract), the values of
`config.model_type` it serves, and the modeling files whose classes a call without a model patches. What is replaced in
a model is found and proven by `patching`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_LLAMA: Mapping[str, bool] = {
    "rope": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": True,
    "rms_norm": True,
    "swiglu": True,
}
_GEMMA: Mapping[str, bool] = {
    "rope": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": True,
    "rms_norm": True,
    "geglu": True,
}

#: flag of an entry point -> option of `patch`
OPTION_OF = {
    "rope": "rope",
    "cross_entropy": "cross_entropy",
    "fused_linear_cross_entropy": "fused_linear_cross_entropy",
    "rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "swiglu": "mlp",
    "geglu": "mlp",
}


@dataclass(frozen=True)
class Family:
    """One entry point, `apply_liger_kernel_to_<name>(**flags, model=None)`."""

    name: str
    flags: Mapping[str, bool]
    model_types: tuple[str, ...]
    modeling: str  # transformers.models.<modeling>.modeling_<modeling>

    def options(self, flags: Mapping[str, bool]) -> dict[str, bool]:
        """The options of `patch` that these flags mean; a kind without a flag is left alone."""
        options = dict.fromkeys(OPTION_OF.values(), False)
        for name, default in self.flags.items():
            options[OPTION_OF[name]] = bool(flags.get(name, default))
        return options


def _family(
    name: str, flags: Mapping[str, bool], modeling: str | None = None, *more_types: str
) -> Family:
    return Family(name, flags, (name, *more_types), modeling or name)


FAMILIES = (
    _family("gemma", _GEMMA),
    _family("gemma2", _GEMMA),
    _family("gemma3_text", _GEMMA, "gemma3"),
    _family("llama", _LLAMA),
    _family("mistral", _LLAMA),
    _family("phi3", _LLAMA),
    _family("qwen2", _LLAMA),
    _family("qwen3", _LLAMA),
)
