"""Scaled gradients in plain PyTorch: the specification."""

from torch import Tensor


def scale_gradients(
    a: Tensor, b: Tensor | None, c: Tensor | None, factor: Tensor
) -> tuple[Tensor | None, ...]:
    """Each times the 0-d factor, rounded once."""
    return tuple(None if t is None else t * factor for t in (a, b, c))
