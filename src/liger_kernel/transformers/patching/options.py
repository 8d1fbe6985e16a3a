"""What a caller may ask of `patch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from liger_kernel.loss_head.plan import ChunkOptions


@dataclasses.dataclass(frozen=True)
class Option:
    """A keyword argument of `patch` that switches sites on or off; a site brings its own, or shares one."""

    name: str
    default: bool
    help: str


LONG = Option("long_context", False, "for long sequences: `tiled_mlp` and `offload_checkpoints`.")

#: what a caller may get in the place of logits that were fused with the loss
LOGITS = ("lazy", "none", "real")


@dataclasses.dataclass(frozen=True)
class PatchOptions:
    """The keyword arguments of `liger_kernel.patch`, checked.

    Attributes:
        enabled: the names of the options of sites that are on.
        chunk_size: rows of logits held at a time by the fused loss; default: chosen from a byte budget.
        memory_budget: bytes for the slab of logits; an alternative to `chunk_size`.
        accum_dtype: dtype in which the gradient of the head's weight is accumulated; default: chosen by chunk count.
        strict: raise ValueError if nothing at all could be replaced.
        logits: what `output.logits` is where the loss was fused. "lazy": a tensor that is computed when it is read, in
            the modes and with the weights of the forward; "none": None; "real": computed in the forward.
    """

    enabled: frozenset[str] = frozenset()
    chunk_size: int | None = None
    memory_budget: int | None = None
    accum_dtype: torch.dtype | None = None
    strict: bool = False
    logits: str = "lazy"

    def __post_init__(self) -> None:
        if {"cross_entropy", "fused_linear_cross_entropy"} <= self.enabled:
            raise ValueError(
                "cross_entropy=True and fused_linear_cross_entropy=True exclude each other: "
                "the fused linear loss leaves no logits for the other. Set one of them to False."
            )
        wanted = {"chunk_size": int, "memory_budget": int, "accum_dtype": torch.dtype}
        for name, kind in wanted.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(
                    f"{name}={value!r} is no {kind.__name__}; pass None for the default."
                )
        ChunkOptions(**{name: getattr(self, name) for name in wanted})
        if self.logits not in LOGITS:
            raise ValueError(f"logits={self.logits!r} is none of {', '.join(map(repr, LOGITS))}.")

    @classmethod
    def of(cls, options: Iterable[Option], **given: Any) -> PatchOptions:
        """Check the names; a flag given as None means False, as the entry points of HF pass it."""
        switches = {option.name: option.default for option in options}
        others = {field.name for field in dataclasses.fields(cls)} - {"enabled"}
        unknown = sorted(given.keys() - switches.keys() - others)
        if unknown:
            known = ", ".join(sorted(switches.keys() | others))
            raise TypeError(f"Unknown option(s) {', '.join(unknown)}; known: {known}.")
        for name in (switches.keys() | {"strict"}) & given.keys():
            if not isinstance(given[name], (bool, int, type(None))):
                raise TypeError(f"{name}={given[name]!r} is no bool; pass True or False.")
        values = {name: given[name] for name in others & given.keys()}
        values["strict"] = bool(values.get("strict"))
        on = frozenset(name for name, default in switches.items() if given.get(name, default))
        return cls(on, **values)


#: options of the fused loss that are handed on to the op when they are set
LOSS_OPTIONS = ("chunk_size", "memory_budget", "accum_dtype")
