"""What stands for a tensor that is not computed yet, while HF's own code runs.

Code that knows what it gets may compute it together with its own work. Anything else that asks for numbers gets them:
slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Waiting:
    raw: Tensor  # of the shape, dtype and device of what is not computed yet

    def materialize(self) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        same = name in ("shape", "dtype", "device", "ndim", "size", "dim")
        return getattr(self.raw if same else self.materialize(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*real(args), **{name: real(value) for name, value in (kwargs or {}).items()})


def real(value: Any) -> Any:
    """`value` with tensors in it that have their numbers."""
    if isinstance(value, Waiting):
        return value.materialize()
    return type(value)(map(real, value)) if type(value) in (list, tuple) else value


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: Waiting, *args: Any) -> Any:
        return getattr(self.materialize(), name)(*real(args))

    return method


_DELEGATED = (
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv pow neg abs matmul rmatmul "
    "getitem setitem len iter lt le gt ge eq ne bool float int"
)
for _name in _DELEGATED.split():
    setattr(Waiting, f"__{_name}__", _delegate(f"__{_name}__"))
Waiting.__hash__ = object.__hash__  # type: ignore[method-assign]
