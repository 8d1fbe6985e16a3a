"""HF output classes with two more fields, `token_accuracy` and `predicted_tokens`, made on first use.

`LigerCausalLMOutputWithPast` is `transformers.modeling_outputs.CausalLMOutputWithPast` plus the fields, and so on for
every output class that HF ships.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any, cast

from torch import Tensor


@functools.cache
def _liger_class(base: Any) -> Any:
    if base.__name__.startswith("Liger"):
        return base
    extra = [
        (n, "Tensor | None", dataclasses.field(default=None))
        for n in ("token_accuracy", "predicted_tokens")
    ]
    name = f"Liger{base.__name__}"
    made = dataclasses.make_dataclass(
        name, extra, bases=(base,), namespace={"__module__": __name__}
    )
    setattr(sys.modules[__name__], name, made)  # where pickle looks for it
    return made


def with_metrics(output: Any, **metrics: Tensor) -> Any:
    """`output` (an HF ModelOutput) as its Liger class, with `metrics` filled in."""
    return _liger_class(cast(Any, type(output)))(**dict(output), **metrics)


def __getattr__(name: str) -> type:
    base = name.removeprefix("Liger")
    if name.startswith("Liger") and base.endswith("OutputWithPast"):
        from transformers import modeling_outputs

        found = getattr(modeling_outputs, base, None) or _search(base)
        if found is not None:
            return _liger_class(found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _search(name: str) -> type | None:
    """An output class that a modeling file already imported defines."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers.models.") and name in getattr(
            module, "__dict__", {}
        ):
            return getattr(module, name)
    return None
