"""What stands for a tensor that is not computed yet, while HF's own code runs.

Code that knows what it gets may compute it together with its own work. Anything else that asks for numbers gets them:
slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Delayed:
    """Its value is what `materialize` returns."""

    def materialize(self) -> Tensor:
        raise NotImplementedError


class Waiting(Delayed):
    raw: Tensor  # of the shape, dtype and device of what is not computed yet

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
    if isinstance(value, Delayed):
        return value.materialize()
    return type(value)(map(real, value)) if type(value) in (list, tuple) else value


def delegate(cls: type[Delayed], operators: str) -> None:
    """Let these operators of `cls` compute with the value."""
    for operator in operators.split():
        setattr(cls, f"__{operator}__", _of_the_value(f"__{operator}__"))
    cls.__hash__ = object.__hash__  # type: ignore[method-assign]


def _of_the_value(name: str) -> Callable[..., Any]:
    def method(self: Delayed, *args: Any) -> Any:
        return getattr(self.materialize(), name)(*real(args))

    return method


delegate(
    Waiting,
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv pow neg abs matmul rmatmul "
    "getitem setitem len iter lt le gt ge eq ne bool float int",
)
