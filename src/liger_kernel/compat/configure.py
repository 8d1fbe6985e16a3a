"""`liger_kernel.ops.configure`: buffers of a native runtime, which is no part of this library."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FusedLinearCrossEntropyConfig:
    max_tokens: int
    hidden_size: int
    local_vocab_size: int
    group: str | None = None
    tiles_per_reduce: int = 1


@dataclass(frozen=True)
class MoEConfig:
    max_tokens: int
    hidden_size: int
    num_experts: int
    top_k: int
    num_hosts: int
    gpus_per_host: int
    group: str | None = None
    max_inflight: int = 1


def configure(
    *,
    process_groups: Mapping[str, Any] | None = None,
    bootstrap_group: Any = None,
    device: Any = None,
    flsce: FusedLinearCrossEntropyConfig | None = None,
    moe: MoEConfig | None = None,
) -> bool:
    """False, with a warning: nothing has to be set up before ops run, and there is no native runtime to set up."""
    warnings.warn(
        "configure() has no effect: ops here allocate what a call needs, and have no native runtime. Leave it out.",
        stacklevel=2,
    )
    return False
