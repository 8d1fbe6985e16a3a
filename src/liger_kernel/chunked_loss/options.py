"""What the options of all losses share: none is accepted that the loss would not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class LossOptions:
    #: options that are above 0 where they are given
    positive: ClassVar[tuple[str, ...]] = ()
    #: option -> the loss types that read it
    read_by: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    loss_type: str = ""
    chunk_size: int

    def __post_init__(self) -> None:
        check_chunk_size(self.chunk_size)
        for name in self.positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        for name, loss_types in self.read_by.items():
            value, default = getattr(self, name), getattr(type(self), name)
            if value != default and self.loss_type not in loss_types:
                raise ValueError(
                    f"{name}={value!r} has no effect with loss_type={self.loss_type!r}, only with "
                    f"{', '.join(loss_types)}; leave it at {default!r}."
                )


def check_chunk_size(chunk_size: int) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}.")
