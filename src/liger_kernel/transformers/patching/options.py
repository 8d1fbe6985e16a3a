"""What a caller may ask of `patch`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Options:
    """The keyword arguments of `liger_kernel.patch`.

    Attributes:
        fused_linear_cross_entropy: run `lm_head` and the loss as one fused op; the logits are never stored.
        cross_entropy: keep the logits, fuse the loss alone (excludes `fused_linear_cross_entropy`).
        rms_norm, layer_norm, mlp, rope: replace modules of that kind where the replacement is proven equal; `mlp`
            stands for gated MLPs, the gates of experts, and squared ReLUs.
        chunk_size: rows of logits held at a time by the fused loss; default: chosen from a byte budget.
        memory_budget: bytes for the slab of logits; an alternative to `chunk_size`.
        accum_dtype: dtype in which the gradient of the head's weight is accumulated; default: chosen by chunk count.
        strict: raise ValueError if nothing at all could be replaced.
    """

    fused_linear_cross_entropy: bool = True
    cross_entropy: bool = False
    rms_norm: bool = True
    layer_norm: bool = True
    mlp: bool = True
    rope: bool = True
    chunk_size: int | None = None
    memory_budget: int | None = None
    accum_dtype: torch.dtype | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.cross_entropy and self.fused_linear_cross_entropy:
            raise ValueError(
                "cross_entropy=True and fused_linear_cross_entropy=True exclude each other: "
                "the fused linear loss leaves no logits for the other. Set one of them to False."
            )
        if self.chunk_size is not None and self.memory_budget is not None:
            raise ValueError(
                f"chunk_size={self.chunk_size} and memory_budget={self.memory_budget} both set the size "
                "of the slab of logits; pass one of them."
            )

    @classmethod
    def of(cls, **given: Any) -> Options:
        """Check the names; a flag given as None means False, as the entry points of HF pass it."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(given.keys() - known.keys())
        if unknown:
            raise TypeError(
                f"Unknown option(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}."
            )
        flags = {name for name, field in known.items() if isinstance(field.default, bool)}
        values: dict[str, Any] = {n: bool(v) if n in flags else v for n, v in given.items()}
        return cls(**values)


#: options of the fused loss that are handed on to the op when they are set
LOSS_OPTIONS = ("chunk_size", "memory_budget", "accum_dtype")
