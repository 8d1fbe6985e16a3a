"""The options of an op: one frozen dataclass, which travels whole from the public function to a kernel's launcher."""

from __future__ import annotations

from typing import Any, ClassVar


class OpOptions:
    """Base of the dataclasses in the ops' `contract.py`."""

    __match_args__: ClassVar[tuple[str, ...]]  # the names of a dataclass' fields, in order

    def named(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {name: getattr(self, name) for name in type(self).__match_args__}
