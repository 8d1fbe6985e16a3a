"""Running a function inside the forward of an FSDP1 unit, where its parameters are whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class _FSDPForwardRedirection:
    """`redirect(wrapper, function, *args)` calls `function(*args)` while the hooks around `wrapper`'s forward fire."""

    def __call__(
        self, wrapper_module: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        if not isinstance(wrapper_module, FullyShardedDataParallel):
            raise TypeError(
                f"_FSDPForwardRedirection takes a FullyShardedDataParallel, got {type(wrapper_module).__name__}; "
                "call the function directly for a module that is not sharded."
            )
        inner = wrapper_module._fsdp_wrapped_module
        had, original = "forward" in inner.__dict__, inner.__dict__.get("forward")

        def redirected(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if had:
                inner.__dict__["forward"] = original
            else:
                del inner.__dict__["forward"]
            return method(*inner_args, **inner_kwargs)

        inner.__dict__["forward"] = redirected
        return wrapper_module(*args, **kwargs)
