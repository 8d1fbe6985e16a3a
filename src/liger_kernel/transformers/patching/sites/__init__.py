"""Every kind of replacement: one file of this folder each, which ends with its `SITE`."""

from __future__ import annotations

from importlib import import_module

from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.site import Site

#: the files, in the order in which `patch` visits them and the report shows them
_FILES = (
    "loss",
    "cross_entropy",
    "norms",
    "hyper_connections",
    "residual",
    "streams",
    "attention_residuals",
    "short_conv",
    "mlps",
    "relu_squared",
    "experts",
    "rope",
    "lora",
    "lora_experts",
    "qk_norms",
    "checkpoints",
    "graphs",
)

SITES: tuple[Site, ...] = tuple(import_module(f"{__name__}.{file}").SITE for file in _FILES)

#: what switches them, each once
OPTIONS: tuple[Option, ...] = tuple(dict.fromkeys(o for site in SITES for o in site.options))
