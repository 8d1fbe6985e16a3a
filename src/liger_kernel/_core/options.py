"""The options of an op: one frozen dataclass, which travels whole from the public function to a kernel's launcher."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any, ClassVar, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class OpOptions:
    """Base of the dataclasses in the ops' `contract.py`."""

    __match_args__: ClassVar[tuple[str, ...]]  # the names of a dataclass' fields, in order

    def named(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {name: getattr(self, name) for name in type(self).__match_args__}


def parameters_of(function: Callable[..., Any]) -> list[Parameter]:
    return list(inspect.signature(function).parameters.values())


def spells_out(options: Sequence[Parameter], before: str | None = None) -> Callable[[F], F]:
    """Decorates a function of `**options`, which it hands on: `options`, the parameters of what it hands them to, take
    their place in its signature, before the parameter `before`, and may be given by position."""

    def decorate(function: F) -> F:
        own = [p for p in parameters_of(function) if p.kind is not Parameter.VAR_KEYWORD]
        at = next((i for i, p in enumerate(own) if p.name == before), len(own))
        merged = [*own[:at], *options, *own[at:]]
        names = [p.name for p in merged if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        first = sum(p.kind is Parameter.POSITIONAL_OR_KEYWORD for p in own[:at])

        @functools.wraps(function)
        def spelled(*args: Any, **kwargs: Any) -> Any:
            if len(args) <= first:  # parameters of `function` alone
                return function(*args, **kwargs)
            if len(args) > len(names):
                raise TypeError(
                    f"{function.__name__} takes {len(names)} positional arguments, got {len(args)}."
                )
            # torch 2.6 compiles no zip of unequal lengths
            return function(**dict(zip(names[: len(args)], args, strict=True)), **kwargs)

        returned = inspect.signature(function).return_annotation
        vars(spelled)["__signature__"] = Signature(merged, return_annotation=returned)
        return spelled  # type: ignore[return-value]

    return decorate
