"""HF output classes with two more fields, `token_accuracy` and `predicted_tokens`, made on first use.

`LigerCausalLMOutputWithPast` is `transformers.modeling_outputs.CausalLMOutputWithPast` plus the fields, and so on for
every output class that HF ships.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import re
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

        found = getattr(modeling_outputs, base, None) or _of_model(base)
        if found is not None:
            return _liger_class(found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _of_model(name: str) -> type | None:
    """The output class of one model: `Qwen2_5_VLCausalLMOutputWithPast` is in the modeling file of `qwen2_5_vl`.

    From transformers 5.24 on such a file may have none: these models return one class of all.
    """
    from transformers import modeling_outputs, models

    wanted = re.sub("(CausalLM|Model)?OutputWithPast$", "", name).replace("_", "").lower()
    for folder in (module.name for module in pkgutil.iter_modules(models.__path__)):
        if folder.replace("_", "") == wanted:
            file = importlib.import_module(f"{models.__name__}.{folder}.modeling_{folder}")
            found = getattr(file, name, None)
            if found is None and name.endswith("CausalLMOutputWithPast"):
                found = getattr(modeling_outputs, "MultimodalCausalLMOutputWithPast", None)
            return found
    return None
