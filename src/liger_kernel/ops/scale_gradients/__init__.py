"""Gradients that were made in forward, times the gradient that arrives in backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liger_kernel.backends import kernels_of


def scale_gradients(buffers: Sequence[Tensor | None], factor: Tensor) -> None:
    """Multiply contiguous buffers, or None, by the 0-d `factor`, in place.

    No wait for the device: where kernels compute and the factor is 1, as after `loss.backward()`, nothing is touched.
    """
    there = [buffer for buffer in buffers if buffer is not None and buffer.numel()]
    for start in range(0, len(there), 3):
        kernels_of("scale_gradients", there[0]).scale_(there[start : start + 3], factor)
