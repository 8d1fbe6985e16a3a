"""What the ops that normalise rows share: kernels (`kernels.py`), casting modes, and the incumbent's helpers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger_kernel._core.checks import check_choice
from liger_kernel.backends import kernels_of, use_implementation

#: casting mode -> the code that the incumbent's helpers return and take
CASTING_MODES = {"llama": 0, "gemma": 1, "none": -1}


def mode_name(casting_mode: str | int) -> str:
    """The name of a casting mode given by name or code."""
    check_choice("casting_mode", casting_mode, (*CASTING_MODES, *CASTING_MODES.values()))
    return next(name for name, code in CASTING_MODES.items() if casting_mode in (name, code))


def triton_kernels(op: str, x: Tensor) -> Any:
    """What the incumbent's helpers promise to run; raises RuntimeError where it cannot."""
    with use_implementation("triton"):
        return kernels_of(op, x)


def launch_configuration(x: Tensor, centered: bool = False) -> tuple[int, int]:
    """(block size, warps) of the forward kernel, as the incumbent's helpers return them."""
    from liger_kernel.backends import facts_of
    from liger_kernel.ops.norms.kernels import Config

    config = Config.of(x.shape[-1], facts_of(x.device), centered)
    return config.block, config.warps
