"""Where HuggingFace's own code is slow, which no kernel of ours replaces."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from liger_kernel.backends import is_there

#: how the modeling files name a package whose kernels they would use: since transformers 5.x, and before
_NAMED = (
    re.compile(r"use_kernel_func_from_hub_with_fallback\(\s*\"\w+\",\s*\"([\w-]+)\""),
    re.compile(r"lazy_load_kernel\(\s*\"([\w-]+)\""),
    re.compile(r"^\s+from (causal_conv1d|mamba_ssm|fla|xlstm)\b", re.MULTILINE),
)
#: import name -> what pip calls it
_PIP = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}


def slow_paths(model: nn.Module) -> Iterator[str]:
    """One line for each: what is slow, and the way out."""
    yield from _eager_attention(model)
    for package in sorted(_wanted(model)):
        if not is_there(package):
            pip = _PIP.get(package, package)
            yield (
                f"{package} is not installed: some layers run HuggingFace's plain PyTorch in place of its kernels. "
                f"pip install {pip}"
            )


def _eager_attention(model: nn.Module) -> Iterator[str]:
    seen = set()
    for path, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) != "eager" or id(config) in seen:
            continue
        if "attention" not in type(module).__name__.lower():
            continue
        seen.add(id(config))
        other = getattr(type(model), "_supports_sdpa", False)
        way = 'attn_implementation="sdpa"' if other else "its class knows no other"
        yield f"{path or 'the model'}: attention is eager and stores all its scores, sequence x sequence ({way})"


def _wanted(model: nn.Module) -> set[str]:
    files = {type(m).__module__ for m in model.modules()}
    texts = (inspect.getsource(sys.modules[f]) for f in files if "modeling_" in f)
    return {
        name.replace("-", "_") for text in texts for named in _NAMED for name in named.findall(text)
    }
