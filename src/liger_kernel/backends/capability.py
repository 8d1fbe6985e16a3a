"""What an implementation that somebody registers says that it needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Capability:
    """What an implementation needs: a range of CUDA compute capabilities, modules, and whatever `predicate` checks."""

    min_cc: tuple[int, int] | None = None
    max_cc: tuple[int, int] | None = None
    modules: list[str] = field(default_factory=list)
    requires_cuda: bool = False
    predicate: Callable[[], bool] | None = None

    def is_satisfied(self, device: Any = None) -> bool:
        return self.reason_if_unsatisfied(device) is None

    def reason_if_unsatisfied(self, device: Any = None) -> str | None:
        for name in self.modules:
            try:
                importlib.import_module(name)
            except Exception as error:  # whatever a broken package raises
                return f"{name} cannot be imported: {error}"
        if self.requires_cuda or self.min_cc or self.max_cc:
            if not torch.cuda.is_available() or (device and torch.device(device).type != "cuda"):
                return "it needs a CUDA device"
            found = torch.cuda.get_device_capability(device)
            if found < (self.min_cc or found) or found > (self.max_cc or found):
                return f"compute capability {found} is not within {self.min_cc} and {self.max_cc}"
        if self.predicate is not None and not self.predicate():
            return "its predicate is false"
        return None
