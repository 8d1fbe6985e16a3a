"""Checks an implementation of an op against the op's contract when it is loaded, not when it is called."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

Saved = tuple[Tensor | None, ...]  # what forward keeps for backward
Grads = Sequence[Tensor | None]
Needs = Sequence[bool]  # of each tensor of forward: whether it requires a gradient


class Backward(Protocol):
    """The half of a contract that is the same for every op with an autograd node."""

    def backward(self, grads: Grads, saved: Saved, *, options: Any, needs: Needs) -> Grads:
        """One gradient (or None) per tensor of `forward`, of which `needs` says who requires one."""


class Partial(Protocol):
    """What a file adds that serves only some options or tensors of its op."""

    #: `unserved(*tensors, options)`, as in `forward`: why these are left to the reference; None if they are served
    unserved: Callable[..., str | None]


def check_contract(found: Any, contract: type, where: str) -> Any:
    """`found` (a module or an object) if it has every member of the Protocol `contract` with the same parameters.

    Raises: TypeError that names each member that is missing, or takes other parameters, and the spelling it may have.
    """
    faults = []
    members = {n: m for n, m in inspect.getmembers(contract, inspect.isfunction) if n[0] != "_"}
    wanted_of = {n: list(inspect.signature(m).parameters)[1:] for n, m in members.items()}
    if hasattr(found, "unserved"):
        wanted_of["unserved"] = [p for p in wanted_of.get("forward", ()) if p != "needs"]
    for name, wanted in wanted_of.items():
        function = getattr(found, name, None)
        if function is None:
            there = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            close = difflib.get_close_matches(name, there, 1)
            hint = f" (is {close[0]!r} misspelt?)" if close else ""
            faults.append(f"{name}({', '.join(wanted)}) is missing{hint}")
        elif list(inspect.signature(function).parameters) != wanted:
            taken = ", ".join(inspect.signature(function).parameters)
            faults.append(f"{name}({taken}) must take ({', '.join(wanted)})")
    if faults:
        raise TypeError(
            f"{where} does not satisfy {contract.__module__}.{contract.__qualname__}: {'; '.join(faults)}."
        )
    return found
