"""Total variation distance by the kernel of `divergences`: 2 n elements read, n written."""

from liger_kernel.ops.divergences.kernels import backward, forward

__all__ = ["backward", "forward"]
